-- Job State Listener: the database's tables.
--
-- Apply with `make trigger` (./jsl install), which first brings an earlier
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
    priority_column  text,
    run_after_column text,
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
    -- The stage may answer 202 and work on: its call is over when the row moves on.
    asynchronous boolean NOT NULL DEFAULT false,
    pool         text,
    PRIMARY KEY (table_name, join_of, current_step, status)
);

-- How many calls may be under way at once, over all listeners, and how fast they may follow each
-- other: a row per stage with max_running or per_minute, and one per pool. Whoever claims locks
-- the row, and then counts stage_leases.
CREATE TABLE IF NOT EXISTS stage_limits (
    name          text PRIMARY KEY,  -- of the stage, or of the pool
    stages        text[] NOT NULL DEFAULT '{}',  -- whose calls count
    max_running   integer CHECK (max_running > 0),
    seconds       double precision,  -- between two calls, at least
    next_at       timestamptz,  -- when the next one may begin
    -- A pool stays with a stage for so many seconds, as long as calls of it are due.
    linger        double precision,
    -- Tenants take turns; so many calls of one at once. Whose turn was last.
    is_fair       boolean NOT NULL DEFAULT false,
    per_tenant    integer CHECK (per_tenant > 0),
    last_tenant   text,
    stays_with    text,
    stays_since   timestamptz
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

    -- Stages remember calls by their Idempotency-Key, which is made of call_id. So its numbers begin
    -- with the time, 10,000 for each second since 2026: after uninstall and install none is used
    -- again.

    -- What is owed now: at most one open call per row, and one per join of a parent. job_id is the
    -- row's id, whatever its table calls it. Small, so that its plans hold.
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_calls (
            job_id        %s NOT NULL,
            tenant_id     text,  -- its first 500 characters: an index takes no long ones
            call_id       bigint GENERATED ALWAYS AS IDENTITY (START WITH %s CACHE 32),
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
            worker        text,  -- the listener that claimed it
            started_at    timestamptz,
            last_error    text,
            table_name    text COLLATE "C" NOT NULL DEFAULT 'jobs',
            join_of       text COLLATE "C" NOT NULL DEFAULT '',
            -- As the row said when it came to the state, where its table has such columns.
            priority      integer NOT NULL DEFAULT 0,  -- the highest is called first
            run_after     timestamptz,
            PRIMARY KEY (job_id, table_name, join_of)
            -- No CHECK here: each one costs the application 3 us a row.
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
    $ddl$, id_type, greatest(1, extract(epoch FROM clock_timestamp() - timestamptz '2026-01-01') * 10000)::bigint);

    -- Who is calling what: one row per attempt under way. A stage that sets its job running
    -- has paid the debt, but its call goes on, and its listener may yet be lost. An attempt that
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
            -- An asynchronous stage has answered 202: it keeps its place until the row moves on.
            working      boolean NOT NULL DEFAULT false,
            spent        integer,  -- attempts that count, this one included
            tenant_id    text,
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
                'lost')),     -- the listener never came back; its lease ran out
            error        text,
            table_name   text COLLATE "C" NOT NULL DEFAULT 'jobs',
            -- Attempts that count towards max_attempts, this one included.
            spent        integer,
            -- Serves `job JOB_ID`, and makes settling twice harmless. An attempt taken for
            -- lost has a second row where its listener came back after all.
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

    -- "This row has left this asynchronous stage." The trigger appends rows, which nobody else
    -- writes, so that no transaction of the application waits for a listener or fails on one. A
    -- listener takes them (moves.py).
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_moves (
            job_id     %s NOT NULL,
            table_name text COLLATE "C" NOT NULL,
            stage      text NOT NULL,
            is_failed  boolean NOT NULL,  -- set so by its stage
            moved_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
            move_id    bigint GENERATED ALWAYS AS IDENTITY (CACHE 32) PRIMARY KEY
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
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
    IF to_regclass('stage_leases_running_idx') IS NULL THEN
        -- Serves the claim: how many calls of a limited stage are under way? With leased_until in
        -- it, dead entries that an old snapshot elsewhere keeps are passed by once that is over.
        CREATE INDEX stage_leases_running_idx ON stage_leases (stage, leased_until);
    END IF;
    IF to_regclass('stage_attempts_finished_idx') IS NULL THEN
        -- Serves the pruning of history and every question about a span of time.
        CREATE INDEX stage_attempts_finished_idx ON stage_attempts (finished_at);
    END IF;
END
$do$;

-- The due calls of a stage in the order in which they are called, each locked: first those with the
-- highest priority, and of these those of one tenant after the other, where the stage is fair, else
-- the one that is due longest. Used by the claim where a stage or a table declares such a thing.
-- a_skip and a_most: passes so many by, and then returns so many. The statements are written so
-- that each of their conditions serves an index in a plan for any values, too; see UNDER_WAY and
-- IS_OVER in calls.py for the leases.
CREATE OR REPLACE FUNCTION stage_due_calls(a_stage text, a_skip integer, a_most integer,
                                           a_sweep boolean)
RETURNS SETOF stage_calls LANGUAGE plpgsql SET search_path FROM CURRENT AS $body$
DECLARE
    of_stage stage_limits;
    until    constant timestamptz := CASE WHEN a_sweep THEN 'infinity' ELSE now() END;
    levels   constant boolean := EXISTS (SELECT FROM pipeline_tables
                                         WHERE priority_column IS NOT NULL);
    level    bigint := 2147483648;  -- of priority: above the highest
    call     stage_calls;
    chosen   bigint[] := '{}';
    tenants  text[] := '{}';  -- those of the chosen calls
    tenant   text;  -- whose turn it is; NULL: that of the first
    is_taken boolean;  -- a call of anybody in this round
BEGIN
    IF coalesce(a_most, 0) <= 0 THEN
        RETURN;
    END IF;
    SELECT * INTO of_stage FROM stage_limits WHERE name = a_stage;
    LOOP
        IF levels THEN
            SELECT c.priority INTO level FROM stage_calls AS c
            WHERE c.stage = a_stage AND c.priority < level
            ORDER BY c.priority DESC LIMIT 1;
            EXIT WHEN NOT FOUND;
        ELSE
            EXIT WHEN level = 0;
            level := 0;
        END IF;

        IF of_stage.is_fair IS NOT TRUE THEN
            FOR call IN
                SELECT c.* FROM stage_calls AS c
                WHERE c.stage = a_stage AND c.priority = level
                  AND c.due_at <= until AND c.due_at < 'infinity'
                  AND (c.due_at <= now() OR c.attempts = 0)
                  AND (c.run_after IS NULL OR c.run_after <= now())
                  AND NOT EXISTS (SELECT FROM stage_leases AS l
                                  WHERE l.job_id = c.job_id AND l.table_name = c.table_name
                                    AND l.stage || '' = c.stage
                                    AND l.leased_until + interval '0' > now()
                                  OFFSET 0)
                  AND (c.worker IS NULL
                       OR NOT EXISTS (SELECT FROM stage_leases AS l
                                      WHERE l.call_id = c.call_id AND l.attempt = c.attempts
                                        AND l.job_id = c.job_id
                                      OFFSET 0)
                       OR EXISTS (SELECT FROM stage_leases AS l
                                  WHERE l.call_id = c.call_id AND l.attempt = c.attempts
                                    AND l.job_id = c.job_id AND l.leased_until <= now()
                                  FOR UPDATE SKIP LOCKED))
                ORDER BY c.due_at LIMIT a_skip + a_most - cardinality(chosen)
                FOR UPDATE OF c SKIP LOCKED
            LOOP
                chosen := chosen || call.call_id;
                IF cardinality(chosen) > a_skip THEN
                    RETURN NEXT call;
                END IF;
            END LOOP;
            EXIT WHEN cardinality(chosen) >= a_skip + a_most;
            CONTINUE;
        END IF;

        tenant := of_stage.last_tenant;
        is_taken := true;
        LOOP
            IF tenant IS NULL THEN
                SELECT coalesce(c.tenant_id, '') INTO tenant FROM stage_calls AS c
                WHERE c.stage = a_stage AND c.priority = level
                  AND c.due_at <= until AND c.due_at < 'infinity'
                  AND (c.due_at <= now() OR c.attempts = 0)
                  AND (c.run_after IS NULL OR c.run_after <= now())
                ORDER BY coalesce(c.tenant_id, '') LIMIT 1;
            ELSE
                SELECT coalesce(c.tenant_id, '') INTO tenant FROM stage_calls AS c
                WHERE c.stage = a_stage AND c.priority = level
                  AND coalesce(c.tenant_id, '') > tenant
                  AND c.due_at <= until AND c.due_at < 'infinity'
                  AND (c.due_at <= now() OR c.attempts = 0)
                  AND (c.run_after IS NULL OR c.run_after <= now())
                ORDER BY coalesce(c.tenant_id, '') LIMIT 1;
            END IF;
            IF tenant IS NULL THEN  -- the next round begins, unless this one has brought nothing
                EXIT WHEN NOT is_taken;
                is_taken := false;
                CONTINUE;
            END IF;
            CONTINUE WHEN of_stage.per_tenant IS NOT NULL
                AND of_stage.per_tenant <= cardinality(array_positions(tenants, tenant)) + (
                    SELECT count(*) FROM stage_leases AS l
                    WHERE l.stage = a_stage AND coalesce(l.tenant_id, '') = tenant
                      AND l.leased_until > now());
            SELECT c.* INTO call FROM stage_calls AS c
            WHERE c.stage = a_stage AND c.priority = level AND coalesce(c.tenant_id, '') = tenant
              AND c.due_at <= until AND c.due_at < 'infinity'
              AND (c.due_at <= now() OR c.attempts = 0)
              AND (c.run_after IS NULL OR c.run_after <= now())
              AND c.call_id <> ALL (chosen)
              AND NOT EXISTS (SELECT FROM stage_leases AS l
                              WHERE l.job_id = c.job_id AND l.table_name = c.table_name
                                AND l.stage || '' = c.stage
                                AND l.leased_until + interval '0' > now()
                              OFFSET 0)
              AND (c.worker IS NULL
                   OR NOT EXISTS (SELECT FROM stage_leases AS l
                                  WHERE l.call_id = c.call_id AND l.attempt = c.attempts
                                    AND l.job_id = c.job_id
                                  OFFSET 0)
                   OR EXISTS (SELECT FROM stage_leases AS l
                              WHERE l.call_id = c.call_id AND l.attempt = c.attempts
                                AND l.job_id = c.job_id AND l.leased_until <= now()
                              FOR UPDATE SKIP LOCKED))
            ORDER BY c.due_at LIMIT 1
            FOR UPDATE OF c SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            is_taken := true;
            chosen := chosen || call.call_id;
            tenants := tenants || tenant;
            IF cardinality(chosen) > a_skip THEN
                RETURN NEXT call;
            END IF;
            IF cardinality(chosen) >= a_skip + a_most THEN
                RETURN;
            END IF;
        END LOOP;
    END LOOP;
END
$body$;

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
                'stage_limits', 'stage_looks', 'stage_joins', 'stage_moves', 'stage_attempts', 'stage_totals',
                'stage_totals_mark', 'stage_slots', 'job_state_listener_schema']) AS name)
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO %s', made, owner);
    END LOOP;
END
$do$;
