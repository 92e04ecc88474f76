"""What the columns of the report are, and percentiles."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measured quantity. better: "lower" or "higher". headline: whether the summary has it."""

    name: str
    unit: str
    better: str = "lower"
    digits: int = 2
    headline: bool = True

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


# What every run of calls counts.
COUNTS = (
    Metric("lost", "calls", digits=0, headline=False),
    Metric("repeated", "calls", digits=0, headline=False),
)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
