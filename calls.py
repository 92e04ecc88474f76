"""What is owed: claiming the next due call, knowing when to look again, giving calls back.

Each statement is a constant above the small function that runs it, and those that a session
prepares begin with their name. All times are the database's.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from db import execute, run
from settling import MINE, WAITING, WAKE, Settlement, parameters, statements_for

# A stage with max_running has slots: one that is free, as far as this snapshot knows.
LIMITED = "SELECT FROM stage_slots AS s WHERE s.stage = wanted.stage"
FREE = f"{LIMITED} AND s.leased_until <= now()"
# Locking it is what makes the limit exact. The call is locked first, so that a slot which a
# worker has locked is one that it takes.
SLOT = """
    LEFT JOIN LATERAL (
        SELECT s.slot FROM stage_slots AS s
        WHERE s.stage = open.stage AND s.leased_until <= now()
        LIMIT 1
        FOR UPDATE SKIP LOCKED) AS free ON true"""

WANTED = """unnest(%(stages)s::text[], %(leases)s::float8[], %(since)s::timestamptz[])
      AS wanted (stage, lease, since)"""

# The stages are tried in the order given, and the first one with a due call wins. A row that
# the stage's own transaction holds is passed by, and so is a stage that is held or full. Dead
# entries of the index that an old snapshot elsewhere keeps are passed by as far as `since` says.
FIRST_DUE = f"""
    SELECT open.*, wanted.lease, free.slot
    FROM {WANTED}
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.stage, c.attempts, c.worker, c.due_at
        FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at >= wanted.since AND c.due_at <= now()
          AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                          WHERE p.stage = wanted.stage AND p.held_until > now())
          AND (NOT EXISTS ({LIMITED}) OR EXISTS ({FREE}))
        ORDER BY c.due_at
        LIMIT 1
        FOR UPDATE OF c SKIP LOCKED) AS open{SLOT}
    WHERE free.slot IS NOT NULL OR NOT EXISTS ({LIMITED})
    LIMIT 1"""

# A person may take a call that is not due, but never one that a worker is on, or that may still
# be running because nobody knows what became of it; nor one more than max_running.
OPEN_CALL = f"""
    SELECT open.*, wanted.lease, free.slot
    FROM (
        SELECT c.job_id, c.call_id, c.stage, c.attempts, c.worker, c.due_at
        FROM stage_calls AS c
        WHERE c.job_id = %(only)s
          AND (c.due_at <= now() OR (c.worker IS NULL AND (
              SELECT a.outcome FROM stage_attempts AS a
              WHERE a.job_id = c.job_id AND a.call_id = c.call_id AND a.attempt = c.attempts
              LIMIT 1) IS DISTINCT FROM 'unknown'))
        FOR UPDATE OF c SKIP LOCKED) AS open
    JOIN {WANTED} ON wanted.stage = open.stage{SLOT}
    WHERE free.slot IS NOT NULL OR NOT EXISTS ({LIMITED})"""

# When the next call will be due. One that is due by now and was passed by is waited for by the
# sweep, not by a timer.
NEXT_DUE = f"""
    SELECT extract(epoch FROM min(coming.due_at) - now())::float8
    FROM {WANTED}
    LEFT JOIN LATERAL (
        SELECT max(p.held_until) AS until FROM pipeline_stages AS p
        WHERE p.stage = wanted.stage AND p.held_until > now()) AS held ON true
    CROSS JOIN LATERAL (
        SELECT greatest(c.due_at, held.until) AS due_at
        FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at < 'infinity'
          AND c.due_at > CASE WHEN held.until IS NULL THEN now() ELSE '-infinity' END
        ORDER BY c.due_at
        LIMIT 1) AS coming
    WHERE coming.due_at < 'infinity'"""

# Takes the call found, for as long as its lease. The job's state is looked up in this same
# statement. Always one row: it also says whether the result sent before it was settled, or when
# to look again, and wakes the others where that result freed a slot which is not taken here.
TAKE = f"""
, claimed AS (
    UPDATE stage_calls AS c
    SET attempts = c.attempts + 1, worker = %(worker)s, started_at = now(),
        due_at = now() + make_interval(secs => due.lease)
    FROM due
    WHERE c.job_id = due.job_id
    RETURNING c.*, due.worker AS worker_before, due.due_at AS was_due_at, due.slot
), leased AS (
    INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at, leased_until)
    SELECT job_id, call_id, attempts, stage, worker, started_at, due_at FROM claimed
), slot AS (
    UPDATE stage_slots AS s
    SET call_id = claimed.call_id, attempt = claimed.attempts, leased_until = claimed.due_at
    FROM claimed WHERE s.stage = claimed.stage AND s.slot = claimed.slot
)
SELECT claimed.call_id, claimed.job_id, claimed.current_step, claimed.status, claimed.stage,
       claimed.attempts AS attempt, claimed.attempts - claimed.free_attempts AS spent,
       claimed.started_at, claimed.worker_before IS NOT NULL AS taken_over,
       claimed.was_due_at, claimed.slot IS NOT NULL AS limited,
       job.tenant_id, job.found IS NOT NULL AS job_found,
       job.current_step AS job_step, job.status AS job_status,
       (job.current_step, job.status) IS NOT DISTINCT FROM
           (claimed.current_step, claimed.status) AS owed,
       claimed.attempts > 1 AND (
           SELECT true FROM stage_attempts AS a
           WHERE a.job_id = claimed.job_id AND a.call_id = claimed.call_id
             AND a.outcome = 'succeeded'
           LIMIT 1) IS NOT NULL AS accepted,
       EXISTS ({MINE}) AS unsettled,
       CASE WHEN claimed.call_id IS NULL THEN ({NEXT_DUE}) END AS next_due,
       CASE WHEN claimed.stage IS DISTINCT FROM %(freed)s AND {WAITING} THEN {WAKE} END AS woken
