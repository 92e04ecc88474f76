"""One call from claim to settled: claim it, have it made, see that its result is written."""

import functools
import logging
import math
import select
import signal
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import calls
import db
import logs
import stages
import upkeep
from alerts import Alerts
from judge import Judge, about
from results import Results

log = logging.getLogger("listener.trigger")

# How often to look whether a stage has let go of the row of a call it has answered.
LOCKED_EVERY = 1.0
# How long a claim may leave out what was due before the last one: so late, at the most, is a
# call that was committed late.
MARKED_FOR = 1.0
# A stage is quick where its last call, stage function and all, took at most so many seconds.
QUICK = 0.02
# For so many seconds a call that was claimed ahead waits for the answer to the one before it, and
# a result that is not written for the POST of the next.
PATIENCE = 0.05
# This old a call that was claimed ahead may be when its turn comes: the job may have moved on.
LONGEST_AHEAD = 0.2


class Trigger:
    """Takes calls one at a time. Outlives its connection: an unwritten result is kept."""

    def __init__(self, settings: SimpleNamespace, worker: str, only: list[str] | None = None):
        self.settings = settings
        self.worker = worker
        self.limits = stages.stage_limits(settings)
        self.apis = stages.stage_apis(settings)
        # The stages that are called, the one whose turn it is first; seconds.
        self.leases = {
            stage: limits.timeout + settings.LEASE_MARGIN
            for stage, limits in self.limits.items()
            if not only or stage in only
        }
        self.alerts = Alerts(settings)
        self.judge = Judge(settings, worker)
        self.results = Results(self.alerts)
        self.not_given_back = 0  # calls that the application holds the rows of
        self.locked_checked = 0.0
        self.running: stages.Call | None = None
        self.quick: set[str] = set()  # stages
        self.in_a_row = 0  # claims that found a call, one after the other
        self.ahead: stages.Call | None = None  # claimed while the one before it was running
        self.failed_meanwhile: Exception | None = None
        self.next_look = 0.0  # time.monotonic() at which the next call will be due
        # When the last claimed call of a stage was due: what is before it need not be passed
        # again by every claim. A call that was committed late is before it, too.
        self.marks: dict[str, Any] = {}
        self.marked = 0.0

    def resume(self, conn) -> None:
        """Give back what was claimed for this worker and never begun.

        On a new connection that is a claim whose answer was lost; the rest has its result.
        """
        self.ahead = None
        running = [self.running.call_id] if self.running else []
        found = calls.give_back(conn, self.worker, self.results.call_ids() + running)
        self.not_given_back = found.locked
        if found.given_back:
            log.info("시작하지 않은 호출 %d건을 되돌림", found.given_back)

    def next(self, conn, only: Any = None) -> stages.Call | None:
        """The next due call, which is claimed; the last result is settled with the claim.

        Args:
            only: a job id: take what this job owes, due or not.
        """
        if self.ahead is None:
            return self.claim(conn, only)
        call, self.ahead = self.ahead, None
        good = self.results.unwritten[-1].outcome == "succeeded" and is_fresh(call)
        if not good or call.stage not in self.quick:
            self.results.write(conn)  # else while this call is running
        if good:
            return call
        self.resume(conn)
        return self.claim(conn, only)

    def claim(self, conn, only: Any = None) -> stages.Call | None:
        """Settle what is not, and claim the next due call: one round trip but for exceptions."""
        self.settle_locked(conn)
        self.results.write(conn, but=1)  # two, where a connection was lost while a stage worked
        while True:
            began = time.monotonic()
            if began - self.marked > MARKED_FOR:
                self.marks, self.marked = {}, began
            row = calls.claim(
                conn,
                leases=self.leases,
                worker=self.worker,
                settled=next(iter(self.results.unwritten), None),
                only=only,
                marks=self.marks,
            )
            self.results.written(settled=not row.unsettled)
            self.in_a_row = self.in_a_row + 1 if row.call_id is not None else 0
            if row.call_id is None:
                self.next_look = math.inf if row.next_due is None else began + row.next_due
                return None
            self.marks[row.stage] = row.was_due_at
            if row.taken_over:
                upkeep.reap(conn)
            self.take_turns(row.stage)
            call = self.call(conn, row, began)
            if not row.owed:
                row = row._replace(owed=calls.is_owed(conn, row, self.worker))
            refused = self.judge.refused(call, row, by_hand=only is not None)
            if refused is None:
                return call
            self.results.unwritten.append(refused)

    def meanwhile(self, call: stages.Call, conn, answer: socket.socket) -> None:
        """While the stage works: write the log and the result before, maybe look ahead."""
        logs.write()
        # A new connection may have more to say than the answer, such as TLS tickets.
        quick = call.stage in self.quick and call.api.used_at
        stopping = db.stop is not None and db.stop.requested
        if conn is not None and not self.failed_meanwhile:
            if quick and self.in_a_row > 1 and not stopping:
                self.try_now(self.look_ahead, conn, answer)
            else:
                self.try_now(self.results.write, conn)

    def on_alarm(self, conn, *_signal) -> None:
        """SIGALRM: the function of a quick stage takes its time before its POST."""
        logs.write()
        self.try_now(self.results.write, conn)

    def try_now(self, do: Callable[..., None], *given: Any) -> None:
        """What goes wrong is raised by `run`: nothing may come between a stage and its answer."""
        try:
            do(*given)
        except Exception as error:
            self.failed_meanwhile = error

    def look_ahead(self, conn, answer: socket.socket) -> None:
        """Claim the call after the one that is running; give it back, for others to take, where
        the stage is not so quick this time.
        """
        if self.ahead is None:
            self.ahead = self.claim(conn)
        if self.ahead and not select.select([answer], [], [], PATIENCE)[0]:
            self.resume(conn)

    def call(self, conn, row, began: float) -> stages.Call:
        return stages.Call(
            job_id=row.job_id,
            tenant_id=row.tenant_id,
            current_step=row.current_step,
            status=row.status,
            stage=row.stage,
            call_id=row.call_id,
            attempt=row.attempt,
            spent=row.spent,
            started_at=row.started_at,
            limited=row.limited,
            limits=self.limits[row.stage],
            began=began,
            until=began + self.limits[row.stage].timeout,
            api=self.apis[row.stage],
            query=functools.partial(self.query, conn),
        )

    def take_turns(self, stage: str) -> None:
        """Every stage gets its turn, however long another one's queue is."""
        order = list(self.leases.items())
        after = list(self.leases).index(stage) + 1
        self.leases = dict(order[after:] + order[:after])

    def run(self, call: stages.Call, conn=None) -> None:
        """Run the stage function of `call` and keep what came of it in `results`.

        Args:
            conn: where the next call may be claimed meanwhile.

        Raises:
            psycopg2.Error: from doing that.
        """
        log.info(
            "[TRIGGER] 파이프라인 단계 트리거: job=%s stage=%s attempt=%d/%d",
            *(call.job_id, call.stage, call.spent, call.limits.max_attempts),
            extra=about(call),
        )
        if call.stage not in self.quick:
            logs.write()  # whatever its function does
        call.meanwhile = functools.partial(self.meanwhile, call, conn)
        self.running, began = call, time.monotonic()
        try:
            if conn is not None and call.stage in self.quick:
                signal.signal(signal.SIGALRM, functools.partial(self.on_alarm, conn))
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            result = self.judge.outcome(call)
        except BaseException:
            result = self.judge.interrupted(call)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.running = None
            self.results.unwritten.append(result)
        quick = time.monotonic() - began < QUICK and result.outcome == "succeeded"
        (self.quick.add if quick else self.quick.discard)(call.stage)
        if self.failed_meanwhile:
            error, self.failed_meanwhile = self.failed_meanwhile, None
            raise error

    def query(self, conn, sql: str, params: dict[str, Any] | None = None) -> list:
        """What a stage function asks for, which no alarm may come between."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.try_now(self.results.write, conn)
        return db.query(conn, sql, params)

    def leave(self, conn) -> None:
        """Write what is left; give back what was claimed and not begun."""
        self.results.write(conn)
        self.resume(conn)

    @property
    def waits(self) -> bool:
        """Whether the application holds rows that are to be settled or given back."""
        return bool(self.results.locked or self.not_given_back)

    def settle_locked(self, conn) -> None:
        """Settle, or give back, what the application held the rows of."""
        if self.waits and time.monotonic() - self.locked_checked >= LOCKED_EVERY:
            if self.not_given_back:
                self.resume(conn)
            self.results.settle_locked(conn)
            self.locked_checked = time.monotonic()


def is_fresh(call: stages.Call) -> bool:
    return time.monotonic() - call.began < LONGEST_AHEAD
