"""The profile of the tests that make up their input: few examples, the same ones every time.

FUZZ=100 looks for new ones, a hundred times as many.
"""

import os

from hypothesis import HealthCheck, settings, strategies

TIMES = int(os.environ.get("FUZZ", "0"))
SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def fuzzed(examples: int):
    """The number of examples that `make test` has time for."""
    return settings(
        max_examples=examples * (TIMES or 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=SLOW_IS_FINE,
    )


def joined(*words, other: strategies.SearchStrategy, at_most: int = 10):
    """Texts (or bytes) made of `words` and of what `other` comes up with."""
    pieces = strategies.lists(strategies.sampled_from(words) | other, max_size=at_most)
    return pieces.map(words[0][:0].join)
