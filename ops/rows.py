"""The row that a command is about: its id on the command line, where it is, what it owes."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import click
import psycopg2
from psycopg2.extensions import quote_ident

import config
import db
import pipeline
from ops import migrations
from ops.problem import GRANTS, IF_NEWER, INSTALL, Problem, first_line
from ops.stage import StageName
from ops.tables import tenant_columns
from pipeline import Route, Table

# --- on the command line -------------------------------------------------------------------


class RowCommand(click.Command):
    """A command with ids as arguments. An id may begin with a dash, which click would take for an
    option. No command of ours has options of one letter, so only two dashes begin an option; an id
    with two dashes comes after `--`.
    """

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        valued = {name for p in self.params if not getattr(p, "is_flag", True) for name in p.opts}
        options: list[str] = []
        ids: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                ids.extend(words)
            elif word in valued:
                value = next(words, None)
                if value is None:
                    return super().parse_args(context, args)  # click reports the mistake
                options += [word, value]
            else:
                (options if word.startswith("--") else ids).append(word)
        return super().parse_args(context, [*options, "--", *ids])


class TableName(StageName):
    """A table of PIPELINE."""

    name = "table"

    def names(self) -> list[str]:
        return list(pipeline.tables())


class OwingTable(TableName):
    """Accepts any name but a blank: rows of a table that left PIPELINE may still owe calls. Once
    there is a connection, require_table() checks the name.
    """

    def convert(self, value: str, param, context) -> str:
        return value if value.strip() else super().convert(value, param, context)


TABLE = click.option(
    "--table",
    type=OwingTable(),
    metavar="TABLE",
    help="The table of the row, where its id is in more than one.",
)


def typed(command: str, row: Any, *options: str) -> str:
    """The command line that does `command` to `row`."""
    return pipeline.typed(command, row.table_name, row.key, *options, with_table=row.is_one_of_many)


# --- the connection ------------------------------------------------------------------------

INSTALLED = "SELECT to_regclass('stage_calls') IS NOT NULL"


def connected(command: str) -> db.Connection:
    """A connection to a database whose tables this program can use.

    Raises:
        Problem: the tables are missing, or of another version.
    """
    conn = db.connect(config.settings(), f"job-state-listener {command}")
    require_tables(conn)
    return conn


def require_tables(conn) -> None:
    """Raises Problem where our tables are missing, or of a version that this program cannot use."""
    if not db.execute(conn, INSTALLED).fetchone()[0]:
        raise Problem(f"the listener's tables are missing: {INSTALL}")
    if refusal := migrations.refusal(conn):
        raise Problem(refusal)


# Which session keeps us out of one of our tables, to which we write, or of a table of PIPELINE: it
# has a lock that excludes us, or any that another one's AccessExclusiveLock waits for, as all later
# statements wait behind that one. A server may have thousands of locks, so those of these tables
# are picked out first. The database is compared, as a copy of it has the same relation ids. A
# prepared transaction has no pid.
LOCKED = """
WITH locks AS MATERIALIZED (
    SELECT pid, relation, mode, granted FROM pg_locks
    WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND relation IN (SELECT to_regclass(quote_ident(name))
                       FROM unnest(%(tables)s::text[]) AS name)
)
SELECT l.relation::regclass::text AS name, l.pid, a.application_name
FROM locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND (l.mode = 'AccessExclusiveLock'
       OR l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock')
          AND l.relation IN (SELECT to_regclass(name) FROM unnest(%(ours)s::text[]) AS name)
       OR EXISTS (SELECT FROM locks AS w
                  WHERE w.mode = 'AccessExclusiveLock' AND NOT w.granted
                    AND w.pid IS DISTINCT FROM l.pid AND w.relation = l.relation))
ORDER BY (l.relation IN (SELECT to_regclass(quote_ident(name))
                         FROM unnest(%(likely)s::text[]) AS name)) IS TRUE DESC,
         a.xact_start, l.pid
LIMIT 1
"""


def locked(conn, *likely: str) -> str:
    """Which table is locked, and by whom, after lock_timeout has ended a statement; of several, one
    of `likely`. It may be no more.
    """
    ours = [*migrations.TABLES]
    given = {"tables": [*pipeline.tables(), *ours], "ours": ours, "likely": [*likely]}
    found = db.execute(conn, LOCKED, given).fetchone()
    if found is None:
        return "another transaction holds a lock on a table or row"
    return f"{found.name} is locked by {server_process(found)}"


# The oldest transaction is the one that does not end: claims take such a lock for a moment. Of a
# session of another role, which is none of ours, it may not be known when it began.
LIMIT_LOCKED = """
SELECT l.pid, a.application_name
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.relation = to_regclass('stage_limits') AND l.granted
  AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.mode IN ('RowShareLock', 'RowExclusiveLock')
