"""What the trigger costs the application: pgbench moving single jobs, and nobody calling stages."""

import os
import re
import subprocess
import tempfile

from bench.database import Database
from bench.harness import Bench
from bench.peers.base import Peer
from bench.stats import Metric
from bench.workloads.base import Workload
from demo.database import POSTGRES_VERSIONS

JOBS = 10_000
SECONDS = 8
PGBENCH = POSTGRES_VERSIONS[18] / "pgbench"

ADD_JOBS = """
INSERT INTO jobs (job_id, tenant_id, current_step, status)
SELECT md5(n::text)::uuid, 'bench', 'planner', 'running' FROM generate_series(1, %s) AS n
"""
# In turn into a state that owes a call and out of it.
SCRIPT = f"""
\\set n random(1, {JOBS})
UPDATE jobs SET status = CASE status WHEN 'done' THEN 'running' ELSE 'done' END, updated_at = now()
WHERE job_id = md5((:n)::text)::uuid;
"""


def pgbench(database: Database, sql: str, clients: int, seconds: int) -> dict[str, float]:
    """Run a script for so long: commits a second, and milliseconds for one."""
    with tempfile.NamedTemporaryFile("w") as script:
        script.write(sql)
        script.flush()
        command = [PGBENCH, "-n", "-M", "prepared", "-c", clients, "-j", min(clients, 2)]
        command += ["-T", seconds, "-f", script.name, database.dsn]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                              env=os.environ | {"PGAPPNAME": "bench"})  # fmt: skip
    rate = re.search(r"tps = ([\d.]+)", done.stdout)
    if done.returncode or not rate:
        raise RuntimeError(f"pgbench: {done.stderr[-500:]}")
    latency = re.search(r"latency average = ([\d.]+)", done.stdout)
    return {"commits/s": float(rate[1]), "latency": float(latency[1])}


class Commits(Workload):
    name = "commits"
    title = "Price to the application: single-row commits a second on `jobs`, pgbench"
    variants = ("1 client", "4 clients", "16 clients")
    metrics = (
        Metric("commits/s", "", better="higher", digits=0),
        Metric("latency", "ms", headline=False),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind != "peer" or variant == "4 clients"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with bench.installed(peer) as database:
            database.execute(ADD_JOBS, JOBS)
            database.execute("VACUUM ANALYZE jobs")
            return pgbench(database, SCRIPT, int(variant.split()[0]), SECONDS)
