"""How many calls a second: for a burst of jobs, and with slow stages."""

import time

from bench.database import Database
from bench.harness import MOVE_ALL, Bench
from bench.peers.base import Peer, Shape
from bench.pipeline import STAGES
from bench.processes import Processes
from bench.stats import COUNTS, Metric
from bench.workloads.base import Workload

BEST = "best"
FINISHED = "SELECT count(*) FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
# Calls in flight, seconds that a stage takes, jobs for each call in flight: up to a minute a run.
SLOW = {
    "16 in flight, 0.1 s": (16, 0.1, 25),
    "64 in flight, 0.1 s": (64, 0.1, 25),
    "64 in flight, 1 s": (64, 1.0, 12),
    "200 in flight, 1 s": (200, 1.0, 12),
    "64 in flight, 10 s": (64, 10.0, 1),
    "200 in flight, 10 s": (200, 10.0, 1),
}


class Throughput(Workload):
    """All jobs are moved in one transaction; timed from its commit to the last `done`."""

    metrics = (
        Metric("calls/s", "", better="higher", digits=0),
        Metric("CPU", "ms/call"),
        Metric("server CPU", "ms/call"),
        Metric("connections", "", digits=0, headline=False),
        *COUNTS,
    )

    def measure(self, bench: Bench, peer: Peer, shape: Shape, count: int, delay: float):
        with bench.running(peer, shape) as (database, processes):
            return self.timed(bench, database, processes, count, delay)

    def timed(
        self, bench: Bench, database: Database, processes: Processes, count: int,
        delay: float = 0.0, mode: str = "work", tenants: int = 1,
    ) -> dict[str, float]:  # fmt: skip
        """The numbers of `count` jobs, through all stages of `delay` seconds each."""
        database.add_jobs(count, tenants=tenants)
        bench.stages.reset(mode, delay)
        numbers = self.calls(bench, database, processes, MOVE_ALL, count * len(STAGES))
        [(finished,)] = database.execute(FINISHED)
        if not numbers["lost"] and finished != count:
            raise RuntimeError(f"{finished} of {count} jobs are finished, but no call is missing")
        return numbers

    def calls(
        self, bench: Bench, database: Database, processes: Processes, move: str, expected: int
    ) -> dict[str, float]:
        """The numbers of the `expected` calls that follow from a statement."""
        cpu, server = processes.cpu(), bench.server.cpu()
        database.execute(move)
        began = time.monotonic()
        bench.finish(processes, expected)
        cpu, server = processes.cpu() - cpu, bench.server.cpu() - server
        connections = database.connected()
        record = bench.stages.record()
        seconds = max((when for when, _, _ in record.done), default=began + 1) - began
        calls = max(1, len(record.arrived))
        return {
            "calls/s": len(record.done) / seconds,
            "CPU": 1000 * cpu / calls,
            "server CPU": 1000 * server / calls,
            "connections": connections,
            "lost": record.lost(expected),
            "repeated": record.repeated,
        }


class Burst(Throughput):
    name = "burst"
    title = "Burst: 500 jobs moved at once (250 with 1 in flight), five quick stages each"
    variants = ("1 in flight", "4 in flight", "16 in flight", "64 in flight", BEST)

    def __init__(self):
        self.best: dict[str, Shape] = {}

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        count = 250 if variant == "1 in flight" else 500
        if variant != BEST:
            return self.measure(bench, peer, peer.shape(int(variant.split()[0])), count, 0.0)
        if peer.name not in self.best:
            tried = {
                shape: self.measure(bench, peer, shape, count // 4, 0.0)["calls/s"]
                for shape in peer.best
            }
            self.best[peer.name] = max(tried, key=tried.get)
            bench.notes.append(f"best of {peer.name}: {self.best[peer.name]}")
        return self.measure(bench, peer, self.best[peer.name], count, 0.0)


class Slow(Throughput):
    """Ideal is that each call in flight is followed by the next one at once."""

    name = "slow"
    title = "Slow stages"
    variants = tuple(SLOW)
    metrics = (Metric("of the ideal", "", better="higher"), *Throughput.metrics)

    def applies(self, peer: Peer, variant: str) -> bool:
        """The longest variants only for ours, to save time."""
        in_flight, delay, _ = SLOW[variant]
        is_short = in_flight <= 64 and delay <= 1
        return peer.kind == "ours" or (peer.kind == "peer" and is_short)

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        in_flight, delay, each = SLOW[variant]
        found = self.measure(bench, peer, peer.shape(in_flight), in_flight * each, delay)
        return {"of the ideal": found["calls/s"] * delay / in_flight} | found
