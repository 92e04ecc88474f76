"""A run: a fresh database, a peer installed in it, its processes up and warm."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.database import Database, Server
from bench.peers.base import Peer, Shape
from bench.pipeline import STEPS
from bench.processes import Processes
from bench.stage_process import StageProcess

START_LIMIT = 60.0  # seconds
SETTLE = 0.5  # seconds without a call, after which nothing is on its way
WARM_UP = 20  # calls for each that can be in flight
# Nothing has arrived and nothing was done for so long: what has not been called by now is lost.
# Those that keep debts may have a poll interval of 30 s to find them by.
PATIENCE = {True: 45.0, False: 10.0}
BUSY = 0.05  # seconds of CPU time in a second

MOVE = "UPDATE jobs SET status = 'done', updated_at = now() WHERE job_id = %s"
MOVE_ALL = """
UPDATE jobs SET status = 'done', updated_at = now()
WHERE current_step = 'img_gen' AND status = 'running'
"""


@dataclass
class Bench:
    """What all runs share. `quick`: smaller sizes, for a look rather than for a figure."""

    server: Server
    stages: StageProcess
    quick: bool = False

    @contextlib.contextmanager
    def installed(
        self, peer: Peer, pipeline: str | None = None, limit: str = "none"
    ) -> Iterator[Database]:
        with Database(self.server, pipeline, limit) as database:
            peer.install(database)
            database.checkpoint()
            self.stages.connect(database.dsn)
            try:
                yield database
            finally:
                self.stages.disconnect()

    @contextlib.contextmanager
    def started(self, peer: Peer, shape: Shape, database: Database) -> Iterator[Processes]:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            arguments = (shape, database, self.stages.url, Path(directory))
            with peer.start(*arguments) as processes:
                try:
                    yield processes
                except TimeoutError as error:
                    raise TimeoutError(f"{error}; log:\n{processes.log_text()[-2000:]}") from error
                processes.check()

    @contextlib.contextmanager
    def running(
        self, peer: Peer, shape: Shape, limit: str | None = None
    ) -> Iterator[tuple[Database, Processes]]:
        """All workers listen, have made a few calls, and have gone quiet.

        limit: run bench.limited with it, instead of the five stages as they are.
        """
        pipeline = ("bench.limited", limit) if limit else (None, "none")
        with (
            self.installed(peer, *pipeline) as database,
            self.started(peer, shape, database) as processes,
        ):
            self.stages.reset("answer")
            first_arrival(self, database, processes)
            self.rest(peer, shape, database)
            for _ in range(1 if self.quick else 2):  # the second finds plans and connections made
                count = min(WARM_UP * shape.processes * shape.in_flight, 300)
                database.add_jobs(count)
                self.stages.reset("answer")
                database.execute(MOVE_ALL)
                self.finish(peer, processes, count)
                database.execute("DELETE FROM jobs")
                self.rest(peer, shape, database)
            yield database, processes

    def rest(self, peer: Peer, shape: Shape, database: Database) -> None:
        """Block until every worker is connected and nothing is on its way any more."""
        end = time.monotonic() + START_LIMIT
        while database.connected() < peer.connections(shape):
            if time.monotonic() > end:
                raise TimeoutError(f"only {database.connected()} connections")
            time.sleep(0.05)
        answered = -1
        while answered != (answered := self.stages.wait(0, 0)):
            time.sleep(SETTLE)

    def finish(self, peer: Peer, processes: Processes, expected: int, limit: float = 3600.0) -> int:
        """Block until so many calls are answered, or nothing will come any more; how many were."""
        end, since, seen, answered = time.monotonic() + limit, time.monotonic(), (0, 0.0), 0
        while time.monotonic() < min(end, since + PATIENCE[peer.keeps_debts]):
            answered, cpu = self.stages.wait(expected, 1.0), processes.cpu()
            if answered >= expected:
                break
            if answered > seen[0] or cpu > seen[1] + BUSY:
                since = time.monotonic()
            seen = answered, cpu
        return answered


def first_arrival(bench: Bench, database: Database, processes: Processes) -> float:
    """When the first call came. Until then a job is moved every 10 ms: some only listen."""
    jobs = database.add_jobs(500, STEPS[0])
    for _ in range(int(START_LIMIT / 0.01)):
        if jobs:
            database.execute(MOVE, jobs.pop())
        if bench.stages.wait(1, 0.01):
            return bench.stages.record().arrived[0][0]
        processes.check()
    raise TimeoutError(f"no call within {START_LIMIT:.0f} s of the start")
