"""`check`: is the listener alive, for cron and HEALTHCHECK."""

import sys

import click
import psycopg2

import config
import db
from heartbeat import ALIVE, DEAD, HANGING, heartbeats
from logs import CONTROL
from ops import EXIT_DATABASE_AWAY, EXIT_PROBLEM
from ops.problem import first_line
from ops.seconds import Seconds
from pipeline import JSL

# The smallest oldest_due_at of pipeline_overview. The listener's role has no right to that view, so
# its expression is repeated here.
LAG = """
SELECT coalesce(extract(epoch FROM now() - least(
    (SELECT min(due_at) FROM stage_calls WHERE due_at <= now()),
    (SELECT min(greatest(c.created_at, c.run_after)) FROM stage_calls AS c
     WHERE c.worker IS NULL AND c.free_attempts > 0 AND c.due_at < 'infinity'
       AND greatest(c.created_at, c.run_after) <= now()
       AND (c.last_error IS NULL OR EXISTS (
           SELECT FROM pipeline_stages AS h
           WHERE h.stage = c.stage AND h.hold_seconds IS NOT NULL
             AND c.due_at < h.held_until + interval '1 minute'))))), 0)::float8
"""


@click.command(short_help="Exit 0 if every listener on this host is alive, 1 if not.")
@click.option("--max-lag", type=Seconds(0), metavar="SECONDS",
              help="Also ask the database: is a call overdue for longer?")  # fmt: skip
def check(max_lag: float | None) -> None:
    """Exit 0 if every listener on this host is alive, 1 if not; one line says why.

    Reads only the heartbeat files: a database that is away is no reason to restart it, and a call
    that takes long is none either. With --max-lag, 1 also if a call is overdue, and 3 if the
    database cannot be reached.
    """
    settings = config.settings()
    alive, line = verdict(settings.HEARTBEAT_DIR, config.why_off(settings))
    code = 0 if alive else EXIT_PROBLEM
    if alive and max_lag is not None:
        code, line = lag(settings, max_lag, line)
    line = config.redactor(settings)(line).translate(CONTROL)
    click.echo(f"{'not ok' if code else 'ok'}: {line}")
    sys.exit(code)


def verdict(directory: str, off: str | None = None) -> tuple[bool, str]:
    """Whether all is well, and why.

    Args:
        off: the setting that would keep a listener from working.
    """
    try:
        beats = heartbeats(directory)
    except OSError as error:
        return False, f"the heartbeats cannot be read ({error}): run check as the listener's user"
    for beat in beats:
        if beat.state == DEAD:
            was = f"listener {beat.listener} (pid {beat.pid}) is dead; it was {beat.doing}"
            return False, f"{was}; start {JSL}"
        if beat.state == HANGING:
            return False, f"listener {beat.listener} hangs: {beat.seconds:.0f} s {beat.doing}"
    if not beats:
        then = f"it is off by {off}" if off else f"start {JSL}"
        return False, f"no listener is running: no heartbeat in {directory}; {then}"
    doing = "; ".join(sorted({beat.doing for beat in beats if beat.state == ALIVE}))
    return True, f"{len(beats)} listener{'s' * (len(beats) > 1)} alive: {doing}"


def lag(settings, max_lag: float, line: str) -> tuple[int, str]:
    """The exit code, and why."""
    try:
        conn = db.connect(settings, "job-state-listener check")
        seconds = db.execute(conn, LAG).fetchone()[0]
    except psycopg2.Error as error:
        code = EXIT_DATABASE_AWAY if isinstance(error, db.ConnectionLost) else EXIT_PROBLEM
        return code, f"the lag is not known: {first_line(error)}"
    if seconds > max_lag:
        waited = f"the oldest due call has waited {seconds:.0f} s"
        return EXIT_PROBLEM, f"{waited}, allowed are {max_lag:g} s"
    return 0, f"{line}; " + (f"oldest due call {seconds:.0f} s" if seconds else "no call is due")
