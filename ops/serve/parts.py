"""Parts of several pages: headings, problems and links."""

from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import pipeline
from ops.report.markup import Markup, attribute, join, text
from ops.serve.looks import Unreadable


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
    waits = (
        "Unless it was stopped, this page asks again by itself. Calls that are owed wait in the "
        "database."
    )
    return Markup(f'{heading(away.title)}{problem}<p class="quiet">{waits}</p>')


# --- links ---------------------------------------------------------------------------------


def path_of(*parts: str) -> str:
    return "/" + "/".join(quote(part, safe="") for part in parts)


def stage_link(name: str | None) -> Markup:
    return Markup(f'<a href="{path_of("stage", name)}">{text(name, 60)}</a>') if name else text("")


def row_path(table_name: str, key: str, with_table: bool = False) -> str:
    """The path of a row's page; unless asked for, without the table where there is only jobs."""
    is_only = len({*pipeline.tables(), table_name}) == 1 and not with_table
    return path_of("job", key) if is_only else path_of("job", table_name, key)


def row_link(table_name: str, key: str, with_table: bool = False) -> Markup:
    name = key if table_name == pipeline.JOBS.name else f"{table_name} {key}"
    path = row_path(table_name, key, with_table)
    return Markup(f'<a href="{attribute(path, 10_000)}">{text(name, 130)}</a>')


def action_link(name: str, label: str, **given: str | None) -> str:
    fields = urlencode({key: value for key, value in given.items() if value})
    return f'<a class="button" href="{attribute(f"/do/{name}?{fields}", 10_000)}">{text(label)}</a>'


def actions(may_act: bool, *links: str) -> Markup:
    return Markup(f'<p class="actions">{join(links, " ")}</p>' if may_act and links else "")
