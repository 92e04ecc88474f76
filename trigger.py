"""One call: run its stage function, and say what its outcome means (see docs/HOW_IT_WORKS.md).

A worker does this in a process of its own, `call JOB_ID` in the command's. Neither needs a
connection to the database; what came of the call is a Result, which the listener writes. Not the
database trigger, which is in triggers.sql: to trigger a stage is to call it.
"""

import bdb
import logging
import os
import random
import time
import traceback
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import requests

import config
import db
import logs
import pipeline
import stage_http
from calls import TAKEN, Result
from pipeline import Call

log = logging.getLogger("listener.trigger")

LONGEST_BACKOFF = 300.0  # seconds
# The stage asks for patience, or a gateway could not connect to it.
NOT_NOW = (429, 503, 521, 523, 525, 526, 530)
# Outcomes of an answer after which nothing runs.
NOTHING_RUNS = ("held", "retry", "failed")
# What `requests` raises where a stage function's own request got no answer, or no whole one.
OWN_REQUEST_FAILED = (requests.ConnectionError, requests.Timeout, *stage_http.CUT)
# Seconds after its timeout at which the listener ends a call that has not ended itself.
GRACE = 0.5


def boottime() -> float:
    """Seconds by a clock that also counts while this machine, or container, is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def seconds_left(call: Call) -> float:
    """Seconds that `call` may still take and end within its lease."""
    return call.leased_until - boottime() - GRACE


class Trigger:
    """Runs calls, one at a time, in the process that it is in."""

    def __init__(self, settings: SimpleNamespace):
        self.settings = settings
        self.redact = config.redactor(settings)
        self.apis, self.routes = pipeline.stage_apis(settings), pipeline.routes()

    def run(self, call: Call, by_hand: bool = False) -> Result:
        """Run the stage function of `call`; what came of it.

        Args:
            by_hand: a person watches, maybe in pdb: the call may take as long as its lease.

        Returns:
            A Result; its outcome is "released" where the call was not made, because another
            listener may take it over before it would end.
        """
        began, pid = time.monotonic(), os.getpid()
        left = seconds_left(call)
        if left < call.timeout:
            return result(call, "released")
        call.until = began + (left if by_hand else call.timeout)
        call.api, call.settings = self.apis[call.stage], self.settings
        try:
            ended = self.make(call, by_hand)
        finally:
            if os.getpid() != pid:  # the stage function forked, and this is its child
                os._exit(0)
        ended.seconds = time.monotonic() - began
        return ended

    def make(self, call: Call, by_hand: bool) -> Result:
        """Run the stage function; what came of the call, whatever it raised."""
        try:
            ended = self.judged(call, call_function(call, self.routes))
        except BaseException as error:
            return self.raised_beside_post(call, error, by_hand)
        if call.no_answer and ended.outcome in NOTHING_RUNS:
            return self.raised(call, call.no_answer)  # an earlier POST may still run
        return ended

    def raised_beside_post(self, call: Call, error: BaseException, by_hand: bool) -> Result:
        """The result of a call whose stage function raised `error`: that of its call.post, or of
        the error.

        `error` decides where call.post raised it, or where posted() has nothing. It also decides
        where another request of the function may still run, unless call.post was accepted, or got
        an answer after which it may still run as well (409, 502, …).
        """
        ended, posted = self.raised(call, error, by_hand), self.posted(call)
        if posted is None or error is call.unanswered:
            return ended
        may_run = posted.outcome == "unknown" and posted.http_status is not None
        if ended.outcome == "unknown" and not (posted.is_accepted or may_run):
            return ended
        posted.traceback = self.traceback_of(error)
        return posted

    def posted(self, call: Call) -> Result | None:
        """What came of call.post, where that counts whatever the stage function did next."""
        if call.unanswered is not None:
            return self.raised(call, call.unanswered)
        if call.answer is not None:
            ended = self.judged(call, call.answer)
            return None if ended.outcome in ("retry", "failed") else ended
        return None

    def judged(self, call: Call, answer: stage_http.Answer) -> Result:
        """What the answer's status means."""
        status = answer.status
        if ended := accepted(call, status):
            return ended
        error = answer.error
        if answer.may_run:
            return self.failure(call, "unknown", error, http_status=status)
        if status in NOT_NOW:
            return self.failure(call, "held", error, hold=True, http_status=status,
                                retry_after=answer.retry_after)  # fmt: skip
        if status in (408, 425) or status >= 500:
            return self.failure(call, "retry", error, http_status=status)
        return self.failure(call, "failed", error, http_status=status)

    def raised(self, call: Call, error: BaseException, by_hand: bool = False) -> Result:
        """What an exception of the stage function means."""
        if isinstance(error, stage_http.Unreachable):
            return self.failure(call, "held", f"stage API unreachable: {error}", hold=True)
        if isinstance(error, stage_http.NoAnswer):
            return self.failure(call, "unknown", str(error), http_status=error.status)
        if isinstance(error, stage_http.Interrupted):
            return self.failure(call, "retry", f"connection broke while waiting: {error}")
        # raise_for_status() of a request that the stage function made beside call.post.
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in stage_http.MAY_RUN:
            return self.failure(call, "unknown", str(error))
        if isinstance(error, db.ConnectionLost):
            text = f"no database for the stage function: {error}"
            return self.failure(call, "held", text, hold=True)
        if by_hand and isinstance(error, stage_http.TimeIsUp):
            return result(call, "released")
        if by_hand and isinstance(error, (KeyboardInterrupt, bdb.BdbQuit)):
            return self.failure(call, "unknown", "stopped by hand")
        # A bug, or a missing value. The error is the first line that is not indented: the code of
        # a SyntaxError comes before it, indented, and notes come after it.
        said = [t for t in traceback.format_exception_only(error) if not t.startswith(" ")]
        ended = self.failure(call, "retry", said[0].strip())
        ended.traceback = self.traceback_of(error)
        return ended

    def traceback_of(self, error: BaseException) -> str | None:
        """The traceback of a bug; None where `error` is no bug."""
        if isinstance(error, (pipeline.MissingValue, stage_http.TimeIsUp)):
            return None
        text = self.redact("".join(traceback.format_exception(error)))
        return text[-logs.LONGEST_TRACE :]

    def failure(self, call: Call, outcome: str, error: str, **details: Any) -> Result:
        error = logs.readable(self.redact(error))[: logs.LONGEST_LINE]
        return failure(call, outcome, error, self.settings.RETRY_DELAY, **details)


