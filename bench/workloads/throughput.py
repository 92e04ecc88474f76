"""How many calls a second: of a burst of jobs, and of stages that take their time."""

import time

from bench.harness import MOVE_ALL, Bench
from bench.peers.base import Peer, Shape
from bench.pipeline import STAGES
from bench.stats import Metric
from bench.workloads.base import Workload

BEST = "best"


class Throughput(Workload):
    """All jobs are moved in one transaction; timed from its commit to the last `done`."""

    metrics = (
        Metric("calls/s", "", better="higher", digits=0),
        Metric("CPU", "ms/call"),
        Metric("server CPU", "ms/call"),
        Metric("connections", "", digits=0, headline=False),
        Metric("lost", "calls", digits=0, headline=False),
        Metric("repeated", "calls", digits=0, headline=False),
    )

    def measure(self, bench: Bench, peer: Peer, shape: Shape, count: int, delay: float):
        expected = count * len(STAGES)
        with bench.running(peer, shape) as (database, processes):
            database.add_jobs(count)
            bench.stages.reset("work", delay)
            cpu, server = processes.cpu(), bench.server.cpu()
            database.execute(MOVE_ALL)
            began = time.monotonic()
            bench.finish(peer, processes, expected)
            cpu, server = processes.cpu() - cpu, bench.server.cpu() - server
            connections = database.connected()
            record = bench.stages.record()
            finished = database.execute(
                "SELECT count(*) FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
            )[0][0]
        lost = record.lost(expected)
        if not lost and finished != count:
            raise RuntimeError(f"{finished} of {count} jobs are finished, but no call is missing")
        seconds = max((when for when, _, _ in record.done), default=began + 1) - began
        calls = max(1, len(record.arrived))
        return {
            "calls/s": len(record.done) / seconds,
            "CPU": 1000 * cpu / calls,
            "server CPU": 1000 * server / calls,
            "connections": connections,
            "lost": lost,
            "repeated": record.repeated,
        }


class Burst(Throughput):
    name = "burst"
    title = "Burst: jobs moved all at once, five quick stages each"

    def __init__(self):
        self.best: dict[str, Shape] = {}

    def variants(self, quick: bool) -> list[str]:
        sizes = (1, 16) if quick else (1, 4, 16, 64)
        return [*(f"{size} in flight" for size in sizes), *([] if quick else [BEST])]

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        count = 100 if bench.quick else 1000
        if variant != BEST:
            return self.measure(bench, peer, peer.shape(int(variant.split()[0])), count, 0.0)
        if peer.name not in self.best:
            tried = dict.fromkeys(peer.best, 0.0)
            for shape in 2 * peer.best:  # in turn, as one busy moment should not decide
                tried[shape] += self.measure(bench, peer, shape, count // 2, 0.0)["calls/s"]
            self.best[peer.name] = max(tried, key=tried.get)
        return self.measure(bench, peer, self.best[peer.name], count, 0.0)

    def notes(self) -> list[str]:
        return [f"best of {name}: {shape}" for name, shape in self.best.items()]


class Slow(Throughput):
    name = "slow"
    title = "Slow stages: 100 ms each, at best 10 calls/s for each that is in flight"
    quick = False

    def variants(self, quick: bool) -> list[str]:
        return [f"{size} in flight" for size in (16, 64)]

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        in_flight = int(variant.split()[0])
        count = in_flight * (4 if bench.quick else 20)
        return self.measure(bench, peer, peer.shape(in_flight), count, 0.1)
