-- Job State Listener: what people and dashboards read.
--
-- Applied by `make trigger` after triggers.sql, in the same transaction and search path.
-- No view depends on a column of the application's, which it may change as it likes. Only
-- given_up_calls depends on a job_id of ours: `install` drops it where ids get another type.

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
       coalesce(least(a.failures_last_hour, a.calls_last_hour), 0) AS failures_last_hour,
       a.p50_seconds, a.p95_seconds,
       coalesce(p.tables, ARRAY(SELECT DISTINCT o.table_name FROM stage_calls AS o
                                WHERE o.stage = c.stage)) AS tables,
       CASE WHEN c.retrying > 0 THEN (
           SELECT r.last_error FROM stage_calls AS r
           WHERE r.stage = c.stage AND r.worker IS NULL AND r.attempts > 0
             AND r.due_at < 'infinity'
           ORDER BY r.call_id DESC LIMIT 1) END AS retry_error,
       coalesce(l.working, 0) AS working
FROM (
    SELECT stage, min(position) AS position, max(max_running) AS max_running,
           max(timeout) AS timeout, array_agg(DISTINCT table_name) AS tables,
           max(held_until) FILTER (WHERE held_until > now()) AS held_until,
           max(held_by) FILTER (WHERE held_until > now()) AS held_by,
           max(held_reason) FILTER (WHERE held_until > now()) AS held_reason
    FROM pipeline_stages GROUP BY stage) AS p
FULL JOIN (  -- a stage that lost its route shows what it still owes
    SELECT stage, count(*) AS owed,
           count(*) FILTER (WHERE due_since <= now()) AS due,
           count(*) FILTER (WHERE worker IS NULL AND attempts > 0
                              AND due_at < 'infinity') AS retrying,
           min(due_at) FILTER (WHERE worker IS NULL AND attempts > 0
                                 AND due_at < 'infinity') AS next_retry_at,
           count(*) FILTER (WHERE due_at = 'infinity') AS given_up,
           min(due_since) FILTER (WHERE due_since <= now()) AS oldest_due_at
    FROM (
        -- Each try of a call whose stage is down puts it off, at no cost. It has waited since it
        -- was first due, as long as the stage has accepted nothing since its hold began; not one
        -- that waits for a back-off of its own beyond that. A call without an error was never
        -- tried, only put off or given back. For claims, a call without any attempt is due whatever
        -- the clock says, as that may have been set back; so it is here.
        SELECT stage, worker, attempts, due_at,
               CASE WHEN worker IS NULL AND free_attempts > 0 AND due_at < 'infinity'
                            AND (last_error IS NULL OR EXISTS (
                                SELECT FROM pipeline_stages AS h
                                WHERE h.stage = o.stage AND h.hold_seconds IS NOT NULL
                                  AND o.due_at < h.held_until + interval '1 minute'))
                       THEN greatest(least(created_at, now()), run_after)
                    WHEN attempts = 0 AND due_at < 'infinity'
                       THEN greatest(least(due_at, now()), run_after)
                    ELSE due_at END AS due_since
        FROM stage_calls AS o) AS owed
    GROUP BY stage) AS c USING (stage)
LEFT JOIN (
    SELECT stage, count(*) AS calling, count(*) FILTER (WHERE working) AS working
    FROM stage_leases
    WHERE leased_until > now() GROUP BY stage) AS l USING (stage)
