"""The WSGI application: maps paths to pages, checks who may act, and sets the headers."""

import base64
import hashlib
import logging
import math
from collections.abc import Callable, Collection, Iterable
from http import HTTPStatus
from types import SimpleNamespace
from urllib.parse import quote

from ops import rows
from ops.serve import asking, forms, frame, pages, parts, row_pages
from ops.serve.access import (
    COOKIE,
    NOBODY,
    SESSION_SECONDS,
    Access,
    TooSoon,
    is_cross_site,
    is_known_host,
    name_of,
)
from ops.serve.actions import ACTIONS, perform, typed
from ops.serve.exchange import Refused, Request, Response
from ops.serve.looks import Looks, Unreadable

log = logging.getLogger("listener.serve")

REFRESH = 5  # seconds
# Content-Security-Policy of the report, which has its style sheet inline.
ANY_STYLE = "'unsafe-inline'"
POLICY = (
    "default-src 'none'; style-src {style}; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer, browsers would send our own forms with "Origin: null".
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"


class App:
    """All pages.

    Args:
        known_hosts: names allowed in a Host header, in lower case; None: any.
    """

    def __init__(self, settings: SimpleNamespace, known_hosts: Collection[str] | None):
        self.settings = settings
        self.looks, self.access = Looks(settings), Access(settings.OPS_TOKEN)
        self.known_hosts = known_hosts
        self.css = frame.css()
        digest = hashlib.sha256(self.css.encode()).digest()
        self.style = f"'sha256-{base64.b64encode(digest).decode()}'"

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        request = Request.of(environ)
        try:
            response = self.respond(request)
        except Refused as refused:
            response = self.refusal(request, refused)
        except Unreadable as away:
            body = parts.unreadable(away)
            response = self.page(request, body, away.title, 503, refreshes=True)
        except Exception:
            log.exception("페이지 오류: %s", request.path)
            body = parts.sorry("Something went wrong", "The log of `serve` says what.")
            response = self.page(request, body, "Error", 500)
        return self.send(request, response, start_response)

    def send(self, request: Request, response: Response, start_response) -> Iterable[bytes]:
        body = response.body.encode("utf-8", "replace")
        headers = HEADERS | {
            "Content-Type": response.kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY.format(style=response.style or self.style),
        }
        headers |= response.headers
        status = f"{response.status} {HTTPStatus(response.status).phrase}"
        start_response(status, list(headers.items()))
        return [] if request.method == "HEAD" else [body]

    def refusal(self, request: Request, refused: Refused) -> Response:
        title = HTTPStatus(refused.status).phrase
        response = self.page(request, parts.sorry(title, refused.said), title, refused.status)
        response.headers |= {name.replace("_", "-"): text for name, text in refused.headers.items()}
        return response

    def page(
        self, request: Request, body: str, title: str, status: int = 200, refreshes: bool = False
    ) -> Response:
        """Args: refreshes: whether the page reloads itself; not where it has a form to fill in."""
        refresh = REFRESH if is_refreshing(request) else 0
        shown = frame.Shown(
            title=title,
            css=self.css,
            path=request.path,
            person=request.session.name,
            may_log_in=self.access.is_on,
            refresh=refresh if refreshes else None,
        )
        headers = {"Refresh": str(REFRESH)} if refreshes and refresh else {}
        return Response(frame.whole(shown, body), status, headers=headers)

    # --- which page it is ---

    def respond(self, request: Request) -> Response:
        """Raises Refused, Unreadable."""
        if not request.parts:  # OPTIONS *, or GET of a target without a slash
            raise Refused(404, "there is no such page")
        first, *rest = request.parts
        if request.method not in ("GET", "HEAD", "POST"):
            raise Refused(405, f"{request.method[:20]} is not understood here", Allow="GET, HEAD")
        if first in PROBES and not rest:
            return PROBES[first](self, request)
        if not is_known_host(request.host, self.known_hosts):
            said = "this page is not known by that name: see --allow-host of `serve`"
            raise Refused(421, said)
        request.session = self.access.session(request.cookie) or NOBODY
        if request.method == "POST":
            return self.respond_to_form(request)
        page = PAGES.get((first, len(rest)))
        if page is None or (first in FORMS and not self.access.is_on):
            raise Refused(404, "there is no such page")
        return page(self, request, *rest)

    def respond_to_form(self, request: Request) -> Response:
        """Raises Refused where it is not one of our own forms, sent for the first time."""
        first, *rest = request.parts
        handler = FORMS.get(first)
        if handler is None or not self.access.is_on or (first, len(rest)) not in PAGES:
            raise Refused(405, "nothing can be sent here", Allow="GET, HEAD")
        headers = request.environ
        if is_cross_site(request.host, headers.get("HTTP_ORIGIN"),
                         headers.get("HTTP_SEC_FETCH_SITE")):  # fmt: skip
            raise Refused(403, "this was sent by another site")
        if first != "login" and request.session is NOBODY:
            raise Refused(403, "log in first")
        sent = request.form()
        if not self.access.take_form(request.session, request.path, sent.pop("form", "")):
            raise Refused(403, "this form was sent before, or is too old, or is not ours: "
                               "open it again")  # fmt: skip
        return handler(self, request, sent, *rest)

    # --- for programs ---

    def healthz(self, request: Request) -> Response:
        return Response("ok\n", kind=TEXT)

    def readyz(self, request: Request) -> Response:
        try:
            self.looks.look("ready", lambda conn: None)
        except Unreadable as away:
            return Response(f"{away.title}: {away.reason}\n", 503, TEXT)
        return Response("ok\n", kind=TEXT)

    def metrics(self, request: Request) -> Response:
        return Response(asking.metrics(self.looks), kind=METRICS)

    # --- for people ---

    def overview(self, request: Request) -> Response:
        body = pages.overview(asking.board(self.looks))
        return self.page(request, body, "Overview", refreshes=True)

    def stage(self, request: Request, name: str) -> Response:
        found = asking.stage(self.looks, name)
        if found is None:
            raise Refused(404, f"there is no stage {name[:100]}")
        return self.page(request, pages.stage(found, self.access.is_on), name, refreshes=True)

    def job(self, request: Request, *names: str) -> Response:
        """/job/ID, or /job/TABLE/ID."""
        table, id_ = (names[0] if len(names) == 2 else None), names[-1]
        places = asking.places(self.looks, id_, table, needs_all=True)
        if not places:
            raise Refused(404, f"there is no row {id_[:100]}" + f" in {table}" * bool(table))
        if len(places) > 1:
            return see_other(f"/search?q={quote(id_, safe='')}")
        found = asking.row(self.looks, places[0])
        body = row_pages.row(found, self.access.is_on)
        return self.page(request, body, rows.said(found.found.row), refreshes=True)

    def search(self, request: Request) -> Response:
        """Search by id, in every table, or by tenant. No refresh, as the page has a form."""
        asked = request.query.get("q", "").strip()
        found = asking.search(self.looks, self.settings, asked) if asked else None
        return self.page(request, row_pages.search(asked, found), "Search")

    def report(self, request: Request) -> Response:
        return Response(asking.report(self.looks), style=ANY_STYLE)

    # --- who acts, and what they do ---

    def login(self, request: Request) -> Response:
        token = self.access.form_token(request.session, request.path)
        body = forms.login(token, local(request.query.get("next", "")), "")
        return self.page(request, body, "Log in")

    def enter(self, request: Request, sent: dict[str, str]) -> Response:
        after, name = local(sent.get("next", "")), name_of(sent.get("name", ""))
        status, said = 403, "That is not the token."
        if name is None:
            status, said = 400, "A name of up to 60 letters is needed."
        else:
            try:
                if self.access.try_token(request.address, sent.get("token", "")):
                    log.info("로그인: %s, 주소 %s", name, request.address)
                    return see_other(after, **self.set_cookie(request, name))
                log.warning("로그인 실패: 토큰이 다름, 이름 %s, 주소 %s", name, request.address)
            except TooSoon as soon:
                seconds = math.ceil(soon.seconds)
                status, said = 429, f"A wrong token was entered before: try again in {seconds} s."
                log.warning("로그인 거절: %d초 뒤에 다시 시도, 주소 %s", seconds, request.address)
        token = self.access.form_token(request.session, request.path)
        return self.page(request, forms.login(token, after, said), "Log in", status)

    def set_cookie(self, request: Request, name: str) -> dict[str, str]:
        # Set by a reverse proxy that terminates TLS.
        secure = request.environ.get("HTTP_X_FORWARDED_PROTO") == "https"
        value = f"{COOKIE}={self.access.cookie(name)}; Max-Age={SESSION_SECONDS}"
        return {"Set-Cookie": f"{value}; {COOKIE_FOR}{'; Secure' * secure}"}

    def logout(self, request: Request) -> Response:
        token = self.access.form_token(request.session, request.path)
        return self.page(request, forms.logout(token, request.session.name), "Log out")

    def leave(self, request: Request, sent: dict[str, str]) -> Response:
        self.access.end(request.session)
        return see_other("/", **{"Set-Cookie": f"{COOKIE}=; Max-Age=0; {COOKIE_FOR}"})

    def ask(self, request: Request, name: str) -> Response:
        """The form of an action."""
        if name not in ACTIONS:
            raise Refused(404, "there is no such page")
        if request.session is NOBODY:
            after = quote(f"{request.path}?{request.environ.get('QUERY_STRING', '')}", safe="")
            return see_other(f"/login?next={after}")
        token = self.access.form_token(request.session, request.path)
        given = {key: request.query.get(key, "") for key in forms.FIELDS}
        person = request.session.person
        body = forms.ask(name, ACTIONS[name], given, token, person)
        return self.page(request, body, ACTIONS[name].label)

    def act(self, request: Request, sent: dict[str, str], name: str) -> Response:
        if name not in ACTIONS or not (sent.get("stage") or sent.get("id")):
            raise Refused(400, "it is not said what is meant")
        try:
            typed(ACTIONS[name], sent)
        except KeyError:
            raise Refused(400, "it is not said what is meant") from None
        done = perform(self.looks, request.session, name, sent)
        label = ACTIONS[name].label
        return self.page(request, forms.done(label, done, sent), label, done.status)


COOKIE_FOR = "Path=/; HttpOnly; SameSite=Strict"

PROBES: dict[str, Callable] = {"healthz": App.healthz, "readyz": App.readyz}

# Pages by the first part of the path and the number of parts after it.
PAGES: dict[tuple[str, int], Callable] = {
    ("", 0): App.overview,
    ("metrics", 0): App.metrics,
    ("stage", 1): App.stage,
    ("job", 1): App.job,
    ("job", 2): App.job,
    ("search", 0): App.search,
    ("report", 0): App.report,
    ("login", 0): App.login,
    ("logout", 0): App.logout,
    ("do", 1): App.ask,
}

# POST handlers by the first part of the path; used only with OPS_TOKEN.
FORMS: dict[str, Callable] = {"login": App.enter, "logout": App.leave, "do": App.act}


def is_refreshing(request: Request) -> bool:
    """Whether pages reload themselves: until the person switches it off."""
    return request.query.get("refresh") != "off"


def see_other(path: str, **headers: str) -> Response:
    return Response("", 303, TEXT, {"Location": path} | headers)


def local(path: str) -> str:
    """`path` if it is a path of this server; "/" where it could lead to another site."""
    is_ours = path.startswith("/") and not path.startswith("//")
    return path if is_ours and path.isascii() and path.isprintable() and "\\" not in path else "/"
