"""Jobs as strips: a lane for each stage, attempts as bars, and thin lines where they waited."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from ops.job import number
from ops.report.data import Report
from ops.report.jobs import Timeline
from ops.report.markup import (
    Markup,
    clock,
    counted,
    join,
    row_name,
    section,
    span,
    stage_name,
    state,
    text,
)
from ops.report.svg import OUTCOMES, legend, level, rect, svg, time_axis, titled
from ops.table import readable

# The least width of a bar (a share of the chart).
NARROWEST = 0.004


def timelines(report: Report) -> Markup:
    shown = join(strip(found, report.span.until) for found in report.timelines)
    if not shown:
        return Markup("")
    heading = "Jobs asked for" if report.asked else "Slowest jobs"
    about = "A bar is an attempt, a thin line before it the time spent waiting for it."
    rows = [row for found in report.timelines for row in found.rows]
    present = {attempt.outcome for row in rows for attempt in row.attempts}
    return section("jobs", heading, f"<p>{about}</p>", legend(OUTCOMES, present), shown)


def strip(found: Timeline, until: datetime) -> Markup:
    """A row with its chart, and below it the rows that belong to it, on the same scale."""
    said = [text(line, 1000) for line in found.said] or [summary(found)]
    listed = join(f"<li>{line}</li>" for line in said)
    head = f'<h3>{text(row_name(found), 130)}</h3><ul class="said">{listed}</ul>'
    cut = '<p class="calm">Its earlier attempts are not shown.</p>' if found.cut else ""
    return Markup(f"<article>{head}{charts(found, until)}{cut}</article>")


def charts(found: Timeline, until: datetime) -> Markup:
    extents = [extent(row, until) for row in found.rows if row.attempts or row.owed]
    if not extents:
        return Markup('<p class="calm">No attempt is on record.</p>')
    start, end = min(first for first, _ in extents), max(last for _, last in extents)
    parts = [chart(found, start, end)]
    for title, children in found.below.items():
        parts.append(Markup(f"<h4>{text(title, 500)}</h4>"))
        parts += [child_chart(child, start, end) for child in children]
    return join([*parts, axis(start, end)])


def summary(found: Timeline) -> Markup:
    """Where a row is, and what became of it, in a line."""
    said = ["cannot be read" if found.is_unread else "deleted"]
    if found.job:
        said = [f"at {state(found.job)}, tenant {text(found.job.tenant_id, 60)}"]
    if found.attempts:
        took = span(sum(map(lasted, found.attempts)))
        said.append(f"{counted(len(found.attempts), 'attempt')}, {took} in all")
    if found.owed:
        how = "given up at" if found.owed.given_up else "owes a call to"
        said.append(f"{how} {text(found.owed.stage, 60)}")
    return join(said, "; ")


def child_chart(found: Timeline, start: datetime, end: datetime) -> Markup:
    title = f"<h5>{text(found.job_id, 130)} <small>{summary(found)}</small></h5>"
    return join([title, chart(found, start, end)])


def lasted(attempt: Any) -> float:
    return max(0.0, (attempt.finished_at - attempt.started_at).total_seconds())


def chart(found: Timeline, start: datetime, end: datetime) -> Markup:
    """The lanes of a row from `start` to `end`."""
    if not (found.attempts or found.owed):
        return Markup("")
    drawn, before = Lanes(start, end), begun(found)
    for attempt in found.attempts:
        drawn.attempt(attempt, before)
        before = max(before, attempt.finished_at)
    if found.owed and not any(attempt.outcome == "calling" for attempt in found.attempts):
        drawn.wait(found.owed, before)
    return drawn.markup()


def begun(found: Timeline) -> datetime:
    """When the first attempt of a row began; without attempts, when its call was recorded."""
    starts = [attempt.started_at for attempt in found.attempts]
    return min(starts + ([found.owed.created_at] if found.owed else []))


def extent(found: Timeline, until: datetime) -> tuple[datetime, datetime]:
    """Beginning and end of a row's chart; the end is now where a call waits or is under way."""
    start = begun(found)
    end = max([attempt.finished_at for attempt in found.attempts], default=until)
    if found.owed is None:
        return start, end
    # The time since a call was given up is drawn as at most a fifth of the rest, to leave it room.
    return start, min(until, end + (end - start) * 0.2) if found.owed.given_up else until


class Lanes:
    """The lanes of a chart from `start` to `end`: one for each stage that is added."""

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
        """Draw an attempt as a bar; `before` is when the attempt before it ended."""
        words = f"{attempt.outcome}, {span(lasted(attempt))}"
        if (counted_as := number(attempt)) != "-":
            words = f"attempt {counted_as} {words}"
        left = min(self.at(attempt.started_at), 1 - NARROWEST)
        width = max(self.at(attempt.finished_at) - left, NARROWEST)
        title = f"{clock(attempt.started_at)} {words}"
        title += f": {readable(attempt.error)}" if attempt.error else ""
        bar = titled(title, rect(attempt.outcome, left, width, 3, 14))
        self.add(attempt.stage, words, level("wait", 10, self.at(before), left), bar)

    def wait(self, owed: Any, before: datetime) -> None:
        """Draw the wait of a call that is owed and not under way."""
        words = "given up" if owed.given_up else "waits to be called"
        kind = "wait stopped" if owed.given_up else "wait"
        self.add(owed.stage, words, level(kind, 10, self.at(max(before, owed.created_at))))

    def markup(self) -> Markup:
        return lanes(
            (
                stage_name(stage),
                svg(20, "; ".join([stage, *self.words[stage]]), *parts, kind="lane"),
            )
            for stage, parts in self.shapes.items()
        )


def axis(start: datetime, end: datetime) -> Markup:
    """The times below all lanes of a row."""
    about = f"{clock(start)} to {clock(end)}"
    drawn = svg(22, about, time_axis(start, end, 1), kind="lane")
    return lanes([(Markup("time"), drawn)])


def lanes(rows: Iterable[tuple[Markup, Markup]]) -> Markup:
    listed = join(f"<dt>{title}</dt><dd>{drawing}</dd>" for title, drawing in rows)
    return Markup(f'<dl class="lanes">{listed}</dl>' if listed else "")
