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
from types import SimpleNamespace
from typing import Any

import click
import psycopg2

import calls
import config
import db
import failures
import hosts
import logs
import notifications
import one_by_one
import ops
import pipeline
import trigger
from alerts import Alerts
from calls import TAKEN, Result, Turn, Wanted
from checks import Checks, identity
from claiming import Claiming, is_clock_set_back
from health import StageHealth
from heartbeat import Heartbeat
from looks import Failing, JoinLook, MoveLook
from ops.listeners import ALL_BUSY, AS_OF, NO_CALL, ONE_CALL, OTHER_PIPELINE, STOPPING
from ops.rows import TABLE, RowCommand
from ops.stage import StageName
from ops.table import clock, counted
from ops.text import Text
from pipeline import Call
from settling import Unwritten
from signals import Signals, reap_orphans
from trigger import boottime
from upkeep import Upkeep, store_timeouts
from workers import Workers

log = logging.getLogger("listener")

# The longest sleep, and what a heartbeat allows for a few statements on top of it (seconds). A
# frozen listener is noticed by `check` within the sum.
LONGEST_SLEEP = 5.0
HEARTBEAT_MARGIN = 20.0
# Seconds that a heartbeat allows for connecting to one host. Without a DNS server that answers,
# resolving its name takes more than 40, and then each address may take connect_timeout.
CONNECTING = 100.0
# Seconds between two tries to settle the results of calls whose rows are locked, and to give back
# claims that were not begun.
AGAIN_EVERY = 1.0
# Seconds for which a statement that was sent on a lost connection may still take effect.
DOUBTFUL = 600.0


