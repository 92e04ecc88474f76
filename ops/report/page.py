"""The page of `report`: a Report in, HTML out. Nothing here asks the database."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pipeline
from ops.alarms import EVERYTHING, INTENDED, JOBS, STAGE, Alarm
from ops.report.charts import stack
from ops.report.data import Report
from ops.report.limits import limits, pools
from ops.report.markup import (
    Markup,
    attribute,
    counted,
    join,
    section,
    share,
    span,
    stage_name,
    text,
    tiles,
)
from ops.report.sections import (
    NO_CALL,
    calls,
    durations,
    errors,
    failed,
    given_up,
    slowest,
    stalled,
    waits,
)
from ops.report.svg import WAITS, legend, patterns
from ops.report.timelines import timelines

CSS = Path(__file__).parent / "page.css"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
{patterns}
<main>
{body}
</main>
</body>
</html>
"""


def page(report: Report) -> str:
    """The whole page, which refers to no other file."""
    parts: list[str] = [
        heading(report),
        attention(report.alarms, stage_name, SECTIONS),
        figures(report),
    ]
    jobs = timelines(report)
    if report.asked:
        parts.append(jobs)
    parts += [given_up(report), failed(report), stalled(report), errors(report), flow(report),
              limits(report), pools(report)]  # fmt: skip
    if report.calls or report.waiting:
        parts += [waits(report), calls(report), durations(report), slowest(report)]
    else:
        parts.append(quiet(report))
    parts += [Markup("") if report.asked else jobs, notes()]
    until = f"{report.span.until:%Y-%m-%d %H:%M}"
    return PAGE.format(
        title=attribute(f"Pipeline report: {report.database}, {until}"),
        # Read here and not at import, as the listener runs without this file.
        css=CSS.read_text(encoding="utf-8"),
        patterns=patterns(),
        body=join(filter(None, parts), "\n"),
    )


def heading(report: Report) -> Markup:
    time = report.span
    return Markup(
        f"<header><h1>Pipeline report</h1><p>{text(report.database)}</p>"
        f"<p>{span(time.seconds)}, from <time>{time.since:%Y-%m-%d %H:%M:%S}</time>"
        f" to <time>{time.until:%Y-%m-%d %H:%M:%S}</time> ({text(f'{time.until:%Z}')})</p></header>"
    )


# --- what needs a person, and the figures --------------------------------------------------


# By kind of alarm: the section with the details.
SECTIONS = {"given_up": "given-up", "failed": "set-failed", "stalled": "stalled", "late": "waits"}
URGENCY = {
    EVERYTHING: ("everything", "Every stage is concerned"),
    STAGE: ("stage", "A stage is not called, or not soon enough"),
    JOBS: ("rows", "Jobs rest until a person does something"),
    INTENDED: ("intended", "A person has paused it"),
}


def attention(
    found: list[Alarm], named: Callable[[str], Markup], sections: Mapping[str, str]
) -> Markup:
    """What a person has to look at, the most urgent first, each with what to type.

    Args:
        named: makes the name of a stage, or a link.
        sections: the section of the page with the details, by kind of alarm.
    """
    if not found:
        calm = "Nothing is held, late, given up, failed or stalled."
        return Markup(f'<p class="calm">{calm}</p>')
    items = join(alarm(one, named, sections) for one in found)
    return Markup(f'<ol class="attention" aria-label="Needs a person">{items}</ol>')


def alarm(found: Alarm, named: Callable[[str], Markup], sections: Mapping[str, str]) -> Markup:
    kind, about = URGENCY[found.urgency]
    stage = f"<b>{named(found.stage)}</b> " if found.stage else ""
    what = text(found.what)
    if target := sections.get(found.kind):
        what = Markup(f'<a href="#{target}">{what}</a>')
    reason = f'<p class="reason">{text(found.reason)}</p>' if found.reason else ""
    mend = f'<p class="mend"><code>{text(found.mend, 1000)}</code></p>' if found.mend else ""
    return Markup(f'<li class="{kind}" title="{about}"><p>{stage}{what}</p>{reason}{mend}</li>')


def total(rows: list) -> int:
    """How many jobs all groups have, including those that are not shown."""
    return rows[0].total if rows else 0


