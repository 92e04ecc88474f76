"""The overview and the page of a stage, made of the data of asking.py with parts of the report."""

from collections.abc import Mapping
from typing import Any

from ops import status
from ops.alarms import JOBS, LATE, Alarm, alarms, of_stage
from ops.report.charts import stack
from ops.report.data import Report
from ops.report.markup import Markup, attribute, join, section, span, state, table, text, tiles
from ops.report.page import attention
from ops.report.sections import calls, durations
from ops.report.svg import WAITS, legend
from ops.serve.asking import Board, Stage
from ops.serve.parts import (
    action_link,
    actions,
    as_of,
    heading,
    path_of,
    row_link,
    stage_link,
)
from ops.table import clock, readable

# --- the overview --------------------------------------------------------------------------


def overview(found: Board) -> Markup:
    base = found.status["database"]
    return join([
        heading(
            "Pipeline",
            f"{base['name']} on {base['host']}:{base['port']}, PostgreSQL {base['version']}",
            as_of(found.status["at"]),
        ),
        attention(alarms(found.status), stage_link, {}),
        figures(found.status),
        stages(found),
        pools(found.status["pools"]),
        listeners(found.status["listeners"]),
    ], "\n")  # fmt: skip


def figures(state: dict[str, Any]) -> Markup:
    def total(name: str) -> Any:
        """The sum of all stages, or "?" where that of one is not known."""
        counts = [row[name] for row in state["stages"]]
        return "?" if None in counts else sum(counts)

    connected = sum(row["connected"] for row in state["listeners"])
    late = state["oldest_due_seconds"]
    return tiles([
        ("Listeners", connected, "connected", not connected),
        ("Owed", total("owed"), f"{total('calling'):,} under way", False),
        ("Calls", f"{state['calls_per_minute']:g}", "a minute, in the last hour", False),
        ("Oldest due", span(late), "no call is due" if late is None else "", (late or 0) > LATE),
        ("Given up", total("given_up"), "wait for a person", total("given_up")),
        ("Failed", total("failed"), "set so by their stage", total("failed")),
        ("Stalled", total("stalled"), "stuck in their state", total("stalled")),
    ])  # fmt: skip


STAGES = ["Stage", "*Where its jobs are", "#Owed", "#Calling", "#Retry", "#Given up", "#Failed",
          "#Stalled", "#Oldest due", "#Calls an hour", "#Failing", "#p50", "#p95"]  # fmt: skip


def stages(found: Board) -> Markup:
    most = max((sum(counts.values()) for counts in found.waiting.values()), default=0)
    rows = [stage_row(row, found.waiting.get(row["stage"], {}), most) for row in
            found.status["stages"]]  # fmt: skip
    about = "Calls an hour, how many failed, p50 and p95 are those of the last hour."
    return section("stages", "Stages", legend(WAITS, WAITS) if most else "",
                   table(STAGES, rows, about))  # fmt: skip


def stage_row(row: dict[str, Any], waiting: Mapping[str, int], most: int) -> list[Any]:
    """A row of the table of stages; zeros are left out, and a count that is not known is a ?."""
    cells = status.stage_cells(row)
    _, owed, calling, retrying, given_up, oldest, an_hour, failing, p50, p95 = cells
    words = ", ".join(f"{n:,} {WAITS[kind]}" for kind, n in waiting.items() if n)
    held = ""
    if row["held_until"]:
        how = "paused" if row["paused"] else f"held until {clock(row['held_until'])}"
        held = f'<p class="hold">{how}</p>'
    # The bar has no numbers: it was read a moment later, and they could differ from the cells.
    bar = stack(waiting, most, words) if words else None
    numbers = [owed, calling, retrying, given_up, row["failed"], row["stalled"]]
    times = [oldest, an_hour, failing, p50, p95]
    return [
        Markup(f"{stage_link(row['stage'])}{held}"),
        bar,
        *("?" if value is None else value or None for value in numbers),
        *(None if value in ("-", 0) else value for value in times),
    ]


def pools(found: list[dict[str, Any]]) -> Markup:
    if not found:
        return Markup("")
    lines = join(f"<li>{text(status.pool_line(row), 500)}</li>" for row in found)
    return section("pools", "Pools", f'<ul class="facts">{lines}</ul>')


