"""Request and Response: what a browser sent, decoded, and what is answered."""

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from ops.serve.access import COOKIE, NOBODY, Session

LONGEST_FORM = 10_000  # bytes
FORM = "application/x-www-form-urlencoded"


class Refused(Exception):
    """Raised to answer the request with this status and one line."""

    def __init__(self, status: int, said: str, **headers: str):
        super().__init__(status, said)
        self.status, self.said, self.headers = status, said, headers


@dataclass
class Request:
    """A request, decoded."""

    method: str
    path: str
    parts: list[str]  # of the path
    query: dict[str, str]
    host: str
    address: str  # of the client, or of a proxy in between
    environ: dict
    session: Session = NOBODY

    @classmethod
    def of(cls, environ: dict) -> "Request":
        path = environ.get("REQUEST_URI", "/").partition("?")[0]
        return cls(
            method=environ["REQUEST_METHOD"],
            path=path,
            parts=[unquote(part) for part in path.split("/")[1:]],
            query=pairs(environ.get("QUERY_STRING", "")),
            host=environ.get("HTTP_HOST", ""),
            address=environ.get("REMOTE_ADDR", ""),
            environ=environ,
        )

    @property
    def cookie(self) -> str:
        """The value of our cookie. Those of other programs on this host may be no valid ones, at
        which http.cookies would stop.
        """
        for pair in self.environ.get("HTTP_COOKIE", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == COOKIE:
                return value
        return ""

    def form(self) -> dict[str, str]:
        """The fields that were sent. Raises Refused where they cannot be read."""
        kind = self.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        length = self.environ.get("CONTENT_LENGTH", "")
        if kind != FORM:
            raise Refused(415, "a form is needed")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "the length of the form is needed")
        if len(length) > 9 or int(length) > LONGEST_FORM:
            raise Refused(413, f"a form has {LONGEST_FORM} bytes at most")
        try:
            sent = self.environ["wsgi.input"].read(int(length))
        except OSError:  # too slow, or gone
            sent = b""
        # Without its end, a form about one row of a stage may be one about the whole stage.
        if len(sent) < int(length):
            raise Refused(408, "the form did not arrive")
        fields = pairs(sent.decode("utf-8", "replace"))
        if any("\0" in text for text in fields.values()):  # which no value of the database has
            raise Refused(400, "a form has no NUL characters")
        return fields


def pairs(text: str) -> dict[str, str]:
    """Fields of a form or a query; those without a value are left out."""
    try:
        return dict(parse_qsl(text, errors="replace", max_num_fields=20))
    except ValueError:
        return {}


@dataclass
class Response:
    body: str
    status: int = 200
    kind: str = "text/html; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)
    style: str = ""
