"""`verify`: everything the listener needs, one line each, with the command that mends it."""

import select
import sys
from collections.abc import Callable, Iterator

import click
import psycopg2

import config
import db
import hosts
import notifications
import pipeline
import stage_http
from ops import migrations
from ops.routes import difference

INSTALL = "python listener.py install"
AGAIN = "python listener.py uninstall, then install"
GRANTS = "see 'Roles and grants' in README.md"

COLUMNS = """
SELECT array_agg(attname::text) AS names,
       max(format_type(atttypid, atttypmod)) FILTER (WHERE attname = 'job_id') AS id_type,
       max(typcategory::text) FILTER (WHERE attname = 'job_id') AS id_kind
FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped
"""

NEEDED = {
    "jobs": {"job_id", "tenant_id", "current_step", "status"},
    "pipeline_tables": {"name", "id_column", "parent_table", "parent_column", "channel"},
    "pipeline_stages": {"table_name", "join_of", "current_step", "status", "stage", "max_running",
                        "held_until", "held_by"},
    "stage_calls": {"job_id", "table_name", "join_of", "call_id", "stage", "due_at", "attempts",
                    "free_attempts", "worker"},
    "stage_looks": {"parent_id", "join_of", "arrived"},
    "stage_joins": {"parent_id", "join_of", "is_open", "recorded_at", "is_noted"},
    "stage_limits": {"name", "max_running"},
    "stage_leases": {"job_id", "call_id", "attempt", "stage", "worker", "leased_until",
                     "unanswered"},
    "stage_attempts": {"job_id", "call_id", "attempt", "stage", "outcome", "finished_at"},
    "stage_totals": {"stage", "outcome", "within_seconds", "attempts", "microseconds"},
    "stage_totals_mark": {"counted_until"},
    "job_state_listener_schema": {"version"},
}  # fmt: skip

ID_INDEX = """
SELECT count(*) > 0 FROM pg_index AS i
JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = to_regclass('jobs') AND i.indisvalid AND a.attname = 'job_id'
"""

# The function names the tables with the schema that they had when it was made.
FUNCTION = """
SELECT p.prosecdef AS definer,
       p.proconfig::text LIKE '%%search_path=pg_catalog%%' AS pinned,
       strpos(p.prosrc, format('%%I.stage_calls', n.nspname)) > 0 AS here,
       NOT (SELECT rolsuper FROM pg_roles WHERE oid = c.relowner) AND (
           SELECT bool_or(r.rolsuper) FROM pg_proc AS f JOIN pg_roles AS r ON r.oid = f.proowner
           WHERE f.oid IN (p.oid, to_regprocedure('stalled_jobs()'))) AS lent
FROM pg_proc AS p, pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE p.oid = to_regprocedure('notify_job_state_change()') AND c.oid = to_regclass('jobs')
"""

TRIGGERS = """
SELECT wanted.name, t.tgenabled AS enabled,
       t.tgfoid = to_regprocedure('notify_job_state_change()') AS ours,
       encode(t.tgargs, 'escape') LIKE 'silent%' AS silent
FROM unnest(ARRAY['job_state_change_trigger', 'job_state_insert_trigger']) AS wanted (name)
LEFT JOIN pg_trigger AS t ON t.tgname = wanted.name AND t.tgrelid = to_regclass('jobs')
WHERE wanted.name = 'job_state_change_trigger' OR NOT EXISTS (  -- install --no-insert
    SELECT FROM pg_trigger AS c
    WHERE c.tgname = 'job_state_change_trigger' AND c.tgrelid = to_regclass('jobs')
      AND encode(c.tgargs, 'escape') LIKE '%updates only%')
"""

# The function holds the routes as they were when it was made.
STALE = """
SELECT count(*) > 0 FROM pipeline_stages AS r, pg_proc AS p
WHERE p.oid = to_regprocedure('notify_job_state_change()')
  AND strpos(p.prosrc, format('= %%L AND NEW.status::text = %%L THEN %%L',
                              r.current_step, r.status, r.stage)) = 0
"""

