"""The frame of each page: its head, and the links to the other pages."""

from dataclasses import dataclass
from pathlib import Path

from ops.report.markup import attribute, text
from ops.report.page import CSS
from ops.report.svg import patterns

OWN_CSS = Path(__file__).parent / "serve.css"

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
    """The style sheets of the report and of `serve`."""
    return CSS.read_text(encoding="utf-8") + OWN_CSS.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Shown:
    """The variable parts of the frame.

    Args:
        person: who has logged in; "" where nobody has.
        refresh: seconds until the page reloads itself; 0: switched off; None: it has no refresh.
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
