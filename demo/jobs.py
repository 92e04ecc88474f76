"""The demo's five jobs in the database: inserted, updated, and removed at the end."""

import secrets
import uuid

import psycopg2
from psycopg2.extensions import connection as Connection

from demo import five_stages
from demo.terminal import Ended, one_line

TENANT = f"demo-{secrets.token_hex(3)}"
JOBS = [str(uuid.uuid4()) for _ in range(5)]

arrived: set[str] = set()


def query(connection: Connection, sql: str, params: object = None) -> list[tuple]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


# Jobs of others that our listener would claim, and listeners that would claim our jobs.
OTHERS = """
SELECT EXISTS (SELECT FROM jobs WHERE status <> 'failed'
               AND (current_step, status) IS DISTINCT FROM ('vlm_judge', 'done')),
       EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
               AND application_name LIKE 'job-state-listener%')"""

ROUTES = "SELECT current_step, status, stage FROM pipeline_stages"


def is_there(connection: Connection, table: str) -> bool:
    return query(connection, "SELECT to_regclass(%s)", [table]) != [(None,)]


def check_database(connection: Connection) -> None:
    """Raises Ended where the table jobs does not take our rows; where another PIPELINE is
    installed, which our `install` would replace; or where other jobs are due or another listener
    runs: our listener would call the stand-in for their jobs, and theirs would call their API for
    ours.
    """
    if not is_there(connection, "jobs"):
        return
    ours = {(*state, function.__name__) for state, function in five_stages.PIPELINE.items()}
    if is_there(connection, "pipeline_stages") and set(query(connection, ROUTES)) - ours:
        raise Ended("another PIPELINE is installed in this database; name an empty one, or unset "
                    "DB_HOST to do without")  # fmt: skip
    [(jobs, listener)] = query(connection, OTHERS)
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
INSERT INTO jobs (job_id, tenant_id, current_step, status) VALUES (%s, %s, 'img_gen', %s)"""


def insert(connection: Connection, job: str, status: str) -> None:
    arrived.add(job)
    query(connection, INSERT, [job, TENANT, status])


def release(connection: Connection, job: str) -> None:
    query(connection, "UPDATE jobs SET status = 'done' WHERE job_id = %s", [job])


FORGET = """
DELETE FROM jobs WHERE job_id IN %(jobs)s;
DELETE FROM stage_calls WHERE job_id IN %(jobs)s;
DELETE FROM stage_leases WHERE job_id IN %(jobs)s;
DELETE FROM stage_attempts WHERE job_id IN %(jobs)s;
DELETE FROM stage_requests WHERE row_id IN %(jobs)s"""


def forget(connection: Connection) -> None:
    if arrived:
        query(connection, FORGET, {"jobs": tuple(JOBS)})
