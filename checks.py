"""Checks a claimed call before it is made: it may not be owed any more, or may have to wait.

The row of a claim says where the job is now. A call that is not made ends with a Result, like any
other, or is put off.
"""

import logging
import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import db
import joins
import logs
import pipeline
import trigger
from calls import TAKEN, Attempt, Claimed, Result
from db import execute
from failures import SET_FAILED, reap
from pipeline import Call, Route
from trigger import about, result

log = logging.getLogger("listener")

# A call that this listener's PIPELINE cannot make is due again after this many seconds.
PASSED_OVER_FOR = 10.0
# How many accepted calls a listener remembers. After a failover to a standby that missed them, they
# are not repeated.
REMEMBERED = 10_000
# Error of a join's call that is skipped because the join's rows have changed. The pending look at
# its parent records a new call.
OUTDATED = "rows of the join have changed: it is looked at anew"


def identity(call: Call | Claimed) -> tuple:
    """Which call it is. A failover that loses transactions sets sequences back, so that a new call
    may get the call_id, and a new row the id, of one that is gone.
    """
    return call.call_id, call.key, call.recorded_at


class Checked(NamedTuple):
    """What is to be done with a claimed call.

    is_to_make: make it.
    ended: else the result to write; None: nothing, it was put off.
    """

    is_to_make: bool = False
    ended: Result | None = None


MAKE, LATER = Checked(is_to_make=True), Checked()


class Checks:
    """The checks of a listener, which remembers what a new primary may not know.

    accepted: by identity(), the last attempt that is not to be made again. That which an
        asynchronous stage has taken; the next one is made after its timeout. Infinity: the call was
        accepted, and no attempt is made any more.
    may_run: attempts that their stage may still be working on, as it has not answered, or has taken
        the call. Their leases end by themselves.
    logged: states of another PIPELINE of which the log has a line.
    """

    def __init__(self, settings: SimpleNamespace):
        self.settings, self.routes = settings, pipeline.routes()
        self.accepted: OrderedDict[tuple, float] = OrderedDict()
        self.may_run: OrderedDict[Attempt, None] = OrderedDict()
        self.logged: set[Route] = set()

    def remember(self, call: Call, ended: Result) -> None:
        """Remember a call that was accepted, or that its stage may still be working on."""
        if ended.is_accepted:
            attempt = ended.attempt if ended.outcome == TAKEN else math.inf
            self.accepted[identity(call)] = attempt
        if ended.outcome in ("unknown", TAKEN):
            self.may_run[call.call_id, call.attempt] = None
        if len(self.accepted) > REMEMBERED:
            self.accepted.popitem(last=False)
        if len(self.may_run) > REMEMBERED:
            self.may_run.popitem(last=False)

    def check(self, conn: db.Connection, call: Call, row: Claimed) -> Checked:
        """What is to be done with the `call` of a claimed `row`."""
        function = self.routes.get(call.route)
        is_agreed = function is not None and function.__name__ == row.routed_to == row.stage
        if not is_agreed:
            return self.pass_over(conn, call, row)
        accepted_until = self.accepted.get(identity(row), 0)
        if ended := end_unmade(conn, call, row, accepted_until):
            return Checked(ended=ended)
        if row.was_given_up:
            ended = given_up(call, error_before(conn, row))
            ended.is_told = True
            return Checked(ended=ended)
        if checked := self.after_failed(conn, call, row):
            return checked
        if row.join_of:
            joins.note_parent(conn, row)
        return MAKE

    def pass_over(self, conn: db.Connection, call: Call, row: Claimed) -> Checked:
        """Put off a call whose stage this PIPELINE and the database's do not agree on: it waits for
        another listener.

        Where neither has its state any more, the call gets the name of a stage that no claim asks
        for. People are told of it as of a stage that left PIPELINE. An install that has the state
        again brings the call back (leftovers.ADOPT).
        """
        stage, mend = row.routed_to or row.stage, "make trigger 후 재시작 필요"
        if not (row.routed_to or call.route in self.routes):
            stage, mend = f"{row.stage} of {call.route}", "PIPELINE에 없는 상태"
        put_off(conn, row, call.listener, stage, row.spent - 1, PASSED_OVER_FOR, row.last_error)
        if call.route not in self.logged:
            self.logged.add(call.route)
            log.warning("다른 PIPELINE의 호출을 미룸 (%s): %s → %s",
                        mend, call.route, row.routed_to or call.stage)  # fmt: skip
        return LATER

    def after_failed(self, conn: db.Connection, call: Call, row: Claimed) -> Checked | None:
        """Put off or give up a call that the state (stage, 'failed') owes to the same stage; None
        where it is to be made.

        It takes over attempts and back-off of the call before it, or a stage that always fails
        would be called for ever.
        """
        follows_failed = (call.current_step, call.status) == (call.stage, "failed")
        has_waited = call.spent > 1
        is_due_by_hand = bool(row.last_error)
        if not follows_failed or has_waited or is_due_by_hand:
            return None
        reap(conn, self.settings)  # the call before it may be one that was lost
        before = spent_before(conn, row)
        if before is None or before.spent < 1:
            return None
        error = before.error or SET_FAILED
        if before.spent >= call.max_attempts:
            call.spent = before.spent
            if "the last one)" not in error:  # trigger.failure() may have said so
                error += f" (attempt {call.spent}, the last one)"
            return Checked(ended=given_up(call, error, free=False))
        delay = trigger.backoff(before.spent, self.settings.RETRY_DELAY)
        put_off(conn, row, call.listener, row.stage, before.spent, delay, error)
        return LATER


