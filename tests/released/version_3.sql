-- What `install` of version 3 ran.

SET LOCAL lock_timeout = '7s';
SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('job_state_listener.install'));
SELECT pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', coalesce(
    (SELECT n.nspname FROM pg_catalog.pg_class AS c
     JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid = pg_catalog.to_regclass('jobs')),
    pg_catalog.current_schema())), true);

DO $do$
DECLARE
    here constant oid := (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('jobs'));
    left_behind constant oid := (
        SELECT p.pronamespace FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE t.tgrelid = to_regclass('jobs') AND p.proname = 'notify_job_state_change'
          AND p.pronamespace <> here LIMIT 1);
    made record;
BEGIN
    FOR made IN
        SELECT CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END AS kind,
               oid::regclass::text AS name
        FROM pg_class WHERE relnamespace = left_behind AND relkind IN ('r', 'v')
                        AND relname = ANY (ARRAY['pipeline_tables', 'pipeline_stages', 'stage_limits', 'stage_calls', 'stage_leases', 'stage_looks', 'stage_joins', 'stage_attempts', 'stage_totals', 'stage_totals_mark', 'job_state_listener_schema', 'stage_slots', 'pipeline_overview', 'stage_latency', 'given_up_calls', 'notify_job_state_change', 'stalled_jobs', 'resting_rows', 'stage_call_row', 'stage_join_is_complete', 'stage_column_types'])
        UNION ALL
        SELECT 'FUNCTION', oid::regprocedure::text FROM pg_proc
        WHERE pronamespace = left_behind AND (proname = ANY (ARRAY['pipeline_tables', 'pipeline_stages', 'stage_limits', 'stage_calls', 'stage_leases', 'stage_looks', 'stage_joins', 'stage_attempts', 'stage_totals', 'stage_totals_mark', 'job_state_listener_schema', 'stage_slots', 'pipeline_overview', 'stage_latency', 'given_up_calls', 'notify_job_state_change', 'stalled_jobs', 'resting_rows', 'stage_call_row', 'stage_join_is_complete', 'stage_column_types'])
           OR prorettype = 'trigger'::regtype AND proname ^@ 'job_state_listener_')
    LOOP
        EXECUTE format('ALTER %s %s SET SCHEMA %s', made.kind, made.name, here::regnamespace);
    END LOOP;
END
$do$;

DO $do$
DECLARE
    ours constant text[] := ARRAY['pipeline_tables', 'pipeline_stages', 'stage_limits', 'stage_calls', 'stage_leases', 'stage_looks', 'stage_joins', 'stage_attempts', 'stage_totals', 'stage_totals_mark', 'job_state_listener_schema', 'stage_slots', 'pipeline_overview', 'stage_latency', 'given_up_calls', 'notify_job_state_change', 'stalled_jobs', 'resting_rows', 'stage_call_row', 'stage_join_is_complete', 'stage_column_types'];
