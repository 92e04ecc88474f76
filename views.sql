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
