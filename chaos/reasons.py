"""Why an attempt may follow another one of the same call: what the first came to, and which faults
kept its result from being known.
"""

from chaos.account import Account, Try

# Seconds within which a worker's clockwork, and this program's, may differ from the plan.
SLACK = 0.5
# A worker that lost its connection reconnects and writes what it has within this.
RECONNECTING = 12.0


def why_repeated(account: Account, first: Try, second: Try) -> str:
    """The reason for which `second` may follow `first`; empty where there is none."""
    outcomes = first.outcomes_by(second.claim.at)
    if first.accepted:
        return why_unheard(account, first, second, outcomes)
    if "lost" in outcomes or not outcomes:
        why = why_lost(account, first, second.claim.at)
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


def why_unheard(account: Account, first: Try, second: Try, outcomes: set[str]) -> str:
    """Why an accepted attempt was not known to be accepted when the next one was claimed."""
    post = next(post for post in first.posts if post.accepted)
    claim = first.claim
    if "lost" in outcomes or not outcomes:
        why = why_lost(account, first, second.claim.at)
        return f"accepted, {why}" if why else ""
    if outcomes & {"unknown", "failed", "retry"}:
        if post.finished > claim.at + account.history.timeout - SLACK:
            return "accepted, but too late"
        if account.faults(claim.worker, post.arrived, post.finished + SLACK, "stage"):
            return "accepted, but the network lost the answer"
        if account.faults(claim.worker, claim.at, claim.until, "worker"):
            return "accepted, but the worker was frozen"
    return ""


def why_lost(account: Account, one: Try, when: float) -> str:
    """What kept a worker from writing its result before `when`."""
    worker, began = one.claim.worker, one.claim.at
    done = account.faults(worker, began, when, "worker")
    for kind in ("kill -9", "freeze"):
        if any(fault.kind.startswith(kind) for fault in done):
            return f"the worker suffered: {kind}"
    if account.faults(worker, began - RECONNECTING, when, "database"):
        return "its result could not be written: no database"
    return ""
