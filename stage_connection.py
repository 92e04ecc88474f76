"""How a stage API is reached: what `requests` prepares once for all calls, and connections that
notice a dead peer and a line that was cut.
"""

import http.client
import io
import socket
import sys
import warnings
from urllib.parse import unquote, urlsplit

import urllib3

# requests would bring its guesser of encodings, 3 MB a worker that nothing here asks for. It
# does without (since 2.32), with a warning.
sys.modules["charset_normalizer"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import requests
    from requests.adapters import HTTPAdapter
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


class Pool(urllib3.HTTPConnectionPool):
    class ConnectionCls(urllib3.HTTPConnectionPool.ConnectionCls):
        response_class = Response


class TlsPool(urllib3.HTTPSConnectionPool):
    class ConnectionCls(urllib3.HTTPSConnectionPool.ConnectionCls):
        response_class = Response


class Adapter(HTTPAdapter):
    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs, socket_options=SOCKET_OPTIONS)
        self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": TlsPool}

    def pool_for(self, request: requests.PreparedRequest, verify: bool | str):
        """The connections that `request` would be sent on."""
        pool = self.get_connection_with_tls_context(request, verify)
        self.cert_verify(pool, request.url, verify, None)
        return pool


def prepared(url: str, token: str | None) -> requests.PreparedRequest:
    """What every POST to `url` has in common: its headers, with the token or the URL's user."""
    headers = {
        "User-Agent": "job-state-listener",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    parts, auth = urlsplit(url), None
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif parts.username is not None:
        # As bytes: as text, requests takes those of Latin-1 only.
        auth = unquote(parts.username).encode(), unquote(parts.password or "").encode()
    request = requests.Request("POST", url, headers, auth=auth).prepare()
    del request.headers["Content-Length"]  # that of no body
    return request
