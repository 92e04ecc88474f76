"""`verify`: checks everything the listener needs; a line each, with the command that mends it."""

import os
import re
import select
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

import click
import psycopg2

import config
import db
import hosts
import notifications
import pipeline
import stage_http
from ops import grants, migrations, place, rows
from ops.misplaced import misplaced
from ops.problem import GRANTS, IF_NEWER, first_line, mend_of
from ops.routes import (
    announced,
    broken_triggers,
    difference,
    installed,
    trigger_function,
    triggers,
)
from ops.table import counted
from ops.tables import faults, impossible_states
from pipeline import JSL

INSTALL = f"{JSL} install"
AGAIN = f"{JSL} uninstall, then install"
ONCE_MORE = f"{JSL} verify, once more"

COLUMNS = """
SELECT array_agg(attname::text) AS names,
       max(format_type(atttypid, atttypmod)) FILTER (WHERE attname = %(id)s) AS id_type
FROM pg_attribute
WHERE attrelid = to_regclass(quote_ident(%(table)s)) AND attnum > 0 AND NOT attisdropped
"""

# The columns of our tables that a listener needs.
NEEDED = {
    "pipeline_tables": {"name", "id_column", "parent_table", "parent_column", "channel"},
    "pipeline_stages": {"table_name", "join_of", "current_step", "status", "stage", "max_running",
                        "held_until", "held_by", "asynchronous"},
    "stage_calls": {"job_id", "table_name", "join_of", "call_id", "stage", "due_at", "attempts",
                    "free_attempts", "worker"},
    "stage_looks": {"parent_id", "join_of", "arrived"},
    "stage_joins": {"parent_id", "join_of", "is_open", "recorded_at", "is_noted"},
    "stage_limits": {"name", "stages", "max_running", "seconds", "next_at", "linger"},
    "stage_leases": {"job_id", "table_name", "call_id", "attempt", "stage", "worker",
                     "leased_until", "unanswered", "working"},
    "stage_moves": {"job_id", "table_name", "stage", "moved_at"},
    "stage_attempts": {"job_id", "table_name", "call_id", "attempt", "stage", "outcome",
                       "finished_at", "spent"},
    "stage_totals": {"stage", "outcome", "within_seconds", "attempts", "microseconds"},
    "stage_totals_mark": {"counted_until"},
    "job_state_listener_schema": {"version"},
}  # fmt: skip

# The text of the function has the schema that the tables had when it was made.
FUNCTION = """
SELECT p.prosecdef AS definer,
       p.proconfig::text LIKE '%%search_path=pg_catalog%%' AS pinned,
       strpos(p.prosrc, format('%%I.stage_calls', n.nspname)) > 0
           AND to_regprocedure(format('%%I.stage_column_types(regclass, text[])', n.nspname))
               IS NOT NULL AS here,
       NOT (SELECT rolsuper FROM pg_roles WHERE oid = c.relowner) AND (
           SELECT bool_or(f.proowner <> c.relowner) FROM pg_proc AS f
           WHERE f.oid IN (p.oid, to_regprocedure('stalled_jobs()'),
                           to_regprocedure('resting_rows()'))) AS lent
FROM pg_proc AS p, pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE p.oid = to_regprocedure(quote_ident(%(function)s) || '()')
  AND c.oid = to_regclass(quote_ident(%(table)s))
"""

# The functions that the listener and the commands call, whatever their argument types.
FUNCTIONS = """
SELECT name, p.oid IS NOT NULL AS there, has_function_privilege(p.oid, 'EXECUTE') AS may_execute
FROM unnest(ARRAY['stage_call_row', 'stage_join_is_complete', 'stage_due_calls']) AS name
JOIN pg_class AS c ON c.oid = to_regclass('stage_calls')
LEFT JOIN pg_proc AS p ON p.proname = name AND p.pronamespace = c.relnamespace
"""

