"""How the listener's cost grows: bench/.venv/bin/python -m bench.scaling

It measures with more calls at once, more machines (network namespaces, so only as root), more calls
owed, an old snapshot and more history. docs/SCALING.md quotes what it prints.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import psycopg2

import calls
import config
import db
import history
import pipeline
from bench import operator_commands
from bench.database import OPTIONS, Server
from bench.harness import Bench
from bench.peers.base import Shape
from bench.peers.ours import Ours
from bench.stage_process import StageProcess
from bench.workloads.hop import Hop
from bench.workloads.rest import Memory
from bench.workloads.throughput import Burst
from calls import Result, Wanted
from demo.database import EmbeddedDatabase
from ops.install import apply
from ops.table import table

BURST = 200  # jobs, five calls each
KEPT = "SELECT pg_size_pretty(pg_total_relation_size('stage_attempts'))"
CALLS = 2000  # that are timed with each length of the queue
BATCH = 1_000  # calls
WORKERS_EACH = 4  # of a machine
NET = "10.199.{}"
ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'tenant ' || n %% 1000,
       (ARRAY['img_gen', 'vlm_analyze', 'yolo_detect', 'planner', 'overlay'])[1 + n %% 5], 'done'
FROM generate_series(1, %s) AS n
"""


def hop_cells(bench: Bench, peer: Ours, count: int) -> list[str]:
    found = Hop().run(bench, peer, f"room for {count} calls")
    return [f"{found['p50']:.2f}", f"{found['p95']:.2f}", f"{found['queries']:.1f}"]


def workers(sizes: list[int]) -> str:
    rows = []
    with Server() as server, StageProcess() as stages:
        bench, peer = Bench(server, stages), Ours()
        for count in sizes:
            shape = peer.shape(count)
            burst = Burst().measure(bench, peer, shape, BURST, 0.0)
            memory = Memory().weigh(bench, peer, shape)
            cells = [f"{burst['calls/s']:.0f}", f"{memory:.0f}"]
            rows.append([str(count), *hop_cells(bench, peer, count), *cells])
    header = ["workers", "hop p50, ms", "p95", "queries an event", "burst, calls/s", "PSS, MiB"]
    return table(header, rows)


# --- several machines ----------------------------------------------------------------------


