"""What the database trigger adds to one UPDATE of 20,000 jobs: python -m bench.trigger_burst

Compared, turn by turn, with the same UPDATE without a trigger and under a trigger that does
nothing but NOTIFY.
"""

import contextlib
import statistics
import time

import click
import psycopg2
import psycopg2.extensions

import config
import db
from bench.pipeline import NOTIFY_ONLY
from demo.database import EmbeddedDatabase
from ops.install import apply
from ops.table import table

ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT %s, 'img_gen', %s FROM generate_series(1, %s)
"""

# The job's way in and out of a state that owes a call.
ARRIVE = "UPDATE jobs SET status = 'done' WHERE tenant_id = 'burst'"
LEAVE = "UPDATE jobs SET status = 'running' WHERE tenant_id = 'burst'"


class Case:
    """A database of its own, so that no case bloats the tables of another."""

    def __init__(self, server: EmbeddedDatabase, number: int, triggers: str, others: int = 0):
        self.name, self.server = f"burst_{number}", server
        with contextlib.closing(self.connect("postgres")) as conn:
            conn.cursor().execute(f"CREATE DATABASE {self.name}")
        self.kept = self.connect()
        with contextlib.closing(db.connect(config.read(server.settings(self.name)))) as conn:
            apply(conn)
        psycopg2.extensions.set_wait_callback(None)  # a burst may take longer than a worker waits
        cursor = self.kept.cursor()
        if triggers != "ours":
            cursor.execute("DROP FUNCTION notify_job_state_change() CASCADE")
        if triggers == "notify":
            cursor.execute(NOTIFY_ONLY)
        for _ in range(10):  # the plans are made, and kept, while nothing is owed
            cursor.execute(ADD_JOBS, ["burst", "running", 1])
            cursor.execute(ARRIVE)
            cursor.execute(LEAVE)
        cursor.execute("TRUNCATE jobs")
        cursor.execute(ADD_JOBS, ["others", "done", others])
        self.seconds: dict[str, list[float]] = {ARRIVE: [], LEAVE: []}

    def connect(self, name: str | None = None):
        conn = psycopg2.connect(self.server.dsn(name or self.name))
        conn.autocommit = True
        return conn

    def burst(self, jobs: int, keep_session: bool) -> None:
        """Move `jobs` new jobs into a state that owes a call and out of it; the seconds of both."""
        self.kept.cursor().execute("DELETE FROM jobs WHERE tenant_id = 'burst'")
        self.kept.cursor().execute(ADD_JOBS, ["burst", "running", jobs])
        for name in ("jobs", "stage_calls"):  # without ANALYZE
            self.kept.cursor().execute(f"VACUUM {name}")
        self.kept.cursor().execute("CHECKPOINT")
        conn = self.kept if keep_session else self.connect()
        for statement in (ARRIVE, LEAVE):
            began = time.perf_counter()
            conn.cursor().execute(statement)
            self.seconds[statement].append(time.perf_counter() - began)
        if not keep_session:
            conn.close()


# name: (triggers, jobs of others that owe a call already, session that has planned before)
CASES = {
    "no trigger": ("none", 0, False),
    "notify only": ("notify", 0, False),
    "ours, new session": ("ours", 0, False),
    "ours, planned when empty": ("ours", 0, True),
    "ours, 20,000 others owed": ("ours", 20_000, False),
}


@click.command()
@click.option("--jobs", default=20_000, show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--major", default=18, show_default=True, help="PostgreSQL version.")
def main(jobs: int, repetitions: int, major: int) -> None:
    with EmbeddedDatabase(major) as server:
        cases = {
            name: Case(server, number, triggers, others)
            for number, (name, (triggers, others, _)) in enumerate(CASES.items())
        }
        for _ in range(repetitions):
            for name, case in cases.items():
                case.burst(jobs, keep_session=CASES[name][2])
    rows = []
    base = {key: statistics.median(s) for key, s in cases["notify only"].seconds.items()}
    for name, case in cases.items():
        median = {key: statistics.median(seconds) for key, seconds in case.seconds.items()}
        spread = [f"{min(s):.2f}-{max(s):.2f}" for s in case.seconds.values()]
        ratio = [f"{median[key] / base[key]:.2f}" for key in (ARRIVE, LEAVE)]
        cells = zip((f"{seconds:.2f}" for seconds in median.values()), spread, ratio, strict=True)
        rows.append([name, *(cell for triple in cells for cell in triple)])
    click.echo(f"PostgreSQL {major}, one UPDATE of {jobs} jobs, {repetitions} times, seconds:")
    header = ["", "arrive", "range", "ratio", "leave", "range", "ratio"]
    click.echo(table(header, rows))


if __name__ == "__main__":
    main()
