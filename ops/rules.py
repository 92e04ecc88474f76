"""The rules by which `audit` and the chaos run judge the attempts of one row."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

REPEATED, OVERLAP = "repeated accepted call", "two calls at once"
EARLY, AFTER_LEAVING = "repeated before its lease ran out", "call of a state that was left"
LOST, LIMIT = "lost arrival", "limit exceeded"

# Outcomes after which the stage may still be working until the lease is over.
UNANSWERED = {"unknown", "lost"}


class Row(Protocol):
    """A row of stage_attempts: an outcome, and when it was written (seconds since the epoch)."""

    @property
    def outcome(self) -> str: ...
    @property
    def finished(self) -> float: ...


class End(NamedTuple):
    """A Row that has nothing else."""

    outcome: str
    finished: float


class Attempt(Protocol):
    """One attempt of a call.

    claimed: when it was claimed. leased_until: when its lease ended. rows: its rows in
    stage_attempts: two where it was recorded as lost and its listener then wrote a result.
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
    """Whether the stage might be at work on this attempt at that moment, so that another call of it
    for the same row was forbidden.
    """
    known = outcomes_by(attempt, when)
    return when < attempt.leased_until and (not known or bool(known & UNANSWERED))


def was_accepted(rows: Iterable[Row], when: float, unseen: float) -> bool:
    """Whether a claim at that moment must have known that one of `rows` was accepted.

    Args:
        unseen: seconds after which a row that was written is seen by every claim.
    """
    return any(row.outcome == "succeeded" and row.finished + unseen < when for row in rows)
