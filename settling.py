"""Settles the result of one call where no listener does it: in a worker whose listener is gone, and
for the command `call`.
"""

import contextlib
import logging
import select
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg2

import db
import failures
import one_by_one
from calls import PAID, TAKEN, Result
from db import execute
from pipeline import Call
from trigger import boottime
from unwritten import LOCKED_FOR

log = logging.getLogger("listener.settling")

LOCKED_EVERY = 0.2  # seconds between two tries where the row is locked


class Settled(NamedTuple):
    """A result as it was written; `is_routed` as of failures.note()."""

    result: Result
    is_routed: Mapping[int, bool]
    is_new: bool = True  # the history did not have it before


def settle(conn: db.Connection, result: Result) -> Settled:
    """Settle `result`. Where the call has failed and its stage still holds the row, try again for a
    while. Nothing is logged until it is written, unless the database refuses something: the output
    may be stuck.

    Raises:
        psycopg2.Error: whether it is written is not known.
    """
    settled, until = replace(result), time.monotonic() + LOCKED_FOR
    while True:
        is_routed = failures.note(conn, [settled])
        turn = one_by_one.settle_and_claim(conn, [settled], [], 0, result.worker)
        if turn.refusal:
            raise turn.refusal
        may_leave = settled.outcome in (*PAID, TAKEN) or time.monotonic() >= until
        if may_leave or not turn.unsettled:
            return Settled(turn.given_up[0] if turn.given_up else settled, is_routed)
        settled = replace(result, hold=False)  # its hold has begun
        time.sleep(LOCKED_EVERY)


def settle_within_lease(
    settings: SimpleNamespace, name: str, call: Call, result: Result
) -> Settled:
    """Connect and settle `result`, again until that succeeds or the lease of `call` is over.

    Args:
        name: of the connection, for pg_stat_activity.

    Raises:
        psycopg2.Error: the last one, where the lease is over.
    """
    is_new = None
    while True:
        try:
            first = call.target_number
            with contextlib.closing(db.connect(settings, name, True, first=first)) as conn:
                if is_new is None:
                    is_new = not is_recorded(conn, result)
                settled = settle(conn, result)
            return settled._replace(is_new=is_new)
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
                 AND outcome NOT IN ('lost', 'cancelled')) AS is_recorded
"""


def is_recorded(conn, result: Result) -> bool:
    """Whether the history has a result of this attempt. It has none of a call that was taken."""
    return execute(conn, IS_RECORDED, vars(result)).fetchone().is_recorded


def takes_output(stream: Any) -> bool:
    """Whether `stream` takes a line now: a terminal may be stopped, a pipe full and not read."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError, TypeError, AttributeError):  # it has no file descriptor
        return True
