"""Which calls `retry` and `cancel` are about: chosen by options, shown, and then done to."""

import functools
from collections.abc import Callable, Iterator
from datetime import datetime
from json import dumps
from typing import Any, NamedTuple

import click

import db
import pipeline
from logs import CONTROL
from ops import rows
from ops.problem import Problem
from ops.rows import TABLE
from ops.since import Since
from ops.stage import OwedStage, StageName
from ops.table import clipped, duration, plain, readable, table
from ops.text import Text

# --- which calls ---------------------------------------------------------------------------

BATCH = 1000  # calls of one statement, so that none runs long
# Time limit, in seconds, for finding the calls: with --tenant, a row without a tenant of its own
# costs a look at its parent.
PATIENCE = 60.0


class Chosen(NamedTuple):
    """The filters of `retry` and `cancel`; without any, all calls match."""

    job_id: str | None = None
    table: str | None = None
    stage: str | None = None
    tenant: str | None = None
    error: str | None = None  # a text that the last error contains
    since: datetime | None = None  # the last attempt, or else the recording, is not older
    now: bool = False  # `retry`: also calls that wait for their next attempt

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of MATCHING. A stored error may have its letters escaped as in JSON, while
        commands show them decoded: so both spellings are searched for.
        """
        error = self.error if self.error is None else self.error.lower()
        errors = error if error is None else [error, dumps(error)[1:-1]]
        return self._asdict() | {"errors": errors, "batch": BATCH, "ids": None, "call_ids": None}


# ids and call_ids: those of a batch that FOUND has found.
MATCHING = """
      (%(ids)s IS NULL OR c.job_id = ANY (%(ids)s) AND c.call_id = ANY (%(call_ids)s::bigint[]))
  AND (%(job_id)s IS NULL OR c.job_id = %(job_id)s)
  AND (%(table)s::text IS NULL OR c.table_name = %(table)s)
  AND (%(stage)s::text IS NULL OR c.stage = %(stage)s)
  AND (%(errors)s::text[] IS NULL OR EXISTS (
       SELECT FROM unnest(%(errors)s::text[]) AS e WHERE strpos(lower(c.last_error), e) > 0))
  AND (%(since)s::timestamptz IS NULL OR %(since)s <= coalesce(
       (SELECT max(a.finished_at) FROM stage_attempts AS a
        WHERE a.job_id = c.job_id AND a.call_id = c.call_id), c.created_at))
  AND (%(tenant)s::text IS NULL OR left(%(tenant)s, 500) = left(coalesce(
       c.tenant_id, (stage_call_row(c.table_name, '', c.job_id)).tenant_id #>> '{}'), 500))"""

PATIENTLY = f"SET LOCAL statement_timeout = '{PATIENCE:.0f}s'; "
LISTED = f"""
{PATIENTLY}
SELECT c.job_id::text, c.table_name, c.stage, c.last_error, count(*) OVER () AS calls,
       extract(epoch FROM now() - c.created_at)::float8 AS seconds
FROM stage_calls AS c
WHERE {{matching}}
ORDER BY c.created_at DESC, c.job_id
LIMIT %(most)s
"""

# A statement that locks what it finds would hold its first call until it has found the last, and
# the application waits for that.
FOUND = f"""
{PATIENTLY}
SELECT array_agg(job_id)::text AS ids, array_agg(call_id)::text AS call_ids
FROM (SELECT c.job_id, c.call_id, (row_number() OVER () - 1) / %(batch)s AS batch
      FROM stage_calls AS c
      WHERE {{matching}}) AS found
GROUP BY batch
"""

# --- the options of retry and cancel -------------------------------------------------------

FILTERS = [
    click.option("--stage", type=OwedStage(), metavar="STAGE", help="Calls to this stage."),
    click.option("--tenant", type=Text(), metavar="TENANT",
                 help="Calls of this tenant; of other rows by their parent's."),
    click.option("--error", type=Text(), metavar="TEXT",
                 help="Calls whose last error has this text in it, in capital letters or not."),
    click.option("--since", type=Since(), metavar="SPAN|TIME",
                 help="Calls last tried since, or recorded where they never were: 30m, 2h, 3d, "
                 "2026-11-24."),
    click.option("--all", "all_", is_flag=True, help="All of them."),
    click.option("--yes", is_flag=True,
                 help="Do it. Without it, what is chosen without an id is only shown."),
    TABLE,
]  # fmt: skip


def filters(command: Callable) -> Callable:
    """The command with the options that choose calls."""
    return functools.reduce(lambda made, option: option(made), reversed(FILTERS), command)


def require_choice(command: str, job_ids: tuple, chosen: Chosen, all_: bool) -> Any:
    """Check that a command was given either ids or filters or --all; then its connection."""
    narrowed = [chosen.tenant, chosen.error, chosen.since]
    is_filtered = bool(chosen.stage) or any(value is not None for value in narrowed)
    fault = None
    if job_ids and (all_ or any(value is not None for value in narrowed)):
        fault = "Job ids go with --stage and --table only."
    elif not (job_ids or all_ or is_filtered):
        fault = "Give job ids, or some of --stage, --tenant, --error and --since, or --all."
    elif all_ and is_filtered:
        fault = "--all goes without --stage, --tenant, --error and --since."
    if fault:
        raise click.UsageError(fault, click.get_current_context())
    conn = rows.connected(command)
    if chosen.stage:
        require_stage(conn, chosen.stage)
    rows.require_table(conn, chosen.table)
    return conn


OWES = "SELECT EXISTS (SELECT FROM stage_calls WHERE stage = %(stage)s)"


def require_stage(conn, stage: str) -> None:
    """Raises BadParameter unless `stage` is in PIPELINE, or calls to it are still owed."""
    context = click.get_current_context()
    if not db.execute(conn, OWES, {"stage": stage}).fetchone()[0]:
        [option] = [p for p in context.command.params if p.name == "stage"]
        StageName().convert(stage, option, context)


MOST_SHOWN = 20


def show(conn, sql: str, chosen: Chosen, all_: bool, to: str) -> int:
    """A dry run: print the calls that match and the command that would act on them.

    Returns:
        How many calls match.
    """
    found = patiently(conn, sql, chosen.params | {"most": MOST_SHOWN})
    if not found:
        return 0
    with_table = rows.names_tables(found)
    cells = [[row.job_id, row.stage, duration(round(max(0.0, row.seconds))),
              clipped(plain(readable(row.last_error) or "-"), 60),
              *([row.table_name] if with_table else [])] for row in found]  # fmt: skip
    header = ["job", "stage", "owed for", "last error", *(["table"] if with_table else [])]
    click.echo(table(header, cells, right=["owed for"]))
    if found[0].calls > len(found):
        click.echo(f"and {found[0].calls - len(found)} more")
    count = "1 call" if found[0].calls == 1 else f"{found[0].calls} calls"
    click.echo(f"{count}, nothing was changed; {to}: {as_typed(chosen, all_)}".translate(CONTROL))
    return found[0].calls


def as_typed(chosen: Chosen, all_: bool) -> str:
    """The command line that acts on the calls just shown; --since is given as a fixed time."""
    context = click.get_current_context()
    words = [context.info_name or "", *["--all"] * all_, *["--now"] * chosen.now]
    if (reason := context.params.get("reason")) and "reason" in given_by_hand(context):
        words += [f"--reason={reason}"]
    for name in ("stage", "tenant", "error", "table"):
        if (value := getattr(chosen, name)) is not None:
            words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    if chosen.since:
        words += ["--since", chosen.since.isoformat(timespec="seconds")]
    return " ".join([pipeline.JSL, *map(pipeline.in_shell, [*words, "--yes"])])


def given_by_hand(context: click.Context) -> list[str]:
    source = click.core.ParameterSource.COMMANDLINE
    return [name for name in context.params if context.get_parameter_source(name) == source]


def patiently(conn, sql: str, given: dict[str, Any]) -> list:
    """The rows of LISTED or FOUND. Any other statement has the usual deadline, as one that changes
    something may wait for a commit that nobody confirms.
    """
    conn.deadline = PATIENCE + db.DEADLINE
    try:
        return db.execute(conn, sql, given).fetchall()
    finally:
        conn.deadline = db.DEADLINE


def in_batches(conn, found: str, sql: str, given: dict[str, Any]) -> Iterator[Any]:
    """Run `sql` for all calls that `found` finds, but for those that another transaction holds;
    yields its rows.
    """
    for batch in patiently(conn, found, given):
        yield from db.execute(conn, sql, given | batch._asdict())


def tell(did: str, done: list) -> None:
    """Print the first of the calls that were changed, and how many more there are."""
    for call in done[:MOST_SHOWN]:
        click.echo(f"{did}: {rows.said(call)}, stage {call.stage}".translate(CONTROL))
    if len(done) > MOST_SHOWN:
        click.echo(f"and {len(done) - MOST_SHOWN} more")


def refuse_left(conn, sql: str, chosen: Chosen) -> None:
    """Raises Problem where calls match still: another transaction holds them, or they match only
    since.
    """
    left = patiently(conn, sql, chosen.params | {"most": 1})
    if left:
        count = "1 call is" if left[0].calls == 1 else f"{left[0].calls} calls are"
        held = "another transaction holds them, or they match only since: look again"
        raise Problem(f"{count} left: {held}")
