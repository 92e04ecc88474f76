"""Runs the tasks beside the calls when they are due; each listener does it for all. This file has
the tasks for a clock that was set back, calls of deleted jobs, and calls that were recorded under
an earlier PIPELINE. The others are in calls.py, history.py and troubles.py.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import psycopg2

import failures
import history
import pipeline
import trigger
import troubles
from alerts import Alerts
from calls import reap
from db import UNPINNED, WAKE_CHANNEL, ConnectionLost, execute, in_parts, reasons
from history import BATCH, log_failure
from ops import listeners, migrations, routes
from ops.alarms import called
from ops.problem import INSTALL
from ops.resting import parts
from ops.table import counted

log = logging.getLogger("listener")

# Seconds between two rounds.
REAP_INTERVAL = CLOCK_INTERVAL = 60.0
HISTORY_INTERVAL = FORGET_INTERVAL = ADOPT_INTERVAL = 300.0
STALLED_INTERVAL = FAILED_INTERVAL = 300.0
PRUNE_ALL_INTERVAL = 86400.0
LONGEST_STALLED_INTERVAL = 3600.0
FAILED_LOOKS = 3  # people are told after so many failed looks for stalled rows in a row


class Upkeep:
    """Runs the tasks that are due, a batch at a time, so that no call has to wait for long."""

    def __init__(self, settings: SimpleNamespace, stages: Iterable[str], name: str, alerts: Alerts):
        self.settings, self.stages, self.name, self.alerts = settings, list(stages), name, alerts
        self.is_new = True  # has not begun yet
        self.clock_is_back = False  # whether the database's clock is known to have been set back
        # Since when the database has had another PIPELINE (time.monotonic()), and whether that was
        # told. It ends with this listener.
        self.differs_since: float | None = None
        self.is_told_to_differ = False
        self.gone: set[str] = set()  # stages that left PIPELINE, told to be waiting
        # By time.monotonic().
        self.reap_at = self.clock_at = 0.0
        self.history_at = self.prune_all_at = self.forget_at = self.adopt_at = self.failed_at = 0.0
        self.stalled_at = self.episodes_at = 0.0 if settings.ALERT_COMMAND else math.inf
        self.stalled_interval = STALLED_INTERVAL
        # How far these have come; None: at the beginning.
        self.pruned_until: Any = None
        self.given_up_after: Any = None
        self.parents_after: Any = None
        self.failed_after: Any = None
        self.failed_tables: list[str] = []  # those that can be read in this round
        self.failed_looks = 0  # looks for stalled rows in a row that could not read everything
        self.is_told_failing = False
        self.broken: list[str] = []  # triggers that record no call, as last seen
        self.told_broken: list[str] = []  # the same, as people were last told by this listener

    @property
    def next_run(self) -> float:
        """time.monotonic() at which something is due."""
        return min(self.reap_at, self.clock_at, self.history_at, self.forget_at, self.adopt_at,
                   self.failed_at, self.stalled_at, self.episodes_at)  # fmt: skip

    def begin(self, conn) -> None:
        """Tell what has waited until now, once and before the first call is claimed."""
        if self.is_new and self.settings.ALERT_COMMAND:
            self.attempt(troubles.tell_absence, conn, self.settings.ALERT_AFTER, self.alerts)
        self.is_new = False

    def run(self, conn, unclaimable: Mapping[str, str] | None = None) -> None:
        """Run the tasks that are due. One that the database refuses is logged once a round; the
        others go on.

        Args:
            unclaimable: by stage: why this listener can claim no call of it.

        Raises:
            ConnectionLost
            Problem: a newer program has installed.
        """
        now = time.monotonic()
        if now >= self.reap_at:
            self.reap_at = now + REAP_INTERVAL
            migrations.require_not_newer(conn)
            self.compare(conn)
            self.attempt(reap, conn)
        if now >= self.clock_at:
            self.clock_at = now + CLOCK_INTERVAL
            self.shorten_waits(conn, now)
        if now >= self.history_at:
            self.history_at = now + HISTORY_INTERVAL
            self.count_and_prune(conn, now)
        if now >= self.forget_at:
            self.forget_at = now + FORGET_INTERVAL
            given = self.stages, self.name, self.given_up_after
            self.given_up_after = self.attempt(forget_deleted, conn, *given)
            self.parents_after = self.attempt(forget_parents, conn, self.parents_after)
        if now >= self.adopt_at:
            self.adopt_at = now + ADOPT_INTERVAL
            if (self.attempt(adopt, conn) or 0) >= BATCH:
                self.adopt_at = now  # there is more
        if now >= self.failed_at:
            self.failed_at = now + FAILED_INTERVAL
            self.look_for_failed(conn, now)
        if now >= self.episodes_at:
            self.episodes_at = now + troubles.EPISODES_INTERVAL
            after = self.settings.ALERT_AFTER
            for row in self.attempt(troubles.episodes, conn, after) or []:
                troubles.tell_episode(self.alerts, row, (unclaimable or {}).get(row.stage))
            self.attempt(troubles.tell_gone_stages, conn, after, self.alerts, self.gone)
        if now >= self.stalled_at:
            self.look_for_stalled(conn, now)

    def compare(self, conn) -> None:
        """Say once that the database has another PIPELINE: calls of its new states wait for a
        listener that has it. Within ALERT_AFTER a deploy may still restart this one.
        """
        found = self.attempt(routes.difference, conn)
        if found is None:  # refused
            return
        if not found:
            self.differs_since, self.is_told_to_differ = None, False
            self.attempt(self.look_at_triggers, conn)
            return
        now, said = time.monotonic(), "; ".join(found)
        if self.differs_since is None:
            log.warning("데이터베이스의 PIPELINE이 다름 (새 리스너를 시작하세요): %s", said)
            self.differs_since = now
        if now >= self.differs_since + self.settings.ALERT_AFTER and not self.is_told_to_differ:
            self.is_told_to_differ = True
            text = f"listener {self.name} has another PIPELINE than the database: restart it"
            self.alerts.send("pipeline_differs", text, listener=self.name, reason=said)

    def look_at_triggers(self, conn) -> None:
        """Say once that database triggers record no call, and when that is over. The listener that
        was connected first tells people.
        """
        found = sorted(routes.broken_triggers(routes.triggers(conn)))
        said = "; ".join(found)
        if found and found != self.broken:
            log.error("트리거가 호출을 기록하지 않음: %s", said)
        self.broken = found
        if found == self.told_broken or not listeners.is_first(conn):
            return
        self.told_broken = found
        if found:
            text = f"finished stages leave no call: {said}: {INSTALL}, then backfill"
            self.alerts.send("trigger_broken", text, reason=said)
        else:
            self.alerts.recovered("trigger_broken", None, "the triggers record calls again")

    def shorten_waits(self, conn, now: float) -> None:
        """Shorten what waits too long where the database's clock was set back."""
        found = self.attempt(shorten_waits, conn, self.clock_is_back)
        if found is None:  # refused
            return
        if found:
            log.warning("데이터베이스 시계가 되돌아감: 길어진 대기 %d건을 다시 셈", found)
        self.clock_is_back = found > 0  # a row may have been locked
        if found >= BATCH:
            self.clock_at = now  # there is more

    def count_and_prune(self, conn, now: float) -> None:
        """Count a batch of the history, and prune one."""
        looked_at = self.attempt(history.count, conn) or 0
        if now >= self.prune_all_at:  # what was kept may have moved on
            self.prune_all_at, self.pruned_until = now + PRUNE_ALL_INTERVAL, None
        done = self.attempt(history.prune, conn, self.settings.HISTORY_DAYS, self.pruned_until)
        if done:
            self.pruned_until = done.until or self.pruned_until
            looked_at = max(looked_at, done.attempts)
        if looked_at >= BATCH:
            self.history_at = now  # there is more

    def look_for_failed(self, conn, now: float) -> None:
        """Tell people of rows that their stage has set to failed, a batch at a time."""
        if self.failed_after is None:
            self.failed_tables = list(pipeline.tables())
        tables = self.failed_tables
        found, failed = self.attempt_in_parts(
            troubles.newly_failed, conn, tables, after=self.failed_after, tables=tables
        )
        self.failed_tables = [name for name in tables if name not in failed]
        self.failed_after = found[0][1] if found else None
        if self.failed_after is not None:
            self.failed_at = now  # there is more
        for rows, _ in found:
            for row in rows:
                failures.tell_set_failed(self.alerts, row)

    def look_for_stalled(self, conn, now: float) -> None:
        """Tell people of stages that are stalled since the last look, or no more. Where there are
        tens of millions of rows, statement_timeout ends a look, and no call begins meanwhile: so
        the next looks are further apart.
        """
        found, failed = self.attempt_in_parts(troubles.newly_stalled, conn, *parts())
        took_long = any(isinstance(e, psycopg2.errors.QueryCanceled) for e in failed.values())
        if took_long or not found:
            self.stalled_interval = min(2 * self.stalled_interval, LONGEST_STALLED_INTERVAL)
        else:
            self.stalled_interval = STALLED_INTERVAL
        self.stalled_at = now + self.stalled_interval
        self.attempt(self.tell_failing, conn, failed)
        for rows in found:
            for row in rows:
                self.tell_stalled(row)

    def tell_stalled(self, row: Any) -> None:
        """Tell people of a stage (see troubles.newly_stalled) that is stalled, or no more."""
        stages = pipeline.stages_of_routes().items()
        kind = called(route.table for route, (name, _) in stages if name == row.stage)
        if row.jobs is None:
            self.alerts.recovered("stalled", row.stage, f"no {kind} is stalled any more")
            return
        log.error("정체된 단계: stage=%s jobs=%d %s → %s jobs --stalled --stage %s", row.stage,
                  row.jobs, row.reason, pipeline.JSL, row.stage)  # fmt: skip
        are = f"{counted(row.jobs, kind)} {'is' if row.jobs == 1 else 'are'}"
        text = f"{are} stalled at {row.stage}: {row.reason}"
        self.alerts.send("stalled", text, **row._asdict())

    def tell_failing(self, conn, failed: Mapping[str, psycopg2.Error]) -> None:
        """Tell people that stalled rows cannot be looked for, and when that is over. Only the
        listener that was connected first does.
        """
        self.failed_looks = self.failed_looks + 1 if failed else 0
        is_failing = self.failed_looks >= FAILED_LOOKS
        if is_failing and not self.is_told_failing and listeners.is_first(conn):
            self.is_told_failing, why = True, reasons(failed)
            text = (
                f"jobs may be stalled unseen: {self.failed_looks} looks for them have failed: {why}"
            )
            self.alerts.send("stalled", text, reason=why)
        elif self.is_told_failing and not failed:
            self.is_told_failing = False
            self.alerts.recovered("stalled", None, "stalled jobs can be looked for again")

    def note_clock_set_back(self) -> None:
        """A call was found before it was due: look at once what else waits too long."""
        self.clock_at, self.clock_is_back = 0.0, True

    def attempt(self, do: Callable, conn, *given: Any) -> Any:
        try:
            return do(conn, *given)
        except ConnectionLost:
            raise
        except psycopg2.Error as error:
            log_failure(do, " ".join(str(error).split()))
            return None

    def attempt_in_parts(
        self, do: Callable, conn, *groups: Collection[str], **given: Any
    ) -> tuple[list, dict[str, psycopg2.Error]]:
        """As attempt(), but what can be done part by part is; see db.in_parts()."""

        def ask(conn, part: str | None = None) -> Any:
            return do(conn, part=part, **given)

        found, failed = in_parts(conn, ask, *groups)
        if failed:
            log_failure(do, reasons(failed))
        return found, failed


