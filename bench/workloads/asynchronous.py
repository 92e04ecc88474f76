"""What a thousand calls at once of asynchronous stages cost, which answer 202 and then work."""

import time

from bench.database import Database
from bench.harness import MOVE_ALL, Bench
from bench.peers.base import Peer
from bench.processes import Processes
from bench.stage_process import Record
from bench.stats import Metric
from bench.workloads.throughput import Throughput

WORKERS = 4


class Asynchronous(Throughput):
    name = "asynchronous"
    title = f"Asynchronous stages: 1,000 jobs, a listener with {WORKERS} workers"
    repetitions = 1
    quick = False
    metrics = (
        Metric("at once", "calls", better="higher", digits=0),
        Metric("proportional", "MiB", digits=1),
        Metric("connections", "", digits=0),
        Metric("handed over", "calls/s", better="higher", digits=0),
        Metric("handed over and ended", "calls/s", better="higher", digits=0),
        Metric("lost", "calls", digits=0, headline=False),
        Metric("repeated", "calls", digits=0, headline=False),
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind == "ours" and peer.hears

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        count, hold = (200, 10.0) if bench.quick else (1000, 45.0)
        with bench.running(peer, peer.shape(WORKERS), "asynchronous") as (database, processes):
            found, record = self.held(bench, peer, database, processes, count, hold)
            database.execute("DELETE FROM jobs")
            bench.rest(peer, peer.shape(WORKERS), database)
            through = self.timed(bench, peer, database, processes, count, 1.0, "accept")
        return found | {
            "handed over and ended": through["calls/s"],
            "lost": through["lost"] + record.lost(count),
            "repeated": through["repeated"] + record.repeated,
        }

    def held(
        self, bench: Bench, peer: Peer, database: Database, processes: Processes, count: int,
        hold: float,
    ) -> tuple[dict[str, float], Record]:  # fmt: skip
        """Figures while the last stage works on all jobs at once, for `hold` seconds."""
        database.add_jobs(count, "overlay")
        bench.stages.reset("accept", hold)
        database.execute(MOVE_ALL.replace("img_gen", "overlay"))
        end = time.monotonic() + hold
        while len(bench.stages.record().arrived) < count and time.monotonic() < end:
            time.sleep(0.2)
        weight, connections = processes.weight(), database.connected()
        bench.finish(peer, processes, count)
        record = bench.stages.record()
        times = sorted(when for when, _, _ in record.arrived)
        found = {
            "at once": most_at_once(record),
            "proportional": weight.pss,
            "connections": connections,
            "handed over": (len(times) - 1) / (times[-1] - times[0]),
        }
        return found, record


def most_at_once(record: Record) -> int:
    """The largest number of calls that had arrived and were not done."""
    steps = [(when, 1) for when, _, _ in record.arrived]
    steps += [(when, -1) for when, _, _ in record.done]
    most = now = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most
