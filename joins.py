"""Joins: a call that a parent owes once every row that belongs to it is in a state.

Nothing is counted in the application's transactions, which may overlap in any order. The trigger of
the child's table appends a row to stage_looks, and a listener looks at the parent afterwards: the
row of the arrival that commits last becomes visible together with the states of all, so the look
that takes it finds every row in place.
"""

from typing import Any

from db import WAKE_CHANNEL, Statement, execute, run

# Only one listener at a time processes stage_looks. With two, one could take the look of an arrival
# and the other the look of the last missing row's deletion, and neither would know of both. The
# lock is taken in a statement before the one that looks, whose snapshot then includes what the
# previous listener recorded. We do not wait for the lock, as its holder may be frozen: a
# transaction-local setting tells the next statement whether we got it.
LOCK_JOINS = Statement(
    "lock_joins",
    """
SELECT set_config('job_state_listener.looks', pg_try_advisory_xact_lock(
    hashtextextended('job_state_listener.joins', 'stage_looks'::regclass::oid::bigint))::text, true)
""",
)

# Takes all looks of a batch of parents. A call is recorded where every row is in place and at least
# one of them arrived since the last call was recorded; a row that only leaves makes no second call.
# There may be more calls than this listener has workers, so the other listeners are woken.
LOOK = Statement(
    "look",
    """
WITH parents AS (
    SELECT DISTINCT parent_id, join_of FROM (
        SELECT parent_id, join_of FROM stage_looks
        WHERE current_setting('job_state_listener.looks')::boolean
          AND (%(join)s::text IS NULL OR join_of = %(join)s)
        ORDER BY parent_id, join_of LIMIT 4000) AS first
    ORDER BY parent_id, join_of LIMIT 1000
), taken AS (
    DELETE FROM stage_looks WHERE ctid = ANY (ARRAY(
        SELECT l.ctid FROM parents AS p CROSS JOIN LATERAL (
            SELECT s.ctid FROM stage_looks AS s
            WHERE s.parent_id = p.parent_id AND s.join_of = p.join_of OFFSET 0) AS l))
    RETURNING parent_id, join_of, arrived
), looked AS (
    SELECT parent_id, join_of, bool_or(arrived) AS has_arrived FROM taken
    GROUP BY parent_id, join_of
), asked AS (
    SELECT l.parent_id, l.join_of, l.has_arrived OR coalesce(m.is_open, false) AS is_open,
           m.parent_id IS NOT NULL AS is_known,
           stage_join_is_complete(l.join_of, l.parent_id) AS is_complete
    FROM looked AS l LEFT JOIN LATERAL (
        SELECT j.parent_id, j.is_open FROM stage_joins AS j
        WHERE j.parent_id = l.parent_id AND j.join_of = l.join_of LIMIT 1) AS m ON true
), remembered AS (
    INSERT INTO stage_joins AS j (parent_id, join_of, is_open, recorded_at)
    SELECT parent_id, join_of, is_open AND NOT is_complete,
           CASE WHEN is_open AND is_complete THEN now() END
    FROM asked WHERE is_open OR is_known
    ON CONFLICT (parent_id, join_of) DO UPDATE
    SET is_open = excluded.is_open,
        recorded_at = coalesce(excluded.recorded_at, j.recorded_at),
        is_noted = j.is_noted AND excluded.recorded_at IS NULL
), recorded AS (
    INSERT INTO stage_calls AS c (job_id, table_name, join_of, tenant_id, current_step, status,
                                  stage)
    SELECT a.parent_id, p.table_name, p.join_of,
           left((stage_call_row(p.table_name, '', a.parent_id)).tenant_id #>> '{}', 500),
           p.current_step, p.status, p.stage
    FROM asked AS a JOIN pipeline_stages AS p ON p.join_of = a.join_of
    WHERE a.is_open AND a.is_complete
    ON CONFLICT (job_id, table_name, join_of) DO UPDATE
    SET call_id = DEFAULT, tenant_id = excluded.tenant_id, stage = excluded.stage,
        created_at = excluded.created_at, due_at = excluded.due_at, attempts = 0,
        free_attempts = 0, worker = NULL, started_at = NULL, last_error = NULL
    RETURNING c.call_id
)
SELECT CASE WHEN current_setting('job_state_listener.looks')::boolean
            THEN (SELECT count(*) FROM parents) END AS parents,
       CASE WHEN EXISTS (SELECT FROM recorded)
            THEN pg_notify(%(wake)s, '') END AS woken
""",
)


def look(conn, join: str | None = None) -> int | None:
    """Look at the parents whose rows have changed; with `join`, at those of this join alone.

    Returns:
        How many parents; if not 0, there may be more. None: another listener holds the lock.
    """
    given = {"wake": WAKE_CHANNEL, "join": join}
    return run(conn, [LOCK_JOINS, LOOK], given).fetchone().parents


