"""What the calls of a stage say together. One answer does not tell whether it is about the job or
about the stage: a 404 may mean this job, or that a deploy is under way.
"""

import logging
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import trigger
from alerts import Alerts
from calls import TAKEN, Result
from pipeline import Call

log = logging.getLogger("listener")

# After so many calls of a stage without an answer, one at a time until it answers.
UNANSWERED = 2
# Answers to what all calls of a stage have in common: token, path, method, headers, host, and a
# redirect to TLS or to a login. About the stage where several jobs get them.
WRONG = (300, 301, 302, 303, 305, 307, 308, 401, 402, 403, 404, 405, 406, 407, 410, 411, 414, 415,
         417, 421, 426, 431, 501, 505, 511)  # fmt: skip
# Answers of a gateway that has lost its stage, or never had it. Likewise, though the work may run.
LOST = (502, 520, 522)
THROTTLED = (429, 503)
# Seconds between two probes of a stage that refuses every job. They are not doubled: where a stage
# knows nothing of many jobs, the one that it would accept has its turn only after all of them.
PROBE_EVERY = 5.0
REMEMBERED = 1000


@dataclass
class Health:
    """How a stage does, as far as this listener has seen."""

    unanswered: int = 0  # calls without an answer, one after the other
    accepted: int = 0
    # The last call with a wrong answer, where none was accepted since.
    refused: Result | None = None
    is_wrong: bool = False  # several jobs got one
    # For each call that the stage refused or put off: how many others it had accepted by then.
    suspects: OrderedDict[int, int] = field(default_factory=OrderedDict)


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
        health, status = self.of[call.stage], ended.http_status
        if ended.outcome == "unknown" and status != 409:
            health.unanswered += 1
        elif status is not None:
            health.unanswered = 0
        if ended.outcome in ("succeeded", TAKEN):
            health.accepted += 1
            health.refused, health.is_wrong = None, False
            health.suspects.pop(call.call_id, None)
        elif status in WRONG or status in LOST or (status == 503 and ended.outcome == "unknown"):
            return self.wrong(health, call, ended)
        elif status in THROTTLED:
            return self.throttled(health, call, ended)
        return ended

    def wrong(self, health: Health, call: Call, ended: Result) -> Result:
        """An answer that is about the stage where two jobs get it one after the other."""
        if is_about_the_job(health, call):
            return ended
        before, health.refused = health.refused, ended
        if not health.is_wrong:
            if before is None or before.call_id == call.call_id:
                return ended
            health.is_wrong = True
            if before.outcome == "failed":
                self.revived.append(before)
            self.tell(call.stage, ended.error or "")
        if ended.outcome == "unknown":
            return self.again(call, ended, "unknown", hold=True, free=True)
        return self.again(call, ended, "held", hold=True, retry_after=PROBE_EVERY)

    def tell(self, stage: str, error: str) -> None:
        log.error("단계가 모든 job을 거절함: stage=%s error=%s → 단계 보류, 한 건씩 확인", stage,
                  error[:500])  # fmt: skip
        text = f"{stage} refuses every job: {error}; it is held and tried with one call at a time"
        self.alerts.send("stage_refuses", text, stage=stage, error=error)

    def throttled(self, health: Health, call: Call, ended: Result) -> Result:
        """A request for patience: about the job where the stage accepts others meanwhile."""
        if is_about_the_job(health, call):
            return self.again(call, ended, "retry")
        return ended

    def again(self, call: Call, ended: Result, outcome: str, **details) -> Result:
        """The same answer, but with another outcome."""
        revised = trigger.failure(call, outcome, ended.error or "", self.settings.RETRY_DELAY,
                                  http_status=ended.http_status, **details)  # fmt: skip
        revised.seconds, revised.trace = ended.seconds, ended.trace
        return revised


def is_about_the_job(health: Health, call: Call) -> bool:
    """Whether the stage has accepted others since it answered this call in such a way before."""
    before = health.suspects.setdefault(call.call_id, health.accepted)
    if len(health.suspects) > REMEMBERED:
        health.suspects.popitem(last=False)
    return before != health.accepted
