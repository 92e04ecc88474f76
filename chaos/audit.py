"""The database's record of a run: a table that triggers fill in the transactions they watch, and
the queries that turn it into the records of a History.
"""

import time

import psycopg2
import psycopg2.extras

from chaos.clock import STEP
from chaos.history import RECORDS

# track_commit_timestamp records when the transaction of each row committed; a rolled back one
# leaves no rows. Rows of one job are in the order of its row lock. The last setting lets a standby
# reconnect at once.
OPTIONS = {
    "track_commit_timestamp": "on",
    "max_connections": 300,
    "wal_retrieve_retry_interval": "200ms",
}

# What a time of the database would be, in seconds since the epoch, had its clock not been set back.
# A step is longer than a run: the time since the run's beginning that is whole steps away.
TIME = """
CREATE SCHEMA chaos;
CREATE FUNCTION chaos.seconds(timestamptz) RETURNS float8 LANGUAGE sql STABLE AS $$
    SELECT extract(epoch FROM $1)::float8
         - %(step)s * floor((extract(epoch FROM $1)::float8 - %(began)s) / %(step)s)
$$;
"""
EARLIER = 60.0  # seconds before install() to which a time may belong

INSTALL = """
CREATE TABLE chaos.audit (
    seq   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    tx    xid8 NOT NULL DEFAULT pg_current_xact_id(),
    place text NOT NULL,
    job   text NOT NULL,
    old   jsonb,
    new   jsonb
);
CREATE INDEX ON chaos.audit (job, at);
CREATE TABLE chaos.effects (key text NOT NULL, job text NOT NULL);
CREATE FUNCTION chaos.record() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END;
    is_ jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END;
BEGIN
    INSERT INTO chaos.audit (place, job, old, new)
    VALUES (TG_TABLE_NAME, coalesce(coalesce(is_, was) ->> 'job_variants_id',
                                    coalesce(is_, was) ->> 'job_id', is_ ->> 'stage'), was, is_);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_insert_delete AFTER INSERT OR DELETE ON jobs
    FOR EACH ROW EXECUTE FUNCTION chaos.record();
CREATE TRIGGER chaos_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN ((OLD.current_step, OLD.status) IS DISTINCT FROM (NEW.current_step, NEW.status))
    EXECUTE FUNCTION chaos.record();
CREATE TRIGGER chaos_insert_delete AFTER INSERT OR DELETE ON jobs_variants
    FOR EACH ROW EXECUTE FUNCTION chaos.record();
CREATE TRIGGER chaos_update AFTER UPDATE ON jobs_variants FOR EACH ROW
    WHEN ((OLD.current_step, OLD.status) IS DISTINCT FROM (NEW.current_step, NEW.status))
    EXECUTE FUNCTION chaos.record();
CREATE TRIGGER chaos_any AFTER INSERT OR UPDATE OR DELETE ON stage_calls
    FOR EACH ROW EXECUTE FUNCTION chaos.record();
CREATE TRIGGER chaos_insert_delete AFTER INSERT OR DELETE ON stage_leases
    FOR EACH ROW EXECUTE FUNCTION chaos.record();
CREATE TRIGGER chaos_update AFTER UPDATE ON pipeline_stages FOR EACH ROW
    WHEN (NEW.held_until IS DISTINCT FROM OLD.held_until) EXECUTE FUNCTION chaos.record();
"""

# The statement that a stage runs by way of the receiver, in the transaction that sets the row done.
# Its values are those of a receiver.Request.
EFFECT = "INSERT INTO chaos.effects VALUES (%(key)s, %(row_id)s)"

# The state of a job at the end of each transaction; earlier ones within it were never visible.
MOVES = """
SELECT DISTINCT ON (job, tx) job, tx::text::bigint AS tx,
       chaos.seconds(pg_xact_commit_timestamp(tx::xid)) AS at,
       new ->> 'current_step' AS step, new ->> 'status' AS status,
       CASE WHEN place = 'jobs_variants' THEN coalesce(new, old) ->> 'job_id' END AS parent,
       coalesce((new ->> priority_column)::integer, 0) AS priority,
       chaos.seconds((new ->> run_after_column)::timestamptz) AS run_after
FROM chaos.audit JOIN pipeline_tables ON name = place ORDER BY job, tx, seq DESC
"""

# The last call that a transaction recorded for a job.
DEBTS = """
SELECT DISTINCT ON (job, tx) job, (new ->> 'call_id')::bigint AS call, new ->> 'stage' AS stage,
       tx::text::bigint AS tx
FROM chaos.audit
WHERE place = 'stage_calls' AND (old IS NULL OR old ->> 'call_id' <> new ->> 'call_id')
  AND new ->> 'join_of' = ''
ORDER BY job, tx, seq DESC
"""

JOINS = """
SELECT job, (new ->> 'call_id')::bigint AS call, new ->> 'stage' AS stage,
       chaos.seconds((new ->> 'created_at')::timestamptz) AS looked,
       chaos.seconds(pg_xact_commit_timestamp(tx::xid)) AS at
FROM chaos.audit
WHERE place = 'stage_calls' AND (old IS NULL OR old ->> 'call_id' <> new ->> 'call_id')
  AND new ->> 'join_of' <> ''
ORDER BY at
"""

GONE = """
SELECT job, (old ->> 'call_id')::bigint AS call, tx::text::bigint AS tx
FROM chaos.audit WHERE place = 'stage_calls' AND new IS NULL ORDER BY seq
"""