# --- a clock that was set back -------------------------------------------------------------

# The end of a lease, hold or rate was computed from now(). Where the clock was then set back, or a
# failover led to a host whose clock is behind, that end is further away than the wait is long. Such
# a wait starts again from the present now(). The comparisons are with clock_timestamp(), as another
# transaction may have begun, and committed, after ours began.
SHORTEN_WAITS = (
    """
UPDATE stage_limits SET next_at = now() + make_interval(secs => seconds)
WHERE next_at > clock_timestamp() + make_interval(secs => seconds)
""",
    """
UPDATE stage_limits SET stays_since = now() WHERE stays_since > clock_timestamp()
""",
    """
UPDATE pipeline_stages SET held_until = now() + make_interval(secs => hold_seconds)
WHERE held_until > clock_timestamp() + make_interval(secs => hold_seconds)
  AND held_until < 'infinity'
""",
    """
UPDATE stage_leases SET started_at = now(), leased_until = now() + (leased_until - started_at)
WHERE started_at > clock_timestamp()
""",
)
# The statements below read all waiting calls, so they run only after a sign that the clock was set
# back. This is one, for as long as the last attempt is in the future.
IS_BACK = """
SELECT coalesce(max(finished_at) > clock_timestamp(), false) AS is_back FROM stage_attempts
"""
# Calls that were never tried become due now, in their order, or at their run_after: at most so many
# of each stage.
SHORTEN_UNTRIED = """
WITH later AS (
    SELECT c.*
    FROM (SELECT DISTINCT stage FROM pipeline_stages) AS p
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id, c.due_at, c.run_after FROM stage_calls AS c
        WHERE c.stage = p.stage AND c.due_at > now() AND c.due_at < 'infinity'
          AND c.due_at > clock_timestamp() AND c.attempts = 0
          AND (c.run_after IS NULL OR c.due_at > c.run_after)
        ORDER BY c.due_at LIMIT %(batch)s
        FOR UPDATE OF c SKIP LOCKED) AS c
), numbered AS (
    SELECT job_id, call_id, run_after, row_number() OVER (ORDER BY due_at) AS number FROM later
)
UPDATE stage_calls AS c
SET due_at = greatest(now() + n.number * interval '1 us', n.run_after)
FROM numbered AS n WHERE c.job_id = n.job_id AND c.call_id = n.call_id
"""
# A claimed call becomes due when its lease ends. Any other call waits for a back-off, or for the
# lease of an attempt without an answer; one that waits longer than both becomes due.
SHORTEN_TRIED = f"""
WITH later AS (
    SELECT c.*
    FROM (SELECT DISTINCT stage FROM pipeline_stages) AS p
    CROSS JOIN LATERAL (
        SELECT c.job_id, c.call_id,
               CASE WHEN c.worker IS NOT NULL THEN now() + (c.due_at - c.started_at)
                    ELSE greatest(now(), lease.until) END AS due_at
        FROM stage_calls AS c
        CROSS JOIN LATERAL (SELECT max(l.leased_until) AS until FROM stage_leases AS l
                            WHERE l.call_id = c.call_id) AS lease
        WHERE c.stage = p.stage AND c.due_at > now() AND c.due_at < 'infinity' AND c.attempts > 0
          AND CASE WHEN c.worker IS NOT NULL THEN c.started_at > clock_timestamp()
                   ELSE c.due_at > greatest(lease.until, clock_timestamp()
                                            + interval '{trigger.LONGEST_BACKOFF} s') END
        ORDER BY c.due_at DESC LIMIT %(batch)s
        FOR UPDATE OF c SKIP LOCKED) AS c
)
UPDATE stage_calls AS c
SET started_at = CASE WHEN c.worker IS NOT NULL THEN now() END, due_at = later.due_at
FROM later WHERE c.job_id = later.job_id AND c.call_id = later.call_id
"""


