"""`install` and `uninstall`: the database's part, and its copy of PIPELINE."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import click
import psycopg2

import config
import db
import leftovers
import pipeline
from ops import migrations
from ops.place import is_installed, named, require_place
from ops.problem import Problem
from ops.routes import Stage, announced, is_updates_only, known, other_limits, shown, triggers
from ops.table import counted
from ops.tables import impossible_states, require_usable, tenant_columns
from ops.text import Text
from pipeline import Route

ROOT = Path(__file__).parent.parent
# One after the other, in one transaction.
SCHEMA = [ROOT / "schema.sql", ROOT / "triggers.sql", ROOT / "views.sql"]

# What triggers.sql makes the functions and the triggers from.
ASKED = """
SELECT set_config('job_state_listener.announced', %(announced)s, true),
       set_config('job_state_listener.updates_only', %(updates_only)s, true),
       set_config('job_state_listener.pipeline', %(pipeline)s, true);
"""

SYNC = """
DELETE FROM pipeline_tables;
INSERT INTO pipeline_tables
SELECT t.* FROM jsonb_populate_recordset(
    NULL::pipeline_tables, current_setting('job_state_listener.pipeline')::jsonb -> 'tables') AS t;
CREATE TEMPORARY TABLE wanted_stages ON COMMIT DROP AS
SELECT r.table_name, r.join_of, r.child_table, r.current_step, r.status, r.stage, r.max_running,
       r.timeout, r.position, coalesce(r.asynchronous, false) AS asynchronous,
       r.pool
FROM jsonb_populate_recordset(
    NULL::pipeline_stages, current_setting('job_state_listener.pipeline')::jsonb -> 'routes') AS r;
CREATE TEMPORARY TABLE known_stages ON COMMIT DROP AS
SELECT table_name, join_of, current_step, status, stage, held_until, hold_seconds, held_reason,
       held_by, stalled_since, waiting_since, refusing_since
FROM pipeline_stages
ORDER BY table_name, join_of, current_step, status
FOR UPDATE;
DELETE FROM pipeline_stages WHERE (table_name, join_of, current_step, status) NOT IN (
    SELECT table_name, join_of, current_step, status FROM pg_temp.wanted_stages);
INSERT INTO pipeline_stages (table_name, join_of, child_table, current_step, status, stage,
                             max_running, timeout, position, asynchronous,
                             pool)
SELECT * FROM pg_temp.wanted_stages
ON CONFLICT (table_name, join_of, current_step, status) DO UPDATE
SET stage = excluded.stage, max_running = excluded.max_running, timeout = excluded.timeout,
    position = excluded.position, child_table = excluded.child_table,
    asynchronous = excluded.asynchronous, pool = excluded.pool;
-- A pause stays with its stage, whatever states lead to it now, or with its state where the stage
-- was renamed; and so does all else that is known of a stage.
UPDATE pipeline_stages AS p
SET held_until = k.held_until, hold_seconds = k.hold_seconds, held_reason = k.held_reason,
    held_by = k.held_by, stalled_since = k.stalled_since, waiting_since = k.waiting_since,
    refusing_since = k.refusing_since
FROM pg_temp.wanted_stages AS w LEFT JOIN LATERAL (
    SELECT * FROM pg_temp.known_stages AS known
    WHERE known.stage = w.stage
       OR w.stage NOT IN (SELECT stage FROM pg_temp.known_stages)
          AND known.stage NOT IN (SELECT stage FROM pg_temp.wanted_stages)
          AND EXISTS (
              SELECT FROM pg_temp.wanted_stages AS x
              WHERE x.stage = w.stage
                AND (x.table_name, x.join_of, x.current_step, x.status)
                    = (known.table_name, known.join_of, known.current_step, known.status))
    ORDER BY known.held_until DESC NULLS LAST
    LIMIT 1) AS k ON true
WHERE (p.table_name, p.join_of, p.current_step, p.status)
      = (w.table_name, w.join_of, w.current_step, w.status);