FROM (VALUES (1)) AS always
LEFT JOIN claimed ON true
LEFT JOIN LATERAL (
    SELECT true AS found, j.tenant_id, j.current_step::text, j.status::text
    FROM jobs AS j
    WHERE j.job_id = claimed.job_id
    LIMIT 1) AS job ON true
"""
CLAIM = f"/* claim */ WITH due AS ({FIRST_DUE}){TAKE}"
CLAIM_JOB = f"/* claim_job */ WITH due AS ({OPEN_CALL}){TAKE}"


# A row that is locked is the newest, while the job beside it is as the statement began: where
# the job moved between two states of one stage meanwhile, the claim is right after all.
STILL_OWED = """
SELECT count(*) > 0 FROM stage_calls AS c JOIN jobs AS j USING (job_id)
WHERE c.job_id = %(job_id)s AND c.call_id = %(call_id)s AND c.attempts = %(attempt)s
  AND c.worker = %(worker)s
  AND j.current_step::text = c.current_step AND j.status::text = c.status
"""


def is_owed(conn, row, worker: str) -> bool:
    """Whether the job of a claimed `row` is in the state that owes it, asked once more."""
    given = {"job_id": row.job_id, "call_id": row.call_id, "attempt": row.attempt}
    return execute(conn, STILL_OWED, given | {"worker": worker}).fetchone()[0]


def array(values: Iterable[Any]) -> str:
    """`values`, which hold no quotes, as PostgreSQL reads an array: cheaper than an expression."""
    return "{" + ",".join(f'"{value}"' for value in values) + "}"


NOTHING = {"job_id": None, "call_id": None, "attempt": None, "freed": None}


def claim(
    conn,
    *,
    leases: Mapping[str, float],
    worker: str,
    settled: Settlement | None = None,
    only: Any = None,
    marks: Mapping[str, datetime] | None = None,
):
    """Settle `settled`, if given, and claim the next due call: one round trip, one commit.

    Args:
        leases: the stages to choose from, most wanted first, each with the seconds for which
            no other worker may take its call.
        only: a job id: claim what this job owes, due or not.
        marks: since when to look in a stage, at first; everything is looked at before this
            says that nothing is due.

    Returns:
        A row; its `call_id` is None where nothing was due, and `next_due` then the seconds until
        something is. `unsettled` is True where the stage's own transaction holds the row of
        `settled`: settle it again later. `taken_over`: another worker's lease on it ran out.
    """
    wanted = [(stage, lease, "-infinity") for stage, lease in leases.items()]
    if marks:
        late = [(stage, lease, marks.get(stage, since)) for stage, lease, since in wanted]
        wanted = late + wanted
    stages, seconds, since = map(array, zip(*wanted, strict=True))
    params = {"stages": stages, "leases": seconds, "since": since, "worker": worker, "only": only}
    params |= parameters(conn, settled) if settled else NOTHING
    statements = [*statements_for(settled), CLAIM if only is None else CLAIM_JOB]
    return run(conn, statements, params).fetchone()


# Claims of this worker that it never began: their answer was lost, it has to stop, or it claimed
# ahead in vain. They are due again, so the other workers are told to look. Where the application
# holds the row of a call its lease stays, for another time; where it is gone, nothing is owed.
GIVE_BACK = f"""
WITH claimed AS (
    SELECT job_id, call_id, attempt FROM stage_leases
    WHERE worker = %(worker)s AND call_id <> ALL (%(keep)s::bigint[])
), open AS (
    SELECT c.job_id, c.call_id FROM stage_calls AS c JOIN claimed USING (job_id, call_id)
    WHERE c.attempts = claimed.attempt
    FOR UPDATE OF c SKIP LOCKED
), ended AS (
    DELETE FROM stage_leases AS l USING claimed
    WHERE (l.call_id, l.attempt) = (claimed.call_id, claimed.attempt)
      AND (l.call_id IN (SELECT call_id FROM open)
           OR NOT EXISTS (SELECT FROM stage_calls AS c
                          WHERE c.job_id = l.job_id AND c.call_id = l.call_id
                            AND c.attempts = l.attempt))
    RETURNING l.call_id, l.attempt
), freed AS (
    UPDATE stage_slots AS s SET leased_until = '-infinity'
    FROM ended AS e WHERE s.call_id = e.call_id AND s.attempt = e.attempt
), given_back AS (
    UPDATE stage_calls
    SET worker = NULL, started_at = NULL, due_at = now(), free_attempts = free_attempts + 1
    WHERE job_id IN (SELECT job_id FROM open)
)
SELECT ended.calls AS given_back, claimed.calls - ended.calls AS locked,
       CASE WHEN ended.calls > 0 THEN {WAKE} END AS woken
FROM (SELECT count(*) AS calls FROM ended) AS ended,
     (SELECT count(*) AS calls FROM claimed) AS claimed
"""


def give_back(conn, worker: str, keep: Sequence[int]):
    """Free what `worker` claimed and did not begin; `keep` are the calls it has results for.

    Returns:
        A row: how many were `given_back`, and how many are `locked` by the application.
    """
    return execute(conn, GIVE_BACK, {"worker": worker, "keep": list(keep)}).fetchone()
