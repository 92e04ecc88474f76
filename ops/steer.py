"""`retry`, `cancel`, `call`: a person decides about calls that are owed."""

import contextlib
from types import SimpleNamespace
from typing import Any

import click
import psycopg2

import calls
import checks
import db
import failures
import joins
import pipeline
import settling
import trigger
from alerts import Alerts
from calls import DO_NOT_RETRY, Wanted
from ops import rows, waits
from ops.chosen import (
    FOUND,
    LISTED,
    MATCHING,
    Chosen,
    filters,
    in_batches,
    patiently,
    refuse_left,
    require_choice,
    show,
    tell,
)
from ops.person import operator, wake_listeners
from ops.problem import Problem
from ops.rows import RowCommand
from ops.table import clock, counted, plain
from ops.text import Text
from pipeline import Call

# --- the statements -----------------------------------------------------------------------

# Calls that were given up; with --now also calls that wait for their next attempt, and where a row
# is named also its call for a later run_after. Not calls whose lease is not over, as they may still
# be under way, nor those whose last attempt is not settled.
# A call that its stage has accepted is retried only by its id (see calls.DO_NOT_RETRY).
ACCEPTED = f"c.last_error LIKE '{DO_NOT_RETRY}%%'"
RETRIED = f"""
      ({ACCEPTED} AND %(job_id)s IS NULL) IS NOT TRUE
  AND (c.due_at = 'infinity' OR %(now)s AND greatest(c.due_at, c.run_after) > now()
       AND (c.worker IS NULL OR c.due_at <= now())
       AND (c.run_after IS NULL OR c.run_after <= now() OR %(job_id)s IS NOT NULL)
       AND NOT EXISTS (
       SELECT FROM stage_leases AS l
       WHERE l.job_id = c.job_id AND l.table_name = c.table_name
         AND (l.stage = c.stage OR l.call_id = c.call_id) AND l.leased_until > now()))"""

# A call that was given up gets all its attempts again: free_attempts rises, as `attempts` itself
# never falls (see schema.sql). A person wants it now, so it does not wait for its run_after either.
# A row that the stage's own transaction holds is skipped, not waited for.
RETRY = f"""
WITH chosen AS (
    SELECT c.job_id, c.table_name, c.join_of, c.due_at FROM stage_calls AS c
    WHERE {MATCHING} AND {RETRIED}
    FOR UPDATE OF c SKIP LOCKED)
UPDATE stage_calls AS c
SET due_at = clock_timestamp(), run_after = NULL,
    free_attempts = CASE WHEN chosen.due_at = 'infinity' THEN c.attempts ELSE c.free_attempts END
FROM chosen
WHERE (c.job_id, c.table_name, c.join_of) = (chosen.job_id, chosen.table_name, chosen.join_of)
RETURNING c.job_id, c.job_id::text AS key, c.stage, c.join_of, {rows.CALLED_FROM},
          c.stage IN (SELECT stage FROM pipeline_stages) AS has_route
"""

# A call under way cannot be stopped, but will not be repeated.
CANCEL = f"""
WITH chosen AS (
    SELECT c.job_id, c.table_name, c.join_of FROM stage_calls AS c
    WHERE {MATCHING}
    FOR UPDATE OF c SKIP LOCKED
), gone AS (
    DELETE FROM stage_calls AS c USING chosen
    WHERE (c.job_id, c.table_name, c.join_of) = (chosen.job_id, chosen.table_name, chosen.join_of)
    RETURNING c.*
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                                finished_at, outcome, error)
    SELECT job_id, table_name, call_id, attempts, stage, %(by)s, now(), now(), 'cancelled',
           %(reason)s
    FROM gone
)
SELECT job_id, table_name, job_id::text AS key, stage, lease.working AS is_working,
       CASE WHEN NOT (lease.working OR lease.unanswered) THEN worker END AS calling
FROM gone LEFT JOIN LATERAL (
    SELECT l.working, l.unanswered FROM stage_leases AS l
    WHERE l.call_id = gone.call_id AND l.attempt = gone.attempts AND l.leased_until > now()
    LIMIT 1) AS lease ON true
"""

LIST_RETRIED = LISTED.format(matching=f"{MATCHING} AND {RETRIED}")
LIST_ACCEPTED = LISTED.format(matching=f"{MATCHING} AND c.due_at = 'infinity' AND {ACCEPTED}")
FIND_RETRIED = FOUND.format(matching=f"{MATCHING} AND {RETRIED}")
LIST_CANCELLED = LISTED.format(matching=MATCHING)
FIND_CANCELLED = FOUND.format(matching=MATCHING)


