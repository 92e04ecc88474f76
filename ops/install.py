"""`install` and `uninstall`: the database's part, and its copy of PIPELINE."""

from pathlib import Path

import click
import psycopg2

import config
import db
import stages
from ops.problem import Problem

SCHEMA = Path(__file__).parent.parent / "schema.sql"

# Waiting longer for the lock on jobs would make the application wait behind us, or lose a
# deadlock to us (deadlock_timeout is 1 s).
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '800ms'; "

SYNC = """
DELETE FROM pipeline_stages WHERE (current_step, status) NOT IN (
    SELECT * FROM unnest(%(steps)s::text[], %(statuses)s::text[]));
INSERT INTO pipeline_stages (current_step, status, stage)
SELECT * FROM unnest(%(steps)s::text[], %(statuses)s::text[], %(stages)s::text[])
ON CONFLICT (current_step, status) DO UPDATE SET stage = excluded.stage;
UPDATE stage_calls AS c SET stage = renamed.stage
FROM (SELECT o.job_id, p.stage
      FROM stage_calls AS o JOIN pipeline_stages AS p USING (current_step, status)
      WHERE o.stage <> p.stage
      FOR UPDATE OF o SKIP LOCKED) AS renamed
WHERE c.job_id = renamed.job_id;
"""

ROUTES = "SELECT current_step, status, stage FROM pipeline_stages"

OBJECTS = """
SELECT 'table ' || relname AS name FROM pg_class
WHERE oid IN (to_regclass('jobs'), to_regclass('pipeline_stages'), to_regclass('stage_calls'),
              to_regclass('stage_attempts'))
UNION ALL
SELECT 'function ' || proname || '()' FROM pg_proc
WHERE oid = to_regprocedure('notify_job_state_change()')
UNION ALL
SELECT 'trigger ' || tgname || ' on jobs' FROM pg_trigger
WHERE tgrelid = to_regclass('jobs')
  AND tgname IN ('job_state_change_trigger', 'job_state_insert_trigger')
"""

ORPHANS = "SELECT count(*) FROM stage_calls WHERE stage <> ALL (%(stages)s)"


def routes_of(pipeline: dict) -> dict[tuple[str, str], str]:
    return {state: function.__name__ for state, function in pipeline.items()}


def routes_in(conn) -> dict[tuple[str, str], str]:
    """The routes that the database trigger knows."""
    return {(row.current_step, row.status): row.stage for row in db.execute(conn, ROUTES)}


def difference(conn) -> list[str]:
    """What PIPELINE and pipeline_stages do not agree on, in words."""
    ours, theirs = routes_of(stages.PIPELINE), routes_in(conn)
    return [
        f"{state[0]}, {state[1]} → {ours.get(state, 'nothing')} in stages.py, "
        f"{theirs.get(state, 'nothing')} in the database"
        for state in sorted(ours.keys() | theirs.keys())
        if ours.get(state) != theirs.get(state)
    ]


# A role may find another table jobs than the one that the triggers are on.
PLACE = """
SELECT to_regclass('jobs')::text AS jobs,
       (SELECT count(DISTINCT relnamespace) FROM pg_class
        WHERE oid IN (to_regclass('jobs'), to_regclass('stage_calls'),
                      to_regclass('pipeline_stages'))) AS schemas,
       (SELECT count(*) FROM pg_trigger
        WHERE tgrelid = to_regclass('jobs')
          AND tgname IN ('job_state_change_trigger', 'job_state_insert_trigger')) AS triggers
"""


