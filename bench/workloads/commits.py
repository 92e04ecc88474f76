"""What the triggers cost the application while nobody calls stages."""

import os
import re
import statistics
import subprocess
import time

from bench.database import Database
from bench.harness import MOVE_ALL, Bench
from bench.peers.base import Peer
from bench.pipeline import CHILD_STAGES, JOB_STAGES
from bench.stats import Metric
from bench.workloads.base import Workload
from demo.database import POSTGRES_VERSIONS

ROWS = 10_000
PGBENCH = POSTGRES_VERSIONS[18] / "pgbench"

# In ids that pgbench can compute.
ADD_JOBS = """
INSERT INTO jobs (job_id, tenant_id, current_step, status)
SELECT md5(n::text)::uuid, 'bench', %s, 'running' FROM generate_series(1, %s) AS n
"""
# One child a parent, with its id.
ADD_CHILDREN = f"""
INSERT INTO jobs_variants (job_variants_id, job_id, current_step, status)
SELECT job_id, job_id, '{CHILD_STAGES[1]}', status FROM jobs
"""
# In turn into a state that owes a call and out of it.
SCRIPT = """
\\set n random(1, {rows})
UPDATE {table} SET status = CASE status WHEN 'done' THEN 'running' ELSE 'done' END,
    updated_at = now()
WHERE {key} = md5((:n)::text)::uuid;
"""


def pgbench(
    database: Database, variant: str, seconds: int, table: str = "jobs", key: str = "job_id"
) -> float:
    """Commits a second, with as many clients as the variant begins with."""
    clients = int(variant.split()[0])
    command = [PGBENCH, "-n", "-M", "prepared", "-c", clients, "-j", min(clients, 2)]
    command += ["-T", seconds, "-f", "/dev/stdin", database.dsn]
    script = SCRIPT.format(rows=ROWS, table=table, key=key)
    done = subprocess.run([str(word) for word in command], input=script, text=True,
                          capture_output=True, env=os.environ | {"PGAPPNAME": "bench"})  # fmt: skip
    rate = re.search(r"tps = ([\d.]+)", done.stdout)
    if done.returncode or not rate:
        raise RuntimeError(f"pgbench: {done.stderr[-500:]}")
    return float(rate[1])


class Commits(Workload):
    name = "commits"
    title = "Price to the application: single-row commits a second on `jobs`, pgbench"
    variants = ("1 client", "4 clients", "16 clients")
    metrics = (Metric("commits/s", "", better="higher", digits=0),)

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind != "peer" or variant == "4 clients"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with bench.installed(peer) as database:
            database.execute(ADD_JOBS, "planner", ROWS)
            database.execute("VACUUM ANALYZE jobs")
            return {"commits/s": pgbench(database, variant, 8)}


class ChildCommits(Workload):
    name = "child-commits"
    title = "Price to the application of the trigger on `jobs_variants`, and of that on `jobs`"
    variants = ("1 client", "4 clients")
    metrics = (
        Metric("jobs_variants", "commits/s", better="higher", digits=0),
        Metric("jobs", "commits/s", better="higher", digits=0, headline=False),
        Metric("jobs_variants / jobs", "", better="higher"),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind in ("ours", "trigger")

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        """In turn, in one database, several times: most of it is the wait for the disk."""
        jobs, children = [], []
        with bench.installed(peer, "bench.children") as database:
            database.execute(ADD_JOBS, JOB_STAGES[0], ROWS)
            database.execute(ADD_CHILDREN)
            database.execute("VACUUM ANALYZE jobs")
            database.execute("VACUUM ANALYZE jobs_variants")
            for _ in range(4):
                jobs.append(pgbench(database, variant, 2))
                children.append(pgbench(database, variant, 2, "jobs_variants", "job_variants_id"))
        return {
            "jobs_variants": statistics.mean(children),
            "jobs": statistics.mean(jobs),
            "jobs_variants / jobs": sum(children) / sum(jobs),
        }


class Bulk(Workload):
    name = "bulk"
    title = "Price to the application: one UPDATE that moves 20,000 jobs"
    metrics = (Metric("a job", "µs", digits=1),)
    JOBS = 20_000

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind != "peer"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with bench.installed(peer) as database:
            database.add_jobs(self.JOBS)
            database.execute("VACUUM jobs")  # without ANALYZE, as after a sudden burst
            began = time.perf_counter()
            database.execute(MOVE_ALL)
            return {"a job": (time.perf_counter() - began) / self.JOBS * 1e6}
