-- Job State Listener: what people and dashboards read.
--
-- Applied by `make trigger` after schema.sql, in the same transaction and search path.
-- Nothing here depends on a column of jobs, which the application may change as it likes.

CREATE OR REPLACE VIEW pipeline_overview AS
SELECT p.stage, p.position, c.owed, c.due, l.calling, p.max_running, c.retrying, c.next_retry_at,
       c.given_up, c.last_error, c.oldest_due_at, p.held_until,
       p.held_until = 'infinity' AS paused, p.held_by, p.held_reason, p.timeout,
       a.calls_last_hour, a.failures_last_hour, a.p50_seconds, a.p95_seconds
FROM (SELECT stage, min(position) AS position, max(max_running) AS max_running,
             max(timeout) AS timeout,
             max(held_until) FILTER (WHERE held_until > now()) AS held_until,
             max(held_by) FILTER (WHERE held_until > now()) AS held_by,
             max(held_reason) FILTER (WHERE held_until > now()) AS held_reason
      FROM (SELECT stage, position, max_running, timeout, held_until, held_by, held_reason
            FROM pipeline_stages
            UNION ALL  -- a stage that lost its route shows what it still owes
            SELECT DISTINCT stage, NULL::integer, NULL::integer, NULL::double precision,
                   NULL::timestamptz, NULL, NULL
            FROM stage_calls
            WHERE stage NOT IN (SELECT stage FROM pipeline_stages)) AS edge
      GROUP BY stage) AS p
CROSS JOIN LATERAL (
    SELECT count(*) AS owed,
           count(*) FILTER (WHERE due_at <= now()) AS due,
           count(*) FILTER (WHERE worker IS NULL AND attempts > 0
                              AND due_at < 'infinity') AS retrying,
           min(due_at) FILTER (WHERE worker IS NULL AND attempts > 0
                                 AND due_at < 'infinity') AS next_retry_at,
           count(*) FILTER (WHERE due_at = 'infinity') AS given_up,
           (array_agg(last_error) FILTER (WHERE due_at = 'infinity'))[1] AS last_error,
           min(due_at) FILTER (WHERE due_at <= now()) AS oldest_due_at
    FROM stage_calls WHERE stage_calls.stage = p.stage) AS c
CROSS JOIN LATERAL (
    SELECT count(*) AS calling FROM stage_leases
    WHERE stage_leases.stage = p.stage AND leased_until > now()) AS l
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
        changed := '(to_jsonb(j) ->> ''updated_at'')::timestamptz';
    END IF;
    EXECUTE format($ddl$
CREATE OR REPLACE FUNCTION stalled_jobs()
RETURNS TABLE (job_id text, tenant_id text, current_step text, status text, stage text,
               since timestamptz, reason text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
    WITH resting AS (
        -- in a state that owes a call, but owes none
        SELECT j.job_id, j.tenant_id::text, j.current_step::text, j.status::text, p.stage,
               p.timeout, %2$s AS changed_at, false AS running
        FROM %1$I.jobs AS j
        JOIN %1$I.pipeline_stages AS p
          ON p.current_step = j.current_step::text AND p.status = j.status::text
        WHERE NOT EXISTS (SELECT FROM %1$I.stage_calls AS c WHERE c.job_id = j.job_id)
        UNION ALL
        SELECT j.job_id, j.tenant_id::text, j.current_step::text, j.status::text, p.stage,
               p.timeout, %2$s, true
        FROM %1$I.jobs AS j
        JOIN (SELECT DISTINCT stage, timeout FROM %1$I.pipeline_stages) AS p
          ON p.stage = j.current_step::text
        WHERE j.status::text = 'running'
    )
    SELECT r.job_id::text, r.tenant_id, r.current_step, r.status, r.stage,
           greatest(r.changed_at, last.finished_at),
           CASE WHEN r.running THEN 'running for longer than the timeout'
                WHEN last.stage = r.stage AND last.outcome IN ('succeeded', 'skipped')
                THEN 'accepted by the stage, but the job has not changed'
                ELSE 'its call was never recorded: python listener.py backfill' END
    FROM resting AS r
    CROSS JOIN LATERAL (  -- ordered inside: by the index on finished_at it would read them all
        SELECT max(a.finished_at) AS finished_at,
               (array_agg(a.stage ORDER BY a.finished_at DESC))[1] AS stage,
               (array_agg(a.outcome ORDER BY a.finished_at DESC))[1] AS outcome
        FROM %1$I.stage_attempts AS a WHERE a.job_id = r.job_id) AS last
    WHERE last.outcome IS DISTINCT FROM 'cancelled'
      AND NOT EXISTS (SELECT FROM %1$I.stage_leases AS l
                      WHERE l.job_id = r.job_id AND l.leased_until > now())
      AND CASE WHEN greatest(r.changed_at, last.finished_at) IS NULL THEN NOT r.running
               ELSE greatest(r.changed_at, last.finished_at)
                    < now() - make_interval(secs => coalesce(r.timeout, 600)) END
$body$
$ddl$, current_schema(), changed);
END
$do$;

REVOKE ALL ON FUNCTION stalled_jobs() FROM PUBLIC;

COMMENT ON FUNCTION stalled_jobs() IS
    'Job State Listener, a row per job that no call and no stage moves on: accepted, running or '
    'never recorded, for longer than the timeout of its stage';
