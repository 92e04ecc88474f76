"""The demo's five jobs in the database: they arrive, are watched, and are removed again."""

import secrets
import uuid

import psycopg2
from psycopg2.extensions import connection as Connection

from demo.terminal import Ended, one_line, show

TENANT = f"demo-{secrets.token_hex(3)}"
JOBS = [str(uuid.uuid4()) for _ in range(5)]

arrived: dict[str, float] = {}  # when each job reached (img_gen, done), on the database's clock


def query(connection: Connection, sql: str, params: object = None) -> list[tuple]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


# Jobs that our listener would claim, now or in a moment; and a listener that would claim ours.
COMPANY = """
SELECT EXISTS (SELECT FROM jobs WHERE status <> 'failed'
               AND (current_step, status) IS DISTINCT FROM ('vlm_judge', 'done')),
       EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
               AND application_name LIKE 'job-state-listener%')"""


def check_database(connection: Connection) -> None:
    """Refuse a database whose jobs table takes no rows of ours, or where we would not be alone:
    our listener would call the stand-in for other jobs, and another one its own API for ours.

    Raises:
        Ended
    """
    if query(connection, "SELECT to_regclass('jobs')") == [(None,)]:
        return
    [(jobs, listener)] = query(connection, COMPANY)
    if jobs or listener:
        found = "a listener is connected to" if listener else "jobs are on their way in"
        raise Ended(f"{found} this database; name an empty one, or unset DB_HOST to do without")
    try:
        query(connection, "BEGIN;" + INSERT, [JOBS[0], TENANT, "queued"])
    except psycopg2.Error as error:
        raise Ended(f"its jobs table does not take the demo's jobs: {one_line(error)}") from None
    finally:
        query(connection, "ROLLBACK")


INSERT = """
INSERT INTO jobs (job_id, tenant_id, current_step, status) VALUES (%s, %s, 'img_gen', %s)
RETURNING extract(epoch FROM clock_timestamp())::float"""

RELEASE = """
UPDATE jobs SET status = 'done' WHERE job_id = %s
RETURNING extract(epoch FROM clock_timestamp())::float"""


def insert(connection: Connection, job: str, status: str) -> None:
    show(f"▸ INSERT job={job} ('img_gen', '{status}')")
    [(arrived[job],)] = query(connection, INSERT, [job, TENANT, status])


def release(connection: Connection, job: str) -> None:
    show(f"▸ UPDATE job={job} ('img_gen', 'done')")
    [(arrived[job],)] = query(connection, RELEASE, [job])


STATES = "SELECT job_id::text, current_step || ', ' || status FROM jobs WHERE tenant_id = %s"


def states(connection: Connection) -> dict[str, str]:
    return dict(query(connection, STATES, [TENANT]))


ATTEMPTS = """
SELECT job_id::text, stage, outcome, extract(epoch FROM finished_at - started_at)::float,
       extract(epoch FROM finished_at)::float
FROM stage_attempts WHERE job_id IN %s"""


def attempts(connection: Connection) -> list[tuple]:
    """(job, stage, outcome, seconds, finished at) of every attempt, those held by the 503 too."""
    return query(connection, ATTEMPTS, [tuple(JOBS)])


FORGET = """
DELETE FROM jobs WHERE job_id IN %(jobs)s;
DELETE FROM stage_calls WHERE job_id IN %(jobs)s;
DELETE FROM stage_attempts WHERE job_id IN %(jobs)s"""


def forget(connection: Connection) -> None:
    if arrived:
        query(connection, FORGET, {"jobs": tuple(JOBS)})
