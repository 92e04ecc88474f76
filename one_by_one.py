"""A turn that failed, done again: each result alone, then a claim of one call."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psycopg2

import calls
from calls import (
    BEYOND_ASCII,
    DO_NOT_RETRY,
    DUE,
    DUE_BY_HAND,
    DUE_IN_ORDER,
    FENCE,
    HURRY,
    RESULTS,
    Result,
    Turn,
    Wanted,
    as_arrays,
    as_json,
    escaped,
)
from db import ConnectionLost, Statement, execute, run
from failures import row_name

log = logging.getLogger("listener")

# SQLSTATE classes of errors that concern single rows: 22 data, 23 constraint, 54 a limit of the
# server, such as the length of an index entry. Any other error would occur for every row.
FAULT_OF_THE_ROW = ("22", "23", "54")


def is_fault_of_row(error: psycopg2.Error) -> bool:
    """Whether an error concerns a single row. A full queue of notifications, which is 54000 without
    a table, does not.
    """
    code = error.pgcode or ""
    return code.startswith(FAULT_OF_THE_ROW) and (code[:2] != "54" or bool(error.diag.table_name))


def is_table_locked(error: psycopg2.errors.LockNotAvailable) -> bool:
    """Whether a claim waited too long for a table of the pipeline, which only stage_call_row()
    reads, and not for the row of a limit.
    """
    return "stage_call_row" in (error.diag.context or "")


def run_turn_in_parts(
    conn,
    results: Sequence[Result],
    wanted: Sequence[Wanted],
    free: int,
    worker: str,
    sweep: bool = False,
    extend_by: float = 0.0,
) -> Turn:
    """Do in parts what calls.run_turn(), with the same arguments, could not do at once: settle each
    result alone, then claim one call.

    A part that fails is one failed call, or one stage whose calls cannot be claimed, as where a
    column of its table was renamed, or its table is locked. Where a result is refused for a reason
    that is not its own, nothing is claimed: what came of further calls might be lost as well.
    """
    done = Turn([], [], is_partial=bool(wanted))
    settle_each(conn, results, done)
    if free and not done.refusal:
        claim_first(conn, wanted, worker, sweep, extend_by, done)
    return done


def settle_each(conn, results: Sequence[Result], done: Turn) -> None:
    """Settle each result alone, and note in `done` what came of that."""
    for number, result in enumerate(results):
        if isinstance(done.refusal, psycopg2.errors.QueryCanceled):
            # This one may take as long as the one that timed out. The next turn tries it first.
            done.refused.insert(0, result)
            continue
        try:
            settle_alone(conn, result, done)
        except ConnectionLost:
            raise
        except psycopg2.Error as error:
            if done.refusal is None:
                keep_from_repeating(conn, results[number:], error)
            done.refused.append(result)
            done.refusal = error


def claim_first(
    conn, wanted: Sequence[Wanted], worker: str, sweep: bool, extend_by: float, done: Turn
) -> None:
    """Claim a call of the first stage that has one, and note in `done` which could not be asked."""
    has_waited = False  # only one claim waits for a lock; the others fail after 20 ms: see HURRY
    for one in wanted:
        one = one._replace(waits=one.waits and not has_waited)
        done.asked.add(one.stage)
        try:
            turn = claim_of_stage(conn, one, worker, sweep, extend_by)
        except ConnectionLost:
            raise
        except psycopg2.errors.LockNotAvailable as error:
            has_waited = True
            locked = done.unclaimable if is_table_locked(error) else done.limit_locked
            locked[one.stage] = error
        except psycopg2.errors.QueryCanceled as error:
            done.unclaimable[one.stage] = error
            break  # the next one may take as long
        except psycopg2.Error as error:
            done.unclaimable[one.stage] = error
        else:
            done.given_up += turn.given_up
            if turn.claimed:
                done.claimed = turn.claimed
                break


# Settles a call whose result the history does not take: removes the call if it was accepted or
# skipped, and gives it up otherwise. A call without an answer keeps its lease, as its stage may
# still be working; one that was taken with 202 is left as it is.
SETTLE_WITHOUT_HISTORY = f"""
WITH result AS ({RESULTS}
), ended AS (
    DELETE FROM stage_leases AS l USING result AS r
    WHERE l.call_id = r.call_id AND l.attempt = r.attempt AND l.job_id = r.job_id
      AND r.outcome NOT IN ('unknown', 'taken')
), unanswered AS (
    UPDATE stage_leases AS l SET unanswered = true FROM result AS r
    WHERE l.call_id = r.call_id AND l.attempt = r.attempt AND l.job_id = r.job_id
      AND r.outcome = 'unknown'
), paid AS (
    DELETE FROM stage_calls AS c USING result AS r
    WHERE {FENCE} AND r.outcome IN ('succeeded', 'skipped')
)
UPDATE stage_calls AS c
SET worker = NULL, started_at = NULL, due_at = 'infinity', last_error = left(r.error, 500)
FROM result AS r
WHERE {FENCE} AND r.outcome NOT IN ('succeeded', 'skipped', 'taken')
"""


def settle_alone(conn, result: Result, done: Turn) -> None:
    """Write one result, in whatever form the database takes it, and note in `done` what came of
    that.

    Raises:
        psycopg2.Error: it is not written, and the fault is not that of its row.
    """
    try:
        turn = calls.run_turn(conn, [result], [], 0, result.worker, hurry=done.refusal is not None)
        done.locked += turn.locked
        return
    except psycopg2.Error as error:
        if not is_fault_of_row(error):
            raise
        reason = f"its result ({result.outcome}) cannot be recorded: {' '.join(str(error).split())}"
    row = row_name(result.table_name, result.job_id)
    log.error("결과를 기록할 수 없음: %s stage=%s %s", row, result.stage, reason)
    ascii_only = BEYOND_ASCII.sub(escaped, reason)
    try:
        params = {"results": as_json(conn, [replace(result, error=ascii_only)])}
        given_up = execute(conn, SETTLE_WITHOUT_HISTORY, params).rowcount
    except psycopg2.Error as error:
        if not is_fault_of_row(error):
            raise
        log.error("리스 만료 후 다시 확인됨: %s %s", row, error)
    else:
        if given_up and not (result.is_told and result.outcome == "failed"):
            done.given_up.append(replace(result, outcome="failed", error=reason))


# Gives up an accepted call whose result the history does not take for now, as on a full disk, or
# while it is locked: otherwise another listener would make the call again after its lease. It stays
# claimed, so that its result still settles it later. If this listener ends before that, the error
# tells people that the call was accepted.
KEEP_FROM_REPEATING = Statement(
    "keep_from_repeating",
    f"""
