"""Oban for Python, see bench/workers/oban.py."""

from oban.schema import install_sql

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import CALL, enqueueing_trigger

# The statement that Oban's `enqueue` runs for one job. The worker class is in the program's own
# module, hence `__main__`.
INSERT = f"""
    INSERT INTO oban_jobs (args, queue, worker)
    VALUES ({CALL}, 'calls', '__main__.Call');
    PERFORM pg_notify('public.oban_insert', '{{"queue":"calls"}}');
"""


class Oban(Peer):
    name = "oban"
    worker = "oban"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))

    def install(self, database: Database) -> None:
        database.execute(install_sql())
        database.execute(enqueueing_trigger(INSERT))

    def connections(self, shape: Shape) -> int:
        """One that listens and one of the pool."""
        return 2 * shape.processes