def end_unmade(
    conn: db.Connection, call: Call, row: Claimed, accepted_until: float = 0
) -> Result | None:
    """The result of a call that must not be made; None where it must.

    Args:
        accepted_until: what this listener remembers of the call: see Checks.accepted.
    """
    owed = row.owed or is_owed(conn, row, call.listener)
    accepted = row.accepted or accepted_until == math.inf
    ended = already_over(conn, call, row, owed, accepted, taken=row.attempt <= accepted_until)
    if not row.join_of:
        return ended
    is_open = not (row.is_complete or accepted)  # the join still waits for a row
    if ended is None and joins.has_look(conn, row):
        # The look records a new call. If this one were made as well, the stage would run twice.
        ended, is_open = skipped(call, "조인을 다시 확인", OUTDATED), True
    if ended is not None and row.job_found and is_open:
        joins.reopen(conn, row, call.listener)
    return ended


def already_over(
    conn: db.Connection, call: Call, row: Claimed, owed: bool, accepted: bool, taken: bool
) -> Result | None:
    """The result of a call that is not owed any more, was accepted, or has no attempt left; None
    where it must be made.

    Args:
        row: of the claim.
        owed: the job is still in the state that owes the call.
        accepted: an earlier attempt of it was accepted.
        taken: an asynchronous stage has taken this very attempt, but a failover lost its claim.
    """
    if not owed:
        return moved_on(call, row, accepted)
    if accepted or taken:
        log.info("이미 수락된 호출이라 스킵: %s stage=%s", logs.ids(call.ids), call.stage,
                 extra=about(call))  # fmt: skip
        if taken and not accepted:
            return result(call, TAKEN, http_status=202)
        return result(call, "skipped", error="an earlier attempt was accepted")
    if call.spent > call.max_attempts and not row.was_given_up:
        last_error = None if row.taken_over else row.last_error
        error = f"no attempt is left; the last one: {last_error or error_before(conn, row)}"
        return given_up(call, error)
    return None


def moved_on(call: Call, row: Claimed, accepted: bool) -> Result:
    """The result of a call that its row does not owe any more: skipped; but the call of a join
    whose work was never done is given up.
    """
    if is_given_up_with_its_parent(call, row):
        return given_up(call, "nobody knows what became of the attempt before")
    now = f"({row.job_step}, {row.job_status})" if row.job_found else "deleted"
    if not call.join:
        return skipped(call, now, f"the job has moved on: {now}")
    was_refused = row.outcome_before == "retry" and not accepted
    has_set_failed = (row.last_error or "").endswith(f"({SET_FAILED})")  # a stage follows from that
    is_moved_by_stage = row.job_step == call.stage or has_set_failed
    if row.job_found and not row.is_complete:
        now = f"not every row is in {call.join}"
    elif was_refused and not is_moved_by_stage:
        # The work was never done, and something else has changed the parent's state. Giving the
        # call up, instead of skipping it, leaves the decision to a person.
        return given_up(call, f"refused, and the job is at {now} since")
    return skipped(call, now, f"the job has moved on: {now}")


def is_given_up_with_its_parent(call: Call, row: Claimed) -> bool:
    """Whether the stage of a join's call has set the parent to failed, and nothing follows from it.

    It is kept for a person to retry, as no state of the parent's owes it.
    """
    return bool(
        call.join
        and row.is_complete
        and (row.job_step, row.job_status) == (call.stage, "failed")
        and pipeline.Route(call.table, "", call.stage, "failed") not in pipeline.routes()
    )


def skipped(call: Call, now: str, error: str) -> Result:
    """The result of a call that is not made, which is logged, with what is true `now`."""
    log.info("Job 상태가 변경되어 스킵: %s stage=%s 현재=%s", logs.ids(call.ids), call.stage, now,
             extra=about(call))  # fmt: skip
    return result(call, "skipped", error=error)


