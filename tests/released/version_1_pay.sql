-- How a worker of version 1 settled a call that was accepted.
WITH recorded AS (
    INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                                http_status, outcome, error)
    VALUES (%(job_id)s, %(call_id)s, %(attempt)s, %(stage)s, %(worker)s, %(started_at)s, now(),
            %(http_status)s, %(outcome)s, left(%(error)s, 2000))
    ON CONFLICT DO NOTHING
), ended AS (
    DELETE FROM stage_leases WHERE call_id = %(call_id)s AND attempt = %(attempt)s
)
DELETE FROM stage_calls WHERE job_id = (
    SELECT job_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s
      AND attempts = %(attempt)s AND worker = %(worker)s FOR UPDATE SKIP LOCKED);
UPDATE stage_slots SET leased_until = '-infinity'
WHERE stage = %(freed)s AND call_id = %(call_id)s AND attempt = %(attempt)s;
SELECT EXISTS (
    SELECT job_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s
      AND attempts = %(attempt)s AND worker = %(worker)s) AS unsettled, CASE WHEN EXISTS (SELECT FROM stage_calls WHERE stage = %(freed)s AND due_at <= now()) THEN pg_notify('job_state_listener_wake', '') END AS woken
