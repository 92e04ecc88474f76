"""What a worker process weighs after 10,000 calls and 200,000 notifications: python -m bench.memory

The stage API answers at once. Half of the notifications arrive while the worker is waiting, the
other half while it waits for the answer to a call and reads nothing. With --workers N what each
further worker adds is its PSS: what processes share is counted once, a part to each.
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
from ops.table import table

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
    """An application, a stage API that always answers 200, and the listener."""

    def __init__(self, server: EmbeddedDatabase, directory: str, workers: int):
        self.settings, self.workers = server.settings(), workers
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
            self.listener = subprocess.Popen(
                [sys.executable, ROOT / "listener.py", "run", "--workers", str(workers)],
                env={k: v for k, v in os.environ.items() if k not in config.SETTINGS} | environ,
                cwd=directory,
                stdout=log,
            )
        self.reading, self.heard = self.log.open(), 0
        self.wait_for(lambda: self.log.read_text().count("LISTEN '") == workers)

    def answer(self, request) -> Answer:
        self.api.requests.clear()  # this process need not remember them
        self.asked.set()
        self.answering.wait()
        return Answer(200)

    def wait_for(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or self.listener.poll() is not None:
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
        """In transactions of 10,000, and wait until they are heard: one worker listens for all."""
        heard = self.heard + 1
        for _ in range(count // 10_000):
            self.execute(NOTIFY, 10_000)
        self.execute(LAST)
        self.answering.set()
        self.wait_for(lambda: self.count_heard() >= heard)
        self.make_calls(1)  # until the last one is heard and dropped

    def count_heard(self) -> int:
        """How often the last notification of many was heard, by the log so far."""
        self.heard += sum("the last one" in line for line in self.reading)
        return self.heard

    def memory(self) -> list[str]:
        """Of the largest worker: resident now and at its highest, PSS; the PSS of all. In MiB."""
        parent = self.listener.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        processes = {pid: kilobytes(pid) for pid in [parent, *children]}
        workers = [processes[pid] for pid in children or [parent]]
        sizes = [max(size[key] for size in workers) for key in ("VmRSS", "VmHWM", "Pss")]
        sizes.append(sum(size["Pss"] for size in processes.values()))
        return [f"{size / 1024:.1f}" for size in sizes]

    def close(self) -> None:
        self.answering.set()
        self.listener.terminate()
        self.listener.wait()
        self.api.close()
        self.app.close()
        self.reading.close()


def kilobytes(pid: int | str) -> dict[str, int]:
    """What the kernel says about the memory of a process."""
    files = (Path(f"/proc/{pid}/{name}") for name in ("status", "smaps_rollup"))
    words = [line.split() for file in files for line in file.read_text().splitlines()]
    return {word[0].rstrip(":"): int(word[1]) for word in words if word[-1] == "kB"}


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
@click.option("--workers", default=1, show_default=True)
def main(calls: int, notifications: int, workers: int) -> None:
    rows = []
    with EmbeddedDatabase() as server, tempfile.TemporaryDirectory() as directory:
        bench = Bench(server, directory, workers)
        try:
            for what, sizes in measure(bench, calls, notifications):
                rows.append([what, *sizes])
        finally:
            bench.close()
    click.echo(f"Memory of the largest of {workers} worker processes, MiB:")
    click.echo(table(["", "resident", "highest", "PSS", "PSS of all"], rows))


if __name__ == "__main__":
    main()
