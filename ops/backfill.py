"""`backfill`: the calls that jobs owe and that nobody recorded, because they came before install
or while the trigger was off (a restore, session_replication_role, DISABLE TRIGGER).
"""

from collections import Counter
from datetime import datetime

import click

import config
import db
from ops.problem import Problem
from ops.routes import require_installed
from ops.since import Since
from ops.table import table

BATCH = 10_000  # jobs looked at in one statement, so that none runs long

# Calls whose job has moved on unseen. Not those under way: their listener will see it.
OUTDATED = """
FROM stage_calls AS c
WHERE c.worker IS NULL AND NOT EXISTS (
    SELECT FROM jobs AS j
    WHERE j.job_id = c.job_id AND j.current_step::text = c.current_step
      AND j.status::text = c.status)
"""

COUNT_OUTDATED = f"SELECT count(*) {OUTDATED}"

DROP_OUTDATED = f"""
WITH gone AS (
    DELETE FROM stage_calls WHERE job_id IN (SELECT c.job_id {OUTDATED} FOR UPDATE SKIP LOCKED)
    RETURNING *
)
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            outcome, error)
SELECT job_id, call_id, attempts + 1, stage, 'backfill', now(), now(), 'skipped',
       'the job had moved on while the trigger was off'
FROM gone
ON CONFLICT DO NOTHING
"""

# The next jobs by id, and what became of the last call of each that owes one and has none.
MISSED = """
WITH batch AS (
    SELECT j.job_id, j.tenant_id::text, j.current_step::text, j.status::text,
           coalesce((to_jsonb(j) ->> 'updated_at'), (to_jsonb(j) ->> 'created_at')) AS changed_at
    FROM jobs AS j
    WHERE %(after)s IS NULL OR j.job_id > %(after)s
    ORDER BY j.job_id
    LIMIT %(batch)s
), missed AS (
    SELECT s.*, p.stage, CASE WHEN last.stage = p.stage AND last.outcome IN (
                                  'succeeded', 'skipped', 'cancelled') THEN last.outcome END AS why
    FROM batch AS s
    JOIN pipeline_stages AS p USING (current_step, status)
    CROSS JOIN LATERAL (
        SELECT (array_agg(a.stage ORDER BY a.finished_at DESC))[1] AS stage,
               (array_agg(a.outcome ORDER BY a.finished_at DESC))[1] AS outcome
        FROM stage_attempts AS a WHERE a.job_id = s.job_id) AS last
    WHERE NOT EXISTS (SELECT FROM stage_calls AS c WHERE c.job_id = s.job_id)
      AND NOT EXISTS (SELECT FROM stage_leases AS l WHERE l.job_id = s.job_id)
      AND (%(since)s IS NULL OR s.changed_at::timestamptz >= %(since)s)
)"""

COUNT = f"""{MISSED}
SELECT (SELECT max(job_id::text) FROM (SELECT job_id FROM batch ORDER BY job_id DESC LIMIT 1) AS t)
           AS last,
       (SELECT json_agg(json_build_array(current_step, status, stage, why, jobs))
        FROM (SELECT current_step, status, stage, why, count(*) AS jobs
              FROM missed GROUP BY 1, 2, 3, 4) AS counted) AS found
"""

RECORD = f"""{MISSED}, recorded AS (
    INSERT INTO stage_calls (job_id, tenant_id, current_step, status, stage)
    SELECT job_id, tenant_id, current_step, status, stage FROM missed WHERE why IS NULL
    ON CONFLICT DO NOTHING
)
""" + COUNT.removeprefix(MISSED)

TIMES = """
SELECT count(*) > 0 FROM pg_attribute
WHERE attrelid = to_regclass('jobs') AND attname IN ('updated_at', 'created_at')
  AND NOT attisdropped AND atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype)
"""


@click.command(short_help="Record the calls that jobs owe and nobody recorded.")
@click.option("--apply", "really", is_flag=True, help="Record them; without it, only count.")
@click.option("--since", type=Since(), metavar="TIME",
              help="Only jobs changed since then: 2h, 3d or a date.")  # fmt: skip
def backfill(really: bool, since: datetime | None) -> None:
    """Give jobs the call that they owe and that nobody recorded.

    They were in a state that leads to a stage before install, or came to it while the trigger was
    off. A call that was accepted before is not repeated. Without --apply nothing is changed.
    """
    conn = db.connect(config.settings(), "job-state-listener backfill")
    require_installed(conn)
    if since and not db.execute(conn, TIMES).fetchone()[0]:
        raise Problem("--since needs a column updated_at or created_at in jobs: leave it out")
    outdated = db.execute(conn, DROP_OUTDATED if really else COUNT_OUTDATED)
    moved = outdated.rowcount if really else outdated.fetchone()[0]
    missed, kept = look_through(conn, RECORD if really else COUNT, since)
    if missed:
        rows = [[f"{step}, {status}", stage, n] for (step, status, stage), n in missed.items()]
        click.echo(table(["state", "stage", "jobs"], sorted(rows)))
    if moved:
        click.echo(f"{moved} recorded calls are of jobs that have moved on{' → dropped' * really}")
    if kept:
        what = ", ".join(f"{n} {why}" for why, n in sorted(kept.items()))
        click.echo(f"left alone, as their call was made before: {what}; see jobs --stalled")
    count = sum(missed.values())
    if really:
        db.execute(conn, db.WAKE)
        click.echo(f"{count} calls recorded")
    elif count or moved:
        click.echo(f"{count} calls are missing; record them: python listener.py backfill --apply")
    else:
        click.echo("no call is missing")


def look_through(conn, sql: str, since: datetime | None) -> tuple[Counter, Counter]:
    """All jobs, a batch at a time: what they miss by state, and what is left alone by reason."""
    missed, kept, after = Counter(), Counter(), None
    while True:
        row = db.execute(conn, sql, {"after": after, "since": since, "batch": BATCH}).fetchone()
        for step, status, stage, why, jobs in row.found or []:
            if why:
                kept[why] += jobs
            else:
                missed[step, status, stage] += jobs
        if row.last is None:
            return missed, kept
        after = row.last