# --- why not -------------------------------------------------------------------------------


def why_nothing_owed(conn, row: Any, stage: str | None = None, by_hand: bool = False) -> str:
    """One line on why a row's call (to `stage`) cannot be made `by_hand`, or retried, now."""
    what = rows.said(row)
    call = next(iter(waits.owed(conn, row, stage)), None)
    if call is None:
        to = f" to {stage}" if stage else ""
        at = f"is at ({row.current_step}, {row.status})" if row.is_there else rows.absence(row)
        return f"{what} owes no call{to}: it {at}{way_on(row, stage)}"
    if call.unanswered:
        return (
            f"{what}: its last call of {call.stage} got no answer and may still be running; "
            f"it is due again {clock(call.due_at)}"
        )
    if call.working:
        return f"{what}: {waits.working(call)}"
    if call.calling:
        return (
            f"{what}: {call.calling} is calling {call.stage}; its lease ends "
            f"{clock(call.leased_until)}"
        )
    if not (call.has_route and rows.is_readable(row)) and (gone := waits.why(row, call)):
        return ": ".join(filter(None, (what, *gone)))
    if by_hand and call.full:
        return f"{what}: {waits.full(call)}; try again"
    if call.given_up or call.locked_by:
        return f"{what}: another transaction holds its call to {call.stage}; try again"
    owes = f"{what} owes a call to {call.stage}, due {clock(call.due_at)}; it is not given up"
    keeps = waits.why(row, call)
    return owes if keeps in (None, waits.NOBODY) else ": ".join(filter(None, (owes, *keeps)))


def way_on(row: Any, stage: str | None) -> str:
    """For a row that owes nothing: the command or SQL that has `stage` called; where no stage
    follows from its state and none has set it failed, the command that shows the rows that belong
    to it, or "".
    """
    follows = rows.own_stage(row) if row.is_there else None
    if follows and stage in (None, follows):
        return f"; to call {follows} again: {rows.typed('again', row)}"
    if row.is_there and row.status == "failed" and row.current_step in pipeline.stage_names():
        step = row.current_step
        return f"; to call {step} again: {rows.way_on(row, step)}"
    parents = {pipeline.parent_name(table) for table in pipeline.tables().values()}
    if row.is_there and row.table_name in parents:
        return f"; what its rows in other tables owe: {rows.typed('job', row)}"
    return ""


# --- call ----------------------------------------------------------------------------------


def call_by_hand(conn, settings: SimpleNamespace, name: str, row: Any, stage: str | None) -> bool:
    """Run the call that a row (see rows.find) owes, in this process; whether it succeeded.

    Raises:
        Problem: it owes none (to `stage`), or none that may be made now, or several.
    """
    rows.require_readable(row)
    limits, alerts = pipeline.full_limits(settings), Alerts(settings)
    chosen = rows.one_owed(conn, row, stage)
    if chosen is None:
        raise Problem(why_nothing_owed(conn, row, stage))
    rows.require_state(row, chosen)
    wanted = [Wanted(stage, limit.lease, 1, 1, limit.is_limited)
              for stage, limit in limits.items()]  # fmt: skip
    # A lost attempt, before the history has a newer one.
    failures.reap(conn, settings, call_id=chosen.call_id)
    leased_from = trigger.boottime()
    only = (row.key, chosen.call_id, chosen.attempts)
    claimed = calls.run_turn(conn, [], wanted, 1, name, only=only).claimed
    if not claimed:
        raise Problem(why_nothing_owed(conn, row, chosen.stage, by_hand=True))
    [claim] = claimed
    call = pipeline.claimed_call(claim, limits[claim.stage], name, leased_from, conn.target)
    if claim.routed_to not in (None, claim.stage):
        checks.put_off(conn, claim, name, claim.routed_to, claim.spent - 1, 0, claim.last_error)
        raise Problem(f"{rows.said(row)}: its call was recorded for {claim.stage}, before PIPELINE "
                      "changed: try again")  # fmt: skip
    # A person may try once more after max_attempts.
    call.max_attempts = max(call.max_attempts, call.spent)
    ended = checks.end_unmade(conn, call, claim)
    is_made = ended is None
    if ended is None:
        if claim.join_of:
            joins.note_parent(conn, claim)
        trigger.log_begin(call)
        with db.without_callback():  # the stage function may have connections of its own
            ended = trigger.Trigger(settings).run(call, by_hand=True)
    if ended.outcome == "released":
        trigger.log_end(call, ended)
        calls.give_back(conn, name, [])
        return False
    settled = settle(conn, settings, call, ended)
    if is_made:  # else it has been logged
        trigger.log_end(call, ended)
    failures.tell(alerts, settled)
    alerts.close()
    if ended.error == checks.OUTDATED:
        back = rows.way_to_join(row, claim.join_of, call.stage)
        raise Problem(f"{rows.said(row)}: not called, as rows of its join have changed since the "
                      f"call to {call.stage} was recorded; a running listener records it anew; "
                      f"where none runs: {back}")  # fmt: skip
    if ended.outcome == "skipped":
        raise Problem(why_nothing_owed(conn, rows.find(conn, row.key, row.table_name), stage))
    return settled.is_accepted


