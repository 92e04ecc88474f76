"""The forms for logging in and out and for each action, and the page with an action's result."""

from collections.abc import Mapping

import pipeline
from ops.report.markup import Markup, attribute, join, text
from ops.rows import word_for
from ops.serve.actions import Action, Done
from ops.serve.parts import heading, path_of, row_path

# Fields that the link to an action and its form may have.
FIELDS = ("stage", "id", "table")


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
    """The form that asks to confirm an action, and for a reason where the history keeps one."""
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
    """The row or stage that an action is about, in words."""
    if not given.get("id"):
        return given.get("stage", "")
    row = f"{word_for(given.get('table') or pipeline.JOBS.name)} {given['id']}"
    return f"{given['stage']} of {row}" if given.get("stage") else row


def back(given: Mapping[str, str]) -> str:
    if given.get("id"):
        return row_path(given.get("table") or pipeline.JOBS.name, given["id"])
    return path_of("stage", given["stage"]) if given.get("stage") else "/"


def done(label: str, found: Done, given: Mapping[str, str]) -> Markup:
    """The output of the command."""
    title = f"{label}: done" if found.status == 200 else f"{label}: refused"
    kind = "facts" if found.status == 200 else "problem"
    lines = join(f"<li>{text(line, 2000)}</li>" for line in found.said.splitlines() if line)
    link = f'<p><a class="button" href="{attribute(back(given), 10_000)}">Back</a></p>'
    told = f'<div role="status"><ul class="{kind}">{lines}</ul></div>'
    return Markup(f"{heading(title)}{told}{link}")
