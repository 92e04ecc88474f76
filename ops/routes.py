"""Compares the database with PIPELINE: its routes, our tables and triggers."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import psycopg2

import db
import pipeline
from ops import migrations
from ops.misplaced import misplaced
from ops.problem import GRANTS, IF_NEWER, INSTALL, Problem
from pipeline import JSL, Route, SharedLimit

Stage = tuple[str, int | None]  # its name and max_running

# Also reads an installation of version 2, where all routes were of jobs.
ROUTES = """
SELECT coalesce(to_jsonb(p) ->> 'table_name', 'jobs') AS table_name,
       coalesce(to_jsonb(p) ->> 'join_of', '') AS join_of,
       current_step, status, stage, max_running
FROM pipeline_stages AS p
"""


def known(conn) -> dict[Route, Stage]:
    """The routes as the last install wrote them."""
    return {
        Route(row.table_name, row.join_of, row.current_step, row.status): (
            row.stage,
            row.max_running,
        )
        for row in db.execute(conn, ROUTES)
    }


def shown(stage: Stage | None) -> str:
    if stage is None:
        return "nothing"
    return stage[0] if stage[1] is None else f"{stage[0]} (max_running {stage[1]})"


LIMITS = """
SELECT name, stages, max_running, seconds, linger, is_fair, per_tenant FROM stage_limits
"""

ASYNCHRONOUS = "SELECT DISTINCT stage FROM pipeline_stages WHERE asynchronous"

TABLES = """
SELECT name, id_column AS id, parent_table AS parent, parent_column, channel,
       priority_column AS priority, run_after_column AS run_after, tenant_column AS tenant
FROM pipeline_tables
"""


def difference(conn) -> list[str]:
    """The differences between PIPELINE and the database's copy of it, a line each."""
    ours, theirs = pipeline.stages_of_routes(), known(conn)
    found = [
        f"{route} → {shown(ours.get(route))} in {pipeline.file()}, "
        f"{shown(theirs.get(route))} in the database"
        for route in sorted(ours.keys() | theirs.keys())
        if ours.get(route) != theirs.get(route)
    ]
    found += [f"the limits of {name} are not those of the database" for name in other_limits(conn)]
    declared_ones = pipeline.asynchronous_stages()
    known_ones = {row.stage for row in db.execute(conn, ASYNCHRONOUS)}
    for name in sorted(declared_ones ^ known_ones):
        places = [pipeline.file(), "the database"]
        one, other = places if name in declared_ones else reversed(places)
        found.append(f"stage {name} is asynchronous in {one}, not in {other}")
    rows = {row.name: row._asdict() for row in db.execute(conn, TABLES)}
    for table in pipeline.tables().values():
        if table.name not in rows:
            found.append(f"the database does not know table {table.name}")
            continue
        row = rows[table.name]
        declared = {"id": table.id, "parent": pipeline.parent_name(table),
                    "parent_column": table.parent_column, "channel": table.channel,
                    "priority": table.priority, "run_after": table.run_after,
                    "tenant": table.tenant or row["tenant"]}  # fmt: skip
        found += [
            f"table {table.name}: {what} is {column or 'nothing'} in {pipeline.file()}, "
            f"{row[what] or 'nothing'} in the database"
            for what, column in declared.items()
            if column != row[what]
        ]
    return found


def other_limits(conn) -> list[str]:
    """The stages, pools and tenants' limits of which PIPELINE and the database differ."""
    ours = {limit.name: limit for limit in pipeline.shared_limits()}
    theirs = {row.name: SharedLimit(**row._asdict()) for row in db.execute(conn, LIMITS)}
    return [name for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)]  # fmt: skip


