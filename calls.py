"""What is owed and what came of it: claiming a call, settling it, and knowing the next one.

Each statement is a constant above the small function that runs it. All times are the
database's, and every statement commits by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db import WAKE_CHANNEL, execute

# The fence: the one attempt that may settle a call. A worker that comes back late finds none.
MINE = """
    SELECT job_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s
      AND attempts = %(attempt)s AND worker = %(worker)s"""

# --- settling ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settlement:
    """The result of an attempt, on its way to the database."""

    job_id: Any
    call_id: int
    attempt: int
    stage: str
    worker: str
    started_at: Any
    outcome: str
    http_status: int | None = None
    error: str | None = None
    delay: float | None = None  # seconds until it is due again; None: never
    after_lease: bool = False  # not before the lease has run out
    free: bool = False  # does not count towards MAX_ATTEMPTS
    hold: bool = False  # nobody calls this stage for a while
    retry_after: float | None = None  # seconds the stage asked for


# A worker that comes back late, its attempt taken for lost, still adds what it knows: a claim
# never repeats a call of which any attempt was accepted.
RECORD = """
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            http_status, outcome, error)
VALUES (%(job_id)s, %(call_id)s, %(attempt)s, %(stage)s, %(worker)s, %(started_at)s, now(),
        %(http_status)s, %(outcome)s, left(%(error)s, 2000))
ON CONFLICT DO NOTHING;
"""

# Settling never waits for the stage's own transaction, which may still hold the row of the
# call when the stage answers: hence SKIP LOCKED.
PAY = f"""
DELETE FROM stage_calls WHERE job_id = ({MINE} FOR UPDATE SKIP LOCKED);
"""

POSTPONE = f"""
UPDATE stage_calls
SET worker = NULL, started_at = NULL, last_error = left(%(error)s, 2000),
    free_attempts = free_attempts + %(free)s::integer,
    due_at = greatest(CASE WHEN %(after_lease)s THEN due_at END,
                      coalesce(now() + make_interval(secs => %(delay)s), 'infinity'))
WHERE job_id = ({MINE} FOR UPDATE SKIP LOCKED);
"""

# Each hold is twice as long as the one before, up to a minute, unless the stage asked for a
# time. Results of calls that were under way when the hold began do not lengthen it.
HOLD = """
UPDATE pipeline_stages AS p
SET held_until = now() + make_interval(secs => length.seconds),
    hold_seconds = length.seconds, held_reason = left(%(error)s, 500)
FROM pipeline_stages AS q, LATERAL (
    SELECT coalesce(%(retry_after)s, least(60, 2 * coalesce(q.hold_seconds, 0.5))) AS seconds
) AS length
WHERE p.stage = %(stage)s AND (q.current_step, q.status) = (p.current_step, p.status)
  AND (p.held_until IS NULL
       OR p.held_until < now() + make_interval(secs => %(retry_after)s)
       OR (p.held_until <= now()
           AND p.held_until - make_interval(secs => p.hold_seconds) < %(started_at)s));
"""

# A success lifts the hold, unless the call had begun before it.
LIFT = """
UPDATE pipeline_stages SET held_until = NULL, hold_seconds = NULL, held_reason = NULL
WHERE stage = %(stage)s AND held_until - make_interval(secs => hold_seconds) < %(started_at)s;
"""


def settling(settled: Settlement | None) -> str:
    """The statements that write `settled`, to be run as one."""
    if settled is None:
        return ""
    paid = settled.outcome in ("succeeded", "skipped")
    also = LIFT if settled.outcome == "succeeded" else HOLD if settled.hold else ""
    return RECORD + (PAY if paid else POSTPONE) + also


def parameters(conn, settled: Settlement) -> dict[str, Any]:
    """What `settled` says, as this database can store it."""
    error = settled.error
    if error is not None:
        utf8 = conn.info.parameter_status("server_encoding") == "UTF8"
        error = error.encode("utf-8" if utf8 else "ascii", "backslashreplace").decode()
        error = error.replace("\0", "\\0")
    return vars(settled) | {"error": error}


UNSETTLED = f"SELECT EXISTS ({MINE})"


def settle(conn, settled: Settlement) -> bool:
    """Write a result; False where the stage's own transaction holds the row: again later."""
    sql = settling(settled) + UNSETTLED
    return not execute(conn, sql, parameters(conn, settled)).fetchone()[0]


