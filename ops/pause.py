"""`pause` and `resume`: a person decides whether stages are called."""

import time

import click

import config
import db
from logs import CONTROL
from ops import waits
from ops.person import operator, wake_listeners
from ops.pools import POOL, members
from ops.problem import IF_NEWER, INSTALL, Problem
from ops.seconds import Seconds
from ops.stage import StageName
from ops.table import clock, counted, plain
from ops.text import Text
from pipeline import JSL

# A stage that is paused already keeps who paused it, and why, unless a reason is given.
PAUSE = """
UPDATE pipeline_stages
SET held_until = 'infinity', hold_seconds = NULL, held_by = %(by)s,
    held_reason = coalesce(%(reason)s, 'paused by hand')
WHERE stage = %(stage)s
  AND (%(reason)s IS NOT NULL OR held_until IS DISTINCT FROM 'infinity')
RETURNING held_reason
"""

RESUME = """
UPDATE pipeline_stages AS p
SET held_until = NULL, hold_seconds = NULL, held_reason = NULL, held_by = NULL
FROM pipeline_stages AS before
WHERE p.stage = %(stage)s AND p.held_until > now()
  AND (before.table_name, before.join_of, before.current_step, before.status)
      = (p.table_name, p.join_of, p.current_step, p.status)
RETURNING before.held_by, before.held_reason, before.held_until = 'infinity' AS paused,
          (SELECT count(*) FROM stage_calls AS c WHERE c.stage = p.stage) AS owed
"""

STAGES = click.argument("stages", type=StageName(), nargs=-1, metavar="[STAGE]...")


def named_stages(stages: tuple[str, ...], of_pools: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that were named, and those of the pools, each once."""
    found = tuple(dict.fromkeys((*stages, *members(of_pools))))
    if not found:
        raise click.UsageError("name a STAGE, or a --pool.", click.get_current_context())
    return found


@click.command(short_help="Call STAGE no more, on any machine, until it is resumed.")
@STAGES
@POOL
@click.option("--reason", type=Text(), metavar="TEXT",
              help="Shown in status and in the log; default: the reason it has, or paused by"
              " hand.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Then wait until the calls under way are over.")
@click.option("--timeout", type=Seconds(0), metavar="SECONDS",
              help="With --wait: no longer than this; then exit 1.")  # fmt: skip
def pause(
    stages: tuple[str, ...],
    of_pools: tuple[str, ...],
    reason: str | None,
    wait: bool,
    timeout: float | None,
) -> None:
    """Call these stages no more, on any machine, until they are resumed; their calls pile up.

    Calls under way are finished; --wait waits for them. A pause outlasts restarts and installs.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait.", click.get_current_context())
    stages = named_stages(stages, of_pools)
    conn = db.connect(config.settings(), "job-state-listener pause")
    unknown = [stage for stage in stages if not pause_stage(conn, stage, reason)]
    if unknown:
        raise Problem(f"the database does not know {' and '.join(unknown)}: {INSTALL}, {IF_NEWER}")
    if wait:
        wait_for_calls(conn, stages, timeout)


def pause_stage(conn, stage: str, reason: str | None) -> bool:
    """Pause a stage and print it; False where the database does not know the stage."""
    by = operator()
    paused = db.execute(conn, PAUSE, {"stage": stage, "reason": reason, "by": by}).fetchone()
    if not paused:
        before = waits.held_of(conn, {stage})
        for hold in before:
            click.echo(f"unchanged: {hold.why}; {hold.mend}".translate(CONTROL))
        return bool(before)
    wake_listeners(conn, f"{stage} paused by {by}: {paused.held_reason}")
    click.echo(f"paused: {stage}; {JSL} resume {stage}")
    return True


@click.command(short_help="Call STAGE again: ends a pause, and also a hold.")
@STAGES
@POOL
def resume(stages: tuple[str, ...], of_pools: tuple[str, ...]) -> None:
    """Call these stages again: ends a pause, and also a hold, at once."""
    stages = named_stages(stages, of_pools)
    conn = db.connect(config.settings(), "job-state-listener resume")
    for stage in stages:
        lifted = db.execute(conn, RESUME, {"stage": stage}).fetchone()
        if lifted is None:
            click.echo(f"{stage} was neither paused nor held")
            continue
        wake_listeners(conn, f"{stage} resumed by {operator()}")
        was = "paused" if lifted.paused else "held"
        by = f"{lifted.held_by}: {lifted.held_reason}".translate(CONTROL)
        owes = counted(lifted.owed, "call")
        click.echo(f"resumed: {stage}, which owes {owes} (was {was} by {by})")


# --- waiting -------------------------------------------------------------------------------

LOOK_EVERY = 0.5  # seconds

# Transactions of listeners: one that had begun before the pause may commit a claim after it.
CLAIMING = """
SELECT k.virtualtransaction AS name
FROM pg_locks AS k JOIN pg_stat_activity AS a USING (pid)
WHERE k.locktype = 'virtualxid' AND a.datname = current_database()
  AND starts_with(a.application_name, %(prefix)s)
"""

UNDER_WAY = """
SELECT stage, job_id::text, worker, unanswered, working, leased_until FROM stage_leases
WHERE stage = ANY (%(stages)s::text[]) AND leased_until > now()
ORDER BY leased_until
"""


def wait_for_calls(conn, stages: tuple[str, ...], timeout: float | None) -> None:
    """Block until no call of these stages is under way; says which ones it waits for.

    Raises:
        Problem: one still is after `timeout` seconds.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    claiming = transactions(conn)
    told = None
    while True:
        claiming &= transactions(conn)
        under_way = db.execute(conn, UNDER_WAY, {"stages": list(stages)}).fetchall()
        if not claiming and not under_way:
            click.echo("no call of them is under way" if len(stages) > 1
                       else f"no call of {stages[0]} is under way")  # fmt: skip
            return
        waited = ", ".join(said(call) for call in under_way) or "a claim of a listener"
        if ends is not None and time.monotonic() >= ends:
            still = f"after {timeout:g} s there is still under way: {waited}"
            raise Problem(f"{still}; the pause stays")
        if waited != told:
            click.echo(f"waiting for {waited}")
            told = waited
        time.sleep(LOOK_EVERY)


def transactions(conn) -> set[str]:
    given = {"prefix": db.LISTENER_APPLICATION}
    return {row.name for row in db.execute(conn, CLAIMING, given)}


def said(call) -> str:
    about = plain(f"{call.stage} {call.job_id}")
    if call.unanswered:
        return f"{about} (no answer; it may go on until {clock(call.leased_until)})"
    if call.working:
        return f"{about} (its stage works on it; {waits.unless_it_ends(call)})"
    return f"{about} (until {clock(call.leased_until)} at the latest)"
