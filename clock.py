"""Shortens what waits too long because the database's clock was set back."""

import trigger
from db import WAKE_CHANNEL, execute
from history import BATCH

# The end of a lease, hold or rate was computed from now(). Where the clock was then set back, or a
# failover led to a host whose clock is behind, that end is further away than the wait is long. Such
# a wait starts again from the present now(). The comparisons are with clock_timestamp(), as another
# transaction may have begun, and committed, after ours began.
SHORTEN_WAITS = (
    """
UPDATE stage_limits SET next_at = now() + make_interval(secs => seconds)
WHERE next_at > clock_timestamp() + make_interval(secs => seconds)
""",
    """
UPDATE stage_limits SET stays_since = now() WHERE stays_since > clock_timestamp()
""",
    """
UPDATE pipeline_stages SET held_until = now() + make_interval(secs => hold_seconds)
WHERE held_until > clock_timestamp() + make_interval(secs => hold_seconds)
  AND held_until < 'infinity'
""",
    """
UPDATE stage_leases SET started_at = now(), leased_until = now() + (leased_until - started_at)
WHERE started_at > clock_timestamp()
""",
)
# The statements below read all waiting calls, so they run only after a sign that the clock was set
# back. This is one, for as long as the last attempt is in the future.
IS_BACK = """
SELECT coalesce(max(finished_at) > clock_timestamp(), false) AS is_back FROM stage_attempts
"""
# Calls that were never tried become due now, in their order, or at their run_after: at most so many
# of each stage.
SHORTEN_UNTRIED = """
WITH later AS (
    SELECT c.*
    FROM (SELECT DISTINCT stage FROM pipeline_stages) AS p
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.due_at, c.run_after FROM stage_calls AS c
        WHERE c.stage = p.stage AND c.due_at > now() AND c.due_at < 'infinity'
          AND c.due_at > clock_timestamp() AND c.attempts = 0
          AND (c.run_after IS NULL OR c.due_at > c.run_after)
        ORDER BY c.due_at LIMIT %(batch)s
        FOR UPDATE OF c SKIP LOCKED) AS c
), numbered AS (
    SELECT job_id, call_id, run_after, row_number() OVER (ORDER BY due_at) AS number FROM later
)
UPDATE stage_calls AS c
SET due_at = greatest(now() + n.number * interval '1 us', n.run_after)
FROM numbered AS n WHERE c.job_id = n.job_id AND c.call_id = n.call_id
"""
# A claimed call becomes due when its lease ends. Any other call waits for a back-off, for the lease
# of an attempt without an answer, or for its run_after; one that waits longer than
# all of these becomes due.
SHORTEN_TRIED = f"""
WITH later AS (
    SELECT c.*
    FROM (SELECT DISTINCT stage FROM pipeline_stages) AS p
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id,
               CASE WHEN c.worker IS NOT NULL THEN now() + (c.due_at - c.started_at)
                    ELSE greatest(now(), lease.until, c.run_after) END AS due_at
        FROM stage_calls AS c
        CROSS JOIN LATERAL (SELECT max(l.leased_until) AS until FROM stage_leases AS l
                            WHERE l.call_id = c.call_id) AS lease
        WHERE c.stage = p.stage AND c.due_at > now() AND c.due_at < 'infinity' AND c.attempts > 0
          AND CASE WHEN c.worker IS NOT NULL THEN c.started_at > clock_timestamp()
                   ELSE c.due_at > greatest(lease.until, c.run_after, clock_timestamp()
                                            + interval '{trigger.LONGEST_BACKOFF} s') END
        ORDER BY c.due_at DESC LIMIT %(batch)s
        FOR UPDATE OF c SKIP LOCKED) AS c
)
UPDATE stage_calls AS c
SET started_at = CASE WHEN c.worker IS NOT NULL THEN now() END, due_at = later.due_at
FROM later WHERE c.job_id = later.job_id AND c.call_id = later.call_id
"""


def shorten_waits(conn, is_back: bool = False, batch: int = BATCH) -> int:
    """Shorten what waits longer than it should, as the database's clock was set back.

    Args:
        is_back: whether the clock is known to have been set back.
        batch: how many calls of each stage at most.

    Returns:
        How much was shortened; with less than `batch`, nothing is left.
    """
    found = sum(execute(conn, sql).rowcount for sql in SHORTEN_WAITS)
    if found or is_back or execute(conn, IS_BACK).fetchone().is_back:
        untried = execute(conn, SHORTEN_UNTRIED, {"batch": batch}).rowcount
        found += untried
        if untried < batch:
            found += execute(conn, SHORTEN_TRIED, {"batch": batch}).rowcount
    if found:
        execute(conn, f"NOTIFY {WAKE_CHANNEL}")  # listeners have planned their next look already
    return found
