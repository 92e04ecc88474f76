"""What becomes of a call: whether it is made, and what its result means (the outcome table of the
README). Each end is a settlement, and one line in the log.
"""

import logging
import random
import time
import traceback
from types import SimpleNamespace
from typing import Any

import config
import db
import logs
import stage_http
import stages
from settling import Settlement

log = logging.getLogger("listener.trigger")

LONGEST_BACKOFF = 300.0


def about(call: stages.Call, **more: Any) -> dict[str, Any]:
    return logs.about(job=call.job_id, stage=call.stage, attempt=call.spent, **more)


class Judge:
    """Decides for one worker what becomes of a call that ended so or so."""

    def __init__(self, settings: SimpleNamespace, worker: str):
        self.settings = settings
        self.worker = worker
        self.redact = config.redactor(settings)

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
            error = "nobody knows what became of the last attempt"
            return self.failure(call, "failed", error)
        return None

    def outcome(self, call: stages.Call) -> Settlement:
        """Run the stage function of `call`; what came of it."""
        began = time.monotonic()
        try:
            function = stages.PIPELINE[call.current_step, call.status]
            answer = function(call) or call.answer
            if not isinstance(answer, stage_http.Answer):
                raise TypeError(f"stage function {call.stage} must return call.post(...)")
            return self.judged(call, answer, time.monotonic() - began)
        except stage_http.Unreachable as error:
            return self.failure(call, "held", f"stage API unreachable: {error}")
        except stage_http.NoAnswer as error:
            return self.failure(call, "unknown", str(error))
        except stage_http.Interrupted as error:
            return self.failure(call, "retry", f"connection broke while waiting: {error}")
        except (Exception, SystemExit) as error:
            return self.raised(call, error, time.monotonic() - began)

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

    def interrupted(self, call: stages.Call) -> Settlement:
        """What escaped was no answer and no error of the call: nobody knows what became of it."""
        return self.settlement(call, "unknown", error="interrupted", after_lease=True, delay=0)

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
