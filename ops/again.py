"""`again`: a person wants the call of a row's present state made once more."""

from typing import Any

import click
import psycopg2

import db
import joins
import pipeline
from logs import CONTROL
from ops import rows, waits
from ops.job import misspelt, rows_of_join
from ops.person import operator, wake_listeners
from ops.problem import IF_NEWER, INSTALL, Problem
from ops.routes import difference
from ops.rows import TABLE, RowCommand
from ops.stage import StageName
from ops.table import clock
from ops.text import Text

# Records the call as the trigger does when a row arrives in its state, whatever became of the call
# before it. A call of the state (stage, 'failed') gets the error of the last attempt: by that a
# listener sees that a person asked for it. Without it the listener would continue the count of
# attempts, and might give the call up at once. A call that was recorded after this statement began
# is that of another state, and stays.
AGAIN = """
INSERT INTO stage_calls AS c (job_id, table_name, tenant_id, current_step, status, stage,
                              last_error, priority, run_after, due_at)
SELECT %(key)s, p.table_name, left(at.tenant_id #>> '{{}}', 500), p.current_step, p.status, p.stage,
       CASE WHEN (p.current_step, p.status) = (p.stage, 'failed')
            THEN coalesce(last.error, 'set failed by its stage') END,
       declared.priority, declared.run_after, greatest(clock_timestamp(), declared.run_after)
FROM pipeline_stages AS p
CROSS JOIN (SELECT {priority} AS priority, {run_after} AS run_after FROM {table} AS r
            WHERE {id} = %(key)s) AS declared
JOIN stage_call_row(%(table)s, '', %(key)s) AS at
    ON (at.current_step, at.status) = (p.current_step, p.status)
CROSS JOIN LATERAL (
    SELECT (array_agg(a.error ORDER BY a.finished_at DESC))[1] AS error FROM stage_attempts AS a
    WHERE a.job_id = %(key)s AND a.table_name = p.table_name AND a.stage = p.stage) AS last
WHERE p.table_name = %(table)s AND p.join_of = '' AND p.stage = %(stage)s AND NOT EXISTS (
    SELECT FROM stage_leases AS l
    WHERE l.job_id = %(key)s AND l.table_name = p.table_name AND l.stage = p.stage
      AND l.leased_until > now())
ON CONFLICT (job_id, table_name, join_of) DO UPDATE
SET call_id = DEFAULT, tenant_id = excluded.tenant_id, current_step = excluded.current_step,
    status = excluded.status, stage = excluded.stage, created_at = excluded.created_at,
    due_at = excluded.due_at, attempts = 0, free_attempts = 0, worker = NULL, started_at = NULL,
    last_error = excluded.last_error, priority = excluded.priority, run_after = excluded.run_after
WHERE (c.worker IS NULL OR c.due_at <= now()) AND c.call_id = (
    SELECT b.call_id FROM stage_calls AS b
    WHERE (b.job_id, b.table_name, b.join_of) = (c.job_id, c.table_name, c.join_of))
RETURNING c.call_id
"""

# The last attempt of this stage for the row.
BEFORE = """
SELECT call_id, outcome, worker, finished_at FROM stage_attempts
WHERE job_id = %(key)s AND table_name = %(table)s AND stage = %(stage)s
ORDER BY finished_at DESC
LIMIT 1
"""

UNDER_WAY = """
SELECT stage, worker, unanswered, working, leased_until FROM stage_leases
WHERE job_id = %(key)s AND table_name = %(table)s AND stage = %(stage)s AND leased_until > now()
ORDER BY leased_until DESC
LIMIT 1
"""


@click.command(cls=RowCommand, short_help="Call the stage that follows from where JOB_ID is.")
@click.argument("job_id", type=Text())
@click.option("--stage", type=StageName(), metavar="STAGE",
              help="The call of a join that leads to this stage.")  # fmt: skip
@click.option("--join", type=Text(), metavar="JOIN",
              help="The call of this join, as `job` names it.")  # fmt: skip
@TABLE
def again(job_id: str, stage: str | None, join: str | None, table: str | None) -> None:
    """Call the stage that follows from where JOB_ID is once more.

    Its call is recorded afresh, with all attempts, although it was accepted, cancelled or given
    up. Not while it is under way. JOB_ID may also be the id of a row of another table; with
    --stage, that of a parent whose rows are all in the state that the stage follows from; where
    several joins lead to it, --join says which.
    """
    if stage and join:
        raise click.UsageError("Give --stage or --join, not both.", click.get_current_context())
    conn = rows.connected("again")
    row = rows.find(conn, job_id, table)
    what = rows.said(row)
    rows.require_readable(row)
    if not row.is_there:
        raise Problem(f"{what} was deleted")
    leading = joins_of(row)
    if join and join not in leading:
        raise Problem(no_such_join(row, join))
    join = join or join_to(conn, row, stage)
    stage = leading.get(join) or stage or rows.own_stage(row)
    if stage is None or (not join and stage != rows.own_stage(row)):
        refuse_under_way(conn, row, row.current_step)  # the row may be where its stage has set it
        raise Problem(nothing_follows(row, stage))
    if join:
        require_complete(conn, row, join)
    refuse_under_way(conn, row, stage)
    before = what_became(conn, row, stage, join)
    call_id = record(conn, row, stage, join)
    wake_listeners(conn, f"{what}: call to {stage} recorded again by {operator()}")
    click.echo(f"recorded: {what}, stage {stage}, call {call_id}{before}".translate(CONTROL))
    tell_hold(conn, stage)


