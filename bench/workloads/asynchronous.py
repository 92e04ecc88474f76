"""What a thousand calls at once of asynchronous stages cost, which answer 202 and then work."""

import time

from bench.database import Database
from bench.harness import MOVE_ALL, Bench
from bench.peers.base import Peer
from bench.processes import Processes
from bench.stage_process import Record
from bench.stats import COUNTS, Metric
from bench.workloads.throughput import Throughput

WORKERS = 4
JOBS = 1000
HOLD = 45.0  # seconds


class Asynchronous(Throughput):
    name = "asynchronous"
    title = f"Asynchronous stages: {JOBS:,} jobs, a listener with {WORKERS} workers"
    metrics = (
        Metric("at once", "calls", better="higher", digits=0),
        Metric("proportional", "MiB", digits=1),
        Metric("connections", "", digits=0),
        Metric("handed over", "calls/s", better="higher", digits=0),
        Metric("handed over and ended", "calls/s", better="higher", digits=0),
        *COUNTS,
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind == "ours"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        shape, limited = peer.shape(WORKERS), ("bench.limited", "asynchronous")
        with bench.running(peer, shape, *limited) as (database, processes):
            found, record = self.held(bench, database, processes)
            database.execute("DELETE FROM jobs")
            bench.rest(peer, shape, database)
            through = self.timed(bench, database, processes, JOBS, 1.0, "accept")
        return found | {
            "handed over and ended": through["calls/s"],
            "lost": through["lost"] + record.lost(JOBS),
            "repeated": through["repeated"] + record.repeated,
        }

    def held(
        self, bench: Bench, database: Database, processes: Processes
    ) -> tuple[dict[str, float], Record]:
        """Figures while the last stage works on all jobs at once, for HOLD seconds."""
        database.add_jobs(JOBS, "overlay")
        bench.stages.reset("accept", HOLD)
        database.execute(MOVE_ALL.replace("img_gen", "overlay"))
        end = time.monotonic() + HOLD
        while len(bench.stages.record().arrived) < JOBS and time.monotonic() < end:
            time.sleep(0.2)
        memory, connections = processes.memory(), database.connected()
        bench.finish(processes, JOBS)
        record = bench.stages.record()
        times = sorted(when for when, _, _ in record.arrived)
        found = {
            "at once": most_at_once(record),
            "proportional": memory,
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
