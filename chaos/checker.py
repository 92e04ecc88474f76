"""Judges a run by its History: what a job was promised, and whether it was kept.

A repeat is a second request for one arrival after a first that may have been carried out. It is
allowed only for a reason that reasons.py names; what has none is a finding.
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.account import Account, Call, Try
from chaos.history import Exit, History, Join, Row
from chaos.limits import VISIBLE, ended_amiss, over_limits
from chaos.lost import judged
from chaos.reasons import (
    DIED,
    RECONNECTING,
    listener_was_killed,
    why_dead,
    why_lost,
    why_repeated,
)
from chaos.turns import met, out_of_turn
from failures import SET_FAILED
from ops.rules import (
    AFTER_LEAVING,
    EARLY,
    LIMIT,
    LOST,
    OVERLAP,
    REPEATED,
    UNANSWERED,
    may_still_run,
    outcomes_by,
    was_accepted,
)

ATTEMPTS, KEYS, PROCESS = "unequal attempts", "idempotency key", "process"
JOINED, EFFECTS, TURNS = "join recorded amiss", "effects of a key", "call out of turn"
# How a stage answers 200 without the receiver.
WITHOUT_EFFECT = ("accept and forget", "answer before commit", "work in one transaction")


@dataclass
class Verdict:
    """findings: (kind, text). repeats, overlaps: how many of each allowed reason. met: see
    turns.met()."""

    findings: list[tuple[str, str]] = field(default_factory=list)
    repeats: Counter = field(default_factory=Counter)
    overlaps: Counter = field(default_factory=Counter)
    met: Counter = field(default_factory=Counter)


def check(history: History) -> Verdict:
    """Every check on every call of a run."""
    history = judged(history)
    account = Account(history)
    verdict = Verdict(met=met(account))
    verdict.findings += [(ATTEMPTS, text) for text in account.stray]
    for call in account.calls:
        verdict.findings += [(LOST, text) for text in lost(account, call)]
        verdict.findings += [(AFTER_LEAVING, text) for text in after_leaving(account, call)]
        check_repeats(account, call, verdict)
        check_attempts(account, call, verdict)
    verdict.findings += [(LOST, text) for text in lost_joins(account)]
    verdict.findings += [(JOINED, text) for text in joins_amiss(account)]
    verdict.findings += [(EARLY, text) for text in too_early(account)]
    check_overlaps(account, verdict)
    verdict.findings += [(LIMIT, text) for text in over_limits(history)]
    verdict.findings += [(TURNS, text) for text in out_of_turn(account)]
    verdict.findings += [(ATTEMPTS, text) for text in ended_amiss(account)]
    verdict.findings += [(EFFECTS, text) for text in wrong_effects(history)]
    verdict.findings += [(KEYS, text) for text in wrong_keys(account)]
    verdict.findings += [(PROCESS, text) for text in wrong_exits(account)]
    verdict.findings += [(PROCESS, bug) for bug in history.bugs]
    if history.owed:
        verdict.findings.append((LOST, f"{history.owed} calls were still owed at the end"))
    return verdict


def lost(account: Account, call: Call) -> Iterator[str]:
    """Every arrival is owed a call until the job moves on or the stage has accepted it."""
    if call.number is None:
        yield f"{call}: none was recorded in the transaction that moved the job"
        return
    rows = [row for one in call.tries.values() for row in one.rows]
    accepted = any(one.accepted for one in call.tries.values())
    for row in rows:
        owed = call.left is None or call.left > row.finished
        if is_recorded_anew(account, call, row):
            continue
        if row.outcome == "skipped" and owed and not accepted:
            yield f"{call}: attempt {row.attempt} was skipped while the job owed it"
    outcomes = {row.outcome for row in rows}
    if call.left is None and "succeeded" not in outcomes:
        yield f"{call}: the job never left, and nothing was accepted"
    elif call.dropped and not (call.forgotten or outcomes & {"succeeded", "skipped"}):
        yield f"{call}: it was dropped, and nothing was accepted"


def after_leaving(account: Account, call: Call) -> Iterator[str]:
    for one, _post in call.posted():
        if call.left is None or one.claim.at < call.left + VISIBLE:
            continue
        if call.is_join and is_back(account, call, one):
            continue
        yield f"{call}: attempt {one.number} was claimed {one.claim.at - call.left:.3f} s after"


def is_back(account: Account, call: Call, one: Try) -> bool:
    """Whether all variants were in place when this attempt was claimed, though one was missing
    before: the look that recorded the call saw an older state, or the missing one was deleted."""
    at, committed = one.claim.at, account.committed(call, one)
    has_moved_on = call.moved_on is not None and call.moved_on <= at
    return not has_moved_on and account.families.was_complete(call.job, at - VISIBLE, committed)


def is_recorded_anew(account: Account, call: Call, row: Row) -> bool:
    """Whether a join's call was skipped for a pending look at its rows, which recorded another."""
    return (
        call.is_join
        and (row.error or "").startswith("rows of the join have changed")
        and any(o.is_join and o.job == call.job and o.arrived > call.arrived for o in account.calls)
    )