class Machines(Ours):
    """A listener with WORKERS_EACH on each of several machines."""

    name = "machines"

    def shape(self, in_flight: int) -> Shape:
        return Shape(in_flight // WORKERS_EACH, WORKERS_EACH)

    def commands(self, shape: Shape) -> list[list[str]]:
        runs = enumerate(super().commands(shape))
        return [["ip", "netns", "exec", f"bench{number}", *run] for number, run in runs]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[None]:
    """Machines bench0, bench1, …, each joined to this one by a cable of its own."""
    with contextlib.ExitStack() as stack:
        for number in range(count):
            name, net = f"bench{number}", NET.format(number)
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "cable", "netns", name)
            ip("address", "add", f"{net}.1/24", "dev", name)
            ip("link", "set", name, "up")
            ip("-n", name, "address", "add", f"{net}.2/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "route", "add", "default", "via", f"{net}.1")
        yield


def machines(sizes: list[int]) -> str:
    here, rows = NET.format(0) + ".1", []
    with (
        namespaces(max(sizes)),
        EmbeddedDatabase(options=OPTIONS | {"listen_addresses": "*"}) as embedded,
    ):
        with contextlib.closing(psycopg2.connect(embedded.dsn())) as conn, conn.cursor() as cursor:
            cursor.execute("SHOW hba_file")
            with Path(cursor.fetchone()[0]).open("a") as file:
                file.write(f"host all all {NET.format(0)}.0/16 trust\n")
            cursor.execute("SELECT pg_reload_conf()")
        os.environ |= embedded.settings() | {"DB_HOST": here}
        with Server() as server, StageProcess(here) as stages:
            server.embedded = embedded
            bench = Bench(server, stages)
            for count in sizes:
                cells = hop_cells(bench, Machines(), count * WORKERS_EACH)
                rows.append([str(count), str(count * WORKERS_EACH), *cells])
            server.embedded = None
    return table(["machines", "workers", "hop p50, ms", "p95", "queries an event"], rows)


# --- backlog and history -------------------------------------------------------------------


class Turns:
    """The database's side of a busy listener: every call is accepted at once."""

    def __init__(self, settings, workers: int = 1, lease: float = 630):
        self.conn, self.workers = db.connect(settings, pinned=True), workers
        self.lease = lease
        self.stages, self.limits = pipeline.stage_names(), pipeline.full_limits(settings)
        self.results: list[Result] = []

    def take(self, count: int) -> None:
        """`count` calls, as many a turn as there are workers."""
        for _ in range(count // self.workers):
            share = -(-self.workers // len(self.stages))
            wanted = [Wanted(stage, self.lease, self.workers, share, self.limits[stage].is_limited,
                             ordered=pipeline.is_ordered())
                      for stage in self.stages]  # fmt: skip
            turn = calls.run_turn(self.conn, self.results, wanted, self.workers, "bench")
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


def timed(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def claim_cell(settings, workers: int = 1) -> str:
    turns = Turns(settings, workers)
    with contextlib.closing(turns.conn):
        turns.take(200)
        return f"{CALLS / timed(lambda: turns.take(CALLS)):.0f}"


@contextlib.contextmanager
def installed() -> Iterator[tuple]:
    """A server with our tables; the settings, and a connection of the application."""
    with EmbeddedDatabase() as server:
        settings = config.read(server.settings())
        with contextlib.closing(db.connect(settings)) as conn:
            apply(conn)
        with contextlib.closing(psycopg2.connect(server.dsn())) as app:
            app.autocommit = True
            yield settings, app


def backlog(sizes: list[int]) -> str:
    rows = []
    with installed() as (settings, app):
        for size in sizes:
            cursor = app.cursor()
            cursor.execute("TRUNCATE jobs, stage_calls, stage_attempts, stage_leases")
            for left in range(size, 0, -10_000):
                cursor.execute(ADD_JOBS, [min(left, 10_000)])
            cursor.execute("SELECT pg_size_pretty(pg_total_relation_size('stage_calls'))")
            cells = [claim_cell(settings, workers) for workers in (1, 16)]
            rows.append([f"{size:,}", *cells, cursor.fetchone()[0]])
    header = ["calls owed", "claimed and settled a second", "16 workers", "stage_calls"]
    return table(header, rows)


def arrival_cell(settings, app) -> str:
    """The median of a turn of a listener with idle workers, after one job has arrived."""
    turns, taken = Turns(settings, workers=4), []
    with contextlib.closing(turns.conn):
        for _ in range(100):
            app.cursor().execute(ADD_JOBS, [1])
            taken.append(timed(lambda: turns.take(4)))
    return f"{1000 * statistics.median(taken):.1f}"


def snapshot(sizes: list[int]) -> str:
    """What a turn costs while an older snapshot elsewhere keeps the rows of calls made since."""
    rows = []
    for size in sizes:
        with installed() as (settings, app), contextlib.closing(psycopg2.connect(app.dsn)) as other:
            other.cursor().execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; TABLE jobs")
            turns = Turns(settings, BATCH, lease=0)  # which is over, as in practice after minutes
            with contextlib.closing(turns.conn):
                for _ in range(size // BATCH):
                    app.cursor().execute(ADD_JOBS, [BATCH])
                    turns.take(BATCH)
                turns.take(BATCH)
            rows.append([f"{size:,}", arrival_cell(settings, app)])
    return table(["calls made since the snapshot", "a turn, ms"], rows)


def milliseconds(action) -> str:
    return f"{1000 * min(timed(action) for _ in range(5)):.0f}"


def history_cells(server: EmbeddedDatabase, size: int) -> list[str]:
    settings = config.read(server.settings())
    with contextlib.closing(db.connect(settings)) as conn:
        apply(conn)
        operator_commands.fill(server, {"attempts": size, "jobs": 30_000})
        cells = [
            claim_cell(settings),
            milliseconds(lambda: history.count(conn)),
            milliseconds(lambda: history.prune(conn, 20.0)),
            db.execute(conn, KEPT).fetchone()[0],
        ]
        job = str(db.execute(conn, operator_commands.A_JOB).fetchone()[0])
    for line in ("status", f"job {job}", "metrics"):
        cells.append(f"{min(operator_commands.seconds(server.settings(), line, 3)):.2f}")
    return cells


def history_table(sizes: list[int]) -> str:
    rows = []
    for size in sizes:
        with EmbeddedDatabase(options={"fsync": "off"}) as server:
            rows.append([f"{size:,}", *history_cells(server, size)])
    header = ["attempts kept", "claims/s", "count 1,000, ms", "prune 1,000, ms", "stage_attempts",
              "status, s", "job, s", "metrics, s"]  # fmt: skip
    return table(header, rows)


PARTS = {
    "workers": (workers, [1, 2, 4, 8, 16, 32, 64]),
    "machines": (machines, [1, 2, 4]),
    "backlog": (backlog, [10_000, 100_000, 1_000_000]),
    "snapshot": (snapshot, [0, 10_000, 100_000]),
    "history": (history_table, [100_000, 1_000_000]),
}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--sizes", help="Separated by commas, instead of the usual ones.")
def main(parts: tuple[str, ...], sizes: str | None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no process behind
    for part in parts or PARTS:
        measure, usual = PARTS[part]
        click.echo(measure([int(size) for size in sizes.split(",")] if sizes else usual))
        click.echo()


if __name__ == "__main__":
    main()
