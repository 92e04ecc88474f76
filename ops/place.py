"""Checks before `install`: that jobs is in its place, and that no object of somebody else has one
of our names. `uninstall` leaves such objects.
"""

import json
from collections.abc import Iterator

import db
import pipeline
from ops.migrations import VIEWS
from ops.misplaced import misplaced
from ops.problem import Problem
from ops.tables import tenant_columns

# Columns that each of our relations has in every released version. A relation of the same name
# without them is not ours.
COLUMNS = {
    "pipeline_tables": {"name", "id_column"},
    "pipeline_stages": {"current_step", "status", "stage"},
    "stage_limits": {"name", "max_running"},
    "stage_calls": {"job_id", "call_id", "due_at", "attempts"},
    "stage_leases": {"job_id", "call_id", "leased_until"},
    "stage_looks": {"parent_id", "join_of"},
    "stage_joins": {"parent_id", "join_of"},
    "stage_moves": {"job_id", "moved_at"},
    "stage_attempts": {"job_id", "call_id", "outcome"},
    "stage_totals": {"stage", "outcome", "within_seconds"},
    "stage_totals_mark": {"counted_until"},
    "job_state_listener_schema": {"version"},
    "stage_slots": {"stage", "slot"},
    "pipeline_overview": {"stage", "owed"},
    "stage_latency": {"stage", "hour"},
    "given_up_calls": {"job_id", "stage"},
}

# One of these words occurs in the text of each of our functions, in every released version. A
# function of the same name without any of them is not ours.
WORDS = {
    "notify_job_state_change": ["pg_notify", "stage_calls"],
    "stalled_jobs": ["stage_attempts", "resting_rows"],
    "resting_rows": ["stage_attempts"],
    "stage_call_row": ["a_join"],
    "stage_join_is_complete": ["a_join", "RETURN false"],
    "stage_column_types": ["pg_typeof"],
    "stage_due_calls": ["of_stage"],
}


def require_place(conn) -> None:
    """Raises Problem where jobs is not where it was, or not where this role would find it, or
    something has one of our names.
    """
    lost = (f"{what}: {mend}" for what, mend in misplaced(conn))
    if found := list(taken(conn)) or list(lost):
        raise Problem(f"{'; '.join(found)}; nothing was changed")


# Relations with our names in the schema of the table %(beside)s, or else of jobs. The views come
# last: what is dropped in the opposite order is dropped before what it depends on.
RELATIONS = """
SELECT c.relname AS name, c.oid, c.oid::regclass::text AS called,
       CASE WHEN c.relkind IN ('r', 'p') THEN 'table' WHEN c.relkind = 'v' THEN 'view'
            ELSE 'relation' END AS kind,
       ARRAY(SELECT a.attname::text FROM pg_attribute AS a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns
FROM pg_class AS c
WHERE c.relname = ANY (%(names)s) AND c.relnamespace = coalesce(
    (SELECT relnamespace FROM pg_class WHERE oid = to_regclass(%(beside)s)),
    (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('jobs')),
    to_regnamespace(quote_ident(current_schema())))
ORDER BY c.relkind = 'v', c.oid
"""

# Functions with a name and number of arguments that CREATE OR REPLACE of ours would replace, and
# trigger functions with a name as ours have it for further tables.
FUNCTIONS = """
SELECT p.proname AS name, p.oid, p.oid::regprocedure::text AS called, 'function' AS kind,
       concat(p.prosrc, p.proargnames::text) AS text,
       concat_ws(' ', p.proowner, p.prosecdef, p.proconfig::text, p.prosrc) AS made
FROM pg_proc AS p
WHERE (p.proname = ANY (%(names)s)
       OR p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_')
  AND p.pronamespace = coalesce(
    (SELECT relnamespace FROM pg_class WHERE oid = to_regclass(%(beside)s)),
    (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('jobs')),
    to_regnamespace(quote_ident(current_schema())))
  AND p.pronargs = CASE p.proname WHEN 'stage_call_row' THEN 3 WHEN 'stage_join_is_complete' THEN 2
                                  WHEN 'stage_column_types' THEN 2 WHEN 'stage_due_calls' THEN 4
                                  ELSE 0 END
ORDER BY p.oid
"""