def lost_joins(account: Account) -> Iterator[str]:
    """A job whose variants are all there owes a call since the last one came."""
    latest = {call.job: call for call in account.calls if call.is_join}
    for job, since in account.families.complete_since().items():
        if job not in latest or latest[job].arrived < since:
            yield f"job {job}: all variants were there from {since:.3f} on, and no call is recorded"


def joins_amiss(account: Account) -> Iterator[str]:
    """A call is recorded for variants that were all there, one of which had come since the call
    before it; or that call was skipped."""
    before: dict[str, float] = {}
    for joined in account.history.joins:
        since = before.get(joined.job, 0.0) - VISIBLE
        if not account.families.was_complete(joined.job, joined.looked - VISIBLE, joined.at):
            yield f"{joined}: a variant was missing"
        arrivals = account.families.arrivals[joined.job]
        came = any(since < at <= joined.at for at in arrivals)
        if not came and not was_skipped(account, joined):
            yield f"{joined}: no variant had come since the call before it"
        before[joined.job] = joined.looked


def was_skipped(account: Account, joined: Join) -> bool:
    """Whether any call that was recorded before for this job was skipped."""
    return any(
        "skipped" in one.outcomes
        for call in account.calls
        if call.is_join and call.job == joined.job and call.arrived < joined.at
        for one in call.tries.values()
    )


# --- repeats -------------------------------------------------------------------------------


def check_repeats(account: Account, call: Call, verdict: Verdict) -> None:
    posted = [one for one, _ in call.posted()]
    rows = [row for one in call.tries.values() for row in one.rows]
    for first, second in pairwise(posted):
        if first is second:
            continue  # see check_attempts
        reason = why_repeated(account, call, first, second)
        knew = was_accepted(rows, second.claimed, VISIBLE)
        if reason and not knew:
            verdict.repeats[reason] += 1
        else:
            said = ", ".join(sorted(first.outcomes)) or "nothing"
            text = f"{call}: attempt {second.number} after attempt {first.number} ({said})"
            verdict.findings.append((REPEATED if first.accepted or knew else ATTEMPTS, text))


def too_early(account: Account) -> Iterator[str]:
    """An attempt that nobody knows the end of is followed by another of its row and stage only
    after its lease, whichever arrival it is of."""
    tried = defaultdict(list)
    for call in account.calls:
        tried[call.job, call.stage] += [(call, one) for one in call.tries.values()]
    for of_stage in tried.values():
        of_stage.sort(key=lambda each: (each[1].claimed, each[1].number))
        for (before, first), (call, second) in pairwise(of_stage):
            when = account.committed(call, second)
            known = outcomes_by(first, when)
            unsure = "failed" in known and first.http is None and first.posts
            unsure = unsure and not (broke(first) or raised(first) or SET_FAILED in first.error)
            under_way = may_still_run(first, when) and (known or first.posts)
            early = first.leased_until - second.claimed
            if early > 0 and (unsure or under_way):
                said = ", ".join(sorted(known)) or "under way"
                text = f"{call}: attempt {second.number} {early:.3f} s too early"
                yield f"{text}; before it attempt {first.number} of {before}: {said}"


def broke(one: Try) -> bool:
    """The connection was closed on a worker that waited: a refusal, as the README has it."""
    return "connection broke" in one.error


def raised(one: Try) -> bool:
    """The stage function raised an exception after the answer."""
    return "Mischief" in one.error


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
                if later[2].arrived < earlier[1].open_until(earlier[2]):
                    judge_overlap(account, earlier, later, verdict)


