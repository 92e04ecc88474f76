"""The queues in Python, see bench/workers/. Each has the name of its module."""

import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from bench.database import Database
from bench.peers.base import CALL, Queue, Shape


class PythonQueue(Queue):
    def unavailable(self) -> str | None:
        return None if find_spec(self.name) else "pip did not install it for this Python"


class PgQueuer(PythonQueue):
    name = "pgqueuer"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 16), Shape(2, 64))

    # The statements that its `enqueue` runs for one job: they add the job and a log entry.
    enqueue = f"""
    WITH inserted AS (
        INSERT INTO pgqueuer (priority, entrypoint, payload, execute_after, status)
        VALUES (0, 'call', convert_to({CALL}::text, 'UTF8'), now(), 'queued')
        RETURNING id, entrypoint, priority
    )
    INSERT INTO pgqueuer_log (job_id, status, entrypoint, priority)
    SELECT id, 'queued', entrypoint, priority FROM inserted;
    """

    def make_tables(self, database: Database) -> None:
        for what in ("install", "autovac"):
            command = [sys.executable, "-m", "pgqueuer", "sql", what]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            database.execute(done.stdout)


class Procrastinate(PythonQueue):
    name = "procrastinate"
    best = (Shape(1, 4), Shape(1, 16), Shape(2, 8))

    # The function that its own `defer` calls.
    enqueue = f"""
    PERFORM procrastinate_defer_jobs_v1(ARRAY[ROW('calls', 'call', 0, NULL, NULL,
        {CALL}::jsonb, NULL)::procrastinate_job_to_defer_v1]);
    """

    def make_tables(self, database: Database) -> None:
        from procrastinate.schema import SchemaManager

        database.execute(SchemaManager.get_schema())

    def connections(self, shape: Shape) -> int:
        """A full pool and one that listens."""
        return shape.processes * (shape.in_flight + 2)


class Awa(PythonQueue):
    name = "awa"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))

    # The function that its `insert_job` calls, with the default arguments of `insert_job`.
    enqueue = f"""
    PERFORM awa.insert_job_compat('call', 'calls', {CALL}::jsonb, 'available', 2::smallint,
        25::smallint, NULL, '{{}}', '{{}}', NULL, NULL::bit(8), NULL::bytea);
    """
    # awa has two kinds of storage. A new database starts with the old one, whose jobs are only
    # found by polling. The first worker switches to the new one, if there is no job yet.
    STORAGE = "SELECT awa.active_queue_storage_schema()"

    def make_tables(self, database: Database) -> None:
        command = [sys.executable, "-m", "awa", "--database-url", database.dsn, "migrate"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with (
            tempfile.TemporaryDirectory() as directory,
            self.start(Shape(), database, "", Path(directory)) as processes,
        ):
            while not database.execute(self.STORAGE)[0][0]:
                processes.check()
                time.sleep(0.1)


class Dbos(PythonQueue):
    name = "dbos"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))
    enqueue = f"PERFORM dbos.enqueue_workflow('call', 'calls', named_args => {CALL});"

    def make_tables(self, database: Database) -> None:
        command = [Path(sys.executable).with_name("dbos"), "migrate", "--sys-db-url", database.dsn]
        subprocess.run(command, check=True, capture_output=True)


class Oban(PythonQueue):
    name = "oban"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))

    # The statement that its `enqueue` runs for one job. The worker class is in the program's own
    # module, hence `__main__`.
    enqueue = f"""
    INSERT INTO oban_jobs (args, queue, worker)
    VALUES ({CALL}, 'calls', '__main__.Call');
    PERFORM pg_notify('public.oban_insert', '{{"queue":"calls"}}');
    """

    def make_tables(self, database: Database) -> None:
        from oban.schema import install_sql

        database.execute(install_sql())

    def connections(self, shape: Shape) -> int:
        """One that listens and one of the pool."""
        return 2 * shape.processes
