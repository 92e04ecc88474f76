"""Runs the tasks that are due, between turns. Each listener runs them, for all listeners. What they
do is in calls.py, clock.py, history.py, leftovers.py and troubles.py.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psycopg2

import clock
import failures
import history
import leftovers
import pipeline
import troubles
from alerts import Alerts
from calls import REAP_INTERVAL
from claiming import Claiming
from db import ConnectionLost, execute, in_parts
from history import BATCH, log_failure
from looks import why_failed
from ops import listeners, migrations, routes
from ops.alarms import called
from ops.problem import first_line
from ops.resting import parts
from ops.table import counted

log = logging.getLogger("listener")

# Seconds between two rounds of a task.
CLOCK_INTERVAL = 60.0
HISTORY_INTERVAL = FORGET_INTERVAL = ADOPT_INTERVAL = 300.0
STALLED_INTERVAL = FAILED_INTERVAL = 300.0
PRUNE_ALL_INTERVAL = 86400.0
LONGEST_STALLED_INTERVAL = 3600.0
STALLED_ERRORS = 3  # people are told after so many failed looks for stalled rows in a row


@dataclass
class Task:
    """What is done every so many seconds, a batch at a time, so that no call waits for long.

    do: given a connection; returns whether there is more to do.
    at: time.monotonic() of the next round; infinity: never.
    """

    do: Callable[[Any], bool | None]
    every: float
    at: float = 0.0


class Upkeep:
    """The tasks of a listener."""

    def __init__(self, settings: SimpleNamespace, name: str, alerts: Alerts, claiming: Claiming):
        self.settings, self.name, self.alerts, self.claiming = settings, name, alerts, claiming
        self.clock_is_back = False  # the database's clock is known to have been set back
        # Since when the database has had another PIPELINE (time.monotonic()), and whether that was
        # told. Its end is not told: people were asked to restart this one.
        self.differs_since: float | None = None
        self.has_told_difference = False
        self.gone: set[str] = set()  # stages that left PIPELINE; told that their calls wait
        # How far these have come; None: at the beginning.
        self.pruned_until: Any = None
        self.given_up_after: Any = None
        self.parents_after: Any = None
        self.failed_after: Any = None
        self.prune_all_at = 0.0  # by time.monotonic()
        self.failed_tables: list[str] = []  # where look_for_failed() still looks in this round
        self.stalled_errors = 0  # consecutive looks for stalled rows that could not read everything
        self.has_told_stalled_unseen = False
        self.broken: list[routes.Broken] = []  # triggers that record no call, as last seen
        self.told_broken: list[routes.Broken] = []  # as people were last told by this listener

        for_people = 0.0 if settings.ALERT_COMMAND else math.inf
        self.clock = Task(self.shorten_waits, CLOCK_INTERVAL)
        self.stalled = Task(self.look_for_stalled, STALLED_INTERVAL, for_people)
        self.tasks = [
            Task(self.compare_and_reap, REAP_INTERVAL),
            self.clock,
            Task(self.count_and_prune, HISTORY_INTERVAL),
            Task(self.forget, FORGET_INTERVAL),
            Task(self.adopt, ADOPT_INTERVAL),
            Task(self.look_for_failed, FAILED_INTERVAL),
            Task(self.look_at_stages, troubles.EPISODES_INTERVAL, for_people),
            self.stalled,
        ]

    @property
    def next_run(self) -> float:
        """time.monotonic() at which a task is due."""
        return min(task.at for task in self.tasks)

    def tell_absence(self, conn) -> None:
        """Tell what has waited until now. No call is claimed before that."""
        if self.settings.ALERT_COMMAND:
            self.guarded(troubles.tell_absence, conn, self.settings.ALERT_AFTER, self.alerts)

    def run(self, conn) -> None:
        """Run the tasks that are due. What the database refuses of one is logged once a round; the
        others go on.

        Raises:
            ConnectionLost
            Problem: a newer program has installed.
        """
        now = time.monotonic()
        for task in self.tasks:
            if now >= task.at:
                task.at = now + task.every  # where `do` raises an error
                has_more = task.do(conn)  # it may change `every`
                task.at = now if has_more else now + task.every

    def compare_and_reap(self, conn) -> None:
        """End this listener where a newer program has installed; say where PIPELINE or the triggers
        differ; end leases that ran out.
        """
        self.guarded(migrations.require_not_newer, conn)
        self.compare(conn)
        self.guarded(failures.reap, conn, self.settings, self.claiming.extend_by)

    def compare(self, conn) -> None:
        """Say once that the database has another PIPELINE: calls of its new states wait for a
        listener that has it. Within ALERT_AFTER a deploy may still restart this one. Where it is
        the same, look at the triggers.
        """
        found = self.guarded(routes.difference, conn)
        if found is None:  # refused
            return
        if not found:
            self.differs_since, self.has_told_difference = None, False
            self.guarded(self.look_at_triggers, conn)
            return
        now, said = time.monotonic(), "; ".join(found)
        if self.differs_since is None:
            log.warning("데이터베이스의 PIPELINE이 다름 (새 리스너를 시작하세요): %s", said)
            self.differs_since = now
        if now >= self.differs_since + self.settings.ALERT_AFTER and not self.has_told_difference:
            self.has_told_difference = True
            text = f"listener {self.name} has another PIPELINE than the database: restart it"
            self.alerts.send("pipeline_differs", text, listener=self.name, reason=said)

    def look_at_triggers(self, conn) -> None:
        """Say once that database triggers record no call, and when that is over. The listener that
        was connected first tells people.
        """
        found = sorted(routes.broken_triggers(routes.triggers(conn)))
        said = "; ".join(one.what for one in found)
        mends = "; ".join(dict.fromkeys(one.mend for one in found))
        if found and found != self.broken:
            log.error("트리거가 호출을 기록하지 않음: %s → %s", said, mends)
        self.broken = found
        if found == self.told_broken:
            return
        if not listeners.is_first(conn):
            self.told_broken = []  # another one tells people now
            return
        self.told_broken = found
        if found:
            text = f"finished stages leave no call: {said}: {mends}; then {pipeline.JSL} backfill"
            self.alerts.send("trigger_broken", text, reason=said)
        else:
            self.alerts.send_recovered("trigger_broken", None, "the triggers record calls again")

    def shorten_waits(self, conn) -> bool:
        """Shorten what waits too long where the database's clock was set back."""
        found = self.guarded(clock.shorten_waits, conn, self.clock_is_back)
        if found is None:  # refused
            return False
        if found:
            log.warning("데이터베이스 시계가 되돌아감: 길어진 대기 %d건을 다시 셈", found)
        self.clock_is_back = found > 0  # a row may have been locked
        return found >= BATCH

    def count_and_prune(self, conn) -> bool:
        """Count a batch of the history, and prune one."""
        looked_at, now = self.guarded(history.count, conn) or 0, time.monotonic()
        if now >= self.prune_all_at:  # start over: what was kept may be deleted now
            self.prune_all_at, self.pruned_until = now + PRUNE_ALL_INTERVAL, None
        done = self.guarded(history.prune, conn, self.settings.HISTORY_DAYS, self.pruned_until)
        if done:
            self.pruned_until = done.until or self.pruned_until
            looked_at = max(looked_at, done.attempts)
        return looked_at >= BATCH

    def forget(self, conn) -> None:
        """Forget what is left of deleted jobs."""
        given = self.name, self.given_up_after
        self.given_up_after = self.guarded(leftovers.forget_deleted, conn, *given)
        if pipeline.joins():  # without, a listener needs no right to that table
            self.parents_after = self.guarded(leftovers.forget_parents, conn, self.parents_after)

    def adopt(self, conn) -> bool:
        """Give calls of an earlier PIPELINE the stage that they have in the present one."""
        return (self.guarded(leftovers.adopt, conn) or 0) >= BATCH

    def look_for_failed(self, conn) -> bool:
        """Record rows that their stage has set to failed, and tell people of them, a batch at a
        time. The history that status and metrics count needs this without ALERT_COMMAND as well.
        """
        if self.failed_after is None:
            self.failed_tables = list(pipeline.tables())
        until, failed = in_parts(conn, self.tell_failed, self.failed_tables)
        if failed:
            log_failure(troubles.newly_failed, why_failed(conn, failed))
        self.failed_tables = [name for name in self.failed_tables if name not in failed]
        self.failed_after = until[0] if until else None
        return self.failed_after is not None

    def tell_failed(self, conn, table: str | None = None) -> Any:
        """Record and tell a batch, of all tables or of one; the time after which the next begins,
        None after the last. It is told at once: what is recorded is not found again.
        """
        tables = [table] if table else self.failed_tables
        found, until = troubles.newly_failed(conn, self.failed_after, tables=tables)
        for row in found:
            failures.tell_set_failed(self.alerts, row)
        return until

    def look_at_stages(self, conn) -> None:
        """Tell people of stages that keep calls waiting for long, and when that is over."""
        after = self.settings.ALERT_AFTER
        for row in self.guarded(troubles.episodes, conn, after) or []:
            troubles.tell_episode(self.alerts, row, self.claiming.unclaimable.get(row.stage))
        self.guarded(troubles.tell_gone_stages, conn, after, self.alerts, self.gone)

    def look_for_stalled(self, conn) -> None:
        """Tell people of stages that are stalled since the last look, or no more. Where there are
        tens of millions of rows, statement_timeout ends a look, and no call begins meanwhile: so
        the next looks are further apart.
        """
        done, failed = in_parts(conn, self.tell_stalled, *parts())
        if failed:
            log_failure(troubles.newly_stalled, why_failed(conn, failed))
        took_long = any(isinstance(e, psycopg2.errors.QueryCanceled) for e in failed.values())
        if took_long or not done:
            self.stalled.every = min(2 * self.stalled.every, LONGEST_STALLED_INTERVAL)
        else:
            self.stalled.every = STALLED_INTERVAL
        self.guarded(self.tell_stalled_unseen, conn, failed)

    def tell_stalled(self, conn, part: str | None = None) -> None:
        """Tell people of stages that are stalled, or no more: all, or those of a part. They are
        told at once: what is marked is not found again.
        """
        stages = pipeline.stages_of_routes().items()
        for row in troubles.newly_stalled(conn, part):
            kind = called(route.table for route, (name, _) in stages if name == row.stage)
            if row.jobs is None:
                self.alerts.send_recovered("stalled", row.stage, f"no {kind} is stalled any more")
                continue
            look = f"{pipeline.JSL} jobs --stalled --stage {row.stage}"
            log.error("정체된 단계: stage=%s jobs=%d %s → %s",
                      row.stage, row.jobs, row.reason, look)  # fmt: skip
            are = f"{counted(row.jobs, kind)} {'is' if row.jobs == 1 else 'are'}"
            text = f"{are} stalled at {row.stage}: {row.reason}; to see which: {look}"
            self.alerts.send("stalled", text, **row._asdict(), command=look)

    def tell_stalled_unseen(self, conn, failed: Mapping[str, psycopg2.Error]) -> None:
        """Tell people that stalled rows cannot be looked for, and when that is over. Only the
        listener that was connected first does.
        """
        self.stalled_errors = self.stalled_errors + 1 if failed else 0
        is_failing = self.stalled_errors >= STALLED_ERRORS
        if is_failing and not self.has_told_stalled_unseen and listeners.is_first(conn):
            self.has_told_stalled_unseen, why = True, why_failed(conn, failed)
            times = f"{self.stalled_errors} looks for them have failed"
            text = f"jobs may be stalled unseen: {times}: {why}"
            self.alerts.send("stalled", text, reason=why)
        elif self.has_told_stalled_unseen and not failed:
            self.has_told_stalled_unseen = False
            self.alerts.send_recovered("stalled", None, "stalled jobs can be looked for again")

    def note_clock_set_back(self) -> None:
        """A call was claimed before it was due: look at once what else waits too long."""
        self.clock.at, self.clock_is_back = 0.0, True

    def guarded(self, do: Callable, conn, *given: Any) -> Any:
        """What `do(conn, *given)` returns; None where the database refuses it, which is logged."""
        try:
            return do(conn, *given)
        except ConnectionLost:
            raise
        except psycopg2.Error as error:
            is_cut_off = isinstance(error, psycopg2.errors.QueryCanceled)
            log_failure(do, first_line(error) if is_cut_off else why_failed(conn, {"": error}))
            return None


# Stores the timeouts, which come from the listener's settings, for stalled_jobs() and people.
STORE_TIMEOUTS = """
UPDATE pipeline_stages AS p SET timeout = told.timeout
FROM unnest(%(stages)s::text[], %(timeouts)s::float8[]) AS told (stage, timeout)
WHERE p.stage = told.stage AND p.timeout IS DISTINCT FROM told.timeout
"""


def store_timeouts(conn, timeouts: Mapping[str, float]) -> None:
    """Write the timeout of every stage, in seconds, to pipeline_stages."""
    given = {"stages": list(timeouts), "timeouts": list(timeouts.values())}
    execute(conn, STORE_TIMEOUTS, given)
