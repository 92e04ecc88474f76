"""What `report` shows of single jobs: their attempts, and what they wait for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST_JOBS = 4
MOST_ATTEMPTS = 60


@dataclass(frozen=True)
class Timeline:
    """One job: where it is (None: deleted), its attempts in order, and the call it owes."""

    job_id: str
    job: Any
    attempts: Sequence[Any]
    owed: Any
    cut: bool  # there are earlier attempts


SLOW_JOBS = """
SELECT job_id::text
FROM stage_attempts
WHERE finished_at > %(since)s AND finished_at <= %(until)s
  AND outcome NOT IN ('skipped', 'cancelled')
GROUP BY job_id
ORDER BY max(finished_at) - min(started_at) DESC
LIMIT %(most)s
"""


def slowest_jobs(ask: Callable) -> list[str]:
    """Those with the longest time from the first call to the end of the last."""
    return [row.job_id for row in ask(SLOW_JOBS, most=MOST_JOBS)]


JOB = """
SELECT current_step::text, status::text, left(tenant_id::text, 1000) AS tenant_id
FROM jobs WHERE job_id = %(job_id)s
LIMIT 1
"""

OWED = """
SELECT stage, created_at, due_at, due_at = 'infinity' AS given_up
FROM stage_calls WHERE job_id = %(job_id)s
"""

# The last ones, should there be too many, and those under way.
ATTEMPTS = """
SELECT * FROM (
    SELECT stage, attempt, outcome, http_status, started_at, finished_at, left(error, 2000) AS error
    FROM stage_attempts WHERE job_id = %(job_id)s
    UNION ALL
    SELECT stage, attempt, 'calling', NULL, started_at, %(until)s, NULL
    FROM stage_leases WHERE job_id = %(job_id)s AND leased_until > now()
    ORDER BY started_at DESC, attempt DESC
    LIMIT %(most)s) AS last
ORDER BY started_at, attempt
"""


def timeline(ask: Callable, job_id: str) -> Timeline:
    attempts = ask(ATTEMPTS, job_id=job_id, most=MOST_ATTEMPTS + 1)
    [job] = ask(JOB, job_id=job_id) or [None]
    [owed] = ask(OWED, job_id=job_id) or [None]
    cut = len(attempts) > MOST_ATTEMPTS
    return Timeline(job_id, job, attempts[-MOST_ATTEMPTS:], owed, cut)
