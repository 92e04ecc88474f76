"""Failed calls: which rows their stage has set to failed, which leases ran out, and what people
are told.
"""

import logging
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import calls
import db
import logs
import pipeline
from alerts import Alerts
from calls import RESULTS, Result, as_json
from db import execute
from trigger import IF_OWED

log = logging.getLogger("listener.trigger")

# The error, or how it ends, of a call whose stage has set its row to failed.
SET_FAILED = "set failed by its stage"

# Which results are of rows that their stage has set to failed, and whether a stage follows from
# that. A row's own call is gone with its state; that of a join is still there. It is left out if it
# got no answer: the parent may have been failed before, and the stage still work on it.
FAILED_BY_STAGE = f"""
SELECT r.call_id,
       EXISTS (SELECT FROM pipeline_stages AS p
               WHERE p.table_name = r.table_name AND p.join_of = ''
                 AND (p.current_step, p.status) = (r.stage, 'failed')) AS is_routed
FROM ({RESULTS}) AS r CROSS JOIN LATERAL stage_call_row(r.table_name, '', r.job_id) AS j
WHERE (j.current_step, j.status) = (r.stage, 'failed')
  AND NOT EXISTS (SELECT FROM stage_calls AS c
                  WHERE c.job_id = r.job_id AND c.call_id = r.call_id
                    AND (c.join_of = '' OR r.outcome = 'unknown'))
"""


def note(conn, results: Sequence[Result]) -> None:
    """Note in failed `results` what the database knows of their rows: that the stage has set one to
    failed, which is final unless another call follows from that; or that no person is needed.
    """
    is_routed = failed_by_stage(conn, results)
    note_needs_no_person(conn, results)
    for result in results:
        if result.call_id in is_routed:
            result.error = f"{(result.error or '')[:1900]} ({SET_FAILED})"  # 2,000 are recorded
            if is_routed[result.call_id]:
                result.is_told = True  # people are told of the next call, if that is given up
            else:
                result.outcome, result.delay, result.hold = "failed", None, False
                result.is_set_failed = True


def failed_by_stage(conn, results: Iterable[Result]) -> dict[int, bool]:
    """By call_id of the calls whose stage has set the row to failed: whether a call follows.

    Only of calls that were sent and not accepted. Rows of a table that cannot be read are left out;
    troubles.newly_failed() finds them later.
    """
    asked = [r for r in results
             if r.is_failure and (r.http_status is not None or r.outcome != "held")]  # fmt: skip
    return {row.call_id: row.is_routed for row in look_up(conn, FAILED_BY_STAGE, asked)}


# Which results are of calls that need no person: one was cancelled while it was under way, or its
# row was deleted, or has gone to a state that leads to a stage. (In any other state the row may
# rest because its stage has failed.) But people are told where another call of the row to this
# stage was given up before: the row may be sent back for ever. OFFSET 0 keeps the planner from
# reading all of the history.
NEEDS_NO_PERSON = f"""
SELECT r.call_id
FROM ({RESULTS}) AS r CROSS JOIN LATERAL stage_call_row(r.table_name, '', r.job_id) AS j
WHERE EXISTS (SELECT FROM stage_attempts AS a
              WHERE a.job_id = r.job_id AND a.call_id = r.call_id AND a.outcome = 'cancelled'
              OFFSET 0)
   OR (j.is_there IS NULL AND r.table_name IN (SELECT name FROM pipeline_tables))
   OR (NOT EXISTS (SELECT FROM stage_calls AS c
                   WHERE c.job_id = r.job_id AND c.call_id = r.call_id OFFSET 0)
       AND EXISTS (SELECT FROM pipeline_stages AS p
                   WHERE p.table_name = r.table_name AND p.join_of = ''
                     AND (p.current_step, p.status) = (j.current_step, j.status))
       AND NOT EXISTS (SELECT FROM stage_attempts AS a
                       WHERE a.job_id = r.job_id AND a.call_id <> r.call_id
                         AND (a.table_name, a.stage, a.outcome)
                             = (r.table_name, r.stage, 'failed')
                       OFFSET 0))
"""


def note_needs_no_person(conn, results: Iterable[Result]) -> None:
    """Mark the failed results of calls that need no person as told."""
    asked = [r for r in results if r.outcome == "failed"]
    no_person = {row.call_id for row in look_up(conn, NEEDS_NO_PERSON, asked)}
    for result in asked:
        result.is_told = result.is_told or result.call_id in no_person