# The search path of a role may find a table jobs other than the one with the triggers. Somebody may
# have replaced our trigger function by one that records no call, or renamed the schema: the text of
# the function has the schema that the tables had when it was made.
PLACE = """
SELECT to_regclass('jobs')::text AS jobs,
       (SELECT count(DISTINCT relnamespace) FROM pg_class
        WHERE oid IN (to_regclass('jobs'), to_regclass('stage_calls'),
                      to_regclass('pipeline_stages'))) AS schemas,
       (SELECT count(DISTINCT tgname) = 2 - (
                   count(*) FILTER (WHERE encode(tgargs, 'escape') LIKE '%updates only%') > 0)::int
        FROM pg_trigger
        WHERE tgrelid = to_regclass('jobs')
          AND tgname IN ('job_state_change_trigger', 'job_state_insert_trigger')) AS is_watched,
       (SELECT string_agg(DISTINCT t.tgfoid::regprocedure::text, ', ')
        FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE tgrelid = to_regclass('jobs')
          AND tgname IN ('job_state_change_trigger', 'job_state_insert_trigger')
          AND strpos(p.prosrc, p.pronamespace::regnamespace || '.stage_calls') = 0) AS replaced
"""


def require_jobs_in_place(conn) -> None:
    """Raises Problem where jobs is somewhere else, in the words of `verify` and `install`."""
    if lost := [f"{what}: {mend}" for what, mend in misplaced(conn)]:
        raise Problem("; ".join(lost))


def require_installed(conn) -> None:
    """Raises Problem where the database does not know this PIPELINE."""
    try:
        known(conn)
        refusal = migrations.refusal(conn)
        differences = [] if refusal else difference(conn)
    except psycopg2.errors.UndefinedTable:
        require_jobs_in_place(conn)
        raise Problem(f"the listener's tables are missing: {INSTALL}") from None
    except psycopg2.errors.InsufficientPrivilege as error:
        reason = str(error).strip()
        raise Problem(f"{reason}: {GRANTS}") from None
    if refusal:
        raise Problem(refusal)
    if differences:
        raise Problem(f"the routes differ ({'; '.join(differences)}): {INSTALL}, {IF_NEWER}")
    require_jobs_in_place(conn)
    place = db.execute(conn, PLACE).fetchone()
    if place.schemas != 1 or not place.is_watched:
        reason = f"the table {place.jobs} that this role sees has no triggers of ours"
        raise Problem(f"{reason}: {INSTALL}")
    if place.replaced:
        raise Problem(f"function {place.replaced} is not the listener's: {INSTALL}")


ARGUMENTS = """
SELECT CASE WHEN encode(tgargs, 'escape') LIKE 'silent%' THEN 'nothing'
            WHEN encode(tgargs, 'escape') LIKE 'owed only%' THEN 'owed' ELSE 'all' END AS announced,
       encode(tgargs, 'escape') LIKE '%updates only%' AS updates_only
FROM pg_trigger
WHERE tgrelid = to_regclass('jobs') AND tgname = 'job_state_change_trigger'
"""


def announced(conn) -> str | None:
    """Which changes the triggers notify of: "all"; "owed", those that a listener has to act on,
    after `install --notify-owed`; or "nothing", after `install --no-notify`. None where there is no
    trigger of ours.
    """
    row = db.execute(conn, ARGUMENTS).fetchone()
    return row and row.announced


def is_updates_only(conn) -> bool:
    """Whether `install --no-insert` left out the insert triggers."""
    row = db.execute(conn, ARGUMENTS).fetchone()
    return bool(row and row.updates_only)