class Listener:
    """Hears, claims and settles; its workers call."""

    def __init__(self, settings: SimpleNamespace, signals: Signals, size: int,
                 only: tuple[str, ...] = (), once: bool = False):  # fmt: skip
        self.settings, self.signals, self.once = settings, signals, once
        self.name = listener_name()
        self.heartbeat = Heartbeat(settings.HEARTBEAT_DIR, self.name)
        self.workers = Workers(settings, size, signals, self.heartbeat)
        self.alerts = Alerts(settings)
        self.hosts = hosts.Watch(settings)
        self.hearing = notifications.Hearing(settings)
        self.health = StageHealth(settings, self.alerts)
        self.claiming = Claiming(settings, self.health, only)
        self.checks = Checks(settings)
        self.unwritten = Unwritten(self.alerts)
        self.failing = Failing(settings, self.alerts)
        self.join_look = JoinLook(self.failing, once)
        self.move_look = MoveLook(settings, self.alerts, self.failing, once)
        self.upkeep = Upkeep(settings, self.name, self.alerts, self.claiming)

        self.nothing_due = False  # the last turn found nothing, and no look at joins is pending
        self.has_unbegun = False  # a claim that we never began is still to be given back
        self.is_installed = False  # whether the database has this PIPELINE
        self.problem: ops.Problem | None = None  # why this program must not go on
        self.has_told_stop = False  # said, after the first request to stop, what is waited for
        self.reason, self.repeats = "", 0  # of the last failure; how often in a row
        self.is_away = False  # that failure was the loss of the connection
        self.is_stuck_told = False  # said: no call of any stage could be claimed for ALERT_AFTER
        self.target: int | None = None  # which of db.targets() the last connection led to
        self.is_standby_away = False  # said: commits wait for a synchronous standby
        # By time.monotonic().
        self.again_at = 0.0  # see AGAIN_EVERY
        self.doubtful_until = -math.inf  # until then a claim of ours may exist that we do not know
        self.stuck_since: float | None = None  # since then no call of any stage could be claimed

    # --- connect, work, and once more ---

    def serve(self) -> None:
        """Work until told to stop, and on until every result is written.

        Raises:
            ops.Problem: the database does not know this PIPELINE.
            psycopg2.Error: with `once`, which does not wait for better times.
        """
        log.info("Job State Listener 시작: listener=%s workers=%d stages=%s",
                 self.name, self.workers.size, self.claiming.order)  # fmt: skip
        try:
            while not self.finished():
                ended_by: Exception | None = None
                try:
                    with contextlib.closing(self.connect()) as conn:
                        self.work(conn)
                except ops.Problem as problem:
                    self.problem = problem  # calls under way are finished
                    ended_by = problem if self.has_work else None
                except Exception as error:
                    if self.once and not self.has_work:
                        raise
                    ended_by = error
                if ended_by:  # not within `except`: a worker forked there would inherit the error
                    self.wait_to_reconnect(ended_by)
        finally:
            if not self.has_work:  # else a bug ended the loop: they finish and write their results
                self.workers.kill_all()
            self.alerts.close(self.signals)
            self.hosts.close()
            self.heartbeat.close()
        for failure in (self.problem, self.join_look.failure, self.move_look.failure):
            if failure:
                raise failure
        if self.once and self.claiming.unclaimable and not self.signals.requested:
            raise psycopg2.Error(f"{NO_CALL}{self.claiming.undone} → {pipeline.JSL} verify")
        log.info("Job State Listener 중지됨: listener=%s", self.name)

    def connect(self) -> db.Connection:
        """A connection to the primary, ready for work."""
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
        """Check a new connection, and set it up. LISTEN comes before the first look for due calls,
        so that nothing falls between.
        """
        self.hosts.check_new_connection(conn, self.beat_for_host)
        self.beat("asking the database", LONGEST_SLEEP)
        info = conn.info
        log.info("PostgreSQL 연결 성공: %s:%s/%s", info.host, info.port, info.dbname)
        self.end_waiting(conn)
        announced = ops.announced(conn)
        # Without triggers of ours (None), the database may have been made anew.
        if not self.is_installed or announced is None:
            try:
                ops.require_installed(conn)
            except ops.Problem as problem:
                under_way = bool(self.workers.calls)
                self.unwritten.settle_last(conn, self.name, problem, under_way)
                raise
        if not self.is_installed:
            store_timeouts(conn, pipeline.timeouts(self.settings))
            self.upkeep.tell_absence(conn)
            self.is_installed = True
            if (left := hosts.connections_left(conn)) < hosts.FEW:
                log.warning("남은 데이터베이스 연결이 %d개뿐", left)
        db.name_session(conn, self.name)
        self.hearing.listen(conn, silent=announced == "nothing")
        self.workers.conn = conn
        self.give_back(conn)
        self.claiming.claim_at = self.claiming.sweep_at = 0.0

    def end_waiting(self, conn: db.Connection) -> None:
        """End the sessions of lost connections. If they wait for a standby, say so once."""
        if db.end_waiting(conn) and not self.is_standby_away:
            self.is_standby_away = True
            log.error("커밋이 응답 없는 동기 스탠바이를 기다림: 남은 세션을 종료하며 계속 시도")
            text = "commits wait for a synchronous standby that does not answer"
            self.alerts.send("standby_away", text, host=conn.info.host)

    def work(self, conn: db.Connection) -> None:
        """The loop."""
        while not self.finished():
            self.workers.start_missing()
            try:
                claimed = self.settle_and_claim(conn)
            except db.ConnectionLost:
                raise
            except psycopg2.Error:
                self.upkeep.run(conn)  # else it would never run while every turn fails
                raise
            for call in claimed:
                self.workers.give(call)
            try:
                self.hear(conn)  # notifications that came with the answer to the claim
            finally:  # also where the connection is lost
                # The workers have their calls by now, so none of them waits for these lines.
                self.hearing.log()
                for call in claimed:
                    trigger.log_begin(call)
            self.claiming.ask_when(conn)
            self.hosts.ping(conn)
            self.upkeep.run(conn)
            ready = self.wait(min(self.next_turn, self.upkeep.next_run), conn)
            self.run_beside(conn)
            self.collect(ready)
            if conn in ready or conn.notifies:
                self.hear(conn)
        if self.is_doubtful:
            self.give_back(conn)  # nobody else would before its lease is over

    def wait_to_reconnect(self, error: Exception) -> None:
        """Say what happened, each reason once and then only counted; calls under way go on."""
        said = ops.first_line(error) if isinstance(error, psycopg2.Error) else str(error)
        self.is_away = isinstance(error, db.ConnectionLost)
        reason = " ".join(f"{type(error).__name__}: {said}".split())
        delay = self.settings.JOB_STATE_LISTENER_RECONNECT_DELAY * random.uniform(0.5, 1.0)
        if reason != self.reason:
            bug = error if not isinstance(error, (psycopg2.Error, ops.Problem)) else None
            log.error("리스너 오류 발생: %s", reason, exc_info=bug)
            self.reason, self.repeats = reason, 0
            if isinstance(error, hosts.OldPrimary):
                self.alerts.send("split_brain", str(error))
        self.tell_stuck(reason)
        self.repeats += 1
        if self.repeats & (self.repeats - 1) == 0:  # 1, 2, 4, 8 and so on
            log.warning("재연결 시도: %.1f초 후 (%d번째): %s", delay, self.repeats, reason[:200])
        until = time.monotonic() + delay
        self.doubtful_until = time.monotonic() + DOUBTFUL
        while time.monotonic() < until and not self.finished():
            self.workers.start_missing()
            ready = self.wait(until)
            self.run_beside()
            self.collect(ready)

    def tell_stuck(self, reason: str) -> None:
        """Tell people where nothing could be claimed for ALERT_AFTER seconds."""
        now = time.monotonic()
        self.stuck_since = self.stuck_since or now
        if now - self.stuck_since >= self.settings.ALERT_AFTER and not self.is_stuck_told:
            self.is_stuck_told = True
            text = f"listener {self.name} can claim no calls: {reason}"
            self.alerts.send("database_away", text, reason=reason)

    def note_success(self) -> None:
        """A turn has succeeded: what was said of failures is over."""
        self.reason, self.repeats = "", 0
        if self.is_stuck_told:
            text = f"listener {self.name} claims and settles calls again"
            self.alerts.send_recovered("database_away", None, text)
        self.stuck_since, self.is_stuck_told = None, False

    @property
    def has_work(self) -> bool:
        """Whether there are calls under way, or results that are not written."""
        return bool(self.workers.calls or self.unwritten.results)

    def finished(self) -> bool:
        return not self.has_work and (self.is_stopping or (self.once and self.nothing_due))

    @property
    def is_stopping(self) -> bool:
        """Whether no further call is claimed."""
        return self.signals.requested or self.problem is not None

    @property
    def is_doubtful(self) -> bool:
        """Whether there may be a claim of ours that is not under way."""
        return self.has_unbegun or time.monotonic() < self.doubtful_until

    # --- one turn ---

    def settle_and_claim(self, conn: db.Connection) -> list[Call]:
        """Run the looks that are due. Then settle all results and claim a call for each idle
        worker: one round trip, one commit. Stages of one pool need a claim each; the further claims
        follow while workers are idle.
        """
        now = time.monotonic()
        if not self.unwritten.results and now < self.next_turn:
            return []
        free = 0 if self.is_stopping else len(self.workers.idle)
        sweep = free > 0 and now >= self.claiming.sweep_at
        self.run_looks(conn, now, sweep)
        if now >= self.again_at:
            self.again_at = now + AGAIN_EVERY
            self.unwritten.retry_locked()
            if self.is_doubtful:
                self.give_back(conn)
        self.unwritten.mark_and_tell_failed(conn)
        wanted, *further = self.claiming.wanted(free, self.workers.calls, sweep)
        leased_from = boottime()  # before the claim is sent
        turn = self.at_once_or_one_by_one(conn, self.unwritten.results, wanted, free, sweep)
        self.note_turn(conn, turn)
        if turn.refusal:
            raise turn.refusal
        self.claim_further(conn, turn, further, free, sweep)
        if sweep and is_clock_set_back(turn):
            self.upkeep.note_clock_set_back()
        swept = self.sweep_interval if sweep else None
        found_nothing = self.claiming.plan(conn, turn, free, swept)
        self.nothing_due = found_nothing and self.join_look.at == math.inf
        # After plan(), as it may bring the next turn forward.
        return self.to_make(conn, turn, leased_from)

    @property
    def sweep_interval(self) -> float:
        """Seconds. Without notifications, sweeps are the only way to hear of anything."""
        settings = self.settings
        return settings.SWEEP_INTERVAL if self.hearing.is_notified else settings.POLL_INTERVAL

    def run_looks(self, conn: db.Connection, now: float, sweep: bool) -> None:
        """Look at the parents of joins and at the moves of asynchronous calls, where it is time."""
        if sweep:
            self.join_look.ask()
            self.move_look.sweep(conn)
        for look in (self.join_look, self.move_look):
            if now >= look.at:
                look.run(conn)

    def at_once_or_one_by_one(
        self,
        conn: db.Connection,
        results: list[Result],
        wanted: list[Wanted],
        free: int,
        sweep: bool,
    ) -> Turn:
        """Settle these results and claim calls of these stages; one by one where that fails."""
        given = conn, results, wanted, free, self.name, sweep
        try:
            turn = calls.run_turn(*given, self.claiming.extend_by)
            if turn.asked_at:
                self.claiming.claimed_at = time.monotonic()
        except db.ConnectionLost:
            raise
        except psycopg2.Error as error:
            if not self.claiming.is_logged(error):
                log.warning("한 건씩 다시 시도: %s", ops.first_line(error))
            turn = one_by_one.run_turn_in_parts(*given, self.claiming.extend_by)
            for given_up in turn.given_up:
                failures.tell_given_up(self.alerts, given_up)
        self.claiming.note_unclaimable(conn, turn)
        error_of_all = self.claiming.error_of_all_stages(turn)
        if error_of_all and not (results or self.once):
            raise error_of_all  # with `once`, serve() fails at its end
        return turn

    def note_turn(self, conn: db.Connection, turn: Turn) -> None:
        """Note that a turn has ended: its results are in the database. Those whose row is locked,
        or which it has refused, are settled again later.
        """
        if self.claiming.is_none_claimable:
            self.tell_stuck(NO_CALL + self.claiming.undone)
        elif turn.refusal is None:
            self.note_success()
        if turn.claimed:  # a turn that writes nothing waits for no standby
            self.is_standby_away = False
        if any(result.delay is not None for result in self.unwritten.results):
            self.claiming.due_at = 0.0  # a retry may be due before what was to be the next call
        if any(result.outcome == TAKEN for result in self.unwritten.results):
            self.move_look.ask()  # the row may have moved on before this was written
        self.unwritten.note_settled(turn)
        self.health.revive(conn, [result.call_id for result in self.unwritten.all])

    def claim_further(
        self, conn: db.Connection, turn: Turn, further: list[list[Wanted]], free: int, sweep: bool
    ) -> None:
        """Make the further claims while workers are idle, until one is refused, which may have
        taken seconds. What is claimed by then is kept, and the next turn begins with what is left.
        """
        while further and not turn.is_partial and len(turn.claimed) < free:
            try:
                left = free - len(turn.claimed)
                later = self.at_once_or_one_by_one(conn, [], further.pop(0), left, sweep)
            except psycopg2.Error:
                if not turn.claimed:
                    raise
                turn.is_partial = True
            else:
                turn.claimed += later.claimed
                turn.is_partial = later.is_partial
        if turn.is_partial:
            self.claiming.put_first(further)

    def to_make(self, conn: db.Connection, turn: Turn, leased_from: float) -> list[Call]:
        """The claimed calls that are to be made. The others are put off, or have a result, which is
        kept.
        """
        to_make = []
        if any(row.taken_over for row in turn.claimed):
            failures.reap(conn, self.settings)  # before the history has newer attempts
        under_way = {(identity(call), call.attempt) for call in self.workers.calls}
        for row in turn.claimed:
            self.claiming.put_last(row.stage)
            if (identity(row), row.attempt) in under_way:
                continue  # we have claimed it before, but a new primary has lost that claim
            limits = self.claiming.limits[row.stage]
            call = pipeline.claimed_call(row, limits, self.name, leased_from, conn.target)
            checked = self.checks.check(conn, call, row)
            if checked.is_to_make:
                to_make.append(call)
            elif checked.ended:
                self.keep(call, checked.ended)
                if call.join:
                    self.join_look.ask()
            else:  # put off: the next turn asks when it is due
                self.claiming.claim_at = self.claiming.due_at = 0.0
        return to_make

    # --- what comes in ---

    @property
    def next_turn(self) -> float:
        """time.monotonic() of the next turn. It needs an idle worker to look for due calls."""
        times = [self.move_look.at]
        if self.unwritten.locked or self.has_unbegun:
            times.append(self.again_at)
        if self.workers.idle and not self.is_stopping:
            times += [self.claiming.claim_at, self.claiming.sweep_at, self.join_look.at]
        return min(times)

    def wait(self, until: float, conn: db.Connection | None = None) -> list:
        """Sleep until something can be read, or until time.monotonic() is `until`. Returns what can
        be read.
        """
        self.obey()  # select() does not wake for a signal that came during a statement
        now = time.monotonic()
        until = min(until, self.workers.next_deadline, self.alerts.next_run, now + LONGEST_SLEEP)
        # A notification that arrived with the answer of a statement has been read from the socket
        # already, so select() would not wake for it.
        waits = not (self.finished() or (conn and (self.unwritten.results or conn.notifies)))
        seconds = max(0.0, until - now) if waits else 0.0
        self.beat(self.doing(conn), seconds)
        reading: list[Any] = [self.signals, *self.workers.reading, *([conn] if conn else [])]
        ready, _, _ = select.select(reading, self.workers.writing, [], seconds)
        if self.signals in ready:
            self.signals.drain()
        self.obey()
        return ready

    def doing(self, conn: db.Connection | None) -> str:
        """What the heartbeat says while the loop sleeps."""
        undone, seen_at = self.claiming.undone, self.claiming.undone_at
        if undone and seen_at and not self.workers.idle:  # no claim asks again while all are busy
            undone += AS_OF + clock(seen_at)
        undone = "; ".join(filter(None, (undone, *self.failing.said.values())))
        if conn is None:
            doing = f"{'database away' if self.is_away else 'trying again'}: {self.reason}"
        elif undone:
            doing = NO_CALL + undone
        else:
            doing = "making calls" if self.workers.calls else "waiting for a job to change"
            if self.workers.calls and not self.workers.idle:
                doing += f", {ALL_BUSY}"
            if kept := self.health.kept(self.workers.calls):
                doing += f"; {ONE_CALL}{kept}"
        if self.is_stopping:
            counts = {"call": len(self.workers.calls), "result": len(self.unwritten.results)}
            waited = " and ".join(counted(n, what) for what, n in counts.items() if n)
            stopping = f"{STOPPING}{waited or 'nothing'}"
            doing = f"{stopping}; {doing}" if conn is None else stopping
        return f"{OTHER_PIPELINE}; {doing}" if self.upkeep.differs_since is not None else doing

    def run_beside(self, conn: db.Connection | None = None) -> None:
        """See to what runs beside the loop: alerts, the other hosts of the database, orphans.

        Raises:
            hosts.OldPrimary: the listener is connected to one.
        """
        self.alerts.run()
        if problem := self.hosts.look():
            log.error("프라이머리가 둘: %s", problem)
            self.alerts.send("split_brain", problem)
        if conn:
            self.hosts.require_latest()
        if self.signals.child_ended:  # workers.collect(), which comes next, resets it
            reap_orphans([*self.workers.pids, *self.alerts.pids, *self.hosts.pids])

    def obey(self) -> None:
        """See to requests to stop. After the first, which ends claiming (see is_stopping), say what
        is waited for. After the second, exit at once; leases protect the calls.
        """
        stops = self.signals.stops
        results = len(self.unwritten.results)
        if len(stops) > 1:
            if self.workers.calls or results:
                log.warning("바로 중지: 호출 %d건, 기록 못 한 결과 %d건은 리스 만료 후 다시 확인됨",
                            len(self.workers.calls), results)  # fmt: skip
            self.workers.kill_all()
            raise SystemExit(128 + stops[-1])
        if stops and not self.has_told_stop:
            self.has_told_stop = True
            waited = ", ".join(f"{call.stage} {call.key}" for call in self.workers.calls)
            once_more = "한 번 더 요청하면 바로 중지"
            if waited:
                log.info("중지 요청: 진행 중인 호출을 기다림 (%s), %s", waited, once_more)
            if results:
                log.info("중지 요청: 결과 %d건이 기록되기를 기다림, %s되며 성공한 호출도 "
                         "리스 만료 후 반복될 수 있음", results, once_more)  # fmt: skip

    def hear(self, conn: db.Connection) -> None:
        """Take in the notifications. Whatever they say, they only mean: look now. An earlier
        statement may have read them from the socket already.
        """
        was_told = self.hearing.is_notified
        if heard := self.hearing.hear(conn):
            self.claiming.claim_at = 0.0
            if db.WAKE_CHANNEL in heard:
                self.claiming.due_at = 0.0  # a hold may have ended before its time
            if db.JOIN_CHANNEL in heard:
                self.join_look.ask()
                if self.join_look.failure is None:  # else --once would go on for ever
                    self.nothing_due = False
            self.move_look.ask()
        if was_told and not self.hearing.is_notified:  # sweeps come sooner from now on
            self.claiming.sweep_at = 0.0

    def collect(self, ready: list) -> None:
        """Take the results of calls that have ended."""
        for call, ended in self.workers.collect(ready):
            ended = self.health.revise(call, ended)
            trigger.log_end(call, ended)
            if ended.outcome == "released":  # the next turn gives it back, and claims again
                self.has_unbegun, self.again_at = True, 0.0
                self.claiming.claim_at, self.nothing_due = 0.0, False
            else:
                self.keep(call, ended)

    def keep(self, call: Call, ended: Result) -> None:
        """Keep a result until the database has it."""
        self.unwritten.results.append(ended)
        self.checks.remember(call, ended)

    def give_back(self, conn: db.Connection) -> None:
        """Free what was claimed in our name and never begun: the answer to the claim was lost, or
        the lease was too short for the call.
        """
        keep = set(self.checks.may_run)  # a new primary may have lost that these were begun
        keep |= {(call.call_id, call.attempt) for call in self.workers.calls}
        keep |= {(result.call_id, result.attempt) for result in self.unwritten.all}
        found = calls.give_back(conn, self.name, keep, self.claiming.others_need)
        self.has_unbegun = found.locked > 0  # by the application
        if found.given_back:
            log.info("시작하지 않은 호출 %d건을 되돌림", found.given_back)

    def beat(self, doing: str, seconds: float) -> None:
        self.heartbeat.beat(doing, seconds + HEARTBEAT_MARGIN)

    def beat_for_answer(self) -> None:
        """Statements that take long, one after the other, do not look like a frozen listener."""
        if self.heartbeat.valid_until - time.monotonic() < HEARTBEAT_MARGIN - LONGEST_SLEEP:
            self.beat("asking the database", LONGEST_SLEEP)

    def beat_for_host(self) -> None:
        self.beat("connecting to the database", CONNECTING)


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
    2 bad input or settings, or run cannot start; 3 the database cannot be
    reached, or refuses the login.
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
    next run. So are a call that is locked, and the calls of a table that is locked or cannot be
    read; for such a table it exits with 1, after all others. While a result cannot be written, it
    does not end.
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
        log.error("리스너 오류 발생: %s", ops.first_line(error))
        away = isinstance(error, db.ConnectionLost)
        sys.exit(ops.EXIT_DATABASE_AWAY if away else ops.EXIT_PROBLEM)


@cli.command(cls=RowCommand, short_help="Run the call that JOB_ID owes, now and in this process.")
@click.argument("job_id", type=Text())
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
