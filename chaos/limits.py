"""Checks that the limits over all listeners were kept: of stages, of pools and of tenants.

Claims under one limit run one after the other, so its leases are committed in the order in which
they were counted. A call that was taken with 202 keeps its lease until its row moves on.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from chaos.account import ROUNDING, Account
from chaos.history import TAKEN, History, Lease, Limit, Move

# Seconds after its commit when a row is visible to every new statement.
VISIBLE = 0.05


def over_limits(history: History) -> Iterator[str]:
    """Calls that were claimed though their stage, pool or tenant was full, or too soon."""
    for name, most, leases in shared(history):
        for lease, running in counted(leases):
            if running > most:
                yield f"call {lease.call} of {name} was claimed as number {running} of {most}"
    for limit in history.limits:
        if limit.seconds:
            yield from too_fast(of_limit(history, limit), limit)


def of_limit(history: History, limit: Limit) -> list[Lease]:
    return [lease for lease in history.leases if lease.stage in limit.stages]


def shared(history: History) -> Iterator[tuple[str, int, list[Lease]]]:
    """The leases of which only so many may be under way at once, and what limits them."""
    for limit in history.limits:
        mine = of_limit(history, limit)
        if limit.most:
            yield limit.name, limit.most, mine
        if limit.per_tenant:
            for tenant, leases in by_tenant(mine).items():
                yield f"{limit.name} for {tenant}", limit.per_tenant, leases


def counted(leases: list[Lease]) -> Iterator[tuple[Lease, int]]:
    """Each lease, and how many calls were under way when it was claimed, itself included."""
    for n, lease in enumerate(leases):
        running = sum(
            one.until > lease.claimed and (one.ended is None or one.ended > lease.began)
            for one in leases[: n + 1]
        )
        yield lease, running


def too_fast(leases: list[Lease], limit: Limit) -> Iterator[str]:
    for before, lease in pairwise(leases):
        apart = lease.claimed - before.claimed
        if apart < limit.seconds - ROUNDING:
            yield (
                f"call {lease.call} of {limit.name} was claimed {apart:.3f} s after call "
                f"{before.call}, not {limit.seconds:g} s"
            )


def by_tenant(leases: list[Lease]) -> dict[str | None, list[Lease]]:
    found = defaultdict(list)
    for lease in leases:
        found[lease.tenant].append(lease)
    return found


# --- taken calls ---------------------------------------------------------------------------


def ended_amiss(account: Account) -> Iterator[str]:
    """A call that was taken is under way until its row moves on or its lease is over, and is
    recorded as what the row says."""
    moves = defaultdict(list)
    for move in account.history.moves:
        moves[move.job].append(move)
    for call in account.calls:
        for one in call.tries.values():
            lease = account.lease(call, one)
            if lease is None or lease.ended is None:
                continue
            both = zip([None, *moves[call.job]], moves[call.job], strict=False)
            left = [move for before, move in both if leaves(before, move, lease)]
            for row in (row for row in one.rows if row.http == TAKEN):
                if why := amiss(row.outcome, lease, left, call.stage):
                    yield f"{call}: attempt {one.number}, taken with 202, {why}"


def leaves(before: Move | None, move: Move, lease: Lease) -> bool:
    """Whether the row moved on while its call was under way. It may come back in the same
    transaction, after which it is in the state of before.
    """
    running = (lease.stage, "running")
    was_running = before is not None and (before.step, before.status) == running
    is_running = (move.step, move.status) == running
    return lease.claimed <= move.at <= lease.ended and (was_running or not is_running)


def amiss(outcome: str, lease: Lease, left: list[Move], stage: str) -> str:
    """What is wrong with the end of a taken call; "" where nothing is."""
    if outcome == "unknown":
        return "" if lease.ended >= lease.until else "was given up before its lease was over"
    if not left:
        return f"is recorded as {outcome}, and its row had not moved on"
    failed = [(move.step, move.status) == (stage, "failed") for move in left]
    if (outcome == "succeeded" and all(failed)) or (
        outcome in ("failed", "retry") and not any(failed)
    ):
        return f"is recorded as {outcome}, which its row does not say"
    if outcome == "skipped" and not any(move.step is None for move in left):
        return "is recorded as skipped, and its row was not deleted"
    return ""
