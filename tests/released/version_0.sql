-- What `install` of 1.0.0 ran, before versions were counted.

SET LOCAL lock_timeout = '800ms';

-- Job State Listener: the database's part.
--
-- Apply with `make trigger` (python listener.py install), which also fills
-- pipeline_stages from stages.py. Applying it again changes nothing that is right
-- already, and never touches a row of jobs. PostgreSQL 13 or later.

-- Everything goes beside jobs, wherever the search path finds it.
SELECT pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', coalesce(
    (SELECT n.nspname FROM pg_catalog.pg_class AS c
     JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid = pg_catalog.to_regclass('jobs')),
    pg_catalog.current_schema())), true);

-- The application's own table, made only where there is none.
CREATE TABLE IF NOT EXISTS jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text,
    current_step text,
    status       text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

-- What stages.py says, for the database trigger to read: one row per edge of PIPELINE.
CREATE TABLE IF NOT EXISTS pipeline_stages (
    current_step text NOT NULL,
    status       text NOT NULL,
    stage        text NOT NULL,
    max_running  integer CHECK (max_running > 0),
    -- A held stage is called by nobody until then; the next hold lasts twice as long.
    held_until   timestamptz,
    hold_seconds double precision,
    held_reason  text,
    PRIMARY KEY (current_step, status)
);

-- job_id has the type it has in jobs, but as wide as that type goes: jobs may be widened
-- later, and its writes must not fail on our copy.
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
                ELSE format_type(atttypid, -1) END
    INTO id_type
    FROM pg_attribute WHERE attrelid = 'jobs'::regclass AND attname = 'job_id';

    -- What is owed now: at most one open call per job. Small, so that its plans hold.
    EXECUTE format($ddl$
        CREATE TABLE IF NOT EXISTS stage_calls (
            job_id        %s PRIMARY KEY,
            tenant_id     text,
            call_id       bigint GENERATED ALWAYS AS IDENTITY (CACHE 32),
            current_step  text NOT NULL,
            status        text NOT NULL,
            stage         text NOT NULL,
            created_at    timestamptz NOT NULL DEFAULT now(),
            -- Due now, retried later, leased until, or infinity: given up.
            due_at        timestamptz NOT NULL DEFAULT now(),
            -- Grows with every claim and never falls: with call_id it fences results.
            attempts      integer NOT NULL DEFAULT 0,
            -- Those of them that do not count towards MAX_ATTEMPTS.
            free_attempts integer NOT NULL DEFAULT 0,
            worker        text,
            started_at    timestamptz,
            last_error    text
            -- No CHECK here: each one costs the application 3 µs a row.
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
                'lost')),     -- the worker never came back; its lease ran out
            error        text,
            -- Serves `job JOB_ID`, and makes settling twice harmless. An attempt taken for
            -- lost has a second row where its worker came back after all.
            PRIMARY KEY (job_id, call_id, attempt, outcome)
        )
    $ddl$, id_type);

    -- CREATE INDEX IF NOT EXISTS would lock a table that is in use, even for nothing.
    IF to_regclass('stage_calls_due_idx') IS NULL THEN
        -- Serves the claim: the first due call of a stage, without sorting.
        CREATE INDEX stage_calls_due_idx ON stage_calls (stage, due_at);
    END IF;
    IF to_regclass('stage_attempts_finished_idx') IS NULL THEN
        -- Serves the pruning of history and every question about a span of time.
        CREATE INDEX stage_attempts_finished_idx ON stage_attempts (finished_at);
    END IF;
END
$do$;

