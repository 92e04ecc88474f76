"""`jobs`: how many jobs are in which state, or which jobs they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import click

import config
import db
from ops.job import situation
from ops.problem import Problem
from ops.since import Since
from ops.stage import StageName
from ops.table import JSON, Line, clipped, duration, echo_json, echo_lines, plain, table

# In the order of the pipeline: the states of a stage, and last the one that leads on.
STATES = """
SELECT j.current_step, j.status, j.jobs, p.stage, coalesce(c.owed, 0) AS owed,
       coalesce(c.given_up, 0) AS given_up
FROM (SELECT current_step::text, status::text, count(*) AS jobs FROM jobs GROUP BY 1, 2) AS j
LEFT JOIN pipeline_stages AS p USING (current_step, status)
LEFT JOIN (SELECT current_step, status, count(*) AS owed,
                  count(*) FILTER (WHERE due_at = 'infinity') AS given_up
           FROM stage_calls GROUP BY 1, 2) AS c USING (current_step, status)
LEFT JOIN (SELECT stage AS current_step, min(position) AS position
           FROM pipeline_stages GROUP BY 1) AS at USING (current_step)
LEFT JOIN (SELECT current_step, min(position) - 1 AS position
           FROM pipeline_stages GROUP BY 1) AS before USING (current_step)
ORDER BY coalesce(at.position, before.position), j.current_step, p.stage IS NOT NULL,
         j.status = 'done', j.status
LIMIT %(limit)s + 1
"""

# --- which jobs ----------------------------------------------------------------------------

# jobs may say when it last changed, or not; only a column that is there can be named.
TIME_COLUMN = """
SELECT attname FROM pg_attribute
WHERE attrelid = to_regclass('jobs') AND attname IN ('updated_at', 'created_at')
  AND NOT attisdropped AND atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype)
ORDER BY attname DESC
LIMIT 1
"""
# For each such column, or none: a job's time, and whether it is in the span asked for.
TIMES = {
    "updated_at": ("j.updated_at::timestamptz", "j.updated_at >= %(since)s"),
    "created_at": ("j.created_at::timestamptz", "j.created_at >= %(since)s"),
    None: (
        "greatest(c.created_at, (SELECT max(a.finished_at) FROM stage_attempts AS a"
        " WHERE a.job_id = j.job_id))",
        "j.job_id IN (SELECT job_id FROM stage_attempts WHERE finished_at >= %(since)s"
        " UNION ALL SELECT job_id FROM stage_calls WHERE created_at >= %(since)s)",
    ),
}

# What a job owes, or else who calls it: a stage that has set it running has been paid.
ANY = """
SELECT j.job_id::text, j.tenant_id::text, j.current_step::text, j.status::text,
       coalesce(c.stage, l.stage) AS stage, {time} AS since,
       coalesce(c.due_at = 'infinity', false) AS given_up,
       CASE WHEN c.stage IS NULL THEN l.worker ELSE c.worker END AS worker,
       CASE WHEN c.stage IS NULL THEN l.started_at ELSE c.started_at END AS started_at,
       CASE WHEN c.due_at = 'infinity' THEN NULL
            ELSE round(extract(epoch FROM coalesce(c.due_at, l.leased_until) - now()))::bigint
       END AS due_in_seconds, c.last_error
FROM jobs AS j
LEFT JOIN stage_calls AS c ON c.job_id = j.job_id
LEFT JOIN (SELECT DISTINCT ON (job_id) * FROM stage_leases WHERE leased_until > now()
           ORDER BY job_id, started_at DESC) AS l ON l.job_id = j.job_id
WHERE (%(since)s::timestamptz IS NULL OR {changed})
  AND (%(tenant)s::text IS NULL OR j.tenant_id::text = %(tenant)s)
  AND (%(stage)s::text IS NULL OR c.stage = %(stage)s
       OR (c.stage IS NULL AND (l.stage = %(stage)s OR (
           j.current_step::text = %(stage)s AND j.status::text <> 'done'))))
ORDER BY since DESC NULLS LAST, job_id
LIMIT %(limit)s + 1
"""

GIVEN_UP = """
SELECT job_id::text, tenant_id, current_step, status, stage,
       coalesce(given_up_at, owed_since) AS since, call_id, attempts, last_error
FROM given_up_calls
WHERE (%(since)s::timestamptz IS NULL OR coalesce(given_up_at, owed_since) >= %(since)s)
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
  AND (%(stage)s::text IS NULL OR stage = %(stage)s)
ORDER BY since DESC, job_id
LIMIT %(limit)s + 1
"""

STALLED = """
SELECT job_id, tenant_id, current_step, status, stage, since, reason
FROM stalled_jobs()
WHERE (%(since)s::timestamptz IS NULL OR since >= %(since)s)
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
  AND (%(stage)s::text IS NULL OR stage = %(stage)s)
