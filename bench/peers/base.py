"""What a peer is to the harness."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.database import Database
from bench.processes import Processes

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Shape:
    """So many worker processes, each with so many calls in flight."""

    processes: int = 1
    in_flight: int = 1

    def __str__(self) -> str:
        return f"{self.processes}×{self.in_flight}"


class Peer:
    """One way to do the job.

    name: as in the tables; worker: the module of bench.workers that runs as one of its processes.
    kind: "ours"; "before", an earlier version of it; "peer", that ours is compared with;
        "reference", that keeps no books.
    calls: False for what only has a trigger.
    keeps_debts: whether a call is still owed where nobody was listening when the job moved.
    hears: False for what looks every second, where to measure the latency is to measure that.
    best: the shapes to try for the largest throughput.
    """

    name = ""
    worker = ""
    kind = "peer"
    calls = True
    keeps_debts = True
    hears = True
    best: tuple[Shape, ...] = ()

    def shape(self, in_flight: int) -> Shape:
        """How this peer has so many calls in flight at the same time."""
        return Shape(1, in_flight)

    def unavailable(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return None

    def install(self, database: Database) -> None:
        """Make its tables and its trigger on jobs."""
        raise NotImplementedError

    def commands(self, shape: Shape) -> list[list[str]]:
        return [[sys.executable, "-m", f"bench.workers.{self.worker}"]] * shape.processes

    def environ(self, database: Database, api: str, directory: Path) -> dict[str, str]:
        """What its processes are told besides."""
        return {}

    def connections(self, shape: Shape) -> int:
        """How many connections there are at least once all of it is up."""
        return shape.processes

    def start(self, shape: Shape, database: Database, api: str, directory: Path) -> Processes:
        """Its worker processes, with an empty directory of their own to work in."""
        told = {
            "BENCH_DSN": database.dsn,
            "BENCH_API": api,
            "BENCH_IN_FLIGHT": str(shape.in_flight),
            "BENCH_OF": str(shape.processes),
            "PYTHONPATH": str(ROOT),
        }
        told |= self.environ(database, api, directory)
        return Processes(self.commands(shape), told, directory)