-- A call under way of a renamed stage counts under the limits of the new name, and ends when its
-- row leaves the stage of that name. A call whose API has set the row to (old name, running) keeps
-- the old name, or it would end at once. A claim keeps the limits of its stages locked until it
-- commits its leases. So wait for these locks, or the next statement does not see such leases.
SELECT FROM stage_limits ORDER BY name FOR UPDATE;
UPDATE stage_leases AS l SET stage = mine.after
FROM (SELECT o.call_id, o.attempt, renamed.after
      FROM stage_leases AS o JOIN (
          SELECT k.stage AS before, min(w.stage) AS after
          FROM pg_temp.known_stages AS k
          JOIN pg_temp.wanted_stages AS w USING (table_name, join_of, current_step, status)
          WHERE k.stage NOT IN (SELECT stage FROM pg_temp.wanted_stages)
            AND w.stage NOT IN (SELECT stage FROM pg_temp.known_stages)
          GROUP BY k.stage HAVING count(DISTINCT w.stage) = 1
      ) AS renamed ON renamed.before = o.stage
      WHERE NOT (o.working AND EXISTS (
          SELECT FROM stage_call_row(o.table_name, '', o.job_id) AS r
          WHERE (r.current_step, r.status) = (o.stage, 'running')))
      FOR UPDATE OF o SKIP LOCKED) AS mine
WHERE l.call_id = mine.call_id AND l.attempt = mine.attempt;
CREATE TEMPORARY TABLE wanted_limits ON COMMIT DROP AS
SELECT l.name, l.stages, l.max_running, l.seconds, l.linger, l.is_fair, l.per_tenant
FROM jsonb_populate_recordset(
    NULL::stage_limits, current_setting('job_state_listener.pipeline')::jsonb -> 'limits') AS l;
DELETE FROM stage_limits WHERE name NOT IN (SELECT name FROM pg_temp.wanted_limits);
INSERT INTO stage_limits (name, stages, max_running, seconds, linger, is_fair, per_tenant)
SELECT * FROM pg_temp.wanted_limits
-- Not now(): next_at may be of a call that was claimed while we waited for a lock.
ON CONFLICT (name) DO UPDATE
SET stages = excluded.stages, max_running = excluded.max_running, seconds = excluded.seconds,
    linger = excluded.linger, is_fair = excluded.is_fair, per_tenant = excluded.per_tenant,
    next_at = CASE WHEN excluded.seconds IS NULL THEN NULL
                   WHEN stage_limits.next_at
                        > clock_timestamp() + make_interval(secs => excluded.seconds)
                   THEN clock_timestamp() + make_interval(secs => excluded.seconds)
                   ELSE stage_limits.next_at END
-- `audit` takes the transaction that wrote a row for the one that changed its limit.
WHERE (stage_limits.stages, stage_limits.max_running, stage_limits.seconds, stage_limits.linger,
       stage_limits.is_fair, stage_limits.per_tenant)
      IS DISTINCT FROM (excluded.stages, excluded.max_running, excluded.seconds, excluded.linger,
                        excluded.is_fair, excluded.per_tenant)
   OR stage_limits.next_at > clock_timestamp() + make_interval(secs => excluded.seconds);
-- While a join was not in PIPELINE, its looks were dropped and changes of its rows not recorded. So
-- all its parents that are still open are looked at.
INSERT INTO stage_looks (parent_id, join_of, arrived)
SELECT parent_id, join_of, true FROM stage_joins
WHERE is_open AND join_of IN (SELECT join_of FROM pg_temp.wanted_stages WHERE join_of <> ''
                              EXCEPT SELECT join_of FROM pg_temp.known_stages);
