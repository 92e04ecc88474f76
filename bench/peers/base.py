"""The interface of a peer: a job queue that is measured."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.database import Database
from bench.processes import Processes

ROOT = Path(__file__).parent.parent.parent

# Runs only where a call is owed, and adds it to the queue.
TRIGGER = """
CREATE FUNCTION enqueue_call() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {enqueue}
    RETURN NULL;
END $$;
CREATE TRIGGER enqueue_call AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (NEW.status = 'done'
          AND NEW.current_step IN ('img_gen', 'vlm_analyze', 'yolo_detect', 'planner', 'overlay')
          AND (OLD.current_step IS DISTINCT FROM NEW.current_step
               OR OLD.status IS DISTINCT FROM NEW.status))
    EXECUTE FUNCTION enqueue_call();
"""
CALL = """json_build_object('job_id', NEW.job_id, 'tenant_id', NEW.tenant_id,
                             'current_step', NEW.current_step, 'status', NEW.status)"""


@dataclass(frozen=True)
class Shape:
    """How many worker processes a peer has, and how many calls in flight each of them."""

    processes: int = 1
    in_flight: int = 1

    def __str__(self) -> str:
        return f"{self.processes}×{self.in_flight}"


class Peer:
    """What is measured.

    name: as in the tables; the module of bench.workers for its processes has it, too.
    kind: "ours"; "peer": another queue; "floor": calls without recording what is owed; "trigger":
        its trigger is all that is measured, nobody calls.
    best: the shapes to try for the largest throughput.
    """

    name = ""
    kind = ""
    best: tuple[Shape, ...] = ()

    def shape(self, in_flight: int) -> Shape:
        """The Shape in which this peer has `in_flight` calls at once."""
        return Shape(1, in_flight)

    def unavailable(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return None

    def install(self, database: Database) -> None:
        """Make its tables and its trigger on jobs."""

    def commands(self, shape: Shape) -> list[list[str]]:
        return [[sys.executable, "-m", f"bench.workers.{self.name}"]] * shape.processes

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


class Queue(Peer):
    """enqueue: the statement that adds a call to the queue, in a trigger on jobs."""

    kind = "peer"
    enqueue = ""

    def install(self, database: Database) -> None:
        self.make_tables(database)
        database.execute(TRIGGER.format(enqueue=self.enqueue))

    def make_tables(self, database: Database) -> None:
        raise NotImplementedError
