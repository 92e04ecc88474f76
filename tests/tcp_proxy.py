"""A TCP proxy between the listener and PostgreSQL that can keep one exchange back."""

import socket
import threading
from contextlib import suppress

PATIENCE = 60.0
# ReadyForQuery outside a transaction: the answer is complete, and its effects are committed.
READY = b"Z\x00\x00\x00\x05I"


class Hold:
    """Holds the first request that contains `text`, or the answer to it."""

    def __init__(self, text: str, stops: str):
        self.text, self.stops = text.encode(), stops
        self.answer = b""
        self.link: Link | None = None
        self.released = threading.Event()
        self.changed = threading.Condition()

    def wait(self) -> None:
        """Block until the request was sent and, where the answer is held, completely answered."""
        self._wait_for(
            lambda: self.link and (self.stops == "request" or self.answer.endswith(READY))
        )

    def wait_for(self, text: str) -> None:
        """Block until the server has sent `text` behind the answer that is held."""
        self._wait_for(lambda: text.encode() in self.answer)

    def _wait_for(self, predicate) -> None:
        with self.changed:
            assert self.changed.wait_for(predicate, PATIENCE), f"{self.text} was not exchanged"

    def release(self) -> None:
        """Pass on what was held, all at once."""
        with self.changed:
            self.released.set()
            if self.answer:
                self.link.client.sendall(self.answer)

    def cut(self) -> None:
        """Close the connection on both sides; what was held is dropped."""
        for end in (self.link.client, self.link.server):
            with suppress(OSError):  # already gone
                end.shutdown(socket.SHUT_RDWR)

    def lose_client(self) -> None:
        """Close the connection for the listener only: the server has not noticed yet."""
        self.link.client.shutdown(socket.SHUT_RDWR)


class Link:
    """One connection: a thread for each direction."""

    def __init__(self, proxy: "TcpProxy", client: socket.socket, server: socket.socket):
        self.proxy, self.client, self.server = proxy, client, server
        self.hold: Hold | None = None
        for pump in (self.upwards, self.downwards):
            threading.Thread(target=pump, daemon=True).start()

    def upwards(self) -> None:
        with suppress(OSError):
            while data := self.client.recv(1 << 20):
                self.proxy.requests.append(data)
                self.catch(data)
                self.server.sendall(data)
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_WR)

    def catch(self, data: bytes) -> None:
        hold = self.proxy.hold
        if hold is None or hold.text not in data:
            return
        self.proxy.hold = None
        with hold.changed:
            hold.link, self.hold = self, hold
            hold.changed.notify_all()
        if hold.stops == "request":
            hold.released.wait(PATIENCE)

    def downwards(self) -> None:
        with suppress(OSError):
            while data := self.server.recv(1 << 20):
                if not self.keep(data):
                    with suppress(OSError):
                        self.client.sendall(data)
        with suppress(OSError):
            self.client.shutdown(socket.SHUT_RDWR)

    def keep(self, data: bytes) -> bool:
        if self.hold is None or self.hold.stops == "request":
            return False
        with self.hold.changed:
            if self.hold.released.is_set():
                return False
            self.hold.answer += data
            self.hold.changed.notify_all()
        return True


class TcpProxy:
    """Stands before the server of `environ`; a context manager.

    `settings` point a listener here, `requests` is what it sent.
    """

    def __init__(self, environ: dict[str, str]):
        self.target = (environ["DB_HOST"], int(environ["DB_PORT"]))
        self.requests: list[bytes] = []
        self.hold: Hold | None = None
        self.links: list[Link] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.settings = {"DB_HOST": "127.0.0.1", "DB_PORT": self.listening.getsockname()[1]}
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                server = socket.create_connection(self.target)
                self.links.append(Link(self, client, server))

    def hold_answer(self, text: str) -> Hold:
        """Keep back the answer to the next request that contains `text`."""
        self.hold = Hold(text, "answer")
        return self.hold

    def hold_request(self, text: str) -> Hold:
        """Keep back the next request that contains `text`."""
        self.hold = Hold(text, "request")
        return self.hold

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for link in self.links:
            for end in (link.client, link.server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
