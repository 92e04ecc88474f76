"""The demo's board: a line for each row of the pipeline, with a cell for each of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from psycopg2.extensions import connection as Connection

from demo.jobs import query
from ops.table import Line

COLUMNS, LINES = 80, 24
LABEL = 8
CELL = 5  # the least width of a column: a mark, a space, and seconds
BOLD, RED, GREEN, YELLOW, MAGENTA, CYAN = 1, 31, 32, 33, 35, 36
LASTING = (RED, CYAN)  # events in these colours stay on the board when newer ones come
LEGEND = "✓ accepted, in s (* at a later call)  ▶ called now  ○ is owed  ↻ again later"

# Calls under way, calls owed and ended attempts of the rows of the board. A call under way may or
# may not be owed as well: its stage may have moved the row already.
LOOK = """
SELECT job_id::text, stage, 'calling', extract(epoch FROM clock_timestamp() - started_at)::float,
       NULL, NULL
FROM stage_leases WHERE job_id IN %(rows)s AND leased_until > now() AND NOT unanswered
UNION ALL
SELECT job_id::text, stage, 'owed', extract(epoch FROM due_at - clock_timestamp())::float,
       last_error, NULL
FROM stage_calls WHERE job_id IN %(rows)s
UNION ALL
(SELECT job_id::text, stage, outcome, extract(epoch FROM finished_at - started_at)::float, error,
        call_id || '.' || attempt || '.' || outcome
 FROM stage_attempts WHERE job_id IN %(rows)s ORDER BY finished_at)"""


@dataclass
class Row:
    """A job, or a variant of one: a line of the board."""

    key: str
    label: str
    stages: Sequence[str]  # the stages that it passes


@dataclass
class Cell:
    """How a row stands at a stage."""

    calling: float | None = None  # seconds so far
    due_in: float | None = None  # seconds until the call that is owed is due
    took: float | None = None  # seconds of the call that was accepted
    ended: int = 0  # attempts that have ended
    is_unknown: bool = False  # whether one of them got no answer

    def __str__(self) -> str:
        if self.calling is not None:
            return f"▶ {self.calling:.1f}"
        if self.took is not None:
            return f"✓{'*' if self.ended > 1 else ' '}{self.took:.1f}"
        if self.due_in is not None:
            return f"↻ {max(0, self.due_in):.0f} s" if self.ended else "○"
        return "↻" if self.ended else "·"


@dataclass
class Board:
    """The rows with their cells, and the events so far."""

    title: str
    stages: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    elapsed: float = 0.0
    events: list[Line] = field(default_factory=list)

    def __post_init__(self):
        self.cells: dict[tuple[str, str], Cell] = {}
        self.seen: set[str] = set()

    def add(self, text: str, colour: int = 0) -> None:
        self.events.append((f"{self.elapsed:5.1f} s  {text}", colour))

    def look(self, connection: Connection) -> None:
        """Read the cells from the database; add an event for each attempt that has ended since."""
        keys = tuple(row.key for row in self.rows)
        found = query(connection, LOOK, {"rows": keys}) if keys else []
        self.cells, new = {}, []
        for key, stage, what, seconds, error, attempt in found:
            cell = self.cells.setdefault((key, stage), Cell())
            if what == "calling":
                cell.calling = seconds
            elif what == "owed":
                cell.due_in = seconds
            else:
                cell.ended += 1
                cell.is_unknown |= what == "unknown"
                if what == "succeeded":
                    cell.took = seconds
                if attempt not in self.seen:
                    self.seen.add(attempt)
                    new.append((key, stage, what, seconds, error))
        for ended in new:
            self.tell(*ended)

    def tell(self, key: str, stage: str, outcome: str, seconds: float, error: str) -> None:
        """Add the event of an attempt that has ended."""
        what = f"{self.label(key)} {stage}"
        cell = self.cells[key, stage]
        if outcome == "succeeded" and cell.is_unknown:
            self.add(f"✓ {what}: called again, accepted, so nothing is lost", CYAN)
        elif outcome == "succeeded":
            self.add(f"✓ {what} {seconds:.1f} s", GREEN)
        else:
            is_waiting = cell.due_in is not None and cell.due_in > 0.5
            again = f" again in {cell.due_in:.0f} s" if is_waiting else ""
            reason = " ".join(error.split()).split(": {")[0]  # without the JSON of the answer
            self.add(f"↻ {what}{again}: {reason}", RED if outcome == "unknown" else YELLOW)

    def label(self, key: str) -> str:
        return next(row.label for row in self.rows if row.key == key)

    @property
    def expected(self) -> list[tuple[str, str]]:
        """Every row with each stage that it passes."""
        return [(row.key, stage) for row in self.rows for stage in row.stages]

    @property
    def accepted(self) -> int:
        return sum(cell.took is not None for cell in self.cells.values())

    @property
    def is_full(self) -> bool:
        return self.accepted == len(self.expected)

    # --- as a picture ----------------------------------------------------------------------

    def picture(self) -> list[Line]:
        widths = self.widths()
        header = [(line, BOLD) for line in self.header(widths)]
        lines = [(self.line(row, widths), self.colour(row)) for row in self.rows]
        above = [(f"{self.title:{COLUMNS - 9}}{self.elapsed:6.1f} s", BOLD), ("", 0), *header]
        below = [("", 0), (self.count(), 0), (LEGEND, 0), ("", 0)]
        left = max(1, LINES - len(above) - len(lines) - len(below))
        return [*above, *lines, *below, *self.last_events(left)]

    def last_events(self, most: int) -> list[Line]:
        """The newest events that the cells do not show; lasting ones before others."""
        told = [event for event in self.events if event[1] != GREEN]
        lasting = [event for event in told if event[1] in LASTING][-most:]
        others = [event for event in told if event[1] not in LASTING]
        shown = lasting + others[max(0, len(others) - most + len(lasting)) :]
        return [event for event in told if event in shown]

    def widths(self) -> list[int]:
        """The widths of the columns: for names in full, or else broken at their underscores."""
        room = COLUMNS - LABEL - len(self.stages)
        if sum(widths := [max(CELL, len(name) + 1) for name in self.stages]) <= room:
            return widths
        longest = max(len(word) for name in self.stages for word in name.split("_"))
        for most in range(longest, CELL, -1):
            widths = [
                min(most, max(CELL, *map(len, [*name.split("_"), ""]))) for name in self.stages
            ]
            if sum(widths) <= room:
                return widths
        return [CELL] * len(self.stages)

    def header(self, widths: list[int]) -> list[str]:
        names = [[name] if len(name) <= width else name.split("_")
                 for name, width in zip(self.stages, widths, strict=True)]  # fmt: skip
        height = max(map(len, names))
        columns = [[""] * (height - len(words)) + words for words in names]
        lines = []
        for number in range(height):
            words = [cut(column[number], width)
                     for column, width in zip(columns, widths, strict=True)]  # fmt: skip
            label = "job" if number == height - 1 else ""
            lines.append(f"{label:{LABEL}} {' '.join(words)}".rstrip())
        return lines

    def line(self, row: Row, widths: list[int]) -> str:
        cells = []
        for stage, width in zip(self.stages, widths, strict=True):
            cell = self.cells.get((row.key, stage), Cell())
            cells.append(f"{cell if stage in row.stages else ''!s:{width}}")
        return f"{row.label:{LABEL}} {' '.join(cells)}".rstrip()

    def colour(self, row: Row) -> int:
        cells = [self.cells.get((row.key, stage), Cell()) for stage in row.stages]
        if all(cell.took is not None for cell in cells):
            return GREEN
        return YELLOW if any(c.ended and c.took is None for c in cells) else 0

    def count(self) -> str:
        calling = sum(cell.calling is not None for cell in self.cells.values())
        owed = sum(c.due_in is not None and c.calling is None for c in self.cells.values())
        return f"{calling} called now, {owed} owed, {self.accepted} accepted"


def cut(word: str, width: int) -> str:
    return f"{word if len(word) <= width else word[: width - 1] + '…':{width}}"