# The text of each trigger function has the routes of its table, and the joins of its rows' parents,
# as they were when it was made.
STALE = """
SELECT count(*) > 0
FROM (SELECT quote_literal(coalesce(jsonb_object_agg(r.current_step, r.stages), '{}')) AS text
      FROM (SELECT current_step, jsonb_object_agg(status, stage) AS stages FROM pipeline_stages
            WHERE table_name = %(table)s AND join_of = '' GROUP BY current_step) AS r
      UNION ALL
      SELECT quote_literal(join_of) FROM pipeline_stages
      WHERE child_table = %(table)s AND join_of <> '') AS known
JOIN pg_proc AS p ON p.oid = to_regprocedure(quote_ident(%(function)s) || '()')
WHERE strpos(p.prosrc, known.text) = 0
"""

PRIVILEGES = """
SELECT string_agg(needed.privilege || ' on ' || needed.name, ', ') AS missing
FROM (SELECT name, 'SELECT' FROM unnest(%(tables)s::text[]) AS name
      UNION ALL
      VALUES ('pipeline_tables', 'SELECT'), ('pipeline_stages', 'SELECT'),
             ('pipeline_stages', 'UPDATE'), ('stage_calls', 'SELECT'), ('stage_calls', 'UPDATE'),
             ('stage_calls', 'DELETE'),
             ('stage_limits', 'SELECT'), ('stage_limits', 'UPDATE'), ('stage_leases', 'SELECT'),
             ('stage_leases', 'INSERT'), ('stage_leases', 'UPDATE'), ('stage_leases', 'DELETE'),
             ('stage_attempts', 'SELECT'), ('stage_attempts', 'INSERT'),
             ('stage_attempts', 'DELETE'), ('stage_totals', 'SELECT'), ('stage_totals', 'INSERT'),
             ('stage_totals', 'UPDATE'), ('stage_totals_mark', 'SELECT'),
             ('stage_totals_mark', 'UPDATE'), ('job_state_listener_schema', 'SELECT')
      UNION ALL
      SELECT * FROM (VALUES
          ('stage_calls', 'INSERT'), ('stage_looks', 'SELECT'), ('stage_looks', 'INSERT'),
          ('stage_looks', 'DELETE'), ('stage_joins', 'SELECT'), ('stage_joins', 'INSERT'),
          ('stage_joins', 'UPDATE'), ('stage_joins', 'DELETE')) AS for_joins
      WHERE %(joins)s
      UNION ALL
      SELECT 'stage_moves', privilege
      FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
      WHERE %(asynchronous)s
      UNION ALL
      SELECT 'stage_joins', 'SELECT' WHERE %(asynchronous)s AND NOT %(joins)s
     ) AS needed (name, privilege)
WHERE NOT has_table_privilege(to_regclass(quote_ident(needed.name)), needed.privilege)
"""

VIEWS = """
SELECT name, found IS NOT NULL AS there, has_table_privilege(found, 'SELECT') AS readable,
       (SELECT relowner::regrole::text FROM pg_class WHERE oid = found) AS owner
FROM unnest(ARRAY['pipeline_overview', 'stage_latency', 'given_up_calls']) AS name,
     to_regclass(name) AS found
UNION ALL
SELECT name, found IS NOT NULL, has_function_privilege(found, 'EXECUTE'),
       (SELECT proowner::regrole::text FROM pg_proc WHERE oid = found)
FROM unnest(ARRAY['stalled_jobs()', 'resting_rows()']) AS name, to_regprocedure(name) AS found
"""

HIDDEN = """
SELECT string_agg(name, ', ') FROM unnest(%(tables)s::text[]) AS name
WHERE row_security_active(to_regclass(quote_ident(name)))
"""

# The views, and the functions that look for rows that rest, read with the rights of their owner.
FORCED = """
SELECT c.relname AS name, c.relowner::regrole::text AS owner
FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
WHERE c.oid IN (SELECT to_regclass(name) FROM unnest(%(tables)s::text[]) AS name)
  AND c.relrowsecurity AND c.relforcerowsecurity AND NOT (r.rolsuper OR r.rolbypassrls)
"""

QUEUE = "SELECT round(100 * pg_notification_queue_usage())::integer"