ORDER BY a.xact_start NULLS FIRST, l.pid
LIMIT 1
"""


def locked_limit(conn) -> str:
    """That the row of a limit is locked, and by whom. It may be no more."""
    found = db.execute(conn, LIMIT_LOCKED).fetchone()
    if found is None:
        return "another transaction holds a lock on the row of its limit in stage_limits"
    return f"the row of its limit in stage_limits is locked by {server_process(found)}"


def server_process(found: Any) -> str:
    if found.pid is None:
        return "a prepared transaction (see pg_prepared_xacts)"
    name = f" ({found.application_name})" if found.application_name else ""
    return f"server process {found.pid}{name}"


OWING = """
SELECT EXISTS (SELECT FROM stage_calls WHERE table_name = %(table)s
               UNION ALL SELECT FROM pipeline_tables WHERE name = %(table)s)
"""


def require_table(conn, table: str | None) -> None:
    """Raises BadParameter unless `table` is in PIPELINE, here or in the database, or its rows still
    owe calls.
    """
    if table is None or table in pipeline.tables():
        return
    if not db.execute(conn, OWING, {"table": table}).fetchone()[0]:
        context = click.get_current_context()
        [option] = [param for param in context.command.params if "--table" in param.opts]
        TableName().convert(table, option, context)


# --- which row -----------------------------------------------------------------------------


class NoId(Exception):
    """The text given cannot be an id: the type of the id column does not allow it."""


# Converts the id and nothing else, so that an error can only be about the id.
KEY = """
SELECT coalesce(c.job_id, %(id)s)::text AS key
FROM (VALUES (1)) AS always LEFT JOIN stage_calls AS c ON false
"""

# A table that left PIPELINE has no row in pipeline_tables, and its rows cannot be read; they may
# still owe calls. stage_call_row() knows no table '', and reads nothing.
PLACES = """
SELECT %(key)s AS key, t.name AS table_name, at.is_there IS NOT NULL AS is_there,
       at.tenant_id, at.current_step, at.status, at.parent_id::text,
       EXISTS (SELECT FROM stage_calls AS c
               WHERE c.job_id = %(key)s AND c.table_name = t.name) AS owes,
       EXISTS (SELECT FROM stage_attempts AS a
               WHERE a.job_id = %(key)s AND a.table_name = t.name)
       OR EXISTS (SELECT FROM stage_leases AS l
                  WHERE l.job_id = %(key)s AND l.table_name = t.name) AS has_history,
       %(table)s IS NOT NULL OR %(unread)s::text[] <> '{}' AS is_one_of_many,
       t.position IS NOT NULL AS is_known, t.name = ANY (%(unread)s::text[]) AS is_unread
FROM (SELECT name, position FROM pipeline_tables
      UNION ALL
      SELECT DISTINCT c.table_name, NULL::integer FROM stage_calls AS c
      WHERE c.job_id = %(key)s AND c.table_name NOT IN (SELECT name FROM pipeline_tables)) AS t
LEFT JOIN LATERAL stage_call_row(
    CASE WHEN t.name = ANY (%(unread)s::text[]) THEN '' ELSE t.name END, '', %(key)s) AS at ON true
