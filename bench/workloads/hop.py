"""How long it takes from one stage's `done` to the next stage's call, with nothing else to do."""

import gc
import time

from bench.database import Database
from bench.harness import MOVE, Bench
from bench.peers.base import Peer
from bench.pipeline import STEPS
from bench.stats import Metric, percentile
from bench.workloads.base import Workload

PAUSE = 0.02  # seconds between two jobs, in which everything comes to rest
HOPS = 200  # jobs moved one after the other
COUNTED = 50  # jobs moved while queries are counted, which takes time


def room(variant: str) -> int:
    return int(variant.split()[2])


class Hop(Workload):
    name = "hop"
    title = "Hop: an application commits `done`, and the stage's call arrives"
    variants = ("room for 1 call", "room for 32 calls")
    repetitions = 5
    metrics = (
        Metric("p50", "ms"),
        Metric("p95", "ms"),
        Metric("p99", "ms"),
        Metric("queries", "per event", digits=1),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        """The floor, where only one call is made at a time, with one process."""
        return peer.kind in ("ours", "peer") or (peer.kind == "floor" and room(variant) == 1)

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with bench.running(peer, peer.shape(room(variant))) as (database, _):
            found = self.timed(bench, database)
            bench.stages.reset("answer")
            with database.counted() as queries:
                self.move(bench, database, self.add_jobs(database, COUNTED))
        return found | ({"queries": queries[0] / COUNTED} if queries else {})

    def timed(self, bench: Bench, database: Database) -> dict[str, float]:
        jobs = self.add_jobs(database, HOPS)
        bench.stages.reset("answer")
        moved = self.move(bench, database, jobs)
        arrived = {job: when for when, job, _ in reversed(bench.stages.record().arrived)}
        committed = database.committed()
        # The call may arrive before the application gets the answer to its COMMIT.
        hops = [arrived[job] - committed.get(job, back) for job, back in moved.items()]
        return {f"p{percent}": percentile(hops, percent) * 1000 for percent in (50, 95, 99)}

    def add_jobs(self, database, count: int) -> list[str]:
        """Jobs before each of the stages, in turn."""
        by_step = [database.add_jobs(count // len(STEPS), step) for step in STEPS]
        return [job for turn in zip(*by_step, strict=True) for job in turn]

    def move(self, bench: Bench, database, jobs: list[str]) -> dict[str, float]:
        """Move one job after the other; when the UPDATE of each came back."""
        moved = {}
        gc.disable()
        for number, job in enumerate(jobs, 1):
            database.execute(MOVE, job)
            moved[job] = time.monotonic()
            if bench.stages.wait(number, 20) < number:
                raise TimeoutError(f"call {number} of {len(jobs)} did not come within 20 s")
            time.sleep(PAUSE)
        gc.enable()
        return moved
