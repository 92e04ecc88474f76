"""Judges a stage by the answers to several of its calls. One answer does not tell whether the job
or the stage is at fault: a 404 may mean this job, or a deploy under way.
"""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from types import SimpleNamespace

import db
import logs
import trigger
from alerts import Alerts
from calls import Result
from failures import row_name
from pipeline import Call

log = logging.getLogger("listener")

# After this many calls of a stage without an answer, it is called one at a time until it answers.
UNANSWERED = 2
# Statuses that refuse what all calls of a stage have in common: token, path, method, headers, host;
# also redirects (to TLS, to a login). Where several jobs get one, the stage is at fault.
WRONG = (300, 301, 302, 303, 305, 307, 308, 401, 402, 403, 404, 405, 406, 407, 410, 411, 414, 415,
         417, 421, 426, 431, 501, 505, 511)  # fmt: skip
# Statuses of a gateway that got no usable answer from its stage. They are treated like WRONG ones,
# although the work may run.
GATEWAY = (502, 520, 522)
THROTTLED = (429, 503)
# Seconds between two probes of a stage that refuses every job. The delay is not doubled: if a stage
# rejects only some jobs, one that it would accept may have its turn after many of those.
PROBE_EVERY = 5.0
REMEMBERED = 1000  # suspects of a stage


@dataclass
class Health:
    """The state of a stage, judged by the calls of this listener."""

    unanswered: int = 0  # calls in a row without an answer
    accepted: int = 0  # calls, since this listener started
    # The last call with a wrong answer; None where one was accepted since.
    refused: Result | None = None
    is_wrong: bool = False  # several jobs got a wrong answer: it "refuses every job"
    # By call_id of a call that was refused or put off: how many the stage had accepted by then.
    suspects: OrderedDict[int, int] = field(default_factory=OrderedDict)