def require_installed(conn) -> None:
    """Raises Problem where the database does not know this PIPELINE."""
    mend = "run `make trigger` (python listener.py install)"
    try:
        differences = difference(conn)
    except psycopg2.errors.UndefinedTable:
        raise Problem(f"the listener's tables are missing: {mend}") from None
    except psycopg2.errors.InsufficientPrivilege as error:
        reason = str(error).strip()
        raise Problem(f"{reason}: see 'Roles and grants' in README.md") from None
    if differences:
        raise Problem(f"the routes differ ({'; '.join(differences)}): {mend}")
    place = db.execute(conn, PLACE).fetchone()
    if place.jobs is None:
        raise Problem(f"there is no table jobs on the search path: {mend}")
    if place.schemas != 1 or place.triggers != 2:
        raise Problem(f"the table {place.jobs} that this role sees has no triggers of ours: {mend}")


def apply(conn) -> None:
    """Bring schema.sql and PIPELINE into the database, in one transaction."""
    routes = routes_of(stages.PIPELINE)
    params = {
        "steps": [step for step, _ in routes],
        "statuses": [status for _, status in routes],
        "stages": list(routes.values()),
    }
    sync = conn.cursor().mogrify(SYNC, params).decode()
    db.execute(conn, LOCK_TIMEOUT + SCHEMA.read_text() + sync)


@click.command(short_help="Create or update tables, function, triggers and routes.")
def install() -> None:
    """Create tables, function and triggers, and copy PIPELINE into the database.

    Again and again without harm: what is right already stays as it is, and jobs is not changed.
    """
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener install")
    before = {row.name for row in db.execute(conn, OBJECTS)}
    try:
        before_routes = routes_in(conn)
    except psycopg2.errors.UndefinedTable:
        before_routes = {}
    try:
        apply(conn)
    except psycopg2.errors.LockNotAvailable:
        raise Problem(
            "jobs is locked by another transaction; nothing was changed: try again"
        ) from None
    routes = routes_of(stages.PIPELINE)
    info = conn.info
    click.echo(f"database {info.dbname} on {info.host}:{info.port} as {info.user}")
    for row in db.execute(conn, OBJECTS):
        kept = "checked" if row.name.startswith("function") else "kept"
        click.echo(f"  {kept if row.name in before else 'created':7}  {row.name}")
    for (step, status), stage in routes.items():
        known = before_routes.get((step, status)) == stage
        click.echo(f"  {'kept' if known else 'routed':7}  ({step}, {status}) → {stage}")
    for step, status in before_routes.keys() - routes.keys():
        click.echo(f"  removed  ({step}, {status}) → {before_routes[step, status]}")
    orphans = db.execute(conn, ORPHANS, {"stages": list(routes.values())}).fetchone()[0]
    if orphans:
        click.echo(f"  note: {orphans} open calls belong to stages that PIPELINE no longer has")
    click.echo("Next: python listener.py verify, then python listener.py")


DROP = """
DROP TRIGGER IF EXISTS job_state_change_trigger ON jobs;
DROP TRIGGER IF EXISTS job_state_insert_trigger ON jobs;
DROP FUNCTION IF EXISTS notify_job_state_change();
DROP TABLE IF EXISTS stage_attempts, stage_calls, pipeline_stages;
"""

OPEN_CALLS = "SELECT count(*) FROM stage_calls"


@click.command(short_help="Remove what install made; jobs and its rows stay.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def uninstall(yes: bool) -> None:
    """Remove exactly what install made. The table jobs and its rows stay."""
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener uninstall")
    there = [row.name for row in db.execute(conn, OBJECTS) if row.name != "table jobs"]
    if not there:
        click.echo("nothing to remove")
        return
    click.echo(f"database {conn.info.dbname} on {conn.info.host}:{conn.info.port}: this removes")
    for name in there:
        click.echo(f"  {name}")
    if "table stage_calls" in there:
        count = db.execute(conn, OPEN_CALLS).fetchone()[0]
        click.echo(f"and with them {count} open calls and the history. jobs is not touched.")
    if not yes:
        click.confirm("Remove?", abort=True)
    try:
        db.execute(conn, LOCK_TIMEOUT + DROP)
    except psycopg2.errors.LockNotAvailable:
        raise Problem(
            "jobs is locked by another transaction; nothing was removed: try again"
        ) from None
    click.echo("removed")
