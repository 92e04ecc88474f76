"""The queues on Node.js: graphile-worker and pg-boss, see bench/workers/*.mjs."""

import json
import os
import subprocess
from pathlib import Path

from bench.database import Database
from bench.machine import NODE
from bench.peers.base import CALL, ROOT, Queue, Shape
from bench.pipeline import ROUTES

MODULES = ROOT / "bench" / "node_modules"


class NodeQueue(Queue):
    def unavailable(self) -> str | None:
        if not NODE:
            return "there is no Node.js on this machine"
        found = (MODULES / self.name).is_dir()
        return None if found else "npm did not install it (make bench says why)"

    def commands(self, shape: Shape) -> list[list[str]]:
        return [[NODE, str(ROOT / f"bench/workers/{self.name}.mjs")]] * shape.processes

    def environ(self, database: Database, api: str, directory: Path) -> dict[str, str]:
        routes = {",".join(state): path for state, path in ROUTES.items()}
        return {
            "BENCH_ROUTES": json.dumps(routes),
            "NO_LOG_SUCCESS": "1",
            "NODE_ENV": "production",
        }


class Graphile(NodeQueue):
    name = "graphile-worker"
    best = (Shape(1, 4), Shape(1, 16), Shape(2, 8), Shape(1, 24))
    enqueue = f"PERFORM graphile_worker.add_job('call', {CALL});"

    def make_tables(self, database: Database) -> None:
        cli = MODULES / self.name / "dist" / "cli.js"
        command = [NODE, cli, "--schema-only", "-c", database.dsn]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class PgBoss(NodeQueue):
    name = "pg-boss"
    best = (Shape(1, 16), Shape(1, 64), Shape(2, 32))

    # The INSERT that pg-boss documents ("Job table"), and the NOTIFY that its `send` adds.
    enqueue = f"""
    INSERT INTO pgboss.job (name, data) VALUES ('calls', {CALL});
    PERFORM pg_notify('pgboss_' || left(encode(sha224('pgboss'::bytea), 'hex'), 24), 'calls');
    """

    def make_tables(self, database: Database) -> None:
        told = self.environ(database, "", Path()) | {"BENCH_DSN": database.dsn}
        command = [*self.commands(Shape())[0], "install"]
        subprocess.run(command, env=os.environ | told, check=True, stdout=subprocess.DEVNULL)

    def connections(self, shape: Shape) -> int:
        """One that listens and one of the pool."""
        return 2 * shape.processes
