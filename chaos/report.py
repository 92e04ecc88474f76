"""The figures of a run, as tables."""

import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from chaos.checker import Verdict
from chaos.deck import KINDS
from chaos.history import Fault, History
from chaos.lost import jobs_with_lost_commits
from chaos.trend import Series
from ops.table import table

SHOWN = 20  # findings that are printed; the file has all


def report(history: History, verdict: Verdict) -> Iterator[str]:
    yield "\nFaults, and seconds from their end to the next call and to all listening again"
    yield faults_table(history)
    yield "\nThe run"
    yield table(["", "number"], [[name, count] for name, count in figures(history)])
    for title, counted in (
        ("How the stages met the requests", Counter(post.behaviour for post in history.posts)),
        ("Outcomes in stage_attempts", Counter(row.outcome for row in history.rows)),
        ("Called again, each with the reason that allows it", verdict.repeats),
        ("Two requests of one job open at once, each with the reason", verdict.overlaps),
        ("Calls that met a limit, or waited", verdict.met),
    ):
        yield f"\n{title}"
        yield table(["", "number"], [[name, count] for name, count in counted.most_common()])
    yield ""
    kinds = Counter(kind for kind, _ in verdict.findings)
    if not kinds:
        yield f"✓ seed {history.seed}: every promise was kept"
        return
    yield f"✗ seed {history.seed}: " + ", ".join(f"{n} × {kind}" for kind, n in kinds.items())
    for kind, text in verdict.findings[:SHOWN]:
        yield f"  {kind}: {text}"
    if len(verdict.findings) > SHOWN:
        yield f"  … and {len(verdict.findings) - SHOWN} more"


def figures(history: History) -> list[tuple[str, int]]:
    arrivals = [m for m in history.moves if f"{m.step}/{m.status}" in history.routes]
    return [
        ("seconds of faults", round(history.calm - history.began)),
        ("seconds until nothing was owed", round(history.ended - history.calm)),
        ("faults", len(history.faults)),
        ("jobs", len({move.job for move in history.moves})),
        ("moves of jobs, committed", len(history.moves)),
        ("arrivals in a routed state", len(arrivals)),
        ("calls that joins owed", len(history.joins)),
        ("calls claimed", len({(claim.job, claim.call) for claim in history.claims})),
        ("attempts claimed", len(history.claims)),
        ("requests", len(history.posts)),
        ("requests accepted", sum(post.accepted for post in history.posts)),
        ("requests taken with 202", sum(post.taken for post in history.posts)),
        ("effects written with the receiver", len(history.effects)),
        ("listeners started", len(history.listeners)),
        ("results written by workers without a listener", history.orphans),
        ("attempts at which a stage function misbehaved", len(history.mischief)),
        ("jobs and variants of which commits may be lost", len(jobs_with_lost_commits(history))),
    ]


def faults_table(history: History) -> str:
    """A row for each kind, also for one that did not come, and for all together."""
    kinds = sorted({*KINDS, *(fault.kind for fault in history.faults)})
    listed = {kind: [fault for fault in history.faults if fault.kind == kind] for kind in kinds}
    rows = [
        [kind, len(mine), *spread(until_next_call(history, fault) for fault in mine),
         *spread(until_listening(history, fault) for fault in mine)]
        for kind, mine in (listed | {"all": history.faults}).items()
    ]  # fmt: skip
    head = ["", "number", "call, median", "worst", "listening, median", "worst"]
    return table(head, rows)


def spread(measured: Iterable[float | None]) -> tuple[str, str]:
    seconds = [one for one in measured if one is not None]
    if not seconds:
        return "-", "-"
    return f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"


def until_next_call(history: History, fault: Fault) -> float | None:
    """Seconds from the end of a fault to the next request of a listener that it hit."""
    arrived = [post.arrived for post in history.posts if post.slot in fault.slots]
    n = bisect_left(arrived, fault.ended)
    return arrived[n] - fault.ended if n < len(arrived) else None


def until_listening(history: History, fault: Fault) -> float | None:
    """Seconds from the end of a fault until all listeners that it made reconnect listen again.

    Only reconnects before the next fault of these listeners are counted.
    """
    later = [other.began for other in history.faults if shares(fault, other)]
    limit = min(later, default=history.calm)
    heard = [
        one.at
        for one in history.listening
        if one.slot in fault.slots and fault.ended <= one.at < limit
    ]
    return max(heard) - fault.ended if heard else None


def shares(fault: Fault, other: Fault) -> bool:
    return other.began > fault.ended and bool(set(fault.slots) & set(other.slots))


# --- soak ----------------------------------------------------------------------------------

ROWS = 10  # of the table; the plot has all samples


def soak_report(seconds: Sequence[float], series: Sequence[Series]) -> Iterator[str]:
    last = len(seconds) - 1
    chosen = sorted({round(n * last / (ROWS - 1)) for n in range(ROWS)})
    head = ["", "unit", *(f"{seconds[n] / 60:.1f} min" for n in chosen), "highest",
            "growth", ""]  # fmt: skip
    rows = [
        [one.name, one.unit, *(f"{one.values[n]:.4g}" for n in chosen),
         f"{max(one.values):.4g}", f"{one.growth:+.3g}", verdict_on(one)]
        for one in series
    ]  # fmt: skip
    yield "\nMeasured, the highest of all samples, and the growth over the second half"
    yield table(head, rows)
    growing = [one.name for one in series if one.grows]
    yield f"\n✗ grows: {', '.join(growing)}" if growing else "\n✓ flat"


def verdict_on(series: Series) -> str:
    if series.allowed is None:
        return "not judged"
    return "GROWS" if series.grows else "flat"
