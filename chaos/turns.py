"""Checks the order in which calls were made: their priority, their time, the turns of tenants, and
the stage that a pool is to stay with.

Claims under one limit run one after the other: see limits.py.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from chaos.account import ROUNDING, Account, Call
from chaos.history import Lease, Limit
from chaos.limits import VISIBLE, counted, of_limit, shared


def out_of_turn(account: Account) -> Iterator[str]:
    """Calls that were made before others whose turn it was, or before their time."""
    yield from passed_over(account)
    yield from too_soon(account)
    yield from left_too_soon(account)


def passed_over(account: Account) -> Iterator[str]:
    """Calls that waited while one of a lower priority was made, or while another tenant had more
    turns than theirs since the last call of another priority."""
    for limit, lease, passed in waited(account):
        own, tenant = account.priority(lease), lease.tenant
        text = f"call {lease.call} of {lease.stage} for {tenant} waited while"
        instead = [one for one in passed if not is_full(account, limit, lease, one)]
        for one in instead:
            if account.priority(one) < own:
                yield f"{text} call {one.call} of a lower priority was made"
        since = max((one.began for one in passed if account.priority(one) != own), default=0.0)
        turns = Counter(one.tenant for one in instead if limit.is_fair and one.began > since)
        mine = turns.pop(tenant, 0)
        for other, count in turns.items():
            if count > mine + 1:
                yield f"{text} {other} had {count} turns, and {tenant} {mine}"


def waited(account: Account) -> Iterator[tuple[Limit, Lease, list[Lease]]]:
    """Each lease of a stage that is judged, and those that were claimed while its call was due.

    Only the first call of a row is judged, as it may itself have kept the row's next call waiting.
    """
    for limit in account.history.limits:
        leases = of_limit(account.history, limit) if limit.stages == [limit.name] else []
        seen = set(account.history.rolled_back)
        for n, lease in enumerate(leases):
            call, is_first = account.call_of(lease), lease.job not in seen
            seen.add(lease.job)
            if call and is_first and not account.was_set_back(call, lease.began):
                # Leases of one transaction have no order.
                yield limit, lease, [
                    one for one in leases[:n]
                    if one.claimed > call.due + VISIBLE and one.began < lease.began
                ]  # fmt: skip


def is_full(account: Account, limit: Limit, waiting: Lease, one: Lease) -> bool:
    """Whether the tenant of a waiting call may have had as many calls under way as it may have when
    `one` of another tenant was claimed."""
    if limit.per_tenant is None or one.tenant == waiting.tenant:
        return False
    running = sum(
        o.tenant == waiting.tenant
        and o.began <= one.began
        and (o.ended is None or o.ended + VISIBLE > one.claimed)
        for o in of_limit(account.history, limit)
    )
    return running >= limit.per_tenant


def too_soon(account: Account) -> Iterator[str]:
    """Calls that were claimed before the run_after of their row."""
    for call in (call for call in account.calls if call.due > call.arrived):
        for one in call.tries.values():
            early = call.due - one.claimed
            if early > ROUNDING and not account.was_set_back(call, one.claimed):
                yield f"{call}: attempt {one.number} {early:.3f} s before its run_after"


def left_too_soon(account: Account) -> Iterator[str]:
    """Calls of another stage of a pool while that was to stay with one that had calls due."""
    for _, since, before, lease in lingering(account):
        if lease.stage != before.stage and (left := waits(account, before.stage, lease)):
            text = f"call {lease.call} of {lease.stage} was made, and {left} waited"
            yield f"{text}, {lease.claimed - since:.3f} s after its pool came to {before.stage}"


def lingering(account: Account) -> Iterator[tuple[Limit, float, Lease, Lease]]:
    """The leases that were claimed while their pool was to stay with a stage: the pool, since when,
    the lease before it, and the lease."""
    for limit in account.history.limits:
        mine = of_limit(account.history, limit) if limit.linger else []
        since = mine[0].claimed if mine else 0.0
        for before, lease in pairwise(mine):
            if lease.claimed < since + limit.linger:
                yield limit, since, before, lease
            if lease.stage != before.stage:
                since = lease.claimed


def waits(account: Account, stage: str, lease: Lease) -> Call | None:
    """A call of a stage, which was not held, that was due when this lease was claimed."""
    if any(hold.stage == stage and hold.at <= lease.began and hold.until > lease.claimed
           for hold in account.history.holds):  # fmt: skip
        return None
    return next((
        call for call in account.calls
        if call.stage == stage
        and call.due + VISIBLE < lease.claimed
        and (call.left is None or call.left > lease.began)
        and all(account.committed(call, one) > lease.began for one in call.tries.values())
        and not account.was_set_back(call, lease.began)
    ), None)  # fmt: skip


def met(account: Account) -> Counter[str]:
    """How often a limit was reached or a call had to wait, so that the rules are known to have
    judged more than idle stages."""
    of_limits = [(most, counted(leases)) for _, most, leases in shared(account.history)]
    places = [running == most for most, leases in of_limits for _, running in leases]
    found = Counter({"took the last place": sum(places)})
    for limit, lease, passed in waited(account):
        turns = [one for one in passed if limit.is_fair and one.tenant != lease.tenant]
        found["waited while other tenants had turns"] += bool(turns)
        own = account.priority(lease)
        higher = [one for one in passed if own < account.priority(one) < math.inf]
        found["waited while calls of a higher priority were made"] += bool(higher)
    for limit, _, before, lease in lingering(account):
        others = [stage for stage in limit.stages if stage != lease.stage == before.stage]
        waiting = any(waits(account, stage, lease) for stage in others)
        found["kept its pool while another stage waited"] += waiting
    for call in (call for call in account.calls if call.is_join):
        skipped = any("skipped" in one.outcomes for one in call.tries.values())
        found["of a join, skipped as a row was missing"] += skipped
    return found
