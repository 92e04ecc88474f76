"""HTTP: one POST to the stage API, over in time whatever the server does, and an honest account
of what became of it: an Answer, or an exception that says whether it may have been sent.
"""

import contextlib
import functools
import http.client
import json
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from types import SimpleNamespace

import urllib3
from urllib3.util import parse_url

import logs
from stage_connection import answering, connection, headers


@dataclass(frozen=True)
class Answer:
    """What the stage API answered: status, the beginning of its body, Retry-After in seconds."""

    status: int
    text: str = ""
    retry_after: float | None = None


class Unreachable(Exception):
    """Not sent: could not connect, DNS, TLS."""


class Interrupted(Exception):
    """Sent, and the connection broke while waiting."""


class NoAnswer(Exception):
    """Sent, and nobody can know what became of it: time ran out, or the answer was cut."""


# What urllib3 raises, wrapped or as it comes from below.
FAILED = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)


class CallDeadline(BaseException):
    """Raised by the alarm inside a POST; no `except Exception` on the way may swallow it."""


CONNECT_TIMEOUT = 5.0
# Servers close idle connections, gunicorn after 2 s: a POST sent into that moment dies unseen.
REUSE_WITHIN = 1.0
BODY_LIMIT = 16 * 2**20
LONGEST_RETRY_AFTER = 3600.0


class StageApi:
    """One worker's kept-alive connection to the stage API, at `url` or STAGE_API_URL.

    Its headers are prepared once, by `requests`; a call is then sent on the connection itself. So
    no redirect, cookie, .netrc or proxy variable is followed.
    """

    def __init__(self, settings: SimpleNamespace, url: str | None = None):
        self.url = url or settings.STAGE_API_URL
        self.headers = headers(self.url, settings.STAGE_API_TOKEN)
        self.connection = connection(self.url, settings.STAGE_API_CA_BUNDLE)
        self.used_at = 0.0

    def close(self) -> None:
        """Close the connection, if there is one; the next call makes another."""
        self.connection.close()
        self.used_at = 0.0

    def post(
        self,
        path: str,
        body: dict,
        headers: dict[str, str],
        until: float,
        meanwhile: Callable[[socket.socket], None] | None = None,
    ) -> Answer:
        """One POST, over by `until` (time.monotonic()) whatever the server does.

        Args:
            meanwhile: what to do while the stage works, given the socket of the answer.

        Raises:
            Unreachable: it was not sent.
            Interrupted: the connection broke while waiting.
            NoAnswer: whether it ran is not known.
        """
        data = json.dumps(body, default=str, allow_nan=False).encode()
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the stage function used up its timeout before its POST")
        if self.used_at and time.monotonic() - self.used_at > REUSE_WITHIN:
            self.close()
        previous = signal.signal(signal.SIGALRM, raise_in_send)
        # Again every second, should a destructor have swallowed the first one.
        signal.setitimer(signal.ITIMER_REAL, left, 1.0)
        self.connection.meanwhile = meanwhile
        try:
            answer = self.send(path, data, headers, left)
            self.used_at = time.monotonic()
            return answer
        except CallDeadline as error:
            unsent = while_connecting(error)
            failed = (Unreachable if unsent else NoAnswer)("no answer before the timeout")
        except NoAnswer as error:
            failed = error
        except FAILED as error:
            failed = translated(error)
        except BaseException:
            self.close()
            raise
        finally:
            self.connection.meanwhile = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        # Whatever this connection still holds must not be read as the next call's answer.
        self.close()
        raise failed

    def send(self, path: str, data: bytes, headers: dict[str, str], left: float) -> Answer:
        with self.open("POST", path, headers, left, data) as response:
            text = read(response)
            retry_after = parse_retry_after(response.headers)
            return Answer(response.status, text, retry_after)

    def probe(self, path: str, seconds: float) -> int:
        """The status of a GET of `path`.

        Raises:
            Unreachable, Interrupted, NoAnswer: the step of connecting or reading took longer than
                `seconds`, or failed.
        """
        try:
            with self.open("GET", path, {}, seconds) as response:
                return response.status
        except FAILED as error:
            raise translated(error) from error
        finally:
            self.close()

    def open(self, method, path, headers, seconds, data=None) -> urllib3.BaseHTTPResponse:
        conn = self.connection
        if conn.sock is not None and not conn.is_connected:
            conn.close()  # by the server, meanwhile
        if conn.sock is None:
            self.used_at = 0.0
            logs.write()
            conn.timeout = min(CONNECT_TIMEOUT, seconds)
            conn.connect()
        conn.timeout = seconds  # of a read
        conn.sock.settimeout(seconds)
        # There may be an answer all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            conn.request(method, target(self.url + path), data, self.headers | headers,
                         preload_content=False)  # fmt: skip
        return conn.getresponse()


@functools.lru_cache(maxsize=64)
def target(url: str) -> str:
    return parse_url(url).request_uri


def raise_in_send(_number, frame) -> None:
    """SIGALRM: the timeouts of urllib3 are per read, so this ends the whole call.

    An alarm that comes late, when the answer is complete, finds no `send` to interrupt.
    """
    while frame is not None:
        if frame.f_code is answering.__code__:
            return  # what is done meanwhile goes to its end
        if frame.f_code is StageApi.send.__code__:
            raise CallDeadline
        frame = frame.f_back


def read(response: urllib3.BaseHTTPResponse) -> str:
    """The beginning of the body, undecoded; the rest is read and dropped.

    Raises:
        NoAnswer: the answer is cut, endless, or not a final one, or may have been cut.
    """
    status = response.status
    if status < 200:
        raise NoAnswer(f"status {status}, which is not a final answer")
    # What http.client itself will hold the body to. "Transfer-Encoding: gzip, chunked" is read as
    # whatever comes until the connection ends, and so is a length that is no number.
    chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    framed = chunked or response.length_remaining is not None
    beginning, size = b"", 0
    try:
        while chunk := response.read(2**16, decode_content=False):
            size += len(chunk)
            beginning = beginning or chunk[:2000]
            if size > BODY_LIMIT:
                raise NoAnswer(f"the answer is longer than {BODY_LIMIT >> 20} MiB")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise NoAnswer(f"status {status}, then {type(error).__name__}: {error}") from error
    if 200 <= status < 300 and not framed:
        raise NoAnswer(f"status {status}, but the answer may have been cut")
    return beginning.decode("utf-8", "replace")


def translated(error: Exception) -> Exception:
    """What an exception of urllib3 says about the request (urllib3 2.8).

    Only a failure inside urllib3's `connect`, TLS included, was certainly not sent.
    """
    causes = list(chain(error))
    text = f"{type(causes[-1]).__name__}: {causes[-1]}"
    if any(map(while_connecting, causes)):
        return Unreachable(text)
    if any(isinstance(cause, ConnectionError) for cause in causes):
        return Interrupted(text)
    return NoAnswer(text)


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it was made from: urllib3 wraps in three ways."""
    seen: list[BaseException] = []
    while isinstance(error, BaseException) and error not in seen:
        seen.append(error)
        yield error
        wrapped = [getattr(error, "reason", None), *error.args]
        inner = [value for value in wrapped if isinstance(value, BaseException)]
        error = inner[0] if inner else error.__cause__ or error.__context__


def while_connecting(error: BaseException) -> bool:
    return any(
        frame.f_code.co_name == "connect" and frame.f_globals["__name__"] == "urllib3.connection"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


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
