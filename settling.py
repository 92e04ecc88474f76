"""Settles results: those that a listener keeps until the database has them, and that of one call
where there is no listener: in a worker whose listener is gone, and for the command `call`.
"""

import contextlib
import logging
import select
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg2

import db
import failures
import one_by_one
import ops
from alerts import Alerts
from calls import Result, Turn
from db import execute
from pipeline import Call
from trigger import boottime

log = logging.getLogger("listener.settling")

# Results are dropped after so many tries in a database that does not know this PIPELINE and
# refuses them.
LAST_TRIES = 100


# --- in a listener -------------------------------------------------------------------------


class Unwritten:
    """Results that are to be settled.

    results: in the next turn.
    locked: recorded, but the stage's own transaction still holds the row of the call. A listener
        that ends leaves these: whoever claims the call after its lease goes by the record.
    """

    def __init__(self, alerts: Alerts):
        self.alerts = alerts
        self.results: list[Result] = []
        self.locked: list[Result] = []
        self.last_tries = 0

    @property
    def all(self) -> list[Result]:
        return [*self.results, *self.locked]

    def retry_locked(self) -> None:
        """Put those whose rows were locked back among the results that are settled next."""
        self.results, self.locked = self.results + self.locked, []

    def mark_and_tell_failed(self, conn: db.Connection) -> None:
        """Mark failures that are final, and those that nobody needs to be told of: see
        failures.note(). Then tell people of the others that are given up.
        """
        untold = [r for r in self.results if r.is_failure and not r.is_told]
        failures.note(conn, untold)
        for result in untold:
            failures.tell(self.alerts, result)
            result.is_told = result.is_told or result.outcome == "failed"

    def note_settled(self, turn: Turn) -> None:
        """Forget what is settled; keep what was refused, and results of calls whose rows are
        locked.
        """
        # Without `hold`: the hold of the stage has begun, and must not begin again with each try.
        self.locked += [replace(r, hold=False) for r in self.results if r.call_id in turn.locked]
        self.results = turn.refused

    def settle_last(
        self, conn: db.Connection, name: str, problem: ops.Problem, under_way: bool
    ) -> None:
        """Settle what is left, before the listener `name` ends with `problem`. What the database
        still refuses after LAST_TRIES is dropped, unless calls are still `under_way`.
        """
        self.retry_locked()
        self.mark_and_tell_failed(conn)
        try:
            turn = one_by_one.run_turn_in_parts(conn, self.results, [], 0, name)
            for given_up in turn.given_up:
                failures.tell_given_up(self.alerts, given_up)
            self.results = turn.refused
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


# --- where there is none -------------------------------------------------------------------


def settle(conn: db.Connection, result: Result) -> Result:
    """Settle `result`. Nothing is logged, unless the database refuses something: the output may be
    stuck.

    Returns:
        The result as it was written. Where the row of the call is locked, that is in the history
        alone, and the call is claimed again after its lease: see Unwritten.locked.

    Raises:
        psycopg2.Error: whether it is written is not known.
    """
    settled = replace(result)
    failures.note(conn, [settled])
    turn = one_by_one.run_turn_in_parts(conn, [settled], [], 0, result.worker)
    if turn.refusal:
        raise turn.refusal
    return turn.given_up[0] if turn.given_up else settled


class Settled(NamedTuple):
    """A result as it was written.

    is_new: False: nothing was written, as the database had a result of this attempt already.
    """

    result: Result
    is_new: bool


def settle_within_lease(
    settings: SimpleNamespace,
    name: str,
    call: Call,
    result: Result,
    unless_recorded: bool = False,
) -> Settled:
    """Connect and settle `result`, again until that succeeds or the lease of `call` is over.

    Args:
        name: of the connection, for pg_stat_activity.
        unless_recorded: write nothing where the database has a result of this attempt. It may be
            another outcome, as the listener knows of other calls of the stage: see health.py.

    Raises:
        psycopg2.Error: the last one, where the lease is over.
    """
    while True:
        try:
            first = call.target
            with contextlib.closing(db.connect(settings, name, True, first=first)) as conn:
                if unless_recorded and is_recorded(conn, result):
                    return Settled(result, is_new=False)
                unless_recorded = False  # from now on, we may have written it
                return Settled(settle(conn, result), is_new=True)
        except psycopg2.Error as error:
            left = call.leased_until - boottime()
            if left <= 0:
                raise
            if takes_output(sys.stdout):
                log.warning("워커가 결과를 기록할 수 없음: %s", " ".join(str(error).split()))
        time.sleep(min(left, settings.JOB_STATE_LISTENER_RECONNECT_DELAY))


IS_RECORDED = """
SELECT EXISTS (SELECT FROM stage_attempts
               WHERE job_id = %(job_id)s AND call_id = %(call_id)s AND attempt = %(attempt)s
                 AND outcome NOT IN ('lost', 'cancelled'))
       OR EXISTS (SELECT FROM stage_leases
                  WHERE job_id = %(job_id)s AND call_id = %(call_id)s AND attempt = %(attempt)s
                    AND working) AS is_recorded
"""


def is_recorded(conn, result: Result) -> bool:
    """Whether the database has a result of this attempt: in its history, or in the lease of a call
    that was taken.
    """
    return execute(conn, IS_RECORDED, vars(result)).fetchone().is_recorded


def takes_output(stream: Any) -> bool:
    """Whether `stream` takes a line now: a terminal may be stopped, a pipe full and not read."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError, TypeError, AttributeError):  # it has no file descriptor
        return True