WHERE %(table)s IS NULL OR t.name = %(table)s
ORDER BY t.position, t.name
"""


def key_of(conn, id_: str) -> str:
    """An id as the database writes it. Raises NoId."""
    try:
        return db.execute(conn, KEY, {"id": id_}).fetchone().key
    except psycopg2.DataError as error:
        raise NoId(f"not a job id of this database: {first_line(error)}") from None


READ = "SELECT stage_call_row(name, '', NULL) FROM unnest(%(tables)s::text[]) AS t (name)"


def unreadable(conn) -> dict[str, psycopg2.Error]:
    """The tables of PIPELINE that cannot be read just now."""
    tables = [*pipeline.tables()]

    def ask(conn, table: str | None = None) -> None:
        db.execute(conn, READ, {"tables": [table] if table else tables})

    _, failed = db.in_parts(conn, ask, tables, all_parts=True)
    return {table: failed[table] for table in tables if table in failed}


def unread(conn) -> dict[str, str]:
    """The tables of PIPELINE that cannot be read just now, and why."""
    return {table: why_unread(conn, error, table) for table, error in unreadable(conn).items()}


# What to run or read, by the kind of error.
MENDS: dict[type[psycopg2.Error], str] = {
    psycopg2.errors.InsufficientPrivilege: GRANTS,
    psycopg2.errors.UndefinedColumn: f"{pipeline.JSL} verify",
    psycopg2.errors.UndefinedTable: f"{pipeline.JSL} verify",
}


def why_unread(conn, error: psycopg2.Error, table: str) -> str:
    if isinstance(error, psycopg2.errors.LockNotAvailable):
        return f"{locked(conn, table)}: try again"
    mend = MENDS.get(type(error))
    return ": ".join(filter(None, [first_line(error), mend]))


def told(unread: Mapping[str, str]) -> str:
    """What unread() has found, in one line."""
    return "; ".join(f"{table} cannot be read: {reason}" for table, reason in unread.items())


def find(
    conn, id_: str, table: str | None = None, unread: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """The row with this id: where it is, or that it was deleted.

    Args:
        unread: the tables that are not to be read; of their rows it is known what they owe.

    Raises:
        NoId
        Problem: there is none, or more than one.
    """
    require_table(conn, table)
    key = key_of(conn, id_)
    given = {"key": key, "table": table, "unread": [*unread]}
    try:
        places = db.execute(conn, PLACES, given).fetchall()
    except db.ConnectionLost:
        raise
    except psycopg2.Error:
        ask_for_table(conn, key, table)
        raise
    known = known_of(places)
    if not known and unread:
        raise Problem(f"{key} is in no table that can be read; {told(unread)}")
    if not known:
        missing = pipeline.tables().keys() - {row.table_name for row in places}
        if table in missing or (table is None and missing):
            raise Problem(f"{key} cannot be found: {OTHER_PIPELINE}")
        names = [row.table_name for row in places]
        where = f" in {' or '.join(names)}" if len(names) > 1 else ""
        what = "row" if where else word_for(*names or [pipeline.JOBS.name])
        raise Problem(f"there is no {what} {key}{where}")
    if len(known) > 1:
        names = [row.table_name for row in known]
        options = " or ".join(f"--table {name}" for name in names)
        raise Problem(f"{key} is in {' and in '.join(names)}: give {options}")
    return known[0]


def ask_for_table(conn, key: str, table: str | None) -> None:
    """Raises Problem where no `table` was given, and some can be read and some cannot."""
    found = {} if table else unread(conn)
    readable = [name for name in pipeline.tables() if name not in found]
    if found and readable:
        options = " or ".join(f"--table {name}" for name in readable)
        raise Problem(f"{told(found)}; if {key} is a row of another table, give {options}")


def known_of(places: list) -> list:
    """Of an id's places (one per table): those where a row exists or owes a call; if there are
    none, those with a history of a deleted row.
    """
    known = [row for row in places if row.is_there or row.owes]
    return known or [row for row in places if row.has_history]


def places(conn, key: str, unread: Mapping[str, str]) -> list:
    """The rows with this id in all tables. Where there are several, is_one_of_many is set, so that
    the commands shown for them name the table.
    """
    given = {"key": key, "table": None, "unread": [*unread]}
    found = known_of(db.execute(conn, PLACES, given).fetchall())
    return [row._replace(is_one_of_many=row.is_one_of_many or len(found) > 1) for row in found]


def names_tables(found: Iterable[Any]) -> bool:
    """Whether a list of rows has to name the table of each, as their ids may be in several."""
    return len({*pipeline.tables(), *(row.table_name for row in found)}) > 1


def word_for(table: str) -> str:
    """What a row of `table` is called."""
    return "job" if table == pipeline.JOBS.name else table


def said(row: Any) -> str:
    return f"{word_for(row.table_name)} {row.key}"


OTHER_PIPELINE = (
    "this program has another PIPELINE than the database: use the one that was installed"
)


def is_readable(row: Any) -> bool:
    """Whether the row's table is in PIPELINE, here and in the database."""
    return row.is_known and row.table_name in pipeline.tables()


def has_left(row: Any) -> bool:
    """Whether the row's table left PIPELINE. Where only this program or only the database lacks it,
    the other PIPELINE may want what the row owes.
    """
    return not row.is_known and row.table_name not in pipeline.tables()


def absence(row: Any) -> str:
    """Why nothing is known of a row: it was deleted, or its table cannot be read, or is not in
    PIPELINE.
    """
    if row.is_unread:
        return "cannot be read"
    return "was deleted" if is_readable(row) else f"cannot be read: {gone_table(row)}"


def was_deleted(row: Any) -> bool:
    return not (row.is_there or row.is_unread) and is_readable(row)


def gone_table(row: Any) -> str:
    return f"PIPELINE has no table {row.table_name}" if has_left(row) else OTHER_PIPELINE


