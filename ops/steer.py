"""`retry`: a person decides about calls that were given up."""

import click

import config
import db
import stages
from ops.problem import Problem
from process import CONTROL

# What was spent so far no longer counts; attempts itself never falls (see schema.sql).
RETRY = """
UPDATE stage_calls SET due_at = now(), free_attempts = attempts
WHERE job_id IN (
    SELECT job_id FROM stage_calls
    WHERE due_at = 'infinity' AND (job_id = %(job_id)s OR stage = %(stage)s OR %(all)s)
    FOR UPDATE SKIP LOCKED)
RETURNING job_id, stage
"""

RING = f'NOTIFY "{db.WAKE_CHANNEL}"'


def make_due(conn, job_id: str | None = None, stage: str | None = None, all_: bool = False):
    """Make given-up calls due again; the rows (job_id, stage) of those it concerned."""
    given = {"job_id": job_id, "stage": stage, "all": all_}
    return db.execute(conn, RETRY, given).fetchall()


OWED = """
SELECT job.current_step, job.status, c.stage, c.worker, c.due_at, c.due_at > now() AS later,
       job.found,
       EXISTS (SELECT FROM stage_attempts AS a
               WHERE a.job_id = c.job_id AND a.call_id = c.call_id AND a.attempt = c.attempts
                 AND a.outcome = 'unknown') AS unknown
FROM (VALUES (1)) AS always
LEFT JOIN stage_calls AS c ON c.job_id = %(job_id)s
LEFT JOIN LATERAL (SELECT true AS found, j.current_step::text, j.status::text FROM jobs AS j
                   WHERE j.job_id = %(job_id)s LIMIT 1) AS job ON true
"""


def why_nothing_owed(conn, job_id: str) -> str:
    """One line on why a job's call cannot be taken, or retried, now."""
    row = db.execute(conn, OWED, {"job_id": job_id}).fetchone()
    if row.worker and row.later:
        return (
            f"job {job_id}: {row.worker} is calling {row.stage}; its lease ends {row.due_at:%F %T}"
        )
    if row.unknown and row.later:
        return (
            f"job {job_id}: its last call of {row.stage} got no answer and may still be running; "
            f"it is due again {row.due_at:%F %T}"
        )
    if row.stage:
        return (
            f"job {job_id} owes a call to {row.stage}, due {row.due_at:%F %T}; it is not given up"
        )
    if not row.found:
        return f"there is no job {job_id}"
    return f"job {job_id} owes no call: it is at ({row.current_step}, {row.status})"


@click.command()
@click.argument("job_ids", nargs=-1, metavar="[JOB_ID]...")
@click.option(
    "--stage", type=click.Choice(stages.stage_names()), help="Every given-up call of this stage."
)
@click.option("--all", "all_", is_flag=True, help="Every given-up call.")
def retry(job_ids: tuple[str, ...], stage: str | None, all_: bool) -> None:
    """Make given-up calls due again, with a fresh MAX_ATTEMPTS.

    Give job ids, or --stage, or --all.
    """
    if bool(job_ids) + bool(stage) + all_ != 1:
        raise click.UsageError("Give job ids, or --stage, or --all.", click.get_current_context())
    conn = db.connect(config.settings(), "job-state-listener retry")
    revived, refused = [], []
    for job_id in job_ids or [None]:
        found = make_due(conn, job_id, stage, all_)
        revived += found
        if job_id and not found:
            refused.append(why_nothing_owed(conn, job_id))
        # At once: the next id may be one that ends this with an error.
        db.execute(conn, RING)
        for row in found:
            click.echo(f"due again: job {row.job_id}, stage {row.stage}".translate(CONTROL))
    if refused:
        raise Problem("; ".join(refused))
    if not revived:
        click.echo("nothing was given up")
