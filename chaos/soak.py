"""`make soak`: a steady load for a long time, and a check that nothing grows: memory of the
listener and its workers, file descriptors, tables, the time until a call is claimed.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import psycopg2

from chaos.listeners import Listener, Supervisor
from chaos.trend import Series
from demo.database import EmbeddedDatabase
from demo.stage_api import StageApi
from demo.start import environment
from demo.terminal import run_command

WORKERS = 4
SAMPLES = 180
# The least value of HISTORY_DAYS, so that a run of half an hour prunes some history.
SETTINGS = {
    "PIPELINE_MODULE": "demo.five_stages",
    "HISTORY_DAYS": "0.01",
    "SWEEP_INTERVAL": "5",
}
KEEP_JOBS = 60  # seconds after which the application deletes a job

ADD = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'soak', 'img_gen', 'done' FROM generate_series(1, %s)
"""
TIDY = "DELETE FROM jobs WHERE created_at < now() - make_interval(secs => %s)"

SIZES = """
SELECT sum(pg_total_relation_size(c.oid)) FILTER (WHERE NOT is_history) / 1024.0,
       sum(pg_total_relation_size(c.oid)) FILTER (WHERE is_history) / 1024.0,
       sum(s.n_dead_tup) FILTER (WHERE NOT is_history)
FROM pg_class AS c JOIN pg_stat_user_tables AS s ON s.relid = c.oid
CROSS JOIN LATERAL (  -- pruning moves rows from stage_attempts to stage_totals
    SELECT c.relname ~ '^stage_(attempts|totals)' AS is_history) AS kind
WHERE c.relname LIKE 'stage\\_%' AND c.relname <> 'stage_requests'  -- the stand-in's own
   OR c.relname = 'pipeline_stages'
"""
LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (
           ORDER BY 1000 * extract(epoch FROM a.started_at - j.created_at)::float8)
FROM stage_attempts AS a JOIN jobs AS j USING (job_id)
WHERE a.stage = 'vlm_analyze' AND a.attempt = 1
  AND a.finished_at > now() - make_interval(secs => %s)
"""

# Name, unit, and the growth in the second half that is allowed. Dead rows are vacuumed once a
# minute; the history grows until it is pruned.
MEASURED = [
    ("memory of the listener (PSS)", "MiB", 1.0),
    ("memory of its workers (PSS)", "MiB", 1.5),
    ("memory of the largest (RSS)", "MiB", 1.0),
    ("file descriptors", "number", 1.0),
    ("tables of what is owed", "KiB", 64.0),
    ("dead rows in them", "number", 5000.0),
    ("claimed after, median", "ms", 10.0),
    ("claimed after, 95%", "ms", 25.0),
    ("calls finished", "a second", None),
    ("history and totals", "KiB", None),
]


class Soak:
    """A context manager; `measure` is the run itself."""

    def __init__(self, rate: float, directory: Path):
        self.rate, self.directory = rate, directory
        self.over = threading.Event()
        self.answered = 0

    def __enter__(self) -> "Soak":
        with ExitStack() as stack:
            self.database = stack.enter_context(EmbeddedDatabase())
            self.api = StageApi(self.database.dsn(), delay=0.02, log=self.count)
            stack.enter_context(self.api)
            run_command("install", self.environ())
            self.listener = Listener(1, WORKERS, self.environ(), self.directory)
            self.supervisor = Supervisor([self.listener])
            stack.callback(self.supervisor.close)
            self.conn = stack.enter_context(closing(psycopg2.connect(self.database.dsn())))
            self.conn.autocommit = True
            self.supervisor.start()
            stack.callback(self.supervisor.stop)
            self.application = threading.Thread(target=self.add_jobs, daemon=True)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.stack.close()

    def environ(self) -> dict[str, str]:
        given = SETTINGS | self.database.settings() | {"STAGE_API_URL": self.api.url}
        return environment(**given, HEARTBEAT_DIR=self.directory / "heartbeats")

    def count(self, _request) -> None:
        self.answered += 1

    def add_jobs(self) -> None:
        with closing(psycopg2.connect(self.database.dsn())) as conn, conn.cursor() as cursor:
            conn.autocommit = True
            began, added = time.monotonic(), 0
            while not self.over.wait(0.2):
                due = int((time.monotonic() - began) * self.rate)
                cursor.execute(ADD, [due - added])
                cursor.execute(TIDY, [KEEP_JOBS])
                added = due

    def measure(
        self, seconds: float, tell: Callable[[str], None]
    ) -> tuple[list[float], list[Series]]:
        """Sample until the time is over; the times of the samples, and the series."""
        every = max(1.0, seconds / SAMPLES)
        times, samples = [], []
        self.application.start()
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds and not self.over.wait(every):
            times.append(now)
            samples.append(self.sample(every))
            if len(times) % max(1, SAMPLES // 10) == 0:
                tell("{:5.1f} min: {:.1f} and {:.1f} MiB".format(now / 60, *samples[-1][:2]))
        columns = zip(*samples, strict=True)
        measured = zip(MEASURED, columns, strict=True)
        return times, [Series(*known, list(values)) for known, values in measured]

    def problems(self) -> list[str]:
        """What the listener did that it should not have done, after the end of the run."""
        bad = [one for one in self.supervisor.exits if one.code or not one.asked]
        exits = [f"listener {one.slot} ended with exit code {one.code}" for one in bad]
        return exits + self.listener.bugs

    def sample(self, every: float) -> list[float]:
        pids = self.listener.pids()
        self.api.requests.clear()  # so that this process does not grow
        answered, self.answered = self.answered, 0
        with self.conn.cursor() as cursor:
            cursor.execute(SIZES)
            owed, history, dead = map(float, cursor.fetchone())
            cursor.execute(LATENCY, [every])
            median, slow = cursor.fetchone()[0] or (0.0, 0.0)
        own, *others = [kilobytes(pid, "Pss") / 1024 for pid in pids] or [0.0]
        largest = max((kilobytes(pid, "Rss") / 1024 for pid in pids), default=0.0)
        files = sum(map(descriptors, pids))
        rate = answered / every
        return [own, sum(others), largest, files, owed, dead, median, slow, rate, history]


def descriptors(pid: int) -> int:
    with suppress(OSError):  # a worker that was replaced meanwhile
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def kilobytes(pid: int, what: str) -> int:
    """Memory of a process. what: "Pss" divides shared memory by its users, "Rss" does not."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1])
    return 0