WITH result AS ({RESULTS}
), ended AS (
    DELETE FROM stage_leases AS l USING result AS r
    WHERE l.call_id = r.call_id AND l.attempt = r.attempt AND l.job_id = r.job_id
)
UPDATE stage_calls AS c SET due_at = 'infinity', last_error = left(r.error, 500)
FROM result AS r
WHERE {FENCE} AND c.due_at < 'infinity'
""",
)


def keep_from_repeating(conn, results: Sequence[Result], error: psycopg2.Error) -> None:
    """Keep accepted calls from being made again, though their results are not written yet. All in
    one statement, as one for each may take long to be refused. Where the database refuses this one
    as well, say so once for each call; the next turn tries it again.
    """
    accepted = [result for result in results if result.outcome == "succeeded"]
    why = BEYOND_ASCII.sub(escaped, f"{DO_NOT_RETRY}: {' '.join(str(error).split())}")
    kept = as_json(conn, [replace(result, error=why) for result in accepted])
    try:
        run(conn, [HURRY, KEEP_FROM_REPEATING], {"results": kept})
    except ConnectionLost:
        pass
    except psycopg2.Error as refused:
        for result in accepted:
            if not result.is_risk_logged:
                result.is_risk_logged = True
                row = row_name(result.table_name, result.job_id)
                said = " ".join(str(refused).split())
                log.error("리스 만료 후 다시 확인됨 (그때까지 기록되지 않으면): %s stage=%s %s: %s",
                          row, result.stage, "its stage has accepted it", said)  # fmt: skip


def claim_of_stage(conn, one: Wanted, worker: str, sweep: bool, extend_by: float) -> Turn:
    """Claim one call of a stage. Where that fails for a reason of its row, claim the first due call
    by its id, and give it up if that fails as well.

    A claim that failed does not say which call it took. If another listener has locked that call
    since, the first due call is a different one, which can be claimed.
    """
    try:
        return calls.run_turn(conn, [], [one], 1, worker, sweep=sweep, extend_by=extend_by)
    except psycopg2.Error as error:
        if not is_fault_of_row(error):
            raise
    only = first_due(conn, one, sweep)
    if only is None:
        return Turn([], [])
    try:
        return calls.run_turn(conn, [], [one], 1, worker, only=only, extend_by=extend_by)
    except psycopg2.Error as error:
        if not is_fault_of_row(error):
            raise
        reason = f"its call cannot be claimed: {' '.join(str(error).split())}"
        return Turn([], [], given_up=give_up(conn, one, only, worker, reason))


# The call that a claim of this stage would take first.
FIRST_DUE = """
WITH due AS ({due})
SELECT c.job_id::text, c.call_id, c.attempts
FROM due JOIN stage_calls AS c ON c.job_id = due.job_id AND c.call_id = due.call_id
"""


def first_due(conn, wanted: Wanted, sweep: bool = False) -> tuple[Any, int, int] | None:
    """The first due call of a stage, as calls.run_turn() takes it for `only`."""
    sql = FIRST_DUE.format(due=DUE_IN_ORDER if wanted.ordered else DUE)
    found = execute(conn, sql, {**as_arrays([wanted]), "free": 1, "sweep": sweep}).fetchone()
    return found and tuple(found)


# Gives up the call that a claim by its id would take.
GIVE_UP = f"""
WITH due AS ({DUE_BY_HAND})
UPDATE stage_calls AS c
SET due_at = 'infinity', worker = NULL, last_error = left(%(error)s, 500)
FROM due WHERE c.job_id = due.job_id AND c.call_id = due.call_id AND c.due_at < 'infinity'
RETURNING c.job_id::text, c.call_id, c.attempts AS attempt, c.stage, c.table_name
"""


def give_up(conn, wanted: Wanted, only: tuple, worker: str, error: str) -> list[Result]:
    """Give up a call that cannot be claimed.

    Returns:
        Its result; none where another listener has given it up.
    """
    params = dict(zip(("only", "only_call", "only_after"), only, strict=True))
    rows = execute(conn, GIVE_UP, params | as_arrays([wanted]) | {"error": error}).fetchall()
    for row in rows:
        name = row_name(row.table_name, row.job_id)
        log.error("포기 (호출을 가져올 수 없음): %s stage=%s %s", name, row.stage, error)
    return [Result(**row._asdict(), worker=worker, started_at="", outcome="failed", error=error)
            for row in rows]  # fmt: skip
