"""Whether a long queue, or dead rows that cannot be removed, make a call slower."""

import contextlib

from bench.harness import Bench
from bench.peers.base import Peer
from bench.stats import Metric
from bench.workloads.base import Workload

OLD_SNAPSHOT = "old snapshot"
OWED = 100_000
LIMIT = 60.0  # seconds for a peer to work off its backlog
BATCH = 10_000

MOVE_BATCH = """
UPDATE jobs SET status = 'done'
WHERE job_id IN (SELECT job_id FROM jobs WHERE status = 'running' LIMIT %s)
"""


class Backlog(Workload):
    """The stage API answers at once and touches no job; what is left is claiming and settling."""

    name = "backlog"
    title = (
        f"Backlog: {OWED:,} owed calls, one at a time, answered at once;"
        f" cut off after {LIMIT:.0f} s"
    )
    metrics = (
        Metric("first calls/s", "", better="higher", digits=0),
        Metric("last calls/s", "", better="higher", digits=0),
        Metric("calls", "", better="higher", digits=0, headline=False),
        Metric("repeated", "calls", digits=0, headline=False),
    )
    variants = ("clean", OLD_SNAPSHOT)

    def applies(self, peer: Peer, variant: str) -> bool:
        """What a long queue costs the peers is in the last variant, too."""
        return peer.kind == "ours" or (peer.kind == "peer" and variant == OLD_SNAPSHOT)

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        with bench.installed(peer) as database, contextlib.ExitStack() as stack:
            database.add_jobs(OWED)
            for left in range(OWED, 0, -BATCH):
                database.execute(MOVE_BATCH, min(left, BATCH))
            if variant == OLD_SNAPSHOT:
                holder = stack.enter_context(contextlib.closing(database.connect()))
                holder.autocommit = False
                holder.cursor().execute(
                    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT FROM jobs LIMIT 1"
                )
            bench.stages.reset("answer")
            processes = stack.enter_context(bench.started(peer, peer.shape(1), database))
            bench.finish(processes, OWED, LIMIT)
            record = bench.stages.record()
        times = sorted(when for when, _, _ in record.arrived)
        if len(times) < 400:
            raise RuntimeError(f"only {len(times)} calls within {LIMIT:.0f} s")
        slice_ = min(1_000, len(times) // 3)
        first = slice_ / (times[slice_ + 100] - times[100])  # the first 100 warm it up
        last = slice_ / (times[-1] - times[-1 - slice_])
        return {
            "first calls/s": first,
            "last calls/s": last,
            "calls": len(times),
            "repeated": record.repeated,
        }
