"""`python -m chaos once`: runs listeners and stage APIs built on receiver/ while processes are
killed and frozen, connections cut, and requests dropped and repeated. Each job must have its effect
exactly once.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from random import Random

import psycopg2

from chaos import once_api
from chaos.listeners import Listener, Supervisor
from chaos.once_pipeline import STAGES
from demo.database import EmbeddedDatabase
from demo.start import environment
from demo.terminal import CHILD
from receiver import Receiver

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "PIPELINE_MODULE": "chaos.once_pipeline",
    "STAGE_TIMEOUT": 2,
    "LEASE_MARGIN": 1,
    "MAX_ATTEMPTS": 1000,
    "RETRY_DELAY": 0.1,
    "SWEEP_INTERVAL": 2,
    "JOB_STATE_LISTENER_RECONNECT_DELAY": 0.3,
}
CHILDREN = 8
MOMENTS = 16  # a request has about this many (see moments.py)
# By what is done at a moment: its weight in the plan.
WHAT = {"kill": 4, "cut": 2, "repeat": 2, "drop": 1, "freeze": 0.5, "answer late": 0.5}
# Seconds between two faults of listeners, stage processes and database.
EVERY = 1.5
LIMIT = 300.0  # seconds in which all jobs are to be done


class StageProcess:
    """The stage API of once_api.py in processes that log to `log`; a context manager."""

    def __init__(self, dsn: str, log: Path, children: int = CHILDREN):
        self.dsn, self.log, self.children = dsn, log, children

    def __enter__(self) -> "StageProcess":
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        number = self.listening.fileno()
        command = [sys.executable, "-m", "chaos.once_api", str(number), str(self.children)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=log, pass_fds=[number], cwd=ROOT,
                start_new_session=True, env=os.environ | {"DSN": self.dsn})  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
        self.listening.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def kill_children(self) -> None:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in path.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


PLAN = "INSERT INTO planned (job_id, moment, what) VALUES (%s, %s, %s)"
ADD = """
INSERT INTO jobs (job_id, tenant_id, current_step, status) VALUES (%s, 'once', 'new', %s)"""
LEFT = "SELECT count(*) FROM jobs WHERE status <> 'done' OR current_step = 'new'"
WRONG = """
SELECT j.job_id::text, j.current_step, j.status, count(e.job_id)
FROM jobs AS j LEFT JOIN effects AS e ON e.job_id = j.job_id::text
GROUP BY j.job_id
HAVING count(e.job_id) <> 1 OR j.status <> 'done' OR j.current_step = 'new'"""
HAPPENED = "SELECT what, count(*) FROM happened GROUP BY what ORDER BY what"


class Once:
    """One run; a context manager.

    jobs: how many, spread over the stages. seed: of the plan of what happens to them.
    """

    def __init__(self, seed: int, jobs: int, directory: Path):
        self.random, self.jobs, self.directory = Random(seed), jobs, directory
        self.faults = 0

    def __enter__(self) -> "Once":
        with ExitStack() as stack:
            self.database = stack.enter_context(EmbeddedDatabase(options={"max_connections": 300}))
            log = self.directory / "stages.log"
            self.api = stack.enter_context(StageProcess(self.database.dsn(), log))
            given = SETTINGS | self.database.settings() | {"STAGE_API_URL": self.api.url}
            environ = environment(**given, HEARTBEAT_DIR=self.directory / "heartbeats")
            command = [sys.executable, "listener.py", "install"]
            subprocess.run(command, env=environ, timeout=60, check=True, **CHILD)
            Receiver(self.connect).install()
            self.execute(once_api.TABLES)
            listeners = [Listener(n, 8, environ, self.directory) for n in (1, 2)]
            self.supervisor = Supervisor(listeners)
            stack.callback(self.supervisor.close)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.supervisor.stop()
        self.stack.close()

    def connect(self) -> psycopg2.extensions.connection:
        return psycopg2.connect(self.database.dsn())

    def execute(self, sql: str, rows: list | None = None) -> list[tuple]:
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            for row in rows or [None]:
                cursor.execute(sql, row)
            found = cursor.fetchall() if cursor.description else []
            connection.commit()
        return found

    def happen(self, tell: Callable[[str], None]) -> list[tuple]:
        """Run it; returns the jobs that are not done, or whose effect is not there exactly once."""
        ids = [str(uuid.UUID(int=self.random.getrandbits(128))) for _ in range(self.jobs)]
        self.execute(PLAN, [fate for job in ids for fate in self.fates(job)])
        self.execute(ADD, [(job, [*STAGES][n % len(STAGES)]) for n, job in enumerate(ids)])
        self.supervisor.start()
        end, break_at, left = time.monotonic() + LIMIT, time.monotonic() + EVERY, self.jobs
        while left and time.monotonic() < end:
            time.sleep(0.1)
            with suppress(psycopg2.OperationalError):
                left = self.execute(LEFT)[0][0]
            if time.monotonic() > break_at and left > self.jobs // 10:
                tell(f"{left} jobs left: {self.break_something()}")
                break_at = time.monotonic() + EVERY
        self.settle()
        return self.execute(WRONG)

    def fates(self, job: str) -> list[tuple]:
        """What is planned for each request of a job, in order."""
        kinds, weights = list(WHAT), list(WHAT.values())
        return [
            (job, self.random.randint(1, MOMENTS), self.random.choices(kinds, weights)[0])
            for _ in range(self.random.randint(0, 4))
        ]

    def break_something(self) -> str:
        """Break a listener, a stage process or the database; what was done, in words."""
        self.faults += 1
        choice = self.random.choice(["stages", "listener", "database"])
        if choice == "stages":
            self.api.kill_children()
            return "kill -9 of every stage process"
        if choice == "listener":
            for pid in self.random.choice(self.supervisor.listeners).pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return "kill -9 of a listener and its workers"
        self.database.restart("immediate")
        return "the database crashed and was restarted"

    def settle(self) -> None:
        """Wait until calls under way have ended, so that their effects are counted as well."""
        time.sleep(2 * once_api.SECONDS)

    def report(self) -> list[str]:
        happened = ", ".join(f"{count} {what}" for what, count in self.execute(HAPPENED))
        keys = self.execute("SELECT count(*) FROM stage_requests")[0][0]
        calls = self.execute("SELECT count(*) FROM stage_attempts")[0][0]
        return [f"{self.jobs} jobs, {calls} calls, {keys} keys; {self.faults} faults of the world",
                f"at moments of a request: {happened}"]  # fmt: skip
