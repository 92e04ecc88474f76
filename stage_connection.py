"""How a stage API is reached: the headers that `requests` prepares once for all calls, and a
connection that notices a dead peer and a line that was cut.
"""

import http.client
import io
import os
import socket
import sys
import warnings
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import urllib3

# requests would bring its guesser of encodings, 3 MB a worker that nothing here asks for. It
# does without (since 2.32), with a warning.
sys.modules["charset_normalizer"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import requests
del sys.modules["charset_normalizer"]

# A dead peer is noticed within about 40 s of a call's silence.
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 40_000),
]


class WholeLines(io.BufferedReader):
    """http.client takes the end of a connection for the end of a line, and of all headers."""

    begun = False

    def readline(self, size=-1):
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size and (line or self.begun):
            raise urllib3.exceptions.ProtocolError("the answer was cut within a line")
        self.begun = True
        return line


class Response(http.client.HTTPResponse):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp = WholeLines(self.fp.detach())


def answering(conn) -> None:
    """The request is sent: do what there is to do while the stage works."""
    if conn.meanwhile:
        conn.meanwhile(conn.sock)


class WithMeanwhile:
    """A connection that does something between a request and its answer."""

    response_class = Response
    meanwhile: Callable[[socket.socket], None] | None = None

    def getresponse(self):
        answering(self)
        return super().getresponse()


class Connection(WithMeanwhile, urllib3.connection.HTTPConnection):
    pass


class TlsConnection(WithMeanwhile, urllib3.connection.HTTPSConnection):
    pass


def connection(url: str, ca_bundle: str | None) -> Connection | TlsConnection:
    """What calls to `url` are sent on, one after the other; not connected yet.

    Args:
        ca_bundle: a file or directory of certificates to trust; None: those of `requests`.
    """
    parts = urllib3.util.parse_url(url)
    host = parts.host.strip("[]")
    # Without a port, http.client looks for one behind the last colon of an IPv6 address.
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme != "https":
        return Connection(host, port, socket_options=SOCKET_OPTIONS)
    trusted = ca_bundle or requests.certs.where()
    where = "ca_cert_dir" if os.path.isdir(trusted) else "ca_certs"
    return TlsConnection(
        host, port, socket_options=SOCKET_OPTIONS, cert_reqs="CERT_REQUIRED",
        **{where: trusted},
    )  # fmt: skip


def headers(url: str, token: str | None) -> dict[str, str]:
    """What every call to `url` has in common, with the token or the URL's user."""
    given = {
        "User-Agent": "job-state-listener",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    parts, auth = urlsplit(url), None
    if token:
        given["Authorization"] = f"Bearer {token}"
    elif parts.username is not None:
        # As bytes: as text, requests takes those of Latin-1 only.
        auth = unquote(parts.username).encode(), unquote(parts.password or "").encode()
    prepared = requests.Request("POST", url, given, auth=auth).prepare()
    del prepared.headers["Content-Length"]  # that of no body
    return dict(prepared.headers)
