"""What a worker process weighs after 10,000 calls and 200,000 notifications: python -m bench.memory

The stage API answers at once. Half of the notifications arrive while the worker is waiting, the
other half while it waits for the answer to a call and reads nothing.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psycopg2

import config
import db
from demo.database import EmbeddedDatabase
from demo.stage_api import StageApi
from demo.stage_server import Answer
from ops.install import apply
from ops.watch import table

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds

ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'bench', 'overlay', 'done' FROM generate_series(1, %s)
"""

NOTIFY = """
SELECT count(pg_notify('job_state_changed', json_build_object(
    'job_id', gen_random_uuid(), 'current_step', 'img_gen', 'status', 'running',
    'tenant_id', n)::text)) FROM generate_series(1, %s) AS n
"""

# Rung after the others: once it is heard, they were too.
LAST = "NOTIFY job_state_changed, 'the last one'"


class Bench:
    """An application, a stage API that always answers 200, and one worker process."""

    def __init__(self, server: EmbeddedDatabase, directory: str):
        self.settings = server.settings()
        with contextlib.closing(db.connect(config.read(self.settings))) as conn:
            apply(conn)
        self.app = psycopg2.connect(server.dsn())
        self.app.autocommit = True
        self.api = StageApi(server.dsn()).start()
        self.api.on("vlm_judge", self.answer)
        self.asked, self.answering = threading.Event(), threading.Event()
        self.answering.set()
        self.log = Path(directory, "log")
        environ = self.settings | {"STAGE_API_URL": self.api.url, "HEARTBEAT_DIR": directory}
        Path(directory, ".env").touch()
        with self.log.open("w") as log:
            self.worker = subprocess.Popen(
                [sys.executable, ROOT / "listener.py"],
                env={k: v for k, v in os.environ.items() if k not in config.SETTINGS} | environ,
                cwd=directory,
                stdout=log,
            )
        self.reading, self.heard = self.log.open(), 0
        self.wait_for(lambda: "LISTEN" in self.reading.read())

    def answer(self, request) -> Answer:
        self.api.requests.clear()  # this process need not remember them
        self.asked.set()
        self.answering.wait()
        return Answer(200)

    def wait_for(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or self.worker.poll() is not None:
                raise SystemExit(
                    f"the worker did not get there; its log:\\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(0.05)

    def execute(self, sql: str, *params):
        cursor = self.app.cursor()
        cursor.execute(sql, params)
        return cursor.fetchone()[0] if cursor.description else None

    def owed(self) -> int:
        return self.execute("SELECT count(*) FROM stage_calls")

    def make_calls(self, count: int) -> None:
        self.execute(ADD_JOBS, count)
        self.wait_for(lambda: self.owed() == 0)

    def notify(self, count: int) -> None:
        """In transactions of 10,000, and wait until the worker has heard them."""
        heard = self.heard
        for _ in range(count // 10_000):
            self.execute(NOTIFY, 10_000)
        self.execute(LAST)
        self.answering.set()
        self.wait_for(lambda: self.count_heard() > heard)

    def count_heard(self) -> int:
        """How often the last notification of many was heard, by the log so far."""
        self.heard += sum("the last one" in line for line in self.reading)
        return self.heard

    def memory(self) -> tuple[str, str]:
        """Resident memory of the worker now and at its highest, in MiB."""
        status = Path(f"/proc/{self.worker.pid}/status").read_text()
        found = dict(line.split(":", 1) for line in status.splitlines())
        return tuple(f"{int(found[key].split()[0]) / 1024:.1f}" for key in ("VmRSS", "VmHWM"))

    def close(self) -> None:
        self.answering.set()
        self.worker.terminate()
        self.worker.wait()
        self.api.close()
        self.app.close()
        self.reading.close()


def measure(bench: Bench, calls: int, notifications: int):
    yield "started", bench.memory()
    bench.make_calls(100)
    yield "after 100 calls", bench.memory()
    bench.make_calls(calls - 100)
    yield f"after {calls:,} calls", bench.memory()
    bench.notify(notifications // 2)
    yield f"after {notifications // 2:,} notifications while waiting", bench.memory()
    bench.answering.clear()
    bench.asked.clear()
    bench.execute(ADD_JOBS, 1)
    bench.wait_for(bench.asked.is_set)
    bench.notify(notifications // 2)
    yield f"after {notifications // 2:,} more during a call", bench.memory()


@click.command()
@click.option("--calls", default=10_000, show_default=True)
@click.option("--notifications", default=200_000, show_default=True)
def main(calls: int, notifications: int) -> None:
    rows = []
    with EmbeddedDatabase() as server, tempfile.TemporaryDirectory() as directory:
        bench = Bench(server, directory)
        try:
            for what, (now, highest) in measure(bench, calls, notifications):
                rows.append([what, now, highest])
        finally:
            bench.close()
    click.echo("Resident memory of one worker process, MiB:")
    click.echo(table(["", "now", "highest"], rows))


if __name__ == "__main__":
    main()
