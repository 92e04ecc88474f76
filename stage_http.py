"""HTTP: one POST to the stage API with `requests`. Its outcome is an Answer, or an exception that
says whether the request may have been sent.
"""

import http.client
import io
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict

import signing

# Statuses after which the work may still run: the stage says so (409), or a gateway or framework
# had passed the request on and stopped waiting. docs/answers.md has each.
MAY_RUN = (409, 460, 499, 502, 504, 520, 522, 524, 598, 599)
# Texts of a 503 from gateways that had passed the request on, and what Envoy adds where it had not.
# After a retry, Envoy's text need not be true of the first attempt.
PASSED_ON = re.compile(
    "disconnect/reset before headers"  # Envoy
    "|<title>503 Backend fetch failed"  # Varnish
    "|<title>Timeout</title>"  # TimeoutHandler of Go
    "|herokucdn.com/error-pages/application-error"
)
NOT_PASSED_ON = re.compile(
    "(?<!latest )reset reason: (?:(?:local |remote )?connection failure|connection timeout|overflow"
    "|(?:local|remote) refused stream reset|overload manager reset)"
)


@dataclass(frozen=True)
class Answer:
    """What the stage API answered: status, the beginning of its body, Retry-After in seconds."""

    status: int
    text: str = ""
    retry_after: float | None = None

    @property
    def may_run(self) -> bool:
        """Whether the stage may still work on the request."""
        passed_on = PASSED_ON.search(self.text) and not NOT_PASSED_ON.search(self.text)
        return self.status in MAY_RUN or bool(self.status == 503 and passed_on)

    @property
    def error(self) -> str:
        return f"HTTP {self.status}: {self.text}".rstrip(": ")


class Unreachable(Exception):
    """Not sent: could not connect, DNS, TLS."""


class Interrupted(Exception):
    """Sent, and the connection broke while waiting."""


class NoAnswer(Exception):
    """Sent, and it is unknown whether the stage works on it: no answer in time, a cut one, or one
    with a status that leaves it open.
    """

    def __init__(self, text: str = "", status: int | None = None):
        super().__init__(text)
        self.status = status


class TimeIsUp(Exception):
    """Not sent: the time for this call was over before its POST."""


# The exceptions of `requests`, urllib3 and below that a POST may raise.
FAILED = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)

# Of a stage function's own request: the head of an answer came, and a body that cannot be read.
CUT = (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)
NOT_CONNECTED = (
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    ssl.SSLCertVerificationError,
)

CONNECT_TIMEOUT = 5.0
# A connection idle for longer is not reused: servers close idle ones (gunicorn after 2 s), and a
# POST that is sent at that moment gets no answer.
REUSE_WITHIN = 1.0
TEXT_LIMIT = 2000
BODY_LIMIT = 16 * 2**20
LONGEST_RETRY_AFTER = 3600.0

# A dead server is noticed within about 40 s, however long the call may take.
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in {
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": 20,
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 40_000,  # milliseconds
    }.items()
    if hasattr(socket, name)  # macOS has not all of them
] + [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]


# --- one POST ------------------------------------------------------------------------------


