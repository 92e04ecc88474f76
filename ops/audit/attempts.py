"""Finds in the attempts of a row: repeats, overlaps, and calls of a state that the row had left."""

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pipeline
from calls import REAP_INTERVAL
from ops.audit.findings import BLUR, BY_INDEX, Finding, Window, ask, at
from ops.rules import (
    AFTER_LEAVING,
    EARLY,
    OVERLAP,
    REPEATED,
    End,
    may_still_run,
    outcomes_by,
    was_accepted,
)

ATTEMPTS = "more attempts than allowed"

# Outcomes without a call: the row had moved on, or a person cancelled the call.
NOT_CALLED = "('skipped', 'cancelled')"

# Rows for which a stage was called twice and an attempt ended in this window. Each attempt comes
# with the attempt before it of the same call, of the same stage, and of the row's own calls.
# `called` is false where a claim may have been given up ('failed') without a call. An attempt is
# judged in the window in which its last row was written. `unknown` with 202 was written, like
# 'lost', when the lease was found to have run out.
PAIRS = f"""{BY_INDEX}
WITH touched AS (
    SELECT DISTINCT table_name, job_id FROM stage_attempts
    WHERE finished_at > %(after)s AND finished_at <= %(upto)s AND outcome NOT IN {NOT_CALLED}
), again AS (
    SELECT t.table_name, t.job_id FROM touched AS t CROSS JOIN LATERAL (
        SELECT count(*) AS attempts, count(DISTINCT a.stage) AS stages
        FROM stage_attempts AS a
        WHERE a.job_id = t.job_id AND a.table_name = t.table_name
          AND a.outcome NOT IN {NOT_CALLED} AND a.finished_at > %(since)s
        OFFSET 0) AS found
    WHERE found.attempts > found.stages
), tried AS (
    SELECT g.table_name, g.job_id, a.call_id, a.attempt, a.stage, max(a.worker) AS worker,
           max(a.spent) AS spent, min(a.started_at) AS started_at,
           max(a.finished_at) AS written_at,
           min(a.finished_at) FILTER (WHERE a.outcome <> 'lost') AS ended_at,
           min(a.finished_at) FILTER (WHERE a.outcome = 'succeeded') AS accepted_at,
           min(a.finished_at) FILTER (WHERE a.outcome = 'failed') AS failed_at,
           bool_or(a.outcome <> 'failed' OR a.http_status IS NOT NULL) AS called,
           array_agg(CASE WHEN a.outcome = 'unknown' AND a.http_status = 202 THEN 'lost'
                          ELSE a.outcome END ORDER BY a.finished_at) AS outcomes,
           array_agg(extract(epoch FROM a.finished_at)::float8 ORDER BY a.finished_at) AS finished
    FROM again AS g CROSS JOIN LATERAL (
        SELECT * FROM stage_attempts AS s
        WHERE s.job_id = g.job_id AND s.table_name = g.table_name
          AND s.outcome NOT IN {NOT_CALLED} AND s.finished_at > %(since)s
        OFFSET 0) AS a
    GROUP BY g.table_name, g.job_id, a.call_id, a.attempt, a.stage
), pairs AS (
    SELECT *,
           min(accepted_at) OVER (of_call ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
               AS accepted_before,
           lag(attempt) OVER of_call AS attempt_before,
           lag(accepted_at) OVER of_call AS last_accepted,
           lag(failed_at) OVER of_call AS last_failed,
           lag(spent) OVER of_call AS last_spent,
           lag(call_id) OVER of_stage AS first_call,
           lag(attempt) OVER of_stage AS first_attempt,
           lag(called) OVER of_stage AS first_called,
           lag(worker) OVER of_stage AS first_worker,
           lag(started_at) OVER of_stage AS first_started,
           lag(ended_at) OVER of_stage AS first_ended,
           lag(outcomes) OVER of_stage AS first_outcomes,
           lag(finished) OVER of_stage AS first_finished,
           lag(call_id) OVER of_row AS other_call,
           lag(stage) OVER of_row AS other_stage,
           lag(started_at) OVER of_row AS other_started,
           lag(ended_at) OVER of_row AS other_ended
    FROM tried
    WINDOW of_call AS (PARTITION BY table_name, job_id, call_id ORDER BY started_at, attempt),
           of_stage AS (PARTITION BY table_name, job_id, stage ORDER BY started_at, attempt),
           of_row AS (PARTITION BY table_name, job_id, stage = ANY (%(own_stages)s)
                      ORDER BY started_at, attempt)
)
SELECT *, job_id::text AS id, stage = ANY (%(own_stages)s) AS is_own FROM pairs
WHERE called AND first_call IS NOT NULL
  AND written_at > %(after)s AND written_at <= %(upto)s
"""


