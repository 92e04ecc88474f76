"""What a workload is to the harness."""

from bench.harness import Bench
from bench.peers.base import Peer
from bench.stats import Metric


class Workload:
    """One question, asked of each peer in turn.

    name: for --workload; title and explanation: for the report.
    metrics: of the numbers that `run` returns, in the order of the table's columns.
    variants: the columns' circumstances, such as how many workers; each is a table of its own.
    quick: whether it is part of a quick run that does not ask for it by name.
    repetitions: at most so many, where one takes long; None for as many as are asked for.
    """

    name = ""
    title = ""
    metrics: tuple[Metric, ...] = ()
    quick = True
    repetitions: int | None = None

    def variants(self, quick: bool) -> list[str]:
        return [""]

    def applies(self, peer: Peer, variant: str) -> bool:
        """Whether the question makes sense for this peer."""
        return peer.calls

    def run(self, bench: Bench, peer: Peer, variant: str) -> dict[str, float]:
        """One repetition: a value for each metric. Whatever it raises is shown in the report."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What the report should say besides."""
        return []
