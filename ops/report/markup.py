"""Makes HTML: every value that is not Markup is escaped."""

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from logs import CONTROL
from ops.table import counted as counted
from ops.table import readable
from pipeline import JOBS, Route

LONGEST_TEXT = 240

# Direction marks and the byte order mark are shown as text, so that they have no effect.
HIDDEN = [0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
SHOWN = CONTROL | {code: f"\\u{code:04x}" for code in HIDDEN}


class Markup(str):
    """Text that is HTML already and is not escaped again."""


def text(value: Any, longest: int = LONGEST_TEXT) -> Markup:
    """`value` as an element of its own text direction: on one line, cut."""
    if isinstance(value, Markup):
        return value
    if value is None or value == "":
        return Markup("–")
    if isinstance(value, int):
        return Markup(f"{value:,}")
    return Markup(f"<bdi>{attribute(readable(str(value)), longest)}</bdi>")


def stage_name(value: Any) -> Markup:
    """The name of a stage, which may be broken after each _."""
    return Markup(text(value, 60).replace("_", "_<wbr>"))


def attribute(value: Any, longest: int = LONGEST_TEXT) -> Markup:
    """The same without an element, for an attribute or the <title> of an SVG."""
    plain = str(value)
    plain = plain if len(plain) <= longest else plain[: longest - 1] + "…"
    return Markup(html.escape(plain.translate(SHOWN)))


def join(parts: Iterable[str], between: str = "") -> Markup:
    return Markup(between.join(parts))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], about: str) -> Markup:
    """A table with a row of headings and, in its first column, a heading for each row.

    Args:
        header: short, as every cell shows its heading on a narrow screen. One that begins with #
            is that of a column of numbers; with *, of texts that may be long;
            with ~, of names that may be broken.
    """
    kinds = [{"#": "number", "*": "long", "~": "name"}.get(name[0], "short") for name in header]
    names = [name.lstrip("#*~") for name in header]

    def cell(tag: str, value: Any, kind: str, name: str) -> str:
        kind += "" if value not in (None, "") else " none"
        return f'<{tag} class="{kind}" data-label="{name}">{text(value)}</{tag[:2]}>'

    def row(values: Sequence[Any]) -> str:
        tags = ['th scope="row"'] + ["td"] * (len(header) - 1)
        return f"<tr>{join(map(cell, tags, values, kinds, names))}</tr>"

    heads = join(
        f'<th scope="col" class="{kind}">{name}</th>'
        for kind, name in zip(kinds, names, strict=True)
    )
    return Markup(
        f'<div class="scroll"><table><caption>{text(about)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{join(map(row, rows))}</tbody></table></div>"
    )


def section(name: str, heading: str, *parts: str) -> Markup:
    return Markup(
        f'<section id="{name}" aria-labelledby="{name}-heading">'
        f'<h2 id="{name}-heading">{text(heading)}</h2>{join(parts)}</section>'
    )


def tiles(found: Sequence[tuple[str, Any, str, Any]]) -> Markup:
    """Tiles, each from (name, figure, a note, whether it is bad)."""
    each = join(
        f'<div class="{"bad" if bad else "good"}"><dt>{name}</dt>'
        f"<dd>{text(value)}<small>{text(about, 60) if about else ''}</small></dd></div>"
        for name, value, about, bad in found
    )
    return Markup(f'<dl class="figures">{each}</dl>')


def span(seconds: float | None) -> str:
    """A duration as a person says it: 40 ms, 2.5 s, 38 s, 3.5 min, 12 h, 2.1 d."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    units = (("d", 86400), ("h", 3600), ("min", 60))
    unit, size = next((unit for unit in units if seconds >= 1.95 * unit[1]), ("s", 1))
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"


def share(part: int, whole: int) -> str:
    """`part` of `whole` in per cent; never 0 or 100 where it only rounds to it."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1 %"
    if 99.9 < percent < 100:
        return ">99.9 %"
    return f"{percent:.1f} %" if 0 < percent < 9.95 or 99 < percent < 100 else f"{percent:.0f} %"


def clock(moment: datetime, beside: datetime | None = None) -> str:
    """Day and time on this machine's clock; the time only where `beside` is on the same day."""
    moment = moment.astimezone()
    same = beside is not None and moment.date() == beside.astimezone().date()
    return f"{moment:%H:%M:%S}" if same else f"{moment:%m-%d %H:%M:%S}"


def state(row: Any) -> Markup:
    """Where a row is, as everywhere: its step and its status, and its table where that is not
    jobs.
    """
    route = Route(
        getattr(row, "table_name", JOBS.name), getattr(row, "join_of", ""), row.current_step,
        row.status,
    )  # fmt: skip
    return text(route, 120)


def row_name(row: Any) -> str:
    """The id of a row, and its table where that is not jobs."""
    table = getattr(row, "table_name", None) or row.table
    return row.job_id if table == JOBS.name else f"{table} {row.job_id}"
