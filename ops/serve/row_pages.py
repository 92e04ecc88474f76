"""The page of a row, and the search that leads to it."""

import itertools
from collections.abc import Iterator
from typing import Any

from calls import may_be_retried
from ops import job
from ops.report.markup import Markup, attribute, join, section, span, state, table, text
from ops.report.timelines import timelines
from ops.rows import absence, is_wanted, own_stage, said
from ops.serve.asking import Found, Row
from ops.serve.parts import action_link, actions, as_of, heading, row_link, stage_link
from ops.table import clock, plain, readable

MOST_ATTEMPTS = 200


def row(shown: Row, may_act: bool) -> Markup:
    found = shown.found
    where, *lines = [*job.place_lines(found), *filter(None, [found.problem])]
    where = where.removeprefix(f"{plain(said(found.row))} ")
    facts = join(f"<li>{text(line, 2000)}</li>" for line in lines)
    rests = found.rests.get((found.row.table_name, found.row.key))
    needs = rests or found.unknown or any(call.given_up for call in found.owed)
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
        may_be_made = is_wanted(call) and may_be_retried(call.last_error)
        if call.stage not in is_called and may_be_made:
            yield action_link("retry", f"Retry {call.stage}…", stage=call.stage, **given)
        yield action_link("cancel", f"Cancel {call.stage}…", stage=call.stage, **given)
    if found.row.is_there and (own := own_stage(found.row)) and own not in is_called:
        yield action_link("again", f"Call {own} again…", **given)


def children(found: job.Found) -> Markup:
    """The rows that belong to it."""
    parts = []
    for of in found.below:
        if of["rows"]:
            shown = job.first(of["rows"])
            rows = [
                [row_link(child.table_name, child.job_id), state(child),
                 job.told(child, found.rests)]
                for child in shown
            ]  # fmt: skip
            counted = sum(one.rows for one in of["states"])
            about = f"{len({child.job_id for child in shown})} of {counted} rows of {of['table']}"
            parts.append(table(["Row", "State", "*Owes"], rows, about))
    return section("rows", "Rows that belong to it", *parts) if parts else Markup("")


def attempts(found: list) -> Markup:
    if not found:
        return section("attempts", "Attempts", '<p class="calm">None is on record.</p>')
    latest = [*itertools.islice(reversed(found), MOST_ATTEMPTS)]
    rows = [
        [clock(one.started_at), stage_link(one.stage), Markup(job.number(one)), one.outcome,
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
            [row_link(row.table_name, row.key, row.is_one_of_many),
             state(row) if row.is_there else absence(row),
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
