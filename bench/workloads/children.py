"""What rows of a second table and a join cost, compared with the same stages for jobs alone.

Every run measures both, one after the other, so that other load on the machine affects both.
"""

from bench.harness import Bench
from bench.peers.base import Peer
from bench.pipeline import CHILD_STAGES, JOB_STAGES
from bench.stats import COUNTS, Metric
from bench.workloads.throughput import Throughput

JOBS = 1000
CHILDREN = 3
CALLS_EACH = CHILDREN * len(CHILD_STAGES) + len(JOB_STAGES)  # of a job with children
IN_FLIGHT = 16
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


class Children(Throughput):
    name = "children"
    title = (
        f"Children: {CHILDREN} rows a job through 8 quick stages, a join and one more; and jobs"
        f" alone; {IN_FLIGHT} in flight"
    )
    metrics = (
        Metric("children", "calls/s", better="higher", digits=0),
        Metric("jobs alone", "calls/s", better="higher", digits=0, headline=False),
        Metric("children / alone", "", better="higher"),
        *COUNTS,
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind == "ours"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        children = self.through(bench, peer, "children", JOBS, CALLS_EACH)
        each = len(CHILD_STAGES + JOB_STAGES)
        alone = self.through(bench, peer, "alone", JOBS * CALLS_EACH // each, each)
        return {
            "children": children["calls/s"],
            "jobs alone": alone["calls/s"],
            "children / alone": children["calls/s"] / alone["calls/s"],
            "lost": children["lost"] + alone["lost"],
            "repeated": children["repeated"] + alone["repeated"],
        }

    def through(
        self, bench: Bench, peer: Peer, kind: str, jobs: int, each: int
    ) -> dict[str, float]:
        """The numbers of so many jobs, of which each has `each` calls."""
        shape = peer.shape(IN_FLIGHT)
        with (
            bench.installed(peer, MODULES[kind]) as database,
            bench.started(peer, shape, database) as processes,
        ):
            for count in (jobs // 50, jobs):  # the first warm it up
                database.execute("DELETE FROM jobs")
                bench.rest(peer, shape, database)
                database.execute(ADD[kind], count)
                bench.stages.reset("work")
                numbers = self.calls(bench, database, processes, START[kind], count * each)
        return numbers
