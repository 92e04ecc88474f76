"""graphile-worker, see bench/workers/graphile.mjs."""

import json
import shutil
import subprocess
from pathlib import Path

from bench.database import Database
from bench.peers.base import ROOT, Peer, Shape
from bench.pipeline import CALL, ROUTES, enqueueing_trigger

PACKAGE = ROOT / "bench" / "node_modules" / "graphile-worker"
ADD_JOB = f"PERFORM graphile_worker.add_job('call', {CALL});"


class Graphile(Peer):
    name = "graphile-worker"
    best = (Shape(1, 4), Shape(1, 16), Shape(2, 8), Shape(1, 24))

    def unavailable(self) -> str | None:
        if not shutil.which("node"):
            return "there is no node on this machine"
        return None if PACKAGE.is_dir() else "npm did not install it (make bench says why)"

    def install(self, database: Database) -> None:
        command = ["node", PACKAGE / "dist" / "cli.js", "--schema-only", "-c", database.dsn]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        database.execute(enqueueing_trigger(ADD_JOB))

    def commands(self, shape: Shape) -> list[list[str]]:
        return [["node", str(ROOT / "bench" / "workers" / "graphile.mjs")]] * shape.processes

    def environ(self, database: Database, api: str, directory: Path) -> dict[str, str]:
        routes = {",".join(state): path for state, path in ROUTES.items()}
        return {
            "BENCH_ROUTES": json.dumps(routes),
            "NO_LOG_SUCCESS": "1",
            "NODE_ENV": "production",
        }