class Bad(Exception):
    """A check that failed; `mend` is what to do about it, `others` is what else is wrong."""

    def __init__(self, what: str, mend: str, others: Sequence["Bad"] = ()):
        super().__init__(what)
        self.mend, self.others = mend, others


def check_server(conn, settings) -> str:
    version = conn.info.server_version
    where = f"{conn.info.dbname} on {conn.info.host}:{conn.info.port} as {conn.info.user}"
    if version < 130000:
        raise Bad(f"PostgreSQL {version // 10000} in {where}", "use PostgreSQL 13 or later")
    return f"PostgreSQL {version // 10000}, {where}"


def check_tables(conn, settings) -> str:
    """Ours, as this version needs them."""
    id_types = []
    for table, needed in NEEDED.items():
        row = db.execute(conn, COLUMNS, {"table": table, "id": "job_id"}).fetchone()
        if row.names is None:
            raise Bad(f"table {table} is missing", INSTALL)
        if missing := needed - set(row.names):
            check_version(conn)  # an older version lacks some columns; then the advice is `install`
            raise Bad(f"{table} has no column {', '.join(sorted(missing))}", AGAIN)
        id_types += [row.id_type] if row.id_type else []
    if views := [row.name for row in db.execute(conn, VIEWS) if not row.there]:
        raise Bad(f"view {', '.join(views)} is missing", INSTALL)
    if functions := [row.name for row in db.execute(conn, FUNCTIONS) if not row.there]:
        raise Bad(f"function {', '.join(functions)} is missing", INSTALL)
    check_version(conn)
    return f"tables and columns of version {migrations.LATEST}, job_id is {id_types[0]}"


def check_version(conn) -> None:
    if reason := migrations.refusal(conn):
        what, mend = reason.split(": ", 1)
        raise Bad(what, mend)


def check_rows(conn, settings) -> str:
    """The application's tables; all that is wrong with them."""
    found = [Bad(what, mend) for what, mend in misplaced(conn)]
    if not found:
        wrong = [*faults(conn), *impossible_states(conn)]
        found = [Bad(fault.what, fault.mend) for fault in wrong]
        if db.execute(conn, COLUMNS, {"table": "jobs", "id": "job_id"}).fetchone().names is None:
            found = [Bad("table jobs is missing", INSTALL), *found]
    if found:
        raise Bad(str(found[0]), found[0].mend, found[1:])
    tables = pipeline.tables().values()
    said = (f"{table.name} ({', '.join(table.ids)})" for table in tables)
    line = f"table{'s' * (len(tables) > 1)} of PIPELINE: {', '.join(said)}"
    if timeless := [table.name for table in tables if rows.time_column(conn, table) is None]:
        line += f"; no updated_at or created_at of type timestamptz in {', '.join(timeless)}"
    return line


def check_function(conn, settings) -> str:
    names = []
    for table in installed(conn):
        names.append(f"{trigger_function(table)}()")
        given = {"table": table, "function": trigger_function(table)}
        row = db.execute(conn, FUNCTION, given).fetchone()
        if row is None:
            raise Bad(f"function {names[-1]} is missing", INSTALL)
        if not (row.definer and row.pinned and row.here):
            raise Bad(f"function {names[-1]} is not the listener's", INSTALL)
        if row.lent:
            raise Bad(
                f"our functions lend the rights of another role to the owner of {table}",
                f"{INSTALL}, as a superuser once more",
            )
    return f"function{'s' * (len(names) > 1)} {', '.join(names)}"


def check_columns(conn, settings) -> str:
    if found := "; ".join(place.changes(conn)):
        raise Bad(found, INSTALL)
    return "the trigger knows the columns as they are"