class StageApi:
    """The stage API at `url`, or at STAGE_API_URL, on one kept-alive connection.

    A request is prepared by `requests` and sent with an adapter alone. So no redirect is followed,
    no cookie, .netrc or proxy variable is used, and nothing is sent twice.
    """

    def __init__(self, settings: SimpleNamespace, url: str | None = None):
        self.url = url or settings.STAGE_API_URL
        self.verify = settings.STAGE_API_CA_BUNDLE or True
        self.headers = shared_headers(self.url, settings.STAGE_API_TOKEN)
        self.secrets = settings.STAGE_API_SECRET or ()
        self.adapter = WholeAnswers()
        self.used_at = 0.0

    def close(self) -> None:
        """Close the connection, if there is one; the next call makes another."""
        self.adapter.forget()

    def post(self, path: str, body: dict, headers: dict[str, str], until: float) -> Answer:
        """One POST. Each wait for the server ends at `until` (time.monotonic()).

        An answer that comes drop by drop may take longer: the listener ends such a worker.

        Args:
            headers: where requests are signed, the signature is that of their Idempotency-Key.

        Raises:
            Unreachable, TimeIsUp: it was not sent.
            Interrupted: the connection broke while waiting.
            NoAnswer: whether it ran is not known.
            TypeError, ValueError: `body` cannot be JSON.
        """
        data = json.dumps(body, default=as_text, allow_nan=False).encode()
        if time.monotonic() - self.used_at > REUSE_WITHIN:
            self.close()
        left = until - time.monotonic()
        if left <= 0:
            raise TimeIsUp("the time for this call was over before its POST")
        if self.secrets:
            key = headers["Idempotency-Key"]
            headers = headers | signing.headers(self.secrets, key, data)
        try:
            return self.send("POST", path, headers, left, data)
        except BaseException:
            # Unread data of this answer must not be read as the answer of the next call.
            self.close()
            raise
        finally:
            self.used_at = time.monotonic()

    def probe(self, path: str, seconds: float) -> int:
        """The status of a GET of `path`.

        Raises:
            Unreachable, Interrupted, NoAnswer: it took longer than `seconds`, or failed.
        """
        try:
            return self.send("GET", path, {}, seconds).status
        finally:
            self.close()

    def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        seconds: float,
        data: bytes | None = None,
    ) -> Answer:
        request = self.request(method, path, headers, data)
        until = time.monotonic() + seconds
        timeout: Any = urllib3.Timeout(total=seconds)  # which the types of requests do not know
        try:
            response = self.adapter.send(request, stream=True, timeout=timeout, verify=self.verify)
            with response:
                retry_after = parse_retry_after(response.headers)
                return Answer(response.status_code, read(response.raw, until), retry_after)
        except FAILED as error:
            raise translated(error) from error

    def request(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes | None = None
    ) -> requests.PreparedRequest:
        """A request as it is sent."""
        request = requests.PreparedRequest()
        request.method, request.url = method, requests.utils.requote_uri(self.url + path)
        length = {} if data is None else {"Content-Length": str(len(data))}
        request.headers = CaseInsensitiveDict({**self.headers, **length, **headers})
        request.body = data
        return request


def as_text(value: Any) -> str:
    """A value that JSON does not have, such as a UUID, a time or a Decimal, as text.

    Raises:
        TypeError: its text would be what Python shows of it, as of bytes.
    """
    is_repr = type(value).__str__ is object.__str__  # type: ignore[comparison-overlap]
    if is_repr or isinstance(value, (bytes, bytearray)):
        kind = type(value).__name__
        raise TypeError(f"a field is of type {kind}, which JSON does not have: give text or a list")
    return str(value)


