"""The HTTP of the stand-in stage API: keep-alive, a thread per connection, one send per answer."""

import json
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

LARGEST_BODY = 1 << 20


class Hangup(Exception):
    """Raised by a behaviour to close the connection without an answer; it may have written one."""


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_answer(status: int, /, **content: Any) -> Answer:
    body = json.dumps(content, ensure_ascii=False).encode()
    return Answer(status, body, {"Content-Type": "application/json"})


def object_in(raw: bytes) -> dict:
    """The JSON object in a body, empty where it is none."""
    with suppress(ValueError):
        if isinstance(content := json.loads(raw), dict):
            return content
    return {}


class Request:
    """A POST as it arrived, and its answer. Times are those of time.monotonic().

    body: the JSON object that was sent; empty where it was none. raw: its bytes.
    status: of the answer; None until it is known. finished: when the answer was sent, or failed to
    be; None until then. sent: whether it was sent completely.
    """

    def __init__(self, path: str, raw: bytes, headers: HTTPMessage, connection: socket.socket):
        self.time = time.monotonic()
        self.finished: float | None = None
        self.status: int | None = None
        self.sent = False
        self.path, self.raw, self.headers, self.connection = path, raw, headers, connection
        self.body = object_in(raw)
        self.stage: str | None = None
        self.job_id, self.tenant_id = self.id_in("job_id"), self.id_in("tenant_id")
        self.row_id: str | None = None  # of the row that the stage works on

    def id_in(self, name: str) -> str | None:
        """A field of the body as text."""
        return None if self.body.get(name) is None else str(self.body[name])

    def __repr__(self) -> str:
        return f"<{self.stage or self.path} {self.job_id} {self.status or 'unanswered'}>"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one send; two sends cost 40 ms (Nagle and delayed ACK)
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._send(json_answer(200, status="ok"))
        else:
            self._send(json_answer(404, error=f"nothing to get at {self.path}"))

    def do_POST(self) -> None:
        api = self.server.api
        request = Request(self.path, self._body(), self.headers, self.connection)
        api.arrived(request)
        try:
            answer = api.answer(request)
            request.status = answer.status
            self._send(answer)
            request.sent = True
        except Hangup:
            self.close_connection = True
        finally:
            api.finished(request)

    def _body(self) -> bytes:
        """The body. Without a usable Content-Length, the connection is closed after the answer."""
        with suppress(ValueError):
            length = int(self.headers.get("Content-Length", ""))
            if 0 <= length <= LARGEST_BODY:
                return self.rfile.read(length)
        self.close_connection = True
        return b""

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in ({"Content-Length": len(answer.body)} | answer.headers).items():
            self.send_header(name, str(value))
        if self.close_connection or self.server.api.closing.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Logs nothing, as the API has its own log."""


class StageServer(ThreadingTCPServer):
    """An HTTP server that, unlike http.server's, does not look its name up in the DNS at start."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], api) -> None:
        self.api = api
        self._connections: set[socket.socket] = set()
        super().__init__(address, Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop_accepting(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def cut_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """Ignore a client that hung up; print any other error, as it is a bug."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
