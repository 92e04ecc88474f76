"""What jobs owe: claiming calls for idle workers, settling results, giving back what never began.

Each statement is a constant above the small function that runs it. All times are the database's.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import attrgetter
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import cursor

from db import WAKE_CHANNEL, Statement, execute, run

# A call_id, and the number of an attempt.
Attempt = tuple[int, int]


@dataclass
class Result:
    """What came of an attempt, on its way to the database.

    outcome: one of
        succeeded: the stage has done the work.
        taken: an asynchronous stage has answered 202, and works on it.
        skipped: it was not made, as it was no longer owed, or an earlier attempt was accepted.
        held: it is not the job's fault; due again soon, and no attempt is spent.
        retry: due again after a back-off.
        unknown: it may still run; due again after its lease.
        failed: given up.
        released: it was not made, as its lease was too short. Given back, and never written.
    """

    job_id: str  # of the row, as the database writes it: Call.key, not Call.job_id
    call_id: int
    attempt: int
    stage: str
    worker: str  # the listener that claimed it, as in the columns of this name
    started_at: str
    outcome: str
    table_name: str = "jobs"  # whose row it is
    spent: int | None = None  # attempts that count towards max_attempts, this one included
    http_status: int | None = None
    error: str | None = None
    delay: float | None = None  # seconds until it is due again; None: never
    after_lease: bool = False  # not before the lease has run out
    free: bool = False  # does not count towards max_attempts
    hold: bool = False  # nobody calls this stage for a while
    retry_after: float | None = None  # seconds the stage asked for
    after_hold: bool = False  # its stage had a hold on record when it was claimed: see LIFT
    limited: bool = False  # its stage has limits over all listeners
    is_told: bool = False  # no alert is to be sent about it any more
    is_set_failed: bool = False  # its stage has set the row to failed, and no call follows
    is_risk_logged: bool = False  # logged: it is accepted, but may be made again (one_by_one.py)
    seconds: float = 0.0  # how long the attempt took, for the log
    traceback: str | None = None  # for the log: of a bug, or how its worker died after the answer

    @property
    def is_accepted(self) -> bool:
        """Whether the stage has done the work, or has taken it on."""
        return self.outcome in ("succeeded", TAKEN)

    @property
    def is_failure(self) -> bool:
        """Whether the call is to be made again, or is given up."""
        return self.outcome not in (*PAID, TAKEN)


class Wanted(NamedTuple):
    """A stage to claim calls of.

    Args:
        lease: seconds for which nobody else may take such a call.
        most: so many calls at the most.
        share: so many before any other stage of the claim gets more than its share.
        limited: calls of other listeners count.
        ordered: the claim uses stage_due_calls(), as a stage or table declares an order or a rate.
        since: skip index entries before this time. A long transaction elsewhere may keep dead
            ones, and a claim would read them all; None: skip nothing.
        waits: for a table or limit that is locked, for as long as lock_timeout says.
    """

    stage: str
    lease: float
    most: int
    share: int
    limited: bool = False
    since: datetime | None = None
    ordered: bool = False
    waits: bool = True


# --- settling ------------------------------------------------------------------------------

PAID = ("succeeded", "skipped")  # outcomes after which nothing is owed any more
TAKEN = "taken"  # 202 of an asynchronous stage: the call goes on without its worker
# Where the result of an accepted call cannot be written, one_by_one.keep_from_repeating() gives the
# call up, so that nobody makes it again. Its error then begins with these words.
DO_NOT_RETRY = "its stage has accepted it, do not retry it"


def may_be_retried(error: str | None) -> bool:
    """Whether a person may retry a call that was given up with this error."""
    return not (error or "").startswith(DO_NOT_RETRY)


# Results as rows, of the types that stage_attempts has.
RESULTS = "SELECT * FROM json_populate_recordset(NULL::stage_attempts, %(results)s::json)"
# Results of calls that are retried or given up, which have further columns.
FAILURES = """
    SELECT * FROM ROWS FROM (
        json_populate_recordset(NULL::stage_attempts, %(failures)s::json),
        json_to_recordset(%(failures)s::json)
            AS (delay float8, after_lease boolean, free integer, hold boolean, retry_after float8)
    ) AS r"""

# Each attempt goes to the history. One that was taken for lost still adds what it knows: a claim
# never repeats a call of which any attempt was accepted.
RECORDED = """
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, spent, stage, worker,
                                started_at, finished_at, http_status, outcome, error)
    SELECT job_id, table_name, call_id, attempt, spent, stage, worker, started_at, now(),
           http_status, outcome, left(error, 2000)
    FROM result
    ON CONFLICT DO NOTHING"""

# The fence: only the attempt that holds the claim may settle the call.
FENCE = """c.job_id = r.job_id AND c.call_id = r.call_id AND c.attempts = r.attempt
      AND c.worker = r.worker"""

# The results whose attempt still holds the claim of its call. SKIP LOCKED, as the stage's own
# transaction may still hold the row of the call when it answers.
# If a generic plan is made while the queue is empty, or while the statistics say one row, it may
# scan a whole index for a join. The session goes on using that plan when the queue is full, or when
# an old snapshot elsewhere keeps dead entries in the index. So rows are looked up one by one
# (LATERAL … LIMIT 1), or by lists of their keys (= ANY (ARRAY(…))), one list for each index of the
# table. Then each index that the planner may choose has a condition.
MINE = f"""
    SELECT r.* FROM result AS r CROSS JOIN LATERAL (
        SELECT c.job_id FROM stage_calls AS c WHERE {FENCE}
        LIMIT 1 FOR UPDATE SKIP LOCKED) AS c"""

# The lease of a result. The comment above MINE says why it is found by lists of keys.
ITS_LEASE = """l.call_id = ANY (ARRAY(SELECT call_id FROM result))
      AND l.job_id = ANY (ARRAY(SELECT job_id FROM result))
      AND l.call_id = r.call_id AND l.attempt = r.attempt AND l.job_id = r.job_id"""

# The ids of calls that were skipped because their rows are locked. Only the last statement of the
# transaction can return rows, so it gets the ids by a transaction-local setting.
LOCKED = "current_setting('job_state_listener.locked', true)"
TELL_LOCKED = f"""
SELECT set_config('job_state_listener.locked',
                  concat({LOCKED}, string_agg(c.call_id || ' ', '')), true)