-- Keeps the debt in step with the job, in the job's own transaction, then rings the bell.
-- It runs with its owner's rights: the search path holds nothing that a user could put a
-- function or an operator in, and the tables are named with their schema, filled in here.
-- The plan is pinned: planned while stage_calls was empty, the DELETE made an UPDATE of
-- 20,000 jobs take 14 s.
DO $do$
BEGIN
    EXECUTE format($ddl$
CREATE OR REPLACE FUNCTION notify_job_state_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $body$
DECLARE
    payload text;
    owed    boolean := false;
    longest constant integer := 1900;  -- bytes a value may take: four make 7,999
BEGIN
    IF to_regclass(%2$L) IS NULL OR to_regclass(%3$L) IS NULL THEN
        RAISE WARNING 'Job State Listener: its tables are missing, so no call is recorded'
            USING HINT = 'Run: python listener.py install';
    ELSE
        -- An open call is replaced, but not one of the same state that is under way: a row
        -- that moves between partitions arrives again without having left.
        INSERT INTO %1$I.stage_calls AS c (job_id, tenant_id, current_step, status, stage)
        SELECT NEW.job_id, NEW.tenant_id::text, p.current_step, p.status, p.stage
        FROM %1$I.pipeline_stages AS p
        WHERE p.current_step = NEW.current_step::text AND p.status = NEW.status::text
          AND NEW.job_id IS NOT NULL
        ON CONFLICT (job_id) DO UPDATE
        SET call_id = DEFAULT, tenant_id = excluded.tenant_id,
            current_step = excluded.current_step, status = excluded.status,
            stage = excluded.stage, created_at = excluded.created_at,
            due_at = excluded.due_at, attempts = 0, free_attempts = 0,
            worker = NULL, started_at = NULL, last_error = NULL
        WHERE c.worker IS NULL
           OR c.current_step <> excluded.current_step OR c.status <> excluded.status;
        owed := FOUND;
        IF NOT owed THEN
            DELETE FROM %1$I.stage_calls AS c
            WHERE c.job_id = NEW.job_id
              AND (c.current_step IS DISTINCT FROM NEW.current_step::text
                   OR c.status IS DISTINCT FROM NEW.status::text);
        END IF;
    END IF;

    -- A new row that owes nothing is no change of state to anybody.
    IF TG_OP = 'INSERT' AND NOT owed THEN
        RETURN NULL;
    END IF;

    payload := json_build_object('job_id', NEW.job_id, 'current_step', NEW.current_step,
                                 'status', NEW.status, 'tenant_id', NEW.tenant_id)::text;
    IF octet_length(payload) > 7999 THEN
        -- NOTIFY would abort the application's transaction: null for what is long.
        SELECT json_object_agg(field.key, CASE
                   WHEN octet_length(field.value::text) <= longest THEN field.value END)::text
        INTO payload
        FROM json_each(payload::json) AS field;
    END IF;
    PERFORM pg_notify('job_state_changed', payload);
    RETURN NULL;
END
$body$
$ddl$, current_schema(), format('%I.stage_calls', current_schema()),
    format('%I.pipeline_stages', current_schema()));
END
$do$;

-- A function that is replaced keeps its owner, and would run with the rights of whoever made
-- the first version: it belongs to the owner of the tables.
DO $do$
DECLARE
    owner regrole := (SELECT relowner FROM pg_class WHERE oid = 'stage_calls'::regclass);
BEGIN
    IF owner <> (SELECT proowner FROM pg_proc
                 WHERE oid = 'notify_job_state_change()'::regprocedure) THEN
        EXECUTE format('ALTER FUNCTION notify_job_state_change() OWNER TO %s', owner);
    END IF;
END
$do$;

-- Nobody else may hang a function with our rights on a table of their own.
REVOKE ALL ON FUNCTION notify_job_state_change() FROM PUBLIC;

-- Triggers are made only where they are missing or different: making one locks jobs.
DO $do$
DECLARE
    wanted record;
    found  pg_trigger;
BEGIN
    FOR wanted IN SELECT * FROM (VALUES
        ('job_state_change_trigger', 17, $ddl$
            CREATE TRIGGER job_state_change_trigger
                AFTER UPDATE ON jobs
                FOR EACH ROW
                WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step
                   OR OLD.status IS DISTINCT FROM NEW.status)
                EXECUTE FUNCTION notify_job_state_change()$ddl$),
        -- Rows that are born in a routed state, and rows moved between partitions.
        ('job_state_insert_trigger', 5, $ddl$
            CREATE TRIGGER job_state_insert_trigger
                AFTER INSERT ON jobs
                FOR EACH ROW
                EXECUTE FUNCTION notify_job_state_change()$ddl$)
    ) AS t (name, type, ddl)
    LOOP
        SELECT * INTO found FROM pg_trigger
        WHERE tgrelid = 'jobs'::regclass AND tgname = wanted.name;
        IF found.oid IS NULL
           OR found.tgfoid <> 'notify_job_state_change()'::regprocedure
           OR found.tgtype <> wanted.type  -- bits: 1 row, 4 insert, 16 update
           OR found.tgattr::text <> ''
           OR (found.tgqual IS NULL) <> (wanted.name = 'job_state_insert_trigger') THEN
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON jobs', wanted.name);
            EXECUTE wanted.ddl;
        ELSIF found.tgenabled NOT IN ('O', 'A') THEN  -- disabled, or for replicas only
            EXECUTE format('ALTER TABLE jobs ENABLE TRIGGER %I', wanted.name);
        END IF;
    END LOOP;
END
$do$;

INSERT INTO pipeline_stages (current_step, status, stage) VALUES
    ('img_gen', 'done', 'vlm_analyze'),
    ('vlm_analyze', 'done', 'yolo_detect'),
    ('yolo_detect', 'done', 'planner'),
    ('planner', 'done', 'overlay'),
    ('overlay', 'done', 'vlm_judge');