def overdue(report: Report, stage: Any) -> float:
    """For how many seconds its oldest due call has been due; 0 where none is."""
    return (report.span.until - stage.oldest_due_at).total_seconds() if stage.due else 0.0


def figures(report: Report) -> Markup:
    made = [row for row in report.calls if row.outcome not in NO_CALL]
    count = sum(row.calls for row in made)
    failures = sum(row.calls for row in made if row.outcome != "succeeded")
    late = max((stage for stage in report.stages if stage.due), default=None,
               key=lambda stage: overdue(report, stage))  # fmt: skip
    given_up = sum(stage.given_up for stage in report.stages)
    stuck, set_failed = total(report.stalled), total(report.failed)
    listeners = f"{counted(report.listeners, 'listener')} connected"
    failed_of = f"{failures:,} of {count:,}" if count else "no calls"
    found = [
        ("Jobs in flight", report.in_flight, listeners, False),
        ("Calls", count, f"{count / report.span.seconds * 3600:,.0f} an hour", False),
        ("Failed", share(failures, count), failed_of, False),
        ("Oldest due", span(overdue(report, late) if late else None),
         text(late.stage, 40) if late else "no call is due", False),
        ("Given up", given_up, "wait for a person", given_up),
        ("Stalled", stuck, "stuck in their state", stuck),
    ]  # fmt: skip
    if set_failed:
        found.append(("Set failed", set_failed, "by their stage", True))
    return tiles(found)


# --- the pipeline --------------------------------------------------------------------------


def flow(report: Report) -> Markup:
    later: dict[str, Counter] = defaultdict(Counter)
    for row in report.waiting:
        later[row.stage].update(waiting=row.waiting, planned=row.planned)
    most = max((stage.owed + stage.calling for stage in report.stages), default=0)
    cards = join(card(stage, later[stage.stage], max(most, 1)) for stage in report.stages)
    about = "<p>A job owes a call to the next stage; the bars show where how many are.</p>"
    legends = legend(WAITS, WAITS) if most else ""
    return section("pipeline", "The pipeline", about, legends, f'<ol class="flow">{cards}</ol>')


def card(stage: Any, later: Counter, most: int) -> str:
    """One stage; its bar is as wide as the card where `most` calls are there."""
    counts = {
        "calling": stage.calling,
        "waiting": later["waiting"],
        **({"planned": later["planned"]} if later["planned"] else {}),
        "retrying": stage.retrying,
        "given_up": stage.given_up,
    }
    limit = f" of {stage.max_running}" if stage.max_running else ""
    rows = join(
        f'<div class="{"some" if count else "none"}"><dt>{name.replace("_", " ")}</dt>'
        f"<dd>{count:,}{limit if name == 'calling' else ''}</dd></div>"
        for name, count in {"owed": stage.owed, **counts}.items()
    )
    held = ""
    if stage.held_until:
        until = "paused" if stage.paused else f"held until {stage.held_until.astimezone():%H:%M:%S}"
        held = f'<p class="hold">{until}</p>'
    if stage.working:
        held += f"<p>{counted(stage.working, 'call')} taken with 202</p>"
    hour = "no calls in the last hour"
    if stage.calls_last_hour:
        failed = share(stage.failures_last_hour, stage.calls_last_hour)
        hour = f"last hour: {counted(stage.calls_last_hour, 'call')}, {failed} failed"
    about = f"{stage.stage}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return (
        f"<li><h3>{stage_name(stage.stage)}</h3>{stack(counts, most, about)}"
        f"<dl>{rows}</dl>{held}<p>{hour}</p></li>"
    )


def quiet(report: Report) -> Markup:
    states = ", ".join(map(str, pipeline.routes()))
    return Markup(
        f'<p class="quiet">No call was made in the last {span(report.span.seconds)}, and no job '
        f"waits for one. A job comes in when its row reaches one of the states {text(states, 500)}."
        f" Where some should have: {pipeline.JSL} verify tells whether all is in place.</p>"
    )


def notes() -> Markup:
    return Markup(
        "<footer><p>A call that is repeated counts each time. Failed is what did not succeed; "
        "skipped and cancelled calls were never made and do not count.</p></footer>"
    )
