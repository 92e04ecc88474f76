"""The timelines of single jobs in `report`: their attempts, and what they wait for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ops import job, rows
from ops.table import counted

MOST_JOBS = 4
MOST_CHILDREN = 12
MOST_ATTEMPTS = 60


@dataclass(frozen=True)
class Timeline:
    """A row: where it is (None: deleted or not read), its attempts in order, and the call it owes.

    Args:
        said: the lines of `job` about it; none where nobody asked for the row.
        below: the rows of other tables that belong to it, by what heads them (the table, and how
            many are in which state).
    """

    table: str
    job_id: str
    job: Any
    attempts: Sequence[Any]
    owed: Any
    cut: bool  # there are earlier attempts, which are not shown
    is_unread: bool = False  # its table cannot be read
    said: Sequence[str] = ()
    below: dict[str, list["Timeline"]] = field(default_factory=dict)

    @property
    def rows(self) -> list["Timeline"]:
        """This row and all rows below it."""
        return [self, *(child for some in self.below.values() for child in some)]


SLOW_JOBS = """
SELECT table_name, job_id::text
FROM stage_attempts
WHERE finished_at > %(since)s AND finished_at <= %(until)s
  AND outcome NOT IN ('skipped', 'cancelled')
GROUP BY table_name, job_id
ORDER BY max(finished_at) - min(started_at) DESC
LIMIT %(most)s
"""


def slowest_jobs(ask: Callable, unread: Mapping[str, str]) -> list[Timeline]:
    """The jobs with the longest time from their first call to the end of their last one."""
    slow = ask(SLOW_JOBS, most=MOST_JOBS)
    return [timeline(ask, row.table_name, row.job_id, unread) for row in slow]


def timelines(
    conn, ask: Callable, redact: Callable, ids: Sequence[str], unread: Mapping[str, str]
) -> list[Timeline]:
    """The timelines of the rows with these ids, in any table, and of rows that belong to them."""
    found = [row for key in ids for row in rows.places(conn, key, unread)]
    return [family(conn, ask, redact, row, unread) for row in found]


def family(conn, ask: Callable, redact: Callable, row: Any, unread: Mapping[str, str]) -> Timeline:
    """The timeline of a row (see rows.find), what `job` says of it, and the rows below it."""
    found = job.look(conn, row, unread)
    lines = [*job.place_lines(found), *filter(None, [found.unknown])]
    said = [redact(line) for line in lines]
    return replace(with_rows_below(ask, redact, found), said=said)


def with_rows_below(ask: Callable, redact: Callable, found: job.Found) -> Timeline:
    below = {}
    for of in found.below:
        ids = list(dict.fromkeys(child.job_id for child in of["rows"]))[:MOST_CHILDREN]
        if ids:
            title = redact(heading(of, len(ids)))
            below[title] = [timeline(ask, of["table"], key, found.unread) for key in ids]
    own = timeline(ask, found.row.table_name, found.row.key, found.unread)
    return replace(own, below=below)


def heading(of: dict[str, Any], shown: int) -> str:
    """The table of rows that belong to another, and how many are in which state."""
    states = [f"{state.rows} at ({state.current_step}, {state.status})" for state in of["states"]]
    count = sum(state.rows for state in of["states"])
    first = f", the first {shown} below" if shown < count else ""
    return f"{of['table']}: {counted(count, 'row')}, {', '.join(states)}{first}"


JOB = """
SELECT current_step, status, left(tenant_id #>> '{}', 1000) AS tenant_id
FROM stage_call_row(%(table)s, '', %(job_id)s)
WHERE is_there
"""

# The row's own call comes before the calls of joins.
OWED = """
SELECT stage, created_at, due_at, due_at = 'infinity' AS given_up
FROM stage_calls WHERE job_id = %(job_id)s AND table_name = %(table)s
ORDER BY join_of
LIMIT 1
"""

# The last attempts, if there are too many, and the calls under way.
ATTEMPTS = """
SELECT * FROM (
    SELECT stage, attempt, spent, outcome, http_status, started_at, finished_at,
           left(error, 2000) AS error
    FROM stage_attempts WHERE job_id = %(job_id)s AND table_name = %(table)s
    UNION ALL
    SELECT stage, attempt, spent, 'calling', NULL, started_at, %(until)s, NULL
    FROM stage_leases
    WHERE job_id = %(job_id)s AND table_name = %(table)s AND leased_until > now()
    ORDER BY started_at DESC, attempt DESC
    LIMIT %(most)s) AS last
ORDER BY started_at, attempt
"""


def timeline(ask: Callable, table: str, job_id: str, unread: Mapping[str, str]) -> Timeline:
    given = {"table": table, "job_id": job_id}
    attempts = ask(ATTEMPTS, **given, most=MOST_ATTEMPTS + 1)
    [job] = [None] if table in unread else ask(JOB, **given) or [None]
    [owed] = ask(OWED, **given) or [None]
    cut = len(attempts) > MOST_ATTEMPTS
    return Timeline(table, job_id, job, attempts[-MOST_ATTEMPTS:], owed, cut, table in unread)