INSERT INTO stage_totals_mark DEFAULT VALUES ON CONFLICT DO NOTHING;
-- To make an index takes a right on the schema, which the owner of the tables may not have.
RESET ROLE;
-- Serve stage_due_calls(); a write to stage_calls pays for each.
DO $do$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_temp.wanted_limits WHERE is_fair) THEN
        DROP INDEX IF EXISTS stage_calls_tenant_idx;
    ELSIF to_regclass('stage_calls_tenant_idx') IS NULL THEN
        CREATE INDEX stage_calls_tenant_idx
            ON stage_calls (stage, priority, (coalesce(tenant_id, '')), due_at);
    END IF;
    IF NOT EXISTS (SELECT FROM pipeline_tables WHERE priority_column IS NOT NULL) THEN
        DROP INDEX IF EXISTS stage_calls_priority_idx;
    ELSIF to_regclass('stage_calls_priority_idx') IS NULL THEN
        CREATE INDEX stage_calls_priority_idx ON stage_calls (stage, priority, due_at);
    END IF;
END
$do$;
"""

# What triggers.sql calls the choices of `notify`.
ANNOUNCED = {None: "", True: "all", "owed": "owed", False: "nothing"}

GIVEN = """
SELECT CASE relkind WHEN 'v' THEN 'view ' ELSE 'table ' END || relname AS name FROM pg_class
WHERE oid IN (SELECT to_regclass(quote_ident(name)) FROM unnest(%(tables)s::text[]) AS name)
"""

# Whatever our functions are hung on.
TRIGGERS = """
SELECT format('trigger %%I on %%s', tgname, tgrelid::regclass) AS name, oid FROM pg_trigger
WHERE tgfoid = ANY (%(functions)s::oid[]) AND tgparentid = 0
"""


def trigger_oids(conn, ours: list) -> dict[str, int]:
    """The triggers that run one of the functions in `ours`, by name."""
    functions = [row.oid for row in ours if row.kind == "function"]
    return {row.name: row.oid for row in db.execute(conn, TRIGGERS, {"functions": functions})}


def made(conn) -> dict[str, Any]:
    """What differs, by name, once an object was made anew: the oid of a trigger; the text, owner
    and settings of a function.
    """
    ours, _ = named(conn, "stage_calls")
    functions = {f"function {row.called}": row.made for row in ours if row.kind == "function"}
    return functions | trigger_oids(conn, ours)


def objects(conn, tables: Iterable[str] = (), ours: list | None = None) -> list[str]:
    """What is there of the application's `tables`, and of what install makes; or, of that, `ours`
    with the triggers that run them.
    """
    ours = named(conn, "stage_calls")[0] if ours is None else ours
    given = db.execute(conn, GIVEN, {"tables": list(tables)}).fetchall()
    return [
        *(row.name for row in given),
        *(f"{row.kind} {row.called}" for row in ours),
        *trigger_oids(conn, ours),
    ]


def to_be_mended(conn) -> dict[str, str]:
    """Our triggers that did not record every change, by name: what install does to each."""
    mended = {}
    for row in triggers(conn):
        if row.ours and not (row.may_use and row.is_whole and row.enabled in ("O", "A")):
            done = "mended" if row.enabled in ("O", "A") else "enabled"
            mended[f"trigger {row.name} on {row.place}"] = done if row.is_whole else "renewed"
    return mended


# Also reads an installation of an earlier version.
PAUSED = """
SELECT stage FROM pipeline_stages AS p WHERE to_jsonb(p) ->> 'held_until' = 'infinity'
"""

PARTITIONED = """
SELECT relname AS name FROM pg_class
WHERE relkind = 'p' AND oid IN (
    SELECT to_regclass(format('%%I', name)) FROM unnest(%(tables)s::text[]) AS name)
ORDER BY 1
"""

# FOR ALL TABLES, or FOR TABLES IN SCHEMA.
PUBLISHED = """
SELECT DISTINCT pubname AS name FROM pg_publication_tables
WHERE tablename = ANY (%(tables)s)
  AND schemaname = (SELECT n.nspname FROM pg_class AS c JOIN pg_namespace AS n
                        ON n.oid = c.relnamespace
                    WHERE c.oid = to_regclass('stage_calls'))
