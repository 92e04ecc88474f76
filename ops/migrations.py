"""The versions of the database's part: how `install` gets from a released one to this one."""

import db
from ops import grants
from ops.problem import INSTALL, Problem
from pipeline import JSL

# The objects that install makes and uninstall removes. stage_slots is of version 1. Every trigger
# function but that of jobs has a name of its own, after its table.
TABLES = (
    "pipeline_tables", "pipeline_stages", "stage_limits", "stage_calls", "stage_leases",
    "stage_looks", "stage_joins", "stage_moves", "stage_attempts", "stage_totals",
    "stage_totals_mark", "job_state_listener_schema", "stage_slots",
)  # fmt: skip
VIEWS = ("pipeline_overview", "stage_latency", "given_up_calls")
FUNCTIONS = (
    "notify_job_state_change", "stalled_jobs", "resting_rows", "stage_call_row",
    "stage_join_is_complete", "stage_column_types", "stage_due_calls",
)  # fmt: skip

NAMES = "ARRAY[{}]".format(", ".join(f"'{name}'" for name in (*TABLES, *VIEWS, *FUNCTIONS)))

# What each version changed, to be applied once. Tables, indexes and functions that are new are
# made by schema.sql, which follows.
STEPS = {
    # 1.0.0 had fewer columns, no 'cancelled', and a due_at that began with now().
    1: """
        ALTER TABLE pipeline_stages
            ADD COLUMN IF NOT EXISTS position integer,
            ADD COLUMN IF NOT EXISTS timeout double precision,
            ADD COLUMN IF NOT EXISTS stalled_since timestamptz,
            ADD COLUMN IF NOT EXISTS held_by text;
        ALTER TABLE stage_calls ALTER COLUMN due_at SET DEFAULT clock_timestamp();
        ALTER TABLE stage_attempts DROP CONSTRAINT stage_attempts_outcome_check;
        ALTER TABLE stage_attempts ADD CONSTRAINT stage_attempts_outcome_check CHECK (
            outcome IN ('succeeded', 'held', 'retry', 'unknown', 'failed', 'skipped',
                        'cancelled', 'lost')) NOT VALID;
    """,
    # One listener a host. max_running is counted from stage_leases; a call without an answer keeps
    # its lease until it is due again. A listener of version 1 that still runs may settle its calls,
    # but finds no row in stage_slots to claim another one.
    2: """
        ALTER TABLE IF EXISTS stage_leases
            ADD COLUMN IF NOT EXISTS unanswered boolean NOT NULL DEFAULT false;
        IF to_regclass('stage_slots') IS NOT NULL THEN
            INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,
                                      leased_until, unanswered)
            SELECT a.job_id, a.call_id, a.attempt, a.stage, a.worker, a.started_at, c.due_at, true
            FROM stage_calls AS c JOIN stage_attempts AS a
                ON (a.job_id, a.call_id, a.attempt) = (c.job_id, c.call_id, c.attempts)
            WHERE a.outcome = 'unknown' AND c.worker IS NULL
              AND c.due_at > now() AND c.due_at < 'infinity';
            DELETE FROM stage_slots;
            INSERT INTO stage_slots (stage, slot, leased_until)
            SELECT DISTINCT stage, 1, 'infinity'::timestamptz FROM pipeline_stages;
        END IF;
    """,
    # Calls of rows of more tables than jobs, and of joins.
    3: """
        ALTER TABLE pipeline_stages
            ADD COLUMN IF NOT EXISTS table_name text COLLATE "C" NOT NULL DEFAULT 'jobs',
            ADD COLUMN IF NOT EXISTS join_of text COLLATE "C" NOT NULL DEFAULT '',
            ADD COLUMN IF NOT EXISTS child_table text,
            ADD COLUMN IF NOT EXISTS waiting_since timestamptz,
            ADD COLUMN IF NOT EXISTS refusing_since timestamptz,
            DROP CONSTRAINT pipeline_stages_pkey,
            ADD PRIMARY KEY (table_name, join_of, current_step, status);
        ALTER TABLE stage_calls
            ADD COLUMN IF NOT EXISTS table_name text COLLATE "C" NOT NULL DEFAULT 'jobs',
            ADD COLUMN IF NOT EXISTS join_of text COLLATE "C" NOT NULL DEFAULT '',
            DROP CONSTRAINT stage_calls_pkey,
            ADD PRIMARY KEY (job_id, table_name, join_of);
        ALTER TABLE IF EXISTS stage_leases
            ADD COLUMN IF NOT EXISTS table_name text COLLATE "C" NOT NULL DEFAULT 'jobs';
        ALTER TABLE stage_attempts
            ADD COLUMN IF NOT EXISTS table_name text COLLATE "C" NOT NULL DEFAULT 'jobs',
            ADD COLUMN IF NOT EXISTS spent integer;
    """,
    # Asynchronous stages; pools, rates, tenants that take turns, priorities.
    4: """
        ALTER TABLE pipeline_stages
            ADD COLUMN IF NOT EXISTS asynchronous boolean NOT NULL DEFAULT false,
            ADD COLUMN IF NOT EXISTS pool text;
        ALTER TABLE IF EXISTS stage_limits
            ALTER COLUMN max_running DROP NOT NULL,
            ADD COLUMN IF NOT EXISTS stages text[] NOT NULL DEFAULT '{}',
            ADD COLUMN IF NOT EXISTS seconds double precision,
            ADD COLUMN IF NOT EXISTS next_at timestamptz,
            ADD COLUMN IF NOT EXISTS linger double precision,
            ADD COLUMN IF NOT EXISTS stays_with text,
            ADD COLUMN IF NOT EXISTS stays_since timestamptz,
            ADD COLUMN IF NOT EXISTS is_fair boolean NOT NULL DEFAULT false,
            ADD COLUMN IF NOT EXISTS per_tenant integer CHECK (per_tenant > 0),
            ADD COLUMN IF NOT EXISTS last_tenant text;
        ALTER TABLE IF EXISTS pipeline_tables
            ADD COLUMN IF NOT EXISTS priority_column text,
            ADD COLUMN IF NOT EXISTS run_after_column text;
        ALTER TABLE stage_calls
            ADD COLUMN IF NOT EXISTS priority integer NOT NULL DEFAULT 0,
            ADD COLUMN IF NOT EXISTS run_after timestamptz;
        UPDATE stage_calls SET tenant_id = left(tenant_id, 500) WHERE length(tenant_id) > 500;
        ALTER TABLE IF EXISTS stage_leases
            ADD COLUMN IF NOT EXISTS working boolean NOT NULL DEFAULT false,
            ADD COLUMN IF NOT EXISTS spent integer,
            ADD COLUMN IF NOT EXISTS tenant_id text;
        DROP INDEX IF EXISTS stage_leases_stage_idx;
    """,
}
LATEST = max(STEPS)