# A function that records no call is not ours: somebody may have replaced the body of ours, or
# renamed the schema that it names.
TRIGGERS = """
SELECT wanted.table_name, wanted.name, t.tgrelid::regclass::text AS place,
       EXISTS (SELECT FROM pg_trigger AS c WHERE c.tgparentid = t.oid) AS is_partitioned,
       CASE WHEN EXISTS (  -- those of partitions; pg_partition_tree() would lock each of these
                WITH RECURSIVE copy AS (
                    SELECT oid, tgenabled FROM pg_trigger WHERE tgparentid = t.oid
                    UNION ALL
                    SELECT c.oid, c.tgenabled
                    FROM copy JOIN pg_trigger AS c ON c.tgparentid = copy.oid)
                SELECT FROM copy WHERE tgenabled NOT IN ('O', 'A'))
            THEN 'D' ELSE t.tgenabled END AS enabled,
       -- A column that was renamed takes the WHEN clause along. The clause itself is not compared,
       -- as pg_get_triggerdef() would lock the table: it has nothing that narrows it.
       t.tgattr::text = '' AND t.tgtype = event.type AND CASE WHEN event.name = 'change'
           THEN t.tgqual::text !~ ':boolop (and|not)|[{](OPEXPR|CONST|NULLTEST) ' AND NOT EXISTS (
               SELECT FROM pg_attribute AS a
               WHERE a.attrelid = t.tgrelid
                 AND a.attname IN ('current_step', 'status', wanted.parent_column)
                 AND NOT EXISTS (
                     SELECT FROM pg_depend AS d
                     WHERE d.classid = 'pg_trigger'::regclass AND d.objid = t.oid
                       AND (d.refobjid, d.refobjsubid) = (t.tgrelid, a.attnum)))
           ELSE t.tgqual IS NULL END AS is_whole,
       p.oid = to_regprocedure(quote_ident(wanted.function) || '()')
           AND strpos(p.prosrc, p.pronamespace::regnamespace || '.stage_calls') > 0 AS ours,
       has_schema_privilege(p.proowner, p.pronamespace, 'USAGE') AND NOT lacking.are AS may_use,
       CASE WHEN NOT has_schema_privilege(p.proowner, p.pronamespace, 'USAGE')
            THEN ARRAY[format('GRANT USAGE ON SCHEMA %%s TO %%s', p.pronamespace::regnamespace,
                              p.proowner::regrole)]
            WHEN NOT lacking.is_foreign THEN lacking.grants END AS grants,
       ARRAY(SELECT c.name FROM jsonb_array_elements_text(wanted.columns) AS c (name)
             WHERE NOT EXISTS (SELECT FROM pg_attribute AS a
                               WHERE a.attrelid = t.tgrelid AND a.attname = c.name)) AS gone
FROM jsonb_to_recordset(%(wanted)s) AS wanted (
    table_name text, name text, function text, parent_column text, columns jsonb)
JOIN (VALUES ('change', 17), ('insert', 5), ('delete', 9)) AS event (name, type)  -- as triggers.sql
    ON strpos(wanted.name, event.name) > 0
LEFT JOIN pg_trigger AS t
    ON t.tgname = wanted.name AND t.tgrelid = to_regclass(quote_ident(wanted.table_name))
LEFT JOIN pg_proc AS p ON p.oid = t.tgfoid
CROSS JOIN LATERAL (  -- the tables that its function writes to, and its owner may not
    SELECT count(*) > 0 AS are,
           count(*) FILTER (WHERE used.name = 'stage_calls' AND c.relowner <> p.proowner) > 0
               AS is_foreign,  -- install gives the function to the owner of stage_calls
           array_agg(concat_ws('; ',
               CASE WHEN lacks.rights THEN format('GRANT %%s ON %%s TO %%s', used.rights,
                                                  c.oid::regclass, p.proowner::regrole) END,
               CASE WHEN lacks.rows THEN format('ALTER TABLE %%s DISABLE ROW LEVEL SECURITY',
                                                c.oid::regclass) END) ORDER BY c.oid)
               FILTER (WHERE c.oid IS NOT NULL) AS grants
    FROM (VALUES ('stage_calls', 'SELECT, INSERT, UPDATE, DELETE'), ('stage_looks', 'INSERT'),
                 ('stage_moves', 'INSERT')) AS used (name, rights)
    LEFT JOIN pg_class AS c ON c.relname = used.name AND c.relnamespace = p.pronamespace
    CROSS JOIN LATERAL (
        SELECT EXISTS (SELECT FROM unnest(string_to_array(used.rights, ', ')) AS one
                       WHERE NOT has_table_privilege(p.proowner, c.oid, one)) AS rights,
               c.relrowsecurity  -- as row_security_active(), which is about the current user
                   AND (c.relforcerowsecurity OR NOT pg_has_role(p.proowner, c.relowner, 'USAGE'))
                   AND NOT (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE oid = p.proowner)
                   AS rows) AS lacks
    WHERE strpos(p.prosrc, '.' || used.name) > 0
      AND (c.oid IS NULL OR lacks.rights OR lacks.rows)) AS lacking
WHERE wanted.name NOT IN ('job_state_insert_trigger', 'job_state_listener_insert')
   OR NOT EXISTS (  -- install --no-insert
       SELECT FROM pg_trigger AS c
       WHERE c.tgrelid = to_regclass(quote_ident(wanted.table_name))
         AND c.tgname IN ('job_state_change_trigger', 'job_state_listener_change')
         AND encode(c.tgargs, 'escape') LIKE '%%updates only%%')
"""