# --- claiming ------------------------------------------------------------------------------

# The stages are tried in the order given, and the first one with a due call wins. A row that
# the stage's own transaction holds is passed by, and so is a held stage.
FIRST_DUE = """
    SELECT open.*
    FROM unnest(%(stages)s::text[]) AS wanted (stage)
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.stage, c.attempts, c.worker, c.started_at
        FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at <= now()
          AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                          WHERE p.stage = wanted.stage AND p.held_until > now())
        ORDER BY c.due_at
        LIMIT 1
        FOR UPDATE OF c SKIP LOCKED) AS open
    LIMIT 1"""

# A person may take a call that is not due, but never one that a worker is on, or that may still
# be running because nobody knows what became of it.
OPEN_CALL = """
    SELECT c.job_id, c.call_id, c.stage, c.attempts, c.worker, c.started_at
    FROM stage_calls AS c
    WHERE c.job_id = %(only)s
      AND (c.due_at <= now() OR (c.worker IS NULL AND (
          SELECT a.outcome FROM stage_attempts AS a
          WHERE a.job_id = c.job_id AND a.call_id = c.call_id AND a.attempt = c.attempts
          LIMIT 1) IS DISTINCT FROM 'unknown'))
    FOR UPDATE OF c SKIP LOCKED"""

# Takes the call found, for as long as the lease. The job's state is looked up in this same
# statement. Always one row: it also says whether the result sent before it was settled.
TAKE = f"""
, lost AS (
    INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker,
                                started_at, finished_at, outcome, error)
    SELECT job_id, call_id, attempts, stage, worker, started_at, now(), 'lost',
           'the worker did not come back before its lease ran out'
    FROM due
    WHERE worker IS NOT NULL AND (
        SELECT true FROM stage_attempts AS a
        WHERE a.job_id = due.job_id AND a.call_id = due.call_id AND a.attempt = due.attempts
        LIMIT 1) IS NULL
    ON CONFLICT DO NOTHING
), claimed AS (
    UPDATE stage_calls AS c
    SET attempts = c.attempts + 1, worker = %(worker)s, started_at = now(),
        due_at = now() + make_interval(secs => %(lease)s)
    WHERE c.job_id = (SELECT job_id FROM due)
    RETURNING c.*
)
SELECT claimed.call_id, claimed.job_id, claimed.current_step, claimed.status, claimed.stage,
       claimed.attempts AS attempt, claimed.attempts - claimed.free_attempts AS spent,
       claimed.started_at, job.tenant_id, job.found IS NOT NULL AS job_found,
       job.current_step AS job_step, job.status AS job_status,
       (job.current_step, job.status) IS NOT DISTINCT FROM
           (claimed.current_step, claimed.status) AS owed,
       claimed.attempts > 1 AND (
           SELECT true FROM stage_attempts AS a
           WHERE a.job_id = claimed.job_id AND a.call_id = claimed.call_id
             AND a.outcome = 'succeeded'
           LIMIT 1) IS NOT NULL AS accepted,
       EXISTS ({MINE}) AS unsettled,
       now() AS looked_at
FROM (VALUES (1)) AS always
LEFT JOIN claimed ON true
LEFT JOIN LATERAL (
    SELECT true AS found, j.tenant_id, j.current_step::text, j.status::text
    FROM jobs AS j
    WHERE j.job_id = claimed.job_id
    LIMIT 1) AS job ON true
"""
CLAIM = f"WITH due AS ({FIRST_DUE}){TAKE}"
CLAIM_JOB = f"WITH due AS ({OPEN_CALL}){TAKE}"


NOTHING = {"job_id": None, "call_id": None, "attempt": None}


