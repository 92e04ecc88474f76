"""Prepares a run: a new database, a peer installed in it, its processes started and warmed up."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.database import FIVE_STAGES, Database, Server
from bench.peers.base import Peer, Shape
from bench.pipeline import STEPS
from bench.processes import Processes
from bench.stage_process import StageProcess

START_LIMIT = 60.0  # seconds
SETTLE = 0.5  # seconds without a call, after which no call is expected any more
WARM_UP = 20  # calls for each that can be in flight
# Calls that are missing count as lost once there was no call, and the processor was idle, for so
# many seconds. Some queues poll every 30 s.
PATIENCE = 45.0
BUSY = 0.05  # seconds of CPU time in a second

MOVE = "UPDATE jobs SET status = 'done', updated_at = now() WHERE job_id = %s"
MOVE_ALL = """
UPDATE jobs SET status = 'done', updated_at = now()
WHERE current_step = 'img_gen' AND status = 'running'
"""


@dataclass
class Bench:
    """What all runs share. `notes`: lines to add to the report."""

    server: Server
    stages: StageProcess
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def installed(
        self, peer: Peer, pipeline: str = FIVE_STAGES, limit: str = "none"
    ) -> Iterator[Database]:
        with Database(self.server, pipeline, limit) as database:
            peer.install(database)
            database.execute("CHECKPOINT")  # so that no run pays for the pages of another
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
        self, peer: Peer, shape: Shape, pipeline: str = FIVE_STAGES, limit: str = "none"
    ) -> Iterator[tuple[Database, Processes]]:
        """A database with the peer's processes, which listen and have been warmed up with calls."""
        with (
            self.installed(peer, pipeline, limit) as database,
            self.started(peer, shape, database) as processes,
        ):
            self.stages.reset("answer")
            first_arrival(self, database, processes)
            self.rest(peer, shape, database)
            for _ in range(2):  # in the second, plans and connections exist
                count = min(WARM_UP * shape.processes * shape.in_flight, 300)
                database.add_jobs(count)
                self.stages.reset("answer")
                database.execute(MOVE_ALL)
                self.finish(processes, count)
                database.execute("DELETE FROM jobs")
                self.rest(peer, shape, database)
            yield database, processes

    def rest(self, peer: Peer, shape: Shape, database: Database) -> None:
        """Block until every worker is connected and no calls arrive any more."""
        end = time.monotonic() + START_LIMIT
        while database.connected() < peer.connections(shape):
            if time.monotonic() > end:
                raise TimeoutError(f"only {database.connected()} connections")
            time.sleep(0.05)
        answered = -1
        while answered != (answered := self.stages.wait(0, 0)):
            time.sleep(SETTLE)

    def finish(self, processes: Processes, expected: int, limit: float = 3600.0) -> None:
        """Block until `expected` calls are answered, or the rest counts as lost."""
        end, since, seen = time.monotonic() + limit, time.monotonic(), (0, 0.0)
        while time.monotonic() < min(end, since + PATIENCE):
            answered, cpu = self.stages.wait(expected, 1.0), processes.cpu()
            if answered >= expected:
                return
            if answered > seen[0] or cpu > seen[1] + BUSY:
                since = time.monotonic()
            seen = answered, cpu


def first_arrival(bench: Bench, database: Database, processes: Processes) -> float:
    """When the first call came. Moves a job every 10 ms until then, as some peers only listen."""
    jobs = database.add_jobs(500, STEPS[0])
    for _ in range(int(START_LIMIT / 0.01)):
        if jobs:
            database.execute(MOVE, jobs.pop())
        if bench.stages.wait(1, 0.01):
            return bench.stages.record().arrived[0][0]
        processes.check()
    raise TimeoutError(f"no call within {START_LIMIT:.0f} s of the start")
