"""Judges a run by its History: what a job was promised, and whether it was kept.

A repeat is a second request for one arrival after a first that may have been carried out. It is
allowed only for a reason that `why_repeated` names; what has none is a finding.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.account import Account, Call, Try
from chaos.history import Exit, History

LOST, REPEATED, OVERLAP = "lost arrival", "repeated accepted call", "two calls at once"
AFTER_LEAVING, ATTEMPTS, KEYS = "call after leaving", "unequal attempts", "idempotency key"
EARLY, PROCESS = "repeated before its lease ran out", "process"

# Seconds within which a worker's clockwork, and this program's, may differ from the plan.
SLACK = 0.5
# A worker that lost its connection reconnects and writes what it has within this.
RECONNECTING = 12.0


@dataclass
class Verdict:
    """findings: (kind, text). repeats: how many of each allowed reason. gaps: attempts of killed
    workers without a row, their jobs having moved on."""

    findings: list[tuple[str, str]] = field(default_factory=list)
    repeats: Counter = field(default_factory=Counter)
    overlaps: Counter = field(default_factory=Counter)
    gaps: list[str] = field(default_factory=list)


def check(history: History) -> Verdict:
    """Every check on every call of a run."""
    account, verdict = Account(history), Verdict()
    verdict.findings += [(ATTEMPTS, text) for text in account.stray]
    for call in account.calls:
        verdict.findings += [(LOST, text) for text in lost(call)]
        verdict.findings += [(AFTER_LEAVING, text) for text in after_leaving(call)]
        check_repeats(account, call, verdict)
        check_attempts(account, call, verdict)
    check_overlaps(account, verdict)
    verdict.findings += [(KEYS, text) for text in wrong_keys(account)]
    verdict.findings += [(PROCESS, text) for text in wrong_exits(account)]
    verdict.findings += [(PROCESS, bug) for bug in history.bugs]
    if history.owed:
        verdict.findings.append((LOST, f"{history.owed} calls were still owed at the end"))
    return verdict


def lost(call: Call) -> Iterator[str]:
    """Every arrival is owed a call, and one that the job never left was accepted."""
    if call.number is None:
        yield f"{call}: none was recorded in the transaction that moved the job"
    for one in call.tries.values():
        for row in one.rows:
            paid = "accepted" in (row.error or "") and any(t.accepted for t in call.tries.values())
            if row.outcome == "skipped" and not paid and (
                call.left is None or call.left > row.finished
            ):  # fmt: skip
                yield f"{call}: attempt {one.number} was skipped while the job owed it"
    succeeded = [one for one in call.tries.values() if "succeeded" in one.outcomes]
    if call.number is not None and call.left is None:
        if not succeeded:
            yield f"{call}: the job never left, and nothing was accepted"
        elif not any(one.accepted for one in succeeded):
            yield f"{call}: recorded as accepted, which the stage never did"


def after_leaving(call: Call) -> Iterator[str]:
    for one, _post in call.posted():
        if call.left is not None and one.claim.at >= call.left:
            yield f"{call}: attempt {one.number} was claimed {one.claim.at - call.left:.3f} s after"


# --- repeats -------------------------------------------------------------------------------


def check_repeats(account: Account, call: Call, verdict: Verdict) -> None:
    posted = call.posted()
    for (first, _), (second, _) in pairwise(posted):
        if first is second:
            continue  # see check_attempts
        reason = why_repeated(account, first, second)
        if not reason:
            said = ", ".join(sorted(first.outcomes)) or "nothing"
            text = f"{call}: attempt {second.number} after attempt {first.number} ({said})"
            verdict.findings.append((REPEATED if first.accepted else ATTEMPTS, text))
            continue
        verdict.repeats[reason] += 1
        uncertain = first.outcomes & {"unknown", "lost"} or gave_up_unsure(first)
        if uncertain and second.claim.at < first.claim.until:
            missing = first.claim.until - second.claim.at
            text = f"{call}: attempt {second.number} came {missing:.3f} s before the lease of"
            verdict.findings.append((EARLY, f"{text} attempt {first.number} ran out ({reason})"))


def gave_up_unsure(one: Try) -> bool:
    """The last attempt that MAX_ATTEMPTS allows got no answer, and was given up."""
    return "failed" in one.outcomes and one.http is None


def why_repeated(account: Account, first: Try, second: Try) -> str:
    """The reason for which `second` may follow `first`; empty where there is none."""
    written = [row for row in first.rows if row.finished <= second.claim.at]
    outcomes = {row.outcome for row in written}
    if "succeeded" in outcomes:
        return ""
    if first.accepted:
        return why_unheard(account, first, second, outcomes)
    if "lost" in outcomes:
        return "not accepted, " + why_lost(account, first, second)
    for outcome, reason in REASONS.items():
        if outcome in outcomes:
            return reason if first.http or outcome == "unknown" else REASONS_WITHOUT_HTTP[outcome]
    killed = account.faults(first.claim.worker, first.claim.at, second.claim.at)
    return "not accepted, and the worker was killed" if killed else ""


REASONS = {
    "unknown": "not accepted: no answer in time",
    "retry": "refused, 408, 425 or 5xx",
    "held": "refused, 429 or 503",
    "failed": "given up, and retried by the operator",
}
REASONS_WITHOUT_HTTP = {
    "retry": "not accepted: the connection broke",
    "held": "the stage could not be reached",
    "failed": "given up without an answer, and retried by the operator",
}


def why_unheard(account: Account, first: Try, second: Try, outcomes: set[str]) -> str:
    """Why an accepted attempt was not known to be accepted when the next one was claimed."""
    post = next(post for post in first.posts if post.accepted)
    claim = first.claim
    if "lost" in outcomes or not outcomes:
        why = why_lost(account, first, second)
        return f"accepted, {why}" if why else ""
    if outcomes & {"unknown", "failed", "retry"}:
        if post.finished > claim.at + account.history.timeout - SLACK:
            return "accepted, but too late"
        if account.faults(claim.worker, post.arrived, post.finished + SLACK, "stage"):
            return "accepted, but the network lost the answer"
        if account.faults(claim.worker, claim.at, claim.until, "worker"):
            return "accepted, but the worker was frozen"
    return ""


def why_lost(account: Account, first: Try, second: Try) -> str:
    """What kept a worker from writing its result before its lease ran out."""
    worker, began = first.claim.worker, first.claim.at
    done = account.faults(worker, began, second.claim.at, "worker")
    for kind in ("kill -9", "freeze"):
        if any(fault.kind.startswith(kind) for fault in done):
            return f"the worker suffered: {kind}"
    if account.faults(worker, began - RECONNECTING, second.claim.at, "database"):
        return "its result could not be written: no database"
    return ""


# --- at once -------------------------------------------------------------------------------


def check_overlaps(account: Account, verdict: Verdict) -> None:
    """Two requests for one job that were open at the same moment."""
    by_job: dict[str, list] = {}
    for call in account.calls:
        by_job.setdefault(call.job, []).extend((call, *pair) for pair in call.posted())
    for posted in by_job.values():
        posted.sort(key=lambda each: each[2].arrived)
        for n, earlier in enumerate(posted):
            for later in posted[n + 1 :]:
                if later[2].arrived < earlier[2].finished:
                    judge_overlap(earlier, later, verdict)


def judge_overlap(earlier: tuple, later: tuple, verdict: Verdict) -> None:
    (call, first, _), (other, second, _) = sorted([earlier, later], key=lambda e: e[1].claim.at)
    if call is not other and call.left is not None and call.left <= second.claim.at:
        verdict.overlaps["the job had moved on meanwhile"] += 1
    elif call is other and second.claim.at >= first.claim.until:
        verdict.overlaps["the lease of the first had run out"] += 1
    elif call is other and "retry" in first.outcomes and first.http is None:
        verdict.overlaps["the connection of the first had broken"] += 1
    else:
        text = f"{call}, attempt {first.number}, and {other}, attempt {second.number}"
        verdict.findings.append((OVERLAP, text))


# --- attempts, keys, processes -------------------------------------------------------------


def check_attempts(account: Account, call: Call, verdict: Verdict) -> None:
    """What the database says of an attempt is what the stage API saw of it."""
    for one in call.tries.values():
        text = f"{call}: attempt {one.number}"
        if len(one.posts) > 1:
            verdict.findings.append((ATTEMPTS, f"{text} was sent {len(one.posts)} times"))
        if not one.rows:
            check_missing(account, call, one, verdict)
            continue
        if "lost" in one.outcomes and not excused(account, one):
            verdict.findings.append((ATTEMPTS, f"{text} is lost, and nothing was done to it"))
        if one.posts and "skipped" in one.outcomes:
            verdict.findings.append((ATTEMPTS, f"{text} is recorded as skipped, but was sent"))
        if not one.posts and (one.http or "succeeded" in one.outcomes):
            verdict.findings.append((ATTEMPTS, f"{text} has an answer, but was never sent"))
        if one.posts and one.http and one.http != one.posts[0].status:
            said = one.posts[0].status
            verdict.findings.append((ATTEMPTS, f"{text}: {one.http} recorded, {said} answered"))


def check_missing(account: Account, call: Call, one: Try, verdict: Verdict) -> None:
    """Without a row: never begun and given back, or of a killed worker whose job moved on."""
    done = account.faults(one.claim.worker, one.claim.at, one.claim.until)
    killed = any(fault.kind.startswith("kill -9") for fault in done)
    text = f"{call}: attempt {one.number} of {one.claim.worker} has no row"
    if not one.posts and done and not (killed and account.history.leases):
        return
    if killed and call.left is not None and not account.history.leases:
        verdict.gaps.append(text)
    else:
        verdict.findings.append((ATTEMPTS, text))


def excused(account: Account, one: Try) -> bool:
    end = max(row.finished for row in one.rows if row.outcome == "lost")
    return bool(account.faults(one.claim.worker, one.claim.at - RECONNECTING, end))


def wrong_keys(account: Account) -> Iterator[str]:
    call_of: dict[str, Call] = {}
    for call in account.calls:
        keys = {post.key for _, post in call.posted()}
        if len(keys) > 1:
            yield f"{call}: sent with {len(keys)} keys"
        for key in keys:
            if call_of.setdefault(key, call) is not call:
                yield f"{call}: has the key of {call_of[key]}"


def wrong_exits(account: Account) -> Iterator[str]:
    for ended in account.history.exits:
        if not (ended.code == 0 and ended.asked) and not was_killed(account, ended):
            yield f"listener {ended.slot} (pid {ended.pid}) ended with exit code {ended.code}"


def was_killed(account: Account, ended: Exit) -> bool:
    return any(
        fault.kind.startswith("kill -9")
        and fault.reach == "worker"
        and ended.slot in fault.slots
        and ended.started <= fault.began <= ended.at
        for fault in account.history.faults
    )
