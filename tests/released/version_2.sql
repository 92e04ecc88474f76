-- What `install` of version 2 ran.

SET LOCAL lock_timeout = '7s';
SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('job_state_listener.install'));
SELECT pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', coalesce(
    (SELECT n.nspname FROM pg_catalog.pg_class AS c
     JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid = pg_catalog.to_regclass('jobs')),
    pg_catalog.current_schema())), true);

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
            WHEN to_regclass('stage_calls') IS NULL THEN 2
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
RESET ROLE;SET LOCAL lock_timeout = '800ms';
SELECT set_config('job_state_listener.silent', '', true),
       set_config('job_state_listener.routes', '[["img_gen", "done", "vlm_analyze"], ["vlm_analyze", "done", "yolo_detect"], ["yolo_detect", "done", "planner"], ["planner", "done", "overlay"], ["overlay", "done", "vlm_judge"]]', true);
-- Job State Listener: the database's part.
--
-- Apply with `make trigger` (python listener.py install), which first brings an earlier
-- version up to this one (ops/migrations.py), and then fills pipeline_stages and stage_limits
-- from stages.py. Applying it again changes nothing that is right already, and never touches
-- a row of jobs. PostgreSQL 13 or later.

-- The application's own table, made only where there is none.
CREATE TABLE IF NOT EXISTS jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text,
    current_step text,
    status       text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
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
    -- A held stage is called by nobody until then; the next hold lasts twice as long. A
    -- person's pause is a hold until infinity.
    held_until   timestamptz,
    hold_seconds double precision,
    held_reason  text,
    held_by      text,
    PRIMARY KEY (current_step, status)
);

-- How many calls of a stage may be under way at once, over all listeners; only of stages with
-- max_running. Whoever claims locks the row, and then counts stage_leases.
CREATE TABLE IF NOT EXISTS stage_limits (
    name        text PRIMARY KEY,
    max_running integer NOT NULL CHECK (max_running > 0)
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
            -- Due now, retried later, leased until, or infinity: given up. By the clock, so that
            -- calls of one transaction differ and a claim can go on where the last one was.
            due_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
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

-- Keeps the debt in step with the job, in the job's own transaction, then rings the bell.
-- It runs with its owner's rights: the search path holds nothing that a user could put a
-- function or an operator in, and its table is named with its schema, filled in here. So are the
-- routes: looking into pipeline_stages for every row was a third of what the trigger cost.
-- The plan is pinned: planned while stage_calls was empty, the DELETE made an UPDATE of
-- 20,000 jobs take 14 s.
DO $do$
DECLARE
    -- What `install` asks for; else as they were.
    routes jsonb := coalesce(
        nullif(current_setting('job_state_listener.routes', true), '')::jsonb,
        (SELECT jsonb_agg(jsonb_build_array(current_step, status, stage)) FROM pipeline_stages));
BEGIN
    EXECUTE format('CREATE OR REPLACE FUNCTION notify_job_state_change() RETURNS trigger'
        ' LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp'
        ' SET enable_seqscan = off AS %L', format($body$
DECLARE
    route   text;
    owed    boolean := false;
    payload text;
BEGIN
    IF to_regclass(%1$L) IS NULL THEN
        RAISE WARNING 'Job State Listener: its tables are missing, so no call is recorded'
            USING HINT = 'Run: python listener.py install';
    ELSE
        route := CASE %2$s END;
        IF route IS NULL THEN
            DELETE FROM %1$s AS c
            WHERE c.job_id = NEW.job_id
              AND (c.current_step IS DISTINCT FROM NEW.current_step::text
                   OR c.status IS DISTINCT FROM NEW.status::text);
        ELSIF NEW.job_id IS NOT NULL THEN
            -- Nearly always there is no open call, and without the clauses for one the
            -- trigger costs a twentieth less.
            INSERT INTO %1$s (job_id, tenant_id, current_step, status, stage)
            VALUES (NEW.job_id, NEW.tenant_id::text,
                    NEW.current_step::text, NEW.status::text, route)
            ON CONFLICT (job_id) DO NOTHING;
            IF NOT FOUND THEN
                -- An open call is replaced, but not one of the same state that is under
                -- way: a row that moves between partitions arrives again without having left.
                INSERT INTO %1$s AS c (job_id, tenant_id, current_step, status, stage)
                VALUES (NEW.job_id, NEW.tenant_id::text,
                        NEW.current_step::text, NEW.status::text, route)
                ON CONFLICT (job_id) DO UPDATE
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

    -- A new row that owes nothing is no change of state to anybody. With an argument the
    -- trigger rings no bell: workers look by themselves.
    IF TG_NARGS > 0 OR NOT owed AND TG_OP = 'INSERT' THEN
        RETURN NULL;
    END IF;

    payload := json_build_object('job_id', NEW.job_id, 'current_step', NEW.current_step,
                                 'status', NEW.status, 'tenant_id', NEW.tenant_id)::text;
    IF octet_length(payload) > 7999 THEN
        -- NOTIFY would abort the application's transaction: null for what is long. Four
        -- values of 1,900 bytes and their names make 7,999.
        SELECT json_object_agg(field.key, CASE
                   WHEN octet_length(field.value::text) <= 1900 THEN field.value END)::text
        INTO payload
        FROM json_each(payload::json) AS field;
    END IF;
    -- An assignment needs no executor, which PERFORM would start for every row.
    payload := pg_notify('job_state_changed', payload);
    RETURN NULL;
END
$body$, format('%I.stage_calls', current_schema()), coalesce((
    SELECT string_agg(format(
        'WHEN NEW.current_step::text = %L AND NEW.status::text = %L THEN %L',
        route ->> 0, route ->> 1, route ->> 2), ' ')
    FROM jsonb_array_elements(routes) AS route), 'WHEN false THEN NULL')));
END
$do$;

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
        SELECT c.oid FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
        WHERE owner IS NOT NULL AND r.rolsuper AND c.oid IN (
            SELECT to_regclass(name) FROM unnest(ARRAY[
                'pipeline_stages', 'stage_calls', 'stage_leases', 'stage_limits',
                'stage_attempts', 'stage_totals', 'stage_totals_mark', 'stage_slots',
                'job_state_listener_schema']) AS name)
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO %s', made, owner);
    END LOOP;
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
    silent boolean := coalesce(
        -- What `install --no-notify` or `--notify` asks for; else as it was.
        nullif(current_setting('job_state_listener.silent', true), '')::boolean,
        (SELECT tgnargs > 0 FROM pg_trigger WHERE tgrelid = 'jobs'::regclass
         AND tgname = 'job_state_change_trigger'),
        false);
BEGIN
    FOR wanted IN SELECT * FROM (VALUES
        ('job_state_change_trigger', 17, $ddl$
            CREATE TRIGGER job_state_change_trigger
                AFTER UPDATE ON jobs
                FOR EACH ROW
                WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step
                   OR OLD.status IS DISTINCT FROM NEW.status)
                EXECUTE FUNCTION notify_job_state_change(%s)$ddl$),
        -- Rows that are born in a routed state, and rows moved between partitions.
        ('job_state_insert_trigger', 5, $ddl$
            CREATE TRIGGER job_state_insert_trigger
                AFTER INSERT ON jobs
                FOR EACH ROW
                EXECUTE FUNCTION notify_job_state_change(%s)$ddl$)
    ) AS t (name, type, ddl)
    LOOP
        SELECT * INTO found FROM pg_trigger
        WHERE tgrelid = 'jobs'::regclass AND tgname = wanted.name;
        IF found.oid IS NULL
           OR found.tgfoid <> 'notify_job_state_change()'::regprocedure
           OR found.tgtype <> wanted.type  -- bits: 1 row, 4 insert, 16 update
           OR found.tgattr::text <> ''
           OR (found.tgnargs > 0) <> silent
           OR (found.tgqual IS NULL) <> (wanted.name = 'job_state_insert_trigger') THEN
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON jobs', wanted.name);
            EXECUTE format(wanted.ddl, CASE WHEN silent THEN quote_literal('silent') END);
        ELSIF found.tgenabled NOT IN ('O', 'A') THEN  -- disabled, or for replicas only
            EXECUTE format('ALTER TABLE jobs ENABLE TRIGGER %I', wanted.name);
        END IF;
    END LOOP;