def given_up(call: Call, error: str, free: bool = True) -> Result:
    """The result of a call that is given up without being made; logged.

    Args:
        free: this claim counts as no attempt.
    """
    ended = result(call, "failed", error=error, free=free)
    call.spent -= free  # what the log says; result() has subtracted it for the database
    trigger.log_end(call, ended)
    return ended


# --- statements about one claimed call -----------------------------------------------------

# The claim locks the latest version of a call, but reads the job from its statement's snapshot,
# which may be older: the job can look as if it had left the state that owes the call. So the state
# is compared once more, in a new statement, before the call is skipped.
STILL_OWED = """
SELECT count(*) > 0
FROM stage_calls AS c CROSS JOIN stage_call_row(c.table_name, c.join_of, c.job_id) AS j
WHERE c.job_id = %(job_id)s AND c.call_id = %(call_id)s AND c.attempts = %(attempt)s
  AND c.worker = %(worker)s AND c.join_of = ''
  AND j.current_step = c.current_step AND j.status = c.status
"""


def is_owed(conn, row, worker: str) -> bool:
    """Whether the job of a claimed `row` is in the state that owes it, asked once more."""
    given = {"job_id": row.key, "call_id": row.call_id, "attempt": row.attempt}
    return execute(conn, STILL_OWED, given | {"worker": worker}).fetchone()[0]


# Of an attempt whose lease ran out, only the history knows the error: see calls.REAP.
ERROR_BEFORE = """
SELECT error FROM stage_attempts
WHERE job_id = %(job_id)s AND call_id = %(call_id)s AND attempt < %(attempt)s
ORDER BY attempt DESC, finished_at DESC
LIMIT 1
"""


def error_before(conn, row) -> str:
    """The error of the attempt before that of a claimed `row`."""
    given = {"job_id": row.key, "call_id": row.call_id, "attempt": row.attempt}
    found = execute(conn, ERROR_BEFORE, given).fetchone()
    return found.error if found and found.error else "nobody knows what became of it"


# Where (stage, 'failed') leads to the stage again, the call goes on counting where the one before
# it ended, whatever its outcome. OFFSET 0 makes the planner look the row up by its id. By time, it
# would read all of the history where the row has no such attempt.
SPENT_BEFORE = """
SELECT coalesce(spent, attempt) AS spent, error
FROM (SELECT * FROM stage_attempts WHERE job_id = %(job_id)s OFFSET 0) AS of_row
WHERE table_name = %(table)s AND stage = %(stage)s
  AND call_id <> %(call_id)s AND outcome NOT IN ('skipped', 'cancelled')
ORDER BY finished_at DESC
LIMIT 1
"""


def spent_before(conn, row):
    """What was `spent` on the call before that of a claimed `row`, and its `error`; or None."""
    given = {"job_id": row.key, "table": row.table_name, "stage": row.stage}
    return execute(conn, SPENT_BEFORE, given | {"call_id": row.call_id}).fetchone()


# The claim counts as no attempt. `spent` may be taken over from the call before: where it is more
# than `attempts`, those are raised to it, so that `free_attempts` is not negative. A row that the
# application has locked is skipped: its transaction is about to replace the call. `stage` is
# written as well, as the stage may have been renamed, or the state may have left PIPELINE.
PUT_OFF = """
WITH mine AS (
    SELECT job_id, call_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s AND attempts = %(attempt)s
      AND worker = %(worker)s
    FOR UPDATE SKIP LOCKED
), ended AS (
    DELETE FROM stage_leases WHERE call_id = %(call_id)s AND attempt = %(attempt)s
)
UPDATE stage_calls AS c
SET attempts = greatest(%(attempt)s, %(spent)s),
    free_attempts = greatest(%(attempt)s - %(spent)s, 0), worker = NULL, started_at = NULL,
    last_error = left(%(error)s, 2000), stage = %(stage)s,
    due_at = greatest(now() + make_interval(secs => %(delay)s), c.run_after)
FROM mine WHERE c.job_id = mine.job_id AND c.call_id = mine.call_id
"""


def put_off(
    conn, row, worker: str, stage: str, spent: int, delay: float, error: str | None
) -> None:
    """Let a claimed call of `stage` wait for `delay` seconds, with `spent` attempts behind it."""
    given = {"job_id": row.key, "call_id": row.call_id, "attempt": row.attempt, "worker": worker}
    given |= {"stage": stage, "spent": spent, "delay": delay, "error": error}
    execute(conn, PUT_OFF, given)
