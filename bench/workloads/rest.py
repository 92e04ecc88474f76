"""What a peer costs when there is nothing to do: its start, its memory, its idling."""

import statistics
import time

from bench.harness import MOVE_ALL, Bench, first_arrival
from bench.peers.base import Peer, Shape
from bench.stats import Metric
from bench.workloads.base import Workload


class Startup(Workload):
    name = "startup"
    title = "Start: from the start of the process to its first call"
    metrics = (Metric("seconds", "s"),)

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        times = []
        with bench.installed(peer) as database:
            for _ in range(1 if bench.quick else 3):
                bench.stages.reset("answer")
                with bench.started(peer, Shape(), database) as processes:
                    times.append(first_arrival(bench, database, processes) - processes.started)
                database.execute("DELETE FROM jobs")
        return {"seconds": statistics.median(times)}


class Memory(Workload):
    name = "memory"
    title = "Memory of a worker process after 200 calls"
    quick = False
    metrics = (
        Metric("resident", "MiB", digits=1),
        Metric("proportional", "MiB", digits=1),
        Metric("each further one", "MiB", digits=1),
    )
    FURTHER = 3

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        one, several = (self.weigh(bench, peer, Shape(n)) for n in (1, 1 + self.FURTHER))
        return {
            "resident": one.rss,
            "proportional": one.pss,
            "each further one": (several.pss - one.pss) / self.FURTHER,
        }

    def weigh(self, bench: Bench, peer: Peer, shape: Shape):
        with bench.running(peer, shape) as (database, processes):
            bench.stages.reset("answer")
            database.add_jobs(200)
            database.execute(MOVE_ALL)
            bench.finish(peer, processes, 200)
            return processes.weight()


class Idle(Workload):
    name = "idle"
    title = "At rest: workers with nothing to do, for each of them and a minute"
    repetitions = 1
    quick = False
    metrics = (
        Metric("CPU", "ms", digits=1),
        Metric("server CPU", "ms", digits=1, headline=False),
        Metric("queries", "", digits=1),
    )

    def variants(self, quick: bool) -> list[str]:
        return ["1 worker"] if quick else ["1 worker", "32 workers"]

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind != "reference"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        shape, seconds = Shape(int(variant.split()[0])), 15.0 if bench.quick else 60.0
        with bench.running(peer, shape) as (database, processes):
            before = processes.cpu(), bench.server.cpu()
            with database.counted() as queries:
                time.sleep(seconds)
            after = processes.cpu(), bench.server.cpu()
        per = shape.processes * seconds / 60
        cpu, server = (b - a for a, b in zip(before, after, strict=True))
        found = {"CPU": 1000 * cpu / per, "server CPU": 1000 * server / per}
        return found | ({"queries": queries[0] / per} if queries else {})