BEGIN
    PERFORM set_config('job_state_listener.granted', coalesce((
        SELECT jsonb_object_agg(o.oid, jsonb_build_object(
                   'kind', o.kind, 'name', o.name, 'grants', (
                       SELECT coalesce(jsonb_agg(jsonb_build_object(
                                  'privilege', a.privilege_type, 'option', a.is_grantable,
                                  'role', CASE a.grantee WHEN 0 THEN 'PUBLIC'
                                          ELSE a.grantee::regrole::text END)), '[]')
                       FROM aclexplode(o.acl) AS a WHERE a.grantee <> o.owner)))
        FROM (
    SELECT c.oid, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
           format('%I', c.relname) AS name, c.relowner AS owner,
           coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char",
                                         c.relowner)) AS acl
    FROM pg_class AS c
    WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
      AND c.relkind IN ('r', 'v', 'S') AND (c.relname = ANY (ours) OR EXISTS (
          SELECT FROM pg_depend AS d JOIN pg_class AS t ON t.oid = d.refobjid
          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'i'
            AND t.relname = ANY (ours)))
    UNION ALL
    SELECT p.oid, 'FUNCTION', format('%I', p.proname), p.proowner,
           coalesce(p.proacl, acldefault('f', p.proowner))
    FROM pg_proc AS p
    WHERE p.pronamespace = quote_ident(current_schema())::regnamespace AND (p.proname = ANY (ours)
      OR p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_')) AS o), '{}')::text, true);
END
$do$;

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
            WHEN to_regclass('stage_calls') IS NULL THEN 3
            WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('pipeline_stages')
                         AND attname = 'held_by') THEN 1
            ELSE 0 END;
        IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            EXECUTE 'ALTER TABLE job_state_listener_schema OWNER TO '
                || coalesce(owner::text, 'CURRENT_USER');
        END IF;
    END IF;
END
$mark$;

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

DO $step$
BEGIN
    IF (SELECT version FROM job_state_listener_schema) < 1 THEN
        
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
    
        UPDATE job_state_listener_schema SET version = 1;
    END IF;
END
$step$;

DO $step$
BEGIN
    IF (SELECT version FROM job_state_listener_schema) < 2 THEN
        
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
    
        UPDATE job_state_listener_schema SET version = 2;
    END IF;
END
$step$;

DO $step$
BEGIN
    IF (SELECT version FROM job_state_listener_schema) < 3 THEN
        
        ALTER TABLE pipeline_stages
            ADD COLUMN table_name text COLLATE "C" NOT NULL DEFAULT 'jobs',
            ADD COLUMN join_of text COLLATE "C" NOT NULL DEFAULT '',
            ADD COLUMN child_table text,
            ADD COLUMN waiting_since timestamptz,
            ADD COLUMN refusing_since timestamptz,
            DROP CONSTRAINT pipeline_stages_pkey,
            ADD PRIMARY KEY (table_name, join_of, current_step, status);
        ALTER TABLE stage_calls
            ADD COLUMN table_name text COLLATE "C" NOT NULL DEFAULT 'jobs',
            ADD COLUMN join_of text COLLATE "C" NOT NULL DEFAULT '',
            DROP CONSTRAINT stage_calls_pkey,
            ADD PRIMARY KEY (job_id, table_name, join_of);
        ALTER TABLE IF EXISTS stage_leases
            ADD COLUMN table_name text COLLATE "C" NOT NULL DEFAULT 'jobs';
        ALTER TABLE stage_attempts
            ADD COLUMN table_name text COLLATE "C" NOT NULL DEFAULT 'jobs',
            ADD COLUMN spent integer;
    
        UPDATE job_state_listener_schema SET version = 3;
    END IF;
END
$step$;

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
END
$do$;
RESET ROLE;SET LOCAL lock_timeout = '800ms'; 
SELECT set_config('job_state_listener.silent', '', true),
       set_config('job_state_listener.updates_only', '', true),
       set_config('job_state_listener.pipeline', '{"tables": [{"name": "jobs", "position": 1, "id_column": "job_id", "tenant_column": "tenant_id", "parent_table": null, "parent_column": null, "channel": "job_state_changed"}], "routes": [{"table_name": "jobs", "join_of": "", "child_table": null, "current_step": "img_gen", "status": "done", "stage": "vlm_analyze", "max_running": null, "timeout": 600.0, "position": 1}, {"table_name": "jobs", "join_of": "", "child_table": null, "current_step": "vlm_analyze", "status": "done", "stage": "yolo_detect", "max_running": null, "timeout": 600.0, "position": 2}, {"table_name": "jobs", "join_of": "", "child_table": null, "current_step": "yolo_detect", "status": "done", "stage": "planner", "max_running": null, "timeout": 600.0, "position": 3}, {"table_name": "jobs", "join_of": "", "child_table": null, "current_step": "planner", "status": "done", "stage": "overlay", "max_running": null, "timeout": 600.0, "position": 4}, {"table_name": "jobs", "join_of": "", "child_table": null, "current_step": "overlay", "status": "done", "stage": "vlm_judge", "max_running": null, "timeout": 600.0, "position": 5}]}', true);
-- Job State Listener: the database's tables.
--
-- Apply with `make trigger` (python listener.py install), which first brings an earlier
-- version up to this one (ops/migrations.py), then makes the triggers (triggers.sql) and views
-- (views.sql), and fills pipeline_tables, pipeline_stages and stage_limits from stages.py.
-- Applying it again changes nothing that is right already, and never touches a row of the
-- application's tables. PostgreSQL 13 or later.

-- The application's own table, made only where there is none.
CREATE TABLE IF NOT EXISTS jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text,
    current_step text,
    status       text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

-- The tables whose rows go through stages, as stages.py declares them.
CREATE TABLE IF NOT EXISTS pipeline_tables (
    name          text COLLATE "C" PRIMARY KEY,
    position      integer NOT NULL,
    id_column     text NOT NULL,
    tenant_column text,  -- NULL: the parent has it
    parent_table  text,
    parent_column text,
    channel       text  -- where changes are announced
);

-- What stages.py says, one row per edge of PIPELINE, and what holds a stage.
CREATE TABLE IF NOT EXISTS pipeline_stages (
    current_step text NOT NULL,
    status       text NOT NULL,
    stage        text NOT NULL,
    position     integer,  -- in PIPELINE
    max_running  integer CHECK (max_running > 0),
    -- Seconds for a whole call: what takes longer is stalled, and was first seen so then.
    timeout      double precision,
    stalled_since timestamptz,
    -- Since when people know that its calls wait, or that it accepts none.
    waiting_since timestamptz,
    refusing_since timestamptz,
    -- A held stage is called by nobody until then; the next hold lasts twice as long. A
    -- person's pause is a hold until infinity.
    held_until   timestamptz,
    hold_seconds double precision,
    held_reason  text,
    held_by      text,
    -- Whose row owes the call. Of a join that is the parent, while the state is that of every row
    -- of child_table.
    table_name   text COLLATE "C" NOT NULL DEFAULT 'jobs',
    join_of      text COLLATE "C" NOT NULL DEFAULT '',
    child_table  text,
    PRIMARY KEY (table_name, join_of, current_step, status)
);

-- How many calls of a stage may be under way at once, over all listeners; only of stages with
-- max_running. Whoever claims locks the row, and then counts stage_leases.
CREATE TABLE IF NOT EXISTS stage_limits (
    name        text PRIMARY KEY,
    max_running integer NOT NULL CHECK (max_running > 0)
);

-- job_id has the type and collation it has in jobs, but as wide as that type goes: jobs may be
-- widened later, and its writes must not fail on our copy.
DO $do$
DECLARE
    id_type text;
    missing text;
BEGIN
    SELECT string_agg(needed, ', ') INTO missing
    FROM unnest(ARRAY['job_id', 'tenant_id', 'current_step', 'status']) AS needed
    WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'jobs'::regclass
                      AND attname = needed AND attnum > 0 AND NOT attisdropped);
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_column',
            MESSAGE = format('table jobs has no column %s', missing);
    END IF;
    SELECT CASE WHEN atttypid IN ('int2'::regtype, 'int4'::regtype) THEN 'bigint'
                ELSE format_type(atttypid, -1)
                     || CASE WHEN attcollation <> typcollation
                             THEN ' COLLATE ' || attcollation::regcollation ELSE '' END END
    INTO id_type
    FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
    WHERE attrelid = 'jobs'::regclass AND attname = 'job_id';

    -- What is owed now: at most one open call per row, and one per join of a parent. job_id is the
    -- row's id, whatever its table calls it. Small, so that its plans hold.
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_calls (
            job_id        %s NOT NULL,
            tenant_id     text,
            call_id       bigint GENERATED ALWAYS AS IDENTITY (CACHE 32),
            current_step  text NOT NULL,
            status        text NOT NULL,
            stage         text NOT NULL,
            created_at    timestamptz NOT NULL DEFAULT now(),
            -- Due now, retried later, leased until, or infinity: given up. By the clock, so that
            -- calls of one transaction differ and a claim can go on where the last one was.
            due_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
            -- Grows with every claim and never falls: with call_id it fences results.
            attempts      integer NOT NULL DEFAULT 0,
            -- Those of them that do not count towards MAX_ATTEMPTS.
            free_attempts integer NOT NULL DEFAULT 0,
            worker        text,
            started_at    timestamptz,
            last_error    text,
            table_name    text COLLATE "C" NOT NULL DEFAULT 'jobs',
            join_of       text COLLATE "C" NOT NULL DEFAULT '',
            PRIMARY KEY (job_id, table_name, join_of)
            -- No CHECK here: each one costs the application 3 µs a row.
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
    $ddl$, id_type);

    -- Who is calling what: one row per attempt under way. A stage that sets its job running
    -- has paid the debt, but its call goes on, and its worker may yet be lost. An attempt that
    -- got no answer keeps its row until the lease is over, as the stage may still be working.
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_leases (
            job_id       %s NOT NULL,
            call_id      bigint NOT NULL,
            attempt      integer NOT NULL,
            stage        text NOT NULL,
            worker       text NOT NULL,
            started_at   timestamptz NOT NULL,
            leased_until timestamptz NOT NULL,
            unanswered   boolean NOT NULL DEFAULT false,
            table_name   text COLLATE "C" NOT NULL DEFAULT 'jobs',
            PRIMARY KEY (call_id, attempt)
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
    $ddl$, id_type);

    -- What happened: one appended row per finished attempt, pruned by HISTORY_DAYS.
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_attempts (
            job_id       %s NOT NULL,
            call_id      bigint NOT NULL,
            attempt      integer NOT NULL,
            stage        text NOT NULL,
            worker       text NOT NULL,
            started_at   timestamptz NOT NULL,
            finished_at  timestamptz NOT NULL,
            http_status  integer,
            outcome      text NOT NULL CHECK (outcome IN (
                'succeeded',  -- accepted with a 2xx answer
                'held',       -- stage unreachable or throttling; costs no attempt
                'retry',      -- refused for now; called again after a back-off
                'unknown',    -- no answer: called again once the lease has run out
                'failed',     -- given up: waits for a person
                'skipped',    -- the job had moved on or was deleted; nothing was called
                'cancelled',  -- a person dropped the call; nothing was called
                'lost')),     -- the worker never came back; its lease ran out
            error        text,
            table_name   text COLLATE "C" NOT NULL DEFAULT 'jobs',
            -- Attempts that count towards max_attempts, this one included.
            spent        integer,
            -- Serves `job JOB_ID`, and makes settling twice harmless. An attempt taken for
            -- lost has a second row where its worker came back after all.
            PRIMARY KEY (job_id, call_id, attempt, outcome)
        )
    $ddl$, id_type);

    -- "Look whether every row of this parent is in the state." The trigger of the child's table
    -- appends rows, which nobody else writes, so that no transaction of the application waits for
    -- another. A listener takes them (joins.py).
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_looks (
            parent_id  %s NOT NULL,
            join_of    text COLLATE "C" NOT NULL,
            look_id    bigint GENERATED ALWAYS AS IDENTITY (CACHE 32),
            -- A row came to the state; else one that was missing from it went away.
            arrived    boolean NOT NULL,
            PRIMARY KEY (parent_id, join_of, look_id)
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
    $ddl$, id_type);

    -- What became of a join, one row per parent, kept for as long as the parent: its rows rest in
    -- the state, so whether the call was made cannot be seen from them.
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_joins (
            parent_id     %s NOT NULL,
            join_of       text COLLATE "C" NOT NULL,
            -- A row came to the state, and no call is recorded for it yet, as others are missing.
            is_open       boolean NOT NULL,
            recorded_at   timestamptz,
            -- Where the parent was when the call was first claimed: once it has moved on, the call
            -- is not repeated.
            is_noted      boolean NOT NULL DEFAULT false,
            parent_step   text,
            parent_status text,
            PRIMARY KEY (parent_id, join_of)
        )
    $ddl$, id_type);

    -- CREATE INDEX IF NOT EXISTS would lock a table that is in use, even for nothing.
    IF to_regclass('stage_calls_due_idx') IS NULL THEN
        -- Serves the claim: the first due call of a stage, without sorting.
        CREATE INDEX stage_calls_due_idx ON stage_calls (stage, due_at);
    END IF;
    IF to_regclass('stage_leases_job_idx') IS NULL THEN
        -- Serves the claim: is a request for the same job still under way?
        CREATE INDEX stage_leases_job_idx ON stage_leases (job_id);
    END IF;
    IF to_regclass('stage_leases_stage_idx') IS NULL THEN
        -- Serves the claim: how many calls of a limited stage are under way?
        CREATE INDEX stage_leases_stage_idx ON stage_leases (stage);
    END IF;
    IF to_regclass('stage_attempts_finished_idx') IS NULL THEN
        -- Serves the pruning of history and every question about a span of time.
        CREATE INDEX stage_attempts_finished_idx ON stage_attempts (finished_at);
    END IF;