FROM result AS r CROSS JOIN LATERAL (
    SELECT c.call_id FROM stage_calls AS c WHERE {FENCE} LIMIT 1) AS c
WHERE c.call_id NOT IN (SELECT call_id FROM mine)"""

# A call that was accepted, or whose job has moved on.
PAY = Statement(
    "pay",
    f"""
WITH result AS ({RESULTS}
), recorded AS ({RECORDED}
), ended AS (
    DELETE FROM stage_leases AS l USING result AS r
    WHERE {ITS_LEASE}
), mine AS ({MINE}
), paid AS (
    DELETE FROM stage_calls WHERE job_id = ANY (ARRAY(SELECT job_id FROM mine))
                              AND call_id = ANY (ARRAY(SELECT call_id FROM mine))
)
{TELL_LOCKED}
""",
)

# All other outcomes. A call without an answer keeps its lease, as its stage may still be working.
POSTPONE = Statement(
    "postpone",
    f"""
WITH result AS ({FAILURES}
), recorded AS ({RECORDED}
), ended AS (
    DELETE FROM stage_leases AS l USING result AS r
    WHERE {ITS_LEASE}
      AND r.outcome <> 'unknown'
), unanswered AS (
    UPDATE stage_leases AS l SET unanswered = true FROM result AS r
    WHERE {ITS_LEASE}
      AND r.outcome = 'unknown'
), mine AS ({MINE}
), postponed AS (
    UPDATE stage_calls AS c
    SET worker = NULL, started_at = NULL, last_error = left(r.error, 2000),
        free_attempts = c.free_attempts + r.free,
        due_at = greatest(CASE WHEN r.after_lease THEN c.due_at END, c.run_after,
                          coalesce(now() + make_interval(secs => r.delay), 'infinity'))
    FROM mine AS r
    WHERE c.job_id = ANY (ARRAY(SELECT job_id FROM mine))
      AND c.job_id = r.job_id AND c.call_id = r.call_id
)
{TELL_LOCKED}
""",
)

# After a 202 the call keeps its lease, which counts under the limits, until the row moves on
# (moves.py) or the lease ends. Its row in stage_calls is not changed.
KEEP_TAKEN = Statement(
    "keep_taken",
    f"""
WITH result AS (SELECT * FROM json_populate_recordset(NULL::stage_attempts, %(taken)s::json))
UPDATE stage_leases AS l SET working = true FROM result AS r
WHERE {ITS_LEASE}
""",
)

# Forgets the last hold of a stage once a call that began after it is accepted, even if the hold is
# over: otherwise the next hold would be twice as long. A person's pause stays. If another
# transaction has the row locked, the hold stays until a later call is accepted.
LIFT = Statement(
    "lift",
    """
WITH held AS (
    SELECT p.table_name, p.join_of, p.current_step, p.status
    FROM unnest(%(accepted)s::text[], %(accepted_at)s::timestamptz[]) AS a (stage, started_at)
    JOIN pipeline_stages AS p
        ON p.stage = a.stage
        AND p.held_until - make_interval(secs => p.hold_seconds) < a.started_at
    FOR UPDATE OF p SKIP LOCKED
)
UPDATE pipeline_stages AS p
SET held_until = NULL, hold_seconds = NULL, held_reason = NULL, held_by = NULL
FROM held
WHERE (p.table_name, p.join_of, p.current_step, p.status)
      = (held.table_name, held.join_of, held.current_step, held.status)
""",
)

# Each hold is twice as long as the one before, up to a minute, unless the stage asked for a time.
# A call that was under way when the hold began does not make it longer. A person's pause, which is
# a hold until infinity, stays. If another transaction has the row locked, this result does not hold
# the stage; a later one does.
HOLD = Statement(
    "hold",
    f"""
WITH asking AS (
    SELECT DISTINCT ON (stage) stage, worker, started_at, error, retry_after
    FROM ({FAILURES}) AS result
    WHERE hold ORDER BY stage, retry_after DESC NULLS LAST, started_at DESC
), length AS (
    SELECT p.table_name, p.join_of, p.current_step, p.status, a.worker, a.error,
           coalesce(a.retry_after, least(60, 2 * coalesce(p.hold_seconds, 0.5))) AS seconds
    FROM pipeline_stages AS p JOIN asking AS a ON a.stage = p.stage
    WHERE p.held_until IS NULL
       OR p.held_until < now() + make_interval(secs => a.retry_after)
       OR (p.held_until <= now()
           AND p.held_until - make_interval(secs => p.hold_seconds) < a.started_at)
    FOR UPDATE OF p SKIP LOCKED
)
UPDATE pipeline_stages AS p
SET held_until = now() + make_interval(secs => length.seconds), hold_seconds = length.seconds,
    held_reason = left(length.error, 500), held_by = length.worker
