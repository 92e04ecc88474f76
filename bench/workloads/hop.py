"""How long it takes from one stage's `done` to the next stage's call, with nothing else to do."""

import gc
import time

from bench.harness import MOVE, Bench
from bench.peers.base import Peer, Shape
from bench.pipeline import STAGES, STEPS
from bench.stats import Metric, percentile
from bench.workloads.base import Workload

PAUSE = 0.02  # seconds between two jobs, in which every worker comes to rest
COUNTED = 50  # jobs moved while queries are counted, which takes time
PERCENTILES = (50, 95, 99)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(seconds, percent) * 1000 for percent in PERCENTILES}


class Hop(Workload):
    name = "hop"
    title = "Hop: an application commits `done`, and the stage's call arrives"
    metrics = (
        Metric("p50", "ms"),
        Metric("p95", "ms"),
        Metric("p99", "ms"),
        Metric("with commit p50", "ms", headline=False),
        Metric("queries", "per event", digits=1),
    )

    def variants(self, quick: bool) -> list[str]:
        return ["1 worker"] if quick else ["1 worker", "32 workers"]

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.calls and peer.hears and (peer.keeps_debts or variant == "1 worker")

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        shape = Shape(int(variant.split()[0]))
        with bench.running(peer, shape) as (database, _):
            jobs = self.add_jobs(database, 40 if bench.quick else 200)
            bench.stages.reset("answer")
            moved = self.move(bench, database, jobs)
            arrived = {job: when for when, job, _ in reversed(bench.stages.record().arrived)}
            committed = database.committed()
            bench.stages.reset("answer")
            with database.counted() as queries:
                self.move(bench, database, self.add_jobs(database, COUNTED))
        # The application may be the last to learn that it has committed.
        hops = [arrived[job] - committed.get(job, back) for job, (_, back) in moved.items()]
        whole = [arrived[job] - sent for job, (sent, _) in moved.items()]
        found = percentiles(hops) | {"with commit p50": percentile(whole, 50) * 1000}
        return found | ({"queries": queries[0] / COUNTED} if queries else {})

    def add_jobs(self, database, count: int) -> list[str]:
        """Jobs before each of the stages, in turn."""
        by_step = [database.add_jobs(count // len(STEPS), step) for step in STEPS]
        return [job for turn in zip(*by_step, strict=True) for job in turn]

    def move(self, bench: Bench, database, jobs: list[str]) -> dict[str, tuple[float, float]]:
        """Move one job after the other; when its UPDATE was sent and when it came back."""
        moved = {}
        gc.disable()
        for number, job in enumerate(jobs, 1):
            sent = time.monotonic()
            database.execute(MOVE, job)
            moved[job] = (sent, time.monotonic())
            if bench.stages.wait(number, 20) < number:
                raise TimeoutError(f"call {number} of {len(jobs)} did not come within 20 s")
            time.sleep(PAUSE)
        gc.enable()
        return moved


class Chain(Workload):
    name = "chain"
    title = "Chain: one job at a time through five stages, from each `done` to the next call"
    metrics = (
        Metric("p50", "ms"),
        Metric("p95", "ms"),
        Metric("p99", "ms"),
        Metric("job p50", "ms", digits=1, headline=False),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.calls and peer.hears

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with bench.running(peer, Shape()) as (database, _):
            jobs = database.add_jobs(10 if bench.quick else 50)
            bench.stages.reset("work")
            for number, job in enumerate(jobs, 1):
                database.execute(MOVE, job)
                if bench.stages.wait(number * len(STAGES), 20) < number * len(STAGES):
                    raise TimeoutError(f"job {number} of {len(jobs)} did not pass within 20 s")
                time.sleep(PAUSE)
            record = bench.stages.record()
        done = {(job, stage): when for when, job, stage in record.done}
        arrived = {(job, stage): when for when, job, stage in record.arrived}
        hops = [when - done[job, stage - 1] for (job, stage), when in arrived.items() if stage]
        whole = [done[job, len(STAGES) - 1] - arrived[job, 0] for job in jobs]
        return percentiles(hops) | {"job p50": percentile(whole, 50) * 1000}
