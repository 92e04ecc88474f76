"""The interface of a workload: a measurement that is run with each peer."""

from bench.harness import Bench
from bench.peers.base import Peer
from bench.stats import Metric


class Workload:
    """A measurement that is run with each peer in turn.

    name: for --workload; title and explanation: for the report.
    metrics: the numbers that `run` returns, in the order of the table's columns.
    variants: conditions such as the number of workers; each variant has a table of its own.
    repetitions: at least so many, where one is not enough to tell the peers apart.
    """

    name = ""
    title = ""
    metrics: tuple[Metric, ...] = ()
    variants: tuple[str, ...] = ("",)
    repetitions = 1

    def applies(self, peer: Peer, variant: str) -> bool:
        """Whether the measurement makes sense for this peer."""
        return peer.kind != "trigger"

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        """One repetition: a value for each metric. Whatever it raises is shown in the report."""
        raise NotImplementedError