def shorten_waits(conn, is_back: bool = False, batch: int = BATCH) -> int:
    """Shorten what waits longer than it should, as the database's clock was set back.

    Args:
        is_back: whether the clock is known to have been set back.
        batch: how many calls of each stage at most.

    Returns:
        How much was shortened; with less than `batch`, nothing is left.
    """
    found = sum(execute(conn, sql).rowcount for sql in SHORTEN_WAITS)
    if found or is_back or execute(conn, IS_BACK).fetchone().is_back:
        untried = execute(conn, SHORTEN_UNTRIED, {"batch": batch}).rowcount
        found += untried
        if untried < batch:
            found += execute(conn, SHORTEN_TRIED, {"batch": batch}).rowcount
    if found:
        execute(conn, f"NOTIFY {WAKE_CHANNEL}")  # listeners have planned their next look already
    return found


# --- what was deleted, or belongs to the PIPELINE before -------------------------------------

# A given-up call waits for a person, but not if its job was deleted: then it is dropped. They are
# checked in the order of the ids, a batch a round. Whether a row of a table that left PIPELINE was
# deleted is not known.
FORGET = """
WITH given_up AS MATERIALIZED (
    SELECT job_id, call_id FROM stage_calls
    WHERE due_at = 'infinity' AND stage = ANY (%(stages)s)
      AND table_name IN (SELECT name FROM pipeline_tables)
), batch AS (
    SELECT * FROM given_up WHERE %(after)s IS NULL OR job_id >= %(after)s
    ORDER BY job_id, call_id LIMIT %(batch)s
), gone AS (
    DELETE FROM stage_calls AS c USING batch
    WHERE c.job_id = batch.job_id AND c.call_id = batch.call_id AND c.due_at = 'infinity'
      AND (stage_call_row(c.table_name, '', c.job_id)).is_there IS NULL
    RETURNING c.*
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                                finished_at, outcome, error)
    SELECT job_id, table_name, call_id, attempts + 1, stage, %(worker)s, now(), now(),
           'skipped', 'the job was deleted'
    FROM gone
    ON CONFLICT DO NOTHING
)
SELECT count(*) AS found,
       (SELECT job_id FROM batch ORDER BY job_id DESC LIMIT 1) AS last
FROM batch
"""