def call_function(call: Call, routes: Mapping[pipeline.Route, Callable]) -> stage_http.Answer:
    """Run the stage function; the answer that it returns, whoever sent the request.

    Args:
        routes: as of pipeline.routes().

    Raises:
        NoAnswer, Unreachable, Interrupted: also where the function used `requests` itself.
        Exception: what the function raised.
    """
    try:
        try:
            answer = routes[call.route](call)
        except requests.HTTPError as error:  # raise_for_status() of the function's own request
            if error.response is None or call.answer is not None or call.unanswered is not None:
                raise
            answer = error.response
        if answer is None:
            answer = call.answer
        if isinstance(answer, requests.Response):
            answer = answer_in(answer)
    except OWN_REQUEST_FAILED as error:
        raise stage_http.translated(error) from error
    if not isinstance(answer, stage_http.Answer):
        raise TypeError(f"stage function {call.stage} must return call.post(...)")
    return answer


def answer_in(response: requests.Response) -> stage_http.Answer:
    """The answer to a request that the stage function sent itself."""
    first = response.history[0] if response.history else response
    if first.request is not None and first.request.method != response.request.method:
        response = first  # a redirect, to a login say, that `requests` has followed with a GET
    try:
        body = response.content or b""
    except RuntimeError:  # the stage function has read it as a stream
        body = b""
    # Not response.text, which guesses the encoding from all of a body, however long.
    text = body[: stage_http.TEXT_LIMIT].decode("utf-8", "replace")
    retry_after = stage_http.parse_retry_after(response.headers)
    return stage_http.Answer(response.status_code, text, retry_after)


def accepted(call: Call, status: int) -> Result | None:
    """The result of a call that was answered with `status`; None where that did not accept it."""
    if status == 202 and call.asynchronous:
        return result(call, TAKEN, http_status=status)
    if 200 <= status < 300:
        return result(call, "succeeded", http_status=status)
    return None


# --- results -------------------------------------------------------------------------------