FROM length
WHERE (p.table_name, p.join_of, p.current_step, p.status)
      = (length.table_name, length.join_of, length.current_step, length.status)
""",
)

# The last statement of a turn that claims nothing. It returns the calls whose rows are locked, and
# wakes the other listeners.
TELL = Statement("tell", f"SELECT {LOCKED} AS locked, pg_notify('{WAKE_CHANNEL}', '')")


# --- claiming ------------------------------------------------------------------------------

# This turn has waited for a lock already. So a statement after this one that meets a lock fails
# after 20 ms, and not only after lock_timeout.
HURRY = Statement("hurry", "SELECT set_config('lock_timeout', '20ms', true)")

# Extends leases that have run out, or will within %(extend_by)s seconds. A listener that has not
# claimed lately runs this before its claim, in the same transaction. What kept it from claiming,
# such as an outage, may also have kept another listener from writing that its calls were accepted.
# Without the extension these calls would be made again. due_at is not changed: it says when the
# lease first ended. A lease that already ends %(extend_by)s seconds or more after due_at is not
# extended again. Otherwise the call of a lost listener might never be made again.
EXTEND = Statement(
    "extend",
    """
WITH over AS (
    SELECT l.call_id, l.attempt FROM stage_leases AS l
    WHERE l.leased_until < now() + make_interval(secs => %(extend_by)s) AND NOT l.unanswered
      AND EXISTS (SELECT FROM stage_calls AS c
                  WHERE c.job_id = l.job_id AND c.call_id = l.call_id
                    AND c.attempts = l.attempt AND c.due_at < 'infinity'
                    AND c.due_at + make_interval(secs => %(extend_by)s) > l.leased_until)
    FOR UPDATE OF l SKIP LOCKED
)
UPDATE stage_leases AS l SET leased_until = now() + make_interval(secs => %(extend_by)s)
FROM over WHERE l.call_id = over.call_id AND l.attempt = over.attempt
""",
)

# A limit is exact because whoever claims locks its row first, in the order of the names, and
# counts the leases in the next statement, whose snapshot is then newer. The row is locked even
# where no call of the stage is due, as the next statement may see one that this one does not.
LOCK_LIMITS = Statement(
    "lock_limits",
    """
