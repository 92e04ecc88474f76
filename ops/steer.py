"""`retry`, `cancel`, `pause`, `resume`: a person decides about calls and stages."""

import contextlib
import getpass
import os
import socket
from types import SimpleNamespace

import click

import calls
import config
import db
import pipeline
import trigger
from alerts import Alerts
from calls import Turn, Wanted
from logs import CONTROL
from ops.problem import Problem
from ops.stage import StageName

# What was spent so far no longer counts; attempts itself never falls (see schema.sql).
RETRY = """
UPDATE stage_calls SET due_at = clock_timestamp(), free_attempts = attempts
WHERE job_id IN (
    SELECT job_id FROM stage_calls
    WHERE due_at = 'infinity' AND (job_id = %(job_id)s OR stage = %(stage)s OR %(all)s)
    FOR UPDATE SKIP LOCKED)
RETURNING job_id, stage
"""


def make_due(conn, job_id: str | None = None, stage: str | None = None, all_: bool = False):
    """Make given-up calls due again; the rows (job_id, stage) of those it concerned."""
    given = {"job_id": job_id, "stage": stage, "all": all_}
    return db.execute(conn, RETRY, given).fetchall()


OWED = """
SELECT job.current_step, job.status, c.stage, c.due_at, job.found,
       l.worker AS calling, l.unanswered, l.leased_until, s.max_running,
       s.max_running <= (SELECT count(*) FROM stage_leases AS m
                         WHERE m.stage = c.stage AND m.leased_until > now()) AS full
FROM (VALUES (1)) AS always
LEFT JOIN stage_calls AS c ON c.job_id = %(job_id)s
LEFT JOIN LATERAL (SELECT * FROM stage_leases
                   WHERE job_id = c.job_id AND stage = c.stage AND leased_until > now()
                   ORDER BY leased_until DESC LIMIT 1) AS l ON true
LEFT JOIN stage_limits AS s ON s.name = c.stage
LEFT JOIN LATERAL (SELECT true AS found, j.current_step::text, j.status::text FROM jobs AS j
                   WHERE j.job_id = %(job_id)s LIMIT 1) AS job ON true
"""


def why_nothing_owed(conn, job_id: str) -> str:
    """One line on why a job's call cannot be taken, or retried, now."""
    row = db.execute(conn, OWED, {"job_id": job_id}).fetchone()
    if row.unanswered:
        return (
            f"job {job_id}: its last call of {row.stage} got no answer and may still be running; "
            f"it is due again {row.due_at:%F %T}"
        )
    if row.calling:
        return (
            f"job {job_id}: {row.calling} is calling {row.stage}; its lease ends "
            f"{row.leased_until:%F %T}"
        )
    if row.full:
        limit = f"its limit of {row.max_running} calls at once"
        return f"job {job_id}: {row.stage} is at {limit}; try again"
    if row.stage:
        return (
            f"job {job_id} owes a call to {row.stage}, due {row.due_at:%F %T}; it is not given up"
        )
    if not row.found:
        return f"there is no job {job_id}"
    return f"job {job_id} owes no call: it is at ({row.current_step}, {row.status})"


OPEN_CALL = "SELECT call_id FROM stage_calls WHERE job_id = %(job_id)s ORDER BY due_at LIMIT 1"


def call_by_hand(conn, settings: SimpleNamespace, name: str, job_id: str) -> bool:
    """Run the call that a job owes in this process; whether it succeeded.

    Raises:
        Problem: it owes none, or none that may be made now.
    """
    make_due(conn, job_id)
    limits, alerts = pipeline.stage_limits(settings), Alerts(settings)
    wanted = [Wanted(stage, limit.timeout + settings.LEASE_MARGIN, 1, 1,
                     limit.max_running is not None) for stage, limit in limits.items()]  # fmt: skip
    began = trigger.boottime()
    owed = db.execute(conn, OPEN_CALL, {"job_id": job_id}).fetchone()
    only = (job_id, owed.call_id) if owed else None
    turn = calls.settle_and_claim(conn, [], wanted, 1, name, only=only) if only else Turn([], [])
    if not turn.claimed:
        raise Problem(why_nothing_owed(conn, job_id))
    [row] = turn.claimed
    call = pipeline.claimed_call(row, limits[row.stage], name, began + settings.LEASE_MARGIN)
    # A person may try once more than max_attempts.
    call.max_attempts = max(call.max_attempts, call.spent)
    owed = row.owed or calls.is_owed(conn, row, name)
    ended = trigger.refused(call, row, owed, row.accepted)
    if ended is None:
        trigger.log_begin(call)
        with db.without_callback():  # the stage function may have connections of its own
            ended = trigger.Trigger(settings).run(call, by_hand=True)
        trigger.log_end(call, ended)
    if ended.outcome == "released":
        calls.give_back(conn, name, [])
        return False
    calls.settle_and_claim(conn, [ended], [], 0, name)
    if ended.outcome == "skipped":
        raise Problem(why_nothing_owed(conn, job_id))
    trigger.alert_given_up(alerts, ended)
    alerts.close()
    return ended.outcome == "succeeded"


