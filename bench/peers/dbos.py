"""DBOS, see bench/workers/dbos.py."""

import subprocess
import sys
from pathlib import Path

import dbos  # noqa: F401  (without it this peer is left out)

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import CALL, enqueueing_trigger

ENQUEUE = f"""
    PERFORM dbos.enqueue_workflow('call', 'calls', named_args => {CALL});
"""


class Dbos(Peer):
    name = "dbos"
    worker = "dbos"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))

    def install(self, database: Database) -> None:
        command = [Path(sys.executable).with_name("dbos"), "migrate", "--sys-db-url", database.dsn]
        subprocess.run(command, check=True, capture_output=True)
        database.execute(enqueueing_trigger(ENQUEUE))