def claim(conn, *, stages: Sequence[str], worker: str, lease: float, settled=None, only=None):
    """Settle `settled`, if given, and claim the next due call: one round trip, one commit.

    Args:
        stages: names to choose from, most wanted first.
        lease: seconds for which no other worker may take the call.
        only: a job id: claim what this job owes, due or not.

    Returns:
        A row; its `call_id` is None where nothing was due, and `unsettled` is True where the
        stage's own transaction holds the row of `settled`: settle it again later.
    """
    params = {"stages": list(stages), "worker": worker, "lease": lease, "only": only}
    params |= parameters(conn, settled) if settled else NOTHING
    sql = CLAIM if only is None else CLAIM_JOB
    return execute(conn, settling(settled) + sql, params).fetchone()


# When the next call of these stages will be due, given what was due at `looked_at`: a call
# that was passed by then is waited for by the sweep, not by a timer.
NEXT_DUE = """
SELECT extract(epoch FROM min(coming.due_at) - now())::float8
FROM unnest(%(stages)s::text[]) AS wanted (stage)
LEFT JOIN LATERAL (
    SELECT max(p.held_until) AS until FROM pipeline_stages AS p
    WHERE p.stage = wanted.stage AND p.held_until > %(looked_at)s) AS held ON true
CROSS JOIN LATERAL (
    SELECT greatest(c.due_at, held.until) AS due_at
    FROM stage_calls AS c
    WHERE c.stage = wanted.stage AND c.due_at < 'infinity'
      AND c.due_at > CASE WHEN held.until IS NULL THEN %(looked_at)s::timestamptz
                          ELSE '-infinity' END
    ORDER BY c.due_at
    LIMIT 1) AS coming
WHERE coming.due_at < 'infinity'
"""


def next_due(conn, stages: Sequence[str], looked_at) -> float | None:
    """Seconds until a call becomes due; None where none is coming."""
    params = {"stages": list(stages), "looked_at": looked_at}
    return execute(conn, NEXT_DUE, params).fetchone()[0]


# Claims of this worker that it never began, because their answer was lost or it has to stop.
# They are due again, so the other workers are told to look.
GIVE_BACK = f"""
WITH given_back AS (
    UPDATE stage_calls
    SET worker = NULL, started_at = NULL, due_at = now(), free_attempts = free_attempts + 1
    WHERE job_id IN (SELECT job_id FROM stage_calls
                     WHERE worker = %(worker)s AND call_id <> ALL (%(keep)s::bigint[])
                     FOR UPDATE SKIP LOCKED)
    RETURNING call_id
)
SELECT count(*), CASE WHEN count(*) > 0 THEN pg_notify('{WAKE_CHANNEL}', '') END
FROM given_back
"""


def give_back(conn, worker: str, keep: Sequence[int]) -> int:
    """Free what `worker` claimed and did not begin; `keep` are the calls it has results for."""
    return execute(conn, GIVE_BACK, {"worker": worker, "keep": list(keep)}).fetchone()[0]


# --- upkeep --------------------------------------------------------------------------------

# One worker at a time, and in small batches: nobody else ever waits for it.
PRUNE = """
DELETE FROM stage_attempts WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM stage_attempts
    WHERE finished_at < now() - make_interval(secs => 86400 * %(days)s)
      AND (SELECT pg_try_advisory_xact_lock(hashtext('job_state_listener.prune')))
    ORDER BY finished_at
    LIMIT %(batch)s))
"""


def prune(conn, days: float, batch: int = 1000) -> int:
    """Delete a batch of the attempts that finished more than `days` ago; how many."""
    return execute(conn, PRUNE, {"days": days, "batch": batch}).rowcount


# A given-up call waits for a person; where its job was deleted there is nothing to wait for.
FORGET = """
WITH gone AS (
    DELETE FROM stage_calls AS c
    WHERE c.due_at = 'infinity' AND c.stage = ANY (%(stages)s)
      AND NOT EXISTS (SELECT FROM jobs AS j WHERE j.job_id = c.job_id)
    RETURNING c.*
)
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            outcome, error)
SELECT job_id, call_id, attempts + 1, stage, %(worker)s, now(), now(),
       'skipped', 'the job was deleted'
FROM gone
ON CONFLICT DO NOTHING
"""


def forget_deleted(conn, stages: Sequence[str], worker: str) -> int:
    """Drop the given-up calls of deleted jobs, with a row in the history; how many."""
    return execute(conn, FORGET, {"stages": list(stages), "worker": worker}).rowcount