def require_readable(row: Any) -> None:
    """Raises Problem where the row's table is not in PIPELINE."""
    if not is_readable(row):
        mend = f"; to drop what it owes: {typed('cancel', row)}" if has_left(row) else ""
        raise Problem(f"{said(row)} {absence(row)}{mend}")


# --- what it owes --------------------------------------------------------------------------

# When a call is due. As in pipeline_overview, one without any attempt is due whatever the clock
# says.
DUE_AT = """CASE WHEN c.attempts = 0 AND c.due_at < 'infinity'
                 THEN greatest(least(c.due_at, now()), c.run_after) ELSE c.due_at END"""

# The state that owes a call, and whether the database's PIPELINE still has it.
CALLED_FROM = """c.table_name, c.current_step, c.status,
       EXISTS (SELECT FROM pipeline_stages AS p
               WHERE (p.table_name, p.join_of, p.current_step, p.status)
                     = (c.table_name, c.join_of, c.current_step, c.status)) AS has_state"""

OWED = f"""
SELECT join_of, call_id, stage, attempts, attempts - free_attempts AS spent, worker, started_at,
       due_at, due_at = 'infinity' AS given_up, last_error,
       CASE WHEN due_at < 'infinity'
            THEN round(extract(epoch FROM greatest({DUE_AT}, l.leased_until) - now()))::bigint
       END AS due_in_seconds,
       coalesce(l.working, false) AS working, coalesce(l.unanswered, false) AS unanswered,
       l.leased_until, stage IN (SELECT stage FROM pipeline_stages) AS has_route,
       {CALLED_FROM}
FROM stage_calls AS c
LEFT JOIN LATERAL (SELECT working, unanswered, leased_until FROM stage_leases
                   WHERE call_id = c.call_id AND leased_until > now()
                   ORDER BY attempt DESC LIMIT 1) AS l ON true
WHERE job_id = %(key)s AND table_name = %(table)s
ORDER BY join_of
"""


def owed(conn, row: Any) -> list:
    """The calls that `row` owes: its own first, then those of its joins."""
    return db.execute(conn, OWED, {"key": row.key, "table": row.table_name}).fetchall()


def is_wanted(call: Any) -> bool:
    """Whether PIPELINE, here or in the database, has the stage of a call, and the state that owes
    it; else nobody calls it.
    """
    return (call.has_route or call.stage in pipeline.stage_names()) and not lost_state(call)


def owing(call: Any) -> Route:
    """The state that owes a call."""
    return Route(call.table_name, call.join_of, call.current_step, call.status)


def lost_state(call: Any) -> Route | None:
    """The state that owes a call, where PIPELINE, here and in the database, has it no more."""
    return None if call.has_state or owing(call) in pipeline.routes() else owing(call)


def lost(call: Any) -> str:
    """What PIPELINE has no more of a call that is not wanted."""
    return str(lost_state(call)) if call.has_route else f"stage {call.stage}"


def require_state(row: Any, call: Any) -> None:
    """Raises Problem where PIPELINE here does not have the state that owes a call."""
    if (route := owing(call)) not in pipeline.routes():
        mend = f"{INSTALL}, {IF_NEWER}" if call.has_state else typed("cancel", row)
        raise Problem(f"{said(row)}: PIPELINE has no {route}: {mend}")


def one_owed(conn, row: Any, stage: str | None) -> Any:
    """The one call that `row` owes, to `stage` if given; or None.

    Raises:
        Problem: it owes calls to several stages.
    """
    found = [call for call in owed(conn, row) if stage in (None, call.stage)]
    stages = list(dict.fromkeys(call.stage for call in found))
    if len(stages) > 1:
        options = " or ".join(f"--stage {name}" for name in stages)
        raise Problem(f"{said(row)} owes calls to {' and '.join(stages)}: give {options}")
    return found[0] if found else None


# --- rows of a table -----------------------------------------------------------------------

# A column without a time zone does not say when something happened, so it is not used.
TIME_COLUMN = """
SELECT attname FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attname IN ('updated_at', 'created_at')
  AND NOT attisdropped AND atttypid = 'timestamptz'::regtype
ORDER BY attname DESC
LIMIT 1
"""


def time_column(conn, table: Table) -> str | None:
    """The column that says when a row last changed, or at least when it was made."""
    found = db.execute(conn, TIME_COLUMN, {"table": quote_ident(table.name, conn)}).fetchone()
    return found and found.attname