ORDER BY 1
"""

ORPHANS = """
SELECT count(*) FROM stage_calls AS c
WHERE NOT EXISTS (SELECT FROM pipeline_stages AS p
                  WHERE (p.table_name, p.join_of, p.current_step, p.status, p.stage)
                        = (c.table_name, c.join_of, c.current_step, c.status, c.stage))
"""


# What a dashboard needs, and nothing else. %%I is filled in by the database.
READER = """
DO $do$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA %%I TO %%I', current_schema(), %(reader)s);
    -- Who may not grant this gets a warning, and no error.
    IF NOT has_schema_privilege(%(reader)s, current_schema(), 'USAGE') THEN
        RAISE insufficient_privilege USING MESSAGE = format(
            'only the owner of schema %%I can run: GRANT USAGE ON SCHEMA %%I TO %%I',
            current_schema(), current_schema(), %(reader)s);
    END IF;
    EXECUTE format('GRANT SELECT ON pipeline_overview, stage_latency, given_up_calls TO %%I',
                   %(reader)s);
    EXECUTE format('GRANT EXECUTE ON FUNCTION stalled_jobs(), resting_rows() TO %%I', %(reader)s);
END
$do$;
"""


class Applied(NamedTuple):
    """What there is to say of an install.

    Args:
        unread: the GRANT for the roles that cannot read new tables, though ALTER DEFAULT PRIVILEGES
            says that they can; "" where there is none.
        left: see take_over().
    """

    unread: str
    left: str


def apply(
    conn,
    settings: SimpleNamespace | None = None,
    reader: str | None = None,
    notify: bool | Literal["owed"] | None = None,
    insert: bool | None = None,
) -> Applied:
    """Bring schema.sql, triggers.sql, views.sql and PIPELINE into the database, in one transaction;
    then bring calls that wait in line with it.

    Args:
        settings: whose STAGE_TIMEOUT counts; those of this process by default.
        reader: a role that may read the views.
        notify: whether the triggers notify, or "owed": only of changes that a listener has to act
            on; None: as before, at first of every change.
        insert: whether a row that is inserted owes a call; None: as before, at first yes.

    Raises:
        Problem: a table of PIPELINE cannot be used, or something has one of our names.
    """
    require_place(conn)
    require_usable(conn)
    fill_in = conn.cursor().mogrify
    asked = {
        "announced": ANNOUNCED[notify],
        "updates_only": "" if insert is None else str(not insert),
        "pipeline": json.dumps(described(conn, settings or config.settings())),
    }
    script = migrations.script() + fill_in(ASKED, asked).decode()
    script += "".join(file.read_text() for file in SCHEMA)
    script += migrations.SETTLE_GRANTS
    if reader:
        script += fill_in(READER, {"reader": reader}).decode()
    script += migrations.AS_OWNER + SYNC + migrations.UNREAD
    unread = db.execute(conn, script).fetchone()[0]
    return Applied(unread, take_over(conn))


AT_ONCE = 10_000  # calls that one statement changes: the application waits for their rows
ADOPT = leftovers.ADOPT.format(every="true", batch=AT_ONCE)

# The trigger copies the parent's tenant only for stages whose tenants take turns, and where no
# table that it reads for that is partitioned. Where a stage is new to that, the calls that wait
# already get it, so many at a time: a statement that locks what it finds would hold the first call
# until it has found the last.
BATCH = 1000
UNSHARED = """
WITH RECURSIVE above AS (
    SELECT t.name, p.name AS above, p.tenant_column, p.parent_table
    FROM pipeline_tables AS t JOIN pipeline_tables AS p ON p.name = t.parent_table
    WHERE t.tenant_column IS NULL
    UNION ALL
    SELECT a.name, p.name, p.tenant_column, p.parent_table
    FROM above AS a JOIN pipeline_tables AS p ON p.name = a.parent_table
    WHERE a.tenant_column IS NULL)
