"""awa, see bench/workers/awa.py."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import awa  # noqa: F401  (without it this peer is left out)

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import CALL, enqueueing_trigger

# The SQL function that awa's `insert_job` calls, with the default arguments of `insert_job`.
INSERT = f"""
    PERFORM awa.insert_job_compat('call', 'calls', {CALL}::jsonb, 'available', 2::smallint,
        25::smallint, NULL, '{{}}', '{{}}', NULL, NULL::bit(8), NULL::bytea);
"""

# awa has two kinds of storage. A new database starts with the old one, whose jobs are only found by
# polling. The first worker switches to the new one, if there is no job yet.
STORAGE = "SELECT awa.active_queue_storage_schema()"


class Awa(Peer):
    name = "awa"
    worker = "awa"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))

    def install(self, database: Database) -> None:
        command = [sys.executable, "-m", "awa", "--database-url", database.dsn, "migrate"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with (
            tempfile.TemporaryDirectory() as directory,
            self.start(Shape(), database, "", Path(directory)) as processes,
        ):
            while not database.execute(STORAGE)[0][0]:
                processes.check()
                time.sleep(0.1)
        database.execute(enqueueing_trigger(INSERT))