def forget_deleted(
    conn, stages: Iterable[str], worker: str, after: Any = None, batch: int = BATCH
) -> Any:
    """Drop the given-up calls of deleted jobs, with a row in the history; checks one batch.

    Args:
        after: what the last batch returned.

    Returns:
        The id that the next batch begins with; None: with the first.
    """
    given = {"stages": list(stages), "worker": worker, "after": after, "batch": batch}
    found = execute(conn, FORGET, given).fetchone()
    return found.last if found.found == batch else None


# stage_joins has a row for each parent and join, until the parent is deleted. They are checked in
# the order of the ids, a batch a round. Rows of a join that left PIPELINE stay, as their table is
# not known, and the join may come back.
FORGET_PARENTS = """
WITH batch AS (
    SELECT parent_id, join_of FROM stage_joins
    WHERE %(after)s IS NULL OR parent_id >= %(after)s
    ORDER BY parent_id, join_of LIMIT %(batch)s
), gone AS (
    DELETE FROM stage_joins AS j USING pipeline_stages AS p
    WHERE (j.parent_id, j.join_of) IN (SELECT parent_id, join_of FROM batch)
      AND p.join_of = j.join_of
      AND (stage_call_row(p.table_name, '', j.parent_id)).is_there IS NULL
)
SELECT count(*) AS found,
       (SELECT parent_id FROM batch ORDER BY parent_id DESC LIMIT 1) AS last
FROM batch
"""


