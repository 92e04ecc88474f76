"""What `audit` finds, and the windows in which it goes through the history."""

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

import db

# Attempts that are looked at in one statement, so that none takes long or much memory.
BATCH = 20_000
# Seconds that a statement may take: resting_rows() reads the application's tables.
PATIENCE = 300.0
# Times in the history are those of the beginning of a transaction, whose changes became visible up
# to this many seconds later. What such a delay can explain is no finding.
BLUR = db.DEADLINE
# Findings of a kind that are kept; all are counted.
KEPT = 100

READ_ONLY = f"{db.READ_ONLY}SET LOCAL statement_timeout = '{PATIENCE:.0f}s'; "
# Has the planner use the indexes of the history, whatever the statistics say.
BY_INDEX = f"{READ_ONLY}SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; "


class Finding(NamedTuple):
    """A promise that was broken: whose row, when, and what shows it."""

    kind: str
    table: str
    id: str
    stage: str
    at: datetime | None
    text: str


class Findings:
    """The first KEPT findings of each kind in the order they were added, and how many there are."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Finding]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, found: Iterable[Finding], more: int = 0, of: str = "") -> None:
        """Add `found`, and count `more` of the kind `of`."""
        for finding in found:
            self.counts[finding.kind] += 1
            kept = self.kept.setdefault(finding.kind, [])
            if len(kept) < KEPT:
                kept.append(finding)
        if more:
            self.counts[of] += more


class Window(NamedTuple):
    """Attempts that ended after `after` and not later than `upto`."""

    after: datetime
    upto: datetime


NEXT = """
SELECT finished_at AS upto FROM stage_attempts
WHERE finished_at > %(after)s AND finished_at <= %(until)s
ORDER BY finished_at OFFSET %(batch)s LIMIT 1
"""


def windows(conn, since: datetime, until: datetime, batch: int) -> Iterator[Window]:
    """The span in parts of about `batch` attempts."""
    after = since
    while after < until:
        given = {"after": after, "until": until, "batch": batch}
        found = ask(conn, BY_INDEX + NEXT, given)
        upto = found[0].upto if found else until
        yield Window(after, upto)
        after = upto


def ask(conn, sql: str, given: dict[str, Any]) -> list:
    return db.execute(conn, sql, given).fetchall()


def at(time: datetime | None) -> str:
    """A time as a finding tells it: on the clock of this machine, with its date."""
    return f"{time.astimezone():%F %T}" if time else "some time ago"