def check_locks(conn, settings) -> None:
    """The tables that are locked. Why else one cannot be read, other checks say."""

    def ask(conn, table: str | None = None) -> None:
        tables = [table] if table else NEEDED
        db.execute(conn, ";".join(f"SELECT FROM {name} LIMIT 0" for name in tables))

    _, ours = db.in_parts(conn, ask, NEEDED, all_parts=True)
    said = [rows.locked(conn, table) for table, error in (rows.unreadable(conn) | ours).items()
            if isinstance(error, psycopg2.errors.LockNotAvailable)]  # fmt: skip
    # Where the table of its parents is locked, a table cannot be read either.
    locked = [Bad(one, ONCE_MORE) for one in dict.fromkeys(said)]
    if locked:
        raise Bad(str(locked[0]), ONCE_MORE, locked[1:])


def check_others(conn, settings) -> str:
    named = grants.others(conn, [*migrations.TABLES, *migrations.VIEWS])
    return f"other roles with rights on our tables: {'; '.join(named) or 'none'}"


def check_triggers(conn, settings) -> str:
    rows = triggers(conn)
    if broken := [Bad(what, with_backfill(mend)) for what, mend in broken_triggers(rows)]:
        raise Bad(str(broken[0]), broken[0].mend, broken[1:])
    quiet = {
        "all": "",
        "owed": ", NOTIFY only where a call is owed",
        "nothing": ", without NOTIFY: listeners look every POLL_INTERVAL",
    }[announced(conn) or "all"]
    names: dict[str, list[str]] = {row.table_name: [] for row in rows}
    for row in rows:
        names[row.table_name].append(row.name)
    enabled = (f"{', '.join(found)}, enabled on {table}" for table, found in names.items())
    inserted = not any("insert" in row.name for row in rows)
    uncalled = ", not for rows that are inserted" * inserted
    return f"trigger{'s' * (len(rows) > 1)} {'; '.join(enabled)}{uncalled}{quiet}"


def with_backfill(mend: str) -> str:
    return mend if mend == INSTALL else f"{mend}; then {JSL} backfill"  # install names it itself


def check_routes(conn, settings) -> str | None:
    try:
        differences = difference(conn)
    except psycopg2.errors.UndefinedTable:  # check_tables() has named it
        return None
    if differences:
        raise Bad(f"routes differ: {'; '.join(differences)}", f"{INSTALL}, {IF_NEWER}")
    for table in pipeline.tables():
        function = trigger_function(table)
        if db.execute(conn, STALE, {"table": table, "function": function}).fetchone()[0]:
            raise Bad(f"the function {function}() does not know all routes", INSTALL)
    tables, joins = len(pipeline.tables()), len(pipeline.joins())
    counted = f"{len(pipeline.routes())} states"
    if tables > 1:
        counted += f", {tables} tables, {joins} join{'s' * (joins != 1)}"
    return f"routes: PIPELINE of {pipeline.file()} ({counted}) is in the database"


def check_privileges(conn, settings) -> str:
    given = {"tables": list(pipeline.tables()), "joins": bool(pipeline.joins()),
             "asynchronous": pipeline.is_asynchronous()}  # fmt: skip
    if missing := db.execute(conn, PRIVILEGES, given).fetchone().missing:
        raise Bad(f"role {conn.info.user} lacks {missing}", GRANTS)
    if closed := [row.name for row in db.execute(conn, FUNCTIONS) if row.may_execute is False]:
        raise Bad(f"role {conn.info.user} may not execute {', '.join(closed)}", GRANTS)
    if closed := [row for row in db.execute(conn, VIEWS) if row.readable is False]:
        owner, names = closed[0].owner, ", ".join(row.name for row in closed)
        login = "DATABASE_URL=…" if settings.DATABASE_URL else f"DB_USER={owner} DB_PASSWORD=***"
        mend = f"as {owner}, who owns them: {login} {JSL} install --reader {conn.info.user}"
        raise Bad(f"role {conn.info.user} may not read {names}", mend)
    tables = [*pipeline.tables(), *NEEDED]
    hidden = db.execute(conn, HIDDEN, {"tables": tables}).fetchone()[0]
    if hidden:
        raise Bad(f"row-level security hides rows of {hidden} from {conn.info.user}", GRANTS)
    if forced := db.execute(conn, FORCED, {"tables": [*NEEDED]}).fetchone():
        what = f"row-level security hides rows of {forced.name} from {forced.owner}"
        mend = f"ALTER TABLE {forced.name} DISABLE ROW LEVEL SECURITY"
        raise Bad(f"{what}, with whose rights the views read", mend)
    return f"privileges of role {conn.info.user}"


