"""HTTP on the standard library's WSGI server, with a thread for each connection."""

import contextlib
import logging
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from signals import Signals

log = logging.getLogger("listener.serve")

# The most connections at a time; more get 503 with Retry-After.
MOST_CONNECTIONS = 256
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"
# Seconds that a client may be silent, and that its connection may last in all.
SILENT, LONGEST = 10.0, 60.0
# Seconds that requests under way get to finish when we are told to stop.
LAST = 5.0


class Handler(ServerHandler):
    """Runs the application for one request, without this process's environment variables."""

    os_environ = {}  # noqa: RUF012
    server_software = "job-state-listener"

    def __init__(self, request: "RequestHandler"):
        sent: Any = request.rfile
        answer: Any = request.wfile
        super().__init__(sent, answer, sys.stderr, request.get_environ(), multithread=True)
        self.request_handler = request  # logs the request

    def log_exception(self, exc_info) -> None:
        """The application catches its own errors, so this is a client that hung up."""
        log.debug("연결이 끊김: %s", exc_info[1])


class RequestHandler(WSGIRequestHandler):
    """One request of one connection."""

    timeout = SILENT
    server: "Server"

    def get_environ(self) -> dict:
        return super().get_environ() | {"REQUEST_URI": self.path}

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has gone, or was too slow
            self.raw_requestline = self.rfile.readline(65537)
            if len(self.raw_requestline) > 65536:
                self.requestline = self.request_version = self.command = ""
                self.send_error(414)
            elif self.parse_request():
                handler = Handler(self)
                handler.run(self.server.app)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with one line what cannot be parsed as a request."""
        said = f"{int(code)} {HTTPStatus(code).phrase}\n".encode()
        self.send_response(code)
        for name, value in (("Content-Type", "text/plain"), ("Content-Length", str(len(said))),
                            ("Cache-Control", "no-store")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said)

    def version_string(self) -> str:
        return Handler.server_software

    def log_message(self, form: str, *values: object) -> None:
        log.debug("요청: %s %s", self.client_address[0], form % values)


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """Listens on `host` and `port` at once.

    Raises:
        OSError: it cannot; the message says why.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    timeout = 0

    def __init__(self, host: str, port: int, app: Callable):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        self.app = app
        self.connections: dict[socket.socket, float] = {}  # time.monotonic() at which each was made
        self.changed = threading.Condition()
        super().__init__((str(address[0]), int(address[1])), RequestHandler)

    def server_bind(self) -> None:
        """Unlike the standard library's, looks up no name of this host in the DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def serve_until(self, signals: Signals) -> None:
        """Serve until told to stop; then requests under way get a few seconds to finish."""
        while not signals.requested:
            watched: list[Any] = [self, signals]
            ready, _, _ = select.select(watched, [], [], 1.0)
            if signals in ready:
                signals.drain()
            if self in ready:
                self.handle_request()
            self.end_long_ones()
        self.server_close()
        with self.changed:
            self.shut_down(self.connections, socket.SHUT_RD)  # ends connections without a request
            self.changed.wait_for(lambda: not self.connections, LAST)

    def end_long_ones(self) -> None:
        """End connections older than the limit: a client may send a byte now and then for ever."""
        now = time.monotonic()
        with self.changed:
            old = [one for one, since in self.connections.items() if now - since > LONGEST]
            self.shut_down(old, socket.SHUT_RDWR)

    def shut_down(self, connections: Iterable[socket.socket], how: int) -> None:
        """Shut connections down, so that their threads notice and end."""
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(how)

    def process_request(self, request, client_address) -> None:
        with self.changed:
            is_full = len(self.connections) >= MOST_CONNECTIONS
            if not is_full:
                self.connections[request] = time.monotonic()
        if is_full:
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        super().shutdown_request(request)
        with self.changed:
            self.connections.pop(request, None)
            self.changed.notify_all()

    def handle_error(self, request, client_address) -> None:
        log.exception("요청 처리 오류: %s", client_address[0])