SELECT FROM stage_limits AS l
WHERE l.stages && %(stages)s::text[]
ORDER BY l.name
FOR UPDATE OF l
""",
)

# The stages to claim calls of. Where a stage may get more calls than its share, as_arrays() gives
# it two entries: the first for its share, and the second, which skips as many, for the rest.
WANTED = """unnest(%(stages)s::text[], %(leases)s::float8[], %(since)s::timestamptz[],
                %(skip)s::integer[], %(most)s::integer[])
      AS wanted (stage, lease, since, skip, most)"""

# A request for the same row and stage may still be running. It is looked up for each row (OFFSET 0
# prevents a join) and by the row's id alone (|| '' and + interval '0' keep the planner from using
# stage or time for an index): any other way would read the dead leases of other rows.
UNDER_WAY = """
    SELECT FROM stage_leases AS l
    WHERE l.job_id = c.job_id AND l.table_name = c.table_name AND l.stage || '' = c.stage
      AND l.leased_until + interval '0' > now()
    OFFSET 0"""

# A claimed call may be taken over only if its lease has run out and can be locked. If another
# transaction has it locked, that one is extending the lease or settling the call. When we get the
# lock, PostgreSQL checks the newest version of the lease.
IS_OVER = """
    (c.worker IS NULL
     OR NOT EXISTS (SELECT FROM stage_leases AS l
                    WHERE l.call_id = c.call_id AND l.attempt = c.attempts AND l.job_id = c.job_id
                    OFFSET 0)
     OR EXISTS (SELECT FROM stage_leases AS l
                WHERE l.call_id = c.call_id AND l.attempt = c.attempts AND l.job_id = c.job_id
                  AND l.leased_until <= now()
                FOR UPDATE SKIP LOCKED))"""

# How many calls of a stage may begin now; NULL: no limit. A stage with a rate (seconds) begins one
# call at a time, and none before next_at. A pool that stays with another stage (linger) gives this
# one no place while calls of the other are due and the other is not held.
PLACES = """
        SELECT min(CASE
            WHEN s.next_at > now() THEN 0
            WHEN s.stays_with <> wanted.stage
                 AND s.stays_since > now() - make_interval(secs => s.linger)
                 AND EXISTS (SELECT FROM stage_calls AS c
                             WHERE c.stage = s.stays_with AND c.due_at <= now())
                 AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                                 WHERE p.stage = s.stays_with AND p.held_until > now())
            THEN 0
            ELSE least(CASE WHEN s.max_running IS NOT NULL THEN s.max_running - (
                           SELECT count(*) FROM stage_leases AS l
                           WHERE l.stage = ANY (s.stages) AND l.leased_until > now()) END,
                       CASE WHEN s.seconds IS NOT NULL THEN 1 END)
            END) AS free
        FROM stage_limits AS s WHERE wanted.stage = ANY (s.stages)"""

# The stages are tried in the order given. A row that the stage's own transaction holds is passed
# by, and so is a stage that is held or full. Of the two upper limits of due_at, the CASE decides
# without a sweep: what is due. In a sweep the second one does: it also takes calls that were never
# tried, as the database's clock may have been set back.
DUE = f"""
    SELECT open.*, wanted.lease
    FROM {WANTED}
    LEFT JOIN LATERAL ({PLACES}) AS places ON true
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.worker, c.due_at
        FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at >= wanted.since AND c.due_at < 'infinity'
          AND c.due_at <= CASE WHEN %(sweep)s THEN 'infinity' ELSE now() END
          AND (c.due_at <= now() OR c.attempts = 0)
          AND (c.run_after IS NULL OR c.run_after <= now())
          AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                          WHERE p.stage = wanted.stage AND p.held_until > now())
          AND NOT EXISTS ({UNDER_WAY})
          AND {IS_OVER}
        ORDER BY c.due_at
        OFFSET wanted.skip
        LIMIT greatest(0, least(wanted.most, places.free - wanted.skip))
        FOR UPDATE OF c SKIP LOCKED) AS open
    LIMIT %(free)s"""

# The same by stage_due_calls() of schema.sql: in the order of priorities and of tenants. IS_OVER is
# asked once more here, as the function of an earlier install does not ask it.
DUE_IN_ORDER = f"""
    SELECT open.*, wanted.lease, wanted.stage
    FROM {WANTED}
    LEFT JOIN LATERAL ({PLACES}) AS places ON true
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.worker, c.due_at, coalesce(c.tenant_id, '') AS tenant,
               wanted.skip + c.ordinality AS turn
        FROM stage_due_calls(wanted.stage, wanted.skip,
                             least(wanted.most, (places.free - wanted.skip)::integer), %(sweep)s)
            WITH ORDINALITY AS c
        WHERE NOT EXISTS (SELECT FROM pipeline_stages AS p
                          WHERE p.stage = wanted.stage AND p.held_until > now())
          AND {IS_OVER}) AS open
    LIMIT %(free)s"""

# A person may take a call that is not due yet. Not taken are a call whose last request may still be
# running, and one of a stage whose max_running or pool is full. If another claim of the call
# commits while this statement runs, its lease cannot be seen here. But FOR UPDATE then reads the
# new version of the row, in which `attempts` is higher, so the call is not taken twice. Leases are
# also looked up by call_id: an install may have renamed the stage of the call, but not that of its
# lease.
DUE_BY_HAND = f"""
    SELECT open.job_id, open.call_id, open.worker, open.due_at, wanted.lease, open.stage,
           open.tenant, 1 AS turn
    FROM (SELECT c.job_id, c.call_id, c.stage, c.worker, c.due_at,
                 coalesce(c.tenant_id, '') AS tenant
          FROM stage_calls AS c
          WHERE c.job_id = %(only)s AND c.call_id = %(only_call)s AND NOT EXISTS ({UNDER_WAY})
            AND c.attempts = %(only_after)s
            AND NOT EXISTS (SELECT FROM stage_leases AS l
                            WHERE l.job_id = c.job_id AND l.call_id = c.call_id
                              AND l.leased_until + interval '0' > now()
                            OFFSET 0)
            AND {IS_OVER}
          FOR UPDATE OF c SKIP LOCKED) AS open
    JOIN {WANTED} ON wanted.stage = open.stage
    WHERE NOT EXISTS (
        SELECT FROM stage_limits AS s
        WHERE open.stage = ANY (s.stages)
          AND s.max_running <= (SELECT count(*) FROM stage_leases AS l
                                WHERE l.stage = ANY (s.stages) AND l.leased_until > now()))
    LIMIT 1"""

# Takes the calls found, each for as long as its lease, and reads where their jobs are now. At least
# one row is returned, as it also says which results could not be settled.
# ORDER BY in `claimed`: all calls must be found before the first is updated. Otherwise OFFSET would
# not count the rows that are updated already, and calls that are due would be skipped.
# free_attempts: a call that was given up is only taken by a person, and gets all its attempts
# again. Where the row was locked when the attempt before ended, only the history says whether that
# attempt counts.
CLAIM_DUE = f"""
, claimed AS (
    UPDATE stage_calls AS c
    SET attempts = c.attempts + 1, worker = %(worker)s, started_at = now(),
        due_at = now() + make_interval(secs => due.lease),
        free_attempts = CASE
            WHEN due.due_at = 'infinity' THEN c.attempts
            WHEN due.worker IS NOT NULL AND EXISTS (
                SELECT FROM stage_attempts AS a
                WHERE a.job_id = c.job_id AND a.call_id = c.call_id AND a.attempt = c.attempts
                  AND a.spent < c.attempts - c.free_attempts)
            THEN c.free_attempts + 1 ELSE c.free_attempts END
    FROM (SELECT * FROM due ORDER BY due_at) AS due
    WHERE c.job_id = ANY (ARRAY(SELECT job_id FROM due))
      AND c.job_id = due.job_id AND c.call_id = due.call_id
    RETURNING c.*, due.worker AS worker_before, due.due_at AS was_due_at
), leased AS (
    INSERT INTO stage_leases (job_id, table_name, call_id, attempt, spent, stage, worker,
                              started_at, leased_until, tenant_id)
    SELECT job_id, table_name, call_id, attempts, attempts - free_attempts, stage, worker,
           started_at, due_at, tenant_id
    FROM claimed
)
SELECT {LOCKED} AS locked, now() AS asked_at,
       claimed.call_id, claimed.job_id, claimed.job_id::text AS key, claimed.table_name,
       claimed.join_of, claimed.current_step, claimed.status, claimed.stage,
       claimed.attempts AS attempt, claimed.attempts - claimed.free_attempts AS spent,
       claimed.started_at::text, extract(epoch FROM claimed.created_at)::float8 AS recorded_at,
       claimed.worker_before IS NOT NULL AS taken_over, claimed.was_due_at, claimed.last_error,
       job.tenant_id, job.parent_id, job.is_there IS NOT NULL AS job_found,
       job.current_step AS job_step, job.status AS job_status, job.is_complete,
       CASE WHEN claimed.join_of = ''
            THEN (job.current_step, job.status) IS NOT DISTINCT FROM
                 (claimed.current_step, claimed.status)
            ELSE job.is_there AND job.is_complete
                 AND (claimed.attempts - claimed.free_attempts = 1 OR job.has_moved IS NOT TRUE)
       END IS TRUE AS owed,
       EXISTS (SELECT FROM stage_attempts AS a
               WHERE a.job_id = claimed.job_id AND a.call_id = claimed.call_id
                 AND a.outcome = 'succeeded') AS accepted,
       claimed.worker_before IS NOT NULL AND EXISTS (
            SELECT FROM stage_attempts AS a
            WHERE a.job_id = claimed.job_id AND a.call_id = claimed.call_id
              AND a.attempt = claimed.attempts - 1 AND a.outcome = 'failed') AS was_given_up,
       CASE WHEN claimed.join_of <> '' THEN (
            SELECT a.outcome FROM stage_attempts AS a
            WHERE a.job_id = claimed.job_id AND a.call_id = claimed.call_id
            ORDER BY a.attempt DESC, a.finished_at DESC LIMIT 1) END AS outcome_before,
       EXISTS (SELECT FROM pipeline_stages AS p
               WHERE p.stage = claimed.stage AND p.hold_seconds IS NOT NULL) AS after_hold,
       (SELECT p.stage FROM pipeline_stages AS p
        WHERE p.table_name = claimed.table_name AND p.join_of = claimed.join_of
          AND p.current_step = claimed.current_step AND p.status = claimed.status) AS routed_to