def check_listen(conn, settings) -> str:
    if not notifications.can_hear(conn, settings):
        mend = "connect past the pooler (DB_HOST, DB_PORT); until then listeners poll every second"
        raise Bad("notifications do not arrive: a transaction pooler sits in between", mend)
    notifications.listen(conn)
    db.execute(conn, f'NOTIFY "{db.WAKE_CHANNEL}"')
    heard = notifications.hear(conn)  # usually it arrives together with the answer to NOTIFY
    if not heard:
        select.select([conn], [], [], 1.0)
        heard = notifications.hear(conn)
    if not heard:
        raise Bad("our own notification did not arrive", ONCE_MORE)
    used = db.execute(conn, QUEUE).fetchone()[0]
    if used >= 50:
        mend = "end the session that has been in a transaction for long (pg_stat_activity)"
        raise Bad(f"the notification queue is {used}% full: commits fail at 100%", mend)
    return f"LISTEN '{db.CHANNEL}' delivers; queue {used}% full"


# Answers to GET /healthz that would also be the answer to a POST to a stage, and what to do. An API
# or proxy without such a page answers 404, 405 or 403: those say nothing about a POST. A redirect
# does, as it is rarely configured for one page alone. {setting}: the one that has the API's URL.
POST_FAILS = {
    range(300, 400): ("redirects, which no POST follows", "set {setting} to where it leads"),
    range(401, 402): ("asks for credentials", "set STAGE_API_TOKEN"),
    range(407, 408): ("is a proxy that asks for credentials", "set {setting} past the proxy"),
    range(500, 600): ("is not ready, or a proxy in front of it cannot reach it",
                      "start it, or set {setting}"),
}  # fmt: skip


def setting_of(settings, url: str) -> str:
    """The settings that have the URL of a stage API."""
    names = ["STAGE_API_URL"] * (url == settings.STAGE_API_URL)
    names += [config.STAGE_URL + stage for stage, its in settings.STAGE_API_URLS.items()
              if its == url]  # fmt: skip
    return " and ".join(names)


def check_stage_api(conn, settings) -> str:
    apis = {api.url: api for api in pipeline.stage_apis(settings).values()}
    said, bad = [], []
    for api in apis.values():
        try:
            said.append(probed(settings, api))
        except Bad as each:
            bad.append(each)
    if bad:
        raise Bad(str(bad[0]), bad[0].mend, bad[1:])
    return "stage API " + ", ".join(said)


def probed(settings, api: stage_http.StageApi) -> str:
    """What a stage API answers. Raises Bad where that can be no stage's."""
    url, setting = config.redactor(settings)(api.url), setting_of(settings, api.url)
    try:
        status = api.probe("/healthz", seconds=5)
    except (stage_http.Unreachable, stage_http.Interrupted, stage_http.NoAnswer) as error:
        untrusted = "certificate verify failed" in str(error)
        mend = "set STAGE_API_CA_BUNDLE" if untrusted else f"start it, or set {setting}"
        raise Bad(f"stage API {url} does not answer ({error})", mend) from None
    for statuses, (what, mend) in POST_FAILS.items():
        if status in statuses:
            raise Bad(f"stage API {url} {what} (HTTP {status} on /healthz)",
                      mend.format(setting=setting))  # fmt: skip
    return f"{url} answers (HTTP {status} on /healthz)"


def check_signing(conn, settings) -> str:
    if not settings.STAGE_API_SECRET:
        return "requests are not signed: STAGE_API_SECRET is not set"
    return f"requests are signed{', with two secrets' * (len(settings.STAGE_API_SECRET) > 1)}"


# Programs whose first argument, unless it is an option, is the file that they run.
INTERPRETER = re.compile(r"python[\d.]*|sh|bash|dash")


