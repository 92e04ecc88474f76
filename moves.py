"""Asynchronous stages: a call that was taken with 202 is over when its row moves on.

The trigger appends a row to stage_moves for a row that leaves the stage, whoever moved it and
whether or not the answer is there yet. A listener takes it, and ends the lease of the call.
"""

import logging

import db
import failures
import history
import pipeline

log = logging.getLogger("listener.trigger")

# By the parts of the statement:
# seen, mine: rows that are locked are being processed by another listener.
# leased: a move that is older than a call does not end it.
# forgotten: a move whose call has no answer yet stays until the 202 is recorded.
# paid, given_up: the trigger has removed a row's own call; that of a join is settled here.
# late to counted: history.COUNT counts attempts that are older than 5 minutes. A move may be
# committed long after it was made, when that count has passed its attempt; then the attempt is
# counted here. One that is newer than 4 minutes cannot have been passed, and locks no mark.
# Last: a place under a limit may be free now, so the other listeners are woken.
LOOK = f"""
WITH seen AS (
    SELECT move_id, job_id, table_name, stage, is_failed, moved_at FROM stage_moves
    WHERE %(table)s::text IS NULL OR table_name = %(table)s
    ORDER BY move_id LIMIT 1000
    FOR UPDATE SKIP LOCKED
), leased AS (
    SELECT s.move_id, s.is_failed, s.moved_at, l.call_id, l.attempt, l.working
    FROM seen AS s JOIN stage_leases AS l
        ON (l.job_id, l.table_name, l.stage || '') = (s.job_id, s.table_name, s.stage)
       AND l.started_at <= s.moved_at AND NOT l.unanswered
    WHERE l.job_id = ANY (ARRAY(SELECT job_id FROM seen))
), mine AS (
    SELECT l.call_id, l.attempt FROM stage_leases AS l
    WHERE l.call_id = ANY (ARRAY(SELECT call_id FROM leased WHERE working)) AND l.working
    FOR UPDATE SKIP LOCKED
), ended AS (
    DELETE FROM stage_leases AS l USING mine
    WHERE l.call_id = ANY (ARRAY(SELECT call_id FROM mine))
      AND (l.call_id, l.attempt) = (mine.call_id, mine.attempt)
    RETURNING l.*
), forgotten AS (
    DELETE FROM stage_moves WHERE move_id IN (
        SELECT move_id FROM seen EXCEPT
        SELECT move_id FROM leased WHERE (call_id, attempt) NOT IN (
            SELECT call_id, attempt FROM ended))
    RETURNING move_id
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, spent, stage, worker,
                                started_at, finished_at, http_status, outcome, error)
    SELECT e.job_id, e.table_name, e.call_id, e.attempt, e.spent, e.stage, e.worker, e.started_at,
           greatest(e.started_at, m.moved_at), 202,
           CASE WHEN m.is_deleted THEN 'skipped' WHEN NOT m.is_failed THEN 'succeeded' WHEN EXISTS (
               SELECT FROM pipeline_stages AS p
               WHERE (p.table_name, p.join_of, p.current_step, p.status)
                     = (e.table_name, '', e.stage, 'failed')) THEN 'retry' ELSE 'failed' END,
           CASE WHEN m.is_deleted THEN 'the job was deleted'
                WHEN m.is_failed THEN 'set failed by its stage' END
    FROM ended AS e CROSS JOIN LATERAL (
        SELECT l.moved_at, l.is_failed,
               e.table_name IN (SELECT name FROM pipeline_tables)
                   AND (stage_call_row(e.table_name, '', e.job_id)).is_there IS NULL AS is_deleted
        FROM leased AS l
        WHERE (l.call_id, l.attempt) = (e.call_id, e.attempt) ORDER BY l.moved_at LIMIT 1) AS m
    ON CONFLICT DO NOTHING
    RETURNING job_id, table_name, stage, call_id, attempt, outcome, error, started_at, finished_at
), paid AS (
    DELETE FROM stage_calls AS c USING recorded AS r
    WHERE c.job_id = ANY (ARRAY(SELECT job_id FROM recorded)) AND c.join_of <> ''
      AND (c.job_id, c.call_id, c.attempts) = (r.job_id, r.call_id, r.attempt)
      AND r.outcome <> 'failed'
), given_up AS (
    UPDATE stage_calls AS c
    SET due_at = 'infinity', worker = NULL, started_at = NULL, last_error = r.error
    FROM recorded AS r
    WHERE c.job_id = ANY (ARRAY(SELECT job_id FROM recorded)) AND c.join_of <> ''
      AND (c.job_id, c.call_id, c.attempts) = (r.job_id, r.call_id, r.attempt)
      AND r.outcome = 'failed'
), late AS (
    SELECT * FROM recorded WHERE finished_at < now() - interval '4 minutes'
), mark AS (
    SELECT counted_until FROM stage_totals_mark WHERE EXISTS (SELECT FROM late) FOR UPDATE
), passed AS (
    SELECT late.* FROM late JOIN mark ON late.finished_at <= mark.counted_until
), counted AS (
    {history.ADD_TOTALS.format(rows="passed")}
)
SELECT recorded.job_id::text, table_name, stage, outcome, error,
       extract(epoch FROM finished_at - started_at)::float8 AS seconds, taken.moves,
       (stage_call_row(table_name, '', recorded.job_id)).parent_id::text AS parent_id,
       CASE WHEN recorded.job_id IS NOT NULL THEN pg_notify(%(wake)s, '') END AS woken
FROM (SELECT count(*) AS moves FROM forgotten) AS taken LEFT JOIN recorded ON true
"""


