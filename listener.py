"""Job State Listener: hears that a job finished a stage and calls the next one.

The loop: one process, one thread, one connection. It settles what came back from its workers,
claims calls for those that are idle, and waits in one select(). Below it is the command line.
"""

import packages  # noqa: F401 (says what to run where a package is missing)

# isort: split
import contextlib
import gc
import logging
import math
import os
import random
import secrets
import select
import socket
import sys
import time
from collections import Counter, OrderedDict
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import click
import psycopg2
from psycopg2.errors import LockNotAvailable

import calls
import config
import db
import hosts
import joins
import logs
import notifications
import ops
import pipeline
import trigger
from alerts import Alerts
from calls import PAID, TAKEN, Claimed, Result, Turn, Wanted
from health import StageHealth
from heartbeat import Heartbeat
from looks import JoinLook, MoveLook
from ops.listeners import OTHER_PIPELINE, UNCLAIMABLE
from ops.rows import TABLE, RowCommand, locked
from ops.stage import StageName
from orphans import reap_orphans
from pipeline import Call, Pool, Route, Table
from signals import Signals
from trigger import boottime
from upkeep import Upkeep, reap, tell_timeouts
from workers import Workers

log = logging.getLogger("listener")

# The longest sleep, and what a heartbeat allows for a few statements on top of it (seconds). A
# frozen listener is noticed by `check` within the sum.
LONGEST_SLEEP = 5.0
HEARTBEAT_MARGIN = 20.0
# Seconds that a heartbeat allows for connecting to one host. Without a DNS server that answers,
# resolving its name takes more than 40, and then each address may take connect_timeout.
CONNECTING = 100.0
# How often to look whether a stage has let go of the row of a call that it has answered.
AGAIN_EVERY = 1.0
# Claims skip calls that were due before the last claimed one (see Wanted), for so many seconds. A
# call whose transaction commits late therefore waits at most that long.
MARKED_FOR = 1.0
# After a lost connection, a statement that was sent on it may still take effect for so long.
DOUBTFUL = 600.0
# Results are dropped after so many tries in a database that has no tables for them.
LAST_TRIES = 100
# Seconds until this listener claims a call again that only one with another PIPELINE can make.
PASSED_OVER_FOR = 10.0
# A sweep also claims calls that were never tried and are not due yet. One that is claimed so long
# before it is due is a sign that the database's clock was set back. If the claim has only waited
# for a lock, the look that follows finds nothing.
EARLY = timedelta(seconds=1)
# Accepted calls that are remembered, should a new primary have forgotten them.
REMEMBERED = 10_000


