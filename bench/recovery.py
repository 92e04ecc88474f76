"""How soon a worker is listening again, and notices a silent server: python -m bench.recovery

Its backend is terminated, or stopped like a server that hangs behind a network that still
acknowledges. Times are those at which the worker's log lines arrive here.
"""

import contextlib
import os
import queue
import signal
import statistics
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
from ops.install import apply
from ops.table import table

ROOT = Path(__file__).parent.parent
LISTENING, LOST = "LISTEN '", "리스너 오류 발생"
# The backend of the one worker, once that has settled down to wait.
BACKEND = """
SELECT pid FROM pg_stat_activity
WHERE starts_with(application_name, %s)
  AND state = 'idle' AND state_change < clock_timestamp() - interval '0.3 s'
"""


class Worker:
    """A listener process; its lines with the time they came."""

    def __init__(self, server: EmbeddedDatabase, directory: str, delay: float, sweep: float):
        Path(directory, ".env").touch()
        environ = server.settings() | {"HEARTBEAT_DIR": directory, "SWEEP_INTERVAL": str(sweep)}
        environ["JOB_STATE_LISTENER_RECONNECT_DELAY"] = str(delay)
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "listener.py"],
            env={k: v for k, v in os.environ.items() if k not in config.SETTINGS} | environ,
            cwd=directory,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self.lines: queue.Queue[tuple[float, str]] = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        self.time_of(LISTENING)

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put((time.monotonic(), line))

    def time_of(self, text: str) -> float:
        """When the next line with `text` came."""
        while True:
            when, line = self.lines.get(timeout=100)
            if text in line:
                return when

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Bench:
    def __init__(self, server: EmbeddedDatabase):
        with contextlib.closing(db.connect(config.read(server.settings()))) as conn:
            apply(conn)
        self.server = server
        self.app = psycopg2.connect(server.dsn())
        self.app.autocommit = True

    def backend(self) -> int:
        cursor = self.app.cursor()
        while cursor.rowcount != 1:
            time.sleep(0.05)
            cursor.execute(BACKEND, [db.WORKER_APPLICATION])
        return cursor.fetchone()[0]

    @contextlib.contextmanager
    def worker(self, delay: float, sweep: float):
        with tempfile.TemporaryDirectory() as directory:
            worker = Worker(self.server, directory, delay, sweep)
            try:
                yield worker
            finally:
                worker.stop()

    def terminate(self, delay: float) -> tuple[float, float]:
        """Seconds until a terminated backend is noticed, and until the worker listens again."""
        with self.worker(delay, sweep=30) as worker:
            pid = self.backend()
            began = time.monotonic()
            self.app.cursor().execute("SELECT pg_terminate_backend(%s)", [pid])
            return worker.time_of(LOST) - began, worker.time_of(LISTENING) - began

    def freeze(self, sweep: float) -> tuple[float, float]:
        """Seconds until a stopped backend is noticed, and until the worker listens again."""
        with self.worker(delay=1.0, sweep=sweep) as worker:
            pid = self.backend()
            began = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            try:
                return worker.time_of(LOST) - began, worker.time_of(LISTENING) - began
            finally:
                os.kill(pid, signal.SIGCONT)


def row(what: str, allowed: float, measured: list[tuple[float, float]]) -> list[str]:
    shown = [
        f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        for times in zip(*measured, strict=True)
    ]
    return [what, *shown, f"{allowed:.1f}"]


@click.command()
@click.option("--times", default=5, show_default=True, help="For each reconnect delay.")
@click.option("--freezes", default=2, show_default=True, help="For each sweep interval.")
def main(times: int, freezes: int) -> None:
    rows = []
    with EmbeddedDatabase() as server:
        bench = Bench(server)
        for delay in (0.2, 1.0, 2.0):
            what = f"terminated, reconnect delay {delay:g} s"
            rows.append(row(what, delay, [bench.terminate(delay) for _ in range(times)]))
        for sweep in (1.0, 5.0):
            what = f"stopped, sweep {sweep:g} s + deadline {db.DEADLINE:g} s"
            measured = [bench.freeze(sweep) for _ in range(freezes)]
            rows.append(row(what, sweep + db.DEADLINE, measured))
        bench.app.close()
    click.echo("Seconds from the fault, median (range); allowed: one reconnect delay until it")
    click.echo("listens again, or the sweep interval and the deadline until it is noticed.")
    click.echo(table(["", "noticed", "listening again", "allowed"], rows))


if __name__ == "__main__":
    main()
