"""How commands print: tables, spans and times as a person reads them, colour, JSON."""

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

import click

from logs import CONTROL, IN_JSON
from logs import readable as readable  # for all commands

JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")

RED, YELLOW = 31, 33


def plain(value: Any) -> str:
    """Data on one line, readable, and not longer than a screen can hold."""
    return readable(str(value)).translate(CONTROL)[:200]


def duration(seconds: float | None) -> str:
    """A span as a person reads it: 0.4 s, 12 s, 3 min, 5 h, 2 d."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{round(seconds, 2):.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def counted(count: int, what: str) -> str:
    """A number with its noun in singular or plural: 1 call, 1,200 calls."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def rate(per_minute: float) -> str:
    return f"{per_minute:g} call{'s' * (per_minute != 1)} a minute"


def clock(time: datetime) -> str:
    """A time on the clock of this machine, with its date where that is not today."""
    local = time.astimezone()
    return f"{local:%T}" if local.date() == datetime.now().date() else f"{local:%F %T}"


# --- tables --------------------------------------------------------------------------------


def width(text: str) -> int:
    """The columns that `text` takes on a terminal: Korean letters take two."""
    if text.isascii():
        return len(text)
    marks = sum(unicodedata.combining(letter) > 0 for letter in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: Collection[str] = ()) -> str:
    """Columns as wide as they need. Control characters are escaped.

    Args:
        header: the names, which may have several lines.
        right: names of columns to be aligned to the right, as those of whole numbers are.
    """
    above = max(name.count("\n") for name in header)
    names = [("\n" * (above - name.count("\n")) + name).split("\n") for name in header]
    cells = [*zip(*names, strict=True), *([plain(value) for value in row] for row in rows)]
    widths = [max(width(row[i]) for row in cells) for i in range(len(header))]
    to_right = [
        name in right or (bool(rows) and all(isinstance(row[i], int) for row in rows))
        for i, name in enumerate(header)
    ]
    lines = []
    for row in cells:
        gaps = [" " * (w - width(cell)) for cell, w in zip(row, widths, strict=True)]
        parts = zip(row, gaps, to_right, strict=True)
        lines.append("  ".join(g + cell if r else cell + g for cell, g, r in parts).rstrip())
    return "\n".join(lines)


# --- to the terminal, or wherever the output goes ------------------------------------------


def is_terminal() -> bool:
    """Whether the output goes to a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()  # None where it is closed


def clipped(line: str, columns: int) -> str:
    """`line`, cut to so many columns."""
    if width(line) <= columns:
        return line
    kept = line
    while width(kept) > columns - 1:
        kept = kept[:-1]
    return kept + "…"


def paint(text: str, colour: int) -> str:
    """`text` in a colour (an SGR code; 0: none) on a terminal, unless NO_COLOR is set."""
    unpainted = not colour or os.environ.get("NO_COLOR") or not is_terminal()
    return text if unpainted else f"\033[{colour}m{text}\033[0m"


Line = tuple[str, int]  # with its colour


def fitted(lines: Iterable[Line]) -> list[str]:
    """The lines, cut to the width of the terminal; whole where the output goes to none."""
    columns = shutil.get_terminal_size().columns if is_terminal() else sys.maxsize
    return [paint(clipped(text, columns), colour) for text, colour in lines]


def echo_lines(lines: Iterable[Line]) -> None:
    """Print the lines, cut to the width of the terminal, but for what a person has to type."""
    for line in lines:
        click.echo(paint(*line) if "→ " in line[0] else fitted([line])[0])


def echo_json(value: Any) -> None:
    text = json.dumps(value, default=str, ensure_ascii=False, indent=2)
    click.echo(text.translate(IN_JSON))