def listeners(found: list[dict[str, Any]]) -> Markup:
    if not found:
        return section("listeners", "Listeners", '<p class="calm">None is connected.</p>')
    rows = []
    for row in found:
        shown = row["calls"][: status.MOST_CALLS]
        under_way = [f"<div>{call(one)}</div>" for one in shown]
        if len(row["calls"]) > len(shown):
            under_way.append(f"<div>and {len(row['calls']) - len(shown)} more</div>")
        since = Markup(span(row["seconds"]))
        rows.append([row["listener"], since, row["doing"], join(under_way) or None])
    header = ["Listener", "#Since", "*Doing", "*Calls under way, the oldest first"]
    return section(
        "listeners",
        "Listeners",
        table(header, rows, "Those that are connected, or whose calls may go on."),
    )


def call(one: dict[str, Any]) -> str:
    key = str(one["job_id"])
    link = f'<a href="{attribute(path_of("job", key), 10_000)}">{text(key, 60)}</a>'
    since = f"attempt {one['attempt']}, since {span(one['seconds'])}"
    since += ", no answer" * one["unanswered"]
    return f"{stage_link(one['stage'])} of {link} <small>{since}</small>"


# --- a stage -------------------------------------------------------------------------------


def stage(found: Stage, may_act: bool) -> Markup:
    row, name = found.row, found.row["stage"]
    found_alarms = sorted(of_stage(row, found.at), key=lambda alarm: alarm.urgency)
    if found.unknown:
        found_alarms.append(Alarm(JOBS, "resting", found.unknown))
    others = [words for words, colour in status.notes(row) if not colour]
    notes = join(f"<li>{text(words)}</li>" for words in others)
    links = [action_link("resume", "Resume…", stage=name)] if row["held_until"] else []
    if not row["paused"]:
        links.append(action_link("pause", "Pause…", stage=name))
    if row["given_up"] and row["position"] is not None:
        links.append(action_link("retry", f"Retry {row['given_up']:,} given up…", stage=name))
    limit = f" of {row['max_running']}" if row["max_running"] else ""
    share = row["failure_share"]
    return join([
        heading(name, f"for rows of {', '.join(row['tables'])}", as_of(found.at)),
        attention(found_alarms, stage_link, {}),
        f'<ul class="facts" aria-label="State">{notes}</ul>' if notes else "",
        actions(may_act, *links),
        tiles([
            ("Owed", row["owed"], "calls", False),
            ("Calling", f"{row['calling']:,}{limit}", "under way", False),
            ("Retry", row["retrying"], "wait for their next attempt", False),
            ("Oldest due", span(row["oldest_due_seconds"]) if row["due"] else "–", "",
             row["due"] and row["oldest_due_seconds"] > LATE),
            ("Last hour", row["calls_last_hour"],
             "calls" if share is None else f"calls, {share:.0%} failed", False),
            ("p50, p95", f"{span(row['p50_seconds'])}, {span(row['p95_seconds'])}",
             "of accepted calls", False),
        ]),
        *(resting(kind, found.rest.get(kind, [])) for kind in RESTING),
        charts(found.report),
    ], "\n")  # fmt: skip


def charts(report: Report | None) -> Markup:
    if report is None:
        return Markup('<p class="quiet">The charts took the database too long.</p>')
    about = "<footer><p>The charts show the last 24 hours.</p></footer>"
    return join([durations(report), calls(report), about], "\n")


RESTING = {
    "given_up": ("Given-up calls", "They wait for a person, the latest first."),
    "failed": ("Failed rows", "Set so by the stage: the page of a row has the way back."),
    "stalled": ("Stalled rows", "No call and no stage moves them on, the oldest first."),
}


def resting(kind: str, found: list) -> Markup:
    if not found:
        return Markup("")
    title, about = RESTING[kind]
    rows = [
        [row_link(row.table_name, row.job_id), state(row), text(row.tenant_id, 40),
         row.since and clock(row.since),
         readable(row.last_error if kind == "given_up" else row.reason)]
        for row in found[:50]
    ]  # fmt: skip
    if len(found) > len(rows):
        about += f" The first {len(rows)}."
    header = ["Row", "State", "Tenant", "Since", "*Why"]
    return section(kind.replace("_", "-"), title, table(header, rows, about))