def check_alerts(conn, settings) -> str | None:
    """Whether ALERT_COMMAND, where it is set, can be started."""
    if not settings.ALERT_COMMAND:
        return None
    program, *given = settings.ALERT_COMMAND
    missing = f"program {program}" if shutil.which(program) is None else None
    if not missing and INTERPRETER.fullmatch(os.path.basename(program)):
        script = next(iter(given), "-")
        if not script.startswith("-") and not os.path.exists(script):
            missing = f"file {os.path.abspath(script)}"
    if missing:
        raise Bad(f"ALERT_COMMAND cannot be started: there is no {missing}",
                  f"set ALERT_COMMAND, then {JSL} alert-test")  # fmt: skip
    return f"ALERT_COMMAND runs {program}; {JSL} alert-test sends one"


def check_hosts(conn, settings) -> str:
    if (left := hosts.connections_left(conn)) < hosts.FEW:
        raise Bad(f"{counted(left, 'more connection')} to the database left",
                  "end sessions (pg_stat_activity), or raise the limit")  # fmt: skip
    several = hosts.is_several(settings)
    if several and (problem := hosts.split_brain(hosts.timelines(settings))):
        raise Bad(problem, "stop the old one")
    return f"{counted(left, 'more connection')} left"


COMMIT_WAITS = db.DEADLINE  # a commit that waits for longer (seconds) is a problem
COMMITS = f"SELECT count(*) AS waiting {db.WAITING}"


def check_commits(conn, settings) -> str:
    if waiting := db.execute(conn, COMMITS, {"deadline": COMMIT_WAITS}).fetchone().waiting:
        raise Bad("commits that have waited for a synchronous standby for over "
                  f"{COMMIT_WAITS:g} s: {waiting}",
                  "start the standby, or take it out of synchronous_standby_names")  # fmt: skip
    return "no commit that this role can see waits for a synchronous standby"


def check_enabled(conn, settings) -> str:
    if off := config.why_off(settings):
        raise Bad(f"the listener is off: {off}", "set LISTENER_ENABLED=true")
    return "the listener is enabled"


CHECKS: list[Callable] = [
    check_server, check_tables, check_rows, check_columns, check_function, check_triggers,
    check_routes, check_privileges, check_locks, check_others, check_listen, check_stage_api,
    check_signing, check_alerts, check_hosts, check_commits, check_enabled,
]  # fmt: skip


# These have nothing to say before `install`.
OF_INSTALLED = (check_columns, check_privileges, check_locks, check_others)
# These would find everything missing where jobs is elsewhere; check_rows() says where it is.
OF_JOBS = (check_tables, check_columns, check_function, check_triggers)


def run_checks(conn, settings) -> Iterator[tuple[bool, str]]:
    installed = db.execute(conn, rows.INSTALLED).fetchone()[0]
    left_out = [*(() if installed else OF_INSTALLED)]
    left_out += OF_JOBS if any(misplaced(conn)) else ()
    for one in CHECKS:
        if one in left_out:
            continue
        try:
            if said := one(conn, settings):
                yield True, said
        except Bad as bad:
            yield from ((False, f"{each} → {each.mend}") for each in (bad, *bad.others))
        except db.ConnectionLost:
            raise
        except psycopg2.errors.InsufficientPrivilege as error:
            yield False, f"{first_line(error)} → {mend_of(error)}"
        except psycopg2.errors.LockNotAvailable:
            yield False, f"{rows.locked(conn)} → {ONCE_MORE}"
        except psycopg2.Error as error:
            yield False, f"{first_line(error)} → {INSTALL}"


@click.command()
def verify() -> None:
    """Check everything the listener needs; exit 1 on any problem."""
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener verify")
    redact = config.redactor(settings)
    for said in settings.WARNINGS:
        click.echo(f"note     {said}")
    bad = 0
    for good, text in run_checks(conn, settings):
        bad += not good
        click.echo(f"{'ok      ' if good else 'PROBLEM '} {redact(text)}")
    click.echo("everything is in place" if not bad else f"{bad} problem{'s' * (bad > 1)} found")
    sys.exit(1 if bad else 0)
