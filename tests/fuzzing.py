"""Settings of hypothesis: few examples, the same ones in every run.

FUZZ=100 tries a hundred times as many, chosen at random.
"""

import os

from hypothesis import HealthCheck, settings, strategies

TIMES = int(os.environ.get("FUZZ", "0"))
SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def fuzzed(examples: int):
    """A decorator that sets the number of examples in a normal run."""
    return settings(
        max_examples=examples * (TIMES or 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=SLOW_IS_FINE,
    )


def joined(*words, other: strategies.SearchStrategy, at_most: int = 10):
    """Texts (or bytes) that join `words` and examples of `other` in any order."""
    pieces = strategies.lists(strategies.sampled_from(words) | other, max_size=at_most)
    return pieces.map(words[0][:0].join)