def judge_overlap(account: Account, earlier: tuple, later: tuple, verdict: Verdict) -> None:
    (call, first, _), (other, second, _) = sorted([earlier, later], key=lambda e: e[1].claim.at)
    left = call.left is not None and call.left <= account.committed(other, second)
    same_stage = call.stage == other.stage and may_still_run(first, second.claimed)
    if call is not other and left and not same_stage:
        verdict.overlaps["the job had moved on meanwhile"] += 1
    elif call is other and second.claim.at >= first.leased_until:
        verdict.overlaps["the lease of the first had run out"] += 1
    elif call is other and broke(first):
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
        if one.posts and (why := unleased(account, call, one)):
            verdict.findings.append((ATTEMPTS, f"{text} was sent, and {why}"))
        if not one.rows:
            check_missing(account, call, one, verdict)
            continue
        ends = [row.finished for row in one.rows if row.outcome == "lost"]
        if ends and not why_lost(account, call, one, ends[0]):
            verdict.findings.append((ATTEMPTS, f"{text} is lost, and nothing was done to it"))
        is_only_lost = one.outcomes == {"lost"} and one.posts and not one.taken
        if is_only_lost and not listener_was_killed(account, one):
            verdict.findings.append((ATTEMPTS, f"{text} is lost, and its listener forgot it"))
        if one.error.startswith(DIED) and not why_dead(account, call, one):
            verdict.findings.append((PROCESS, f"{text}: {one.error}, and nothing was done to it"))
        if one.posts and "skipped" in one.outcomes and not one.taken:  # see ended_amiss
            verdict.findings.append((ATTEMPTS, f"{text} is recorded as skipped, but was sent"))
        if not one.posts and one.http:
            verdict.findings.append((ATTEMPTS, f"{text} has an answer, but was never sent"))
        elif "succeeded" in one.outcomes and not (one.accepted or one.taken):
            verdict.findings.append((ATTEMPTS, f"{text} is recorded as accepted, which it was not"))
        if one.posts and one.http and one.http != one.posts[0].status:
            said = one.posts[0].status
            verdict.findings.append((ATTEMPTS, f"{text}: {one.http} recorded, {said} answered"))


def unleased(account: Account, call: Call, one: Try) -> str:
    """How the lease was missing by which the limits count a call that was sent; "" where it was
    there until the call had a result, or had run out."""
    lease = account.lease(call, one)
    if lease is None:
        return "has no lease"
    is_over = lease.ended is None or lease.ended >= one.leased_until
    if is_over or outcomes_by(one, lease.ended) - UNANSWERED:
        return ""
    if any(post.accepted and post.finished <= lease.ended for post in one.posts):
        return ""  # let go, though the history did not take its result just then
    return f"its lease was ended {one.leased_until - lease.ended:.3f} s early, without an answer"


def check_missing(account: Account, call: Call, one: Try, verdict: Verdict) -> None:
    """Without a row: given back without having begun."""
    claim = one.claim
    if claim.released and not one.posts:
        return
    near = (claim.at - RECONNECTING, claim.until + RECONNECTING)
    ended = account.lease_ended(call, one)
    # The row of its call was gone: the job had moved on, or the next attempt had taken it over.
    was_gone = ended >= min(call.left or one.leased_until, one.leased_until)
    done = account.faults(claim.worker, *near) if was_gone else []
    killed = any(f.kind.startswith("kill -9 listener") and f.began <= ended for f in done)
    if done and not one.posts and not killed:
        return  # given back as well, which only the row of its call would show
    text = f"{call}: attempt {one.number} of {claim.worker} has no row"
    verdict.findings.append((ATTEMPTS, text))


def wrong_effects(history: History) -> Iterator[str]:
    """What the receiver promises: a request with a key has its effect once, however often it came,
    and has it where it was accepted."""
    effects = Counter(effect.key for effect in history.effects)
    yield from (f"{number} effects of {key}" for key, number in effects.items() if number > 1)
    for post in history.posts:
        if post.accepted and post.behaviour not in WITHOUT_EFFECT and post.key not in effects:
            yield f"no effect of {post.key}, which was accepted: {post}"


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
        # Python itself is ended by a SIGTERM that comes before the listener looks out for it.
        as_asked = ended.code == 0 or (ended.code == -signal.SIGTERM and not ended.ready)
        if not (ended.asked and as_asked) and not was_killed(account, ended):
            yield f"listener {ended.slot} (pid {ended.pid}) ended with exit code {ended.code}"


def was_killed(account: Account, ended: Exit) -> bool:
    return any(
        fault.kind.startswith("kill -9")
        and fault.reach == "listener"
        and ended.slot in fault.slots
        and ended.started <= fault.began <= ended.at
        for fault in account.history.faults
    )