def look_up(conn, sql: str, results: Sequence[Result]) -> list:
    """The rows of `sql` for `results`, without those whose table is locked or cannot be read."""
    if not results:
        return []

    def ask(conn, table: str | None = None) -> list:
        asked = [result for result in results if table in (None, result.table_name)]
        return execute(conn, sql, {"results": as_json(conn, asked)}).fetchall()

    found, failed = db.in_parts(conn, ask, {result.table_name for result in results})
    if failed:
        log.warning("failed 상태 확인 실패: %s", db.reasons(failed))
    return [row for rows in found for row in rows]


def reap(
    conn, settings: SimpleNamespace, extend_by: float = 0.0, call_id: int | None = None
) -> None:
    """calls.reap(), with a line of the log for each attempt that has none."""
    for row in calls.reap(conn, extend_by, call_id):
        limits = pipeline.full_limits(settings).get(row.stage)  # None: it has left PIPELINE
        most = limits.max_attempts if limits else settings.MAX_ATTEMPTS
        then = f"{'포기' if row.spent >= most else '재시도'} ({IF_OWED})"
        if not row.is_owed:
            see = pipeline.typed("job", row.table_name, row.job_id)
            then = f"취소되었거나 Job 상태가 변경됨: {see}"
        details = {"attempt": row.spent, "outcome": row.outcome, "error": row.error}
        log.warning("파이프라인 단계 실행 실패: %s stage=%s attempt=%d/%d error=%s (%.0f초) → %s",
                    row_name(row.table_name, row.job_id), row.stage, row.spent, most,
                    row.error, row.seconds, then,
                    extra=about(row, status=row.http_status, **details))  # fmt: skip


def about(row: Any, **more: Any) -> dict[str, Any]:
    """The `extra` of a line of the log where only the id of the row is known: that of a job, or of
    a row of another table.
    """
    of_jobs = row.table_name == pipeline.JOBS.name
    ids = {"job": row.job_id} if of_jobs else {"table": row.table_name, "id": row.job_id}
    return logs.about(**ids, stage=row.stage, duration=round(row.seconds, 3), **more)


def tell(alerts: Alerts, ended: Result) -> None:
    """Tell people of a result that is given up, unless they were told; note() comes before."""
    if ended.is_set_failed:
        tell_set_failed(alerts, ended)
    elif not ended.is_told:
        tell_given_up(alerts, ended)


def tell_given_up(alerts: Alerts, ended: Result) -> None:
    if ended.outcome == "failed":
        row = row_name(ended.table_name, ended.job_id).replace("=", " ", 1)
        retry = pipeline.typed("retry", ended.table_name, ended.job_id)
        text = f"{row}: {ended.stage} was given up: {ended.error}; to call it again: {retry}"
        alerts.send("given_up", text, job=ended.job_id, table=ended.table_name, stage=ended.stage,
                    error=ended.error, http_status=ended.http_status, command=retry)  # fmt: skip


def row_name(table: str, key: str, parent: str | None = None) -> str:
    """The row of a table, as a line of the log names it: with its `parent` where that is known."""
    known = pipeline.tables().get(table)
    if known is None or known.name == pipeline.JOBS.name:
        return f"job={key}"
    named = zip(known.ids, filter(None, (key, parent)), strict=False)
    return " ".join(f"{name}={value}" for name, value in named)


def tell_set_failed(alerts: Alerts, row: Any) -> None:
    """Say that a stage has set its row to failed, and how a person sends it back.

    Args:
        row: a Result, or any with `table_name`, `job_id`, `stage` and `error`.
    """
    key, stage, error = row.job_id, row.stage, row.error or ""
    back = pipeline.sent_back(row.table_name, key, stage, (stage, "failed"))
    name = row_name(row.table_name, key)
    text = f"{name}: {stage} set it to failed: {error}; to send it back: {back}"
    details = {"job": key, "table": row.table_name, "stage": stage, "error": error}
    alerts.send("failed_by_stage", text, **details, sql=back)
    log.error("단계가 failed로 설정함: %s stage=%s error=%s → %s", name, stage, error[:500], back,
              extra=logs.about(**details))  # fmt: skip