END
$do$;

-- What the history adds up to, which is pruned, while a counter may never fall: the attempts
-- that finished up to counted_until, by the seconds that they took at most.
CREATE TABLE IF NOT EXISTS stage_totals (
    stage          text NOT NULL,
    outcome        text NOT NULL,
    within_seconds double precision NOT NULL,
    attempts       bigint NOT NULL,
    microseconds   bigint NOT NULL,  -- of all of them: a whole number, so that no sum is rounded
    PRIMARY KEY (stage, outcome, within_seconds)
);

-- One row: whoever counts locks it.
CREATE TABLE IF NOT EXISTS stage_totals_mark (
    one           boolean PRIMARY KEY DEFAULT true CHECK (one),
    counted_until timestamptz NOT NULL DEFAULT '-infinity'
);

-- The owner of jobs can make our function run code of his own, by a column whose type has a
-- cast of his: where a superuser installs, what is made belongs to the owner of jobs.
DO $do$
DECLARE
    owner regrole := (SELECT j.relowner FROM pg_class AS j JOIN pg_roles AS r ON r.oid = j.relowner
                      WHERE j.oid = 'jobs'::regclass AND NOT r.rolsuper
                        AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user));
    made  regclass;
BEGIN
    FOR made IN
        SELECT c.oid FROM pg_class AS c
        WHERE c.relowner <> owner AND c.oid IN (
            SELECT to_regclass(name) FROM unnest(ARRAY[
                'pipeline_tables', 'pipeline_stages', 'stage_calls', 'stage_leases',
                'stage_limits', 'stage_looks', 'stage_joins', 'stage_attempts', 'stage_totals',
                'stage_totals_mark', 'stage_slots', 'job_state_listener_schema']) AS name)
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO %s', made, owner);
    END LOOP;
END
$do$;
-- Job State Listener: the functions and triggers, made for the tables of the pipeline.
--
-- Applied by `make trigger` after schema.sql, in the same transaction and search path. They are
-- generated here: which tables and states there are is filled in as text.

-- What they are made for: `install` says it; else it is as it was.
DO $do$
DECLARE
    known constant jsonb := jsonb_build_object(
        'tables', coalesce(
            (SELECT jsonb_agg(to_jsonb(t) ORDER BY t.position) FROM pipeline_tables AS t),
            '[{"name": "jobs", "position": 1, "id_column": "job_id",
               "tenant_column": "tenant_id", "channel": "job_state_changed"}]'),
        'routes', coalesce((SELECT jsonb_agg(to_jsonb(r)) FROM pipeline_stages AS r), '[]'));
BEGIN
    IF coalesce(current_setting('job_state_listener.pipeline', true), '') = '' THEN
        PERFORM set_config('job_state_listener.pipeline', known::text, true);
    END IF;
END
$do$;

