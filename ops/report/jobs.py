"""What `report` shows of single jobs: their attempts, and what they wait for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pipeline
from pipeline import Table

MOST_JOBS = 4
MOST_CHILDREN = 12
MOST_ATTEMPTS = 60


@dataclass(frozen=True)
class Timeline:
    """A row: where it is (None: deleted), its attempts in order, and the call it owes."""

    table: str
    job_id: str
    job: Any
    attempts: Sequence[Any]
    owed: Any
    cut: bool  # there are earlier attempts


SLOW_JOBS = """
SELECT table_name, job_id::text
FROM stage_attempts
WHERE finished_at > %(since)s AND finished_at <= %(until)s
  AND outcome NOT IN ('skipped', 'cancelled')
GROUP BY table_name, job_id
ORDER BY max(finished_at) - min(started_at) DESC
LIMIT %(most)s
"""


def slowest_jobs(ask: Callable) -> list[Timeline]:
    """Those with the longest time from the first call to the end of the last."""
    slow = ask(SLOW_JOBS, most=MOST_JOBS)
    return [timeline(ask, row.table_name, row.job_id) for row in slow]


# {} are the names of a table of PIPELINE and its columns.
CHILDREN = """
SELECT {id}::text AS key FROM {table} WHERE {parent_column} = %(parent)s
ORDER BY 1
LIMIT %(most)s
"""


def children_of(table: Table) -> str:
    names = {"id": table.id, "table": table.name, "parent_column": table.parent_column}
    quoted = {key: name.replace('"', '""').replace("%", "%%") for key, name in names.items()}
    return CHILDREN.format(**{key: f'"{name}"' for key, name in quoted.items()})


def timelines(ask: Callable, ids: Sequence[str]) -> list[Timeline]:
    """Those of the rows with these ids, of whichever table, each followed by those that belong to
    it. What no table has is shown as a job that was deleted.
    """
    tables, found = list(pipeline.tables().values()), []
    for key in ids:
        rows = [timeline(ask, table.name, key) for table in tables]
        there = [row for row in rows if row.job or row.attempts or row.owed] or rows[:1]
        for row in there:
            found += [row, *children(ask, row, tables)]
    return found


def children(ask: Callable, of: Timeline, tables: Sequence[Table]) -> list[Timeline]:
    """The timelines of the rows that belong to a row."""
    return [
        timeline(ask, table.name, row.key)
        for table in tables
        if pipeline.parent_name(table) == of.table
        for row in ask(children_of(table), parent=of.job_id, most=MOST_CHILDREN)
    ]


JOB = """
SELECT current_step, status, left(tenant_id #>> '{}', 1000) AS tenant_id
FROM stage_call_row(%(table)s, '', %(job_id)s)
WHERE is_there
"""

# The row's own call comes first, before that of a join.
OWED = """
SELECT stage, created_at, due_at, due_at = 'infinity' AS given_up
FROM stage_calls WHERE job_id = %(job_id)s AND table_name = %(table)s
ORDER BY join_of
LIMIT 1
"""

# The last ones, should there be too many, and those under way.
ATTEMPTS = """
SELECT * FROM (
    SELECT stage, attempt, outcome, http_status, started_at, finished_at, left(error, 2000) AS error
    FROM stage_attempts WHERE job_id = %(job_id)s AND table_name = %(table)s
    UNION ALL
    SELECT stage, attempt, 'calling', NULL, started_at, %(until)s, NULL
    FROM stage_leases
    WHERE job_id = %(job_id)s AND table_name = %(table)s AND leased_until > now()
    ORDER BY started_at DESC, attempt DESC
    LIMIT %(most)s) AS last
ORDER BY started_at, attempt
"""


def timeline(ask: Callable, table: str, job_id: str) -> Timeline:
    given = {"table": table, "job_id": job_id}
    attempts = ask(ATTEMPTS, **given, most=MOST_ATTEMPTS + 1)
    [job] = ask(JOB, **given) or [None]
    [owed] = ask(OWED, **given) or [None]
    cut = len(attempts) > MOST_ATTEMPTS
    return Timeline(table, job_id, job, attempts[-MOST_ATTEMPTS:], owed, cut)
