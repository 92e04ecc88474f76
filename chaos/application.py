"""The application of a chaos run: adds jobs, changes them as planned, and sends back jobs that rest
in a state where nothing is owed.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psycopg2

from chaos import families
from chaos.plan import Step, order, tenant
from demo.stage_api import CONNECTION_LOST, STAGES

INSERT = """
INSERT INTO jobs (job_id, tenant_id, current_step, status, priority, run_after)
VALUES (%s, %s, %s, %s, %s, now() + make_interval(secs => %s))
"""
MOVE = "UPDATE jobs SET current_step = %s, status = %s WHERE job_id = %s"
TOUCH = "UPDATE jobs SET status = status, updated_at = now() WHERE job_id = %s"
LOCK = "SELECT current_step, status FROM jobs WHERE job_id = %s FOR UPDATE"
PAUSE = "UPDATE jobs SET status = 'paused' WHERE job_id = %s RETURNING job_id"
DELETE = "DELETE FROM jobs WHERE job_id = %s"

# Jobs that owe nothing and have not changed for 8 s: no stage works on them any more.
LEFT_BEHIND = """
SELECT j.job_id::text, j.current_step, j.status FROM jobs AS j
WHERE (j.current_step, j.status) <> ('vlm_judge', 'done') AND j.status <> 'cancelled'
  AND j.current_step NOT IN ('family', 'ad_copy')
  AND NOT EXISTS (SELECT FROM stage_calls AS c WHERE c.job_id = j.job_id)
  AND (SELECT max(chaos.seconds(a.at)) FROM chaos.audit AS a WHERE a.job = j.job_id::text)
      < chaos.seconds(now()) - 8
LIMIT 20
"""
VARIANT_TRIES = 10  # of a variant whose job is not there
BEFORE = dict(STAGES.values())  # stage: the step that must be done before it


class Application:
    """run() carries out the steps in time; look_after() is a loop for a thread of its own."""

    def __init__(self, dsn: str, steps: list[Step]):
        self.dsn, self.steps = dsn, steps
        self.stop = threading.Event()
        self.errors: list[str] = []  # statements that failed, though the database was there
        self.rolled_back: set[str] = set()  # rows that a transaction without a trace had locked

    def run(self) -> None:
        """Carry out every step when its time has come, several at once."""
        began = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            for step in self.steps:
                if self.stop.wait(max(0.0, began + step.at - time.monotonic())):
                    return
                pool.submit(self.carry_out, step)

    def carry_out(self, step: Step) -> None:
        """Carry out a step, again if the database was lost. Whether a lost commit took effect is in
        the audit table."""
        tries = VARIANT_TRIES
        while not self.stop.is_set() and tries:
            try:
                with closing(psycopg2.connect(self.dsn)) as conn, self.noting(step):
                    ACTIONS[step.what](self, conn.cursor(), step)
                    conn.commit()
                return
            except CONNECTION_LOST:
                self.stop.wait(0.2)
            except psycopg2.errors.UniqueViolation:
                return  # an earlier commit had succeeded after all
            except psycopg2.errors.ForeignKeyViolation:  # its job comes later, or was deleted
                tries -= 1
                self.stop.wait(0.2)
            except psycopg2.Error as error:
                self.errors.append(f"the application could not {step.what}: {error}".strip())
                return

    @contextmanager
    def noting(self, step: Step) -> Iterator[None]:
        """Note the row of a transaction that ended with its connection."""
        try:
            yield
        except CONNECTION_LOST:
            self.rolled_back |= {step.job, step.variant}
            raise

    def look_after(self) -> None:
        while not self.stop.wait(1.0):
            try:
                with closing(psycopg2.connect(self.dsn)) as conn, conn.cursor() as cursor:
                    self.put_back_left_behind(cursor)
                    self.put_back_variants(cursor)
            except CONNECTION_LOST:
                pass

    def put_back_left_behind(self, cursor) -> None:
        cursor.execute(LEFT_BEHIND)
        for job, step, status in cursor.fetchall():
            if status == "done":  # accepted, but not worked on: leave the state and come back to it
                cursor.execute(PAUSE, [job])
                cursor.connection.commit()
            cursor.execute(
                MOVE, [step if status == "done" else BEFORE.get(step, step), "done", job]
            )
            cursor.connection.commit()

    def put_back_variants(self, cursor) -> None:
        cursor.execute(families.LEFT_BEHIND)
        for variant, *state in cursor.fetchall():
            if tuple(state) == families.CUT:
                cursor.execute(families.MOVE, ["cut", "paused", variant])
                cursor.connection.commit()
            cursor.execute(families.MOVE, [*families.CUT, variant])
        cursor.connection.commit()


# --- the steps of a plan -------------------------------------------------------------------


def insert(_app: Application, cursor, step: Step) -> None:
    cursor.execute(INSERT, [step.job, tenant(step.job), *step.state, *order(step.job)])


def insert_and_roll_back(app: Application, cursor, step: Step) -> None:
    insert(app, cursor, step)
    app.stop.wait(0.1)
    cursor.connection.rollback()


def move(_app: Application, cursor, step: Step) -> None:
    cursor.execute(MOVE, [*step.state, step.job])


def roll_back(app: Application, cursor, step: Step) -> None:
    move(app, cursor, step)
    app.stop.wait(step.seconds)
    cursor.connection.rollback()
    app.rolled_back.add(step.job)


def touch(_app: Application, cursor, step: Step) -> None:
    cursor.execute(TOUCH, [step.job])


def lock(app: Application, cursor, step: Step) -> None:
    cursor.execute(LOCK, [step.job])
    app.stop.wait(step.seconds)


def bounce(app: Application, cursor, step: Step) -> None:
    """Leave the state and come back seconds later: two arrivals."""
    cursor.execute(LOCK, [step.job])
    for state in cursor.fetchall():
        cursor.execute(PAUSE, [step.job])
        cursor.connection.commit()
        app.stop.wait(step.seconds)
        cursor.execute(MOVE, [*state, step.job])


def flip(_app: Application, cursor, step: Step) -> None:
    """Leave the state and come back in one transaction, which is a new arrival."""
    cursor.execute(LOCK, [step.job])
    for state in cursor.fetchall():
        cursor.execute(PAUSE, [step.job])
        cursor.execute(MOVE, [*state, step.job])


def delete(_app: Application, cursor, step: Step) -> None:
    cursor.execute(DELETE, [step.job])


def add_variant(_app: Application, cursor, step: Step) -> None:
    cursor.execute(families.INSERT, [step.variant, step.job, *step.state, *order(step.variant)])


def redo_variant(app: Application, cursor, step: Step) -> None:
    """Set the variant back to its first state."""
    cursor.execute(families.MOVE, ["cut", "paused", step.variant])
    app.stop.wait(step.seconds)
    cursor.connection.commit()
    cursor.execute(families.MOVE, [*families.CUT, step.variant])


def remove_variant(_app: Application, cursor, step: Step) -> None:
    cursor.execute("DELETE FROM jobs_variants WHERE job_variants_id = %s", [step.variant])


ACTIONS = {
    "add variant": add_variant,
    "redo variant": redo_variant,
    "remove variant": remove_variant,
    "insert": insert,
    "insert and roll back": insert_and_roll_back,
    "move": move,
    "roll back": roll_back,
    "touch": touch,
    "lock": lock,
    "bounce": bounce,
    "flip": flip,
    "delete": delete,
}
