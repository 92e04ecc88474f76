"""How many calls a second a listener can settle and claim: python -m bench.claim_rate

With queues of different length and numbers of workers, and with what each call costs in round
trips and commits.
"""

import contextlib
import re
import time

import click
import psycopg2

import calls
import config
import db
from calls import Result, Wanted
from demo.database import EmbeddedDatabase
from ops.install import apply
from ops.table import table
from pipeline import stage_names

SLICE = 64  # calls between two top-ups, which are not timed

ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'bench', (ARRAY['img_gen', 'vlm_analyze', 'yolo_detect', 'planner', 'overlay'])[1 + n %% 5],
       'done'
FROM generate_series(1, %s) AS n
"""

COMMITS = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'"
ENDED = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
LOG = "SELECT pg_read_file(pg_current_logfile())"


class Turns:
    """The database's side of a busy listener: every call is accepted at once."""

    def __init__(self, settings, workers: int = 1):
        self.conn, self.workers = db.connect(settings, pinned=True), workers
        self.stages = stage_names()
        self.results: list[Result] = []

    def take(self, count: int) -> None:
        """`count` calls, as many a turn as there are workers."""
        for _ in range(count // self.workers):
            share = -(-self.workers // len(self.stages))
            wanted = [Wanted(stage, 630, self.workers, share) for stage in self.stages]
            turn = calls.settle_and_claim(self.conn, self.results, wanted, self.workers, "bench")
            self.results = []
            for row in turn.claimed:
                self.stages.remove(row.stage)
                self.stages.append(row.stage)
                self.results.append(accepted(row))


def accepted(row) -> Result:
    return Result(
        job_id=row.key,
        call_id=row.call_id,
        attempt=row.attempt,
        stage=row.stage,
        worker="bench",
        started_at=row.started_at,
        outcome="succeeded",
        http_status=200,
    )


def rate(app, settings, queue: int, workers: int, seconds: float) -> float:
    """Calls a second with about `queue` calls owed."""
    app.execute("TRUNCATE jobs, stage_calls, stage_leases")
    for left in range(queue, 0, -10_000):
        app.execute(ADD_JOBS, [min(left, 10_000)])
    turns, done, spent = Turns(settings, workers), 0, 0.0
    with contextlib.closing(turns.conn):
        while spent < seconds:
            app.execute(ADD_JOBS, [SLICE])
            began = time.perf_counter()
            turns.take(SLICE)
            spent += time.perf_counter() - began
            done += SLICE
    return done / spent


def value(cursor, sql: str, *params):
    cursor.execute(sql, params)
    return cursor.fetchone()[0]


def cost(app, watch, settings, count: int = 200) -> tuple[float, float]:
    """Round trips and commits for one call, as the server counts them.

    Args:
        watch: a cursor in another database, so that its own commits do not count.
    """
    app.execute("TRUNCATE jobs, stage_calls, stage_leases")
    app.execute(ADD_JOBS, [2 * count])
    app.connection.close()
    commits = []
    for calls_made in (0, count):
        before = value(watch, COMMITS)
        turns = Turns(settings)
        pid = turns.conn.info.backend_pid
        db.execute(turns.conn, "SET log_statement = 'all'")
        turns.take(calls_made)
        turns.conn.close()
        while not value(watch, ENDED, pid):  # its statistics arrive with its end
            time.sleep(0.05)
        commits.append(value(watch, COMMITS) - before)
    logged = value(watch, LOG)
    statements = len(re.findall(rf"^{pid} LOG:  statement:", logged, re.MULTILINE))
    return statements / count, (commits[1] - commits[0]) / count


@click.command()
@click.option("--seconds", default=8.0, show_default=True, help="For each line.")
@click.option("--major", default=18, show_default=True, help="PostgreSQL version.")
def main(seconds: float, major: int) -> None:
    options = {"logging_collector": "on", "log_line_prefix": "%p "}
    with EmbeddedDatabase(major, options=options) as server:
        settings = config.read(server.settings())
        with contextlib.closing(db.connect(settings)) as conn:
            apply(conn)
        app, watch = psycopg2.connect(server.dsn()), psycopg2.connect(server.dsn("template1"))
        app.autocommit = watch.autocommit = True
        rows = []
        for queue in (100, 20_000, 100_000):
            for workers in (1, 16):
                per_second = rate(app.cursor(), settings, queue, workers, seconds)
                spent = f"{1000 / per_second:.2f}"
                rows.append([f"{queue:,}", str(workers), f"{per_second:.0f}", spent])
        round_trips, commits = cost(app.cursor(), watch.cursor(), settings)
        watch.close()
    click.echo(f"PostgreSQL {major}, every call settled and the next ones claimed:")
    click.echo(table(["calls owed", "workers", "calls/s", "ms per call"], rows))
    click.echo(f"with one worker a call costs {round_trips:.2f} round trips, {commits:.2f} commits")


if __name__ == "__main__":
    main()