# Waiting longer for a lock on jobs or on our tables would make the application wait behind us, or
# lose a deadlock to us (deadlock_timeout is 1 s).
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '800ms'; "

# All our objects are made in the schema of jobs, which the search path finds. A second install
# waits here for the first.
BEGIN = f"""
SET LOCAL lock_timeout = '7s';
SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('job_state_listener.install'));
{LOCK_TIMEOUT}
SELECT pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', coalesce(
    (SELECT n.nspname FROM pg_catalog.pg_class AS c
     JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid = pg_catalog.to_regclass('jobs')),
    pg_catalog.current_schema())), true);
"""

# ALTER TABLE jobs SET SCHEMA moves the triggers with the table, but none of our other objects. This
# moves them, with all calls, pauses and history.
MOVE = """
DO $do$
DECLARE
    here constant oid := (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('jobs'));
    left_behind constant oid := (
        SELECT p.pronamespace FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE t.tgrelid = to_regclass('jobs') AND p.proname = 'notify_job_state_change'
          AND p.pronamespace <> here LIMIT 1);
    made record;
BEGIN
    -- A write of the application that waited in the old function for a lock on one of our tables
    -- would fail. So it waits for its own table, before the trigger is called.
    FOR made IN
        SELECT DISTINCT t.tgrelid::regclass AS name
        FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE t.tgparentid = 0 AND p.pronamespace = left_behind
          AND (p.proname = 'notify_job_state_change' OR p.proname ^@ 'job_state_listener_')
        ORDER BY 1
    LOOP
        EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', made.name);
    END LOOP;
    FOR made IN
        SELECT CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END AS kind,
               oid::regclass::text AS name
        FROM pg_class WHERE relnamespace = left_behind AND relkind IN ('r', 'v')
                        AND relname = ANY ({names})
        UNION ALL
        SELECT 'FUNCTION', oid::regprocedure::text FROM pg_proc
        WHERE pronamespace = left_behind AND (proname = ANY ({names})
           OR prorettype = 'trigger'::regtype AND proname ^@ 'job_state_listener_')
    LOOP
        EXECUTE format('ALTER %s %s SET SCHEMA %s', made.kind, made.name, here::regnamespace);
    END LOOP;
END
$do$;
"""