END
$do$;
-- Job State Listener: what people and dashboards read.
--
-- Applied by `make trigger` after schema.sql, in the same transaction and search path.
-- Nothing here depends on a column of jobs, which the application may change as it likes.

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
       coalesce(a.failures_last_hour, 0) AS failures_last_hour, a.p50_seconds, a.p95_seconds
FROM (
    SELECT stage, min(position) AS position, max(max_running) AS max_running,
           max(timeout) AS timeout,
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
    'pause; calls, failures and seconds per accepted call in the last hour';

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
       c.last_error
FROM stage_calls AS c
WHERE c.due_at = 'infinity';

COMMENT ON VIEW given_up_calls IS
    'Job State Listener, a row per call that waits for a person: python listener.py retry JOB_ID';

-- A function with its text in quotes, as a view would keep the application from altering jobs.
-- It may be read by a role that may not read jobs: names are qualified as in
-- notify_job_state_change().
DO $do$
DECLARE
    changed text := 'NULL::timestamptz';
BEGIN
    -- Where jobs says when it last changed, that counts; it need not.
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'jobs'::regclass
               AND attname = 'updated_at' AND NOT attisdropped
               AND atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype)) THEN
        changed := '(to_jsonb(r.j) ->> ''updated_at'')::timestamptz';
    END IF;
    EXECUTE format($ddl$
CREATE OR REPLACE FUNCTION stalled_jobs()
RETURNS TABLE (job_id text, tenant_id text, current_step text, status text, stage text,
               since timestamptz, reason text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
    WITH place AS (  -- where a job that moves on is called, or being worked on
        SELECT current_step, status, stage, timeout, false AS running
        FROM %1$I.pipeline_stages
        UNION ALL
        SELECT DISTINCT stage, 'running', stage, timeout, true FROM %1$I.pipeline_stages
    ), resting AS (
        SELECT j, place.stage, place.timeout, place.running
        FROM %1$I.jobs AS j
        JOIN place ON place.current_step = j.current_step::text AND place.status = j.status::text
        OFFSET 0  -- first, as most jobs are through and need not be looked up below
    )
    SELECT (r.j).job_id::text, (r.j).tenant_id::text, (r.j).current_step::text,
           (r.j).status::text, r.stage, greatest(changed.at, last.finished_at),
           CASE WHEN r.running THEN 'running for longer than the timeout'
                WHEN last.stage = r.stage AND last.outcome IN ('succeeded', 'skipped')
                THEN 'accepted by the stage, but the job has not changed'
                ELSE 'its call was never recorded: python listener.py backfill' END
    FROM resting AS r
    CROSS JOIN LATERAL (  -- ordered inside: by the index on finished_at it would read them all
        SELECT max(a.finished_at) AS finished_at,
               (array_agg(a.stage ORDER BY a.finished_at DESC))[1] AS stage,
               (array_agg(a.outcome ORDER BY a.finished_at DESC))[1] AS outcome
        FROM %1$I.stage_attempts AS a WHERE a.job_id = (r.j).job_id) AS last
    CROSS JOIN LATERAL (SELECT %2$s AS at) AS changed
    WHERE NOT EXISTS (SELECT FROM %1$I.stage_calls AS c WHERE c.job_id = (r.j).job_id)
      AND NOT EXISTS (SELECT FROM %1$I.stage_leases AS l
                      WHERE l.job_id = (r.j).job_id AND l.leased_until > now())
      AND last.outcome IS DISTINCT FROM 'cancelled'
      AND CASE WHEN greatest(changed.at, last.finished_at) IS NULL THEN NOT r.running
               ELSE greatest(changed.at, last.finished_at)
                    < now() - make_interval(secs => coalesce(r.timeout, 600)) END
$body$
$ddl$, current_schema(), changed);
END
$do$;

-- What lends its owner's rights belongs to the owner of the tables, as in schema.sql.
DO $do$
DECLARE
    owner oid := (SELECT relowner FROM pg_class WHERE oid = 'stage_calls'::regclass);
    made  regclass;
BEGIN
    FOR made IN
        SELECT oid FROM pg_class WHERE relowner <> owner AND oid IN (
            'pipeline_overview'::regclass, 'stage_latency'::regclass, 'given_up_calls'::regclass)
    LOOP
        EXECUTE format('ALTER VIEW %s OWNER TO %s', made, owner::regrole);
    END LOOP;
    IF owner <> (SELECT proowner FROM pg_proc WHERE oid = 'stalled_jobs()'::regprocedure) THEN
        EXECUTE format('ALTER FUNCTION stalled_jobs() OWNER TO %s', owner::regrole);
    END IF;
END
$do$;

REVOKE ALL ON FUNCTION stalled_jobs() FROM PUBLIC;

COMMENT ON FUNCTION stalled_jobs() IS
    'Job State Listener, a row per job that no call and no stage moves on: accepted, running or '
    'never recorded, for longer than the timeout of its stage';

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

DELETE FROM pipeline_stages WHERE (current_step, status) NOT IN (
    SELECT * FROM unnest(ARRAY['img_gen','vlm_analyze','yolo_detect','planner','overlay']::text[], ARRAY['done','done','done','done','done']::text[]));
INSERT INTO pipeline_stages (current_step, status, stage, max_running, timeout, position)
SELECT * FROM unnest(ARRAY['img_gen','vlm_analyze','yolo_detect','planner','overlay']::text[], ARRAY['done','done','done','done','done']::text[], ARRAY['vlm_analyze','yolo_detect','planner','overlay','vlm_judge']::text[],
                     '{NULL,NULL,NULL,NULL,NULL}'::integer[], ARRAY[600.0,600.0,600.0,600.0,600.0]::float8[]) WITH ORDINALITY
ON CONFLICT (current_step, status) DO UPDATE
SET stage = excluded.stage, max_running = excluded.max_running, timeout = excluded.timeout,
    position = excluded.position;
UPDATE stage_calls AS c SET stage = renamed.stage
FROM (SELECT o.job_id, p.stage
      FROM stage_calls AS o JOIN pipeline_stages AS p USING (current_step, status)
      WHERE o.stage <> p.stage
      FOR UPDATE OF o SKIP LOCKED) AS renamed
WHERE c.job_id = renamed.job_id;
DELETE FROM stage_limits AS l
WHERE NOT EXISTS (SELECT FROM pipeline_stages AS p
                  WHERE p.stage = l.name AND p.max_running IS NOT NULL);
INSERT INTO stage_limits (name, max_running)
SELECT stage, min(max_running) FROM pipeline_stages WHERE max_running IS NOT NULL GROUP BY stage
ON CONFLICT (name) DO UPDATE SET max_running = excluded.max_running
WHERE stage_limits.max_running <> excluded.max_running;
INSERT INTO stage_totals_mark DEFAULT VALUES ON CONFLICT DO NOTHING;