PRIVILEGES = """
SELECT string_agg(needed.privilege || ' on ' || needed.name, ', ') AS missing
FROM (SELECT name, 'SELECT' FROM pipeline_tables
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
      WHERE EXISTS (SELECT FROM pipeline_stages WHERE join_of <> '')
     ) AS needed (name, privilege)
WHERE NOT has_table_privilege(to_regclass(needed.name), needed.privilege)
"""

VIEWS = """
SELECT name, found IS NOT NULL AS there, has_table_privilege(found, 'SELECT') AS readable
FROM unnest(ARRAY['pipeline_overview', 'stage_latency', 'given_up_calls']) AS name,
     to_regclass(name) AS found
UNION ALL
SELECT 'stalled_jobs()', found IS NOT NULL, has_function_privilege(found, 'EXECUTE')
FROM to_regprocedure('stalled_jobs()') AS found
"""

HIDDEN = "SELECT row_security_active(to_regclass('jobs'))"

QUEUE = "SELECT round(100 * pg_notification_queue_usage())::integer"


class Bad(Exception):
    """A check that failed; `mend` is what to do about it."""

    def __init__(self, what: str, mend: str):
        super().__init__(what)
        self.mend = mend


def check_server(conn, settings) -> str:
    version = conn.info.server_version
    where = f"{conn.info.dbname} on {conn.info.host}:{conn.info.port} as {conn.info.user}"
    if version < 130000:
        raise Bad(f"PostgreSQL {version // 10000} in {where}", "use PostgreSQL 13 or later")
    return f"PostgreSQL {version // 10000}, {where}"


def check_tables(conn, settings) -> str:
    id_types, id_kinds = [], set()
    for table, needed in NEEDED.items():
        row = db.execute(conn, COLUMNS, {"table": table}).fetchone()
        if row.names is None:
            raise Bad(f"table {table} is missing", INSTALL)
        if missing := needed - set(row.names):
            mend = "add it (ALTER TABLE)" if table == "jobs" else AGAIN
            raise Bad(f"{table} has no column {', '.join(sorted(missing))}", mend)
        id_types += [row.id_type] if row.id_type else []
        id_kinds |= {row.id_kind} - {None}
    if len(id_kinds) > 1:
        raise Bad(f"job_id is {id_types[0]} in jobs and {id_types[1]} in stage_calls", AGAIN)
    if missing := [row.name for row in db.execute(conn, VIEWS) if not row.there]:
        raise Bad(f"view {', '.join(missing)} is missing", INSTALL)
    if not db.execute(conn, ID_INDEX).fetchone()[0]:
        raise Bad(
            "jobs has no index that begins with job_id", "CREATE UNIQUE INDEX ON jobs (job_id)"
        )
    if reason := migrations.refusal(conn):
        raise Bad(*reason.split(": ", 1))
    return f"tables and columns of version {migrations.LATEST}, job_id is {id_types[0]}"


def check_function(conn, settings) -> str:
    row = db.execute(conn, FUNCTION, {}).fetchone()
    if row is None:
        raise Bad("function notify_job_state_change() is missing", INSTALL)
    if not (row.definer and row.pinned and row.here):
        raise Bad("function notify_job_state_change() is not the listener's", INSTALL)
    if row.lent:
        raise Bad(
            "our functions lend a superuser's rights to the owner of jobs",
            f"{INSTALL}, as a superuser once more",
        )
    return "function notify_job_state_change()"


def check_triggers(conn, settings) -> str:
    rows = db.execute(conn, TRIGGERS).fetchall()
    for row in rows:
        if row.enabled is None:
            raise Bad(f"trigger {row.name} is missing on jobs", INSTALL)
        if not row.ours:
            raise Bad(f"trigger {row.name} runs another function", INSTALL)
        if row.enabled not in ("O", "A"):
            raise Bad(f"trigger {row.name} is disabled", INSTALL)
    quiet = ", without NOTIFY: listeners look every POLL_INTERVAL" * rows[0].silent
    if len(rows) == 1:
        return f"trigger {rows[0].name}, enabled on jobs, not for rows that are inserted{quiet}"
    return f"triggers {', '.join(row.name for row in rows)}, enabled on jobs{quiet}"


