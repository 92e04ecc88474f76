"""Medians with their spread, percentiles, and ratios of medians."""

import statistics
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


@dataclass(frozen=True)
class Spread:
    """The values of all repetitions of one measurement, summed up."""

    median: float
    least: float
    most: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), tuple(values))

    def text(self, digits: int) -> str:
        """The median, and the range where there is more than one value."""
        median = f"{self.median:,.{digits}f}"
        if len(self.values) == 1:
            return median
        return f"{median} ({self.least:,.{digits}f}–{self.most:,.{digits}f})"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def ratio(ours: float, other: float) -> float | None:
    """ours / other, whichever is better; None where there is nothing to compare with."""
    return ours / other if other else None


def best(medians: dict[str, float], better: str) -> str | None:
    """The name with the best median."""
    if not medians:
        return None
    return (min if better == "lower" else max)(medians, key=lambda name: medians[name])