def joins_of(row: Any) -> dict[str, str]:
    """The joins of the row's table, each with the stage that it leads to."""
    return {route.join: function.__name__ for route, function in pipeline.routes().items()
            if route.join and route.table == row.table_name}  # fmt: skip


def no_such_join(row: Any, join: str) -> str:
    there = ", ".join(joins_of(row)) or "none"
    return f"{rows.word_for(row.table_name)} has no join {join!r}: there is {there}"


def join_to(conn, row: Any, stage: str | None) -> str:
    """The join of the row's table that leads to `stage`; "" where that follows from the row's own
    state.

    Raises:
        Problem: several lead there, and not just one of them is complete.
    """
    if stage in (None, rows.own_stage(row)):
        return ""
    found = [name for name, leads_to in joins_of(row).items() if leads_to == stage]
    if len(found) < 2:
        return "".join(found)
    complete = [name for name in found if is_complete(rows_of_join(conn, row, name))]
    if len(complete) == 1:
        return complete[0]
    options = " or ".join(f"--join {pipeline.in_shell(name)}" for name in complete or found)
    raise Problem(f"{rows.said(row)}: several joins lead to {stage}: give {options}")


def nothing_follows(row: Any, stage: str | None) -> str:
    """Why there is no call to record, and what there is to type."""
    at = f"{rows.said(row)} is at ({row.current_step}, {row.status})"
    if stage:
        back = rows.wait_first(row, row.current_step) + pipeline.sent_back(
            row.table_name, row.key, stage, (row.current_step, row.status)
        )
        on = f"; to call {stage} again: {back}" * ("UPDATE " in back)
        return f"{at}, and {stage} does not follow from that{on}"
    if meant := misspelt(row):
        return f"{at}, from which no stage follows{meant}"
    joined = dict.fromkeys(joins_of(row).values())
    if row.current_step in pipeline.stage_names() and row.status != "done":
        back = rows.wait_first(row, row.current_step) + rows.way_on(row, row.current_step)
        return f"{at}, from which no stage follows; to call {row.current_step} again: {back}"
    if joined:
        options = " or ".join(f"--stage {name}" for name in joined)
        return f"{at}, from which no stage follows; give {options} for that of its rows"
    return f"{at}, from which no stage follows"


def is_complete(looked: Any) -> bool:
    return 0 < looked.rows == looked.in_place


def require_complete(conn, row: Any, name: str) -> None:
    looked = rows_of_join(conn, row, name)
    if not is_complete(looked):
        missing = looked.rows - looked.in_place
        waiting = (
            f"waiting for {missing} of {looked.rows}" if looked.rows else "there is no row yet"
        )
        raise Problem(f"{rows.said(row)}, every {name}: {waiting}")


def refuse_under_way(conn, row: Any, stage: str) -> None:
    given = {"key": row.key, "table": row.table_name, "stage": stage}
    call = db.execute(conn, UNDER_WAY, given).fetchone()
    if call is None:
        return
    until = clock(call.leased_until)
    why = f"{call.worker} is calling {stage}, until {until} at the latest"
    if call.unanswered:
        why = f"its last call of {stage} got no answer, and the stage may be at it until {until}"
    elif call.working:
        why = waits.working(call)
    raise Problem(f"{rows.said(row)}: {why}; nothing was changed")


def what_became(conn, row: Any, stage: str, join: str) -> str:
    """What became of the row's previous call of this stage, in words that follow the new one."""
    for call in waits.owed(conn, row, stage):
        if call.join_of == join:
            tried = "to be retried" if call.last_error else "not made yet"
            how = "given up" if call.given_up else tried
            return f", in place of call {call.call_id}, which was {how}"
    given = {"key": row.key, "table": row.table_name, "stage": stage}
    call = db.execute(conn, BEFORE, given).fetchone()
    if call is None:
        return ""
    words = {"succeeded": "accepted", "unknown": "without a known end", "retry": "to be retried",
             "lost": "lost with its listener", "held": "put off"}  # fmt: skip
    how = words.get(call.outcome, call.outcome)
    by = f" by {call.worker}" if call.outcome == "cancelled" else ""
    return f" (call {call.call_id} was {how}{by} {clock(call.finished_at)})"


def record(conn, row: Any, stage: str, join: str) -> int:
    """Record the call and return its call_id.

    Raises:
        Problem: the call is under way, the row has moved on, the database has another stage for
            its state, or another transaction holds the call.
    """
    try:
        if join:
            call_id = joins.record_again(conn, row.key, join, stage)
        else:
            sql = AGAIN.format(**rows.names(conn, pipeline.tables()[row.table_name]))
            given = {"key": row.key, "table": row.table_name, "stage": stage}
            found = db.execute(conn, sql, given).fetchone()
            call_id = found and found.call_id
    except psycopg2.errors.LockNotAvailable:
        looks = ", or a listener looks at joins" * bool(join)
        held = f"another transaction holds its call to {stage}{looks}"
        held += "; nothing was changed: try again"
        raise Problem(f"{rows.said(row)}: {held}") from None
    if call_id is None:
        refuse_under_way(conn, row, stage)
        mend = f": {INSTALL}, {IF_NEWER}" * bool(difference(conn))
        raise Problem(f"{rows.said(row)} has moved on meanwhile, its call is under way, or the "
                      f"database has another PIPELINE; nothing was changed{mend}")  # fmt: skip
    return call_id


def tell_hold(conn, stage: str) -> None:
    """Say what still keeps a stage from being called."""
    for hold in waits.held_of(conn, {stage}):
        click.echo(f"{hold.why}; {hold.mend}".translate(CONTROL))
