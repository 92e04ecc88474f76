"""How many calls a second one worker can settle and claim: python -m bench.claim_rate

With queues of different length, and with what each call costs in round trips and commits.
"""

import contextlib
import re
import time

import click
import psycopg2
import settling

import calls
import config
import db
from demo.database import EmbeddedDatabase
from ops.install import apply
from ops.table import table
from stages import stage_names

SLICE = 100  # calls between two top-ups, which are not timed

ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'bench', (ARRAY['img_gen', 'vlm_analyze', 'yolo_detect', 'planner', 'overlay'])[1 + n %% 5],
       'done'
FROM generate_series(1, %s) AS n
"""

COMMITS = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'"
ENDED = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
LOG = "SELECT pg_read_file(pg_current_logfile())"


class Worker:
    """The database's side of a busy worker: every call is accepted at once."""

    def __init__(self, settings):
        self.conn = db.connect(settings, pinned=True)
        self.stages = stage_names()
        self.settled = None

    def work(self, count: int) -> None:
        for _ in range(count):
            row = calls.claim(
                self.conn,
                leases=dict.fromkeys(self.stages, 630),
                worker="bench",
                settled=self.settled,
            )
            after = self.stages.index(row.stage) + 1
            self.stages = self.stages[after:] + self.stages[:after]
            self.settled = settling.Settlement(
                row.job_id, row.call_id, row.attempt, row.stage, "bench", row.started_at,
                outcome="succeeded", http_status=200,
            )  # fmt: skip


def rate(app, settings, queue: int, seconds: float) -> float:
    """Calls a second with about `queue` calls owed."""
    app.execute("TRUNCATE jobs, stage_calls")
    for left in range(queue, 0, -10_000):
        app.execute(ADD_JOBS, [min(left, 10_000)])
    worker, done, spent = Worker(settings), 0, 0.0
    with contextlib.closing(worker.conn):
        worker.work(min(queue, SLICE) // 2)
        while spent < seconds:
            app.execute(ADD_JOBS, [SLICE // 2])
            began = time.perf_counter()
            worker.work(SLICE // 2)
            spent += time.perf_counter() - began
            done += SLICE // 2
    return done / spent


def value(cursor, sql: str, *params):
    cursor.execute(sql, params)
    return cursor.fetchone()[0]


def cost(app, watch, settings, count: int = 200) -> tuple[float, float]:
    """Round trips and commits for one call, as the server counts them.

    Args:
        watch: a cursor in another database, so that its own commits do not count.
    """
    app.execute("TRUNCATE jobs, stage_calls")
    app.execute(ADD_JOBS, [2 * count])
    app.connection.close()
    commits = []
    for calls_made in (0, count):
        before = value(watch, COMMITS)
        worker = Worker(settings)
        pid = worker.conn.info.backend_pid
        db.execute(worker.conn, "SET log_statement = 'all'")
        worker.work(calls_made)
        worker.conn.close()
        while not value(watch, ENDED, pid):  # its statistics arrive with its end
            time.sleep(0.05)
        commits.append(value(watch, COMMITS) - before)
    logged = value(watch, LOG)
    statements = len(re.findall(rf"^{pid} LOG:  statement:", logged, re.MULTILINE))
    return statements / count, (commits[1] - commits[0]) / count


@click.command()
@click.option("--seconds", default=8.0, show_default=True, help="For each length of the queue.")
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
            per_second = rate(app.cursor(), settings, queue, seconds)
            rows.append([f"{queue:,}", f"{per_second:.0f}", f"{1000 / per_second:.2f}"])
        round_trips, commits = cost(app.cursor(), watch.cursor(), settings)
        watch.close()
    click.echo(f"PostgreSQL {major}, one worker, every call settled and the next one claimed:")
    click.echo(table(["calls owed", "calls/s", "ms per call"], rows))
    click.echo(f"a call costs {round_trips:.2f} round trips and {commits:.2f} commits")


if __name__ == "__main__":
    main()