# The owner of our tables may have put triggers on them, which must not run with a superuser's
# rights when we write to the tables. Holds until the end of the transaction, or RESET ROLE.
AS_OWNER = """
DO $do$
DECLARE
    owner regrole := (SELECT c.relowner FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
                      WHERE c.oid = to_regclass('pipeline_stages') AND NOT r.rolsuper);
BEGIN
    IF owner IS NOT NULL AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        EXECUTE format('SET LOCAL ROLE %s', owner);
    END IF;
END
$do$;
"""

# The version of what was installed before versions were marked.
UNMARKED = """
    CASE WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('pipeline_stages')
                      AND attname = 'held_by') THEN 1 ELSE 0 END"""

# A table that was just made has no foreign triggers. It gets the owner of the others.
MARK = f"""
DO $mark$
DECLARE
    owner regrole := (SELECT relowner FROM pg_class WHERE oid = to_regclass('pipeline_stages'));
BEGIN
    IF to_regclass('job_state_listener_schema') IS NULL THEN
        CREATE TABLE job_state_listener_schema (
            one     boolean PRIMARY KEY DEFAULT true CHECK (one),
            version integer NOT NULL
        );
        INSERT INTO job_state_listener_schema (version) SELECT CASE
            WHEN to_regclass('stage_calls') IS NULL THEN {LATEST}
            ELSE {UNMARKED} END;
        IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            EXECUTE 'ALTER TABLE job_state_listener_schema OWNER TO '
                || coalesce(owner::text, 'CURRENT_USER');
        END IF;
    END IF;
END
$mark$;
"""

# The trigger functions are made anew for another key of stage_calls, or another type of its ids. A
# write of the application that waited in the old one for a lock on stage_calls would fail. So it
# waits for its own table, before the trigger is called.
LOCK = """
DO $do$
DECLARE
    place regclass;
BEGIN
    IF (SELECT version FROM job_state_listener_schema) < 3 OR (
           SELECT c.atttypid <> j.atttypid
                  AND NOT (c.atttypid = 'int8'::regtype
                           AND j.atttypid IN ('int2'::regtype, 'int4'::regtype))
           FROM pg_attribute AS c JOIN pg_attribute AS j
               ON j.attrelid = to_regclass('jobs') AND j.attname = 'job_id'
           WHERE c.attrelid = to_regclass('stage_calls') AND c.attname = 'job_id')
    THEN
        FOR place IN
            SELECT DISTINCT t.tgrelid FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
            WHERE t.tgparentid = 0
              AND p.pronamespace = quote_ident(current_schema())::regnamespace
              AND (p.proname = 'notify_job_state_change' OR p.proname ^@ 'job_state_listener_')
            ORDER BY 1
        LOOP
            EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', place);
        END LOOP;
    END IF;
END
$do$;
"""

STEP = """
DO $step$
BEGIN
    IF (SELECT version FROM job_state_listener_schema) < {version} THEN
        {statements}
        UPDATE job_state_listener_schema SET version = {version};
    END IF;
END
$step$;
"""