def shared_headers(url: str, token: str | None) -> Mapping[str, str]:
    """What all requests to `url` have in common, with the token or the URL's user."""
    headers = {
        "User-Agent": "job-state-listener",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    parts, auth = urlsplit(url), None
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif parts.username is not None:
        # As bytes, since requests encodes text as Latin-1.
        auth = unquote(parts.username).encode(), unquote(parts.password or "").encode()
    return requests.Request("GET", url, headers, auth=auth).prepare().headers


def read(raw: urllib3.BaseHTTPResponse, until: float) -> str:
    """The beginning of the body as text, not decompressed; the rest is read and dropped.

    Args:
        until: by when a long answer that accepts must have ended (time.monotonic()).

    Raises:
        NoAnswer: the answer is cut, endless, or not a final one, or may have been cut.
    """
    status = raw.status
    if status < 200:
        raise NoAnswer(f"status {status}, which is not a final answer")
    accepts = status < 300
    # Whether http.client checks the length of the body. It does not with "Transfer-Encoding: gzip,
    # chunked" or a length that is no number: then it reads until the connection ends.
    chunked = raw.headers.get("Transfer-Encoding", "").lower() == "chunked"
    framed = chunked or raw.length_remaining is not None
    beginning, size = b"", 0
    try:
        while chunk := raw.read(2**16, decode_content=False):
            size += len(chunk)
            beginning = beginning or chunk[:TEXT_LIMIT]
            if size > BODY_LIMIT and (not accepts or time.monotonic() > until):
                raise NoAnswer(f"the answer is longer than {BODY_LIMIT >> 20} MiB")
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # e.g. a negative chunk
        raise NoAnswer(f"status {status}, then {type(error).__name__}: {error}") from error
    if accepts and not framed:
        raise NoAnswer(f"status {status}, but the answer may have been cut")
    return beginning.decode("utf-8", "replace")


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a number or a date (RFC 9110, 10.2.3); None if unusable.

    A date is measured from the answer's own Date, where it has one.
    """
    text = headers.get("Retry-After", "").strip()
    try:
        if text.isascii() and text.isdigit():
            seconds = float(text)
        else:
            now = headers.get("Date") or formatdate(usegmt=True)
            wait = parsedate_to_datetime(text) - parsedate_to_datetime(now)
            seconds = wait.total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else None


# --- what an exception means ---------------------------------------------------------------


def translated(error: Exception) -> Exception:
    """The Unreachable, Interrupted or NoAnswer for an exception of `requests` or urllib3."""
    causes = list(chain(error))
    text = f"{type(causes[-1]).__name__}: {causes[-1]}"

    def has(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if isinstance(error, CUT):
        return NoAnswer(text)
    # Only for a stage function's own request: our HttpConnection raises Unreachable itself.
    # urllib3 also raises ProxyError where the connection broke after the request was sent.
    refused_by_proxy = has(urllib3.exceptions.ProxyError) and not has(ConnectionError)
    if has(*NOT_CONNECTED) or refused_by_proxy:
        return Unreachable(text)
    if has(TimeoutError, requests.ReadTimeout):
        return NoAnswer(f"no answer in time ({text})")
    if has(ConnectionError):
        return Interrupted(text)
    return NoAnswer(text)


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and the exceptions it was made from, which urllib3 wraps in three ways."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        wrapped = [getattr(link, "reason", None), *link.args]
        inner = [value for value in wrapped if isinstance(value, BaseException)]
        link = inner[0] if inner else link.__cause__ or link.__context__


# --- the connection ------------------------------------------------------------------------


class WholeLines(io.BufferedReader):
    """Raises where a line is cut. http.client would take the end of the connection for the end of
    the line, and of all headers.
    """

    begun = False

    def readline(self, size=-1):
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size and (line or self.begun):
            raise urllib3.exceptions.ProtocolError("the answer was cut within a line")
        self.begun = True
        return line


class WholeResponse(http.client.HTTPResponse):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp = WholeLines(self.fp.detach())

    def _read_status(self):
        """Skip all interim answers (RFC 9110, 15.2); http.client skips only 100."""
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # private
            if status not in range(102, 200):
                return version, status, reason
            http.client.parse_headers(self.fp)


class HttpConnection(urllib3.connection.HTTPConnection):
    """A connection that raises Unreachable where nothing was sent, and refuses cut headers."""

    response_class = WholeResponse

    def __init__(self, host: str, *args, **kwargs):
        # The zone of a link-local address, which requests leaves encoded (RFC 6874).
        super().__init__(host.replace("%25", "%"), *args, **kwargs)

    def connect(self) -> None:
        # What the whole call has left; urllib3 also sends the request with this timeout.
        timeout = self.timeout
        self.timeout = min(CONNECT_TIMEOUT, timeout or CONNECT_TIMEOUT)
        try:
            super().connect()
        except FAILED as error:
            cause = list(chain(error))[-1]
            # This exception is not one that urllib3 or requests would catch.
            raise Unreachable(f"{type(cause).__name__}: {cause}") from error
        finally:
            self.timeout = timeout
        self.sock.settimeout(timeout)


class HttpsConnection(HttpConnection, urllib3.connection.HTTPSConnection):
    pass


class HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = HttpConnection


class HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = HttpsConnection


class WholeAnswers(HTTPAdapter):
    """The adapter of `requests`, with our connections, all to one server."""

    pool: urllib3.connectionpool.ConnectionPool | None = None

    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        self.pool = self.pool or super().get_connection_with_tls_context(request, verify)
        return self.pool

    def cert_verify(self, *args, **kwargs):
        try:
            super().cert_verify(*args, **kwargs)
        except OSError as error:  # a file of certificates is missing
            raise Unreachable(str(error)) from error

    def forget(self) -> None:
        """Close the connection; the next request makes another."""
        self.poolmanager.clear()
        self.pool = None

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, socket_options=SOCKET_OPTIONS, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