def trigger_function(table: str) -> str:
    """The name of the trigger function of a table."""
    return "notify_job_state_change" if table == "jobs" else f"job_state_listener_{table}"


def trigger_names(table: str, is_joined: bool) -> list[str]:
    """The names of a table's triggers. Only a table with a join needs one for DELETE."""
    if table == pipeline.JOBS.name:
        return ["job_state_change_trigger", "job_state_insert_trigger"]
    joined = is_joined and any(key.table.name == table for key in pipeline.joins().values())
    return [f"job_state_listener_{event}" for event in ["change", "insert"] + ["delete"] * joined]


IS_READABLE = """
SELECT has_table_privilege(to_regclass('pipeline_tables'), 'SELECT') AND EXISTS (
    SELECT FROM pg_attribute
    WHERE attrelid = to_regclass('pipeline_stages') AND attname = 'child_table'
      AND has_column_privilege(attrelid, attnum, 'SELECT')) AS so
"""

INSTALLED = """
SELECT name, EXISTS (SELECT FROM pipeline_stages WHERE child_table = t.name) AS is_joined,
       ARRAY['current_step', 'status'] || ARRAY(
           SELECT value FROM jsonb_each_text(to_jsonb(t))
           WHERE key LIKE '%_column' AND value IS NOT NULL) AS columns
FROM pipeline_tables AS t
"""


class Installed(NamedTuple):
    """What the database's copy of PIPELINE has of a table."""

    is_joined: bool
    columns: list[str]  # that the triggers read; none where that is not known


def installed(conn) -> dict[str, Installed]:
    """The tables of PIPELINE that the database's copy of it has too. All, as joined, where it
    cannot be read: before `install`, or by a role without that right.
    """
    # Asked first, as an error would end the transaction that somebody may have begun.
    if db.execute(conn, IS_READABLE).fetchone().so:
        rows = db.execute(conn, INSTALLED)
        there = {row.name: Installed(row.is_joined, row.columns) for row in rows}
    else:
        there = dict.fromkeys(pipeline.tables(), Installed(True, []))
    there.setdefault(pipeline.JOBS.name, Installed(False, []))
    return {table: there[table] for table in pipeline.tables() if table in there}


def triggers(conn) -> list:
    """Each trigger that PIPELINE needs, here and in the database: its `place`; `enabled`, there
    and on all partitions (None: missing); `ours`; `may_use`: its function may use our
    tables; `grants`: what lets it (None: `install` does); `is_whole`: it sees every change; `gone`:
    columns that it reads and the table no longer has. What only one of the two needs is for
    difference() to tell.
    """
    wanted = [
        {
            "table_name": table,
            "name": name,
            "function": trigger_function(table),
            "parent_column": pipeline.tables()[table].parent_column if there.is_joined else None,
            "columns": there.columns,
        }
        for table, there in installed(conn).items()
        for name in trigger_names(table, there.is_joined)
    ]
    return db.execute(conn, TRIGGERS, {"wanted": json.dumps(wanted)}).fetchall()


class Broken(NamedTuple):
    """What keeps calls from being recorded, and what to run about it. Afterwards `backfill` finds
    the calls that were not recorded.
    """

    what: str
    mend: str


def broken_triggers(rows: Iterable[Any]) -> list[Broken]:
    """What is broken, by the rows of triggers()."""
    found = []
    for row in rows:
        trigger, mend = f"trigger {row.name} on {row.table_name}", f"{JSL} install"
        if row.enabled is None:
            what = f"trigger {row.name} is missing on {row.table_name}"
        elif not row.ours:
            what = f"{trigger} runs another function"
        elif not row.may_use:
            what = f"{trigger} may not use our tables"
            mend = "; ".join(row.grants or [mend])
        elif row.gone:
            columns = ", ".join(row.gone)
            what = f"{row.table_name} has no column {columns}, so its triggers record no call"
        elif not row.is_whole:
            what = f"{trigger} does not see every change of the state, or of the parent"
        elif row.enabled not in ("O", "A"):
            what = f"{trigger} is disabled" + ", there or on a partition" * row.is_partitioned
        else:
            continue
        found.append(Broken(what, mend))
    return list(dict.fromkeys(found))
