"""`--since`: a span that ends now, such as 2h, or a date and time."""

import re
from datetime import datetime, timedelta
from typing import Any

import click

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Time(click.ParamType):
    """Converts to a time with a zone; without one, the zone of this machine is meant."""

    name = "span|time"

    def convert(self, value: Any, param, context) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            if span := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value):
                ago = timedelta(**{UNITS[span[2]]: float(span[1])})
                return datetime.now().astimezone() - ago
            return datetime.fromisoformat(re.sub("Z$", "+00:00", value)).astimezone()
        except OverflowError:
            self.fail(f"{value!r} is too long ago: there was no year 0.", param, context)
        except ValueError:
            self.fail(
                f"{value!r} is neither a span such as 30m, 2h or 3d nor a time such as "
                "2026-11-24 or '2026-11-24 05:12'.", param, context,
            )  # fmt: skip


class Since(Time):
    """Refuses a time that is still to come: nothing is found since then, as where all is well."""

    def convert(self, value: Any, param, context) -> datetime:
        since = super().convert(value, param, context)
        now = datetime.now().astimezone()
        if since > now:
            said = f"{since:%F %T %Z} is still to come: now it is {now:%F %T %Z}."
            self.fail(said, param, context)
        return since
