"""Jobs as strips: a lane for each stage, attempts as bars, and thin lines where they waited."""

from datetime import datetime
from typing import Any

from ops.report.data import Report
from ops.report.jobs import Timeline
from ops.report.markup import Markup, clock, counted, join, row_name, section, span, state, text
from ops.report.svg import OUTCOMES, legend, level, rect, svg, time_axis, titled

# What is there at all is seen (a share of the width).
NARROWEST = 0.004


def timelines(report: Report) -> Markup:
    shown = join(strip(found, report.span.until) for found in report.timelines)
    if not shown:
        return Markup("")
    heading = "Jobs asked for" if report.asked else "Slowest jobs"
    about = "A bar is an attempt, a thin line before it the time spent waiting for it."
    present = {a.outcome for found in report.timelines for a in found.attempts}
    return section("jobs", heading, f"<p>{about}</p>", legend(OUTCOMES, present), shown)


def strip(found: Timeline, until: datetime) -> Markup:
    said, drawn = ["deleted"], '<p class="calm">No attempt is on record.</p>'
    if found.job:
        said = [f"at {state(found.job)}, tenant {text(found.job.tenant_id, 60)}"]
    if found.attempts:
        took = span(sum(map(lasted, found.attempts)))
        said.append(f"{counted(len(found.attempts), 'attempt')}, {took} in all")
    if found.owed:
        how = "given up at" if found.owed.given_up else "owes a call to"
        said.append(f"{how} {text(found.owed.stage, 60)}")
    if found.attempts or found.owed:
        drawn = lanes(found, until)
    if found.cut:
        said.append("earlier attempts are not shown")
    return Markup(
        f"<article><h3>{text(row_name(found), 130)}</h3><p>{join(said, '; ')}</p>{drawn}</article>"
    )


def lasted(attempt: Any) -> float:
    return max(0.0, (attempt.finished_at - attempt.started_at).total_seconds())


def lanes(found: Timeline, until: datetime) -> Markup:
    drawn = Lanes(*extent(found, until))
    before = drawn.start
    for attempt in found.attempts:
        drawn.attempt(attempt, before)
        before = max(before, attempt.finished_at)
    if found.owed and not any(attempt.outcome == "calling" for attempt in found.attempts):
        drawn.wait(found.owed, before)
    return drawn.markup()


def extent(found: Timeline, until: datetime) -> tuple[datetime, datetime]:
    """The time that a job's chart shows: up to now where the job waits, or is being called."""
    starts = [attempt.started_at for attempt in found.attempts]
    start = min(starts + ([found.owed.created_at] if found.owed else []))
    end = max([attempt.finished_at for attempt in found.attempts], default=until)
    if found.owed is None:
        return start, end
    # What was given up long ago would leave no room for what went before.
    return start, min(until, end + (end - start) * 0.2) if found.owed.given_up else until


class Lanes:
    """A lane for each stage that comes up, all from `start` to `end`."""

    def __init__(self, start: datetime, end: datetime):
        self.start, self.end = start, end
        self.words: dict[str, list[str]] = {}
        self.shapes: dict[str, list[str]] = {}

    def at(self, moment: datetime) -> float:
        seconds = max((self.end - self.start).total_seconds(), 0.001)
        return min(1.0, max(0.0, (moment - self.start).total_seconds() / seconds))

    def add(self, stage: str, words: str, *shapes: str) -> None:
        self.words.setdefault(stage, []).append(words)
        self.shapes.setdefault(stage, []).extend(shapes)

    def attempt(self, attempt: Any, before: datetime) -> None:
        """An attempt as a bar; `before` is when the one before it was over."""
        words = f"attempt {attempt.attempt} {attempt.outcome}, {span(lasted(attempt))}"
        left = min(self.at(attempt.started_at), 1 - NARROWEST)
        width = max(self.at(attempt.finished_at) - left, NARROWEST)
        title = f"{clock(attempt.started_at)} {words}"
        title += f": {attempt.error}" if attempt.error else ""
        bar = titled(title, rect(attempt.outcome, left, width, 3, 14))
        self.add(attempt.stage, words, level("wait", 10, self.at(before), left), bar)

    def wait(self, owed: Any, before: datetime) -> None:
        """The call that the job owes, and that nobody is making."""
        words = "given up" if owed.given_up else "waits to be called"
        kind = "wait stopped" if owed.given_up else "wait"
        self.add(owed.stage, words, level(kind, 10, self.at(max(before, owed.created_at))))

    def markup(self) -> Markup:
        rows = [
            (text(stage, 60), svg(20, "; ".join([stage, *self.words[stage]]), *parts, kind="lane"))
            for stage, parts in self.shapes.items()
        ]
        axis = time_axis(self.start, self.end, 1)
        about = f"{clock(self.start)} to {clock(self.end)}"
        rows.append((Markup("time"), svg(22, about, axis, kind="lane")))
        listed = join(f"<dt>{name}</dt><dd>{drawing}</dd>" for name, drawing in rows)
        return Markup(f'<dl class="lanes">{listed}</dl>')
