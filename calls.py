"""What is owed and what came of it: claiming a call, settling it, and knowing the next one.

Each statement is a constant above the small function that runs it, and begins with the name
under which a session prepares it. All times are the database's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from db import WAKE_CHANNEL, execute, prepare

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
    free: bool = False  # does not count towards max_attempts
    hold: bool = False  # nobody calls this stage for a while
    retry_after: float | None = None  # seconds the stage asked for
    limited: bool = False  # the stage has max_running

    @property
    def freed(self) -> str | None:
        """The stage that has a slot more now; of an unknown call it is free after the lease."""
        return self.stage if self.limited and self.outcome != "unknown" else None


# A worker that comes back late, its attempt taken for lost, still adds what it knows: a claim
# never repeats a call of which any attempt was accepted.
RECORD = """/* record */
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            http_status, outcome, error)
VALUES (%(job_id)s, %(call_id)s, %(attempt)s, %(stage)s, %(worker)s, %(started_at)s, now(),
        %(http_status)s, %(outcome)s, left(%(error)s, 2000))
ON CONFLICT DO NOTHING
"""

END_LEASE = """/* end_lease */
DELETE FROM stage_leases WHERE call_id = %(call_id)s AND attempt = %(attempt)s
"""

FREE_SLOT = """/* free_slot */
UPDATE stage_slots SET leased_until = '-infinity'
WHERE stage = %(freed)s AND call_id = %(call_id)s AND attempt = %(attempt)s
"""

# Settling never waits for the stage's own transaction, which may still hold the row of the
# call when the stage answers: hence SKIP LOCKED.
PAY = f"""/* pay */
DELETE FROM stage_calls WHERE job_id = ({MINE} FOR UPDATE SKIP LOCKED)
"""

POSTPONE = f"""/* postpone */
UPDATE stage_calls
SET worker = NULL, started_at = NULL, last_error = left(%(error)s, 2000),
    free_attempts = free_attempts + %(free)s,
    due_at = greatest(CASE WHEN %(after_lease)s THEN due_at END,
                      coalesce(now() + make_interval(secs => %(delay)s), 'infinity'))
WHERE job_id = ({MINE} FOR UPDATE SKIP LOCKED)
"""

# Each hold is twice as long as the one before, up to a minute, unless the stage asked for a
# time. Results of calls that were under way when the hold began do not lengthen it, and none
# touches a person's pause, which is a hold until infinity.
HOLD = """/* hold */
UPDATE pipeline_stages AS p
SET held_until = now() + make_interval(secs => length.seconds),
    hold_seconds = length.seconds, held_reason = left(%(error)s, 500), held_by = %(worker)s
FROM pipeline_stages AS q, LATERAL (
    SELECT coalesce(%(retry_after)s, least(60, 2 * coalesce(q.hold_seconds, 0.5))) AS seconds
) AS length
WHERE p.stage = %(stage)s AND (q.current_step, q.status) = (p.current_step, p.status)
  AND (p.held_until IS NULL
       OR p.held_until < now() + make_interval(secs => %(retry_after)s)
       OR (p.held_until <= now()
           AND p.held_until - make_interval(secs => p.hold_seconds) < %(started_at)s))
"""

# A success lifts the hold, unless the call had begun before it, or a person paused the stage.
LIFT = """/* lift */
UPDATE pipeline_stages
SET held_until = NULL, hold_seconds = NULL, held_reason = NULL, held_by = NULL
WHERE stage = %(stage)s AND held_until - make_interval(secs => hold_seconds) < %(started_at)s
"""


def settling(settled: Settlement | None) -> list[str]:
    """The statements that write `settled`, to be run as one transaction."""
    if settled is None:
        return []
    paid = settled.outcome in ("succeeded", "skipped")
    statements = [RECORD, END_LEASE, PAY if paid else POSTPONE]
    if settled.outcome == "succeeded":
        statements.append(LIFT)
    if settled.hold:
        statements.append(HOLD)
    if settled.freed:
        statements.append(FREE_SLOT)
    return statements


def parameters(conn, settled: Settlement) -> dict[str, Any]:
    """What `settled` says, as this database can store it."""
    error = settled.error
    if error is not None:
        utf8 = conn.info.parameter_status("server_encoding") == "UTF8"
        error = error.encode("utf-8" if utf8 else "ascii", "backslashreplace").decode()
        error = error.replace("\0", "\\0")
    # As a number: a prepared statement takes no boolean for one.
    return vars(settled) | {"error": error, "freed": settled.freed, "free": int(settled.free)}


# Whether a call waits for the slot that was freed.
WAITING = "EXISTS (SELECT FROM stage_calls WHERE stage = %(freed)s AND due_at <= now())"
WAKE = f"pg_notify('{WAKE_CHANNEL}', '')"

UNSETTLED = f"""/* unsettled */
SELECT EXISTS ({MINE}) AS unsettled, CASE WHEN {WAITING} THEN {WAKE} END AS woken
"""


def settle(conn, settled: Settlement) -> bool:
    """Write a result; False where the stage's own transaction holds the row: again later."""
    statements = [*settling(settled), UNSETTLED]
    return not run(conn, statements, parameters(conn, settled)).fetchone().unsettled


# --- claiming ------------------------------------------------------------------------------

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


STATEMENTS = [
    RECORD, END_LEASE, PAY, POSTPONE, HOLD, LIFT, FREE_SLOT, UNSETTLED, CLAIM, CLAIM_JOB,
]  # fmt: skip


def run(conn, statements: Sequence[str], params: dict[str, Any]):
    """Run some of STATEMENTS as one transaction; the cursor of the last.

    A session prepares them once, as planning a claim costs more than running it. Not behind a
    pooler, where the next transaction may have another session.
    """
    if not conn.prefix:
        if not conn.prepared:
            prepare(conn, STATEMENTS)
        statements = [conn.prepared[sql] for sql in statements]
    return execute(conn, ";".join(statements), params)


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
    names, seconds, since = map(list, zip(*wanted, strict=True))
    params = {"stages": names, "leases": seconds}
    params["since"] = "{" + ",".join(f'"{time}"' for time in since) + "}"
    params |= {"worker": worker, "only": only}
    params |= parameters(conn, settled) if settled else NOTHING
    statements = [*settling(settled), CLAIM if only is None else CLAIM_JOB]
    return run(conn, statements, params).fetchone()


# Claims of this worker that it never began, because their answer was lost or it has to stop.
# They are due again, so the other workers are told to look.
GIVE_BACK = f"""
WITH ended AS (
    DELETE FROM stage_leases
    WHERE worker = %(worker)s AND call_id <> ALL (%(keep)s::bigint[])
    RETURNING job_id, call_id, attempt
), freed AS (
    UPDATE stage_slots AS s SET leased_until = '-infinity'
    FROM ended AS e WHERE s.call_id = e.call_id AND s.attempt = e.attempt
), given_back AS (
    UPDATE stage_calls
    SET worker = NULL, started_at = NULL, due_at = now(), free_attempts = free_attempts + 1
    WHERE job_id IN (SELECT c.job_id FROM stage_calls AS c JOIN ended AS e USING (job_id)
                     WHERE c.call_id = e.call_id AND c.attempts = e.attempt
                     FOR UPDATE OF c SKIP LOCKED)
)
SELECT count(*), CASE WHEN count(*) > 0 THEN {WAKE} END FROM ended
"""


def give_back(conn, worker: str, keep: Sequence[int]) -> int:
    """Free what `worker` claimed and did not begin; `keep` are the calls it has results for."""
    return execute(conn, GIVE_BACK, {"worker": worker, "keep": list(keep)}).fetchone()[0]