def named(conn, beside: str) -> tuple[list, list]:
    """What has one of our names in the schema of the table `beside`: ours, and what is not ours."""
    found = [
        *db.execute(conn, RELATIONS, {"names": list(COLUMNS), "beside": beside}),
        *db.execute(conn, FUNCTIONS, {"names": list(WORDS), "beside": beside}),
    ]
    return [row for row in found if is_ours(row)], [row for row in found if not is_ours(row)]


def is_ours(row) -> bool:
    if row.kind == "function":
        return any(word in row.text for word in WORDS.get(row.name, ["stage_calls"]))
    kind = "view" if row.name in VIEWS else "table"
    return row.kind == kind and COLUMNS[row.name] <= set(row.columns)


def is_installed(row) -> bool:
    """Whether install made it. The guide's function is ours to replace, but not to remove."""
    return row.name != "notify_job_state_change" or "stage_calls" in row.text


def taken(conn) -> Iterator[str]:
    """A line for each object of somebody else that has one of our names."""
    needed = {*COLUMNS, *WORDS, *(f"job_state_listener_{name}" for name in pipeline.tables())}
    for row in named(conn, "jobs")[1]:
        if row.name in needed:
            yield f"{row.kind} {row.called} is not ours, and we need its name: rename it"


# Tables whose trigger function was made for other columns, or for a table with another oid (as
# after a restore from a dump). Such a function reads each row by a dynamic statement: slow.
CHANGED = """
SELECT t.name FROM jsonb_to_recordset(%(tables)s) AS t (
    position integer, name text, id_column text, tenant_column text, parent_column text,
    priority_column text, run_after_column text)
CROSS JOIN LATERAL (
    SELECT array_agg(c.name ORDER BY c.position)::text AS names,
           string_agg(a.atttypid::text, ' ' ORDER BY c.position) AS types
    FROM unnest(ARRAY[t.id_column, t.tenant_column, 'current_step', 'status', t.parent_column,
                      t.priority_column, t.run_after_column])
        WITH ORDINALITY AS c (name, position)
    LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass(quote_ident(t.name))
                               AND a.attname = c.name AND NOT a.attisdropped
    WHERE c.name IS NOT NULL) AS now
JOIN pg_proc AS p ON p.oid = to_regprocedure(quote_ident(
    CASE t.name WHEN 'jobs' THEN 'notify_job_state_change'
         ELSE 'job_state_listener_' || t.name END) || '()')
WHERE strpos(p.prosrc, format('(''%%s''::regclass, %%L) = %%L',
                              to_regclass(quote_ident(t.name))::oid, now.names, now.types)) = 0
ORDER BY t.position
"""

# Our columns with ids of jobs whose type or collation is no longer that of jobs.job_id.
COPIES = """
SELECT c.place, format_type(a.atttypid, -1) AS type, format_type(j.atttypid, -1) AS wanted
FROM (VALUES ('stage_calls', 'job_id'), ('stage_leases', 'job_id'), ('stage_attempts', 'job_id'),
             ('stage_looks', 'parent_id'), ('stage_joins', 'parent_id')) AS c (place, name)
JOIN pg_attribute AS a ON a.attrelid = to_regclass(c.place) AND a.attname = c.name
JOIN pg_attribute AS j ON j.attrelid = to_regclass('jobs') AND j.attname = 'job_id'
WHERE (a.atttypid, a.attcollation) <> (j.atttypid, j.attcollation)
  AND NOT (a.atttypid = 'int8'::regtype AND j.atttypid IN ('int2'::regtype, 'int4'::regtype))
"""


def changes(conn) -> Iterator[str]:
    """What has changed in the application's tables since `install`."""
    if copy := db.execute(conn, COPIES).fetchone():
        also = " with another collation" * (copy.type == copy.wanted)
        yield f"job_id is {copy.wanted} in jobs and {copy.type}{also} in {copy.place}"
    tenants = tenant_columns(conn)
    tables = [
        {
            "position": position,
            "name": table.name,
            "id_column": table.id,
            "tenant_column": tenants[table.name],
            "parent_column": table.parent_column,
            "priority_column": table.priority,
            "run_after_column": table.run_after,
        }
        for position, table in enumerate(pipeline.tables().values())
    ]
    for row in db.execute(conn, CHANGED, {"tables": json.dumps(tables)}):
        yield f"columns of {row.name} have changed since install, or it was restored"
