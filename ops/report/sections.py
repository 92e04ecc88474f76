"""The longer sections of the page: waiting, durations, outcomes, and the jobs to look at."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pipeline
from ops.job import number
from ops.report.charts import LogAxis, histogram, stack, stacked_bars, trend
from ops.report.data import MOST_ERRORS, Report, folded
from ops.report.markup import (
    Markup,
    clock,
    counted,
    join,
    row_name,
    section,
    share,
    span,
    stage_name,
    state,
    table,
    text,
)
from ops.report.svg import OUTCOMES, WAITS, legend, sample

# As in the views, outcomes without a call are not counted as failed calls.
NO_CALL = ("skipped", "cancelled")

NOTHING = Markup('<p class="calm">No call was made in this time.</p>')


def waits(report: Report) -> Markup:
    if not report.waiting:
        return section("waits", "Where jobs wait", '<p class="calm">No job waits for a call.</p>')
    held = {s.stage: "paused" if s.paused else "held" for s in report.stages if s.held_until}
    most = max(row.jobs for row in report.waiting)
    rows = []
    for row in itertools.chain(*by_stage(report, report.waiting).values()):
        counts = {kind: getattr(row, kind) for kind in WAITS}
        words = ", ".join(f"{count:,} {WAITS[kind]}" for kind, count in counts.items() if count)
        bar = Markup(f"{stack(counts, most, words)}<small>{words}</small>")
        ages = [Markup(span(age)) for age in (row.median_seconds, row.longest_seconds)]
        mark = f" ({held[row.stage]})" if row.stage in held else ""
        rows.append([state(row), Markup(stage_name(row.stage) + mark), row.jobs, bar, *ages])
    header = ["~State", "~Next call", "#Jobs", "*Why", "#Median wait", "#Longest wait"]
    about = "Jobs that owe a call or are being called, by state, and for how long."
    return section("waits", "Where jobs wait", table(header, rows, about))


# --- durations and outcomes ----------------------------------------------------------------


def by_stage(report: Report, rows: Sequence) -> dict[str, list]:
    """The rows of every stage that has some, in the order of the pipeline."""
    found: dict[str, list] = {stage.stage: [] for stage in report.stages}
    for row in rows:
        found.setdefault(row.stage, []).append(row)
    return {stage: rows for stage, rows in found.items() if rows}


def durations(report: Report) -> Markup:
    if not report.histogram:
        return section("durations", "How long calls take", NOTHING)
    axis = LogAxis(row.bucket for row in report.histogram)
    known = {row.stage: row for row in report.durations}
    timeouts = {stage.stage: stage.timeout for stage in report.stages}
    trends = by_stage(report, report.trend)
    rows = join(
        spread(report, stage, rows, axis, known.get(stage), timeouts.get(stage), trends.get(stage))
        for stage, rows in by_stage(report, report.histogram).items()
    )
    about = (
        "<p>Every accepted call of each stage, from quick to slow on a logarithmic axis, with its "
        "median (p50), the time within which 95 % were done (p95) and the longest. Hatched: calls "
        "that were not accepted. Beside it p50 to p95, hour by hour.</p>"
    )
    return section("durations", "How long calls take", about, f'<div class="spreads">{rows}</div>')


def spread(report, stage: str, rows, axis, known, timeout, trend_rows) -> str:
    """One stage: its figures, its histogram, and how it went over time."""
    marks = {}
    if known:
        marks = {"p50": known.p50, "p95": known.p95, "longest": known.longest}
    count = sum(row.calls for row in rows)
    failed = share(sum(row.calls for row in rows if not row.accepted), count)
    about = f"{counted(count, 'call')}, {failed} failed"
    said = "; ".join([stage, about, *(f"{key} {span(at)}" for key, at in marks.items())])
    if timeout:
        marks["timeout"] = timeout
    numbers = join(
        f"<div><dt>{sample(key)}{key}</dt><dd>{span(at)}</dd></div>" for key, at in marks.items()
    )
    drawn = histogram(rows, axis, marks, 66, said)
    over_time = ""
    if trend_rows and len(trend_rows) > 1:
        p95 = [row.p95 for row in trend_rows]
        said = f"{stage}, hour by hour: p95 from {span(min(p95))} to {span(max(p95))}"
        over_time = trend(report.span, trend_rows, 66, said)
    return (
        f'<div class="spread"><div><h3>{stage_name(stage)}</h3><p>{about}</p>'
        f'<dl class="numbers">{numbers}</dl></div>{drawn}<div>{over_time}</div></div>'
    )


def calls(report: Report) -> Markup:
    heading = "Calls and failures over time"
    if not report.calls:
        return section("calls", heading, NOTHING)
    bars: dict[int, Counter] = defaultdict(Counter)
    failures: dict[int, Counter] = defaultdict(Counter)
    total: Counter = Counter()
    for row in report.calls:
        bars[row.back][row.outcome] += row.calls
        total[row.outcome] += row.calls
        if row.outcome not in ("succeeded", *NO_CALL):
            failures[row.back][row.outcome] += row.calls
    each = f"each bar {span(report.span.step).replace('.0', '')}"
    words = ", ".join(f"{total[kind]:,} {kind}" for kind in OUTCOMES if total[kind])
    parts = [
        legend(OUTCOMES, total),
        f"<h3>All <small>{each}</small></h3>",
        stacked_bars(report.span, bars, 170, f"Calls over time: {words}"),
    ]
    if failures:
        parts.append(f"<h3>Failures <small>{each}, on a scale of their own</small></h3>")
        parts.append(stacked_bars(report.span, failures, 90, f"Failures over time: {words}"))
    return section("calls", heading, *parts, outcomes(report, total))


def outcomes(report: Report, total: Counter) -> Markup:
    kinds = [kind for kind in OUTCOMES if total[kind]]
    rows = []
    for stage, found in by_stage(report, report.calls).items():
        counts: Counter = Counter()
        for row in found:
            counts[row.outcome] += row.calls
        rows.append([stage_name(stage), *(counts[kind] or None for kind in kinds)])
    return table(["~Stage", *(f"#{kind}" for kind in kinds)], rows, "The same by stage.")


# --- jobs by name --------------------------------------------------------------------------


def slowest(report: Report) -> Markup:
    rows = [
        [row_name(row), stage_name(row.stage), Markup(span(row.seconds)), row.outcome,
         row.http_status, Markup(number(row)), Markup(clock(row.started_at)), row.error]
        for row in report.slowest
    ]  # fmt: skip
    header = ["Job", "~Stage", "#Took", "Outcome", "#HTTP", "#Attempt", "Started", "*Error"]
    about = "The ten that took longest."
    return section("slowest", "Slowest calls", table(header, rows, about)) if rows else Markup("")


def errors(report: Report) -> Markup:
    kinds = [kind for kind in OUTCOMES if any(getattr(row, kind, 0) for row in report.errors)]
    rows = [
        [alike(row.error, row.texts), stage_name(row.stage), row.calls,
         *(getattr(row, kind) or None for kind in kinds), last_one(row)]
        for row in report.errors
    ]  # fmt: skip
    if not rows:
        return Markup("")
    header = ["*Error", "~Stage", "#Calls", *(f"#{kind}" for kind in kinds), "Last job"]
    last = "all" if report.errors[0].total < MOST_ERRORS else f"the last {MOST_ERRORS:,}"
    about = f"Of {last} calls that were not accepted; … stands for ids and numbers that differ."
    about += rarer(report.errors[0].total - sum(row.calls for row in report.errors))
    return section("errors", "Most frequent errors", table(header, rows, about))


def last_one(row: Any) -> Markup:
    """When an error was last seen, and of which job."""
    return Markup(f"{clock(row.last)}<div><small>{text(row_name(row), 100)}</small></div>")


def rarer(count: int) -> str:
    return f" Not shown: {counted(count, 'call')} with a rarer one." if count else ""


def alike(error: str | None, texts: int) -> str | None:
    """The folded text of several errors; a single one as it is."""
    return error if texts == 1 else folded(error)


def given_up(report: Report) -> Markup:
    if not report.given_up:
        return Markup("")
    rows = [
        [alike(row.error, row.texts), stage_name(row.stage), row.jobs, examples(row),
         ages(report, row)]
        for row in report.given_up
    ]  # fmt: skip
    header = ["*Error", "~Stage", "#Calls", "Latest jobs, tenants", "#Owed for"]
    about = f"The ten most frequent errors. Once mended: {pipeline.JSL} retry, by job or stage."
    about += rarer(report.given_up[0].total - sum(row.jobs for row in report.given_up))
    return section("given-up", "Given-up calls", table(header, rows, about))


def stalled(report: Report) -> Markup:
    rows = [
        [alike(row.reason, row.texts), place(row), row.jobs, examples(row), ages(report, row)]
        for row in report.stalled
    ]
    header = ["*Reason", "~State", "#Jobs", "Oldest jobs, tenants", "#Stalled for"]
    about = "Jobs that no call and no stage moves on, for longer than their stage's timeout."
    return section("stalled", "Stalled jobs", table(header, rows, about)) if rows else Markup("")


def failed(report: Report) -> Markup:
    rows = [
        [alike(row.reason, row.texts), place(row), row.jobs, examples(row), way_back(row),
         ages(report, row)]
        for row in report.failed
    ]  # fmt: skip
    header = ["*Reason", "~State", "#Jobs", "Oldest jobs, tenants", "*To send the oldest back",
              "#Failed for"]  # fmt: skip
    about = "Jobs that their stage has set failed: once mended, a person sends them back."
    return section("set-failed", "Failed jobs", table(header, rows, about)) if rows else Markup("")


def place(row: Any) -> Markup:
    return Markup(f"{state(row)}<div><small>stage {stage_name(row.stage)}</small></div>")


def way_back(row: Any) -> Markup:
    sql = pipeline.sent_back(row.table_name, row.job_ids[0], row.stage, (row.stage, "failed"))
    return Markup(f"<code>{text(sql, 1000)}</code>")


def ages(report: Report, row: Any) -> Markup:
    """The ages of the youngest and the oldest of the jobs."""
    seconds = [(report.span.until - m).total_seconds() for m in (row.last, row.first) if m]
    return Markup(" to ".join(dict.fromkeys(map(span, seconds))) or "–")


def examples(row: Any) -> Markup:
    """A few of the jobs, each with its tenant."""
    return join(
        f"<div>{text(job, 60)} <small>{text(tenant, 24)}</small></div>"
        for job, tenant in zip(row.job_ids, row.tenants, strict=True)
    )
