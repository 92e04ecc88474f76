"""The parts of a chart, as inline SVG. Horizontal places are in per cent and vertical ones in
pixels: so a chart fits any width without a script, and its letters keep their size.
"""

import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from ops.report.data import STEPS
from ops.report.markup import Markup, attribute, join, text

# The kinds of calls in the order of a stack, from below, with their words in a legend. The name is
# the CSS class that paints it. The rarer kinds also have a pattern, for people who cannot tell the
# colours apart.
OUTCOMES = {
    "succeeded": "succeeded",
    "calling": "under way",
    "retry": "retry: refused for now",
    "held": "held: unreachable or busy",
    "unknown": "unknown: no answer",
    "lost": "lost: its listener is gone",
    "failed": "failed: given up",
    "skipped": "skipped: the job had moved on",
    "cancelled": "cancelled by a person",
}
WAITS = {
    "calling": "calling",
    "waiting": "waiting",
    "planned": "planned for later",
    "retrying": "retrying",
    "given_up": "given up",
}

PATTERNS = {
    "retry": '<path d="M0 6 6 0M-1.5 1.5l3-3M4.5 7.5l3-3"/>',
    "held": '<path d="M0 3h6"/>',
    "unknown": '<circle cx="3" cy="3" r="1.2"/>',
    "lost": '<path d="M3 0v6"/>',
    "failed": '<path d="M0 0 6 6M0 6 6 0"/>',
    "skipped": '<path d="M0 6 6 0"/>',
    "cancelled": '<path d="M0 0 6 6"/>',
}


def patterns() -> Markup:
    """The patterns that classes of page.css fill shapes with; needed once in a page."""
    each = join(
        f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect class="ground {name}" width="6" height="6"/><g class="mark">{marks}</g></pattern>'
        for name, marks in PATTERNS.items()
    )
    return Markup(f'<svg class="patterns" aria-hidden="true"><defs>{each}</defs></svg>')


def legend(kinds: Mapping[str, str], present: Iterable[str]) -> Markup:
    there = set(present)
    items = join(
        f'<li><svg aria-hidden="true"><rect class="{kind}" width="100%" height="100%"/></svg>'
        f"{text(words)}</li>"
        for kind, words in kinds.items()
        if kind in there
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def sample(kind: str) -> Markup:
    """How a line of this kind looks, for a legend."""
    line = upright(kind, 0.5, 0, 12)
    return Markup(f'<svg class="sample" aria-hidden="true">{line}</svg>')


def svg(height: int, about: str, *parts: str, kind: str = "plot") -> Markup:
    """A chart; `about` describes it to a screen reader."""
    return Markup(
        f'<svg class="{kind}" height="{height}" role="img" aria-label="{attribute(about, 1000)}">'
        f"{join(parts)}</svg>"
    )


def titled(words: str, *shapes: str) -> Markup:
    """Shapes with a tooltip."""
    return Markup(f"<g><title>{attribute(words, 300)}</title>{join(shapes)}</g>")


def short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


# Places across are shares of the width, from 0 to 1; those down are pixels.


def rect(kind: str, left: float, width: float, top: float, height: float) -> str:
    return (
        f'<rect class="{kind}" x="{short(100 * left)}%" width="{short(100 * width)}%"'
        f' y="{short(top)}" height="{short(height)}"/>'
    )


def upright(kind: str, at: float, top: float, bottom: float) -> str:
    places = f'x1="{short(100 * at)}%" x2="{short(100 * at)}%"'
    return f'<line class="{kind}" {places} y1="{short(top)}" y2="{short(bottom)}"/>'


def level(kind: str, y: float, left: float = 0.0, right: float = 1.0) -> str:
    places = f'x1="{short(100 * left)}%" x2="{short(100 * right)}%"'
    return f'<line class="{kind}" {places} y1="{short(y)}" y2="{short(y)}"/>'


def label(at: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{short(100 * at)}%" y="{short(y)}">{attribute(words)}</text>'


# --- axes ----------------------------------------------------------------------------------


def tick(at: float, y: float, words: str, kind: str = "") -> str:
    """A label that hangs below the axis so that it stays inside."""
    side = "start" if at < 0.05 else "end" if at > 0.93 else "middle"
    return upright("tick", at, y, y + 4) + label(at, y + 16, words, f"{side} {kind}".rstrip())


def time_axis(since: datetime, until: datetime, y: float, most: int = 7) -> str:
    """At most so many round times of day, or dates; half of them where they have seconds."""
    since, until = since.astimezone(), until.astimezone()  # on the clock of this machine
    seconds = (until - since).total_seconds()
    fitting = (step for step in STEPS if seconds / step < (most if step >= 60 else most / 2))
    step = next(fitting, STEPS[-1])
    form = "%m-%d" if step >= 86400 else "%H:%M:%S" if step < 60 else "%H:%M"
    midnight = since.replace(hour=0, minute=0, second=0, microsecond=0)
    first = math.ceil((since - midnight).total_seconds() / step)
    ticks = []
    for number in range(first, first + 8):
        moment = midnight + timedelta(seconds=number * step)
        if moment > until or not seconds:
            break
        words = format(moment, form if moment.time() != midnight.time() else "%m-%d")
        kind = "odd" if number % 2 else ""
        ticks.append(tick((moment - since).total_seconds() / seconds, y, words, kind))
    return level("axis", y) + join(ticks)


def scale(most: float) -> list[int]:
    """Round numbers from 0 to at most `most`, two to four of them."""
    unit = 10 ** math.floor(math.log10(max(most, 1) / 2))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 3 >= most)
    step = max(1, round(step))
    return [step * number for number in range(int(max(most, 1) / step) + 1)]
