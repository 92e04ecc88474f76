"""The pages as HTML, out of what `asking` has found; parts and looks are those of the report."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pipeline
from ops import job, status
from ops.alarms import LATE, Alarm, alarms, of_stage
from ops.report.charts import stack
from ops.report.data import Report
from ops.report.markup import Markup, attribute, join, section, span, state, table, text
from ops.report.page import CSS, URGENCY
from ops.report.sections import calls, durations
from ops.report.svg import WAITS, legend, patterns
from ops.report.timelines import timelines
from ops.rows import own_stage, said, word_for
from ops.serve.actions import Action, Done
from ops.serve.asking import Board, Found, Row, Stage
from ops.serve.looks import Unreadable
from ops.table import clock, plain, readable

OWN_CSS = Path(__file__).parent / "serve.css"
# What a link to an action, and its form, may say.
FIELDS = ("stage", "id", "table")
MOST_ATTEMPTS = 200

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<nav aria-label="Pages">
{links}
</nav>
{patterns}
<main id="main" tabindex="-1">
{body}
</main>
</body>
</html>
"""


def css() -> str:
    """That of the report, and ours."""
    return CSS.read_text(encoding="utf-8") + OWN_CSS.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Shown:
    """What is around a page.

    Args:
        person: who has logged in; "" where nobody has.
        refresh: seconds until the page is read again; 0: it stands still; None: it never does.
    """

    title: str
    css: str
    path: str
    person: str
    may_log_in: bool
    refresh: int | None


def whole(shown: Shown, body: str) -> str:
    pages = {"/": "Overview", "/search": "Search", "/report": "Report"}
    links = [nav_link(shown, path, name) for path, name in pages.items()]
    links.append('<span class="room"></span>')
    if shown.refresh:
        every = f"Refreshes every {shown.refresh} s"
        links.append(f'<span class="about">{every}: <a href="?refresh=off">stop</a></span>')
    elif shown.refresh == 0:
        links.append('<span class="about">Stands still: <a href="?">refresh</a></span>')
    if shown.person:
        links.append(nav_link(shown, "/logout", "Log out", f"{text(shown.person, 60)} "))
    elif shown.may_log_in:
        links.append(nav_link(shown, "/login", "Log in"))
    return PAGE.format(
        title=attribute(f"{shown.title} – Job State Listener", 200),
        css=shown.css,
        links="\n".join(links),
        patterns=patterns(),
        body=body,
    )


def nav_link(shown: Shown, path: str, name: str, before: str = "") -> str:
    current = ' aria-current="page"' * (shown.path == path)
    return f'<span>{before}<a href="{path}"{current}>{name}</a></span>'


def as_of(moment: datetime) -> str:
    local = moment.astimezone()
    return f"as of {local:%F %T} {local:%Z}"


def heading(title: Any, *lines: Any) -> Markup:
    below = join(f"<p>{text(line, 300)}</p>" for line in lines if line)
    return Markup(f"<header><h1>{text(title, 300)}</h1>{below}</header>")


def sorry(title: str, line: str) -> Markup:
    back = '<p><a href="/">To the overview</a></p>'
    return Markup(f'{heading(title)}<p class="problem" role="alert">{text(line, 1000)}</p>{back}')


def unreadable(away: Unreadable) -> Markup:
    problem = f'<p class="problem" role="alert">{text(away.reason, 1000)}</p>'
    waits = "This page asks again by itself. Calls that are owed wait in the database."
    return Markup(f'{heading(away.title)}{problem}<p class="quiet">{waits}</p>')


# --- links ---------------------------------------------------------------------------------


def path_of(*parts: str) -> str:
    return "/" + "/".join(quote(part, safe="") for part in parts)


def stage_link(name: str | None) -> Markup:
    return Markup(f'<a href="{path_of("stage", name)}">{text(name, 60)}</a>') if name else text("")


def row_path(table_name: str, key: str) -> str:
    """Without its table where that is jobs, which most ids are of."""
    is_only = len(pipeline.tables()) == 1
    return path_of("job", key) if is_only else path_of("job", table_name, key)


def row_link(table_name: str, key: str) -> Markup:
    name = key if table_name == pipeline.JOBS.name else f"{table_name} {key}"
    return Markup(f'<a href="{attribute(row_path(table_name, key), 10_000)}">{text(name, 130)}</a>')