def settle(conn, settings: SimpleNamespace, call: Call, ended: calls.Result) -> calls.Result:
    """Settle what came of `call`; where that fails, on other connections until its lease is over.

    Raises:
        psycopg2.Error: it could not be written.
    """
    with contextlib.suppress(psycopg2.Error):
        return settling.settle(conn, ended)
    try:
        name = db.CALL_APPLICATION + call.listener
        return settling.settle_within_lease(settings, name, call, ended).result
    except psycopg2.Error:
        said = f"the result of this call to {call.stage} ({ended.outcome}) could not be recorded"
        then = "it will be made again, unless its row moves on"
        if ended.outcome in calls.PAID:  # it may have been kept from that
            then = f"{pipeline.typed('job', call.table, call.key)} says whether it is made again"
        click.echo(f"{said}: {then}", err=True)
        raise


# --- retry ---------------------------------------------------------------------------------


@click.command(cls=RowCommand, short_help="Make given-up calls due again, or hurry others.")
@click.argument("job_ids", type=Text(), nargs=-1, metavar="[JOB_ID]...")
@click.option("--now", is_flag=True, help="Also calls that wait for their next attempt.")
@filters
def retry(job_ids, now, stage, tenant, error, since, all_, yes, table) -> None:
    """Make given-up calls due again, with a fresh MAX_ATTEMPTS.

    Give job ids; or choose calls with --stage, --tenant, --error and --since, or --all: then
    they are shown, and --yes makes them due. Of an id, all given-up calls, or that to --stage; it
    may also be that of a row of another table. With --now also calls that wait for their next
    attempt, which they have without delay; that of an id also where it waits for its run_after.
    Those that may still be under way are left alone, and without ids those that their stage has
    accepted.
    """
    chosen = Chosen(None, table, stage, tenant, error, since, now)
    conn = require_choice("retry", job_ids, chosen, all_)
    if job_ids:
        retry_rows(conn, job_ids, chosen)
    elif not yes:
        if not show(conn, LIST_RETRIED, chosen, all_, "to make them due"):
            nothing_to_retry(conn, chosen)
    else:
        revived = list(in_batches(conn, FIND_RETRIED, RETRY, chosen.params))
        if revived:
            count = "1 call is" if len(revived) == 1 else f"{len(revived)} calls are"
            wake_listeners(conn, f"{count} due again, by {operator()}")
        tell_due(revived)
        tell_holds(conn, {call.stage for call in revived})
        refuse_left(conn, LIST_RETRIED, chosen)
        if not revived:
            nothing_to_retry(conn, chosen)


def retry_rows(conn, job_ids: tuple[str, ...], chosen: Chosen) -> None:
    refused, stages = [], set()
    for job_id in job_ids:
        # Print each result at once, as the next id may end the command with an error.
        try:
            row = rows.find(conn, job_id, chosen.table)
        except Problem as problem:
            refused.append(str(problem))
            continue
        given = chosen._replace(job_id=row.key, table=row.table_name)
        revived = db.execute(conn, RETRY, given.params).fetchall()
        if revived:
            wake_listeners(conn, f"{rows.said(row)}: due again, by {operator()}")
        tell_due(revived)
        stages |= {call.stage for call in revived}
        if not revived:
            refused.append(why_nothing_owed(conn, row, chosen.stage))
    tell_holds(conn, stages)
    if refused:
        raise Problem("; ".join(refused))


def tell_holds(conn, stages: set[str]) -> None:
    """Say what keeps calls of these stages from being made, though they are due."""
    for hold in waits.held_of(conn, stages):
        click.echo(f"{plain(hold.why)}; {hold.mend}")


