"""Whether a series of measurements grows: a line through its second half against the noise."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

# Growth that is less than this many times the noise around the line may be chance.
NOISE = 3.0


@dataclass(frozen=True)
class Series:
    """A quantity measured again and again. allowed: growth in the second half that is accepted, in
    `unit`; None: the series is shown but not judged."""

    name: str
    unit: str
    allowed: float | None
    values: list[float]

    @property
    def settled(self) -> list[float]:
        """The second half, when caches are filled and tables have their final size."""
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
    """The Theil–Sen estimator: the median of the slopes between all pairs, robust to outliers."""
    pairs = combinations(enumerate(values), 2)
    slopes = [(b - a) / (n - m) for (m, a), (n, b) in pairs]
    return statistics.median(slopes) if slopes else 0.0


def growth(values: Sequence[float]) -> float:
    """The growth from the first value to the last along the line."""
    return slope(values) * (len(values) - 1)


def noise(values: Sequence[float]) -> float:
    """The scatter of the values around the line, comparable to a standard deviation."""
    steepness = slope(values)
    rest = [value - steepness * n for n, value in enumerate(values)]
    middle = statistics.median(rest)
    return 1.4826 * statistics.median(abs(value - middle) for value in rest)
