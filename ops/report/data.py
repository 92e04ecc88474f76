"""The data of `report`: a few queries with limits, which group and cut in SQL."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import db
from ops.alarms import Alarm
from ops.limits import limits
from ops.listeners import connected
from ops.pools import pools
from ops.problem import Problem
from ops.report.jobs import Timeline, slowest_jobs, timelines
from ops.resting import listed
from ops.rows import told

# Lengths of a bar in the charts over time (seconds): the first that makes at most MOST_BARS bars.
STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
STEPS += [days * 86400 for days in (1, 2, 7, 14, 30, 90, 365)]
MOST_BARS = 84

# The buckets of the histogram of durations: each ends 26 % above the one before, ten per decade.
BUCKETS_A_DECADE = 10
SHORTEST = 0.001


@dataclass(frozen=True)
class Span:
    """The time that the report is about, and the seconds of a bar of its charts."""

    since: datetime
    until: datetime

    @property
    def seconds(self) -> float:
        return (self.until - self.since).total_seconds()

    @property
    def step(self) -> int:
        return next((step for step in STEPS if step * MOST_BARS >= self.seconds), STEPS[-1])

    @property
    def bars(self) -> int:
        return math.ceil(self.seconds / self.step)


@dataclass(frozen=True)
class Report:
    """All that the page says. The rows of each list are those of the query of that name."""

    database: str
    span: Span
    in_flight: int = 0
    listeners: int = 0
    asked: bool = False  # for these timelines
    alarms: list[Alarm] = field(default_factory=list)
    stages: list = field(default_factory=list)
    limits: list = field(default_factory=list)
    pools: list = field(default_factory=list)
    waiting: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    durations: list = field(default_factory=list)
    histogram: list = field(default_factory=list)
    trend: list = field(default_factory=list)
    errors: list = field(default_factory=list)
    slowest: list = field(default_factory=list)
    given_up: list = field(default_factory=list)
    stalled: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    problem: str | None = None  # what could not be read


NOW = """
SELECT now() AS until, %(since)s AS since,
       (SELECT count(*) FROM (
            SELECT table_name, job_id FROM stage_calls WHERE due_at < 'infinity'
            UNION SELECT table_name, job_id FROM stage_leases WHERE leased_until > now()
        ) AS job) AS in_flight
"""

STAGES = "SELECT * FROM pipeline_overview ORDER BY position, stage"

# A job whose stage has set it running owes nothing; that it is being called is in stage_leases.
WAITING = """
SELECT stage, table_name, join_of, current_step, status, count(*) AS jobs,
       count(*) FILTER (WHERE why = 'waiting') AS waiting,
       count(*) FILTER (WHERE why = 'planned') AS planned,
       count(*) FILTER (WHERE why = 'retrying') AS retrying,
       count(*) FILTER (WHERE why = 'calling') AS calling,
       count(*) FILTER (WHERE why = 'given_up') AS given_up,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY age) AS median_seconds,
       max(age) AS longest_seconds
FROM (SELECT stage, table_name, join_of, current_step, status,
             CASE WHEN due_at = 'infinity' THEN 'given_up'
                  WHEN worker IS NOT NULL AND due_at > now() THEN 'calling'
                  WHEN worker IS NULL AND attempts > 0 THEN 'retrying'
                  WHEN run_after > now() THEN 'planned'
                  ELSE 'waiting' END AS why,
             -- A call does not wait before its run_after.
             greatest(date_part('epoch', %(until)s - greatest(created_at, run_after)), 0) AS age
      FROM stage_calls
      UNION ALL
      SELECT l.stage, l.table_name, '', l.stage, 'running', 'calling',
             date_part('epoch', %(until)s - l.started_at)
      FROM stage_leases AS l
      WHERE l.leased_until > now()
        AND NOT EXISTS (SELECT FROM stage_calls AS c WHERE c.call_id = l.call_id)) AS call
GROUP BY stage, table_name, join_of, current_step, status
ORDER BY stage, status, current_step, table_name, join_of
"""

# As in the views, an attempt has a second row where its stage has set the row to failed after its
# answer: it is one call, which failed.
CALLS = """
SELECT stage, outcome, count(*) AS calls,
       floor(date_part('epoch', %(until)s - finished_at) / %(step)s)::integer AS back
FROM (SELECT stage, outcome, finished_at, bool_or(error LIKE 'set failed by its stage%%') OVER (
                 PARTITION BY call_id, attempt, started_at) AS has_second,
             error LIKE 'set failed by its stage%%' AS is_second
      FROM stage_attempts
      WHERE finished_at > %(since)s AND finished_at <= %(until)s) AS made
WHERE has_second IS NOT TRUE OR is_second
GROUP BY stage, outcome, back
"""

# Figures are of accepted calls, as in the views; the histogram also shows the others.
DURATIONS = """
SELECT stage, count(*) AS calls, max(seconds) AS longest,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) AS p50,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds) AS p95
FROM (SELECT stage, date_part('epoch', finished_at - started_at) AS seconds
      FROM stage_attempts
      WHERE finished_at > %(since)s AND finished_at <= %(until)s
        AND outcome = 'succeeded') AS accepted
