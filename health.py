"""What the calls of a stage say together. One answer does not tell whether it is about the job or
about the stage: a 404 may mean this job, or that a deploy is under way.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import trigger
from alerts import Alerts
from calls import Result
from pipeline import Call

log = logging.getLogger("listener")

# After so many calls of a stage without an answer, one at a time until it answers.
UNANSWERED = 2
# Answers to a wrong token, path, method or host: about the stage where several jobs get them.
WRONG = (401, 403, 404, 405, 407, 410, 421, 426, 501, 511)
THROTTLED = (429, 503)


@dataclass
class Health:
    """How a stage does, as far as this listener has seen."""

    unanswered: int = 0  # calls without an answer, one after the other
    accepted: int = 0
    refused: Result | None = (
        None  # the last call with a wrong answer, where none was accepted since
    )
    is_wrong: bool = False  # several jobs got one
    # For each call that the stage put off: how many others it had accepted until then.
    throttled: dict[int, int] = field(default_factory=dict)


class StageHealth:
    """The health of every stage."""

    def __init__(self, settings: SimpleNamespace, alerts: Alerts):
        self.settings, self.alerts = settings, alerts
        self.of: dict[str, Health] = defaultdict(Health)
        self.revived: list[Result] = []  # given up for what was the stage's fault

    def most(self, stage: str, free: int, under_way: int) -> int:
        """How many calls of `stage` may begin; one at a time of one that is silent or wrong."""
        health = self.of[stage]
        if health.is_wrong or health.unanswered >= UNANSWERED:
            return max(0, 1 - under_way)
        return free

    def revised(self, call: Call, ended: Result) -> Result:
        """What came of `call`, in the light of the stage's other calls."""
        health = self.of[call.stage]
        if ended.http_status is not None:
            health.unanswered = 0
        elif ended.outcome == "unknown":
            health.unanswered += 1
        if ended.outcome == "succeeded":
            health.accepted += 1
            health.refused, health.is_wrong = None, False
            health.throttled.pop(call.call_id, None)
        elif ended.outcome == "failed" and ended.http_status in WRONG:
            return self.wrong(health, call, ended)
        elif ended.outcome == "held" and ended.http_status in THROTTLED:
            return self.throttled(health, call, ended)
        return ended

    def wrong(self, health: Health, call: Call, ended: Result) -> Result:
        """An answer that is about the stage where two jobs get it one after the other."""
        before = health.refused
        health.refused = ended
        if not health.is_wrong and (before is None or before.call_id == call.call_id):
            return ended
        if not health.is_wrong:
            health.is_wrong = True
            self.revived.append(before)
            self.tell(call.stage, ended.error)
        return self.again(call, ended, "held", hold=True)

    def tell(self, stage: str, error: str) -> None:
        log.error("단계가 모든 job을 거절함: stage=%s error=%s → 단계 보류, 한 건씩 확인", stage,
                  error[:500])  # fmt: skip
        text = f"{stage} refuses every job: {error}; it is held and tried with one call at a time"
        self.alerts.send("stage_refuses", text, stage=stage, error=error)

    def throttled(self, health: Health, call: Call, ended: Result) -> Result:
        """A request for patience: about the job where the stage accepts others meanwhile."""
        before = health.throttled.get(call.call_id)
        if before is None or before == health.accepted:
            if len(health.throttled) >= 1000:
                health.throttled.clear()
            health.throttled[call.call_id] = health.accepted
            return ended
        return self.again(call, ended, "retry")

    def again(self, call: Call, ended: Result, outcome: str, **details) -> Result:
        """The same answer, but with another outcome."""
        revised = trigger.failure(call, outcome, ended.error, self.settings.RETRY_DELAY,
                                  http_status=ended.http_status, **details)  # fmt: skip
        revised.seconds, revised.trace = ended.seconds, ended.trace
        return revised
