"""What is left of deleted jobs, and of the PIPELINE before."""

from typing import Any

from db import UNPINNED, WAKE_CHANNEL, execute
from history import BATCH

# A given-up call waits for a person, but not if its job was deleted: then it is dropped. They are
# checked in the order of the ids, a batch a round. Whether a row of a table that left PIPELINE was
# deleted is not known.
FORGET = """
WITH given_up AS MATERIALIZED (
    SELECT job_id, call_id, table_name FROM stage_calls
    WHERE due_at = 'infinity' AND stage = ANY (ARRAY(SELECT stage FROM pipeline_stages))
      AND table_name IN (SELECT name FROM pipeline_tables)
), batch AS (
    SELECT * FROM given_up WHERE %(after)s IS NULL OR job_id >= %(after)s
    ORDER BY job_id, call_id LIMIT %(batch)s
), deleted AS MATERIALIZED (
    SELECT job_id, call_id FROM batch
    WHERE (stage_call_row(table_name, '', job_id)).is_there IS NULL
), gone AS (
    DELETE FROM stage_calls AS c USING deleted
    WHERE c.job_id = deleted.job_id AND c.call_id = deleted.call_id AND c.due_at = 'infinity'
    RETURNING c.*
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                                finished_at, outcome, error)
    SELECT job_id, table_name, call_id, attempts + 1, stage, %(worker)s, now(), now(),
           'skipped', 'the job was deleted'
    FROM gone
    ON CONFLICT DO NOTHING
)
SELECT count(*) AS found,
       (SELECT job_id FROM batch ORDER BY job_id DESC LIMIT 1) AS last
FROM batch
"""


def forget_deleted(conn, worker: str, after: Any = None, batch: int = BATCH) -> Any:
    """Drop the given-up calls of deleted jobs, with a row in the history; checks one batch.

    Args:
        after: what the last batch returned.

    Returns:
        The id that the next batch begins with; None: with the first.
    """
    given = {"worker": worker, "after": after, "batch": batch}
    found = execute(conn, FORGET, given).fetchone()
    return found.last if found.found == batch else None


# stage_joins has a row for each parent and join, until the parent is deleted. They are checked in
# the order of the ids, a batch a round. Rows of a join that left PIPELINE stay, as their table is
# not known, and the join may come back. Where a stage was called for the parent's own state after
# the call of the join, the parent has moved on. That is noted here, as the history that shows it is
# pruned: it must not count as stalled at the join when it comes back to the state that was noted.
FORGET_PARENTS = """
WITH batch AS (
    SELECT parent_id, join_of FROM stage_joins
    WHERE %(after)s IS NULL OR parent_id >= %(after)s
    ORDER BY parent_id, join_of LIMIT %(batch)s
), gone AS (
    DELETE FROM stage_joins AS j USING pipeline_stages AS p
    WHERE (j.parent_id, j.join_of) IN (SELECT parent_id, join_of FROM batch)
      AND p.join_of = j.join_of
      AND (stage_call_row(p.table_name, '', j.parent_id)).is_there IS NULL
), moved_on AS (
    UPDATE stage_joins AS j SET is_noted = false FROM pipeline_stages AS p
    WHERE (j.parent_id, j.join_of) IN (SELECT parent_id, join_of FROM batch)
      AND p.join_of = j.join_of AND j.is_noted
      AND EXISTS (SELECT FROM stage_attempts AS a
                  WHERE a.job_id = j.parent_id AND a.table_name = p.table_name
                    AND a.stage <> p.stage AND a.stage IN (
                        SELECT s.stage FROM pipeline_stages AS s
                        WHERE s.table_name = p.table_name AND s.join_of = '')
                    AND a.started_at > greatest(j.recorded_at, (
                        SELECT max(own.started_at) FROM stage_attempts AS own
                        WHERE own.job_id = j.parent_id AND own.table_name = p.table_name
                          AND (own.stage = p.stage
                               OR own.stage NOT IN (SELECT stage FROM pipeline_stages))))
                    AND a.outcome NOT IN ('skipped', 'cancelled')
                  OFFSET 0)  -- each parent's own attempts, by their index
      AND NOT EXISTS (SELECT FROM stage_calls AS c
                      WHERE c.job_id = j.parent_id AND c.table_name = p.table_name
                        AND c.join_of = j.join_of
                      OFFSET 0)
)
SELECT count(*) AS found,
       (SELECT parent_id FROM batch ORDER BY parent_id DESC LIMIT 1) AS last
FROM batch
"""


def forget_parents(conn, after: Any = None, batch: int = BATCH) -> Any:
    """Delete rows of stage_joins whose parents were deleted, and note that others have moved on;
    checks one batch.

    Args:
        after: what the last batch returned.

    Returns:
        The id that the next batch begins with; None: with the first.
    """
    found = execute(conn, FORGET_PARENTS, {"after": after, "batch": batch}).fetchone()
    return found.last if found.found == batch else None


# Calls that were recorded under another PIPELINE: under the name that their stage had before, or
# with a priority that their table no longer declares, which stage_due_calls() does not look for. A
# call of a state that left PIPELINE stays as it is; once the state is back, it gets its stage, also
# where checks.pass_over() has put it aside. `install` runs this for every call. Upkeep runs it for
# stages that left PIPELINE, as a transaction may have been open during the install or have held the
# row; a call of any other stage is renamed when a listener claims it. The lease of a call
# that was claimed during the install is renamed with it, as `install` has not seen that lease: else
# the stage would not count the call as under way, and might be called for the same row once more.
ADOPT = """
WITH mine AS (
    SELECT o.job_id, o.call_id, o.attempts, p.stage,
           CASE WHEN t.priority_column IS NOT NULL THEN o.priority ELSE 0 END AS priority
    FROM stage_calls AS o
    JOIN pipeline_stages AS p USING (table_name, join_of, current_step, status)
    JOIN pipeline_tables AS t ON t.name = o.table_name
    WHERE ({every} AND o.stage <> p.stage
           OR o.stage NOT IN (SELECT stage FROM pipeline_stages)
           OR o.priority <> 0 AND o.table_name IN (
              SELECT name FROM pipeline_tables WHERE priority_column IS NULL))
    LIMIT {batch}
    FOR UPDATE OF o SKIP LOCKED
), leased AS (
    UPDATE stage_leases AS l SET stage = mine.stage FROM mine
    WHERE l.call_id = mine.call_id AND l.attempt = mine.attempts AND NOT l.working
      AND l.stage NOT IN (SELECT stage FROM pipeline_stages)
)
UPDATE stage_calls AS c SET stage = mine.stage, priority = mine.priority
FROM mine
WHERE c.job_id = mine.job_id AND c.call_id = mine.call_id
"""


def adopt(conn) -> int:
    """Give calls that were recorded under an earlier PIPELINE the stage and priority that the
    present one has for them; how many.
    """
    adopted = execute(conn, UNPINNED + ADOPT.format(every="false", batch=BATCH)).rowcount
    if adopted:
        execute(conn, f"NOTIFY {WAKE_CHANNEL}")
    return adopted
