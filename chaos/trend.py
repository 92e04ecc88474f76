"""Whether a series of measurements grows: a line through its second half, against its noise."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

# A growth that is less than so many times the scatter around the line may be chance.
NOISE = 3.0


@dataclass(frozen=True)
class Series:
    """One thing measured again and again. allowed: growth over the half that is none, in `unit`;
    None where it is shown and not judged."""

    name: str
    unit: str
    allowed: float | None
    values: list[float]

    @property
    def settled(self) -> list[float]:
        """The second half: by then caches are filled and tables have found their size."""
        return self.values[len(self.values) // 2 :]

    @property
    def growth(self) -> float:
        return growth(self.settled)

    @property
    def grows(self) -> bool:
        if self.allowed is None:
            return False
        return self.growth > max(self.allowed, NOISE * noise(self.settled))


def slope(values: Sequence[float]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs; outliers do not move it."""
    pairs = combinations(enumerate(values), 2)
    slopes = [(b - a) / (n - m) for (m, a), (n, b) in pairs]
    return statistics.median(slopes) if slopes else 0.0


def growth(values: Sequence[float]) -> float:
    """From the first of them to the last, along the line."""
    return slope(values) * (len(values) - 1)


def noise(values: Sequence[float]) -> float:
    """How far the values lie from the line, in terms of a standard deviation."""
    steepness = slope(values)
    rest = [value - steepness * n for n, value in enumerate(values)]
    middle = statistics.median(rest)
    return 1.4826 * statistics.median(abs(value - middle) for value in rest)