GROUP BY stage
"""

HISTOGRAM = """
SELECT stage, outcome = 'succeeded' AS accepted, count(*) AS calls,
       floor(log(greatest(date_part('epoch', finished_at - started_at), %(shortest)s))
             * %(a_decade)s)::integer AS bucket
FROM stage_attempts
WHERE finished_at > %(since)s AND finished_at <= %(until)s
  AND outcome NOT IN ('skipped', 'cancelled')
  -- Not what came later than the answer.
  AND (http_status IS NOT NULL OR (error LIKE 'set failed by its stage%%') IS NOT TRUE)
GROUP BY stage, accepted, bucket
"""

# In a long span several hours are one step: the mean of their medians by calls, their largest p95.
TREND = """
SELECT stage, min(hour) AS began, max(hour) + interval '1 hour' AS ended,
       sum(p50_seconds * (calls - failures)) / sum(calls - failures) AS p50,
       max(p95_seconds) AS p95
FROM stage_latency
WHERE hour > %(since)s - interval '1 hour' AND hour <= %(until)s AND calls > failures
GROUP BY stage, floor(date_part('epoch', %(until)s - hour) / %(step)s)
ORDER BY stage, began
"""

# Texts are cut much later than they are shown: a secret that was cut in half would not be
# recognized. Lost calls are left out, as it is not known how long they took.
SLOWEST = """
SELECT table_name, job_id::text, stage, attempt, spent, outcome, http_status, started_at,
       date_part('epoch', finished_at - started_at) AS seconds, left(error, 2000) AS error
FROM stage_attempts
WHERE finished_at > %(since)s AND finished_at <= %(until)s
  AND outcome NOT IN ('skipped', 'cancelled', 'lost')
  -- Not what came later than the answer.
  AND (http_status IS NOT NULL OR (error LIKE 'set failed by its stage%%') IS NOT TRUE)
ORDER BY finished_at - started_at DESC
LIMIT 10
"""

# --- errors, grouped -----------------------------------------------------------------------

# Parts that differ between errors of one kind: ids, addresses, numbers, ports. Not an HTTP status.
LAST_ONE = re.compile(r" [(]attempt [0-9]+, the last one[)]")
VARYING = re.compile(
    "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    "|0x[0-9a-fA-F]+"
    "|(?<![0-9A-Za-z])(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}(?![0-9A-Za-z])"
    "|(?<![0-9A-Za-z])(?<!HTTP )[0-9]+([.][0-9]+)*"
)


def folded(error: str | None) -> str | None:
    """`error` with … in place of what varies."""
    return error and VARYING.sub("…", LAST_ONE.sub("", error))


# Only the last errors are grouped, at most this many.
MOST_ERRORS = 20_000

# In this and the next queries `total` is the sum over all groups, including those beyond the LIMIT.
ERRORS = """
SELECT stage, left(error, 1000) AS error, 1 AS texts, count(*) AS calls,
       sum(count(*)) OVER ()::bigint AS total, max(finished_at) AS last,
       (array_agg(job_id::text ORDER BY finished_at DESC))[1] AS job_id,
       (array_agg(table_name ORDER BY finished_at DESC))[1] AS table_name,
       count(*) FILTER (WHERE outcome = 'retry') AS retry,
       count(*) FILTER (WHERE outcome = 'held') AS held,
       count(*) FILTER (WHERE outcome = 'unknown') AS unknown,
       count(*) FILTER (WHERE outcome = 'lost') AS lost,
       count(*) FILTER (WHERE outcome = 'failed') AS failed
FROM (SELECT * FROM stage_attempts
      WHERE finished_at > %(since)s AND finished_at <= %(until)s
        AND outcome IN ('retry', 'held', 'unknown', 'lost', 'failed')
        -- Not what came later than an answer that was no success: its first row has the error.
        AND (http_status IS NOT NULL OR (error LIKE 'set failed by its stage: %%') IS NOT TRUE)
      ORDER BY finished_at DESC
      LIMIT %(most)s) AS attempt
GROUP BY stage, left(error, 1000)
ORDER BY calls DESC, last DESC
"""

GIVEN_UP = """
SELECT stage, left(last_error, 2000) AS error, 1 AS texts, count(*) AS jobs,
       sum(count(*)) OVER ()::bigint AS total, min(owed_since) AS first, max(owed_since) AS last,
       (array_agg(job_id::text ORDER BY owed_since DESC))[:3] AS job_ids,
       (array_agg(left(tenant_id, 1000) ORDER BY owed_since DESC))[:3] AS tenants
