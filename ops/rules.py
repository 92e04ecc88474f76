"""The rules for the attempts of one row, by which `audit` and the chaos run judge a history."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

REPEATED, OVERLAP = "repeated accepted call", "two calls at once"
EARLY, AFTER_LEAVING = "repeated before its lease ran out", "call of a state that was left"
LOST, LIMIT = "lost arrival", "limit exceeded"

# Outcomes after which the stage may still be working, until the lease is over.
UNANSWERED = {"unknown", "lost"}


class Row(Protocol):
    """A row of stage_attempts: an outcome, and when it was written (seconds since the epoch)."""

    @property
    def outcome(self) -> str: ...
    @property
    def finished(self) -> float: ...


class End(NamedTuple):
    """The least that a Row is."""

    outcome: str
    finished: float


class Attempt(Protocol):
    """One attempt of a call.

    claimed: when it was claimed; leased_until: nobody else might claim it before; rows: its rows in
    stage_attempts, of which there are two where it was taken for lost and its listener came back.
    """

    @property
    def claimed(self) -> float: ...
    @property
    def leased_until(self) -> float: ...
    @property
    def rows(self) -> Iterable[Row]: ...


def outcomes_by(attempt: Attempt, when: float) -> set[str]:
    """The outcomes that were known at that moment."""
    return {row.outcome for row in attempt.rows if row.finished <= when}


def may_still_run(attempt: Attempt, when: float) -> bool:
    """Whether its lease kept its stage from being called for its row at that moment."""
    known = outcomes_by(attempt, when)
    return when < attempt.leased_until and (not known or bool(known & UNANSWERED))


def was_accepted(rows: Iterable[Row], when: float, unseen: float) -> bool:
    """Whether a claim at that moment must have known that one of `rows` was accepted.

    Args:
        unseen: seconds after which a row that was written is seen by every claim.
    """
    return any(row.outcome == "succeeded" and row.finished + unseen < when for row in rows)
