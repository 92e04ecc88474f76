"""What a peer costs when there is nothing to do: its start, its memory, its idling."""

import statistics
import time

from bench.harness import MOVE_ALL, Bench, first_arrival
from bench.peers.base import Peer, Shape
from bench.stats import Metric
from bench.workloads.base import Workload
from bench.workloads.hop import room


class Startup(Workload):
    name = "startup"
    title = "Start: from the start of the process to its first call, median of three"
    metrics = (Metric("seconds", "s"),)

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        times = []
        with bench.installed(peer) as database:
            for _ in range(3):
                bench.stages.reset("answer")
                with bench.started(peer, peer.shape(1), database) as processes:
                    times.append(first_arrival(bench, database, processes) - processes.started)
                database.execute("DELETE FROM jobs")
        return {"seconds": statistics.median(times)}


class Memory(Workload):
    name = "memory"
    title = "Memory of all processes after 200 calls, with room for one call at a time"
    metrics = (
        Metric("proportional", "MiB", digits=1),
        Metric("each further call", "MiB", digits=1),
    )
    FURTHER = 3

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        one, several = (self.weigh(bench, peer, peer.shape(n)) for n in (1, 1 + self.FURTHER))
        return {
            "proportional": one,
            "each further call": (several - one) / self.FURTHER,
        }

    def weigh(self, bench: Bench, peer: Peer, shape: Shape) -> float:
        with bench.running(peer, shape) as (database, processes):
            bench.stages.reset("answer")
            database.add_jobs(200)
            database.execute(MOVE_ALL)
            bench.finish(processes, 200)
            return processes.memory()


class Idle(Workload):
    name = "idle"
    title = "At rest: nothing to do, for half a minute, shown for a minute"
    variants = ("room for 32 calls",)
    metrics = (
        Metric("CPU", "ms", digits=1),
        Metric("server CPU", "ms", digits=1, headline=False),
        Metric("queries", "", digits=1),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind in ("ours", "peer")

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        shape, seconds = peer.shape(room(variant)), 30.0
        with bench.running(peer, shape) as (database, processes):
            before = processes.cpu(), bench.server.cpu()
            with database.counted() as queries:
                time.sleep(seconds)
            after = processes.cpu(), bench.server.cpu()
        cpu, server = (60 / seconds * (b - a) for a, b in zip(before, after, strict=True))
        found = {"CPU": 1000 * cpu, "server CPU": 1000 * server}
        return found | ({"queries": 60 / seconds * queries[0]} if queries else {})