ORDER BY since NULLS FIRST, job_id
LIMIT %(limit)s + 1
"""


@dataclass(frozen=True)
class Listing:
    """A list of jobs: its query, what its times are, and the heading of what it tells."""

    sql: str
    times: str
    heading: str

    def tells(self, row) -> str:
        if self.sql == STALLED:
            return row.reason
        if self.sql == GIVEN_UP:
            return f"{row.stage}: {row.last_error}"
        return f"{row.stage}: {situation(row)}" if row.stage else "-"


def listing(conn, settings, given_up: bool, stalled: bool, since: datetime | None) -> Listing:
    """Raises Problem where nothing knows which jobs have changed since then."""
    if given_up:
        return Listing(GIVEN_UP, "when the call was given up", "given up")
    if stalled:
        return Listing(STALLED, "when anything last happened to the job", "stalled")
    column = db.execute(conn, TIME_COLUMN).fetchone()
    if column is None:
        kept = datetime.now().astimezone() - timedelta(days=settings.HISTORY_DAYS)
        if since and since < kept:
            raise Problem(
                "jobs has neither updated_at nor created_at, and the history that is asked instead "
                f"begins {settings.HISTORY_DAYS:g} days ago (HISTORY_DAYS): give a later --since"
            )
        times = "when a call was last recorded or tried (jobs has no updated_at)"
    else:
        column, times = column.attname, f"jobs.{column.attname}"
    time, changed = TIMES[column]
    return Listing(ANY.format(time=time, changed=changed), times, "owes")


# --- the command ---------------------------------------------------------------------------


@click.command(short_help="How many jobs are in which state, or which jobs they are.")
@click.option(
    "--stage",
    type=StageName(),
    help="Jobs that owe this stage a call, or are in it and not done.",
)
@click.option("--given-up", is_flag=True, help="Jobs whose call was given up.")
@click.option("--stalled", is_flag=True, help="Jobs that no call and no stage moves on.")
@click.option("--tenant", metavar="TENANT", help="Jobs of this tenant.")
@click.option(
    "--since",
    type=Since(),
    metavar="SPAN|TIME",
    help="Jobs that changed since: 30m, 2h, 3d, 2026-11-24, '2026-11-24 05:12'.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="At most so many lines.",
)
@JSON
def jobs(stage, given_up, stalled, tenant, since, limit, as_json) -> None:  # fmt: skip
    """How many jobs are in which state and what they owe; with an option, which jobs they are.

    Options narrow the list down together. Newest first, stalled jobs oldest first. The last line
    says what --since and the column since compare: updated_at of jobs where there is such a
    column, else created_at, else the listener's own record.
    """
    if given_up and stalled:
        raise click.UsageError(
            "Give --given-up or --stalled, not both.", click.get_current_context()
        )
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener jobs")
    if not (stage or given_up or stalled or tenant is not None or since):
        rows = db.execute(conn, STATES, {"limit": limit}).fetchall()
        said = {"states": [row._asdict() for row in rows[:limit]]}
        lines = state_lines(rows[:limit])
    else:
        kind = listing(conn, settings, given_up, stalled, since)
        given = {"stage": stage, "tenant": tenant, "since": since, "limit": limit}
        rows = db.execute(conn, kind.sql, given).fetchall()
        said = {"jobs": [row._asdict() for row in rows[:limit]], "since": kind.times}
        lines = job_lines(kind, rows[:limit])
    if as_json:
        echo_json(said | {"more": len(rows) > limit})
        return
    echo_lines(lines)
    if len(rows) > limit:
        click.echo(f"more than {limit}: --limit {min(10 * limit, 10_000)}, or narrow it down")


def state_lines(rows) -> Iterator[Line]:
    cells = [
        [row.current_step or "-", row.status or "-", row.jobs, row.stage or "-", row.owed,
         row.given_up]
        for row in rows
    ]  # fmt: skip
    header = ["step", "status", "jobs", "leads to", "owed", "given up"]
    yield from ((line, 0) for line in table(header, cells).split("\n"))
    if not rows:
        yield "there are no jobs", 0


LONGEST_TOLD = 60


def job_lines(kind: Listing, rows) -> Iterator[Line]:
    now = datetime.now().astimezone()
    if not rows:
        yield "no job matches", 0
        return
    cells = [
        [
            row.job_id,
            f"{row.current_step}, {row.status}",
            duration(row.since and round(max(0.0, (now - row.since).total_seconds()))),
            clipped(plain(kind.tells(row)), LONGEST_TOLD),
            row.tenant_id,
        ]
        for row in rows
    ]
    header = ["job", "state", "since", kind.heading, "tenant"]
    yield from ((line, 0) for line in table(header, cells, right=["since"]).split("\n"))
    yield f"since: {kind.times}", 0