-- An attempt has a second row where its stage has set the row to failed after its answer: it is one
-- call, which failed. Where the error says more, the first row is a failure already. The only row of
-- a call that was taken has the status 202.
LEFT JOIN (
    SELECT stage,
           count(*) FILTER (WHERE http_status IS NOT NULL
                               OR (error LIKE 'set failed by its stage%') IS NOT TRUE)
               AS calls_last_hour,
           count(*) FILTER (WHERE outcome <> 'succeeded' AND (http_status IS NOT NULL
                              OR (error LIKE 'set failed by its stage_%') IS NOT TRUE))
               AS failures_last_hour,
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
    'rows it is called for; how many of the calls it took with 202 and works on';

CREATE OR REPLACE VIEW stage_latency AS
SELECT stage, date_trunc('hour', finished_at) AS hour,
       -- As above.
       count(*) FILTER (WHERE http_status IS NOT NULL
                           OR (error LIKE 'set failed by its stage%') IS NOT TRUE) AS calls,
       least(count(*) FILTER (WHERE http_status IS NOT NULL
                                 OR (error LIKE 'set failed by its stage%') IS NOT TRUE),
             count(*) FILTER (WHERE outcome <> 'succeeded' AND (http_status IS NOT NULL
                                OR (error LIKE 'set failed by its stage_%') IS NOT TRUE)))
           AS failures,
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
    'Job State Listener, a row per call that waits for a person: ./jsl retry JOB_ID';

-- Functions with their text in quotes, as a view would keep the application from altering its
-- tables. They may be read by a role that may not read those: names are qualified as in the
-- trigger functions. Of a row, only the columns that are needed are read, by name: another one may
-- hold what cannot be converted, or megabytes. resting_rows() has a statement for each table and
-- each join. As one may fail, the setting job_state_listener.part names the only one to be run.
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
    -- When a row last changed, by its updated_at; NULL where that is not known. A timestamp without
    -- time zone may be any zone's; a time to come is wrong, and one before 1970-01-02, in which zone
    -- ever, is a program's zero,
    -- which Python cannot read where it is before the year 1. Where the table has no such column, the
    -- name stands for that of `absent`.
    changed constant text :=
        '(SELECT c.at FROM (SELECT CASE WHEN pg_typeof(updated_at) = ''timestamptz''::regtype'
        ' THEN (to_jsonb(updated_at) #>> ''{}'')::timestamptz END AS at'
        ' FROM %1$I.%2$I AS x WHERE x.%3$I = r.%3$I LIMIT 1) AS c'
        ' WHERE c.at BETWEEN ''1970-01-02'' AND now())';
    -- The tenant of a parent without one of its own: that of the nearest row above that has one.
    borrowed constant text := '(%I.stage_call_row(%L, '''', m.parent_id)).tenant_id #>> ''{}''';
    resting jsonb;
    joined  jsonb;
    missed  jsonb;
    parts   text;
BEGIN
    WITH RECURSIVE listed AS (
        SELECT * FROM jsonb_to_recordset(asked -> 'tables') AS x (
            name text, id_column text, tenant_column text, parent_table text, parent_column text)
    ), owners AS (  -- how the tenants of a table are read: its own, or those of its parents
        SELECT name, format('SELECT %I AS id, %I::text AS tenant_id FROM %I.%I',
                            id_column, tenant_column, schema, name) AS tenants
        FROM listed WHERE tenant_column IS NOT NULL
        UNION ALL
        SELECT l.name, format('SELECT x.%I AS id, p.tenant_id FROM %I.%I AS x'
                              ' LEFT JOIN (%s) AS p ON p.id = x.%I',
                              l.id_column, schema, l.name, o.tenants, l.parent_column)
        FROM owners AS o JOIN listed AS l ON l.parent_table = o.name
        WHERE l.tenant_column IS NULL
    )
    SELECT jsonb_object_agg(t.name, format($rows$
        SELECT %1$L::text AS table_name, r.%2$I::%10$s AS id, %3$s AS tenant_id,
               r.current_step::text AS current_step, r.status::text AS status, %4$s AS changed_at,
               place.stage, place.timeout, place.kind
        FROM (SELECT NULL::timestamptz AS updated_at) AS absent CROSS JOIN %5$I.%6$I AS r%7$s
        JOIN place ON place.table_name = %1$L AND place.current_step = r.current_step::text
                  AND place.status = r.status::text$rows$,
        t.name, t.id_column,
        coalesce('r.' || quote_ident(t.tenant_column) || '::text',
                 CASE WHEN p.tenants IS NOT NULL THEN 'p.tenant_id' END, 'NULL::text'),
        format(changed, schema, t.name, t.id_column),
        schema, t.name,
        CASE WHEN t.tenant_column IS NULL AND p.tenants IS NOT NULL
             THEN format(' LEFT JOIN (%s) AS p ON p.id = r.%I', p.tenants, t.parent_column) END,
        NULL, NULL, id_type))
    INTO resting
    FROM listed AS t LEFT JOIN owners AS p ON p.name = t.parent_table;

    -- A join whose call was made, while neither its rows nor the parent have changed since.
    SELECT jsonb_object_agg(r.join_of, format($rows$
        SELECT 'stalled', %1$L, m.parent_id, m.parent_id::text, %2$s, r.current_step::text, r.status::text, %3$L,
               greatest(m.recorded_at, last.finished_at),
               'accepted by the stage, but the job has not changed'
        FROM (SELECT NULL::timestamptz AS updated_at) AS absent CROSS JOIN %4$I.stage_joins AS m
        JOIN %4$I.%5$I AS r ON r.%6$I = m.parent_id
            AND (r.current_step::text, r.status::text)
                IS NOT DISTINCT FROM (m.parent_step, m.parent_status)
        CROSS JOIN LATERAL (
            SELECT max(a.finished_at) AS finished_at, max(a.started_at) AS started_at,
                   (array_agg(a.call_id ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS call_id,
                   array_agg(a.call_id) FILTER (WHERE a.outcome = 'succeeded') AS accepted,
                   array_agg(a.call_id) FILTER (WHERE a.outcome = 'cancelled') AS cancelled
            FROM %4$I.stage_attempts AS a
            WHERE a.job_id = m.parent_id AND a.table_name = %1$L
              AND (a.stage = %3$L
                   -- A stage that left PIPELINE may be this one under its old name, unless this
                   -- one was tried since.
                   OR a.stage NOT IN (SELECT stage FROM %4$I.pipeline_stages) AND NOT EXISTS (
                       SELECT FROM %4$I.stage_attempts AS own
                       WHERE own.job_id = m.parent_id AND own.table_name = %1$L
                         AND own.stage = %3$L AND own.finished_at >= m.recorded_at))) AS last
        WHERE m.join_of = %7$L AND m.is_noted AND NOT m.is_open
          -- A parent may be called again after it was through. Then it is at a later stage, or this
          -- stage is done with it, before and after the call: it has not stalled, unless its
          -- updated_at says that it has not changed since.
          AND ((%9$s > last.started_at) IS NOT FALSE
               AND ((r.current_step::text, r.status::text) = (%3$L, 'done')
                    OR r.current_step::text IN (
                        SELECT s.stage FROM %4$I.pipeline_stages AS s
                        WHERE s.table_name = %1$L AND s.stage <> %3$L
                          AND (s.current_step, s.status) <> (s.stage, 'failed')  -- a retry
                          AND s.position > (
                            SELECT min(p.position) FROM %4$I.pipeline_stages AS p
                            WHERE p.join_of = %7$L)))) IS NOT TRUE
          -- Or a stage was called since for the parent's own state: it went on, and came back.
          AND NOT EXISTS (
              SELECT FROM %4$I.stage_attempts AS a
              WHERE a.job_id = m.parent_id AND a.table_name = %1$L
                AND a.stage <> %3$L AND a.stage IN (
                    SELECT s.stage FROM %4$I.pipeline_stages AS s
                    WHERE s.table_name = %1$L AND s.join_of = '')
                AND a.started_at > last.started_at AND a.outcome NOT IN ('skipped', 'cancelled')
              OFFSET 0)
          AND (last.call_id = ANY (last.cancelled)
               AND (last.call_id = ANY (last.accepted)) IS NOT TRUE
               AND last.finished_at >= m.recorded_at) IS NOT TRUE
          AND greatest(m.recorded_at, last.finished_at)
              < now() - make_interval(secs => %8$s)
          AND NOT EXISTS (SELECT FROM %4$I.stage_calls AS c
                          WHERE c.job_id = m.parent_id AND c.table_name = %1$L
                            AND c.join_of IN ('', %7$L))
          AND NOT EXISTS (SELECT FROM %4$I.stage_leases AS l
                          WHERE l.job_id = m.parent_id AND l.table_name = %1$L
                            AND l.leased_until > now())
          AND %4$I.stage_join_is_complete(%7$L, m.parent_id)$rows$,
        t.name, coalesce('r.' || quote_ident(t.tenant_column) || '::text',
                         format(borrowed, schema, t.name)), r.stage, schema,
        t.name, t.id_column, r.join_of, coalesce(r.timeout, 600),
        format(changed, schema, t.name, t.id_column)))
    INTO joined
    FROM jsonb_to_recordset(asked -> 'routes') AS r (
             table_name text, join_of text, stage text, timeout double precision)
    JOIN jsonb_to_recordset(asked -> 'tables') AS t (
             name text, id_column text, tenant_column text) ON t.name = r.table_name
    WHERE r.join_of <> '';

    -- A join of which a row came, and whose last row came unseen. A parent of which nobody saw any
    -- row is not looked for: those that were complete before install look the same.
    SELECT jsonb_object_agg(r.join_of, format($rows$
        SELECT 'stalled', %1$L, m.parent_id, m.parent_id::text, %2$s, r.current_step::text,
               r.status::text, %3$L, NULL::timestamptz,
               -- As in backfill: a parent at the stage, or at a later one, is left to a person.
               'its call was never recorded' || CASE WHEN r.current_step::text IN (
                   SELECT s.stage FROM %4$I.pipeline_stages AS s
                   WHERE s.table_name = %1$L
                     AND (s.current_step, s.status) <> (s.stage, 'failed')
                     AND s.position >= (
                       SELECT min(p.position) FROM %4$I.pipeline_stages AS p
                       WHERE p.join_of = %6$L)) THEN '' ELSE ': ./jsl backfill' END
        FROM %4$I.stage_joins AS m JOIN %4$I.%1$I AS r ON r.%5$I = m.parent_id
        WHERE m.join_of = %6$L AND m.is_open
          AND NOT EXISTS (SELECT FROM %4$I.stage_looks AS l
                          WHERE l.parent_id = m.parent_id AND l.join_of = m.join_of)
          AND NOT EXISTS (SELECT FROM %4$I.stage_calls AS c
                          WHERE c.job_id = m.parent_id AND c.table_name = %1$L
                            AND c.join_of = m.join_of)
          AND EXISTS (SELECT FROM %4$I.%7$I AS x WHERE x.%8$I = m.parent_id%9$s)
          AND NOT EXISTS (SELECT FROM %4$I.%7$I AS x WHERE x.%8$I = m.parent_id%9$s
                          AND (x.current_step::text, x.status::text)
                              IS DISTINCT FROM (%10$L, %11$L))$rows$,
        t.name, coalesce('r.' || quote_ident(t.tenant_column) || '::text',
                         format(borrowed, schema, t.name)), r.stage,
        schema, t.id_column, r.join_of, x.name, x.parent_column,
        -- As in triggers.sql, by the collation of the column.
        (SELECT format(' COLLATE %I.%I', n.nspname, c.collname)
         FROM pg_attribute AS a JOIN pg_collation AS c ON c.oid = a.attcollation
         JOIN pg_namespace AS n ON n.oid = c.collnamespace
         WHERE a.attrelid = format('%I.%I', schema, x.name)::regclass
           AND a.attname = x.parent_column),
        r.current_step, r.status))
    INTO missed
    FROM jsonb_to_recordset(asked -> 'routes') AS r (
             table_name text, join_of text, stage text, child_table text, current_step text,
             status text)
    JOIN jsonb_to_recordset(asked -> 'tables') AS t (
             name text, id_column text, tenant_column text) ON t.name = r.table_name
    JOIN jsonb_to_recordset(asked -> 'tables') AS x (
             name text, parent_column text) ON x.name = r.child_table
    WHERE r.join_of <> '';

    SELECT string_agg(format('(%L, %L)', name, format($part$
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
                WHEN last.stage = r.stage
                     AND (last.call_id = ANY (last.accepted)  -- any attempt of it
                          OR (last.outcome, last.error)
                             = ('skipped', 'an earlier attempt was accepted'))
                     OR last.call_id = ANY (last.accepted) AND last.stage <> r.current_step
                        AND last.stage NOT IN (SELECT stage FROM %1$I.pipeline_stages)
                THEN 'accepted by the stage, but the job has not changed'
                ELSE 'its call was never recorded: ./jsl backfill' END
    FROM resting AS r
    CROSS JOIN LATERAL (  -- ordered inside: by the index on finished_at it would read them all
        SELECT max(a.finished_at) AS finished_at,
               (array_agg(a.stage ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS stage,
               (array_agg(a.outcome ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS outcome,
               (array_agg(a.call_id ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS call_id,
               array_agg(a.call_id) FILTER (WHERE a.outcome = 'succeeded') AS accepted,
               array_agg(a.call_id) FILTER (WHERE a.outcome = 'cancelled') AS cancelled,
               (array_agg(a.http_status ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS http_status,
               (array_agg(a.error ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS error
        FROM %1$I.stage_attempts AS a
        WHERE a.job_id = r.id AND a.table_name = r.table_name
          AND (a.stage = r.stage OR EXISTS (  -- not those of a join of its rows
              SELECT FROM %1$I.pipeline_stages AS p
              WHERE p.table_name = a.table_name AND p.join_of = '' AND p.stage = a.stage)
               -- As in backfill: it may be that of now under the name of before.
               OR a.stage NOT IN (SELECT stage FROM %1$I.pipeline_stages))
    ) AS last
    WHERE NOT EXISTS (SELECT FROM %1$I.stage_calls AS c
                      WHERE c.job_id = r.id AND c.table_name = r.table_name
                        AND (c.join_of = '' OR c.stage = r.stage))
      AND NOT EXISTS (SELECT FROM %1$I.stage_leases AS l
                      WHERE l.job_id = r.id AND l.table_name = r.table_name
                        AND l.leased_until > now())
      -- A call that was cancelled while it was under way has its result after that.
      AND (r.kind = 'owed' AND last.call_id = ANY (last.cancelled)
           AND (last.call_id = ANY (last.accepted)) IS NOT TRUE
           AND (last.stage = r.stage
                OR last.stage <> r.current_step
                   AND last.stage NOT IN (SELECT stage FROM %1$I.pipeline_stages))) IS NOT TRUE
      AND (r.kind = 'failed'
           OR CASE WHEN r.kind = 'running' AND last.stage = r.stage
                         AND (last.outcome, last.http_status) = ('unknown', 202)
                         AND last.finished_at > r.changed_at IS NOT FALSE
                    THEN true  -- an asynchronous stage, whose timeout is over
                    WHEN greatest(r.changed_at, last.finished_at) IS NULL
                    THEN r.kind <> 'running'
                    ELSE greatest(r.changed_at, last.finished_at)
                         < now() - make_interval(secs => coalesce(r.timeout, 600)) END)
$part$, schema, rows)), ', ')
    INTO parts
    FROM jsonb_each_text(resting) AS of_table (name, rows);

    SELECT concat_ws(', ', parts, string_agg(format('(%L, %L)', name, rows), ', '))
    INTO parts
    FROM (SELECT * FROM jsonb_each_text(joined)
          UNION ALL SELECT * FROM jsonb_each_text(missed)) AS of_join (name, rows);

    EXECUTE format($ddl$
CREATE OR REPLACE FUNCTION resting_rows()
RETURNS TABLE (kind text, table_name text, id %2$s, job_id text, tenant_id text,
               current_step text, status text, stage text, since timestamptz, reason text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
DECLARE
    part text;
BEGIN
    FOR part IN
        SELECT p.statement FROM (VALUES %1$s) AS p (name, statement)
        WHERE p.name = coalesce(nullif(current_setting('job_state_listener.part', true), ''),
                                p.name)
    LOOP
        RETURN QUERY EXECUTE part;  -- planned each time, as the tables grow
    END LOOP;
END
$body$
$ddl$, parts, id_type);

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
