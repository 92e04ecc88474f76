"""`--since`: a span such as 2h, or a point in time."""

import re
from datetime import datetime, timedelta, timezone

import click

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Since(click.ParamType):
    """Becomes a datetime with its time zone; without one, UTC is meant."""

    name = "since"

    def convert(self, value, param, context) -> datetime:
        if isinstance(value, datetime):
            return value
        now = datetime.now(timezone.utc)
        if found := re.fullmatch(r"(\d{1,6})\s*(s|min|h|d|w)", value.strip()):
            return now - timedelta(seconds=int(found[1]) * UNITS[found[2]])
        try:
            given = datetime.fromisoformat(value.strip())
        except ValueError:
            self.fail(f"{value!r}: allowed is 30min, 2h, 3d or 2026-11-24 09:30", param, context)
        return given if given.tzinfo else given.replace(tzinfo=timezone.utc)
