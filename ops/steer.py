"""`retry`, `cancel`, `pause`, `resume`: a person decides about calls and stages."""

import contextlib
import getpass
import os
import socket
from types import SimpleNamespace
from typing import Any

import click

import calls
import config
import db
import joins
import pipeline
import trigger
from alerts import Alerts
from calls import Wanted
from logs import CONTROL
from ops import rows
from ops.problem import Problem
from ops.rows import TABLE, RowCommand
from ops.stage import StageName

# What was spent so far no longer counts; attempts itself never falls (see schema.sql).
RETRY = """
UPDATE stage_calls SET due_at = clock_timestamp(), free_attempts = attempts
WHERE (job_id, table_name, join_of) IN (
    SELECT job_id, table_name, join_of FROM stage_calls
    WHERE due_at = 'infinity'
      AND (job_id = %(job_id)s OR %(job_id)s IS NULL AND (stage = %(stage)s OR %(all)s))
      AND (%(job_id)s IS NULL OR stage = %(stage)s OR %(stage)s IS NULL)
      AND (table_name = %(table)s OR %(table)s IS NULL)
    FOR UPDATE SKIP LOCKED)
RETURNING job_id, table_name, job_id::text AS key, stage
"""


def make_due(
    conn,
    job_id: str | None = None,
    stage: str | None = None,
    all_: bool = False,
    table: str | None = None,
):
    """Make given-up calls due again: those of a row (to `stage`, where that is given), or of a
    stage, or all; the rows (job_id, table_name, key, stage) of those it concerned.
    """
    given = {"job_id": job_id, "stage": stage, "all": all_, "table": table}
    return db.execute(conn, RETRY, given).fetchall()


# The first call of a row, to `stage` if given, and what keeps it from being taken.
OWED = """
SELECT c.stage, c.due_at, c.due_at = 'infinity' AS given_up,
       l.worker AS calling, l.unanswered, l.leased_until, s.max_running,
       s.max_running <= (SELECT count(*) FROM stage_leases AS m
                         WHERE m.stage = c.stage AND m.leased_until > now()) AS full
FROM stage_calls AS c
LEFT JOIN LATERAL (SELECT * FROM stage_leases
                   WHERE job_id = c.job_id AND table_name = c.table_name AND stage = c.stage
                     AND leased_until > now()
                   ORDER BY leased_until DESC LIMIT 1) AS l ON true
LEFT JOIN stage_limits AS s ON s.name = c.stage
WHERE c.job_id = %(key)s AND c.table_name = %(table)s
  AND (%(stage)s::text IS NULL OR c.stage = %(stage)s)
ORDER BY c.due_at
LIMIT 1
"""


def why_nothing_owed(conn, row: Any, stage: str | None = None) -> str:
    """One line on why a row's call (to `stage`) cannot be taken, or retried, now."""
    what = rows.said(row)
    given = {"key": row.key, "table": row.table_name, "stage": stage}
    call = db.execute(conn, OWED, given).fetchone()
    if call is None:
        to = f" to {stage}" if stage else ""
        at = f"it is at ({row.current_step}, {row.status})" if row.is_there else "it was deleted"
        return f"{what} owes no call{to}: {at}"
    if call.unanswered:
        return (
            f"{what}: its last call of {call.stage} got no answer and may still be running; "
            f"it is due again {call.due_at:%F %T}"
        )
    if call.calling:
        return (
            f"{what}: {call.calling} is calling {call.stage}; its lease ends "
            f"{call.leased_until:%F %T}"
        )
    if call.full:
        limit = f"its limit of {call.max_running} calls at once"
        return f"{what}: {call.stage} is at {limit}; try again"
    if call.given_up:
        return f"{what}: another transaction holds its call to {call.stage}; try again"
    return f"{what} owes a call to {call.stage}, due {call.due_at:%F %T}; it is not given up"


def call_by_hand(conn, settings: SimpleNamespace, name: str, row: Any, stage: str | None) -> bool:
    """Run the call that a row (see rows.find) owes, in this process; whether it succeeded.

    Raises:
        Problem: it owes none (to `stage`), or none that may be made now, or several.
    """
    limits, alerts = pipeline.stage_limits(settings), Alerts(settings)
    chosen = rows.one_owed(conn, row, stage)
    if chosen is None:
        raise Problem(why_nothing_owed(conn, row, stage))
    make_due(conn, row.key, chosen.stage, table=row.table_name)
    wanted = [Wanted(stage, limit.timeout + settings.LEASE_MARGIN, 1, 1,
                     limit.max_running is not None) for stage, limit in limits.items()]  # fmt: skip
    began = trigger.boottime()
    only = (row.key, chosen.call_id)
    claimed = calls.settle_and_claim(conn, [], wanted, 1, name, only=only).claimed
    if not claimed:
        raise Problem(why_nothing_owed(conn, row, chosen.stage))
    [claim] = claimed
    call = pipeline.claimed_call(claim, limits[claim.stage], name, began + settings.LEASE_MARGIN)
    # A person may try once more than max_attempts.
    call.max_attempts = max(call.max_attempts, call.spent)
    owed = claim.owed or calls.is_owed(conn, claim, name)
    ended = trigger.refused(call, claim, owed, claim.accepted)
    if ended is not None and claim.join_of and claim.job_found and not claim.is_complete:
        joins.reopen(conn, claim)
    if ended is None:
        if claim.join_of and call.spent == 1:
            joins.note_parent(conn, claim)
        trigger.log_begin(call)
        with db.without_callback():  # the stage function may have connections of its own
            ended = trigger.Trigger(settings).run(call, by_hand=True)
        trigger.log_end(call, ended)
    if ended.outcome == "released":
        calls.give_back(conn, name, [])
        return False
    tell(conn, alerts, ended)
    calls.settle_and_claim(conn, [ended], [], 0, name)
    alerts.close()
    if ended.outcome == "skipped":
        raise Problem(why_nothing_owed(conn, rows.find(conn, row.key, row.table_name), stage))
    return ended.outcome == "succeeded"


