"""Whether the database has what this PIPELINE needs: its routes, our tables and triggers."""

import psycopg2

import db
import stages
from ops import migrations
from ops.problem import Problem

ROUTES = "SELECT current_step, status, stage, max_running FROM pipeline_stages"

Route = tuple[str, int | None]  # stage, max_running


def routes_of(pipeline: dict) -> dict[tuple[str, str], Route]:
    """What leads where, and how many of it may run at once."""
    return {
        state: (function.__name__, getattr(function, "limits", stages.Limits()).max_running)
        for state, function in pipeline.items()
    }


def routes_in(conn) -> dict[tuple[str, str], Route]:
    """The routes as the last install wrote them."""
    found = db.execute(conn, ROUTES)
    return {(row.current_step, row.status): (row.stage, row.max_running) for row in found}


def shown(route: Route | None) -> str:
    if route is None:
        return "nothing"
    return route[0] if route[1] is None else f"{route[0]} (max_running {route[1]})"


def difference(conn) -> list[str]:
    """What PIPELINE and pipeline_stages do not agree on, in words."""
    ours, theirs = routes_of(stages.PIPELINE), routes_in(conn)
    return [
        f"{state[0]}, {state[1]} → {shown(ours.get(state))} in stages.py, "
        f"{shown(theirs.get(state))} in the database"
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
        differences, refusal = difference(conn), migrations.refusal(conn)
    except psycopg2.errors.UndefinedTable:
        raise Problem(f"the listener's tables are missing: {mend}") from None
    except psycopg2.errors.InsufficientPrivilege as error:
        reason = str(error).strip()
        raise Problem(f"{reason}: see 'Roles and grants' in README.md") from None
    if refusal:
        raise Problem(refusal)
    if differences:
        raise Problem(f"the routes differ ({'; '.join(differences)}): {mend}")
    place = db.execute(conn, PLACE).fetchone()
    if place.jobs is None:
        raise Problem(f"there is no table jobs on the search path: {mend}")
    if place.schemas != 1 or place.triggers != 2:
        raise Problem(f"the table {place.jobs} that this role sees has no triggers of ours: {mend}")


SILENT = """
SELECT tgnargs > 0 FROM pg_trigger
WHERE tgrelid = to_regclass('jobs') AND tgname = 'job_state_change_trigger'
"""


def is_silent(conn) -> bool:
    """Whether `install --no-notify` made the triggers, so that no bell rings."""
    return db.execute(conn, SILENT).fetchone()[0]