-- The types that columns of a table have now, as OIDs; NULL where one is missing. The parser is
-- asked, as a catalog read by a query would be as old as the caller's snapshot.
-- IMMUTABLE is what makes it free. PostgreSQL evaluates an IMMUTABLE call with constant arguments
-- when it plans the expression, and plans anew after an ALTER TABLE of a table that the expression
-- has as a regclass constant. So it runs once a session, and once after each change of the table.
CREATE OR REPLACE FUNCTION stage_column_types(place regclass, columns text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    types text;
BEGIN
    EXECUTE format('SELECT concat_ws('' '', %s) FROM (SELECT NULL::%s AS r) AS x',
                   (SELECT string_agg(format('pg_typeof((r).%I)::oid', name), ', ' ORDER BY position)
                    FROM unnest(columns) WITH ORDINALITY AS c (name, position)), place)
    INTO types;
    RETURN types;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$body$;

-- The trigger function of each table keeps the debt in step with the row, in the transaction that
-- moves it, and then notifies. That of jobs is notify_job_state_change(), that of another table
-- job_state_listener_TABLE().
-- It runs with its owner's rights: the search path holds nothing that a user could put a
-- function or an operator in, and its tables are named with their schema, filled in here. So are
-- the routes: looking into pipeline_stages for every row was a third of what the trigger cost.
-- The plan is pinned: planned while stage_calls was empty, the DELETE made an UPDATE of
-- 20,000 jobs take 14 s.
-- A column that was dropped, renamed or given another type would make NEW.column an error, in a
-- session that has planned it or in every one. So the columns are read once, as they were at
-- install; where the table has changed since, or was restored from a dump, by a dynamic statement,
-- whose failure is a warning: the application's write goes through.
DO $do$
DECLARE
    asked   constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    schema  constant text := current_schema();
    t       record;
    place   regclass;
    columns text[];
    routes  text;  -- the rows' own, as a CASE
    looks   text;  -- what a change means for the joins of the rows' parents
    fields  text;  -- of the notification
    id_type constant text := (
        SELECT format('%I.%I', n.nspname, y.typname)
        FROM pg_attribute AS a JOIN pg_type AS y ON y.oid = a.atttypid
        JOIN pg_namespace AS n ON n.oid = y.typnamespace
        WHERE a.attrelid = 'stage_calls'::regclass AND a.attname = 'job_id');
    -- An id of any length fits into the index of its own table, but not into one of more columns.
    too_long constant text := (
        SELECT CASE WHEN typlen < 0 THEN 'octet_length(%s::text) > 2600' ELSE 'false' END
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
        WHERE attrelid = 'stage_calls'::regclass AND attname = 'job_id');
    fields_read text;  -- the same, of the dynamic statement
    as_installed text;  -- how the columns are read where the table is as it was
    as_found     text;  -- and where it is not
BEGIN
    FOR t IN SELECT * FROM jsonb_to_recordset(asked -> 'tables') AS x (
        name text, id_column text, tenant_column text, parent_table text, parent_column text,
        channel text)
    LOOP
        place := format('%I.%I', schema, t.name)::regclass;
        columns := array_remove(ARRAY[t.id_column, t.tenant_column, 'current_step', 'status',
                                      t.parent_column], NULL);

        SELECT string_agg(format('WHEN step = %L AND state = %L THEN %L',
                                 r.current_step, r.status, r.stage), ' ' ORDER BY r.position)
        INTO routes
        FROM jsonb_to_recordset(asked -> 'routes') AS r (
            table_name text, join_of text, current_step text, status text, stage text,
            position integer)
        WHERE r.table_name = t.name AND r.join_of = '';

        -- A row that came to the state, to another parent, or both: look at its parent. One that
        -- was not in the state and went away may have been the last that its parent waited for.
        SELECT string_agg(format($look$
        IF (step = %1$L AND state = %2$L) IS TRUE
           AND (TG_OP = 'INSERT' OR old_parent IS DISTINCT FROM parent
                OR (old_step = %1$L AND old_state = %2$L) IS NOT TRUE)
           AND parent IS NOT NULL AND NOT %5$s THEN
            INSERT INTO %4$I.stage_looks (parent_id, join_of, arrived) VALUES (parent, %3$L, true);
            looked := true;
        END IF;
        IF TG_OP <> 'INSERT'
           AND (old_step = %1$L AND old_state = %2$L) IS NOT TRUE
           AND (TG_OP = 'DELETE' OR old_parent IS DISTINCT FROM parent)
           AND old_parent IS NOT NULL AND NOT %6$s THEN
            INSERT INTO %4$I.stage_looks (parent_id, join_of, arrived)
            VALUES (old_parent, %3$L, false);
            looked := true;
        END IF;$look$, r.current_step, r.status, r.join_of, schema,
            format(too_long, 'parent'), format(too_long, 'old_parent')), '')
            || $look$
        IF looked AND (TG_NARGS = 0 OR TG_ARGV[0] <> 'silent') THEN
            notified := pg_notify('job_state_listener_join', '');
        END IF;
        IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE'
           AND old_step IS NOT DISTINCT FROM step AND old_state IS NOT DISTINCT FROM state THEN
            RETURN NULL;
        END IF;$look$
        INTO looks
        FROM jsonb_to_recordset(asked -> 'routes') AS r (
            child_table text, join_of text, current_step text, status text)
        WHERE r.child_table = t.name;

        SELECT string_agg(format('%L, NEW.%I', name, name), ', ' ORDER BY position),
               string_agg(format('%L, ($1).%I', name, name), ', ' ORDER BY position)
        INTO fields, fields_read
        FROM unnest(ARRAY[t.id_column, t.parent_column, 'current_step', 'status', t.tenant_column])
            WITH ORDINALITY AS c (name, position)
        WHERE name IS NOT NULL;

        as_installed := format($read$
        IF TG_OP <> 'DELETE' THEN
            id := NEW.%1$I;
            step := NEW.current_step::text;
            state := NEW.status::text;$read$, t.id_column)
            || CASE WHEN t.tenant_column IS NULL THEN '' ELSE format($read$
            tenant := NEW.%I::text;$read$, t.tenant_column) END
            || CASE WHEN t.parent_column IS NULL THEN '' ELSE format($read$
            parent := NEW.%1$I;
        END IF;
        IF TG_OP <> 'INSERT' THEN
            old_step := OLD.current_step::text;
            old_state := OLD.status::text;
            old_parent := OLD.%1$I;$read$, t.parent_column) END
            || $read$
        END IF;$read$;
        -- By way of text, as a cast between numbers would round.
        as_found := format($read$
            IF TG_OP <> 'DELETE' THEN
                EXECUTE %1$L INTO id, step, state, tenant, parent, payload USING NEW;
            END IF;$read$, format('SELECT ($1).%1$I::text::%2$s, ($1).current_step::text,'
                ' ($1).status::text, %3$s, %4$s, json_build_object(%5$s)::text',
                t.id_column, id_type,
                coalesce('($1).' || quote_ident(t.tenant_column) || '::text', 'NULL'),
                coalesce('($1).' || quote_ident(t.parent_column) || '::text::' || id_type, 'NULL'),
                fields_read))
            || CASE WHEN t.parent_column IS NULL THEN '' ELSE format($read$
            IF TG_OP <> 'INSERT' THEN
                EXECUTE %1$L INTO old_step, old_state, old_parent USING OLD;
            END IF;$read$, format('SELECT ($1).current_step::text, ($1).status::text,'
                ' ($1).%1$I::text::%2$s', t.parent_column, id_type)) END;

        EXECUTE format('CREATE OR REPLACE FUNCTION %I() RETURNS trigger'
            ' LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp'
            ' SET enable_seqscan = off AS %L',
            CASE t.name WHEN 'jobs' THEN 'notify_job_state_change'
                 ELSE 'job_state_listener_' || t.name END,
            format($body$
DECLARE
    is_installed constant boolean := to_regclass(%1$L) IS NOT NULL;
    is_as_installed boolean := false;
    id         %10$s;
    tenant     text;
    step       text;
    state      text;
    parent     %10$s;
    old_step   text;
    old_state  text;
    old_parent %10$s;
    route    text;
    owed     boolean := false;
    looked   boolean := false;
    payload  text;
    notified text;
BEGIN
    IF is_installed THEN
        is_as_installed := (TG_RELID = %11$s OR pg_partition_root(TG_RELID) = %11$s)
            AND %12$I.stage_column_types('%11$s'::regclass, %13$L) = %14$L;
    ELSE
        RAISE WARNING 'Job State Listener: its tables are missing, so no call is recorded'
            USING HINT = 'Run: python listener.py install';
    END IF;
    IF is_as_installed THEN%15$s
    ELSE
        BEGIN%16$s
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'Job State Listener: columns of %% have changed, so no call is recorded: %%',
                TG_RELID::regclass, SQLERRM USING HINT = 'Run: python listener.py install';
            RETURN NULL;
        END;
    END IF;

    IF is_installed THEN%3$s
        route := CASE %2$s END;
        IF route IS NULL THEN
            DELETE FROM %1$s AS c
            WHERE c.job_id = id AND c.table_name = %6$L AND c.join_of = ''
              AND (c.current_step IS DISTINCT FROM step OR c.status IS DISTINCT FROM state);
        ELSIF %8$s THEN
            RAISE WARNING 'Job State Listener: an id of more than 2,600 bytes, no call is recorded';
        ELSIF id IS NOT NULL THEN
            -- Nearly always there is no open call, and without the clauses for one the
            -- trigger costs a twentieth less.
            INSERT INTO %1$s (job_id, table_name, tenant_id, current_step, status, stage)
            VALUES (id, %6$L, tenant, step, state, route)
            ON CONFLICT (job_id, table_name, join_of) DO NOTHING;
            IF NOT FOUND THEN
                -- An open call is replaced, but not one of the same state that is under
                -- way: a row that moves between partitions arrives again without having left.
                INSERT INTO %1$s AS c (job_id, table_name, tenant_id, current_step, status, stage)
                VALUES (id, %6$L, tenant, step, state, route)
                ON CONFLICT (job_id, table_name, join_of) DO UPDATE
                SET call_id = DEFAULT, tenant_id = excluded.tenant_id,
                    current_step = excluded.current_step, status = excluded.status,
                    stage = excluded.stage, created_at = excluded.created_at,
                    due_at = excluded.due_at, attempts = 0, free_attempts = 0,
                    worker = NULL, started_at = NULL, last_error = NULL
                WHERE c.worker IS NULL
                   OR c.current_step <> excluded.current_step
                   OR c.status <> excluded.status;
            END IF;
            owed := FOUND;
        END IF;
    END IF;

    -- A new row that owes nothing is no change of state to anybody. A silent trigger does not
    -- notify: listeners poll.
    IF TG_NARGS > 0 AND TG_ARGV[0] = 'silent' OR TG_OP = 'DELETE' OR NOT owed AND TG_OP = 'INSERT' THEN
        RETURN NULL;
    END IF;
%7$s    RETURN NULL;
END
$body$, format('%I.stage_calls', schema), coalesce(routes, 'WHEN false THEN NULL'),
            coalesce(looks, ''), t.id_column, NULL, t.name,
            CASE WHEN t.channel IS NOT NULL THEN format($notify$
    IF payload IS NULL THEN
        payload := json_build_object(%1$s)::text;
    END IF;
    IF octet_length(payload) > 7999 THEN
        -- NOTIFY would abort the application's transaction: null for what is long. Four
        -- values of 1,900 bytes and their names make 7,999, five of 1,500 less.
        SELECT json_object_agg(field.key, CASE
                   WHEN octet_length(field.value::text) <= %2$s THEN field.value END)::text
        INTO payload
        FROM json_each(payload::json) AS field;
    END IF;
    -- An assignment needs no executor, which PERFORM would start for every row.
    notified := pg_notify(%3$L, payload);
$notify$, fields, CASE WHEN t.name = 'jobs' THEN 1900 ELSE 1500 END, t.channel)
            ELSE $wake$    IF owed THEN  -- no change is announced, but a listener may sleep
        notified := pg_notify('job_state_listener_wake', '');
    END IF;
$wake$ END,
            format(too_long, 'id'), NULL, id_type, place::oid, schema, columns,
            stage_column_types(place, columns), as_installed, as_found));
    END LOOP;
END
$do$;

-- stage_join_is_complete(): whether a parent has rows, and all of them are in the state. STABLE, so
-- that it sees what the statement that asks sees.
-- stage_call_row(): where the row that owes a call is now; of a join that is the parent, and
-- whether the join is complete, and whether the parent has moved since it was first claimed.
-- Both name the tables of the application, which a constant statement cannot.
DO $do$
DECLARE
    asked    constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    schema   constant text := current_schema();
    id_type  constant text := (SELECT format_type(atttypid, -1) FROM pg_attribute
                               WHERE attrelid = 'stage_calls'::regclass AND attname = 'job_id');
    branches text;
BEGIN
    SELECT string_agg(format($branch$
    IF a_join = %1$L THEN
        RETURN (SELECT coalesce(bool_and((r.current_step::text = %2$L AND r.status::text = %3$L)
                                         IS TRUE), false)
                FROM %4$I.%5$I AS r WHERE r.%6$I = a_parent);
    END IF;$branch$, r.join_of, r.current_step, r.status, schema, t.name, t.parent_column), '')
    INTO branches
    FROM jsonb_to_recordset(asked -> 'routes') AS r (
             child_table text, join_of text, current_step text, status text)
    JOIN jsonb_to_recordset(asked -> 'tables') AS t (name text, parent_column text)
        ON t.name = r.child_table;

    EXECUTE format('CREATE OR REPLACE FUNCTION stage_join_is_complete(a_join text, a_parent %s)'
        ' RETURNS boolean LANGUAGE plpgsql STABLE AS %L', id_type,
        format(E'\nBEGIN%s\n    RETURN false;\nEND\n', branches));

    SELECT string_agg(format($branch$
    IF a_table = %1$L THEN
        SELECT true, to_jsonb(%2$s), r.current_step::text, r.status::text, %3$s
        INTO is_there, tenant_id, current_step, status, parent_id
        FROM %4$I.%5$I AS r%6$s WHERE r.%7$I = an_id LIMIT 1;%8$s
    END IF;$branch$, t.name,
        CASE WHEN t.tenant_column IS NOT NULL THEN format('r.%I', t.tenant_column)
             WHEN p.tenant_column IS NOT NULL THEN format('p.%I', p.tenant_column)
             ELSE 'NULL::text' END,
        coalesce('r.' || quote_ident(t.parent_column), 'NULL'), schema, t.name,
        CASE WHEN t.tenant_column IS NULL AND p.tenant_column IS NOT NULL
             THEN format(' LEFT JOIN %I.%I AS p ON p.%I = r.%I', schema, p.name, p.id_column,
                         t.parent_column) END, t.id_column,
        -- The parent has it from its own parent.
        CASE WHEN t.tenant_column IS NULL AND p.tenant_column IS NULL AND p.parent_table IS NOT NULL
             THEN format('
        tenant_id := (%I.stage_call_row(%L, %L, parent_id)).tenant_id;', schema, p.name, '') END), '')
    INTO branches
    FROM jsonb_to_recordset(asked -> 'tables') AS t (
             name text, id_column text, tenant_column text, parent_table text, parent_column text)
    LEFT JOIN jsonb_to_recordset(asked -> 'tables') AS p (
             name text, id_column text, tenant_column text, parent_table text)
        ON p.name = t.parent_table;

    EXECUTE format('CREATE OR REPLACE FUNCTION stage_call_row('
        'a_table text, a_join text, an_id %1$s, OUT is_there boolean, OUT tenant_id jsonb,'
        ' OUT current_step text, OUT status text, OUT parent_id %1$s, OUT is_complete boolean,'
        ' OUT has_moved boolean) LANGUAGE plpgsql STABLE AS %2$L', id_type, format($body$
BEGIN%1$s
    IF a_join <> '' THEN
        is_complete := %2$I.stage_join_is_complete(a_join, an_id);
        SELECT m.is_noted AND (m.parent_step, m.parent_status)
                              IS DISTINCT FROM (stage_call_row.current_step, stage_call_row.status)
        INTO has_moved
        FROM %2$I.stage_joins AS m WHERE m.parent_id = an_id AND m.join_of = a_join;
    END IF;
END
$body$, branches, schema));
END
$do$;

-- A function that is replaced keeps its owner, and would run with the rights of whoever made
-- the first version: it belongs to the owner of the tables. Nobody else may hang a function with
-- our rights on a table of their own.
DO $do$
DECLARE
    owner regrole := (SELECT relowner FROM pg_class WHERE oid = 'stage_calls'::regclass);
    made  record;
BEGIN
    FOR made IN
        SELECT p.oid::regprocedure AS name, p.proowner <> owner AS foreign_owned,
               p.prorettype = 'trigger'::regtype AS is_trigger
        FROM pg_proc AS p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND (p.proname IN ('notify_job_state_change', 'stage_call_row', 'stage_join_is_complete',
                             'stage_column_types')
               OR p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_')
    LOOP
        IF made.foreign_owned THEN
            EXECUTE format('ALTER FUNCTION %s OWNER TO %s', made.name, owner);
        END IF;
        IF made.is_trigger THEN
            EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', made.name);
        END IF;
    END LOOP;
END
$do$;

-- Triggers are made only where they are missing or different, and removed from tables that are no
-- longer in the pipeline: each locks its table. That may be the table that was jobs before: one
-- that was renamed and is now a partition, or stands aside.
DO $do$
DECLARE
    asked  constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    wanted record;
    found  pg_trigger;
    gone   record;
    -- The arguments of every trigger say what `install` was asked for: --no-notify, --no-insert.
    -- Where it is not asked, it stays as it was.
    before constant text := coalesce(
        (SELECT encode(tgargs, 'escape') FROM pg_trigger WHERE tgrelid = 'jobs'::regclass
         AND tgname = 'job_state_change_trigger'), '');
    silent constant boolean := coalesce(
        nullif(current_setting('job_state_listener.silent', true), '')::boolean,
        before LIKE 'silent%');
    updates_only constant boolean := coalesce(
        nullif(current_setting('job_state_listener.updates_only', true), '')::boolean,
        before LIKE '%updates only%');
    arguments constant text := concat_ws(', ',
        CASE WHEN silent THEN quote_literal('silent') END,
        CASE WHEN updates_only THEN quote_literal('updates only') END);
BEGIN
    FOR gone IN
        SELECT t.tgname AS name, t.tgrelid::regclass AS place, p.oid::regprocedure AS function
        FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND (p.proname ^@ 'job_state_listener_' OR p.proname = 'notify_job_state_change')
          AND p.prorettype = 'trigger'::regtype AND t.tgparentid = 0
          AND NOT EXISTS (SELECT FROM jsonb_to_recordset(asked -> 'tables') AS x (name text)
                          WHERE to_regclass(format('%I', x.name)) = t.tgrelid
                            AND (x.name = 'jobs') = (p.proname = 'notify_job_state_change')
                            AND (t.tgname <> 'job_state_listener_delete' OR EXISTS (
                                SELECT FROM jsonb_to_recordset(asked -> 'routes')
                                    AS r (child_table text) WHERE r.child_table = x.name)))
        UNION ALL
        SELECT t.tgname, t.tgrelid::regclass, t.tgfoid::regprocedure
        FROM pg_trigger AS t JOIN jsonb_to_recordset(asked -> 'tables') AS x (name text)
            ON t.tgrelid = to_regclass(format('%I', x.name))
        WHERE updates_only AND t.tgname = CASE x.name WHEN 'jobs' THEN 'job_state_insert_trigger'
                                               ELSE 'job_state_listener_insert' END
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', gone.name, gone.place);
    END LOOP;

    FOR wanted IN
        SELECT to_regclass(format('%I', x.name)) AS place, made.*,
               CASE x.name WHEN 'jobs' THEN 'job_state_' || made.event || '_trigger'
                    ELSE 'job_state_listener_' || made.event END AS name,
               (CASE x.name WHEN 'jobs' THEN 'notify_job_state_change'
                     ELSE format('%I', 'job_state_listener_' || x.name) END || '()')::regprocedure
                   AS function,
               CASE made.event WHEN 'change' THEN
                   'WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step'
                   ' OR OLD.status IS DISTINCT FROM NEW.status'
                   || CASE WHEN joins.are THEN format(' OR OLD.%1$I IS DISTINCT FROM NEW.%1$I',
                                                      x.parent_column) ELSE '' END
                   || ')' ELSE '' END AS condition
        FROM jsonb_to_recordset(asked -> 'tables') AS x (name text, parent_column text)
        CROSS JOIN LATERAL (
            SELECT count(*) > 0 AS are
            FROM jsonb_to_recordset(asked -> 'routes') AS r (child_table text)
            WHERE r.child_table = x.name) AS joins
        CROSS JOIN (VALUES
            ('change', 'UPDATE', 17),  -- bits of tgtype: 1 row, 4 insert, 8 delete, 16 update
            -- Rows that are born in a routed state, and rows moved between partitions.
            ('insert', 'INSERT', 5),
            ('delete', 'DELETE', 9)) AS made (event, statement, type)
        WHERE CASE made.event WHEN 'delete' THEN joins.are WHEN 'insert' THEN NOT updates_only
                              ELSE true END
    LOOP
        SELECT * INTO found FROM pg_trigger
        WHERE tgrelid = wanted.place AND tgname = wanted.name;
        IF found.oid IS NULL
           OR found.tgfoid <> wanted.function
           OR found.tgtype <> wanted.type
           OR found.tgattr::text <> ''
           OR rtrim(replace(encode(found.tgargs, 'escape'), chr(92) || '000', ', '), ', ')
              <> replace(arguments, '''', '')
           OR cardinality(string_to_array(pg_get_triggerdef(found.oid), 'IS DISTINCT FROM'))
              <> cardinality(string_to_array(wanted.condition, 'IS DISTINCT FROM'))
                 + (wanted.condition = '')::integer THEN
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', wanted.name, wanted.place);
            EXECUTE format('CREATE TRIGGER %I AFTER %s ON %s FOR EACH ROW %s'
                           ' EXECUTE FUNCTION %s(%s)',
                           wanted.name, wanted.statement, wanted.place, wanted.condition,
                           wanted.function::regproc,
                           arguments);
        ELSIF found.tgenabled NOT IN ('O', 'A') THEN  -- disabled, or for replicas only
            EXECUTE format('ALTER TABLE %s ENABLE TRIGGER %I', wanted.place, wanted.name);
        END IF;
    END LOOP;
END
$do$;
-- Job State Listener: what people and dashboards read.
--
-- Applied by `make trigger` after triggers.sql, in the same transaction and search path.
-- No view depends on a column of the application's, which it may change as it likes.

CREATE OR REPLACE VIEW pipeline_overview AS
SELECT stage, p.position, coalesce(c.owed, 0) AS owed, coalesce(c.due, 0) AS due,
       coalesce(l.calling, 0) AS calling, p.max_running, coalesce(c.retrying, 0) AS retrying,
       c.next_retry_at, coalesce(c.given_up, 0) AS given_up,
       CASE WHEN c.given_up > 0 THEN (
           SELECT g.last_error FROM stage_calls AS g
           WHERE g.stage = c.stage AND g.due_at = 'infinity'
           ORDER BY g.call_id DESC LIMIT 1) END AS last_error,
       c.oldest_due_at, p.held_until, coalesce(p.held_until = 'infinity', false) AS paused,
       p.held_by, p.held_reason, p.timeout,
       coalesce(a.calls_last_hour, 0) AS calls_last_hour,
       coalesce(a.failures_last_hour, 0) AS failures_last_hour, a.p50_seconds, a.p95_seconds,
       coalesce(p.tables, ARRAY(SELECT DISTINCT o.table_name FROM stage_calls AS o
                                WHERE o.stage = c.stage)) AS tables,
       CASE WHEN c.retrying > 0 THEN (
           SELECT r.last_error FROM stage_calls AS r
           WHERE r.stage = c.stage AND r.worker IS NULL AND r.attempts > 0
             AND r.due_at < 'infinity'
           ORDER BY r.call_id DESC LIMIT 1) END AS retry_error
FROM (
    SELECT stage, min(position) AS position, max(max_running) AS max_running,
           max(timeout) AS timeout, array_agg(DISTINCT table_name) AS tables,
           max(held_until) FILTER (WHERE held_until > now()) AS held_until,
           max(held_by) FILTER (WHERE held_until > now()) AS held_by,
           max(held_reason) FILTER (WHERE held_until > now()) AS held_reason
    FROM pipeline_stages GROUP BY stage) AS p
FULL JOIN (  -- a stage that lost its route shows what it still owes
    SELECT stage, count(*) AS owed,
           count(*) FILTER (WHERE due_at <= now()) AS due,
           count(*) FILTER (WHERE worker IS NULL AND attempts > 0
                              AND due_at < 'infinity') AS retrying,
           min(due_at) FILTER (WHERE worker IS NULL AND attempts > 0
                                 AND due_at < 'infinity') AS next_retry_at,
           count(*) FILTER (WHERE due_at = 'infinity') AS given_up,
           min(due_at) FILTER (WHERE due_at <= now()) AS oldest_due_at
    FROM stage_calls GROUP BY stage) AS c USING (stage)
LEFT JOIN (
    SELECT stage, count(*) AS calling FROM stage_leases
    WHERE leased_until > now() GROUP BY stage) AS l USING (stage)
LEFT JOIN (
    SELECT stage, count(*) AS calls_last_hour,
           count(*) FILTER (WHERE outcome <> 'succeeded') AS failures_last_hour,
           percentile_cont(0.5) WITHIN GROUP (
               ORDER BY extract(epoch FROM finished_at - started_at)::double precision)
               FILTER (WHERE outcome = 'succeeded') AS p50_seconds,
           percentile_cont(0.95) WITHIN GROUP (
               ORDER BY extract(epoch FROM finished_at - started_at)::double precision)
               FILTER (WHERE outcome = 'succeeded') AS p95_seconds
    FROM stage_attempts
    WHERE finished_at > now() - interval '1 hour' AND outcome NOT IN ('skipped', 'cancelled')
    GROUP BY stage) AS a USING (stage);

COMMENT ON VIEW pipeline_overview IS
    'Job State Listener, a row per stage: what it owes, calls, retries, gave up; its hold or '
    'pause; calls, failures and seconds per accepted call in the last hour; the tables whose '
    'rows it is called for';

CREATE OR REPLACE VIEW stage_latency AS
SELECT stage, date_trunc('hour', finished_at) AS hour, count(*) AS calls,
       count(*) FILTER (WHERE outcome <> 'succeeded') AS failures,
       percentile_cont(0.5) WITHIN GROUP (
           ORDER BY extract(epoch FROM finished_at - started_at)::double precision)
           FILTER (WHERE outcome = 'succeeded') AS p50_seconds,
       percentile_cont(0.95) WITHIN GROUP (
           ORDER BY extract(epoch FROM finished_at - started_at)::double precision)
           FILTER (WHERE outcome = 'succeeded') AS p95_seconds
FROM stage_attempts
WHERE outcome NOT IN ('skipped', 'cancelled')
GROUP BY stage, date_trunc('hour', finished_at);

COMMENT ON VIEW stage_latency IS
    'Job State Listener, a row per stage and hour: calls, how many failed, and seconds per '
    'accepted call (median and 95th percentile); goes back HISTORY_DAYS';

CREATE OR REPLACE VIEW given_up_calls AS
SELECT c.job_id, c.tenant_id, c.stage, c.current_step, c.status, c.call_id,
       c.attempts - c.free_attempts AS attempts, c.created_at AS owed_since,
       (SELECT max(a.finished_at) FROM stage_attempts AS a
        WHERE a.job_id = c.job_id AND a.call_id = c.call_id) AS given_up_at,
       c.last_error, c.table_name, c.join_of
FROM stage_calls AS c
WHERE c.due_at = 'infinity';

COMMENT ON VIEW given_up_calls IS
    'Job State Listener, a row per call that waits for a person: python listener.py retry JOB_ID';

-- Functions with their text in quotes, as a view would keep the application from altering its
-- tables. They may be read by a role that may not read those: names are qualified as in the
-- trigger functions. Of a row, only the columns that are needed are read, by name: another one may
-- hold what cannot be converted, or megabytes.
DO $do$
DECLARE
    asked   constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    schema  constant text := current_schema();
    -- With its schema, as the functions look in pg_catalog only.
    id_type constant text := (
        SELECT format('%I.%I', n.nspname, t.typname)
        FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
        JOIN pg_namespace AS n ON n.oid = t.typnamespace
        WHERE a.attrelid = 'stage_calls'::regclass AND a.attname = 'job_id');
    resting text;
    joined  text;
BEGIN
    SELECT string_agg(format($rows$
        SELECT %1$L::text AS table_name, r.%2$I::%10$s AS id, %3$s AS tenant_id,
               r.current_step::text AS current_step, r.status::text AS status, %4$s AS changed_at,
               place.stage, place.timeout, place.kind
        FROM (SELECT NULL::timestamptz AS updated_at) AS absent CROSS JOIN %5$I.%6$I AS r%7$s
        JOIN place ON place.table_name = %1$L AND place.current_step = r.current_step::text
                  AND place.status = r.status::text$rows$,
        t.name, t.id_column,
        coalesce('r.' || quote_ident(t.tenant_column) || '::text',
                 'p.' || quote_ident(p.tenant_column) || '::text', 'NULL::text'),
        -- Where a row says when it last changed, that counts; it need not. A timestamp without
        -- time zone may be any zone's, and a time to come is wrong.
        -- The name is that of `absent` where the table has no such column, or has it no more.
        format('(SELECT c.at FROM (SELECT CASE WHEN pg_typeof(updated_at) = ''timestamptz''::regtype'
               ' THEN (to_jsonb(updated_at) #>> ''{}'')::timestamptz END AS at'
               ' FROM %I.%I AS x WHERE x.%I = r.%I LIMIT 1) AS c WHERE c.at <= now())',
               schema, t.name, t.id_column, t.id_column),
        schema, t.name,
        CASE WHEN t.tenant_column IS NULL AND p.tenant_column IS NOT NULL
             THEN format(' LEFT JOIN (SELECT %I AS id, %I FROM %I.%I) AS p ON p.id = r.%I',
                         p.id_column, p.tenant_column, schema, p.name, t.parent_column) END,
        NULL, NULL, id_type), ' UNION ALL')
    INTO resting
    FROM jsonb_to_recordset(asked -> 'tables') AS t (
             name text, id_column text, tenant_column text, parent_table text, parent_column text)
    LEFT JOIN jsonb_to_recordset(asked -> 'tables') AS p (
             name text, id_column text, tenant_column text) ON p.name = t.parent_table;

    -- A join whose call was made, while neither its rows nor the parent have changed since.
    SELECT string_agg(format($rows$
        UNION ALL
        SELECT 'stalled', %1$L, m.parent_id, m.parent_id::text, %2$s, r.current_step::text, r.status::text, %3$L,
               greatest(m.recorded_at, last.finished_at),
               'accepted by the stage, but the job has not changed'
        FROM %4$I.stage_joins AS m
        JOIN %4$I.%5$I AS r ON r.%6$I = m.parent_id
            AND (r.current_step::text, r.status::text)
                IS NOT DISTINCT FROM (m.parent_step, m.parent_status)
        CROSS JOIN LATERAL (
            SELECT max(a.finished_at) AS finished_at,
                   (array_agg(a.outcome ORDER BY a.finished_at DESC))[1] AS outcome
            FROM %4$I.stage_attempts AS a
            WHERE a.job_id = m.parent_id AND a.table_name = %1$L AND a.stage = %3$L) AS last
        WHERE m.join_of = %7$L AND m.is_noted AND NOT m.is_open
          AND last.outcome IS DISTINCT FROM 'cancelled'
          AND greatest(m.recorded_at, last.finished_at)
              < now() - make_interval(secs => %8$s)
          AND NOT EXISTS (SELECT FROM %4$I.stage_calls AS c
                          WHERE c.job_id = m.parent_id AND c.table_name = %1$L)
          AND NOT EXISTS (SELECT FROM %4$I.stage_leases AS l
                          WHERE l.job_id = m.parent_id AND l.table_name = %1$L
                            AND l.leased_until > now())
          AND %4$I.stage_join_is_complete(%7$L, m.parent_id)$rows$,
        t.name, coalesce('r.' || quote_ident(t.tenant_column) || '::text', 'NULL::text'), r.stage, schema,
        t.name, t.id_column, r.join_of, coalesce(r.timeout, 600)), '')
    INTO joined
    FROM jsonb_to_recordset(asked -> 'routes') AS r (
             table_name text, join_of text, stage text, timeout double precision)
    JOIN jsonb_to_recordset(asked -> 'tables') AS t (
             name text, id_column text, tenant_column text) ON t.name = r.table_name
    WHERE r.join_of <> '';

    EXECUTE format($ddl$
CREATE OR REPLACE FUNCTION resting_rows()
RETURNS TABLE (kind text, table_name text, id %4$s, job_id text, tenant_id text,
               current_step text, status text, stage text, since timestamptz, reason text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
    WITH place AS (  -- where a row that moves on is called, or worked on, or has failed
        SELECT table_name, current_step, status, stage, timeout, 'owed' AS kind
        FROM %1$I.pipeline_stages WHERE join_of = ''
        UNION ALL
        SELECT DISTINCT table_name, stage, 'running', stage, timeout, 'running'
        FROM %1$I.pipeline_stages
        UNION ALL
        SELECT DISTINCT table_name, stage, 'failed', stage, timeout, 'failed'
        FROM %1$I.pipeline_stages AS s
        WHERE NOT EXISTS (SELECT FROM %1$I.pipeline_stages AS f
                          WHERE (f.table_name, f.join_of, f.current_step, f.status)
                                = (s.table_name, '', s.stage, 'failed'))
    ), resting AS (%2$s
        OFFSET 0  -- first, as most rows are through and need not be looked up below
    )
    SELECT CASE WHEN r.kind = 'failed' THEN 'failed' ELSE 'stalled' END, r.table_name,
           r.id, r.id::text, r.tenant_id, r.current_step, r.status, r.stage,
           greatest(r.changed_at, last.finished_at),
           CASE WHEN r.kind = 'failed' AND last.stage = r.stage
                     AND last.error LIKE '%%set failed by its stage%%' THEN last.error
                WHEN r.kind = 'failed'
                THEN 'set failed by its stage' || coalesce(': ' || CASE
                     WHEN last.stage = r.stage THEN last.error END, '')
                WHEN r.kind = 'running' THEN 'running for longer than the timeout'
                WHEN last.stage = r.stage AND last.outcome IN ('succeeded', 'skipped')
                THEN 'accepted by the stage, but the job has not changed'
                ELSE 'its call was never recorded: python listener.py backfill' END
    FROM resting AS r
    CROSS JOIN LATERAL (  -- ordered inside: by the index on finished_at it would read them all
        SELECT max(a.finished_at) AS finished_at,
               (array_agg(a.stage ORDER BY a.finished_at DESC))[1] AS stage,
               (array_agg(a.outcome ORDER BY a.finished_at DESC))[1] AS outcome,
               (array_agg(a.error ORDER BY a.finished_at DESC))[1] AS error
        FROM %1$I.stage_attempts AS a
        WHERE a.job_id = r.id AND a.table_name = r.table_name
          AND (a.stage = r.stage OR EXISTS (  -- not those of a join of its rows
              SELECT FROM %1$I.pipeline_stages AS p
              WHERE p.table_name = a.table_name AND p.join_of = '' AND p.stage = a.stage))
    ) AS last
    WHERE NOT EXISTS (SELECT FROM %1$I.stage_calls AS c
                      WHERE c.job_id = r.id AND c.table_name = r.table_name)
      AND NOT EXISTS (SELECT FROM %1$I.stage_leases AS l
                      WHERE l.job_id = r.id AND l.table_name = r.table_name
                        AND l.leased_until > now())
      AND (r.kind = 'failed' OR last.outcome IS DISTINCT FROM 'cancelled'
           AND CASE WHEN greatest(r.changed_at, last.finished_at) IS NULL
                    THEN r.kind <> 'running'
                    ELSE greatest(r.changed_at, last.finished_at)
                         < now() - make_interval(secs => coalesce(r.timeout, 600)) END)%3$s
$body$
$ddl$, schema, resting, coalesce(joined, ''), id_type);

    EXECUTE format($ddl$
CREATE OR REPLACE FUNCTION stalled_jobs()
RETURNS TABLE (job_id text, tenant_id text, current_step text, status text, stage text,
               since timestamptz, reason text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
    SELECT job_id, tenant_id, current_step, status, stage, since, reason
    FROM %I.resting_rows() WHERE kind = 'stalled'
$body$
$ddl$, schema);
END
$do$;

-- What lends its owner's rights belongs to the owner of the tables, as in triggers.sql.
DO $do$
DECLARE
    owner oid := (SELECT relowner FROM pg_class WHERE oid = 'stage_calls'::regclass);
    made  text;
BEGIN
    FOR made IN
        SELECT oid::regclass FROM pg_class WHERE relowner <> owner AND oid IN (
            'pipeline_overview'::regclass, 'stage_latency'::regclass, 'given_up_calls'::regclass)
    LOOP
        EXECUTE format('ALTER VIEW %s OWNER TO %s', made, owner::regrole);
    END LOOP;
    FOR made IN
        SELECT oid::regprocedure FROM pg_proc WHERE proowner <> owner AND oid IN (
            'stalled_jobs()'::regprocedure, 'resting_rows()'::regprocedure)
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO %s', made, owner::regrole);
    END LOOP;
END
$do$;

REVOKE ALL ON FUNCTION stalled_jobs(), resting_rows() FROM PUBLIC;

-- Who was granted stalled_jobs() by an earlier version reads resting_rows() as well.
DO $do$
DECLARE
    reader text;
BEGIN
    FOR reader IN
        SELECT DISTINCT a.grantee::regrole FROM pg_proc AS p, aclexplode(p.proacl) AS a
        WHERE p.oid = 'stalled_jobs()'::regprocedure AND a.grantee NOT IN (0, p.proowner)
          AND NOT has_function_privilege(a.grantee, 'resting_rows()', 'EXECUTE')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION resting_rows() TO %s', reader);
    END LOOP;
END
$do$;

COMMENT ON FUNCTION stalled_jobs() IS
    'Job State Listener, a row per job that no call and no stage moves on: accepted, running or '
    'never recorded, for longer than the timeout of its stage';
COMMENT ON FUNCTION resting_rows() IS
    'Job State Listener, a row per row of any table that no call and no stage moves on: stalled, '
    'or failed, as its stage set it';

DO $do$
DECLARE
    ours constant text[] := ARRAY['pipeline_tables', 'pipeline_stages', 'stage_limits', 'stage_calls', 'stage_leases', 'stage_looks', 'stage_joins', 'stage_attempts', 'stage_totals', 'stage_totals_mark', 'job_state_listener_schema', 'stage_slots', 'pipeline_overview', 'stage_latency', 'given_up_calls', 'notify_job_state_change', 'stalled_jobs', 'resting_rows', 'stage_call_row', 'stage_join_is_complete', 'stage_column_types'];
    was  constant jsonb := current_setting('job_state_listener.granted')::jsonb;
    made record;
    one  record;
BEGIN
    FOR made IN
        SELECT o.*, CASE o.kind WHEN 'FUNCTION' THEN o.oid::regprocedure::text
                        ELSE o.name END AS called
        FROM (
    SELECT c.oid, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
           format('%I', c.relname) AS name, c.relowner AS owner,
           coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char",
                                         c.relowner)) AS acl
    FROM pg_class AS c
    WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
      AND c.relkind IN ('r', 'v', 'S') AND (c.relname = ANY (ours) OR EXISTS (
          SELECT FROM pg_depend AS d JOIN pg_class AS t ON t.oid = d.refobjid
          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'i'
            AND t.relname = ANY (ours)))
    UNION ALL
    SELECT p.oid, 'FUNCTION', format('%I', p.proname), p.proowner,
           coalesce(p.proacl, acldefault('f', p.proowner))
    FROM pg_proc AS p
    WHERE p.pronamespace = quote_ident(current_schema())::regnamespace AND (p.proname = ANY (ours)
      OR p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_')) AS o WHERE NOT was ? o.oid::text
    LOOP
        FOR one IN
            SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC'
                            ELSE a.grantee::regrole::text END AS role
            FROM aclexplode(made.acl) AS a WHERE a.grantee <> made.owner
        LOOP
            EXECUTE format('REVOKE ALL ON %s %s FROM %s', made.kind, made.called, one.role);
        END LOOP;
        IF made.name IN ('stage_call_row', 'stage_join_is_complete', 'stage_column_types') THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', made.called);
        END IF;
        FOR one IN  -- of its predecessor
            SELECT g.* FROM jsonb_each(was) AS w, jsonb_to_recordset(w.value -> 'grants')
                AS g (privilege text, option boolean, role text)
            WHERE w.value ->> 'name' = made.name AND w.value ->> 'kind' = made.kind
              AND (g.role = 'PUBLIC' OR to_regrole(g.role) IS NOT NULL)
        LOOP
            EXECUTE format('GRANT %s ON %s %s TO %s%s', one.privilege, made.kind, made.called,
                           one.role, CASE WHEN one.option THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END LOOP;
END
$do$;

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

DELETE FROM pipeline_tables;
INSERT INTO pipeline_tables
SELECT t.* FROM jsonb_populate_recordset(
    NULL::pipeline_tables, current_setting('job_state_listener.pipeline')::jsonb -> 'tables') AS t;
CREATE TEMPORARY TABLE wanted_stages ON COMMIT DROP AS
SELECT r.table_name, r.join_of, r.child_table, r.current_step, r.status, r.stage, r.max_running,
       r.timeout, r.position
FROM jsonb_populate_recordset(
    NULL::pipeline_stages, current_setting('job_state_listener.pipeline')::jsonb -> 'routes') AS r;
DELETE FROM pipeline_stages WHERE (table_name, join_of, current_step, status) NOT IN (
    SELECT table_name, join_of, current_step, status FROM wanted_stages);
INSERT INTO pipeline_stages (table_name, join_of, child_table, current_step, status, stage,
                             max_running, timeout, position)
SELECT * FROM wanted_stages
ON CONFLICT (table_name, join_of, current_step, status) DO UPDATE
SET stage = excluded.stage, max_running = excluded.max_running, timeout = excluded.timeout,
    position = excluded.position, child_table = excluded.child_table;
UPDATE stage_calls AS c SET stage = renamed.stage
FROM (SELECT o.job_id, o.call_id, p.stage
      FROM stage_calls AS o
      JOIN pipeline_stages AS p USING (table_name, join_of, current_step, status)
      WHERE o.stage <> p.stage
      FOR UPDATE OF o SKIP LOCKED) AS renamed
WHERE c.job_id = renamed.job_id AND c.call_id = renamed.call_id;
DELETE FROM stage_limits AS l
WHERE NOT EXISTS (SELECT FROM pipeline_stages AS p
                  WHERE p.stage = l.name AND p.max_running IS NOT NULL);
INSERT INTO stage_limits (name, max_running)
SELECT stage, min(max_running) FROM pipeline_stages WHERE max_running IS NOT NULL GROUP BY stage
ON CONFLICT (name) DO UPDATE SET max_running = excluded.max_running
WHERE stage_limits.max_running <> excluded.max_running;
INSERT INTO stage_totals_mark DEFAULT VALUES ON CONFLICT DO NOTHING;