class Try(NamedTuple):
    """An Attempt of rules.py."""

    claimed: float
    leased_until: float
    rows: list[End]


class Judge:
    """Judges attempts.

    Args:
        leases: seconds of a lease today, by stage; `margin` of them are LEASE_MARGIN.
        most: max_attempts today, by stage.
    """

    def __init__(self, leases: dict[str, float], margin: float, most: dict[str, int]):
        self.leases, self.margin, self.most = leases, margin, most

    def look(self, conn, since: datetime, window: Window) -> Iterator[Finding]:
        """Find what the attempts that ended in `window` should not have done."""
        own = [f.__name__ for route, f in pipeline.routes().items() if not route.join]
        joined = [f.__name__ for route, f in pipeline.routes().items() if route.join]
        given = {"since": since, "own_stages": sorted({*own} - {*joined}), **window._asdict()}
        for pair in ask(conn, PAIRS, given):
            yield from self.judge(pair)

    def judge(self, pair: Any) -> Iterator[Finding]:
        """Find what one attempt should not have done, given the attempts before it."""

        def finding(kind: str, text: str) -> Finding:
            here = f"attempt {pair.attempt} of call {pair.call_id} by {pair.worker}: {text}"
            return Finding(kind, pair.table_name, pair.id, pair.stage, pair.started_at, here)

        claimed, most = pair.started_at.timestamp(), self.most.get(pair.stage)
        same_call = pair.first_call == pair.call_id
        if same_call and pair.first_attempt > pair.attempt:
            return  # the clock of the database was set back
        first = self.first_of(pair)
        before = f"attempt {pair.first_attempt} of call {pair.first_call}"
        ended = pair.first_ended
        if knew_accepted(pair, first):
            yield finding(REPEATED, f"the call was accepted {at(pair.accepted_before)}")
        elif pair.first_called and may_still_run(first, claimed):
            if outcomes_by(first, claimed):
                yield finding(EARLY, f"{before} had no answer {at(ended)}, and its lease went on")
            elif same_call or ended is None or ended.timestamp() > claimed + BLUR:
                yield finding(OVERLAP, f"{before} was under way, by {pair.first_worker}")
        if has_left(pair):
            other = f"call {pair.other_call} of {pair.other_stage}"
            yield finding(AFTER_LEAVING, f"{other} had followed {at(pair.other_started)}")
        if was_given_up(pair):
            yield finding(ATTEMPTS, f"the call was given up after {pair.last_spent}")
        elif most and (pair.spent or 0) > most + 1:  # a person may add one
            yield finding(ATTEMPTS, f"it is number {pair.spent} of {most}")

    def first_of(self, pair: Any) -> Try:
        """The previous attempt of the same row and stage, with a lower bound of its lease.

        Timeouts may have been changed since. The lease is taken to end at the earliest of: today's
        lease after the claim; LEASE_MARGIN after the end of a call without an answer, which lasted
        at most its timeout; two rounds of upkeep before the attempt was recorded as lost, or as
        taken with 202 and not finished.
        """
        claimed = pair.first_started.timestamp()
        until = claimed + self.leases.get(pair.stage, 0.0)
        ends = list(map(End, pair.first_outcomes, pair.first_finished))
        for end in ends:
            if end.outcome == "lost":
                until = min(until, end.finished - 2 * REAP_INTERVAL)
            elif end.outcome == "unknown":
                until = min(until, end.finished + self.margin)
        return Try(claimed, until, ends)


def knew_accepted(pair: Any, first: Try) -> bool:
    """Whether the claim of this attempt must have known that the call had been accepted.

    It need not where the answer came after the lease, as that may have been written at the same
    time as the claim.
    """
    if pair.accepted_before is None:
        return False
    claimed = pair.started_at.timestamp()
    in_time = pair.last_accepted == pair.accepted_before and claimed < first.leased_until
    accepted = End("succeeded", pair.accepted_before.timestamp())
    return was_accepted([accepted], claimed, 0 if in_time else BLUR)


def has_left(pair: Any) -> bool:
    """Whether the row had left the state that owes the call. Another of the row's own calls between
    two attempts of this one shows it.
    """
    if not pair.is_own or pair.other_call in (None, pair.call_id):
        return False
    if pair.attempt_before is None or pair.attempt_before > pair.attempt:
        return False
    latest = pair.other_started + timedelta(seconds=BLUR)
    return pair.started_at >= min(pair.other_ended or latest, latest)


def was_given_up(pair: Any) -> bool:
    """Whether the attempt before had been given up, and no person had retried the call."""
    return (
        pair.last_failed is not None
        and pair.last_failed <= pair.started_at
        and (pair.spent or 0) > (pair.last_spent or sys.maxsize)
    )
