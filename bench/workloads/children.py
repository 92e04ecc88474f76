"""What rows of a second table and a join cost, compared with the same stages for jobs alone.

Every run measures both, one after the other, so that other load on the machine affects both.
"""

import time

from bench.harness import Bench
from bench.peers.base import Peer
from bench.pipeline import CHILD_STAGES, JOB_STAGES
from bench.stats import Metric
from bench.workloads.base import Workload
from bench.workloads.commits import pgbench

CHILDREN = 3
MODULES = {"alone": "bench.alone", "children": "bench.children"}

# A job with children stays in a state without a route, so that only the join calls for it.
ADD = {
    "alone": "INSERT INTO jobs (tenant_id, current_step, status)"
             " SELECT 'bench', 'img_gen', 'running' FROM generate_series(1, %s)",
    "children": f"""
        WITH added AS (
            INSERT INTO jobs (tenant_id, current_step, status)
            SELECT 'bench', '{CHILD_STAGES[-1]}', 'done' FROM generate_series(1, %s)
            RETURNING job_id)
        INSERT INTO jobs_variants (job_id, current_step, status)
        SELECT job_id, 'img_gen', 'running' FROM added, generate_series(1, {CHILDREN})
    """,
}  # fmt: skip
START = {
    "alone": "UPDATE jobs SET status = 'done' WHERE current_step = 'img_gen'",
    "children": "UPDATE jobs_variants SET status = 'done' WHERE current_step = 'img_gen'",
}


class Children(Workload):
    name = "children"
    title = "Children: 3 rows a job through 8 quick stages, a join and one more; and jobs alone"
    variants = ("16 in flight",)
    metrics = (
        Metric("children", "calls/s", better="higher", digits=0),
        Metric("jobs alone", "calls/s", better="higher", digits=0, headline=False),
        Metric("children / alone", "", better="higher"),
        Metric("server CPU, children", "ms/call", headline=False),
        Metric("server CPU, alone", "ms/call", headline=False),
        Metric("lost", "calls", digits=0, headline=False),
        Metric("repeated", "calls", digits=0, headline=False),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind == "ours"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        in_flight, jobs = int(variant.split()[0]), 1000
        calls = jobs * (CHILDREN * len(CHILD_STAGES) + len(JOB_STAGES))
        counts = {"alone": calls // len(CHILD_STAGES + JOB_STAGES), "children": jobs}
        found = {
            kind: self.measure(bench, peer, in_flight, kind, counts[kind], calls)
            for kind in ("children", "alone")
        }
        rates = {kind: rate for kind, (rate, _, _) in found.items()}
        return {
            "children": rates["children"],
            "jobs alone": rates["alone"],
            "children / alone": rates["children"] / rates["alone"],
            "server CPU, children": found["children"][1],
            "server CPU, alone": found["alone"][1],
            "lost": sum(
                calls - len({call[1:] for call in r.arrived}) for _, _, r in found.values()
            ),
            "repeated": sum(r.repeated for _, _, r in found.values()),
        }

    def measure(self, bench: Bench, peer: Peer, in_flight: int, kind: str, jobs: int, calls: int):
        """Calls a second, milliseconds of the server's CPU for each, the record."""
        shape, few = peer.shape(in_flight), max(1, jobs // 50)
        with (
            bench.installed(peer, MODULES[kind]) as database,
            bench.started(peer, shape, database) as processes,
        ):
            self.send(bench, peer, processes, database, kind, few, calls * few // jobs)
            database.execute("DELETE FROM jobs")
            bench.rest(peer, shape, database)
            cpu = bench.server.cpu()
            began = self.send(bench, peer, processes, database, kind, jobs, calls)
            cpu = bench.server.cpu() - cpu
            record = bench.stages.record()
        seconds = max(when for when, _, _ in record.done) - began
        return len(record.done) / seconds, 1000 * cpu / calls, record

    def send(self, bench, peer, processes, database, kind, jobs, calls) -> float:
        """Move so many jobs in one transaction, and wait for all calls; when it was committed."""
        database.execute(ADD[kind], jobs)
        bench.stages.reset("work")
        database.execute(START[kind])
        began = time.monotonic()
        bench.finish(processes, calls)
        return began


TABLES = {"alone": ("jobs", "job_id"), "children": ("jobs_variants", "job_variants_id")}
ROWS = 10_000
# One parent a child, in ids that pgbench can compute.
ADD_ROWS = f"""
INSERT INTO jobs (job_id, tenant_id, current_step, status)
SELECT md5(n::text)::uuid, 'bench', '{JOB_STAGES[0]}', 'running' FROM generate_series(1, %s) AS n;
INSERT INTO jobs_variants (job_variants_id, job_id, current_step, status)
SELECT job_id, job_id, '{CHILD_STAGES[1]}', status FROM jobs;
"""
SCRIPT = f"""
\\set n random(1, {ROWS})
UPDATE {{table}} SET status = CASE status WHEN 'done' THEN 'running' ELSE 'done' END,
    updated_at = now()
WHERE {{column}} = md5((:n)::text)::uuid;
"""


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
        rates = {kind: [] for kind in TABLES}
        with bench.installed(peer, MODULES["children"]) as database:
            database.execute(ADD_ROWS, ROWS)
            database.execute("VACUUM ANALYZE jobs")
            database.execute("VACUUM ANALYZE jobs_variants")
            for _ in range(4):
                for kind, (table, column) in TABLES.items():
                    script = SCRIPT.format(table=table, column=column)
                    found = pgbench(database, script, int(variant.split()[0]), 2)
                    rates[kind].append(found["commits/s"])
        jobs, children = (sum(rates[kind]) / len(rates[kind]) for kind in ("alone", "children"))
        return {"jobs_variants": children, "jobs": jobs, "jobs_variants / jobs": children / jobs}