@click.command()
@click.argument("job_ids", nargs=-1, metavar="[JOB_ID]...")
@click.option(
    "--stage", type=StageName(), metavar="STAGE", help="Every given-up call of this stage."
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
        if job_id is not None and not found:
            refused.append(why_nothing_owed(conn, job_id))
        # At once: the next id may be one that ends this with an error.
        db.execute(conn, db.WAKE)
        for row in found:
            click.echo(f"due again: job {row.job_id}, stage {row.stage}".translate(CONTROL))
    if refused:
        raise Problem("; ".join(refused))
    if not revived:
        click.echo("nothing was given up")


# A call under way cannot be taken back, but is not repeated. Not where the stage's own
# transaction holds the row: nobody waits for it.
CANCEL = """
WITH gone AS (
    DELETE FROM stage_calls
    WHERE job_id = (SELECT job_id FROM stage_calls WHERE job_id = %(job_id)s
                    FOR UPDATE SKIP LOCKED)
    RETURNING *
), recorded AS (
    INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                                outcome, error)
    SELECT job_id, call_id, attempts, stage, %(by)s, now(), now(), 'cancelled', %(reason)s
    FROM gone
)
SELECT stage, CASE WHEN due_at > now() THEN worker END AS calling FROM gone
"""

LEFT = "SELECT stage FROM stage_calls WHERE job_id = %(job_id)s"


@click.command()
@click.argument("job_id")
@click.option("--reason", default="cancelled by hand", show_default=True, metavar="TEXT",
              help="Kept in the history.")  # fmt: skip
def cancel(job_id: str, reason: str) -> None:
    """Drop the call that JOB_ID owes; the job itself is not touched.

    It owes a call again when its state changes to one that leads to a stage.
    """
    conn = db.connect(config.settings(), "job-state-listener cancel")
    given = {"job_id": job_id, "by": operator(), "reason": reason}
    gone = db.execute(conn, CANCEL, given).fetchone()
    if gone is None:
        if left := db.execute(conn, LEFT, given).fetchone():
            held = f"another transaction holds its call to {left.stage}; nothing was changed"
            raise Problem(f"job {job_id}: {held}: try again")
        raise Problem(why_nothing_owed(conn, job_id))
    wake_listeners(conn, f"job {job_id}: call to {gone.stage} cancelled by {operator()}: {reason}")
    click.echo(f"cancelled: job {job_id}, stage {gone.stage}".translate(CONTROL))
    if gone.calling:
        click.echo(f"{gone.calling} is calling it right now; that call goes on, but only once")


PAUSE = """
UPDATE pipeline_stages
SET held_until = 'infinity', hold_seconds = NULL, held_reason = %(reason)s, held_by = %(by)s
WHERE stage = %(stage)s
"""

RESUME = """
UPDATE pipeline_stages AS p
SET held_until = NULL, hold_seconds = NULL, held_reason = NULL, held_by = NULL
FROM pipeline_stages AS before
WHERE p.stage = %(stage)s AND p.held_until > now()
  AND (before.current_step, before.status) = (p.current_step, p.status)
RETURNING before.held_by, before.held_reason,
          (SELECT count(*) FROM stage_calls AS c WHERE c.stage = p.stage) AS owed
"""

STAGE = click.argument("stage", type=StageName(), metavar="STAGE")


@click.command(short_help="Call STAGE no more, on any machine, until it is resumed.")
@STAGE
@click.option("--reason", default="paused by hand", show_default=True, metavar="TEXT",
              help="Shown in status and in the log.")  # fmt: skip
def pause(stage: str, reason: str) -> None:
    """Call STAGE no more, on any machine, until it is resumed; its calls pile up.

    Calls under way are finished. A pause outlasts restarts and installs.
    """
    conn = db.connect(config.settings(), "job-state-listener pause")
    done = db.execute(conn, PAUSE, {"stage": stage, "reason": reason, "by": operator()})
    if not done.rowcount:
        raise Problem(f"the database does not know {stage}: run `make trigger`")
    wake_listeners(conn, f"{stage} paused by {operator()}: {reason}")
    click.echo(f"paused: {stage}; python listener.py resume {stage}")


@click.command(short_help="Call STAGE again: ends a pause, and also a hold.")
@STAGE
def resume(stage: str) -> None:
    """Call STAGE again: ends a pause, and also a hold, at once."""
    conn = db.connect(config.settings(), "job-state-listener resume")
    lifted = db.execute(conn, RESUME, {"stage": stage}).fetchone()
    if lifted is None:
        click.echo(f"{stage} was neither paused nor held")
        return
    wake_listeners(conn, f"{stage} resumed by {operator()}")
    was = f"{lifted.held_by}: {lifted.held_reason}".translate(CONTROL)
    click.echo(f"resumed: {stage}, which owes {lifted.owed} calls (was held by {was})")


def operator() -> str:
    """Who types this, for the log and the history."""
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"uid {os.getuid()}@{socket.gethostname()}"


WAKE_WITH = f"SELECT pg_notify('{db.WAKE_CHANNEL}', left(%(words)s, 1000))"


def wake_listeners(conn, words: str) -> None:
    """Wake the listeners, who log the words."""
    db.execute(conn, WAKE_WITH, {"words": words})