SELECT array_agg(job_id)::text AS ids, array_agg(call_id)::text AS call_ids
FROM (SELECT job_id, call_id, (row_number() OVER () - 1) / %(batch)s AS batch
      FROM stage_calls
      WHERE tenant_id IS NULL
        AND stage IN (SELECT unnest(stages) FROM stage_limits WHERE is_fair)
        AND table_name IN (
            SELECT a.name FROM above AS a
            JOIN pg_class AS c ON c.oid = to_regclass(format('%%I', a.above))
            GROUP BY a.name HAVING NOT bool_or(c.relkind = 'p'))) AS found
GROUP BY batch
"""
SHARE = """
UPDATE stage_calls AS c SET tenant_id = mine.tenant
FROM (SELECT o.job_id, o.call_id, parent.tenant
      FROM stage_calls AS o CROSS JOIN LATERAL (
          SELECT left((stage_call_row(o.table_name, '', o.job_id)).tenant_id #>> '{}', 500)
              AS tenant) AS parent
      WHERE o.job_id = ANY (%(ids)s) AND o.call_id = ANY (%(call_ids)s::bigint[])
        AND o.tenant_id IS NULL AND parent.tenant IS NOT NULL
      FOR UPDATE OF o SKIP LOCKED) AS mine
WHERE c.job_id = mine.job_id AND c.call_id = mine.call_id
"""


def take_over(conn) -> str:
    """Bring the calls that wait in line with a PIPELINE that was just installed.

    Returns:
        Why some of them are not, as the database refused; "" where all are.
    """

    def as_owner(sql: str, **given: Any):
        # Without parameters of its own, as those of AS_OWNER are the database's.
        return db.execute(conn, migrations.AS_OWNER + conn.cursor().mogrify(sql, given).decode())

    try:
        while db.execute(conn, migrations.AS_OWNER + ADOPT).rowcount >= AT_ONCE:
            pass
        for batch in as_owner(UNSHARED, batch=BATCH).fetchall():
            as_owner(SHARE, **batch._asdict())
    except db.ConnectionLost:
        raise
    except psycopg2.Error as error:
        return " ".join(str(error).split())
    return ""


def described(conn, settings: SimpleNamespace) -> dict[str, list]:
    """What PIPELINE declares, as rows of pipeline_tables, pipeline_stages and stage_limits."""
    timeouts = pipeline.timeouts(settings)
    tenants = tenant_columns(conn)
    tables = [
        {
            "name": table.name,
            "position": position,
            "id_column": table.id,
            "tenant_column": tenants[table.name],
            "parent_table": pipeline.parent_name(table),
            "parent_column": table.parent_column,
            "channel": table.channel,
            "priority_column": table.priority,
            "run_after_column": table.run_after,
        }
        for position, table in enumerate(pipeline.tables().values(), 1)
    ]
    routes = [
        {
            "table_name": route.table,
            "join_of": route.join,
            "child_table": key.table.name if route.join else None,
            "current_step": route.step,
            "status": route.status,
            "stage": function.__name__,
            "max_running": pipeline.limits_of(function).max_running,
            "asynchronous": pipeline.limits_of(function).asynchronous,
            "pool": pipeline.pool_name(function),
            "timeout": timeouts[function.__name__],
            "position": position,
        }
        for position, (key, function) in enumerate(pipeline.pipeline().items(), 1)
        for route in [pipeline.route_of(key)]
    ]
    shared = [vars(limit) for limit in pipeline.shared_limits()]
    return {"tables": tables, "routes": routes, "limits": shared}


@click.command(short_help="Create or update tables, function, triggers and routes.")
@click.option("--reader", type=Text(), metavar="ROLE",
              help="A role that may read the views, for dashboards.")  # fmt: skip
@click.option("--notify/--no-notify", default=None,
              help="Whether changes of jobs are announced; without, listeners look "
                   "every POLL_INTERVAL. Default: as it was, at first announced.")  # fmt: skip
@click.option(
    "--notify-owed", is_flag=True, help="Announce only changes that owe a call; --notify goes back."
)
@click.option("--insert/--no-insert", default=None,
              help="Whether a row that is inserted in a routed state owes a call; without, only "
                   "an UPDATE does. Default: as it was, at first yes.")  # fmt: skip
def install(
    reader: str | None, notify: bool | None, notify_owed: bool, insert: bool | None
) -> None:
    """Create tables, functions, triggers and views, and copy PIPELINE into the database.

    Again and again without harm: what is right already stays as it is, and no row of jobs, or of
    another table of PIPELINE, is changed. Where one cannot be used, it says why and does nothing.
    """
    if notify_owed and notify is not None:
        raise click.UsageError(
            "--notify, --no-notify and --notify-owed exclude each other.",
            click.get_current_context(),
        )
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener install")
    before = look(conn)
    migrations.require_not_newer(conn)
    try:
        applied = apply(conn, settings, reader, "owed" if notify_owed else notify, insert)
    except psycopg2.errors.UndefinedObject:
        if reader is None:
            raise
        raise Problem(f"there is no role {reader}; nothing was changed") from None
    except psycopg2.errors.LockNotAvailable:
        raise Problem(
            "another transaction holds a lock on jobs or on our tables, or another install is "
            "under way; nothing was changed: try again"
        ) from None
    with contextlib.suppress(psycopg2.errors.LockNotAvailable):  # they look by themselves as well
        db.execute(conn, db.WAKE)  # a stage may be called more often now
    info = conn.info
    click.echo(f"database {info.dbname} on {info.host}:{info.port} as {info.user}")
    there = objects(conn, pipeline.tables())
    for line in (
        *what_changed(before, there, made(conn)),
        *what_owes_no_call(conn, before, there),
        *who_may_read(conn, before, there, applied),
        *what_is_announced(conn),
        *([f"granted  the views to {reader}"] if reader else []),
        *what_waits(conn, applied),
    ):
        click.echo(f"  {line}")
    click.echo(f"Next: {pipeline.JSL} verify, then {pipeline.JSL}")


# What a listener of an older version does after this install, by that version.
LISTENERS = {
    0: "stop every listener of that version now: it goes on calling, and ignores leases",
    1: "a listener of that version begins no more calls: start the new one",
}
OF_INSERTS = ("trigger job_state_insert_trigger ", "trigger job_state_listener_insert ")
ENDS = "a listener of that version ends within a minute: start the new one"


class Before(NamedTuple):
    """What an install finds.

    there: objects(); to_be_mended, made: see there.
    routes: the routes that were installed; none before the first install.
    limits: the stages and pools whose limits PIPELINE changes.
    version: of the schema.
    paused: the stages that are.
    is_updates_only: whether a row that is inserted owes no call.
    """

    there: set[str]
    to_be_mended: dict[str, str]
    made: dict[str, Any]
    routes: dict[Route, Stage]
    limits: list[str]
    version: int
    paused: set[str]
    is_updates_only: bool


def look(conn) -> Before:
    """What is there before an install."""
    there, updates_only = set(objects(conn, pipeline.tables())), is_updates_only(conn)
    broken, as_made = to_be_mended(conn), made(conn)
    try:
        routes, version = known(conn), migrations.version(conn)
        paused = {row.stage for row in db.execute(conn, PAUSED)}
        limits = other_limits(conn) if version == migrations.LATEST else []
    except psycopg2.errors.UndefinedTable:
        routes, limits, version, paused = {}, [], migrations.LATEST, set()
    except psycopg2.errors.InsufficientPrivilege:
        require_usable(conn)  # says who may install
        raise
    return Before(there, broken, as_made, routes, limits, version, paused, updates_only)


def what_changed(before: Before, there: list[str], as_made: dict[str, Any]) -> Iterator[str]:
    """What an install has done to the objects that are `there` now, `as_made` by it, and to the
    routes.
    """
    if before.version < migrations.LATEST:
        yield f"migrated from version {before.version} to {migrations.LATEST}"
        yield f"note: {LISTENERS.get(before.version, ENDS)}"
    for name in there:
        kept = before.to_be_mended.get(name, "kept")
        if before.made.get(name) != as_made.get(name):  # also for another option
            kept = "renewed"
        yield f"{kept if name in before.there else 'created':7}  {name}"
    for name in sorted(before.there - set(there)):
        yield f"removed  {name}"
    routes = pipeline.stages_of_routes()
    for route, stage in routes.items():
        done = "kept" if before.routes.get(route) == stage else "routed"
        yield f"{done:7}  {route} → {shown(stage)}"
    for route, stage in before.routes.items():
        if route not in routes:
            yield f"removed  {route} → {shown(stage)}"
    for name in before.limits:
        yield f"changed  the limits of {name}"


def what_owes_no_call(conn, before: Before, there: list[str]) -> Iterator[str]:
    """Notes on states that no row can be in, and on rows whose stage left PIPELINE, whose call is
    gone, or whose change no trigger has seen.
    """
    yield from (f"note: {fault}" for fault in impossible_states(conn))
    routes = pipeline.stages_of_routes()
    for name in left(before.routes, routes):
        pause = "its pause is gone, and " if name in before.paused else ""
        yield (f"note: {name} has left PIPELINE: {pause}rows that it still works on come to "
               f"({name}, done): keep that state in PIPELINE until they are through")  # fmt: skip
    if unseen := untold(before.routes, routes):
        yield (f"note: rows in {', '.join(unseen)} are not told as stalled or failed any more: "
               f"{pipeline.JSL} jobs shows whether there are any")  # fmt: skip
    ours = [name for name in there if name.startswith("trigger ")]
    mended = any(name in before.to_be_mended for name in ours)
    if before.version == migrations.LATEST:
        made = [name for name in ours if name not in before.there]
        # With --insert after --no-insert, those of inserted rows are new.
        mended |= any(not (before.is_updates_only and name.startswith(OF_INSERTS)) for name in made)
    if before.routes and "table stage_calls" not in before.there:
        yield ("note: table stage_calls was missing, so no call is owed that was owed before: "
               f"{pipeline.JSL} backfill")  # fmt: skip
    elif "table jobs" in before.there and routes.keys() - before.routes.keys():
        yield ("note: rows that are in a new state already, or come to it in a transaction that is "
               f"open, owe no call: {pipeline.JSL} backfill")  # fmt: skip
    elif mended and before.routes:
        yield ("note: rows that changed while a trigger was missing, disabled or wrong owe no "
               f"call: {pipeline.JSL} backfill")  # fmt: skip


def who_may_read(conn, before: Before, there: list[str], applied: Applied) -> Iterator[str]:
    """Notes on roles that cannot read our new tables, and on publications that have them."""
    if applied.unread:
        yield ("note: our tables are for their owner alone, whatever ALTER DEFAULT PRIVILEGES "
               f"says; so that these roles can dump the database: {applied.unread}")  # fmt: skip
    created = [name.removeprefix("table ") for name in there if name not in before.there]
    for row in db.execute(conn, PUBLISHED, {"tables": created}):
        yield (f"note: publication {row.name} publishes our tables: make them at its subscribers, "
               "where replication stops otherwise (pg_dump --schema-only)")  # fmt: skip


def what_is_announced(conn) -> Iterator[str]:
    """Which changes the triggers do not announce or record, as somebody has chosen."""
    changes = announced(conn)
    if changes == "owed":
        yield "note: only changes that owe a call are announced; --notify: every change"
    if changes == "nothing":
        yield "note: nothing is announced; listeners look every POLL_INTERVAL: restart them"
    if is_updates_only(conn):
        yield "note: a row that is inserted owes no call, only one that is updated"
        for row in db.execute(conn, PARTITIONED, {"tables": list(pipeline.tables())}):
            yield (f"note: an UPDATE that moves a row of {row.name} to another partition inserts "
                   "it there, and then records no call either: install --insert")  # fmt: skip


def what_waits(conn, applied: Applied) -> Iterator[str]:
    """Which calls wait for a person, and why no listener can start."""
    orphans = db.execute(conn, ORPHANS).fetchone()[0]
    if orphans:
        of = "of states or stages that PIPELINE no longer has"
        yield f"note: {counted(orphans, 'open call')} {of}: {pipeline.JSL} status"
    if applied.left:
        yield ("note: calls that wait have the stage, priority or tenant of the PIPELINE before "
               f"({applied.left}): {pipeline.JSL} install, once more")  # fmt: skip
    try:
        pipeline.stage_apis(config.settings())
    except config.SettingsError as error:
        yield f"note: no listener can start: {error}"


def left(before: dict[Route, Stage], routes: dict[Route, Stage]) -> list[str]:
    """The names of stages that PIPELINE no longer has. Not where a stage only has another one,
    unless nothing follows any more from what its API may still write under the old one.
    """
    known_names, names = ({stage for stage, _ in of.values()} for of in (before, routes))
    renamed = {
        stage
        for route, (stage, _) in before.items()
        if route in routes and routes[route][0] not in known_names
    }
    lost = {route.step for route in before.keys() - routes.keys() if route.status == "done"}
    return sorted(known_names - names - (renamed - lost))


def untold(before: dict[Route, Stage], routes: dict[Route, Stage]) -> list[str]:
    """The states that PIPELINE knew by the name of their stage alone, which it no longer has."""
    known_names, names = ({stage for stage, _ in of.values()} for of in (before, routes))
    states = {(route.step, route.status) for route in routes}
    return [f"({name}, {status})" for name in sorted(known_names - names)
            for status in ("running", "failed") if (name, status) not in states]  # fmt: skip


OPEN_CALLS = "SELECT count(*) FROM stage_calls"
THEIRS = "SELECT name FROM pipeline_tables ORDER BY position"


def remove(conn, names: list[str]) -> None:
    """Drop what `objects()` has named, in one transaction: each after what depends on it."""
    db.execute(conn, migrations.LOCK_TIMEOUT + "".join(f"DROP {name};" for name in names[::-1]))


def is_confirmed() -> bool:
    """Ask a person. Raises UsageError where there is none."""
    try:
        return click.confirm("Remove?")
    except (click.Abort, RuntimeError) as stop:  # RuntimeError: standard input is closed
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise
        click.echo()
        raise click.UsageError(
            "nobody answered, and nothing was removed: give --yes.", click.get_current_context()
        ) from None


@click.command(short_help="Remove what install made; jobs and its rows stay.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def uninstall(yes: bool) -> None:
    """Remove exactly what install made.

    The application's tables and their rows stay. What has one of our names and is not ours is
    named, and stays as well.
    """
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener uninstall")
    ours, others = named(conn, "stage_calls")
    there = objects(conn, ours=[row for row in ours if is_installed(row)])
    for row in (*others, *(row for row in ours if not is_installed(row))):
        click.echo(f"note: {row.kind} {row.called} is not ours and stays")
    if not there:
        click.echo("nothing to remove")
        return
    click.echo(f"database {conn.info.dbname} on {conn.info.host}:{conn.info.port}: this removes")
    for name in there:
        click.echo(f"  {name}")
    if "table stage_calls" in there:
        count = db.execute(conn, OPEN_CALLS).fetchone()[0]
        known_tables = db.execute(conn, THEIRS) if "table pipeline_tables" in there else []
        theirs = [row.name for row in known_tables] or ["jobs"]
        stay = f"{', '.join(theirs)} {'are' if len(theirs) > 1 else 'is'} not touched"
        click.echo(f"and with them {counted(count, 'open call')} and the history. {stay}.")
    if not (yes or is_confirmed()):
        raise Problem("nothing was removed")
    try:
        remove(conn, there)
    except psycopg2.errors.LockNotAvailable:
        raise Problem(
            "a table is locked by another transaction; nothing was removed: try again"
        ) from None
    click.echo("removed")