class Listener:
    """Hears, claims and settles; its workers call."""

    def __init__(self, settings: SimpleNamespace, signals: Signals, size: int,
                 only: tuple[str, ...] = (), once: bool = False):  # fmt: skip
        self.settings, self.signals, self.once = settings, signals, once
        self.name = listener_name()
        self.tables, self.limits = pipeline.tables(), pipeline.stage_limits(settings)
        # The stages that are called, the one whose turn it is first.
        self.order = [stage for stage in self.limits if not only or stage in only]
        self.heartbeat = Heartbeat(settings.HEARTBEAT_DIR, self.name)
        self.workers = Workers(settings, size, signals, self.heartbeat)
        self.alerts = Alerts(settings)
        self.hosts = hosts.Watch(settings)
        self.hearing = notifications.Hearing(settings)
        self.upkeep = Upkeep(settings, self.order, self.name, self.alerts)

        self.unwritten: list[Result] = []  # outlive the connection
        self.locked: list[Result] = []  # recorded, but the stage still holds the row of the call
        # By call_id and key: the attempt that an asynchronous stage has taken; the next one is made
        # after its timeout. Infinity: a call that was accepted and is never repeated.
        self.accepted: OrderedDict[tuple, float] = OrderedDict()
        self.passed_over: set[Route] = set()  # of another PIPELINE; each was told once
        self.unclaimable: dict[str, str] = {}  # by stage: why no call of it can be claimed
        self.asked_again: set[str] = set()  # those that were asked for once more before the end
        self.health = StageHealth(settings, self.alerts)
        self.join_look = JoinLook(once)
        self.move_look = MoveLook(settings, self.alerts, once)

        # When the next turn does what, by time.monotonic().
        self.look_at = 0.0  # claim calls that are due
        self.sweep_at = 0.0  # claim, and look for what nobody has announced
        self.again_at = 0.0  # settle results of locked rows, give back doubtful claims
        self.due_at = 0.0  # when the next call will be due, as far as is known
        self.asks_when = False  # whether the database is to be asked for that
        self.asked_at: datetime | None = None  # the database's time of the last claim
        self.nothing_due = False
        self.was_full = False  # the last claim found a call for every idle worker
        self.marks: dict[str, Any] = {}  # by stage: when the last claimed call was due
        self.marked_at = 0.0  # when `marks` were last dropped
        self.is_ordered = pipeline.is_ordered()

        self.doubtful_until = -math.inf  # until then a claim of ours may exist that we do not know
        self.gives_back = False  # there is one: its call was released, or the row is locked
        self.checked = False  # whether the database knows this PIPELINE
        self.refusal: ops.Problem | None = None  # why this program must not go on
        self.has_obeyed = False  # the first request to stop
        self.reason, self.repeats = "", 0  # of the lost connection
        self.last_tries = 0  # at settling results in a database that has no tables for them
        self.target: dict[str, str] | None = None  # where the last connection led
        self.is_waiting = False  # for a synchronous standby, and has said so

    # --- connect, work, and once more ---

    def serve(self) -> None:
        """Work until told to stop; a result that is not written yet outlasts even that.

        Raises:
            ops.Problem: the database does not know this PIPELINE.
            psycopg2.Error: with `once`, which does not wait for better times.
        """
        log.info("Job State Listener 시작: listener=%s workers=%d stages=%s",
                 self.name, self.workers.size, self.order)  # fmt: skip
        try:
            while not self.finished():
                lost: Exception | None = None
                try:
                    with contextlib.closing(self.connect()) as conn:
                        self.work(conn)
                except ops.Problem as problem:
                    self.refusal = problem  # calls under way are finished
                    lost = problem if self.has_work else None
                except Exception as error:
                    if self.once and not self.has_work:
                        raise
                    lost = error
                if lost:  # not within `except`: a worker that is forked there inherits the error
                    self.wait_to_reconnect(lost)
        finally:
            if not self.has_work:  # else a bug ended the loop: they finish and write their results
                self.workers.stop()
            self.alerts.close(self.signals if self.signals.requested else None)
            self.hosts.close()
            self.heartbeat.close()
        for failure in (self.refusal, self.join_look.failure, self.move_look.failure):
            if failure:
                raise failure
        if self.once and self.unclaimable and not self.signals.requested:
            raise psycopg2.Error(f"{self.told_unclaimable()} → {pipeline.JSL} verify")
        log.info("Job State Listener 중지됨: listener=%s", self.name)

    def connect(self) -> db.Connection:
        """A connection to the primary, ready for work."""
        self.workers.conn = None
        name = db.LISTENER_APPLICATION + self.name
        conn = db.connect(
            self.settings, name, True, self.signals, self.beat_for_host, last=self.target
        )
        self.target, conn.beat = conn.target, self.beat_for_answer
        try:
            self.prepare(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def prepare(self, conn: db.Connection) -> None:
        """LISTEN comes before the first look for due calls, so that nothing falls between."""
        self.hosts.arrive(conn, self.beat_for_host)
        self.beat("asking the database", LONGEST_SLEEP)
        info = conn.info
        log.info("PostgreSQL 연결 성공: %s:%s/%s", info.host, info.port, info.dbname)
        self.end_waiting(conn)
        announced = ops.announced(conn)
        if not self.checked or announced is None:  # None: the database was made anew, for example
            try:
                ops.require_installed(conn)
            except ops.Problem as problem:
                self.settle_last(conn, problem)
                raise
        if not self.checked:
            tell_timeouts(conn, pipeline.timeouts(self.settings))
            self.checked = True
            if (left := hosts.connections_left(conn)) < hosts.FEW:
                log.warning("남은 데이터베이스 연결이 %d개뿐", left)
        db.sign(conn, self.name)
        self.hearing.listen(conn, silent=announced == "nothing")
        self.workers.conn = conn
        self.give_back(conn)
        self.look_at = self.sweep_at = 0.0

    def end_waiting(self, conn: db.Connection) -> None:
        """End what is left of lost connections, and say that the database waits for a standby."""
        if db.end_waiting(conn) and not self.is_waiting:
            self.is_waiting = True
            log.error("커밋이 응답 없는 동기 스탠바이를 기다림: 남은 세션을 종료하며 계속 시도")
            text = "commits wait for a synchronous standby that does not answer"
            self.alerts.send("standby_away", text, host=conn.info.host)

    def work(self, conn: db.Connection) -> None:
        """The loop."""
        self.upkeep.begin(conn)
        while not self.finished():
            self.workers.start_missing()
            try:
                claimed = self.settle_and_claim(conn)
            except psycopg2.Error as error:
                if not isinstance(error, db.ConnectionLost):  # it must run though no turn succeeds
                    self.upkeep.run(conn, self.unclaimable)
                raise
            for call in claimed:
                self.workers.give(call)
            try:
                self.hear(conn)  # notifications that came with the answer to the claim
            finally:
                self.hearing.log()
                for call in claimed:
                    trigger.log_begin(call)
            self.ask_when(conn)
            self.hosts.ping(conn)
            self.upkeep.run(conn, self.unclaimable)
            ready = self.wait(min(self.next_look, self.upkeep.next_run), conn)
            self.collect(ready)
            if conn in ready or conn.notifies:
                self.hear(conn)
        if self.is_doubtful:
            self.give_back(conn)  # nobody else would before its lease is over

    def wait_to_reconnect(self, error: Exception) -> None:
        """Say what happened, each reason once and then only counted; calls under way go on."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        delay = self.settings.JOB_STATE_LISTENER_RECONNECT_DELAY * random.uniform(0.5, 1.0)
        if reason != self.reason:
            bug = error if not isinstance(error, (psycopg2.Error, ops.Problem)) else None
            log.error("리스너 오류 발생: %s", reason, exc_info=bug)
            self.reason, self.repeats = reason, 0
            if isinstance(error, hosts.OldPrimary):
                self.alerts.send("split_brain", str(error))
        self.repeats += 1
        if self.repeats & (self.repeats - 1) == 0:
            log.warning("재연결 시도: %.1f초 후 (%d번째)", delay, self.repeats)
        until = time.monotonic() + delay
        self.doubtful_until = time.monotonic() + DOUBTFUL
        while time.monotonic() < until and not self.finished():
            self.workers.start_missing()
            self.collect(self.wait(until))

    def settle_last(self, conn: db.Connection, problem: ops.Problem) -> None:
        """Settle the results that are left, before this listener ends with `problem`. Drop them
        after LAST_TRIES in a database that has no tables for them.
        """
        self.unwritten, self.locked = self.unwritten + self.locked, []
        self.tell_failed(conn)
        try:
            again = calls.in_parts(conn, self.unwritten, [], 0, self.name).unsettled
            self.unwritten = [result for result in self.unwritten if result.call_id in again]
        except db.ConnectionLost:
            raise
        except psycopg2.Error:
            self.last_tries += 1
            if self.last_tries >= LAST_TRIES and not self.workers.calls:
                for result in self.unwritten:
                    log.error("리스 만료 후 다시 확인됨: job=%s %s", result.job_id, problem)
                self.unwritten = []

    @property
    def has_work(self) -> bool:
        """Whether there are calls under way, or results that are not written."""
        return bool(self.workers.calls or self.unwritten)

    def finished(self) -> bool:
        if self.has_work:
            return False
        return self.is_stopping or (self.once and self.nothing_due)

    @property
    def is_stopping(self) -> bool:
        """Whether no further call is claimed."""
        return self.signals.requested or self.refusal is not None

    @property
    def is_doubtful(self) -> bool:
        """Whether there may be a claim of ours that is not under way."""
        return self.gives_back or time.monotonic() < self.doubtful_until

    # --- one turn ---

    def settle_and_claim(self, conn: db.Connection) -> list[Call]:
        """Run the looks that are due. Then settle all results and claim a call for each idle
        worker: one round trip, one commit; one more for each further stage of a pool that is asked
        while workers are idle.
        """
        now = time.monotonic()
        if not self.unwritten and now < self.next_look:
            return []
        free = 0 if self.is_stopping else len(self.workers.idle)
        sweep = free > 0 and now >= self.sweep_at
        self.look(conn, now, sweep)
        if now >= self.again_at:
            self.again_at = now + AGAIN_EVERY
            self.unwritten, self.locked = self.unwritten + self.locked, []
            if self.is_doubtful:
                self.give_back(conn)
        self.tell_failed(conn)
        wanted, *others = self.wanted(free, now, sweep)
        began = boottime()
        turn = self.ask(conn, wanted, free, sweep)
        self.settled(conn, turn)
        self.ask_others(conn, turn, others, free, sweep)
        self.plan(conn, turn, free, sweep)
        if turn.asked_at is None and free and wanted:  # not everything has been asked for
            self.look_at, self.nothing_due = min(self.look_at, now + AGAIN_EVERY), False
        self.ask_once_more()
        return self.claimed(conn, turn, began)

    def look(self, conn: db.Connection, now: float, sweep: bool) -> None:
        """Look at the parents of joins and at the moves of asynchronous calls, where it is time."""
        if sweep:
            self.join_look.ask()
            self.move_look.sweep(conn)
        for look in (self.join_look, self.move_look):
            if now >= look.at:
                look.run(conn)

    def tell_failed(self, conn: db.Connection) -> None:
        """Tell people of the calls that have failed: given up, or set failed by their stage."""
        failures = [r for r in self.unwritten if r.outcome not in (*PAID, TAKEN) and not r.is_told]
        is_routed = calls.failed_by_stage(conn, failures)
        calls.note_cancelled(conn, failures)
        for result in failures:
            trigger.note_set_failed(result, is_routed)
            trigger.alert_failure(self.alerts, result, is_routed)
            result.is_told = result.outcome == "failed" or result.call_id in is_routed

    def wanted(self, free: int, now: float, sweep: bool) -> list[list[Wanted]]:
        """The stages to claim calls of, in their turn, and how many of each. They are as many
        claims as it takes to have no two stages of a pool in one: each stage counts the free
        places of its pool for itself.
        """
        if sweep or now - self.marked_at > MARKED_FOR:
            self.marks, self.marked_at = {}, now
        if not free:
            return [[]]
        under_way = self.workers.calls
        held = Counter(self.limits[call.stage].pool for call in under_way)
        claims: list[list[Wanted]] = [[]]
        pools: set[Pool] = set()
        for stage in self.order:
            if stage in self.unclaimable and not sweep:
                continue
            limits = self.limits[stage]
            if limits.pool and held[limits.pool] >= limits.pool.size:
                continue
            if most := self.health.most(stage, free, under_way):
                if limits.pool in pools:
                    claims.append([])
                    pools = set()
                if limits.pool:
                    pools.add(limits.pool)
                lease = limits.timeout + self.settings.LEASE_MARGIN
                share = -(-free // len(self.order))
                claims[-1].append(Wanted(stage, lease, most, share, limits.is_shared,
                                         self.marks.get(stage), self.is_ordered,
                                         waits=stage not in self.unclaimable))  # fmt: skip
        return claims

    def ask(self, conn: db.Connection, wanted: list[Wanted], free: int, sweep: bool) -> Turn:
        """Settle what is unwritten and claim calls of these stages, in parts where that fails."""
        try:
            turn = calls.settle_and_claim(
                conn, self.unwritten, wanted, free, self.name, sweep=sweep
            )
        except db.ConnectionLost:
            raise
        except psycopg2.Error as error:
            reason = ops.first_line(error)
            is_told = self.unclaimable and isinstance(error, LockNotAvailable)
            if not is_told and reason not in self.unclaimable.values():
                log.warning("한 건씩 다시 시도: %s", reason)
            turn = calls.in_parts(conn, self.unwritten, wanted, free, self.name)
            for given_up in turn.given_up:
                trigger.alert_given_up(self.alerts, given_up)
        self.note_unclaimable(conn, turn, wanted)
        return turn

    def note_unclaimable(self, conn: db.Connection, turn: Turn, wanted: list[Wanted]) -> None:
        """Remember the stages of which no call can be claimed: only a sweep asks for them again, so
        that they do not keep the others waiting.

        Raises:
            psycopg2.Error: that holds for all stages, so a new connection may help; but not where
                a table is locked. Never with `once`: serve() fails at its end.
        """
        before = self.unclaimable
        asked = {stage.stage for stage in wanted}
        self.unclaimable = {stage: why for stage, why in before.items() if stage not in asked}
        for stage, error in turn.unclaimable.items():
            self.unclaimable[stage] = why_unclaimable(conn, stage, error)
            if self.unclaimable[stage] != before.get(stage):
                log.error("단계의 호출을 가져올 수 없음 (%.0f초마다 다시 시도): stage=%s %s",
                          LONGEST_SLEEP, stage, self.unclaimable[stage])  # fmt: skip
        if turn.claimed or self.unwritten:
            return
        refused = [error for error in turn.unclaimable.values()
                   if not isinstance(error, LockNotAvailable)]  # fmt: skip
        if refused and not self.once and len(self.unclaimable) == len(self.order):
            raise refused[0]

    def told_unclaimable(self) -> str:
        """Of which stages no call can be claimed, and why; in the order of the pipeline, so that
        all listeners say the same.
        """
        stages: dict[str, list[str]] = {}
        for stage in self.limits:
            if stage in self.unclaimable:
                stages.setdefault(self.unclaimable[stage], []).append(stage)
        said = (f"{', '.join(names)}: {why}" for why, names in stages.items())
        return UNCLAIMABLE + "; ".join(said)

    def settled(self, conn: db.Connection, turn: Turn) -> None:
        """The results are in the database; those whose row is locked are settled again later."""
        self.reason, self.repeats, self.is_waiting = "", 0, False
        again = set(turn.unsettled)
        # Its hold, if any, has begun: settling it again must not lengthen it.
        self.locked += [
            replace(r, hold=False, was_locked=True) for r in self.unwritten if r.call_id in again
        ]
        if any(result.delay is not None for result in self.unwritten):
            self.due_at = 0.0
        if any(result.outcome == TAKEN for result in self.unwritten):
            self.move_look.ask()  # the row may have moved on before
        # Settle a result once more whose row was locked until now: its stage may have committed
        # `failed` between tell_failed() and this settling.
        self.unwritten = [
            replace(r, was_locked=False) for r in self.unwritten
            if r.was_locked and r.delay is not None and r.call_id not in again
        ]  # fmt: skip
        for result in self.health.to_revive:
            log.warning(
                "포기한 호출을 되살림 (단계의 문제): job=%s stage=%s", result.job_id, result.stage
            )
            calls.revive(conn, result)
        self.health.to_revive = []

    def ask_others(
        self, conn: db.Connection, turn: Turn, others: list[list[Wanted]], free: int, sweep: bool
    ) -> None:
        """Go on to claim while workers are idle, until a claim is refused, which may have taken
        seconds. What is claimed by then is kept, and the next turn begins with what is left.
        """
        while others and turn.asked_at and len(turn.claimed) < free:
            try:
                turn.add(self.ask(conn, others.pop(0), free - len(turn.claimed), sweep))
            except psycopg2.Error:
                if not turn.claimed:
                    raise
                turn.asked_at = None
        if turn.asked_at is None:
            left = {wanted.stage for claim in others for wanted in claim}
            self.order.sort(key=lambda stage: stage not in left)

    def plan(self, conn: db.Connection, turn: Turn, free: int, sweep: bool) -> None:
        """When to look again."""
        now = time.monotonic()
        if sweep:
            is_told, settings = self.hearing.is_told, self.settings
            every = settings.SWEEP_INTERVAL if is_told else settings.POLL_INTERVAL
            self.sweep_at, self.due_at = now + every, 0.0
            asked_at = turn.asked_at
            if asked_at and any(row.was_due_at > asked_at + EARLY for row in turn.claimed):
                self.upkeep.note_clock_set_back()
        if self.unclaimable:
            self.sweep_at = min(self.sweep_at, now + LONGEST_SLEEP)
        left = [row.stage for row in turn.claimed if self.leaves_places(row.stage)]
        if left:
            calls.wake_waiting(conn, left)
        self.nothing_due = False
        was_full, self.was_full = self.was_full, len(turn.claimed) >= free
        if self.was_full:
            self.look_at = 0.0  # there may be more, as soon as a worker is idle
            if was_full and not sweep:
                self.marks |= {row.stage: row.was_due_at for row in turn.claimed}
        elif self.marks or left:
            self.look_at, self.marks = 0.0, {}  # there may be something before the marks
        else:
            self.asked_at = turn.asked_at
            # A new call may have to wait for its time, or for a rate.
            self.asks_when = self.is_ordered or now >= self.due_at
            self.look_at = self.due_at if now < self.due_at else math.inf
            self.nothing_due = not turn.claimed and self.join_look.at == math.inf

    def ask_once_more(self) -> None:
        """With `once`, before the end: ask again for stages of which no call could be claimed, once
        for each, as a lock may be gone.
        """
        left = self.unclaimable.keys() - self.asked_again
        if self.once and self.nothing_due and left and not self.workers.calls:
            self.asked_again |= left
            self.sweep_at, self.nothing_due = 0.0, False

    def leaves_places(self, stage: str) -> bool:
        """Whether the pool of a claimed call may have more places, which it kept for this stage."""
        pool = self.limits[stage].pool
        return pool is not None and pool.linger is not None and pool.size > 1

    def ask_when(self, conn: db.Connection) -> None:
        """Ask when the next call will be due, where a claim found less than there are workers."""
        if not self.asks_when:
            return
        seconds = calls.next_due(conn, self.order, self.asked_at)
        self.due_at = math.inf if seconds is None else time.monotonic() + seconds
        self.look_at, self.asks_when = min(self.look_at, self.due_at), False

    def claimed(self, conn: db.Connection, turn: Turn, began: float) -> list[Call]:
        """The calls to make; what came of the others is kept, or they were put off."""
        to_make = []
        under_way = {(call.call_id, call.key, call.attempt) for call in self.workers.calls}
        covered_until = began + self.settings.LEASE_MARGIN
        for row in turn.claimed:
            self.order.remove(row.stage)
            self.order.append(row.stage)
            if row.taken_over:
                reap(conn)
            if (row.call_id, row.key, row.attempt) in under_way:
                continue  # a new primary did not know that we had claimed it
            table = self.tables.get(row.table_name) or Table(row.table_name, id="id")
            limits = self.limits[row.stage]
            call = pipeline.claimed_call(row, table, limits, self.name, covered_until)
            function = self.workers.trigger.routes.get(call.route)
            if function is None or not function.__name__ == row.stage == row.routed_to:
                self.pass_over(conn, call, row)
            elif ended := self.ended_unmade(conn, call, row):
                self.keep(call, ended)
            elif not self.put_off_after_failed(conn, call, row):
                if row.join_of:
                    joins.note_parent(conn, row)
                to_make.append(call)
        return to_make

    def ended_unmade(self, conn: db.Connection, call: Call, row: Claimed) -> Result | None:
        """The result of a call that must not be made; None where it must. If the join of such a
        call is not complete, or has changed, its parent is looked at again.
        """
        owed = row.owed or calls.is_owed(conn, row, self.name)
        known = self.accepted.get((row.call_id, row.key), 0)
        accepted = row.accepted or known == math.inf
        ended = trigger.refused(call, row, owed, accepted, taken=row.attempt <= known)
        is_open = not (row.is_complete or accepted)
        if ended is None and row.join_of and joins.has_look(conn, row):
            ended, is_open = trigger.outdated(call), True
        if ended is not None and row.join_of and row.job_found and is_open:
            joins.reopen(conn, row)
            self.join_look.ask()
        return ended

    def pass_over(self, conn: db.Connection, call: Call, row: Claimed) -> None:
        """Do not make a call that not both this PIPELINE and the database's have. Where one of them
        knows its state, it waits for a listener of the other, or for an install; else it fails.
        """
        if row.routed_to or call.route in self.workers.trigger.routes:
            calls.put_off(conn, row, self.name, row.spent - 1, PASSED_OVER_FOR, row.last_error)
            if call.route not in self.passed_over:
                self.passed_over.add(call.route)
                log.warning("다른 PIPELINE의 호출을 미룸 (make trigger 후 재시작 필요): %s → %s",
                            call.route, row.routed_to or call.stage)  # fmt: skip
            return
        error = f"PIPELINE has no {call.route} any more"
        ended = trigger.failure(call, "retry", error, self.settings.RETRY_DELAY)
        trigger.log_end(call, ended)
        self.keep(call, ended)

    def put_off_after_failed(self, conn: db.Connection, call: Call, row: Claimed) -> bool:
        """Let a call that (stage, 'failed') owes to that stage wait, or give it up; whether it did.

        It takes over attempts and back-off of the call before it, or a stage that always fails
        would be called for ever. A call with an error is made: a person has asked for it.
        """
        if (
            call.spent > 1
            or row.last_error
            or (call.current_step, call.status) != (call.stage, "failed")
        ):
            return False
        reap(conn)  # the call before it may be one that was lost
        before = calls.spent_before(conn, row)
        if before is None or before.spent < 1:
            return False
        error = f"{before.error or trigger.SET_FAILED}"
        if before.spent >= call.max_attempts:
            call.spent = before.spent
            if "the last one)" not in error:
                error += f" (attempt {call.spent}, the last one)"
            self.keep(call, trigger.given_up(call, error))
        else:
            delay = trigger.backoff(before.spent, self.settings.RETRY_DELAY)
            calls.put_off(conn, row, self.name, before.spent, delay, error)
            self.look_at = self.due_at = 0.0
        return True

    # --- what comes in ---

    @property
    def next_look(self) -> float:
        """time.monotonic() of the next turn. Only with an idle worker it looks for due calls."""
        times = [self.move_look.at]
        if self.locked or self.gives_back:
            times.append(self.again_at)
        if self.workers.idle and not self.is_stopping:
            times += [self.look_at, self.sweep_at, self.join_look.at]
        return min(times, default=math.inf)

    def wait(self, until: float, conn: db.Connection | None = None) -> list:
        """Sleep until something can be read, or until time.monotonic() is `until`. Then see to
        signals, alerts, the other hosts and orphans.

        Raises:
            hosts.OldPrimary: the listener is connected to one.
        """
        self.obey()  # a signal that came during a statement wakes no select() any more
        now = time.monotonic()
        until = min(until, self.workers.next_deadline, self.alerts.next_look, now + LONGEST_SLEEP)
        # A notification that arrived with the answer of a statement has been read from the socket
        # already, so select() would not wake for it.
        waits = not (self.finished() or (conn and (self.unwritten or conn.notifies)))
        seconds = max(0.0, until - now) if waits else 0.0
        if conn and self.unclaimable:
            doing = self.told_unclaimable()
        elif conn:
            doing = "making calls" if self.workers.calls else "waiting for a job to change"
        else:
            doing = f"database away: {self.reason}"
        if self.upkeep.differs_since is not None:
            doing = f"{OTHER_PIPELINE}; {doing}"
        self.beat(doing, seconds)
        reading: list[Any] = [self.signals, *self.workers.reading, *([conn] if conn else [])]
        ready, _, _ = select.select(reading, self.workers.writing, [], seconds)
        if self.signals in ready:
            self.signals.drain()
        self.obey()
        self.alerts.look()
        if problem := self.hosts.look():
            log.error("프라이머리가 둘: %s", problem)
            self.alerts.send("split_brain", problem)
        if conn:
            self.hosts.require_latest()
        if self.signals.child_ended:
            reap_orphans([*self.workers.pids, *self.alerts.pids, *self.hosts.pids])
        return ready

    def obey(self) -> None:
        """The first signal: claim no more. The second: exit at once; leases protect the calls."""
        if len(self.signals.stops) > 1:
            self.workers.stop()
            raise SystemExit(128 + self.signals.stops[-1])
        if self.signals.stops and not self.has_obeyed:
            self.has_obeyed = True
            waited = ", ".join(f"{call.stage} {call.job_id}" for call in self.workers.calls)
            if waited:
                log.info(
                    "중지 요청: 진행 중인 호출을 기다림 (%s), 한 번 더 요청하면 바로 중지", waited
                )

    def hear(self, conn: db.Connection) -> None:
        """Whatever is announced only means: look now. A statement may have read it already."""
        was_told = self.hearing.is_told
        if heard := self.hearing.hear(conn):
            self.look_at = 0.0
            if db.WAKE_CHANNEL in heard:
                self.due_at = 0.0  # a hold may have ended before its time
            if db.JOIN_CHANNEL in heard:
                self.join_look.ask()
            self.move_look.ask()
        if was_told and not self.hearing.is_told:  # sweeps come sooner from now on
            self.sweep_at = 0.0

    def collect(self, ready: list) -> None:
        """Take the results of calls that have ended."""
        for call, ended in self.workers.collect(ready):
            ended = self.health.revised(call, ended)
            trigger.log_end(call, ended)
            if ended.outcome == "released":
                self.gives_back = True
                self.look_at, self.again_at, self.nothing_due = 0.0, 0.0, False
            else:
                self.keep(call, ended)

    def keep(self, call: Call, ended: Result) -> None:
        """Keep a result until the database has it."""
        self.unwritten.append(ended)
        if ended.outcome in ("succeeded", TAKEN):
            attempt = ended.attempt if ended.outcome == TAKEN else math.inf
            self.accepted[call.call_id, call.key] = attempt
            if len(self.accepted) > REMEMBERED:
                self.accepted.popitem(last=False)

    def give_back(self, conn: db.Connection) -> None:
        """Free what was claimed in our name and never begun: the answer to the claim was lost, or
        the lease was too short for the call.
        """
        keep = [call.call_id for call in self.workers.calls]
        keep += [result.call_id for result in (*self.locked, *self.unwritten)]
        found = calls.give_back(conn, self.name, keep)
        self.gives_back = found.locked > 0  # by the application
        if found.given_back:
            log.info("시작하지 않은 호출 %d건을 되돌림", found.given_back)

    def beat(self, doing: str, seconds: float) -> None:
        self.heartbeat.beat(doing, seconds + HEARTBEAT_MARGIN)

    def beat_for_answer(self) -> None:
        """Statements that take long, one after the other, do not look like a frozen listener."""
        if self.heartbeat.valid_until - time.monotonic() < HEARTBEAT_MARGIN - LONGEST_SLEEP:
            self.beat("asking the database", LONGEST_SLEEP)

    def beat_for_host(self, host: str) -> None:
        self.beat("connecting to the database", CONNECTING)


def why_unclaimable(conn: db.Connection, stage: str, error: psycopg2.Error) -> str:
    """Why no call of a stage can be claimed; of a locked table, who has locked it."""
    tables = [route.table for route, function in pipeline.routes().items()
              if function.__name__ == stage]  # fmt: skip
    if isinstance(error, LockNotAvailable):
        with contextlib.suppress(psycopg2.Error):  # calls that were claimed meanwhile are made
            return locked(conn, *tables)
    return ops.first_line(error)


def listener_name() -> str:
    """Unique even where a restarted container has the same host name and pid."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def idle(settings: SimpleNamespace, signals: Signals, once: bool) -> None:
    """Disabled: stay alive and do nothing, so that no container restarts in a circle; `once` only
    says so.
    """
    off = config.why_off(settings)
    if once:
        log.warning("Job State Listener 비활성화됨: %s", off)
        return
    log.warning("Job State Listener 비활성화됨: %s, 대기만 함", off)
    heartbeat = Heartbeat(settings.HEARTBEAT_DIR, listener_name())
    while not signals.requested:
        heartbeat.beat(f"disabled by {off}", 2 * HEARTBEAT_MARGIN)
        select.select([signals], [], [], HEARTBEAT_MARGIN)
        signals.drain()
    heartbeat.close()
    log.info("Job State Listener 중지됨")


# --- the command line ----------------------------------------------------------------------


@click.group(
    cls=ops.Commands,
    invoke_without_command=True,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(ops.VERSION, message=ops.VERSIONS, help="Show the version and exit.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Let a PostgreSQL table drive a pipeline of HTTP services.

    Without a command: run. Settings come from the environment and .env (see .env.example).

    \b
    Exit codes: 0 done or healthy; 1 a problem was found, the line says which;
    2 bad input or settings, or run cannot start; 3 the database cannot be reached, or
    refuses the login.
    """
    if context.invoked_subcommand is None:
        context.invoke(run)


@cli.command(short_help="Listen, and call the next stage of each job that ends one.")
@click.option("--workers", type=click.IntRange(1, 256),
              help="Calls at once on this host; default: LISTENER_WORKERS.")  # fmt: skip
@click.option("--stage", "only", multiple=True, type=StageName(), metavar="STAGE",
              help="Call only this stage; may be repeated.")  # fmt: skip
@click.option("--once", is_flag=True, help="Run until nothing is due, then exit: for cron.")
def run(workers: int | None = None, only: tuple[str, ...] = (), once: bool = False) -> None:
    """Listen, and call the next stage of every job that finishes one.

    With --once, what waits for its next attempt, or for a hold, a limit or a rate, is left for the
    next run. So are calls of a table that is locked or cannot be read; it then exits with 1, after
    all others.
    """
    settings = config.settings()
    if settings.LISTENER_ENABLED:
        config.require_database(settings)
    logs.set_up(settings)
    # What is loaded is frozen: a collection would go through all of it, and in a worker it would
    # copy the memory that is shared with the listener.
    gc.freeze()
    signals = Signals()
    try:
        if settings.LISTENER_ENABLED:
            Listener(settings, signals, workers or settings.LISTENER_WORKERS, only, once).serve()
        else:
            idle(settings, signals, once)
    except ops.Problem as problem:
        log.error("시작할 수 없음: %s", problem)
        sys.exit(ops.EXIT_CANNOT_START)
    except psycopg2.Error as error:  # only --once gives up
        log.error("리스너 오류 발생: %s", " ".join(str(error).split()))
        away = isinstance(error, db.ConnectionLost)
        sys.exit(ops.EXIT_DATABASE_AWAY if away else ops.EXIT_PROBLEM)


@cli.command(cls=RowCommand, short_help="Run the call that JOB_ID owes, now and in this process.")
@click.argument("job_id")
@click.option("--stage", type=StageName(), metavar="STAGE",
              help="The call to this stage, where several are owed.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="Print what the stage function would send; claim and send nothing.")  # fmt: skip
@TABLE
def call(job_id: str, stage: str | None, dry_run: bool, table: str | None) -> None:
    """Run the call that JOB_ID owes, now and in this process; exit 0 only if it succeeded.

    JOB_ID is the id of a job or of a row of another table of the pipeline.

    To step through it: .venv/bin/python -m pdb listener.py call JOB_ID. The claim keeps every
    listener away from it for its timeout and LEASE_MARGIN; a call that outlasts that at the prompt
    is not made. Neither a back-off nor a hold nor having been given up keeps it from being run.
    """
    from ops import preview, rows, steer  # `run` does without

    settings = config.settings()
    logs.set_up(settings)
    name = listener_name()
    conn = db.connect(settings, db.CALL_APPLICATION + name, pinned=True)
    ops.require_installed(conn)
    row = rows.find(conn, job_id, table)
    if dry_run:
        return preview.show(conn, settings, row, stage)
    sys.exit(0 if steer.call_by_hand(conn, settings, name, row, stage) else 1)


if __name__ == "__main__":
    ops.main(cli)