# The application may have changed the type or collation of its ids. Our copies are converted, with
# all rows: with another collation their index cannot be used, with another type they cannot be
# compared at all. Functions with the type in their signature are made anew by triggers.sql and
# views.sql.
IDS = """
DO $do$
DECLARE
    wanted record;
    copy   record;
BEGIN
    SELECT w.type, CASE WHEN w.type = a.atttypid THEN a.attcollation ELSE 0 END AS collation,
           format_type(w.type, -1) AS name
    INTO wanted
    FROM pg_attribute AS a
    CROSS JOIN LATERAL (SELECT CASE WHEN a.atttypid IN ('int2'::regtype, 'int4'::regtype)
                                    THEN 'int8'::regtype::oid ELSE a.atttypid END AS type) AS w
    WHERE a.attrelid = to_regclass('jobs') AND a.attname = 'job_id' AND NOT a.attisdropped;
    IF wanted IS NULL THEN
        RETURN;
    END IF;
    FOR copy IN
        SELECT p.oid::regprocedure AS name FROM pg_proc AS p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND wanted.type <> CASE p.proname
              WHEN 'stage_call_row' THEN p.proargtypes[2]
              WHEN 'stage_join_is_complete' THEN p.proargtypes[1]
              WHEN 'resting_rows' THEN p.proallargtypes[3] END
    LOOP
        EXECUTE format('DROP FUNCTION %s', copy.name);
    END LOOP;
    FOR copy IN
        SELECT a.attrelid::regclass AS place, a.attname AS name, a.atttypid AS type
        FROM (VALUES ('stage_attempts', 'job_id'), ('stage_leases', 'job_id'),
                     ('stage_looks', 'parent_id'), ('stage_joins', 'parent_id'),
                     ('stage_moves', 'job_id'),
                     ('stage_calls', 'job_id')) AS copies (place, name)
        JOIN pg_attribute AS a ON a.attrelid = to_regclass(copies.place) AND a.attname = copies.name
        WHERE a.atttypid <> wanted.type OR a.attcollation <> wanted.collation
    LOOP
        DROP VIEW IF EXISTS given_up_calls;
        EXECUTE format('ALTER TABLE %s ALTER %I TYPE %s%s USING %I::text::%s', copy.place,
            copy.name, wanted.name, CASE WHEN wanted.collation <> 0
                              THEN ' COLLATE ' || wanted.collation::regcollation ELSE '' END,
            copy.name, wanted.name);
    END LOOP;
EXCEPTION WHEN data_exception OR cannot_coerce THEN
    RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE = format(
        'an id in %s is no %s (%s): only you know which job it is now; see "Changing jobs" in '
        'docs/OPERATING.md', copy.place, wanted.name, SQLERRM);
-- Not given more time, as writes to jobs wait for this.
WHEN query_canceled THEN
    RAISE EXCEPTION USING ERRCODE = 'query_canceled', MESSAGE = format(
        'the ids of %s were not changed to %s (%s), and nothing else was: where it is too long, '
        'shorten the history, see "Changing jobs" in docs/OPERATING.md',
        copy.place, wanted.name, SQLERRM);
END
$do$;
"""

# Runs after SCHEMA: revokes what ALTER DEFAULT PRIVILEGES has granted on new objects, and restores
# the grants of those that were made again. The grants of --reader come after it.
SETTLE_GRANTS = grants.SETTLE.format(names=NAMES)
# After it, in its transaction; "" where no role could read new tables by default.
UNREAD = "SELECT current_setting('job_state_listener.unread')"


def script() -> str:
    """The SQL that upgrades an installation of any released version, in one transaction.

    Its first statements find out where jobs is, and note what was granted.
    """
    steps = (STEP.format(version=number, statements=text) for number, text in STEPS.items())
    first = BEGIN + MOVE.format(names=NAMES) + grants.NOTE.format(names=NAMES)
    return first + MARK + LOCK + AS_OWNER + "".join(steps) + IDS + "RESET ROLE;"


FOUND = f"""
SELECT to_regclass('job_state_listener_schema') IS NOT NULL AS is_marked, {UNMARKED} AS version
"""
VERSION = "SELECT version FROM job_state_listener_schema"


def version(conn) -> int:
    """The version of what is installed; 0 is that of the first release."""
    found = db.execute(conn, FOUND).fetchone()
    if not found.is_marked:
        return found.version
    row = db.execute(conn, VERSION).fetchone()
    if row is None:
        raise Problem("table job_state_listener_schema is empty, as after a restore without data: "
                      f"{JSL} uninstall, which says what goes with it, {JSL} install, {JSL} "
                      "backfill")  # fmt: skip
    return row.version


def refusal(conn) -> str | None:
    """Why this program cannot work with what is installed; None where it can."""
    found = version(conn)
    if found < LATEST:
        return f"the database's part is of version {found}, this program needs {LATEST}: {INSTALL}"
    if found > LATEST:
        return (
            f"the database's part is of version {found}, newer than this program, which knows "
            f"{LATEST}: deploy the newer program"
        )
    return None


def require_not_newer(conn) -> None:
    """Raises Problem where a newer program has installed."""
    if version(conn) > LATEST:
        raise Problem(refusal(conn))
