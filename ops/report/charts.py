"""The charts of the page: functions from rows of `data` to SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from ops.report.data import BUCKETS_A_DECADE, Span
from ops.report.markup import Markup, clock, join, span
from ops.report.svg import (
    OUTCOMES,
    WAITS,
    label,
    level,
    rect,
    scale,
    short,
    svg,
    tick,
    time_axis,
    titled,
    upright,
)

# The least height of a bar (pixels).
LOWEST = 1.5


def stack(counts: Mapping[str, int], whole: int, about: str) -> Markup:
    """A horizontal bar with a part for each kind; `whole` is the count of its full width."""
    left, parts = 0, []
    for kind in WAITS:
        if count := counts.get(kind):
            parts.append(rect(kind, left / whole, count / whole, 0, 12))
            left += count
    return svg(12, about, *parts, kind="stack")


# --- over time -----------------------------------------------------------------------------


def stacked_bars(time: Span, bars: Mapping[int, Mapping[str, int]], height: int, about: str):
    """Calls by outcome, with a bar for each `step` of `time`. `bars`: by how many steps ago."""
    most = max((sum(bar.values()) for bar in bars.values()), default=1)
    per_call = (height - 12) / most
    parts = []
    for value in scale(most):
        y = height - value * per_call
        number = f'<text class="end" x="-8" y="{short(y + 4)}">{value:,}</text>'
        parts.append(level("grid", y) + number)
    for back, bar in sorted(bars.items(), reverse=True):
        left = (time.bars - 1 - back + 0.08) / time.bars
        bottom, shapes = float(height), []
        for outcome in OUTCOMES:
            if count := bar.get(outcome):
                tall = max(LOWEST, count * per_call)
                bottom -= tall
                shapes.append(rect(outcome, left, 0.84 / time.bars, bottom, tall))
        parts.append(titled(bar_title(time, back, bar), *shapes))
    return svg(height + 22, about, *parts, time_axis(time.since, time.until, height))


def bar_title(time: Span, back: int, bar: Mapping[str, int]) -> str:
    end = time.until - timedelta(seconds=back * time.step)
    start = max(time.since, end - timedelta(seconds=time.step))
    counts = ", ".join(f"{bar[outcome]:,} {outcome}" for outcome in OUTCOMES if bar.get(outcome))
    return f"{clock(start)} to {clock(end, start)}: {counts}"


def trend(time: Span, rows: Sequence, height: int, about: str) -> Markup:
    """p50 and p95 hour by hour, as a band of steps; a gap where nothing was accepted."""
    most = max(row.p95 for row in rows) or 1
    band, line, last = [], [], None

    def across(moment: datetime) -> str:
        share = (moment - time.since).total_seconds() / time.seconds
        return short(100 * min(1.0, max(0.0, share)))

    for row in rows:
        left, right = across(row.began), across(row.ended)
        low, high = (short(100 - 100 * seconds / most) for seconds in (row.p50, row.p95))
        band.append(f"M{left} {low}V{high}H{right}V{low}Z")
        line.append(f"{'L' if row.began == last else 'M'}{left} {low}H{right}")
        last = row.ended
    stretched = (
        f'<svg y="14" width="100%" height="{height - 14}" viewBox="0 0 100 100"'
        f' preserveAspectRatio="none"><path class="band" d="{join(band)}"/>'
        f'<path class="median" d="{join(line)}"/></svg>'
    )
    top = level("grid", 14) + label(0, 10, f"p95 up to {span(most)}", "start")
    axis = time_axis(time.since, time.until, height, most=3)
    return svg(height + 22, about, top, stretched, axis, kind="plot flush")


# --- durations -----------------------------------------------------------------------------

# The least distance between labels in a narrow chart (a share of its width).
APART = 0.27

TICKS = {0.001: "1 ms", 0.01: "10 ms", 0.1: "100 ms", 1: "1 s", 10: "10 s", 60: "1 min",
         600: "10 min", 3600: "1 h", 86400: "1 d", 864000: "10 d"}  # fmt: skip


class LogAxis:
    """Seconds on a logarithmic axis that is wide enough for the buckets given."""

    def __init__(self, buckets: Iterable[int]):
        found = list(buckets)
        self.low = min(found) - 1
        self.width = max(found) + 2 - self.low

    def at(self, seconds: float) -> float:
        return self.of_bucket(math.log10(max(seconds, 1e-9)) * BUCKETS_A_DECADE)

    def of_bucket(self, bucket: float) -> float:
        return (bucket - self.low) / self.width

    def drawn(self, height: int) -> str:
        places = [(self.at(seconds), words) for seconds, words in TICKS.items()]
        lines, last = [], -1.0
        for at, words in places:
            if 0.02 <= at <= 0.98:
                lines.append(upright("grid", at, 0, height))
                if at - last >= APART:
                    lines.append(tick(at, height, words))
                    last = at
        return join(lines) + level("axis", height)


def histogram(rows: Sequence, axis: LogAxis, marks: Mapping[str, float], height: int, about: str):
    """How many calls took how long: accepted ones below, others on top of them.

    Args:
        marks: seconds to point out, by name (see svg.sample): p50, p95, longest, timeout.
    """
    counts: dict[int, dict[bool, int]] = {}
    for row in rows:
        counts.setdefault(row.bucket, {})[row.accepted] = row.calls
    most = max(sum(found.values()) for found in counts.values())
    parts = [axis.drawn(height)]
    for bucket, found in sorted(counts.items()):
        low, high = (span(10 ** (edge / BUCKETS_A_DECADE)) for edge in (bucket, bucket + 1))
        bottom, bars, words = float(height), [], []
        for accepted, kind, said in (True, "succeeded", ""), (False, "retry", "not "):
            if count := found.get(accepted):
                tall = max(LOWEST, (height - 16) * count / most)
                bottom -= tall
                left, width = axis.of_bucket(bucket + 0.06), 0.88 / axis.width
                bars.append(rect(kind, left, width, bottom, tall))
                words.append(f"{count:,} {said}accepted")
        parts.append(titled(f"{low} to {high}: {', '.join(words)}", *bars))
    for name, seconds in marks.items():
        if 0 < (at := axis.at(seconds)) < 1:
            parts.append(upright(name, at, 4, height))
    return svg(height + 22, about, *parts, kind="plot flush")
