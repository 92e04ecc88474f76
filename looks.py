"""The looks of a listener: at the parents of joins, and at the moves of asynchronous calls.

No call is claimed or settled meanwhile. A look that fails is repeated later, and stops no call.
"""

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from types import SimpleNamespace

import psycopg2

import db
import failures
import joins
import moves
import pipeline
from alerts import Alerts
from ops import listeners
from ops.problem import first_line
from ops.resting import why_unknown
from ops.table import duration

log = logging.getLogger("listener")

# While a long transaction elsewhere keeps dead rows, a look takes long and finds little. So the
# next look starts so many times the duration of this one after its start,
APART_TIMES = 10
# but not sooner than APART seconds after it, nor later than APART_MOST, or APART_MOST_FOUND where
# this one found something.
APART, APART_MOST, APART_MOST_FOUND = 0.05, 30.0, 5.0
MANY = 100  # parents or moves; a look that finds so many is followed by another after APART
# Seconds until the next look where another listener is looking, and after one that failed.
OTHER_LOOKS, FAILED = 1.0, 5.0


class Look:
    """When to look. All by time.monotonic().

    at: of the next look; infinity: not before it is asked for.
    rests_until: no look before, whoever asks for it.
    failure: with `once`: why the last look failed. The listener ends with this error after its
        work, unless a further look succeeds.
    """

    def __init__(self, is_needed: bool):
        self.is_needed = is_needed
        self.at = 0.0 if is_needed else math.inf
        self.rests_until = -math.inf
        self.failure: psycopg2.Error | None = None

    def ask(self) -> None:
        """Look as soon as the rest is over."""
        if self.is_needed:
            self.at = min(self.at, self.rests_until)

    def rest(self, began: float, found: int, delay: float = 0.0) -> None:
        """Note that a look has ended.

        Args:
            began: time.monotonic() at its beginning.
            found: how many parents, or moves.
            delay: seconds until the next look where nobody asks for it.
        """
        now = time.monotonic()
        apart = APART_TIMES * (now - began) if found < MANY else 0.0
        most = APART_MOST_FOUND if found else APART_MOST
        self.rests_until = began + max(APART, min(apart, most))
        self.at = max(self.rests_until, now + delay)

    def fail(self, began: float, found: int) -> float:
        """Note that a look has failed; it may have `found` something in other parts.

        Returns:
            Seconds until the next one.
        """
        # Perhaps it took long because one table is locked. Looks at the other tables must not wait
        # for that, so it rests as after a look that found something.
        self.rest(began, max(found, 1))
        now = time.monotonic()
        self.rests_until = self.at = max(self.rests_until, now + FAILED)
        return self.at - now


class Failing:
    """Says that looks fail one after the other. Its dicts have a key for each kind of look: its
    `undone`, which says what no call can be meanwhile.

    since: time.monotonic() of the first failure.
    said: what is undone, and why. Not after the first failure: the lock that it met may be gone.
    """

    def __init__(self, settings: SimpleNamespace, alerts: Alerts):
        self.settings, self.alerts = settings, alerts
        self.since: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self.is_told = False

    def note_failure(
        self, conn: db.Connection, undone: str, failed: Mapping[str, psycopg2.Error]
    ) -> None:
        """Note that a look has failed. Where looks have failed for ALERT_AFTER seconds, people are
        told by the listener that was connected first.
        """
        now = time.monotonic()
        if undone not in self.since:
            self.since[undone] = now
            return
        why, seconds = why_failed(conn, failed), now - self.since[undone]
        self.said[undone] = f"{undone}: {why}"
        if seconds >= self.settings.ALERT_AFTER and not self.is_told and listeners.is_first(conn):
            self.is_told = True
            text = f"for {duration(seconds)}, {listeners.NO_CALL}{self.said[undone]}"
            self.alerts.send("waiting", text, seconds=seconds, reason=why)

    def note_success(self, undone: str) -> None:
        """A look has succeeded: what was said of its failures is over."""
        self.since.pop(undone, None)
        self.said.pop(undone, None)
        if self.is_told and not self.since:
            self.is_told = False
            self.alerts.send_recovered("waiting", None, f"calls can be {undone} again")


