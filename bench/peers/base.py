"""The interface of a peer: a job queue that is measured."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.database import Database
from bench.processes import Processes

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Shape:
    """How many worker processes a peer has, and how many calls in flight each of them."""

    processes: int = 1
    in_flight: int = 1

    def __str__(self) -> str:
        return f"{self.processes}×{self.in_flight}"


class Peer:
    """A job queue that is measured.

    name: as in the tables. worker: the module of bench.workers for its processes.
    kind: "ours"; "peer": another queue; "reference": calls without recording what is owed.
    calls: False where there is only a trigger and nobody calls.
    keeps_debts: whether a call is still owed if nobody was listening when the job moved.
    hears: False where it polls every second, so that a latency would only measure the interval.
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
        """The Shape in which this peer has `in_flight` calls at once."""
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
        """Environment variables for its processes."""
        return {}

    def connections(self, shape: Shape) -> int:
        """The least number of connections once all its processes have started."""
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