def result(call: Call, outcome: str, **details: Any) -> Result:
    """What came of `call`, to be written under the fence of its claim."""
    return Result(
        job_id=call.key,
        table_name=call.table,
        call_id=call.call_id,
        attempt=call.attempt,
        spent=call.spent - bool(details.get("free")),
        stage=call.stage,
        worker=call.listener,
        started_at=call.started_at,
        after_hold=call.after_hold,
        limited=call.limited,
        outcome=outcome,
        **details,
    )


def failure(call: Call, outcome: str, error: str, retry_delay: float, **details: Any) -> Result:
    """The result of an attempt that did not succeed, and when it is due again."""
    # Not "unknown", which may still run: that is given up when it is claimed after its lease.
    if outcome == "retry" and call.spent >= call.max_attempts:
        outcome, error = "failed", f"{error} (attempt {call.spent}, the last one)"
    if outcome == "held":
        details |= {"free": True, "delay": 1.0}
    elif outcome != "failed":
        details |= {"delay": backoff(call.spent, retry_delay), "after_lease": outcome == "unknown"}
    return result(call, outcome, error=error, **details)


def backoff(spent: int, retry_delay: float) -> float:
    """Seconds until the next attempt: exponential, with full jitter."""
    doubled = min(spent - 1, 32)  # 2.0 ** 1024 would overflow
    return random.uniform(0, min(LONGEST_BACKOFF, retry_delay * 2**doubled))


# --- what the log says ---------------------------------------------------------------------

IF_OWED = "취소되지 않고 Job이 그대로면"  # the condition of what happens next


def about(call: Call, **more: Any) -> dict[str, Any]:
    row = {} if call.table == pipeline.JOBS.name else {"table": call.table, "id": call.key}
    return logs.about(job=call.job_id, stage=call.stage, attempt=call.spent, **row, **more)


def log_begin(call: Call) -> None:
    log.info("[TRIGGER] 파이프라인 단계 트리거: %s stage=%s attempt=%d/%d",
             logs.ids(call.ids), call.stage, call.spent, call.max_attempts,
             extra=about(call))  # fmt: skip


def log_end(call: Call, ended: Result) -> None:
    """The one line of a call's end; before it the traceback of a bug in the stage function."""
    ids, status, duration = logs.ids(call.ids), ended.http_status, round(ended.seconds, 3)
    if ended.traceback:
        extra = about(call, traceback=ended.traceback)
        log.error("단계 함수 오류: %s stage=%s", ids, call.stage, extra=extra)
    if ended.outcome == "succeeded":
        log.info("파이프라인 단계 실행 성공: %s stage=%s status=%d (%.2f초)",
                 ids, call.stage, status, ended.seconds,
                 extra=about(call, status=status, duration=duration))  # fmt: skip
    elif ended.outcome == TAKEN:
        log.info("단계가 작업을 접수함: %s stage=%s status=%d (%.2f초) → Job이 바뀔 때까지 작업 중",
                 ids, call.stage, status, ended.seconds,
                 extra=about(call, status=status, duration=duration))  # fmt: skip
    elif ended.outcome == "released":
        log.warning("리스가 모자라 호출하지 않고 되돌림: %s stage=%s",
                    ids, call.stage, extra=about(call))  # fmt: skip
    else:
        level = logging.ERROR if ended.outcome == "failed" else logging.WARNING
        log.log(level, "파이프라인 단계 실행 실패: %s stage=%s attempt=%d/%d error=%s → %s",
                ids, call.stage, call.spent, call.max_attempts,
                (ended.error or "")[:500], what_next(call, ended),
                extra=about(call, status=status, duration=duration, outcome=ended.outcome,
                            error=ended.error))  # fmt: skip


def what_next(call: Call, ended: Result) -> str:
    if ended.outcome == "failed":  # a stage may have moved its job, which is not known yet
        return f"포기 ({IF_OWED}): {pipeline.typed('retry', call.table, call.key)}"
    if ended.hold and ended.retry_after:
        return f"단계 보류 {ended.retry_after:.0f}초"
    if ended.hold:
        return "단계 보류, 응답할 때까지 간격을 늘려 재시도"
    then = "포기" if call.spent >= call.max_attempts and not ended.free else "재시도"
    when = "리스 만료 후" if ended.after_lease else f"{ended.delay:.1f}초 후"
    return f"{when} {then} ({IF_OWED})"