def why_failed(conn: db.Connection, failed: Mapping[str, psycopg2.Error]) -> str:
    """Why a look has failed; of what is locked, who has locked it."""
    said = []
    for part, error in sorted(failed.items()):  # so that all listeners say the same
        why = first_line(error)
        with contextlib.suppress(psycopg2.Error):  # our tables may be locked, too
            why = why_unknown(conn, error)
        said.append(f"{part}: {why}" if part else why)
    return "; ".join(said)


class JoinLook(Look):
    """Looks at the parents of joins, and records what they owe."""

    undone = "recorded of joins"

    def __init__(self, failing: Failing, once: bool):
        super().__init__(bool(pipeline.joins()))
        self.failing, self.once = failing, once

    def run(self, conn: db.Connection) -> None:
        """Look at parents, and plan the next look."""
        self.failure = None
        began = time.monotonic()
        found, failed = db.in_parts(conn, joins.look, pipeline.joins())
        parents = sum(filter(None, found))
        if failed:
            seconds = self.fail(began, parents)
            self.failing.note_failure(conn, self.undone, failed)
            if self.once:
                self.failure, self.at = next(iter(failed.values())), math.inf
                if parents:  # there may be more of the joins that can be looked at
                    self.rest(began, parents)
                return
            log.error("조인 확인 실패 (%.0f초 후 다시 시도): %s", seconds, db.reasons(failed))
        elif None in found:  # another listener is looking, and may miss what this one was asked for
            self.rest(began, 0, OTHER_LOOKS)
        else:
            self.failing.note_success(self.undone)
            self.rest(began, parents, 0.0 if parents else math.inf)


class MoveLook(Look):
    """Ends the calls of asynchronous stages whose rows have moved on."""

    undone = "ended of asynchronous stages"

    def __init__(self, settings: SimpleNamespace, alerts: Alerts, failing: Failing, once: bool):
        super().__init__(pipeline.is_asynchronous())
        self.settings, self.alerts, self.once = settings, alerts, once
        self.failing = failing
        self.may_miss = False  # there may be moves that no trigger has recorded

    def sweep(self, conn: db.Connection) -> None:
        """Look soon, also for moves that no trigger has recorded."""
        # Calls may be taken of a stage that is no longer asynchronous, or has left PIPELINE.
        self.is_needed = pipeline.is_asynchronous() or moves.has_working(conn)
        if not self.is_needed:
            self.at = math.inf
            self.failing.note_success(self.undone)
        self.may_miss = True
        self.ask()

    def run(self, conn: db.Connection) -> None:
        """Look at moves, and plan the next look."""
        self.failure = None
        unrecorded: dict[str, psycopg2.Error] = {}
        if self.may_miss:
            _, unrecorded = db.in_parts(conn, moves.record_missed, pipeline.tables())
            self.may_miss = self.once and bool(unrecorded)  # else the next sweep sets it
        began = time.monotonic()
        found, failed = db.in_parts(conn, self.end_calls, pipeline.tables())
        seen = sum(found)
        if failed:
            seconds = self.fail(began, seen)
            self.failing.note_failure(conn, self.undone, failed)
        else:
            seconds = self.settings.SWEEP_INTERVAL
            self.rest(began, seen, 0.0 if seen else seconds)
            self.failing.note_success(self.undone)
        if failed := unrecorded | failed:
            if self.once:
                self.failure, self.at = next(iter(failed.values())), math.inf
                return
            log.error("작업 완료 확인 실패 (%.0f초 후 다시 시도): %s", seconds, db.reasons(failed))

    def end_calls(self, conn: db.Connection, table: str | None = None) -> int:
        """End, log and tell of calls whose rows have moved on; how many moves there were."""
        ended, seen = moves.look(conn, table)
        for row in ended:
            moves.log_end(row)
            if row.outcome == "failed":
                failures.tell_set_failed(self.alerts, row)
        return seen