def action_link(name: str, label: str, **given: str | None) -> str:
    fields = urlencode({key: value for key, value in given.items() if value})
    return f'<a class="button" href="{attribute(f"/do/{name}?{fields}", 10_000)}">{text(label)}</a>'


def actions(may_act: bool, *links: str) -> Markup:
    return Markup(f'<p class="actions">{join(links, " ")}</p>' if may_act and links else "")


# --- the overview --------------------------------------------------------------------------


def overview(found: Board) -> Markup:
    base = found.said["database"]
    return join([
        heading(
            "Pipeline",
            f"{base['name']} on {base['host']}:{base['port']}, PostgreSQL {base['version']}",
            as_of(found.said["at"]),
        ),
        attention(alarms(found.said)),
        figures(found.said),
        stages(found),
        pools(found.said["pools"]),
        listeners(found.said["listeners"]),
    ], "\n")  # fmt: skip


def attention(found: list[Alarm]) -> Markup:
    """What needs a person, the most urgent first, each with what to type."""
    if not found:
        calm = "Nothing is held, late, given up, failed or stalled."
        return Markup(f'<p class="calm">{calm}</p>')
    items = join(map(alarm, found))
    return Markup(f'<ol class="attention" aria-label="Needs a person">{items}</ol>')


def alarm(found: Alarm) -> Markup:
    """As in the report, but that it leads to the page of its stage."""
    kind, about = URGENCY[found.urgency]
    stage = f"<b>{stage_link(found.stage)}</b> " if found.stage else ""
    reason = f'<p class="reason">{text(found.reason)}</p>' if found.reason else ""
    mend = f'<p class="mend"><code>{text(found.mend, 1000)}</code></p>' if found.mend else ""
    what = f"<p>{stage}{text(found.what)}</p>"
    return Markup(f'<li class="{kind}" title="{about}">{what}{reason}{mend}</li>')


def figures(said: dict[str, Any]) -> Markup:
    def total(name: str) -> int:
        return sum(row[name] or 0 for row in said["stages"])

    connected = sum(row["connected"] for row in said["listeners"])
    late = said["oldest_due_seconds"]
    return tiles([
        ("Listeners", connected, "connected", not connected),
        ("Owed", total("owed"), f"{total('calling'):,} under way", False),
        ("Calls", f"{said['calls_per_minute']:g}", "a minute, in the last hour", False),
        ("Oldest due", span(late), "nothing is due" if late is None else "", (late or 0) > LATE),
        ("Given up", total("given_up"), "wait for a person", total("given_up")),
        ("Failed", total("failed"), "set so by their stage", total("failed")),
        ("Stalled", total("stalled"), "stuck in their state", total("stalled")),
    ])  # fmt: skip


def tiles(found: Sequence[tuple[str, Any, str, Any]]) -> Markup:
    """Name, figure, what is said about it, whether it is bad."""
    each = join(
        f'<div class="{"bad" if bad else "good"}"><dt>{name}</dt>'
        f"<dd>{text(value)}<small>{text(about, 60) if about else ''}</small></dd></div>"
        for name, value, about, bad in found
    )
    return Markup(f'<dl class="figures">{each}</dl>')


STAGES = ["Stage", "*Where its jobs are", "#Owed", "#Calling", "#Retry", "#Given up", "#Failed",
          "#Stalled", "#Oldest due", "#Calls an hour", "#Failing", "#p50", "#p95"]  # fmt: skip


def stages(found: Board) -> Markup:
    most = max((sum(counts.values()) for counts in found.waiting.values()), default=0)
    rows = [stage_row(row, found.waiting.get(row["stage"], {}), most) for row in
            found.said["stages"]]  # fmt: skip
    about = "Calls an hour, how many failed, p50 and p95 are those of the last hour."
    return section("stages", "Stages", legend(WAITS, WAITS) if most else "",
                   table(STAGES, rows, about))  # fmt: skip