def look(conn, table: str | None = None) -> tuple[list, int]:
    """End the calls whose rows have moved on; with `table`, of its rows alone.

    Returns:
        A row for each call: job_id (the row's id), parent_id, table_name, stage, outcome, error,
        seconds. And how many moves were taken; if not 0, there may be more.
    """
    given = {"wake": db.WAKE_CHANNEL, "table": table} | history.BOUNDS
    rows = db.execute(conn, LOOK, given).fetchall()
    return [row for row in rows if row.job_id is not None], rows[0].moves


HAS_WORKING = "SELECT EXISTS (SELECT FROM stage_leases WHERE working) AS has_working"


def has_working(conn) -> bool:
    """Whether a call was taken with 202 and is not over."""
    return db.execute(conn, HAS_WORKING).fetchone().has_working


# Moves that no trigger has recorded: the row was deleted, or changed while the trigger was off. For
# the call of a join, the parent has moved if it left the state stored at the call's first claim.
# Rows of a table that left PIPELINE cannot be read, so their calls end with their leases. A row has
# not moved either where stage_calls still has its call and it is in the state of that call: the
# state may lead to another stage since the last install.
RECORD_MISSED = """
INSERT INTO stage_moves (job_id, table_name, stage, is_failed)
SELECT l.job_id, l.table_name, l.stage,
       coalesce((r.current_step, r.status) = (l.stage, 'failed'), false)
FROM stage_leases AS l CROSS JOIN LATERAL stage_call_row(l.table_name, '', l.job_id) AS r
WHERE l.working AND l.table_name IN (SELECT name FROM pipeline_tables)
  AND (%(table)s::text IS NULL OR l.table_name = %(table)s)
  AND (r.is_there IS NULL
       OR (r.current_step, r.status) IS DISTINCT FROM (l.stage, 'running')
      AND NOT EXISTS (
          SELECT FROM pipeline_stages AS p
          WHERE (p.table_name, p.join_of, p.stage) = (l.table_name, '', l.stage)
            AND (p.current_step, p.status) = (r.current_step, r.status))
      AND NOT EXISTS (
          SELECT FROM stage_calls AS c
          WHERE c.job_id = l.job_id AND c.call_id = l.call_id AND c.join_of = ''
            AND (c.current_step, c.status) = (r.current_step, r.status))
      AND NOT EXISTS (
          SELECT FROM pipeline_stages AS p
          JOIN stage_joins AS j ON j.join_of = p.join_of AND j.parent_id = l.job_id
          WHERE (p.table_name, p.stage) = (l.table_name, l.stage)
            AND (j.parent_step, j.parent_status)
                IS NOT DISTINCT FROM (r.current_step, r.status)))
"""


def record_missed(conn, table: str | None = None) -> None:
    """Record the moves that no trigger has recorded; with `table`, of its rows alone."""
    db.execute(conn, RECORD_MISSED, {"table": table})


def log_end(row) -> None:
    """Log the end of a call in the words of trigger.log_end."""
    name = failures.row_name(row.table_name, row.job_id, row.parent_id)
    job = {"job": row.parent_id} if row.parent_id else {}
    if row.outcome == "succeeded":
        about = failures.about(row, status=202, **job)
        log.info("파이프라인 단계 실행 성공: %s stage=%s status=202 (%.2f초)",
                 name, row.stage, row.seconds, extra=about)  # fmt: skip
    else:
        about = failures.about(row, status=202, outcome=row.outcome, error=row.error, **job)
        see = pipeline.typed("job", row.table_name, row.job_id)
        log.warning("파이프라인 단계 실행 실패: %s stage=%s error=%s → %s",
                    name, row.stage, row.error, see, extra=about)  # fmt: skip
