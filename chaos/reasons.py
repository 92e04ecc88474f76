"""The reasons for which an attempt may follow another one of the same call: the outcome of the
first, and faults that kept its result from being recorded.
"""

import db
from chaos.account import Account, Call, Try
from chaos.history import Fault
from ops.rules import outcomes_by

# Seconds by which the timers of a listener, and of this program, may be late.
SLACK = 0.5
# Seconds within which a listener that lost its connection reconnects and writes its results.
RECONNECTING = 12.0
# A worker whose listener is gone has written its result so many seconds after the answer.
ORPHAN_WRITES = 1.5

# The beginning of the error of a call whose worker died.
KILLED, DIED = "its worker was killed by SIGKILL", "its worker "
DROPPED = "drop database network"
# Misbehaviour of a stage function after which its answer is lost.
LOSES_ANSWER = ("post, then compute in C",)


def why_repeated(account: Account, call: Call, first: Try, second: Try) -> str:
    """The reason for which `second` may follow `first`; "" where there is none."""
    outcomes = outcomes_by(first, second.claimed)
    if first.taken and second.claimed >= first.leased_until:
        return "taken with 202, and not finished while its lease lasted"
    if first.accepted:
        return why_unheard(account, call, first, second, outcomes)
    if "lost" in outcomes or not outcomes:
        why = why_lost(account, call, first, second.claim.at)
        return f"not accepted, {why}" if why else ""
    for outcome, reason in REASONS.items():
        if outcome in outcomes:
            return reason if first.http or outcome == "unknown" else REASONS_WITHOUT_HTTP[outcome]
    return ""


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


def why_unheard(account: Account, call: Call, first: Try, second: Try, outcomes: set[str]) -> str:
    """Why an accepted attempt was not known to be accepted when the next one was claimed."""
    post = next(post for post in first.posts if post.accepted)
    claim = first.claim
    if "lost" in outcomes or not outcomes:
        why = why_lost(account, call, first, second.claim.at)
        return f"accepted, {why}" if why else ""
    if outcomes & {"unknown", "failed", "retry"}:
        if post.finished > claim.at + account.history.timeout - SLACK:
            return "accepted, but too late"
        if account.faults(claim.worker, post.arrived, post.finished + SLACK, "stage"):
            return "accepted, but the network lost the answer"
        if account.mischief(call, first) in LOSES_ANSWER:
            return "accepted, but the stage function never returned"
        ended = max(row.finished for row in first.rows)
        done = account.faults(claim.worker, claim.at, ended, "worker", "listener")
        if KILLED in first.error and any(fault.kind == "kill -9 worker" for fault in done):
            return "accepted, but the worker was killed"
        workers = [fault for fault in done if "worker" in fault.kind]
        if were_frozen(workers, post.finished, claim.at + account.history.timeout):
            return "accepted, but the worker was frozen"
    return ""


def why_lost(account: Account, call: Call, one: Try, when: float) -> str:
    """What kept the listener and its worker from writing the result before `when`."""
    listener, began = one.claim.worker, one.claim.at
    # What a listener has sent before it was killed may be claimed after that.
    done = account.faults(listener, 0.0, when, "listener")
    kinds = {fault.kind for fault in done}
    if "kill -9 listener and workers" in kinds:
        return "all was killed"
    answered = could_be_written(account, call, one)
    known = has_result(account, one) if answered else began + account.history.timeout
    if were_frozen(done, known, one.leased_until):
        return "the listener was frozen until the lease was over"
    since = has_result(account, one) if one.posts else began - RECONNECTING
    # A listener waits for the answer to what was dropped until the deadline of its statement.
    dropped = [fault for fault in account.faults(listener, since - db.DEADLINE, when, "database")
               if fault.kind == DROPPED]  # fmt: skip
    if dropped or account.faults(listener, since, when, "database"):
        return "its result could not be written: no database"
    if was_locked(account, one, when):
        return "its result could not be written: a table was being changed"
    if "kill -9 listener" in kinds and not could_be_written(account, call, one):
        return "the listener was killed, and no answer came in time"
    return ""


def listener_was_killed(account: Account, one: Try) -> bool:
    """Whether it ever was. One that was not keeps each result until the database has it, however
    long that is away.
    """
    done = account.faults(one.claim.worker, 0.0, account.history.ended, "listener")
    return any(fault.kind.startswith("kill -9 listener") for fault in done)


def were_frozen(faults: list[Fault], since: float, until: float) -> bool:
    """Whether one of these faults froze its processes from one moment to the other."""
    freezes = [fault for fault in faults if fault.kind.startswith("freeze")]
    return any(one.began - SLACK <= since and until <= one.ended + SLACK for one in freezes)


def was_locked(account: Account, one: Try, when: float) -> bool:
    """Whether changes of tables kept everybody waiting for most of the time from the answer on."""
    since = has_result(account, one)
    locked = sum(seconds for _, seconds in account.locked(since, when))
    return locked > (when - since) / 2


def has_result(account: Account, one: Try) -> float:
    """When the result of an attempt was there to be written."""
    return min([one.claim.at + account.history.timeout, *(p.finished for p in one.posts)])


def could_be_written(account: Account, call: Call, one: Try) -> bool:
    """Whether a worker whose listener is gone got its answer early enough to write the result."""
    answered = [post for post in one.posts if post.sent and post.status is not None]
    if account.mischief(call, one) in LOSES_ANSWER:
        return False
    if account.faults(one.claim.worker, one.claim.at, one.leased_until, "stage", "worker"):
        return False
    return any(post.finished < one.leased_until - ORPHAN_WRITES for post in answered)


UNNOTICED = 0.5  # seconds


def why_dead(account: Account, call: Call, one: Try) -> str:
    """What ended the worker that was making the call."""
    if account.mischief(call, one) in ("exit", "crash"):
        return "mischief of the stage function"
    ended = max(row.finished for row in one.rows)
    # A listener that waits for the database does not look at its workers: their lease ends them.
    reach = ["worker", "listener"] + ["database"] * ("SIGALRM" in one.error)
    # A worker that is killed while it is idle may be given a call before its end is noticed.
    done = account.faults(one.claim.worker, one.claim.at - UNNOTICED, ended, *reach)
    if "SIGALRM" in one.error:  # also where the listener waits for a lock on the tables
        done += [fault for fault, _ in account.locked(one.claim.at, ended)]
    return next((fault.kind for fault in done), "")
