-- How a worker of version 1 settled a call that is to be repeated.
WITH recorded AS (
    INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                                http_status, outcome, error)
    VALUES (%(job_id)s, %(call_id)s, %(attempt)s, %(stage)s, %(worker)s, %(started_at)s, now(),
            %(http_status)s, %(outcome)s, left(%(error)s, 2000))
    ON CONFLICT DO NOTHING
), ended AS (
    DELETE FROM stage_leases WHERE call_id = %(call_id)s AND attempt = %(attempt)s
)
UPDATE stage_calls
SET worker = NULL, started_at = NULL, last_error = left(%(error)s, 2000),
    free_attempts = free_attempts + %(free)s,
    due_at = greatest(CASE WHEN %(after_lease)s THEN due_at END,
                      coalesce(now() + make_interval(secs => %(delay)s), 'infinity'))
WHERE job_id = (
    SELECT job_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s
      AND attempts = %(attempt)s AND worker = %(worker)s FOR UPDATE SKIP LOCKED)
