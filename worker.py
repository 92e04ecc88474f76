"""A worker: it connects, works until the database is lost, waits, and connects again. Working is
draining what is due, then waiting for a notification, a signal or the clock.
"""

import contextlib
import logging
import math
import os
import random
import secrets
import socket
import time
from types import SimpleNamespace

import psycopg2

import db
import notifications
import ops
import stages
import upkeep
from heartbeat import Heartbeat
from process import HISTORY_AT, LOOKED_AT, REAP_AT, STALLED_AT, Stop, Watch
from trigger import LOCKED_EVERY, Trigger

log = logging.getLogger("listener")

# Seconds between two rounds of upkeep.
REAP_INTERVAL = 60.0
HISTORY_INTERVAL = STALLED_INTERVAL = 300.0
# For so long after a lost connection, a statement sent on it may still take effect.
DOUBTFUL = 600.0
# Whom the one on watch woke should look within so many seconds, or it looks itself.
ANSWERED_WITHIN = 1.0
# What a heartbeat allows on top of what it announces: a few database deadlines, slow DNS.
HEARTBEAT_MARGIN = 60.0


class Worker:
    """One process, one thread, one connection that both listens and queries."""

    def __init__(
        self,
        settings: SimpleNamespace,
        stop: Stop,
        only: list[str],
        once: bool = False,
        watch: Watch | None = None,
    ):
        self.settings = settings
        self.stop = stop
        self.once = once
        self.watch = watch or Watch()
        self.woke_at = -math.inf  # when this worker, on watch, woke another
        self.looked_at = 0.0  # time.monotonic() of the last look
        self.name = worker_name()
        self.trigger = Trigger(settings, self.name, only)
        self.heartbeat = Heartbeat(settings.HEARTBEAT_DIR, self.name)
        self.checked = False  # whether the database knows this PIPELINE
        self.bell = notifications.Bell(settings)
        self.doubtful_until = 0.0
        self.reason, self.repeats = "", 0
        db.stop = stop

    # --- connect, work, and once more ---

    def serve(self) -> None:
        """Work until told to stop; a result that is not written yet outlasts even that.

        Raises:
            ops.Problem: the database does not know this PIPELINE.
            psycopg2.Error: with `once`, which does not wait for better times.
        """
        log.info(
            "Job State Listener 시작: worker=%s stages=%s", self.name, list(self.trigger.leases)
        )
        try:
            while not self.stop.requested or self.trigger.results.unwritten:
                try:
                    with contextlib.closing(self.connect()) as conn:
                        self.work(conn)
                        break
                except Exception as error:
                    hopeless = isinstance(error, ops.Problem) or self.once
                    if hopeless and not self.trigger.results.unwritten:
                        raise
                    self.wait_to_reconnect(error)
        finally:
            self.trigger.alerts.close()
            self.heartbeat.close()
        log.info("Job State Listener 중지됨: worker=%s", self.name)

    def connect(self) -> db.Connection:
        """LISTEN comes before the first look for due calls, so that nothing falls between."""
        self.heartbeat.beat("connecting to the database", HEARTBEAT_MARGIN)
        conn = db.connect(self.settings, db.WORKER_APPLICATION + self.name, pinned=True)
        info = conn.info
        log.info("PostgreSQL 연결 성공: %s:%s/%s", info.host, info.port, info.dbname)
        if not self.checked:
            ops.require_installed(conn)
            upkeep.tell_timeouts(conn, stages.timeouts(self.settings))
            self.checked = True
        self.bell.listen(conn, silent=ops.is_silent(conn))
        self.trigger.resume(conn)
        return conn

    def wait_to_reconnect(self, error: Exception) -> None:
        """Say what happened, each reason once and then only counted, and sleep."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        delay = self.settings.JOB_STATE_LISTENER_RECONNECT_DELAY * random.uniform(0.5, 1.0)
        if reason != self.reason:
            bug = error if not isinstance(error, psycopg2.Error) else None
            log.error("리스너 오류 발생: %s", reason, exc_info=bug)
            self.reason, self.repeats = reason, 0
        self.repeats += 1
        if self.repeats & (self.repeats - 1) == 0:
            log.warning("재연결 시도: %.1f초 후 (%d번째)", delay, self.repeats)
        self.heartbeat.beat(f"database away: {reason}", delay + HEARTBEAT_MARGIN)
        self.doubtful_until = time.monotonic() + DOUBTFUL
        self.watch.leave()
        if self.stop.requested and self.trigger.results.unwritten:
            time.sleep(delay)  # only to write a result: a second signal leaves at once
        else:
            self.stop.wait(delay)

    def work(self, conn: db.Connection) -> None:
        """Drain and wait, in turn, until told to stop."""
        while not self.stop.requested:
            self.drain(conn)
            if time.monotonic() < self.doubtful_until:
                self.trigger.resume(conn)
            self.looked_at = time.monotonic()
            self.reason, self.repeats = "", 0
            if self.once:
                break
            while not (self.stop.requested or self.wait(conn)):
                pass
        self.trigger.leave(conn)

    def drain(self, conn: db.Connection) -> None:
        """Run every due call, one after the other."""
        rested = True
        while not self.stop.requested:
            self.upkeep(conn)
            postponed = any(result.delay is not None for result in self.trigger.results.unwritten)
            self.watch.begin_look()
            call = self.trigger.next(conn)
            if call is None or self.stop.requested:
                return
            # There may be more due, or a time at which a postponed call will be.
            if rested or postponed:
                self.watch.leave()
            rested = False
            lease = self.trigger.leases[call.stage]
            self.heartbeat.beat(f"calling {call.stage} for job {call.job_id}", lease)
            self.trigger.run(call, conn)
            self.bell.hear(conn)

    def wait(self, conn: db.Connection) -> bool:
        """Sleep until a notification, a signal, the next due call, or the sweep.

        Returns whether to look for due calls: another worker may have been meant.
        """
        on_watch = self.watch.rest()
        if self.bell.rings and on_watch != conn.listens:
            if on_watch:
                notifications.listen(conn)
                return True  # for what rang before
            notifications.unlisten(conn)
        look_at, now = self.next_look(on_watch), time.monotonic()
        self.heartbeat.beat("waiting for a job to change", look_at - now + HEARTBEAT_MARGIN)
        # A statement may already have read the notification from the socket.
        if not (heard := self.bell.hear(conn)):
            # A program that runs is looked after; the watch is free again where a worker died.
            restless = self.trigger.alerts.look() or not on_watch
            self.stop.wait(min(look_at - now, 1.0 if restless else math.inf), conn, self.watch)
            heard = self.bell.hear(conn)
        if self.watch.is_woken():
            return True
        if heard and on_watch:
            self.woke_at = time.monotonic()
            if not self.watch.wake_another():
                return True
        return time.monotonic() >= self.next_look(on_watch)

    def next_look(self, on_watch: bool) -> float:
        """time.monotonic() at which to look, should nothing call for it before."""
        alone = on_watch and not self.bell.rings
        every = self.settings.POLL_INTERVAL if alone else self.settings.SWEEP_INTERVAL
        if self.trigger.waits:
            every = min(every, LOCKED_EVERY)
        times = [self.looked_at + every, self.trigger.next_look]
        if on_watch:
            times += self.watch.times[REAP_AT], self.watch.times[HISTORY_AT]
            if self.watch.times[LOOKED_AT] < self.woke_at:
                times.append(self.woke_at + ANSWERED_WITHIN)
        return min(times)

    def upkeep(self, conn: db.Connection) -> None:
        """What any worker does for all, between two calls; history goes a batch at a time."""
        if self.is_time(REAP_AT, REAP_INTERVAL):
            upkeep.reap(conn)
        if self.is_time(HISTORY_AT, HISTORY_INTERVAL):
            upkeep.forget_deleted(conn, self.trigger.leases, self.name)
            if upkeep.keep_history(conn, self.settings.HISTORY_DAYS):
                self.watch.times[HISTORY_AT] = 0.0  # there is more
        if self.settings.ALERT_COMMAND and self.is_time(STALLED_AT, STALLED_INTERVAL):
            for row in upkeep.newly_stalled(conn):
                log.error("정체된 단계: stage=%s jobs=%d", row.stage, row.jobs)
                text = f"{row.jobs} jobs are stalled at {row.stage}: {row.reason}"
                self.trigger.alerts.send("stalled", text, **row._asdict())

    def is_time(self, what: int, interval: float) -> bool:
        """Whether to do it now, and then not for `interval` seconds, whoever of the workers."""
        now = time.monotonic()
        if now < self.watch.times[what]:
            return False
        self.watch.times[what] = now + interval
        return True


def worker_name() -> str:
    """Unique even where a restarted container has the same host name and pid."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