def names(conn, table: Table) -> dict[str, str]:
    """The names of `table` (aliased as r) and its columns, quoted for use in a statement.

    Statements read only these columns: another one may hold megabytes, or values that psycopg2
    cannot convert.
    """

    def quoted(name: str) -> str:
        return quote_ident(name, conn).replace("%", "%%")

    found = {
        "table": quoted(table.name),
        "name": "'" + table.name.replace("'", "''").replace("%", "%%") + "'",
        "id": f"r.{quoted(table.id)}",
        "parent": f"r.{quoted(table.parent[1])}" if table.parent else "NULL",
        "tenant": "NULL::text",
        # As the trigger copies them.
        "priority": "0",
        "run_after": "NULL::timestamptz",
        "beside": "",
    }
    if table.priority:
        value = f"coalesce(r.{quoted(table.priority)}, 0)"
        found["priority"] = f"least(greatest({value}, -2147483648), 2147483647)::integer"
    if table.run_after:
        value = f"r.{quoted(table.run_after)}"
        found["run_after"] = f"CASE WHEN {value} IS NOT NULL THEN least({value}, '9999-12-31') END"
    # A row without a tenant of its own has that of its parent, or of a row further up.
    of, alias, tenants = table, "r", tenant_columns(conn)
    while of.parent and not tenants[of.name]:
        parent, above = pipeline.tables()[pipeline.parent_name(of) or ""], f"above_{alias}"
        found["beside"] += (
            f" LEFT JOIN {quoted(parent.name)} AS {above}"
            f" ON {above}.{quoted(parent.id)} = {alias}.{quoted(of.parent[1])}"
        )
        of, alias = parent, above
    if tenant := tenants[of.name]:
        found["tenant"] = f"{alias}.{quoted(tenant)}::text"
    return found


# Rows of a table, each with the call that it owes; where it owes none, with its call under way (its
# stage has set it running already). A row that owes several calls is listed once for each.
LISTED = f"""
SELECT {{name}}::text AS table_name, {{id}}::text AS job_id, {{tenant}} AS tenant_id,
       r.current_step::text AS current_step, r.status::text AS status,
       coalesce(c.join_of, '') AS join_of, coalesce(c.stage, l.stage) AS stage, {{time}} AS since,
       coalesce(c.due_at = 'infinity', false) AS given_up,
       CASE WHEN c.stage IS NULL THEN l.worker ELSE c.worker END AS worker,
       CASE WHEN c.stage IS NULL THEN l.started_at ELSE c.started_at END AS started_at,
       CASE WHEN c.due_at = 'infinity' THEN NULL
            ELSE round(extract(epoch FROM greatest({DUE_AT}, CASE
                     WHEN c.call_id IS NULL OR c.call_id = l.call_id THEN l.leased_until END)
                 - now()))::bigint
       END AS due_in_seconds, c.last_error, coalesce(l.working, false) AS working,
       coalesce(l.unanswered AND c.stage IS NULL, false) AS unanswered, l.leased_until
FROM {{table}} AS r {{beside}}
LEFT JOIN stage_calls AS c ON c.job_id = {{id}} AND c.table_name = {{name}}
LEFT JOIN (SELECT DISTINCT ON (job_id) * FROM stage_leases
           WHERE leased_until > now() AND table_name = {{name}}
           ORDER BY job_id, started_at DESC) AS l ON l.job_id = {{id}}
"""

# --- what follows --------------------------------------------------------------------------


def own_stage(row: Any) -> str | None:
    """The stage that follows from the row's own state."""
    route = Route(row.table_name, "", row.current_step, row.status)
    function = pipeline.routes().get(route)
    return function and function.__name__


def way_on(row: Any, stage: str) -> str:
    """What a person types so that `stage` is called for a row that owes nothing."""
    if stage == own_stage(row):  # an UPDATE to the state that it has would change nothing
        return typed("again", row)
    if any(function.__name__ == stage and route.table == row.table_name and not route.join
           for route, function in pipeline.routes().items()):  # fmt: skip
        return pipeline.sent_back(row.table_name, row.key, stage, (row.current_step, row.status))
    return typed("again", row, "--stage", stage)


def way_to_join(row: Any, join: str, stage: str) -> str:
    """What a person types so that the call of a join of `row`, which leads to `stage`, is made."""
    leading = [route for route, function in pipeline.routes().items()
               if function.__name__ == stage and route.table == row.table_name]  # fmt: skip
    return typed("again", row, *(["--join", join] if len(leading) > 1 else ["--stage", stage]))


def wait_first(row: Any, stage: str) -> str:
    """What to wait for before a person calls a stage again: `stage` may still work on the row."""
    is_running = (row.current_step, row.status) == (stage, "running")
    after = f"once this has lasted longer than the timeout of {stage}, "
    return after if is_running and stage in pipeline.stage_names() else ""