# Stores the state of the parent when the call of a join is first made, and again until an attempt
# counts. A listener that is lost before this has made no call, so the next claim stores it.
NOTE = """
UPDATE stage_joins SET is_noted = true, parent_step = %(step)s, parent_status = %(status)s
WHERE parent_id = %(parent_id)s AND join_of = %(join)s AND (%(first)s OR NOT is_noted)
"""


def note_parent(conn, row: Any) -> None:
    """Store the state of the parent of a claimed `row`, before its call is made."""
    given = {"step": row.job_step, "status": row.job_status, "first": row.spent == 1}
    execute(conn, NOTE, given | {"parent_id": row.key, "join": row.join_of})


HAS_LOOK = """
SELECT EXISTS (SELECT FROM stage_looks
               WHERE parent_id = %(parent_id)s AND join_of = %(join)s) AS has_look
"""


def has_look(conn, row: Any) -> bool:
    """Whether stage_looks has a change of the rows of a claimed `row`'s join."""
    given = {"parent_id": row.key, "join": row.join_of}
    return execute(conn, HAS_LOOK, given).fetchone().has_look


# Used where the call is skipped though no attempt was accepted: a row has left the state, or the
# rows have changed since. The look keeps the join open until it is complete. It is appended only
# for the attempt that holds the claim, as this may run late, over a connection that was lost: by
# then the rows may be back and the call accepted, and a look would record the call once more.
REOPEN = """
INSERT INTO stage_looks (parent_id, join_of, arrived)
SELECT c.job_id, c.join_of, true FROM stage_calls AS c
WHERE c.job_id = %(parent_id)s AND c.call_id = %(call_id)s AND c.attempts = %(attempt)s
  AND c.worker = %(worker)s
"""


def reopen(conn, row: Any, worker: str) -> None:
    """Append a look at the parent of a `row` claimed by `worker` whose call is not made."""
    given = {"parent_id": row.key, "call_id": row.call_id, "attempt": row.attempt}
    execute(conn, REOPEN, given | {"worker": worker})


# Records the call of a join for a person who wants it made again, as if a row had arrived; takes
# the looks of that parent as well. Returns no row where a row is missing, the call is under way, or
# the database has another stage for it.
AGAIN = """
SELECT pg_advisory_xact_lock(
    hashtextextended('job_state_listener.joins', 'stage_looks'::regclass::oid::bigint));
WITH recorded AS (
    INSERT INTO stage_calls AS c (job_id, table_name, join_of, tenant_id, current_step, status,
                                  stage)
    SELECT %(key)s, p.table_name, p.join_of, left(at.tenant_id #>> '{}', 500), p.current_step,
           p.status, p.stage
    FROM pipeline_stages AS p CROSS JOIN stage_call_row(p.table_name, p.join_of, %(key)s) AS at
    WHERE p.join_of = %(join)s AND p.stage = %(stage)s AND at.is_complete AND NOT EXISTS (
        SELECT FROM stage_leases AS l
        WHERE l.job_id = %(key)s AND l.table_name = p.table_name AND l.stage = p.stage
          AND l.leased_until > now())
    ON CONFLICT (job_id, table_name, join_of) DO UPDATE
    SET call_id = DEFAULT, tenant_id = excluded.tenant_id, stage = excluded.stage,
        created_at = excluded.created_at, due_at = excluded.due_at, attempts = 0,
        free_attempts = 0, worker = NULL, started_at = NULL, last_error = NULL
    WHERE c.worker IS NULL OR c.due_at <= now()
    RETURNING c.job_id, c.join_of, c.call_id
), looked AS (
    DELETE FROM stage_looks AS l USING recorded AS r
    WHERE l.parent_id = r.job_id AND l.join_of = r.join_of
), remembered AS (
    INSERT INTO stage_joins (parent_id, join_of, is_open, recorded_at)
    SELECT job_id, join_of, false, now() FROM recorded
    ON CONFLICT (parent_id, join_of) DO UPDATE
    SET is_open = false, recorded_at = excluded.recorded_at, is_noted = false
)
SELECT call_id FROM recorded
"""


def record_again(conn, key: str, join: str, stage: str) -> int | None:
    """Record the call of a join again; its call_id, or None where a row is missing, the call is
    under way or the database has another stage for it.

    Raises:
        psycopg2.errors.LockNotAvailable: another transaction holds the call or the lock.
    """
    found = execute(conn, AGAIN, {"key": key, "join": join, "stage": stage}).fetchone()
    return found and found.call_id
