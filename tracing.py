"""Trace ids of calls (W3C Trace Context): sent as `traceparent`, exported by `traces`.

They are derived from ids and not random, so that both agree although nothing is stored.
"""

import hashlib
import re
import uuid
from typing import NamedTuple

SAMPLED = 1
# Version, trace, parent, flags; a later version may have more after them.
TRACEPARENT = re.compile(
    "([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


class Trace(NamedTuple):
    """The trace that a call belongs to.

    parent_id: the parent span, where somebody else began the trace.
    flags: as in traceparent; 1: it is recorded.
    """

    trace_id: str
    parent_id: str | None = None
    flags: int = SAMPLED

    def traceparent(self, span_id: str) -> str:
        """The header of a request that is the span `span_id`."""
        return f"00-{self.trace_id}-{span_id}-{self.flags:02x}"


def read(traceparent: str | None) -> Trace | None:
    """The trace of a `traceparent`; None where that is none."""
    found = TRACEPARENT.fullmatch((traceparent or "").strip())
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    return Trace(found[2], found[3], int(found[4], 16) & SAMPLED)


def made(table: str, key: str) -> Trace:
    """The trace of a row: a UUID itself, so that a job's trace is found by the job's id."""
    try:
        number = uuid.UUID(key)
        is_usable = str(number) == key and number.int
    except ValueError:
        is_usable = False
    return Trace(key.replace("-", "") if is_usable else hexadecimal(f"{table}/{key}", 16))


def span_id(key: str, call_id: int, attempt: int) -> str:
    """The span of an attempt.

    Args:
        key: the id of the row that owes the call.
    """
    return hexadecimal(f"{key}/{call_id}/{attempt}", 8)


def hexadecimal(text: str, size: int) -> str:
    """`size` bytes that depend on all of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[: 2 * size]
