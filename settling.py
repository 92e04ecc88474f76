"""What came of a call: the result of an attempt, written under the fence of its claim.

Each statement is a constant above the small function that runs it, and begins with the name
under which a session prepares it. All times are the database's.
"""

from dataclasses import dataclass
from typing import Any

from db import WAKE_CHANNEL, run

# The fence: the one attempt that may settle a call. A worker that comes back late finds none.
MINE = """
    SELECT job_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s
      AND attempts = %(attempt)s AND worker = %(worker)s"""


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


# The attempt goes to the history, its lease ends. A worker that comes back late, its attempt
# taken for lost, still adds what it knows: a claim never repeats a call of which any attempt
# was accepted.
RECORDED = """
WITH recorded AS (
    INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                                http_status, outcome, error)
    VALUES (%(job_id)s, %(call_id)s, %(attempt)s, %(stage)s, %(worker)s, %(started_at)s, now(),
            %(http_status)s, %(outcome)s, left(%(error)s, 2000))
    ON CONFLICT DO NOTHING
), ended AS (
    DELETE FROM stage_leases WHERE call_id = %(call_id)s AND attempt = %(attempt)s
)"""

# Settling never waits for the stage's own transaction, which may still hold the row of the
# call when the stage answers: hence SKIP LOCKED.
PAY = f"""/* pay */{RECORDED}
DELETE FROM stage_calls WHERE job_id = ({MINE} FOR UPDATE SKIP LOCKED)
"""

POSTPONE = f"""/* postpone */{RECORDED}
UPDATE stage_calls
SET worker = NULL, started_at = NULL, last_error = left(%(error)s, 2000),
    free_attempts = free_attempts + %(free)s,
    due_at = greatest(CASE WHEN %(after_lease)s THEN due_at END,
                      coalesce(now() + make_interval(secs => %(delay)s), 'infinity'))
WHERE job_id = ({MINE} FOR UPDATE SKIP LOCKED)
"""

FREE_SLOT = """/* free_slot */
UPDATE stage_slots SET leased_until = '-infinity'
WHERE stage = %(freed)s AND call_id = %(call_id)s AND attempt = %(attempt)s
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


def statements_for(settled: Settlement | None) -> list[str]:
    """The statements that write `settled`, to be run as one transaction."""
    if settled is None:
        return []
    paid = settled.outcome in ("succeeded", "skipped")
    statements = [PAY if paid else POSTPONE]
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
    statements = [*statements_for(settled), UNSETTLED]
    return not run(conn, statements, parameters(conn, settled)).fetchone().unsettled