FROM (VALUES (1)) AS always
LEFT JOIN claimed ON true
LEFT JOIN LATERAL stage_call_row(claimed.table_name, claimed.join_of, claimed.job_id) AS job
    ON true
"""
# Records in stage_limits when the next call of a stage with a rate may begin, which stage its pool
# stays with, and which tenant of a fair stage was served last.
NOTE_BEGUN = """
, begun AS (
    SELECT stage, (array_agg(tenant ORDER BY turn DESC))[1] AS tenant FROM due GROUP BY stage
), noted AS (
    UPDATE stage_limits AS s
    SET next_at = now() + make_interval(secs => s.seconds), stays_with = begun.stage,
        last_tenant = begun.tenant,
        stays_since = CASE WHEN s.stays_with = begun.stage
                           THEN s.stays_since ELSE now() END
    FROM begun
    WHERE begun.stage = ANY (s.stages)
      AND (s.seconds IS NOT NULL OR s.linger IS NOT NULL OR s.is_fair)
)"""

CLAIM = Statement("claim", f"WITH due AS ({DUE}){CLAIM_DUE}")
CLAIM_IN_ORDER = Statement("claim_in_order", f"WITH due AS ({DUE_IN_ORDER}){NOTE_BEGUN}{CLAIM_DUE}")
CLAIM_BY_HAND = Statement("claim_by_hand", f"WITH due AS ({DUE_BY_HAND}){NOTE_BEGUN}{CLAIM_DUE}")


class Claimed(NamedTuple):
    """A call that was claimed, and where its row is now: what CLAIM_DUE selects, in that order.

    key: the row's id as the database writes it.
    current_step, status: the state that owes it.
    recorded_at: when the call was recorded, in seconds since 1970.
    taken_over: the lease of the attempt before ran out.
    job_found, job_step, job_status: whether the row that owes it is there, and its state now. The
        call of a join is owed by the parent.
    is_complete: of a join: all rows of the parent are in its state.
    owed: the row is still in the state that owes it.
    accepted: an earlier attempt was accepted.
    was_given_up: the attempt before gave the call up, but could not say so in the call's row, which
        was locked.
    outcome_before: of a join: the outcome of the attempt before.
    after_hold: its stage has a hold on record, which may be over.
    routed_to: the stage that the state leads to, as the database knows PIPELINE; None: to none.
    """

    call_id: int
    job_id: Any
    key: str
    table_name: str
    join_of: str
    current_step: str
    status: str
    stage: str
    attempt: int
    spent: int
    started_at: str
    recorded_at: float
    taken_over: bool
    was_due_at: datetime
    last_error: str | None
    tenant_id: Any
    parent_id: Any
    job_found: bool
    job_step: str | None
    job_status: str | None
    is_complete: bool | None
    owed: bool
    accepted: bool
    was_given_up: bool
    outcome_before: str | None
    after_hold: bool
    routed_to: str | None


@dataclass
class Turn:
    """What one turn of the loop brought about.

    claimed: claim by claim, and of each the call first that has been due longest.
    locked: calls whose row the stage's own transaction holds: settle them again later.
    asked_at: the database's time of the (first) claim; None: there was none.
    is_partial: not all was asked for, as a claim was refused as a whole.
    unclaimable: by stage, why no call of it can be claimed.
    limit_locked: by stage, the error of a claim that waited too long for the row of a limit.
    given_up: calls that were given up as the database did not take them. Nobody was told yet.
    refused: results that the database did not take, for a reason that is not theirs: `refusal`.
    asked: the stages that were asked for calls.
    """

    claimed: list[Claimed]
    locked: list[int]
    asked_at: datetime | None = None
    is_partial: bool = False
    unclaimable: dict[str, psycopg2.Error] = field(default_factory=dict)
    limit_locked: dict[str, psycopg2.Error] = field(default_factory=dict)
    given_up: list[Result] = field(default_factory=list)
    refused: list[Result] = field(default_factory=list)
    refusal: psycopg2.Error | None = None
    asked: set[str] = field(default_factory=set)


def run_turn(
    conn,
    results: Sequence[Result],
    wanted: Sequence[Wanted],
    free: int,
    worker: str,
    sweep: bool = False,
    extend_by: float = 0.0,
    *,
    only: tuple[Any, int, int] | None = None,
    hurry: bool = False,
) -> Turn:
    """Settle all `results` and claim up to `free` calls: one round trip, one commit.

    Args:
        wanted: the stages to choose from, those whose turn it is first.
        free: how many workers are idle; 0: only settle, and wake the other listeners, as a
            place under a limit may be free now.
        worker: the name of the listener that claims.
        sweep: also take calls that were never tried and whose time, by the clock, has not come.
        extend_by: seconds by which to extend leases first, see EXTEND; 0: they end when they end.
        only: the row's id, the call's, and its attempts until now: claim this call, due or not.
        hurry: fail soon where something is locked.

    Raises:
        psycopg2.Error: nothing was changed, unless the connection was lost.
    """
    is_claiming = free > 0 and bool(wanted)
    if not (is_claiming or results):
        return Turn([], [])
    paid = [result for result in results if result.outcome in PAID]
    taken = [result for result in results if result.outcome == TAKEN]
    failures = [result for result in results if result.is_failure]
    # By stage whose hold is to be forgotten: when a call began that it accepted.
    lifted = {r.stage: r.started_at for r in (*paid, *taken) if r.is_accepted and r.after_hold}
    if not is_claiming:
        last = TELL
    elif only is not None:
        last = CLAIM_BY_HAND
    else:
        last = CLAIM_IN_ORDER if any(stage.ordered for stage in wanted) else CLAIM
    needed = {  # in the order in which they run
        HURRY: hurry or not all(stage.waits for stage in wanted),
        PAY: paid, KEEP_TAKEN: taken, LIFT: lifted, POSTPONE: failures,
        HOLD: any(r.hold for r in failures),
        EXTEND: is_claiming and extend_by,
        LOCK_LIMITS: is_claiming and any(stage.limited for stage in wanted), last: True,
    }  # fmt: skip
    params = {
        "results": as_json(conn, paid),
        "failures": as_json(conn, failures),
        "taken": as_json(conn, taken),
        "accepted": array(lifted),
        "accepted_at": array(lifted.values()),
        **as_arrays(wanted),
        "free": free,
        "worker": worker,
        "sweep": sweep,
        "extend_by": extend_by,
    }
    if only is not None:
        params["only"], params["only_call"], params["only_after"] = only
    statements = [statement for statement, is_needed in needed.items() if is_needed]
    rows = run(conn, statements, params, cursor_factory=cursor).fetchall()
    call_ids, asked_at = rows[0][:2]
    locked = [int(call_id) for call_id in (call_ids or "").split()]
    if not is_claiming:
        return Turn([], locked)
    claimed = [Claimed(*row[2:]) for row in rows if row[2] is not None]
    if freed := [r.stage for r in results if r.limited and r.outcome not in ("unknown", TAKEN)]:
        free_places = Counter(freed) - Counter(row.stage for row in claimed)
        if free_places:
            wake_waiting(conn, free_places)
    claimed.sort(key=attrgetter("was_due_at"))
    return Turn(claimed, locked, asked_at, asked={one.stage for one in wanted})


WAKE_WAITING = f"""
SELECT pg_notify('{WAKE_CHANNEL}', '') WHERE EXISTS (
    SELECT FROM stage_limits AS s JOIN stage_calls AS c ON c.stage = ANY (s.stages)
    WHERE s.stages && %(stages)s::text[] AND c.due_at <= now())