def stage_row(row: dict[str, Any], waiting: Mapping[str, int], most: int) -> list[Any]:
    """The cells of `status`, what is none of it left out; names and numbers never disagree."""
    cells = status.stage_cells(row)
    _, owed, calling, retrying, given_up, oldest, an_hour, failing, p50, p95 = cells
    words = ", ".join(f"{n:,} {WAITS[kind]}" for kind, n in waiting.items() if n)
    held = ""
    if row["held_until"]:
        how = "paused" if row["paused"] else f"held until {clock(row['held_until'])}"
        held = f'<p class="hold">{how}</p>'
    # Without the words: it was asked a moment later, and they would disagree with the numbers.
    bar = stack(waiting, most, words) if words else None
    numbers = [owed, calling, retrying, given_up, row["failed"], row["stalled"]]
    times = [oldest, an_hour, failing, p50, p95]
    return [
        Markup(f"{stage_link(row['stage'])}{held}"),
        bar,
        *(value or None for value in numbers),
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
    return f"{stage_link(one['stage'])} of {link} <small>{since}</small>"


# --- a stage -------------------------------------------------------------------------------


def stage(found: Stage, may_act: bool) -> Markup:
    row, name = found.row, found.row["stage"]
    found_alarms = sorted(of_stage(row, found.at), key=lambda alarm: alarm.urgency)
    others = [words for words, colour in status.notes(row) if not colour]
    notes = join(f"<li>{text(words)}</li>" for words in others)
    links = [action_link("resume", "Resume…", stage=name)] if row["held_until"] else []
    if not row["paused"]:
        links.append(action_link("pause", "Pause…", stage=name))
    if row["given_up"]:
        links.append(action_link("retry", f"Retry {row['given_up']:,} given up…", stage=name))
    limit = f" of {row['max_running']}" if row["max_running"] else ""
    share = row["failure_share"]
    return join([
        heading(name, f"for rows of {', '.join(row['tables'])}", as_of(found.at)),
        attention(found_alarms),
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


# --- a row ---------------------------------------------------------------------------------


def row(shown: Row, may_act: bool) -> Markup:
    found = shown.found
    where, *lines = job.place_lines(found)
    where = where.removeprefix(f"{plain(said(found.row))} ")
    facts = join(f"<li>{text(line, 2000)}</li>" for line in lines)
    needs = any(call.given_up for call in found.owed) or found.rests.get(
        (found.row.table_name, found.row.key)
    )
    return join([
        heading(said(found.row), where, as_of(shown.at)),
        f'<ul class="{"problem" if needs else "facts"}" aria-label="What it owes">{facts}</ul>',
        actions(may_act, *row_actions(found)),
        timelines(shown.report),
        children(found),
        attempts(found.attempts),
    ], "\n")  # fmt: skip


def row_actions(found: job.Found) -> Iterator[str]:
    given = {"id": found.row.key, "table": found.row.table_name}
    is_called = {call.stage for call in found.calling}
    for call in found.owed:
        if call.stage not in is_called:
            yield action_link("retry", f"Retry {call.stage}…", stage=call.stage, **given)
        yield action_link("cancel", f"Cancel {call.stage}…", stage=call.stage, **given)
    if found.row.is_there and (own := own_stage(found.row)) and own not in is_called:
        yield action_link("again", f"Call {own} again…", **given)


def children(found: job.Found) -> Markup:
    """The rows that belong to it."""
    parts = []
    for of in found.below:
        if of["rows"]:
            rows = [
                [row_link(child.table_name, child.job_id), state(child),
                 job.told(child, found.rests)]
                for child in of["rows"][: job.MOST_CHILDREN]
            ]  # fmt: skip
            counted = sum(one.rows for one in of["states"])
            about = f"{len(rows)} of {counted} rows of {of['table']}"
            parts.append(table(["Row", "State", "*Owes"], rows, about))
    return section("rows", "Rows that belong to it", *parts) if parts else Markup("")


def attempts(found: list) -> Markup:
    if not found:
        return section("attempts", "Attempts", '<p class="calm">None is on record.</p>')
    latest = [*itertools.islice(reversed(found), MOST_ATTEMPTS)]
    rows = [
        [clock(one.started_at), stage_link(one.stage), Markup(one.attempt), one.outcome,
         Markup(one.http_status or "–"), Markup(span(one.seconds)), one.worker,
         readable(one.error)]
        for one in latest
    ]  # fmt: skip
    header = ["Started", "Stage", "#Attempt", "Outcome", "#HTTP", "#Took", "By", "*Error"]
    about = f"The latest first, {len(latest)} of {len(found)}."
    return section("attempts", "Attempts", table(header, rows, about))


# --- searching -----------------------------------------------------------------------------


def search(asked: str, found: Found | None) -> Markup:
    focus = "" if asked else " autofocus"
    form = (
        '<form action="/search" role="search"><p><label for="q">Id of a row, or tenant</label>'
        f'<input type="search" id="q" name="q" value="{attribute(asked, 1000)}" required{focus}>'
        '</p><p><button type="submit">Search</button></p></form>'
    )  # fmt: skip
    return join([heading("Search"), form, *(results(found) if found else [])], "\n")


def results(found: Found) -> Iterator[Markup]:
    rows: list[list[Any]]
    if found.by_id:
        rows = [
            [row_link(row.table_name, row.key), state(row) if row.is_there else "deleted",
             text(row.tenant_id, 60)]
            for row in found.by_id
        ]  # fmt: skip
        yield section("by-id", "By id", table(["Row", "State", "Tenant"], rows, "With this id."))
    if found.by_tenant:
        rows = [
            [row_link(row.table_name, row.job_id), state(row), owes(row)] for row in found.by_tenant
        ]
        about = "The latest first." if not found.more else f"The latest {len(rows)}."
        yield section("by-tenant", "By tenant", table(["Row", "State", "*Owes"], rows, about))
    if found.problem:
        yield Markup(f'<p class="problem" role="alert">{text(found.problem)}</p>')
    elif not (found.by_id or found.by_tenant):
        yield Markup('<p class="calm" role="status">There is no row with this id or tenant.</p>')


def owes(row: Any) -> Markup | None:
    return text(f"{row.stage}: {job.situation(row)}") if row.stage else None


# --- forms ---------------------------------------------------------------------------------


def hidden(name: str, value: str) -> str:
    return f'<input type="hidden" name="{name}" value="{attribute(value, 10_000)}">'


def login(token: str, after: str, problem: str) -> Markup:
    alert = f'<p class="problem" role="alert">{text(problem)}</p>' if problem else ""
    return Markup(
        f'{heading("Log in", "To retry, call again, cancel, pause and resume.")}{alert}'
        f'<form method="post" action="/login">{hidden("form", token)}{hidden("next", after)}'
        '<p><label for="name">Your name, as the history will have it</label>'
        '<input id="name" name="name" maxlength="60" autocomplete="username" required></p>'
        '<p><label for="token">Token (OPS_TOKEN)</label>'
        '<input id="token" name="token" type="password" autocomplete="current-password" required>'
        '</p><p><button type="submit">Log in</button></p></form>'
    )  # fmt: skip


def logout(token: str, person: str) -> Markup:
    return Markup(
        f'{heading("Log out", f"You are {person}." if person else "Nobody is logged in.")}'
        f'<form method="post" action="/logout">{hidden("form", token)}'
        '<p><button type="submit">Log out</button> <a class="button" href="/">Back</a></p></form>'
    )  # fmt: skip


def ask(name: str, action: Action, given: Mapping[str, str], token: str, person: str) -> Markup:
    """The form that asks once more, and for a reason where the history keeps one."""
    fields = join(hidden(key, value) for key, value in given.items() if value)
    reason = ""
    if action.asks_reason:
        reason = (
            '<p><label for="reason">Reason, which others will read</label>'
            '<input id="reason" name="reason" maxlength="500" autofocus></p>'
        )
    return Markup(
        f"{heading(f'{action.label}: {meant(given)}', action.about, f'Done as {person}.')}"
        f'<form method="post" action="/do/{name}">{hidden("form", token)}{fields}{reason}'
        f'<p><button type="submit">{action.label}</button>'
        f' <a class="button" href="{attribute(back(given), 10_000)}">Back</a></p></form>'
    )


def meant(given: Mapping[str, str]) -> str:
    """What an action is about, in words."""
    if not given.get("id"):
        return given.get("stage", "")
    row = f"{word_for(given.get('table') or pipeline.JOBS.name)} {given['id']}"
    return f"{given['stage']} of {row}" if given.get("stage") else row


def back(given: Mapping[str, str]) -> str:
    if given.get("id"):
        return row_path(given.get("table") or pipeline.JOBS.name, given["id"])
    return path_of("stage", given["stage"]) if given.get("stage") else "/"


def done(label: str, found: Done, given: Mapping[str, str]) -> Markup:
    """What the command said."""
    title = f"{label}: done" if found.status == 200 else f"{label}: refused"
    kind = "facts" if found.status == 200 else "problem"
    lines = join(f"<li>{text(line, 2000)}</li>" for line in found.said.splitlines() if line)
    link = f'<p><a class="button" href="{attribute(back(given), 10_000)}">Back</a></p>'
    told = f'<div role="status"><ul class="{kind}">{lines}</ul></div>'
    return Markup(f"{heading(title)}{told}{link}")
