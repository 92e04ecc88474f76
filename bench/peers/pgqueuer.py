"""pgqueuer, see bench/workers/pgqueuer.py."""

import subprocess
import sys

import pgqueuer  # noqa: F401  (without it this peer is left out)

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import CALL, enqueueing_trigger

# The statements that its `enqueue` runs for one job: they add the job and a log entry.
ENQUEUE = f"""
    WITH inserted AS (
        INSERT INTO pgqueuer (priority, entrypoint, payload, execute_after, status)
        VALUES (0, 'call', convert_to({CALL}::text, 'UTF8'), now(), 'queued')
        RETURNING id, entrypoint, priority
    )
    INSERT INTO pgqueuer_log (job_id, status, entrypoint, priority)
    SELECT id, 'queued', entrypoint, priority FROM inserted;
"""


class PgQueuer(Peer):
    name = "pgqueuer"
    worker = "pgqueuer"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 16), Shape(2, 64))

    def install(self, database: Database) -> None:
        for what in ("install", "autovac"):
            command = [sys.executable, "-m", "pgqueuer", "sql", what]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            database.execute(done.stdout)
        database.execute(enqueueing_trigger(ENQUEUE))