"""


def wake_waiting(conn, stages: Iterable[str]) -> None:
    """Wake all listeners where calls wait for a place under a limit of these stages, as one may be
    free that this listener has not taken. Without this the others look at their next sweep.
    """
    with contextlib.suppress(psycopg2.Error):  # calls that were claimed are still to be made
        execute(conn, WAKE_WAITING, {"stages": list(stages)})


def as_arrays(wanted: Sequence[Wanted]) -> dict[str, str]:
    """`wanted` as arrays: first each stage with its share, then each with what is left."""
    rest = [stage for stage in wanted if stage.most > stage.share]
    both = [*wanted, *rest]
    return {
        "stages": array([w.stage for w in both]),
        "leases": array([w.lease for w in both]),
        "since": array([w.since or "-infinity" for w in both]),
        "skip": array([0] * len(wanted) + [w.share for w in rest]),
        "most": array([min(w.share, w.most) for w in wanted] + [w.most - w.share for w in rest]),
    }


def array(values: Iterable[Any]) -> str:
    """`values`, which hold no quotes, as PostgreSQL reads an array: cheaper than an expression."""
    quoted = '","'.join(map(str, values))
    return f'{{"{quoted}"}}' if quoted else "{}"


ENCODER = json.JSONEncoder(ensure_ascii=False)
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


def escaped(letters: re.Match) -> str:
    """The letters as JSON escapes in ASCII, which commands show as letters (logs.readable)."""
    return json.dumps(letters[0])[1:-1]


def as_json(conn, results: Sequence[Result]) -> str:
    """`results` as this database can store them."""
    if not results:
        return "[]"
    utf8 = conn.info.parameter_status("server_encoding") == "UTF8"
    rows = []
    for result in results:
        # The traceback is for the log alone: it may hold text that no database takes.
        row = vars(result) | {"free": int(result.free), "traceback": None}
        if result.error is not None:
            error = result.error if utf8 else BEYOND_ASCII.sub(escaped, result.error)
            error = error.encode("utf-8", "backslashreplace").decode()
            row["error"] = error.replace("\0", "\\0")
        rows.append(row)
    return ENCODER.encode(rows)


# Seconds until the next call will be due. A call that is due already and was not claimed, as its
# row is locked, is found by the next sweep. Three more times count: when a hold ends, as a call may
# be recorded while it lasts; when the next call of a stage with a rate may begin; and when a pool
# stops staying with a stage.
NEXT_DUE = """
SELECT extract(epoch FROM least(min(coming.due_at), (
           SELECT min(s.stays_since + make_interval(secs => s.linger)) FROM stage_limits AS s
           WHERE s.stages && %(stages)s::text[]
             AND s.stays_since + make_interval(secs => s.linger)
                 > coalesce(%(asked_at)s::timestamptz, now()))) - now())::float8
