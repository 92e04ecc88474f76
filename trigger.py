"""One call from claim to settled: look its state up in PIPELINE, run the stage function, decide
what the result means, and keep the result until the database has it.
"""

import dataclasses
import functools
import logging
import math
import random
import time
import traceback
from types import SimpleNamespace
from typing import Any

import calls
import config
import db
import logs
import settling
import stage_http
import stages
import upkeep
from alerts import Alerts
from settling import Settlement

log = logging.getLogger("listener.trigger")

LONGEST_BACKOFF = 300.0
# How often to look whether a stage has let go of the row of a call it has answered.
LOCKED_EVERY = 1.0
# How long a claim may leave out what was due before the last one: so late, at the most, is a
# call that was committed late.
MARKED_FOR = 1.0


def about(call: stages.Call, **more: Any) -> dict[str, Any]:
    return logs.about(job=call.job_id, stage=call.stage, attempt=call.spent, **more)


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
        self.redact = config.redactor(settings)
        self.result: Settlement | None = None  # not written yet
        self.locked: list[Settlement] = []  # recorded, but the stage still holds the row
        self.locked_checked = 0.0
        self.next_look = 0.0  # time.monotonic() at which the next call will be due
        # When the last claimed call of a stage was due: what is before it need not be passed
        # again by every claim. A call that was committed late is before it, too.
        self.marks: dict[str, Any] = {}
        self.marked = 0.0

    def resume(self, conn) -> None:
        """Give back what was claimed for this worker and never begun.

        On a new connection that is a claim whose answer was lost; the rest has its result.
        """
        kept = [*self.locked, *([self.result] if self.result else [])]
        if given_back := calls.give_back(conn, self.worker, [s.call_id for s in kept]):
            log.info("시작하지 않은 호출 %d건을 되돌림", given_back)

    def next(self, conn, only: Any = None) -> stages.Call | None:
        """Settle the last result and claim the next due call, in one round trip.

        Args:
            only: a job id: take what this job owes, due or not.
        """
        self.settle_locked(conn)
        while True:
            began = time.monotonic()
            if began - self.marked > MARKED_FOR:
                self.marks, self.marked = {}, began
            row = calls.claim(
                conn,
                leases=self.leases,
                worker=self.worker,
                settled=self.result,
                only=only,
                marks=self.marks,
            )
            self.written(settled=not row.unsettled)
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
            self.result = self.refused(call, row, by_hand=only is not None)
            if self.result is None:
                return call

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
            query=functools.partial(db.query, conn),
        )

    def take_turns(self, stage: str) -> None:
        """Every stage gets its turn, however long another one's queue is."""
        order = list(self.leases.items())
        after = list(self.leases).index(stage) + 1
        self.leases = dict(order[after:] + order[:after])

    def refused(self, call: stages.Call, row, by_hand: bool) -> Settlement | None:
        """The result of a claim that must not be called; None where it must."""
        if not row.owed:
            now = f"({row.job_step}, {row.job_status})" if row.job_found else "deleted"
            log.info(
                "Job 상태가 변경되어 스킵: job=%s stage=%s 현재=%s",
                *(call.job_id, call.stage, now),
                extra=about(call),
            )
            return self.settlement(call, "skipped", error=f"the job has moved on: {now}")
        if row.accepted:
            log.info(
                "이미 수락된 호출이라 스킵: job=%s stage=%s",
                *(call.job_id, call.stage),
                extra=about(call),
            )
            return self.settlement(call, "skipped", error="an earlier attempt was accepted")
        if call.spent > call.limits.max_attempts and not by_hand:
            return self.failure(call, "failed", "nobody knows what became of the last attempt")
        return None

    def run(self, call: stages.Call) -> None:
        """Run the stage function of `call` and keep what came of it as `result`."""
        log.info(
            "[TRIGGER] 파이프라인 단계 트리거: job=%s stage=%s attempt=%d/%d",
            *(call.job_id, call.stage, call.spent, call.limits.max_attempts),
            extra=about(call),
        )
        began = time.monotonic()
        # Should anything escape from here, nobody knows what became of the call.
        self.result = self.settlement(
            call, "unknown", error="interrupted", after_lease=True, delay=0
        )
        try:
            function = stages.PIPELINE[call.current_step, call.status]
            answer = function(call) or call.answer
            if not isinstance(answer, stage_http.Answer):
                raise TypeError(f"stage function {call.stage} must return call.post(...)")
            self.result = self.judged(call, answer, time.monotonic() - began)
        except stage_http.Unreachable as error:
            self.result = self.failure(call, "held", f"stage API unreachable: {error}")
        except stage_http.NoAnswer as error:
            self.result = self.failure(call, "unknown", str(error))
        except stage_http.Interrupted as error:
            self.result = self.failure(call, "retry", f"connection broke while waiting: {error}")
        except (Exception, SystemExit) as error:
            self.result = self.raised(call, error, time.monotonic() - began)

    def judged(self, call: stages.Call, answer: stage_http.Answer, seconds: float) -> Settlement:
        """What the answer's status means (the outcome table of the README)."""
        status = answer.status
        if 200 <= status < 300:
            log.info(
                "파이프라인 단계 실행 성공: job=%s stage=%s status=%d (%.2f초)",
                *(call.job_id, call.stage, status, seconds),
                extra=about(call, status=status, duration=round(seconds, 3)),
            )
            return self.settlement(call, "succeeded", http_status=status)
        error = f"HTTP {status}: {answer.text}".rstrip(": ")
        if status in (429, 503):
            wait = answer.retry_after
            return self.failure(call, "held", error, http_status=status, retry_after=wait)
        if status in (408, 425) or status >= 500:
            return self.failure(call, "retry", error, http_status=status)
        return self.failure(call, "failed", error, http_status=status)

    def raised(self, call: stages.Call, error: BaseException, seconds: float) -> Settlement:
        """A bug in the stage function, or a value it misses; an accepted call stays accepted."""
        if not isinstance(error, (stages.MissingValue, *db.CONNECTION_LOST)):
            log.error("단계 함수 오류: job=%s stage=%s", call.job_id, call.stage, exc_info=error,
                      extra=about(call))  # fmt: skip
        if call.answer and 200 <= call.answer.status < 300:
            return self.judged(call, call.answer, seconds)
        # Not indented as the code of a SyntaxError is, and before any notes.
        said = [t for t in traceback.format_exception_only(error) if not t.startswith(" ")]
        return self.failure(call, "retry", said[0].strip())

    def failure(self, call: stages.Call, outcome: str, error: str, **details: Any) -> Settlement:
        """The settlement of an attempt that did not succeed, and its one line in the log."""
        error = self.redact(error)
        details["free"] = outcome == "held"
        last = call.spent >= call.limits.max_attempts
        # What got no answer may still run: it is given up once its lease is over, not before.
        if outcome == "retry" and last:
            outcome, error = "failed", f"{error} (attempt {call.spent}, the last one)"
        level, then = logging.WARNING, ""
        if outcome == "held":
            details |= {"hold": True, "delay": 1.0}
            wait = details.get("retry_after")
            then = (
                f"단계 보류 {wait:.0f}초" if wait else "단계 보류, 응답할 때까지 간격을 늘려 재시도"
            )
        elif outcome == "failed":
            level, then = logging.ERROR, f"포기: python listener.py retry {call.job_id}"
        else:
            details["delay"] = self.backoff(call.spent)
            details["after_lease"] = outcome == "unknown"
            after = "리스 만료 후" if outcome == "unknown" else f"{details['delay']:.1f}초 후"
            then = f"{after} {'포기' if last else '재시도'} (Job이 그대로면)"
        log.log(
            level,
            "파이프라인 단계 실행 실패: job=%s stage=%s attempt=%d/%d error=%s → %s",
            *(call.job_id, call.stage, call.spent, call.limits.max_attempts, error[:500], then),
            extra=about(
                call,
                status=details.get("http_status"),
                duration=round(time.monotonic() - call.began, 3),
                outcome=outcome,
                error=error,
            ),
        )
        return self.settlement(call, outcome, error=error, **details)

    def backoff(self, spent: int) -> float:
        """Seconds until the next attempt: exponential, with full jitter."""
        return random.uniform(0, min(LONGEST_BACKOFF, self.settings.RETRY_DELAY * 2 ** (spent - 1)))

    def settlement(self, call: stages.Call, outcome: str, **details: Any) -> Settlement:
        return Settlement(
            job_id=call.job_id,
            call_id=call.call_id,
            attempt=call.attempt,
            stage=call.stage,
            worker=self.worker,
            started_at=call.started_at,
            limited=call.limited,
            outcome=outcome,
            **details,
        )

    def leave(self, conn) -> None:
        """Write the last result; give back what was claimed and not begun."""
        if self.result:
            self.written(settled=settling.settle(conn, self.result))
        self.resume(conn)

    def written(self, settled: bool) -> None:
        """The last result is recorded; where the stage still holds the row, it is kept."""
        result, self.result = self.result, None
        if result and not settled:
            # Its hold, if any, has begun: settling it again must not lengthen it.
            self.locked.append(dataclasses.replace(result, hold=False))
        if result and result.outcome == "failed":
            text = f"job {result.job_id}: {result.stage} was given up: {result.error}"
            about = {"job": result.job_id, "stage": result.stage, "error": result.error}
            self.alerts.send("given_up", text, **about, http_status=result.http_status)

    def settle_locked(self, conn) -> None:
        """A stage may answer before it commits; once it has, its call can be settled."""
        if self.locked and time.monotonic() - self.locked_checked >= LOCKED_EVERY:
            self.locked = [result for result in self.locked if not settling.settle(conn, result)]
            self.locked_checked = time.monotonic()