def forget_parents(conn, after: Any = None, batch: int = BATCH) -> Any:
    """Delete rows of stage_joins whose parents were deleted; checks one batch.

    Args:
        after: what the last batch returned.

    Returns:
        The id that the next batch begins with; None: with the first.
    """
    found = execute(conn, FORGET_PARENTS, {"after": after, "batch": batch}).fetchone()
    return found.last if found.found == batch else None


# Calls that were recorded under another PIPELINE: under the name that their stage had before, or
# with a priority that their table no longer declares, which stage_due_calls() does not look for. A
# call of a state that left PIPELINE stays as it is. `install` runs this for every call. Upkeep runs
# it for stages that left PIPELINE, as a transaction may have been open during the install or have
# held the row; a call of any other stage is renamed when a listener claims it.
ADOPT = """
UPDATE stage_calls AS c SET stage = mine.stage, priority = mine.priority
FROM (SELECT o.job_id, o.call_id, p.stage,
             CASE WHEN t.priority_column IS NOT NULL THEN o.priority ELSE 0 END AS priority
      FROM stage_calls AS o
      JOIN pipeline_stages AS p USING (table_name, join_of, current_step, status)
      JOIN pipeline_tables AS t ON t.name = o.table_name
      WHERE ({every} AND o.stage <> p.stage
             OR o.stage NOT IN (SELECT stage FROM pipeline_stages)
             OR o.priority <> 0 AND o.table_name IN (
                SELECT name FROM pipeline_tables WHERE priority_column IS NULL))
      LIMIT {batch}
      FOR UPDATE OF o SKIP LOCKED) AS mine
WHERE c.job_id = mine.job_id AND c.call_id = mine.call_id
"""


def adopt(conn) -> int:
    """Give calls of the PIPELINE before the stage and priority that they have in that of now; how
    many.
    """
    adopted = execute(conn, UNPINNED + ADOPT.format(every="false", batch=BATCH)).rowcount
    if adopted:
        execute(conn, f"NOTIFY {WAKE_CHANNEL}")
    return adopted


# Stores the timeouts, which come from the listener's settings, for stalled_jobs() and people.
TELL_TIMEOUTS = """
UPDATE pipeline_stages AS p SET timeout = told.timeout
FROM unnest(%(stages)s::text[], %(timeouts)s::float8[]) AS told (stage, timeout)
WHERE p.stage = told.stage AND p.timeout IS DISTINCT FROM told.timeout
"""


def tell_timeouts(conn, timeouts: Mapping[str, float]) -> None:
    """Write the timeout of every stage, in seconds, to pipeline_stages."""
    given = {"stages": list(timeouts), "timeouts": list(timeouts.values())}
    execute(conn, TELL_TIMEOUTS, given)
