"""The results of calls until the database has them: they outlive its connection."""

import logging
import math
import time
from dataclasses import replace

import psycopg2

import db
import failures
import one_by_one
import ops
from alerts import Alerts
from calls import PAID, TAKEN, Result, Turn

log = logging.getLogger("listener")

# Seconds for which a listener that ends waits for the rows of failed calls that their stages hold:
# a call that was given up would be made again after its lease.
LOCKED_FOR = 5.0
# Results are dropped after so many tries in a database that does not know this PIPELINE and
# refuses them.
LAST_TRIES = 100


class Unwritten:
    """Results that are to be settled.

    results: in the next turn.
    locked: recorded, but the stage's own transaction still holds the row of the call.
    """

    def __init__(self, alerts: Alerts):
        self.alerts = alerts
        self.results: list[Result] = []
        self.locked: list[Result] = []
        self.wait_until = math.inf  # time.monotonic() until which an end waits for them
        self.may_leave = False  # tried once more after that: the listener may end without them
        self.last_tries = 0

    @property
    def call_ids(self) -> list[int]:
        return [result.call_id for result in (*self.results, *self.locked)]

    @property
    def locked_failures(self) -> list[Result]:
        """Locked results of failed calls, which would be made again if the listener ended now."""
        return [result for result in self.locked if result.outcome not in (*PAID, TAKEN)]

    def begin_to_leave(self) -> None:
        """The listener has nothing else to do: from now, wait LOCKED_FOR seconds for such rows."""
        self.wait_until = min(self.wait_until, time.monotonic() + LOCKED_FOR)

    @property
    def keeps_listener(self) -> bool:
        """Whether the listener may not end yet, as the row of a failed call is locked. Where the
        database is away, nothing is tried: then for LOCKED_FOR seconds more.
        """
        is_over = time.monotonic() >= self.wait_until + LOCKED_FOR
        return bool(self.locked_failures) and not (self.may_leave or is_over)

    def retry_locked(self) -> None:
        """Put those whose rows were locked back among the results that are settled next."""
        self.results, self.locked = self.results + self.locked, []

    def mark_and_tell_failed(self, conn: db.Connection) -> None:
        """Mark failures that are final, as the stage set the row to failed, and those of calls that
        a person has cancelled; then tell people.
        """
        untold = [r for r in self.results if r.outcome not in (*PAID, TAKEN) and not r.is_told]
        is_routed = failures.note(conn, untold)
        for result in untold:
            failures.tell(self.alerts, result, is_routed)
            result.is_told = result.outcome == "failed" or result.call_id in is_routed

    def note_settled(self, turn: Turn) -> None:
        """Forget what is settled; keep what was refused, and results of calls whose rows are
        locked.
        """
        again = set(turn.unsettled)
        if any(r.call_id in again and not r.was_locked for r in self.results):
            self.wait_until = math.inf
        # Its hold, if any, has begun: settling it again must not lengthen it.
        self.locked += [
            replace(r, hold=False, was_locked=True) for r in self.results if r.call_id in again
        ]
        if again:
            self.may_leave = time.monotonic() >= self.wait_until
        # Settle a result once more whose row was locked until now: its stage may have committed
        # `failed` between mark_and_tell_failed() and this settling.
        once_more = [
            replace(r, was_locked=False) for r in self.results
            if r.was_locked and r.delay is not None
            and r.call_id not in again and r not in turn.refused
        ]  # fmt: skip
        self.results = turn.refused + once_more

    def settle_last(
        self, conn: db.Connection, name: str, problem: ops.Problem, under_way: bool
    ) -> None:
        """Settle what is left, before the listener `name` ends with `problem`. Drop it after
        LAST_TRIES that the database refused, unless calls are still `under_way`.
        """
        self.retry_locked()
        self.mark_and_tell_failed(conn)
        try:
            turn = one_by_one.settle_and_claim(conn, self.results, [], 0, name)
            for given_up in turn.given_up:
                failures.tell_given_up(self.alerts, given_up)
            self.results = [r for r in self.results if r.call_id in turn.unsettled] + turn.refused
            if turn.refusal:
                raise turn.refusal
        except db.ConnectionLost:
            raise
        except psycopg2.Error:
            self.last_tries += 1
            if self.last_tries >= LAST_TRIES and not under_way:
                for result in self.results:
                    row = failures.row_name(result.table_name, result.job_id)
                    log.error("리스 만료 후 다시 확인됨: %s %s", row, problem)
                self.results = []