FROM given_up_calls
GROUP BY stage, left(last_error, 2000)
ORDER BY jobs DESC, last DESC
LIMIT 5000
"""

RESTING = """
SELECT table_name, stage, current_step, status, left(reason, 2000) AS reason, 1 AS texts,
       count(*) AS jobs, sum(count(*)) OVER ()::bigint AS total,
       min(since) AS first, max(since) AS last,
       (array_agg(job_id ORDER BY since))[:3] AS job_ids,
       (array_agg(left(tenant_id, 1000) ORDER BY since))[:3] AS tenants
FROM resting_rows()
WHERE kind = %(kind)s
GROUP BY table_name, stage, current_step, status, left(reason, 2000)
ORDER BY jobs DESC, first
LIMIT 5000
"""

COUNTS = ("texts", "calls", "jobs", "retry", "held", "unknown", "lost", "failed")
PLACE = ("table_name", "stage", "current_step", "status")


def together(rows: Sequence[Any]) -> list[Any]:
    """Merge the rows whose texts are the same once folded(); most frequent first.

    Args:
        rows: of ERRORS, GIVEN_UP or RESTING. The first of the rows merged gives the text.
    """
    found: dict[tuple, Any] = {}
    for row in rows:
        is_resting = hasattr(row, "reason")
        place = [getattr(row, name) for name in PLACE] if is_resting else [row.stage]
        key = (*place, folded(row.reason if is_resting else row.error))
        found[key] = added(found[key], row) if key in found else row
    return sorted(found.values(), key=lambda row: -getattr(row, "calls", getattr(row, "jobs", 0)))


def added(row: Any, other: Any) -> Any:
    """`row` with the counts, times and examples of `other` added."""
    sums = {
        name: getattr(row, name) + getattr(other, name) for name in COUNTS if hasattr(row, name)
    }
    if hasattr(row, "calls"):
        later = max(row, other, key=lambda one: one.last)
        named = {"job_id": later.job_id, "table_name": later.table_name}
        return row._replace(**sums, **named, last=later.last)
    first = min(filter(None, (row.first, other.first)), default=None)
    last = max(filter(None, (row.last, other.last)), default=None)
    some = {
        name: (getattr(row, name) + getattr(other, name))[:3] for name in ("job_ids", "tenants")
    }
    return row._replace(**sums, **some, first=first, last=last)


def collect(
    conn,
    since: datetime,
    job_ids: Sequence[str],
    redact: Callable[[str], str],
    unread: Mapping[str, str],
) -> Report:
    """Everything since then, without secrets.

    Args:
        job_ids: whose timelines to show; those of the slowest jobs where it is empty.
        unread: as of rows.unread().

    Raises:
        Problem: that is still to come.
    """
    given: dict[str, Any] = {"since": since}

    def ask(sql: str, **more: Any) -> list:
        return redacted(db.execute(conn, sql, given | more).fetchall(), redact)

    def grouped(sql: str, shown: int, **more: Any) -> list:
        return redacted(together(db.execute(conn, sql, given | more).fetchall())[:shown], redact)

    def rested(kind: str) -> list:
        found = listed(conn, RESTING, {"kind": kind})
        problem = found.problem(unread)
        if problem and problem not in problems:
            problems.append(problem)
        total = sum(part[0].total for part in found.by_part if part)
        groups = together(found.rows)[:50]
        return redacted([row._replace(total=total) for row in groups], redact)

    problems = [problem for problem in [told(unread)] if problem]
    [now] = ask(NOW)
    if now.since >= now.until:
        raise Problem(f"--since {since:%F %T} is still to come")
    span = Span(now.since.astimezone(), now.until.astimezone())
    given["until"] = span.until
    report = Report(
        database=redact(f"{conn.info.dbname} on {conn.info.host}:{conn.info.port}"),
        span=span,
        in_flight=now.in_flight,
        listeners=connected(conn),
        asked=bool(job_ids),
        stages=ask(STAGES),
        limits=redacted(limits(conn), redact),
        pools=redacted(pools(conn), redact),
        waiting=ask(WAITING),
        calls=ask(CALLS, step=span.step),
        durations=ask(DURATIONS),
        histogram=ask(HISTOGRAM, shortest=SHORTEST, a_decade=BUCKETS_A_DECADE),
        trend=ask(TREND, step=max(3600, span.step)),
        errors=grouped(ERRORS, 15, most=MOST_ERRORS),
        slowest=ask(SLOWEST),
        given_up=grouped(GIVEN_UP, 10),
        stalled=rested("stalled"),
        failed=rested("failed"),
        timelines=(timelines(conn, ask, redact, job_ids, unread) if job_ids
                   else slowest_jobs(ask, unread)),
    )  # fmt: skip
    return replace(report, problem=redact("; ".join(problems)) or None)


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """`value`, and all that is in it, with *** for every secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(one, redact) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(redacted(one, redact) for one in value))
    if isinstance(value, (list, tuple)):
        return type(value)(redacted(one, redact) for one in value)
    return value
