"""What a limit costs that is never reached: a burst under each kind of limit, and under none."""

from bench.harness import Bench
from bench.peers.base import Peer
from bench.stats import COUNTS, Metric
from bench.workloads.throughput import Throughput

IN_FLIGHT = 16
JOBS = 1000
NONE = "none"


class Limits(Throughput):
    name = "limits"
    title = (
        f"Price of a limit: a burst of {JOBS:,} jobs, each of its own tenant, {IN_FLIGHT} in flight"
    )
    LIMITS = ("max_running", "pool", "fair")
    metrics = (
        Metric(NONE, "calls/s", better="higher", digits=0, headline=False),
        *(Metric(f"{limit} / {NONE}", "", better="higher") for limit in LIMITS),
        *COUNTS,
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        return peer.kind == "ours"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        """Measure one after the other, so that other load on the machine affects all."""
        found = {}
        for limit in (NONE, *self.LIMITS):
            shape = peer.shape(IN_FLIGHT)
            with bench.running(peer, shape, "bench.limited", limit) as (database, processes):
                found[limit] = self.timed(bench, database, processes, JOBS, tenants=JOBS)
        numbers = {NONE: found[NONE]["calls/s"]}
        for limit in self.LIMITS:
            numbers[f"{limit} / {NONE}"] = found[limit]["calls/s"] / found[NONE]["calls/s"]
        for count in ("lost", "repeated"):
            numbers[count] = sum(of[count] for of in found.values())
        return numbers
