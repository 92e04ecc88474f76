"""What other sessions that LISTEN in the same database cost, as each NOTIFY wakes all of them."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from bench.database import Database
from bench.harness import Bench
from bench.peers.base import ROOT, Peer
from bench.stats import COUNTS, Metric
from bench.workloads.hop import Hop
from bench.workloads.throughput import Throughput

OTHERS = 100
IN_FLIGHT = 16
CHANNELS = {
    "none": "",
    f"{OTHERS} on another channel": "other",
    f"{OTHERS} on the same channel": "job_state_changed",
}


class Listeners(Throughput):
    name = "listeners"
    title = "Other connections that LISTEN in the same database"
    variants = tuple(CHANNELS)
    metrics = (
        Metric("hop p50", "ms"),
        Metric("calls/s", "in a burst", better="higher", digits=0),
        *COUNTS,
    )

    def applies(self, peer: Peer, variant: str) -> bool:
        """The floor says what the NOTIFY alone costs."""
        return peer.kind in ("ours", "floor")

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with (
            bench.running(peer, peer.shape(IN_FLIGHT)) as (database, processes),
            listening(database, CHANNELS[variant]),
        ):
            hops = Hop().timed(bench, database)
            database.execute("DELETE FROM jobs")
            bench.rest(peer, peer.shape(IN_FLIGHT), database)
            found = self.timed(bench, database, processes, 500)
        return {"hop p50": hops["p50"]} | found


@contextlib.contextmanager
def listening(database: Database, channel: str) -> Iterator[None]:
    """OTHERS connections of another process that LISTEN; with "" there are none."""
    if not channel:
        yield
        return
    command = [sys.executable, "-m", "bench.listeners", database.dsn, str(OTHERS), channel]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        if not process.stdout.readline():
            raise RuntimeError("the other listeners did not start")
        try:
            yield
        finally:
            process.terminate()