class StageHealth:
    """The health of every stage."""

    def __init__(self, settings: SimpleNamespace, alerts: Alerts):
        self.settings, self.alerts = settings, alerts
        self.of: dict[str, Health] = defaultdict(Health)
        self.to_revive: list[Result] = []  # given up, although the stage was at fault: to be undone

    def most(self, stage: str, free: int, under_way: list[Call]) -> int:
        """How many calls of `stage` may begin: `free`, or one at a time, see why_one()."""
        if self.why_one(stage):
            return 0 if any(call.stage == stage for call in under_way) else 1
        return free

    def why_one(self, stage: str) -> str | None:
        """Why `stage` gets one call at a time; None where it does not."""
        health = self.of[stage]
        if health.is_wrong:
            return "refuses every job"
        return "does not answer" if health.unanswered >= UNANSWERED else None

    def kept(self, under_way: list[Call]) -> str:
        """The stages of which a call is under way and no other begins before it ends, and why; ""
        where there are none.
        """
        stages = dict.fromkeys(call.stage for call in under_way)
        return ", ".join(f"{stage} {why}" for stage in stages if (why := self.why_one(stage)))

    def revise(self, call: Call, ended: Result) -> Result:
        """Note how a call has ended; its result, changed where other calls show that the stage is
        at fault.
        """
        health, status = self.of[call.stage], ended.http_status
        if ended.outcome == "unknown" and status != 409:
            health.unanswered += 1
            if health.unanswered == UNANSWERED:
                log.warning("응답하지 않는 단계: stage=%s %d건 연속 → 응답할 때까지 한 건씩 호출",
                            call.stage, UNANSWERED, extra=logs.about(stage=call.stage))  # fmt: skip
        elif status is not None:
            health.unanswered = 0
        if ended.is_accepted:
            if health.is_wrong:
                text = "it accepts calls again"
                self.alerts.send_recovered("stage_refuses", call.stage, text, at_once=False)
            health.accepted += 1
            health.refused, health.is_wrong = None, False
            health.suspects.pop(call.call_id, None)
        elif status in WRONG or status in GATEWAY or (status == 503 and ended.outcome == "unknown"):
            return self.revise_wrong(health, call, ended)
        elif status in THROTTLED:
            return self.revise_throttled(health, call, ended)
        return ended

    def revise_wrong(self, health: Health, call: Call, ended: Result) -> Result:
        """The result of a wrong answer: the stage is at fault where two jobs got one, and no call
        was accepted in between.
        """
        if note_refusal(health, call):  # the job is at fault
            return ended
        before, health.refused = health.refused, ended
        if not health.is_wrong:
            if before is None or before.call_id == call.call_id:
                return ended
            health.is_wrong = True
            more = ""
            if before.outcome == "failed":
                self.to_revive.append(before)
                if before.is_told:
                    row = row_name(before.table_name, before.job_id).replace("=", " ", 1)
                    more = f"; {row}, which was given up for it, is called again if still owed"
                before.is_told = True
            self.tell(call.stage, ended.error or "", more)
        if ended.outcome == "unknown":
            return self.as_outcome(call, ended, "unknown", hold=True, free=True)
        return self.as_outcome(call, ended, "held", hold=True, retry_after=PROBE_EVERY)

    def tell(self, stage: str, error: str, more: str) -> None:
        log.error("단계가 모든 job을 거절함: stage=%s error=%s → 단계 보류, 한 건씩 확인", stage,
                  error[:500])  # fmt: skip
        text = f"{stage} refuses every job: {error}; it is held and tried with one call at a time"
        self.alerts.send("stage_refuses", text + more, stage=stage, error=error)

    def revise_throttled(self, health: Health, call: Call, ended: Result) -> Result:
        """The result of 429 or 503. It costs an attempt if the stage has accepted other calls since
        it first put this one off.
        """
        if not note_refusal(health, call):
            return ended
        revised = self.as_outcome(call, ended, "retry")
        if revised.delay is not None:
            revised.delay = max(revised.delay, ended.retry_after or 0.0)
        return revised

    def revive(self, conn: db.Connection, unwritten: Container[int]) -> None:
        """Make calls due again that were given up, although the stage was at fault; those whose
        result is still `unwritten`, by call_id, later.
        """
        for result in self.to_revive:
            if result.call_id not in unwritten and revive(conn, result):
                row = row_name(result.table_name, result.job_id)
                log.warning("포기한 호출을 되살림 (단계의 문제): %s stage=%s", row, result.stage)
        self.to_revive = [result for result in self.to_revive if result.call_id in unwritten]

    def as_outcome(self, call: Call, ended: Result, outcome: str, **details) -> Result:
        """The same answer as another outcome."""
        revised = trigger.failure(call, outcome, ended.error or "", self.settings.RETRY_DELAY,
                                  http_status=ended.http_status, **details)  # fmt: skip
        revised.seconds, revised.traceback = ended.seconds, ended.traceback
        return revised


def note_refusal(health: Health, call: Call) -> bool:
    """Note that the stage refused or put off `call`.

    Returns:
        Whether the job is at fault: the stage has accepted other calls since it first refused this.
    """
    before = health.suspects.setdefault(call.call_id, health.accepted)
    if len(health.suspects) > REMEMBERED:
        health.suspects.popitem(last=False)
    return before != health.accepted


REVIVE = """
UPDATE stage_calls SET due_at = now() + interval '1 second', free_attempts = free_attempts + 1
WHERE (job_id, call_id) = (
    SELECT job_id, call_id FROM stage_calls
    WHERE job_id = %(job_id)s AND call_id = %(call_id)s AND due_at = 'infinity'
    FOR UPDATE SKIP LOCKED)
"""


def revive(conn, result: Result) -> bool:
    """Make a call due again that was given up, though the fault was its stage's.

    Returns:
        Whether it is; not where it was cancelled, or its row is locked.
    """
    given = {"job_id": result.job_id, "call_id": result.call_id}
    return db.execute(conn, REVIVE, given).rowcount > 0