def check_routes(conn, settings) -> str:
    try:
        differences = difference(conn)
    except psycopg2.errors.UndefinedTable:
        differences = ["pipeline_stages is missing"]
    if differences:
        raise Bad(f"routes differ: {'; '.join(differences)}", INSTALL)
    if db.execute(conn, STALE, {}).fetchone()[0]:
        raise Bad("the function notify_job_state_change() does not know all routes", INSTALL)
    return f"routes: {len(pipeline.routes())} states of PIPELINE are in the database"


def check_privileges(conn, settings) -> str:
    if missing := db.execute(conn, PRIVILEGES).fetchone().missing:
        raise Bad(f"role {conn.info.user} lacks {missing}", GRANTS)
    if closed := [row.name for row in db.execute(conn, VIEWS) if row.readable is False]:
        mend = f"python listener.py install --reader {conn.info.user}"
        raise Bad(f"role {conn.info.user} may not read {', '.join(closed)}", mend)
    if db.execute(conn, HIDDEN).fetchone()[0]:
        raise Bad(f"row-level security hides rows of jobs from {conn.info.user}", GRANTS)
    return f"privileges of role {conn.info.user}"


def check_listen(conn, settings) -> str:
    if not notifications.can_hear(conn, settings):
        mend = "connect past the pooler (DB_HOST, DB_PORT); until then listeners poll every second"
        raise Bad("notifications do not arrive: a transaction pooler sits in between", mend)
    notifications.listen(conn)
    db.execute(conn, f'NOTIFY "{db.WAKE_CHANNEL}"')
    heard = notifications.hear(conn)  # most often it comes with the answer to NOTIFY
    if not heard:
        select.select([conn], [], [], 1.0)
        heard = notifications.hear(conn)
    if not heard:
        raise Bad("our own notification did not arrive", "python listener.py verify, once more")
    used = db.execute(conn, QUEUE).fetchone()[0]
    if used >= 50:
        mend = "end the session that has been in a transaction for long (pg_stat_activity)"
        raise Bad(f"the notification queue is {used}% full: commits fail at 100%", mend)
    return f"LISTEN '{db.CHANNEL}' delivers; queue {used}% full"


def check_stage_api(conn, settings) -> str:
    redact = config.redactor(settings)
    apis = {api.url: api for api in pipeline.stage_apis(settings).values()}
    said = []
    for url, api in apis.items():
        try:
            status = api.probe("/healthz", seconds=5)
        except (stage_http.Unreachable, stage_http.Interrupted, stage_http.NoAnswer) as error:
            untrusted = "certificate verify failed" in str(error)
            mend = "set STAGE_API_CA_BUNDLE" if untrusted else "start it, or set STAGE_API_URL"
            raise Bad(f"stage API {redact(url)} does not answer ({error})", mend) from None
        said.append(f"{redact(url)} answers (HTTP {status} on /healthz)")
    return "stage API " + ", ".join(said)


def check_hosts(conn, settings) -> str:
    if (left := hosts.connections_left(conn)) < hosts.FEW:
        raise Bad(f"{left} more connections to the database are left",
                  "end sessions (pg_stat_activity), or raise the limit")  # fmt: skip
    if hosts.is_several(settings) and (problem := hosts.split_brain(settings)):
        raise Bad(problem, "stop the old one")
    return f"{left} more connections are left"


def check_enabled(conn, settings) -> str:
    if off := config.why_off(settings):
        raise Bad(f"the listener is off: {off}", "set LISTENER_ENABLED=true")
    return "the listener is enabled"


CHECKS: list[Callable] = [
    check_server, check_tables, check_function, check_triggers, check_routes, check_privileges,
    check_listen, check_stage_api, check_hosts, check_enabled,
]  # fmt: skip


def run_checks(conn, settings) -> Iterator[tuple[bool, str]]:
    for one in CHECKS:
        try:
            yield True, one(conn, settings)
        except Bad as bad:
            yield False, f"{bad} → {bad.mend}"
        except db.ConnectionLost:
            raise
        except psycopg2.errors.InsufficientPrivilege as error:
            yield False, f"{str(error).splitlines()[0]} → {GRANTS}"
        except psycopg2.Error as error:
            yield False, f"{str(error).splitlines()[0]} → {INSTALL}"


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
