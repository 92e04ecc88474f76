-- How a worker of version 1 claimed.
WITH due AS (
    SELECT open.*, wanted.lease, free.slot
    FROM unnest(%(stages)s::text[], %(leases)s::float8[], %(since)s::timestamptz[])
      AS wanted (stage, lease, since)
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.stage, c.attempts, c.worker, c.due_at
        FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at >= wanted.since AND c.due_at <= now()
          AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                          WHERE p.stage = wanted.stage AND p.held_until > now())
          AND (NOT EXISTS (SELECT FROM stage_slots AS s WHERE s.stage = wanted.stage) OR EXISTS (SELECT FROM stage_slots AS s WHERE s.stage = wanted.stage AND s.leased_until <= now()))
        ORDER BY c.due_at
        LIMIT 1
        FOR UPDATE OF c SKIP LOCKED) AS open
    LEFT JOIN LATERAL (
        SELECT s.slot FROM stage_slots AS s
        WHERE s.stage = open.stage AND s.leased_until <= now()
        LIMIT 1
        FOR UPDATE SKIP LOCKED) AS free ON true
    WHERE free.slot IS NOT NULL OR NOT EXISTS (SELECT FROM stage_slots AS s WHERE s.stage = wanted.stage)
    LIMIT 1)
, claimed AS (
    UPDATE stage_calls AS c
    SET attempts = c.attempts + 1, worker = %(worker)s, started_at = now(),
        due_at = now() + make_interval(secs => due.lease)
    FROM due
    WHERE c.job_id = due.job_id
    RETURNING c.*, due.worker AS worker_before, due.due_at AS was_due_at, due.slot
), leased AS (
    INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at, leased_until)
    SELECT job_id, call_id, attempts, stage, worker, started_at, due_at FROM claimed
), slot AS (
    UPDATE stage_slots AS s
    SET call_id = claimed.call_id, attempt = claimed.attempts, leased_until = claimed.due_at
    FROM claimed WHERE s.stage = claimed.stage AND s.slot = claimed.slot
)
SELECT claimed.call_id, claimed.job_id, claimed.current_step, claimed.status, claimed.stage,
       claimed.attempts AS attempt, claimed.attempts - claimed.free_attempts AS spent,
       claimed.started_at, claimed.worker_before IS NOT NULL AS taken_over,
       claimed.was_due_at, claimed.slot IS NOT NULL AS limited,
       job.tenant_id, job.found IS NOT NULL AS job_found,
       job.current_step AS job_step, job.status AS job_status,
       (job.current_step, job.status) IS NOT DISTINCT FROM
           (claimed.current_step, claimed.status) AS owed,
       claimed.attempts > 1 AND (
           SELECT true FROM stage_attempts AS a
           WHERE a.job_id = claimed.job_id AND a.call_id = claimed.call_id
             AND a.outcome = 'succeeded'
           LIMIT 1) IS NOT NULL AS accepted,
       EXISTS (
    SELECT job_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s
      AND attempts = %(attempt)s AND worker = %(worker)s) AS unsettled,
       CASE WHEN claimed.call_id IS NULL THEN (
    SELECT extract(epoch FROM min(coming.due_at) - now())::float8
    FROM unnest(%(stages)s::text[], %(leases)s::float8[], %(since)s::timestamptz[])
      AS wanted (stage, lease, since)
    LEFT JOIN LATERAL (
        SELECT max(p.held_until) AS until FROM pipeline_stages AS p
        WHERE p.stage = wanted.stage AND p.held_until > now()) AS held ON true
    CROSS JOIN LATERAL (
        SELECT greatest(c.due_at, held.until) AS due_at
        FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at < 'infinity'
          AND c.due_at > CASE WHEN held.until IS NULL THEN now() ELSE '-infinity' END
        ORDER BY c.due_at
        LIMIT 1) AS coming
    WHERE coming.due_at < 'infinity') END AS next_due,
       CASE WHEN claimed.stage IS DISTINCT FROM %(freed)s AND EXISTS (SELECT FROM stage_calls WHERE stage = %(freed)s AND due_at <= now()) THEN pg_notify('job_state_listener_wake', '') END AS woken
FROM (VALUES (1)) AS always
LEFT JOIN claimed ON true
LEFT JOIN LATERAL (
    SELECT true AS found, j.tenant_id, j.current_step::text, j.status::text
    FROM jobs AS j
    WHERE j.job_id = claimed.job_id
    LIMIT 1) AS job ON true