CLAIMS = """
SELECT c.job, (c.new ->> 'call_id')::bigint AS call, (c.new ->> 'attempts')::integer AS attempt,
       c.new ->> 'worker' AS worker,
       chaos.seconds((c.new ->> 'started_at')::timestamptz) AS at,
       chaos.seconds((c.new ->> 'due_at')::timestamptz) AS until,
       (SELECT min(chaos.seconds(r.at)) FROM chaos.audit AS r
        WHERE r.job = c.job AND r.seq > c.seq AND r.place = 'stage_calls'
          AND r.old @> jsonb_build_object('call_id', c.new -> 'call_id',
                                          'attempts', c.new -> 'attempts')
          AND r.new ->> 'call_id' = c.new ->> 'call_id'
          AND r.old ->> 'worker' IS NOT NULL AND r.new ->> 'worker' IS NULL) AS released
FROM chaos.audit AS c
WHERE c.place = 'stage_calls' AND c.old ->> 'call_id' = c.new ->> 'call_id'
  AND (c.old ->> 'attempts')::integer < (c.new ->> 'attempts')::integer
ORDER BY c.seq
"""

# After the clock was set back, a listener lets each lease begin again. It is judged by the end that
# it had at first.
LEASES = """
SELECT (row ->> 'call_id')::bigint AS call, (row ->> 'attempt')::integer AS attempt,
       row ->> 'stage' AS stage, row ->> 'tenant_id' AS tenant, row ->> 'job_id' AS job,
       chaos.seconds(min((new ->> 'started_at')::timestamptz)) AS claimed,
       min(at) FILTER (WHERE new IS NOT NULL) AS began,
       chaos.seconds(min((new ->> 'leased_until')::timestamptz)) AS until,
       min(at) FILTER (WHERE new IS NULL) AS ended
FROM (SELECT new, chaos.seconds(pg_xact_commit_timestamp(tx::xid)) AS at, coalesce(new, old)
                 - '{started_at,leased_until,unanswered,working,spent}'::text[] AS row
      FROM chaos.audit WHERE place = 'stage_leases') AS changes
GROUP BY row
ORDER BY began
"""

ROWS = """
SELECT job_id::text AS job, call_id AS call, attempt, stage, worker,
       chaos.seconds(started_at) AS started,
       chaos.seconds(finished_at) AS finished,
       http_status AS http, outcome, error
FROM stage_attempts ORDER BY started, attempt
"""

HOLDS = """
SELECT new ->> 'stage' AS stage, chaos.seconds(pg_xact_commit_timestamp(tx::xid)) AS at,
       chaos.seconds((new ->> 'held_until')::timestamptz) AS until
FROM chaos.audit WHERE place = 'pipeline_stages' AND new ->> 'held_until' IS NOT NULL ORDER BY seq
"""

EFFECTS = "SELECT key, job FROM chaos.effects"

LIMITS = """
SELECT name, stages, max_running AS most, seconds, linger, is_fair, per_tenant FROM stage_limits
ORDER BY name
"""

# By the names of History's fields.
QUERIES = {
    "moves": MOVES,
    "debts": DEBTS,
    "joins": JOINS,
    "gone": GONE,
    "claims": CLAIMS,
    "leases": LEASES,
    "holds": HOLDS,
    "rows": ROWS,
    "effects": EFFECTS,
    "limits": LIMITS,
}


def install(conn: psycopg2.extensions.connection) -> None:
    """Before the clock of the database is set back."""
    given = {"step": STEP, "began": time.time() - EARLIER}
    conn.cursor().execute(TIME, given)
    conn.cursor().execute(INSTALL)


# `audit` takes the times of the history as they are. An attempt whose lease was begun again is said
# to have started then: it has the time of its claim back.
SET_RIGHT = """
UPDATE stage_attempts AS a
SET started_at = to_timestamp(least(chaos.seconds(a.started_at), (
        SELECT min(chaos.seconds((l.new ->> 'started_at')::timestamptz)) FROM chaos.audit AS l
        WHERE l.place = 'stage_leases' AND l.job = a.job_id::text
          AND (l.new ->> 'call_id')::bigint = a.call_id
          AND (l.new ->> 'attempt')::integer = a.attempt))),
    finished_at = to_timestamp(chaos.seconds(a.finished_at))
"""


def set_right(conn: psycopg2.extensions.connection) -> None:
    """Correct the times of the history, whose clock was set back."""
    conn.cursor().execute(SET_RIGHT)


def records(conn: psycopg2.extensions.connection) -> dict[str, list]:
    """The records of the database."""
    found = {}
    with conn.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
        cursor.execute("ANALYZE chaos.audit")
        for name, sql in QUERIES.items():
            cursor.execute(sql)
            found[name] = [RECORDS[name](**row) for row in cursor.fetchall()]
    found["moves"].sort(key=lambda move: move.at)
    return found


# The lease of a dead listener outlasts its call, until another listener ends it. So does the lease
# of a call without an answer, but that attempt is in the history already.
OWED = """
SELECT (SELECT count(*) FROM stage_calls)
     + (SELECT count(*) FROM stage_leases WHERE NOT unanswered)
     + (SELECT count(*) FROM stage_looks)
"""


def owed(conn: psycopg2.extensions.connection) -> int:
    """How many calls are owed, and claims without a result."""
    with conn.cursor() as cursor:
        cursor.execute(OWED)
        return cursor.fetchone()[0]