FROM unnest(%(stages)s::text[]) AS wanted (stage)
LEFT JOIN LATERAL (
    SELECT max(h.until) AS until FROM (
        SELECT p.held_until AS until FROM pipeline_stages AS p
        WHERE p.stage = wanted.stage
          AND p.held_until > coalesce(%(asked_at)s::timestamptz, now())
        UNION ALL
        SELECT s.next_at FROM stage_limits AS s
        WHERE wanted.stage = ANY (s.stages)
          AND s.next_at > coalesce(%(asked_at)s::timestamptz, now())) AS h) AS held ON true
CROSS JOIN LATERAL (
    SELECT greatest(held.until, (
        SELECT c.due_at FROM stage_calls AS c
        WHERE c.stage = wanted.stage AND c.due_at < 'infinity'
          AND c.due_at > CASE WHEN held.until IS NULL
                              THEN coalesce(%(asked_at)s::timestamptz, now()) ELSE '-infinity' END
        ORDER BY c.due_at
        LIMIT 1)) AS due_at) AS coming
WHERE coming.due_at < 'infinity'
"""


def next_due(conn, stages: Iterable[str], asked_at: datetime | None = None) -> float | None:
    """Seconds until the next call of these stages will be due; None where none will.

    Args:
        asked_at: of the last turn; what has become due since then is due now.
    """
    given = {"stages": list(stages), "asked_at": asked_at}
    return execute(conn, NEXT_DUE, given).fetchone()[0]


# --- releasing claims whose call was never made, and leases that have run out --------------

REAP_INTERVAL = 60.0  # seconds between two times that a listener ends leases which ran out

# The leases of calls that a listener has claimed and that have not ended, as far as the database
# knows.
LEASES_OF = """
SELECT call_id, attempt FROM stage_leases WHERE worker = %(worker)s AND NOT (unanswered OR working)
"""

# Frees claims that a listener never began: the answer to the claim was lost, or the lease would not
# have covered the call. They are due again, so the other listeners are told to look. From its
# second attempt a call is due only after `wait` seconds: a frozen server may have run the claim
# long after it was sent, and another listener may still have to write that the attempt before was
# accepted. Where the application has the row of a call locked, its lease stays until the next time;
# where the row is gone, nothing is owed, and only the lease is deleted. The statement lists the
# claims to free, as it may also run long after it was sent, when the listener makes other calls
# over another connection.
GIVE_BACK = f"""
WITH claimed AS (
    SELECT job_id, call_id, attempt FROM stage_leases
    WHERE worker = %(worker)s AND NOT (unanswered OR working)
      AND (call_id, attempt) IN (
          SELECT * FROM unnest(%(call_ids)s::bigint[], %(attempts)s::integer[]))
), open AS (
    SELECT c.job_id, c.call_id FROM stage_calls AS c JOIN claimed USING (job_id, call_id)
    WHERE c.job_id = ANY (ARRAY(SELECT job_id FROM claimed)) AND c.attempts = claimed.attempt
    FOR UPDATE OF c SKIP LOCKED
), ended AS (
    DELETE FROM stage_leases AS l USING claimed
    WHERE (l.call_id, l.attempt) = (claimed.call_id, claimed.attempt)
      AND (l.call_id IN (SELECT call_id FROM open)
           OR NOT EXISTS (SELECT FROM stage_calls AS c
                          WHERE c.job_id = l.job_id AND c.call_id = l.call_id
                            AND c.attempts = l.attempt))
    RETURNING l.call_id
), given_back AS (
    UPDATE stage_calls
    SET worker = NULL, started_at = NULL,
        due_at = greatest(now() + make_interval(secs => CASE WHEN attempts > 1 THEN %(wait)s END),
                          now(), run_after),
        free_attempts = free_attempts + 1
    WHERE job_id = ANY (ARRAY(SELECT job_id FROM open))
      AND call_id = ANY (ARRAY(SELECT call_id FROM open))
)
SELECT ended.calls AS given_back, claimed.calls - ended.calls AS locked,
       CASE WHEN ended.calls > 0 THEN pg_notify('{WAKE_CHANNEL}', '') END AS woken
