"""Where jobs is, if that is not where the listener could use it: not in the schema of `install`, or
not where this role would find it.
"""

from collections.abc import Iterator

import db

# relkind 'r' or 'p' is a table. `schema` is where everything goes.
JOBS = """
SELECT c.relkind IN ('r', 'p') AS is_table, quote_ident(n.nspname) AS schema,
       (SELECT p.relnamespace::regnamespace::text FROM pg_class AS p
        WHERE p.oid = to_regclass('stage_calls')) AS ours,
       to_regclass(quote_ident(n.nspname) || '.stage_calls') IS NOT NULL AS is_installed_here,
       EXISTS (SELECT FROM pg_trigger AS t JOIN pg_proc AS f ON f.oid = t.tgfoid
               WHERE t.tgrelid = c.oid AND f.proname = 'notify_job_state_change') AS has_triggers
FROM (VALUES (to_regclass('jobs'))) AS found (oid)
LEFT JOIN pg_class AS c ON c.oid = found.oid LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
"""

# The table that the trigger function beside our tables hangs on.
HUNG = """
SELECT format('%I.%I', n.nspname, c.relname) AS name, quote_ident(n.nspname) AS schema,
       c.relname AS relation, quote_ident(session_user) AS login
FROM pg_trigger AS t JOIN pg_proc AS f ON f.oid = t.tgfoid JOIN pg_class AS c ON c.oid = t.tgrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE f.proname = 'notify_job_state_change' AND t.tgparentid = 0
  AND f.pronamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('stage_calls'))
ORDER BY c.oid LIMIT 1
"""

# Tables named jobs that have current_step and status; none where the search path finds a jobs.
# The search path leaves out schemas that the role may not use.
ELSEWHERE = """
SELECT quote_ident(n.nspname) AS schema, has_schema_privilege(n.oid, 'USAGE') AS may_use,
       quote_ident(current_user) AS role, quote_ident(session_user) AS login,
       current_setting('search_path') AS path
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = 'jobs' AND c.relkind IN ('r', 'p') AND NOT n.nspname ^@ 'pg_temp_'
  AND to_regclass('jobs') IS NULL
  AND 2 = (SELECT count(*) FROM pg_attribute AS a
           WHERE a.attrelid = c.oid AND a.attname IN ('current_step', 'status'))
ORDER BY 1
"""


def misplaced(conn) -> Iterator[tuple[str, str]]:
    """Where jobs is, if that is not where `install` could use it, and what to do about it."""
    jobs = db.execute(conn, JOBS).fetchone()
    hung = db.execute(conn, HUNG).fetchone()
    if jobs.schema is None and hung and hung.relation == "jobs":
        yield (
            f"jobs is now in schema {hung.schema}, which is not on the search path",
            f"ALTER ROLE {hung.login} SET search_path = {hung.schema}, {jobs.ours}",
        )
    elif jobs.schema is None and hung:
        yield (
            f"there is no table jobs, but {hung.name} has our triggers and goes on recording calls",
            f"ALTER TABLE {hung.name} RENAME TO jobs",
        )
    elif jobs.schema is None and jobs.ours:
        yield (
            f"there is no table jobs, but our tables are in schema {jobs.ours}",
            f"restore or create {jobs.ours}.jobs, then install",
        )
    elif jobs.schema is None:
        # Else install would make an empty table jobs, and rows of the existing one owe no call.
        yield from elsewhere(conn)
    elif not jobs.is_table and hung:
        yield (
            f"jobs is no table, and a view can have no trigger of ours; {hung.name} has them and "
            "goes on recording calls",
            f"give the view another name, then ALTER TABLE {hung.name} RENAME TO jobs",
        )
    elif not jobs.is_table:
        yield "jobs is no table, and a view can have no trigger of ours", "give it another name"
    elif jobs.ours and not (jobs.is_installed_here or jobs.has_triggers):
        yield (
            f"jobs is in schema {jobs.schema}, our tables in {jobs.ours}",
            f"ALTER TABLE jobs SET SCHEMA {jobs.ours}, or take {jobs.ours} off the search path to "
            "install once more",
        )


def elsewhere(conn) -> Iterator[tuple[str, str]]:
    """Where there is a jobs that this role does not find, and what to do about it."""
    other = "if another table is meant, create it as jobs yourself; else"
    for found in db.execute(conn, ELSEWHERE):
        if not found.may_use:
            what = f"jobs is in schema {found.schema}, which role {found.role} may not use"
            mend = f"GRANT USAGE ON SCHEMA {found.schema} TO {found.role}"
        else:
            what = f"jobs is in schema {found.schema}, which is not on {found.login}'s search path"
            path = ", ".join(filter(None, [found.schema, found.path]))
            mend = f"ALTER ROLE {found.login} SET search_path = {path}"
        yield what, f"{other} {mend}"