def tell(conn, alerts: Alerts, ended: calls.Result) -> None:
    """Tell people of a call that was given up, or whose stage has set its row to failed."""
    if ended.outcome in (*calls.PAID, "held") or not calls.set_failed(conn, [ended]):
        trigger.alert_given_up(alerts, ended)
        return
    ended.outcome, ended.delay, ended.hold = "failed", None, False
    ended.error = f"{ended.error} ({trigger.SET_FAILED})"
    trigger.tell_failed(alerts, ended.table_name, ended.job_id, ended.stage, ended.error)


@click.command(cls=RowCommand)
@click.argument("job_ids", nargs=-1, metavar="[JOB_ID]...")
@click.option(
    "--stage", type=StageName(), metavar="STAGE", help="Every given-up call of this stage."
)
@click.option("--all", "all_", is_flag=True, help="Every given-up call.")
@TABLE
def retry(job_ids: tuple[str, ...], stage: str | None, all_: bool, table: str | None) -> None:
    """Make given-up calls due again, with a fresh MAX_ATTEMPTS.

    Give job ids, or --stage, or --all. Of an id, all given-up calls; it may also be that of a row
    of another table.
    """
    if bool(job_ids) + bool(stage) + all_ != 1:
        raise click.UsageError("Give job ids, or --stage, or --all.", click.get_current_context())
    conn = rows.connected("retry")
    if not job_ids:
        revived = make_due(conn, None, stage, all_, table)
        tell_due(conn, revived)
        if not revived:
            click.echo("nothing was given up")
        return
    refused = []
    for job_id in job_ids:
        # At once: the next id may be one that ends this with an error.
        try:
            row = rows.find(conn, job_id, table)
        except Problem as problem:
            refused.append(str(problem))
            continue
        revived = make_due(conn, row.key, table=row.table_name)
        tell_due(conn, revived)
        if not revived:
            refused.append(why_nothing_owed(conn, row))
    if refused:
        raise Problem("; ".join(refused))


def tell_due(conn, revived: list) -> None:
    """Wake the listeners, and say what is due again."""
    db.execute(conn, db.WAKE)
    for call in revived:
        click.echo(f"due again: {rows.said(call)}, stage {call.stage}".translate(CONTROL))


# A call under way cannot be taken back, but is not repeated. Not where the stage's own
# transaction holds the row: nobody waits for it.
CANCEL = """
WITH gone AS (
    DELETE FROM stage_calls
    WHERE (job_id, table_name, join_of) IN (
        SELECT job_id, table_name, join_of FROM stage_calls
        WHERE job_id = %(job_id)s AND table_name = %(table)s
          AND (stage = %(stage)s OR %(stage)s IS NULL)
        FOR UPDATE SKIP LOCKED)
    RETURNING *
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                                finished_at, outcome, error)
    SELECT job_id, table_name, call_id, attempts, stage, %(by)s, now(), now(), 'cancelled',
           %(reason)s
    FROM gone
)
SELECT stage, CASE WHEN due_at > now() THEN worker END AS calling FROM gone
"""


@click.command(cls=RowCommand)
@click.argument("job_id")
@click.option("--reason", default="cancelled by hand", show_default=True, metavar="TEXT",
              help="Kept in the history.")  # fmt: skip
@click.option("--stage", type=StageName(), metavar="STAGE",
              help="The call to this stage, where several are owed.")  # fmt: skip
@TABLE
def cancel(job_id: str, reason: str, stage: str | None, table: str | None) -> None:
    """Drop the call that JOB_ID owes; the job itself is not touched.

    It owes a call again when its state changes to one that leads to a stage. JOB_ID may also be
    the id of a row of another table.
    """
    conn = rows.connected("cancel")
    row = rows.find(conn, job_id, table)
    what, call = rows.said(row), rows.one_owed(conn, row, stage)
    if call is None:
        raise Problem(why_nothing_owed(conn, row, stage))
    given = {"job_id": row.key, "table": row.table_name, "stage": call.stage}
    gone = db.execute(conn, CANCEL, given | {"by": operator(), "reason": reason}).fetchone()
    if gone is None:
        if rows.one_owed(conn, row, call.stage):
            held = f"another transaction holds its call to {call.stage}; nothing was changed"
            raise Problem(f"{what}: {held}: try again")
        raise Problem(why_nothing_owed(conn, row, call.stage))
    wake_listeners(conn, f"{what}: call to {gone.stage} cancelled by {operator()}: {reason}")
    click.echo(f"cancelled: {what}, stage {gone.stage}".translate(CONTROL))
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
