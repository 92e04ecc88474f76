"""A TCP server whose answers are written byte by byte, so that it can misbehave in any way."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass(frozen=True)
class Received:
    """One request as it came over the wire."""

    connection: int
    head: str
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.split("\r\n")[1:]
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


class Connection:
    """The argument of a behaviour: an accepted connection and its number, beginning with 1."""

    def __init__(self, server: "RawServer", sock: socket.socket, number: int):
        self.server, self.sock, self.number = server, sock, number
        self.closing = server.closing

    def receive(self) -> Received | None:
        """The next request, remembered in `server.requests`; None where the client hung up."""
        data = b""
        while b"\r\n\r\n" not in data:
            chunk = self.sock.recv(2**16)
            if not chunk:
                return None
            data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        request = Received(self.number, head.decode("latin-1"), body)
        missing = int(request.headers.get("content-length", 0)) - len(body)
        while missing > 0 and (chunk := self.sock.recv(min(missing, 2**20))):
            body += chunk
            missing -= len(chunk)
        self.server.requests.append(Received(self.number, request.head, body))
        return self.server.requests[-1]

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def drip(self, data: bytes, seconds: float = 0.02, times: int = 1500) -> None:
        """Send `data` again and again, until the client hangs up: half a minute at most."""
        for _ in range(times):
            self.send(data)
            if self.closing.wait(seconds):
                return

    def reset(self) -> None:
        """Close with a RST instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def answer(self, data: bytes) -> None:
        """Take one request, send `data`, and let the connection be closed."""
        self.receive()
        self.send(data)


Behaviour = Callable[[Connection], None]


def answering(data: bytes) -> Behaviour:
    """A behaviour that takes one request, sends `data` and closes."""
    return lambda connection: connection.answer(data)


def in_turn(*answers: bytes) -> Behaviour:
    """A behaviour: each request gets the next answer, on whatever connection, and the last one is
    for all that follow. Connections are kept alive.
    """
    left = list(answers)

    def answer(connection: Connection) -> None:
        while connection.receive():
            connection.send(left.pop(0) if len(left) > 1 else left[0])

    return answer


class RawServer:
    """Listens on 127.0.0.1, or on the IPv6 address `host`; a context manager.

    The n-th connection gets the n-th behaviour, and the last one is for all that follow. A
    behaviour's connection is closed when it returns.
    """

    def __init__(
        self, *behaviours: Behaviour, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ):
        self.behaviours, self.tls = behaviours, tls
        self.requests: list[Received] = []
        self.connections = 0
        self.closing = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family, backlog=64)
        self._open: list[socket.socket] = []
        self._bugs: list[Exception] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        host, port = self._listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.tls else ''}://{host}:{port}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.connections += 1
                self._open.append(sock)
                thread = threading.Thread(
                    target=self._serve, args=(sock, self.connections), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        behaviour = self.behaviours[min(number, len(self.behaviours)) - 1]
        try:
            wrapped = self.tls.wrap_socket(sock, server_side=True) if self.tls else sock
            self._open.append(wrapped)  # a TLS socket takes over the descriptor
            with wrapped:
                behaviour(Connection(self, wrapped, number))
        except OSError:
            pass  # the client going away is no fault of a server
        except Exception as bug:
            self._bugs.append(bug)

    def __enter__(self) -> "RawServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for sock in [self._listening, *self._open]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)
        if self._bugs:
            raise self._bugs[0]
