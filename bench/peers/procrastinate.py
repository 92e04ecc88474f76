"""procrastinate, see bench/workers/procrastinate.py."""

from procrastinate.schema import SchemaManager

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import CALL, enqueueing_trigger

# The function that its own `defer` calls.
DEFER = f"""
    PERFORM procrastinate_defer_jobs_v1(ARRAY[ROW('calls', 'call', 0, NULL, NULL,
        {CALL}::jsonb, NULL)::procrastinate_job_to_defer_v1]);
"""


class Procrastinate(Peer):
    name = "procrastinate"
    worker = "procrastinate"
    best = (Shape(1, 4), Shape(1, 16), Shape(2, 8))

    def install(self, database: Database) -> None:
        database.execute(SchemaManager.get_schema())
        database.execute(enqueueing_trigger(DEFER))

    def connections(self, shape: Shape) -> int:
        """A full pool and one that listens."""
        return shape.processes * (shape.in_flight + 2)