def tell_due(revived: list) -> None:
    tell("due again", revived)
    unwanted = [call for call in revived if not rows.is_wanted(call)]
    for what, call in {rows.lost(call): call for call in unwanted}.items():
        see = pipeline.typed("job", call.table_name, call.key)
        click.echo(f"PIPELINE has no {what}, so nobody calls it: {see}")


def nothing_to_retry(conn, chosen: Chosen) -> None:
    """Say that no call matches, and whether some would with --now, or were accepted."""
    said, more = "no such call was given up", ""
    if accepted := patiently(conn, LIST_ACCEPTED, chosen.params | {"most": 1}):
        said += f", but for {accepted[0].calls} that the stage has accepted"
    elif chosen.now:
        said += " or waits for its next attempt"
    if not chosen.now:
        waiting = patiently(conn, LIST_RETRIED, chosen._replace(now=True).params | {"most": 1})
        more = f"; {counted(waiting[0].calls, 'call')} due later: --now" if waiting else ""
    click.echo(said + more)


# --- cancel --------------------------------------------------------------------------------


@click.command(cls=RowCommand, short_help="Drop the calls that jobs owe.")
@click.argument("job_ids", type=Text(), nargs=-1, metavar="[JOB_ID]...")
@click.option("--reason", type=Text(), default="cancelled by hand", show_default=True,
              metavar="TEXT", help="Kept in the history.")  # fmt: skip
@filters
def cancel(job_ids, reason, stage, tenant, error, since, all_, yes, table) -> None:
    """Drop the calls that jobs owe; the jobs themselves are not touched.

    Give job ids; or choose calls with --stage, --tenant, --error and --since, or --all: then
    they are shown, and --yes drops them. An id may also be that of a row of another table; where
    it owes several calls, --stage says which. The stage is called again when the state of the job
    changes to one that leads to it, or by `again`.
    """
    chosen = Chosen(None, table, stage, tenant, error, since)
    conn = require_choice("cancel", job_ids, chosen, all_)
    by = {"by": operator(), "reason": reason}
    if job_ids:
        cancel_rows(conn, job_ids, chosen, by)
    elif not yes:
        if not show(conn, LIST_CANCELLED, chosen, all_, "to cancel them"):
            click.echo("no such call is owed")
    else:
        gone = list(in_batches(conn, FIND_CANCELLED, CANCEL, chosen.params | by))
        if gone:
            count = counted(len(gone), "call")
            wake_listeners(conn, f"{count} cancelled by {by['by']}: {reason}")
        tell_cancelled(gone)
        refuse_left(conn, LIST_CANCELLED, chosen)
        if not gone:
            click.echo("no such call is owed")


def cancel_rows(conn, job_ids: tuple[str, ...], chosen: Chosen, by: dict[str, str]) -> None:
    refused = []
    for job_id in job_ids:
        try:
            cancel_row(conn, rows.find(conn, job_id, chosen.table), chosen, by)
        except Problem as problem:
            refused.append(str(problem))
    if refused:
        raise Problem("; ".join(refused))


def cancel_row(conn, row: Any, chosen: Chosen, by: dict[str, str]) -> None:
    """Raises Problem where it owes no call, or several."""
    what, call = rows.said(row), rows.one_owed(conn, row, chosen.stage)
    if call is None:
        raise Problem(why_nothing_owed(conn, row, chosen.stage))
    given = chosen._replace(job_id=row.key, table=row.table_name, stage=call.stage)
    gone = db.execute(conn, CANCEL, given.params | by).fetchall()
    if not gone:
        if rows.one_owed(conn, row, call.stage):
            held = f"another transaction holds its call to {call.stage}; nothing was changed"
            raise Problem(f"{what}: {held}: try again")
        raise Problem(why_nothing_owed(conn, row, call.stage))
    words = f"{what}: call to {call.stage} cancelled by {by['by']}: {by['reason']}"
    wake_listeners(conn, words)
    tell_cancelled(gone)


def tell_cancelled(gone: list) -> None:
    tell("cancelled", gone)
    for worker in dict.fromkeys(call.calling for call in gone if call.calling):
        n = sum(call.calling == worker for call in gone)
        it, goes = ("it", "that call goes") if n == 1 else (f"{n} of them", "those calls go")
        click.echo(f"{worker} is calling {it} right now; {goes} on, but only once")
    for stage in dict.fromkeys(call.stage for call in gone if call.is_working):
        n = sum(call.is_working and call.stage == stage for call in gone)
        it = "it" if n == 1 else f"{n} of them"
        click.echo(f"{stage} has taken {it}: its work goes on, but it is not called again")