FROM (SELECT count(*) AS calls FROM ended) AS ended,
     (SELECT count(*) AS calls FROM claimed) AS claimed
"""


class GivenBack(NamedTuple):
    """How many claims were given back, and how many are locked by the application."""

    given_back: int = 0
    locked: int = 0


def give_back(conn, worker: str, keep: Collection[Attempt], wait: float = 0.0) -> GivenBack:
    """Free what `worker` claimed and never began.

    Args:
        keep: what is under way, or has a result.
        wait: seconds until a call that was claimed before is due again, see GIVE_BACK.
    """
    claimed = execute(conn, LEASES_OF, {"worker": worker}).fetchall()
    unbegun = [tuple(attempt) for attempt in claimed if tuple(attempt) not in keep]
    if not unbegun:
        return GivenBack()
    call_ids, attempts = zip(*unbegun, strict=True)
    given = {"worker": worker, "call_ids": [*call_ids], "attempts": [*attempts], "wait": wait}
    found = execute(conn, GIVE_BACK, given).fetchone()
    return GivenBack(found.given_back, found.locked)


# Deletes leases that have run out: the listener was lost, or an asynchronous stage did not finish
# in time. Each gets a row in the history, unless the call got no answer: such a call got its row
# when it ended. A result that arrives later gets a row of its own. A call that a person made before
# its run_after is due at its run_after again. A lease that is locked is being extended or settled:
# two listeners that waited for each other's would deadlock.
REAP = """
WITH mine AS (
    SELECT call_id, attempt FROM stage_leases
    WHERE leased_until <= now() AND (%(call_id)s IS NULL OR call_id = %(call_id)s)
    FOR UPDATE SKIP LOCKED
), over AS (
    DELETE FROM stage_leases AS l USING mine
    WHERE (l.call_id, l.attempt) = (mine.call_id, mine.attempt)
    RETURNING l.*
), early AS (
    SELECT c.* FROM over AS l CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id FROM stage_calls AS c
        WHERE c.job_id = l.job_id AND c.call_id = l.call_id AND c.attempts = l.attempt
          AND c.worker = l.worker AND c.run_after > now()
        LIMIT 1 FOR UPDATE SKIP LOCKED) AS c
), planned AS (
    UPDATE stage_calls AS c SET worker = NULL, started_at = NULL, due_at = c.run_after
    FROM early WHERE c.job_id = early.job_id AND c.call_id = early.call_id
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, spent, stage, worker,
                                started_at, finished_at, http_status, outcome, error)
    SELECT job_id, table_name, call_id, attempt, spent, stage, worker, started_at, now(),
           CASE WHEN working THEN 202 END, CASE WHEN working THEN 'unknown' ELSE 'lost' END,
           CASE WHEN working THEN 'taken with HTTP 202, but not finished within its timeout'
                ELSE 'the listener did not come back before its lease ran out' END
    FROM over WHERE NOT unanswered
    ON CONFLICT DO NOTHING
    RETURNING *
)
SELECT r.job_id::text, r.table_name, r.stage, r.http_status, r.outcome, r.error,
       coalesce(r.spent, r.attempt) AS spent,  -- NULL: leased by an earlier version
       extract(epoch FROM r.finished_at - r.started_at)::float8 AS seconds,
       c.call_id IS NOT NULL AS is_owed
FROM recorded AS r LEFT JOIN LATERAL (
    SELECT c.call_id FROM stage_calls AS c
    WHERE c.job_id = r.job_id AND c.call_id = r.call_id LIMIT 1) AS c ON true
"""


def reap(conn, extend_by: float = 0.0, call_id: int | None = None) -> list:
    """End the leases that have run out, each with a row in the history.

    Args:
        extend_by: see run_turn().
        call_id: only those of this call.

    Returns:
        These rows, of which nobody has logged anything yet: see failures.reap().
    """
    sql = f"{EXTEND.sql};{REAP}" if extend_by else REAP
    return execute(conn, sql, {"extend_by": extend_by, "call_id": call_id}).fetchall()
