"""A TCP proxy on 127.0.0.1 that can delay and lose data and cut connections: a bad network that
needs no privileges.
"""

import re
import socket
import threading
from contextlib import suppress


class Link:
    """One connection: a thread for each direction. passing: set unless it is held back. deaf:
    whatever is sent on it is lost.
    """

    def __init__(self, proxy: "Proxy", client: socket.socket):
        self.proxy, self.client, self.passing = proxy, client, proxy.passing
        self.server: socket.socket | None = None
        self.deaf = False
        proxy.links.add(self)  # first, or drop() might miss it
        if proxy.dropping:
            self.deaf = True
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            self.server = socket.create_connection((self.proxy.host, self.proxy.target))
            back = threading.Thread(target=self.pump, args=(self.server, self.client), daemon=True)
            back.start()
            self.pump(self.client, self.server)
            back.join()
        except OSError:
            pass  # the target does not listen: the client's connection is closed
        finally:
            self.proxy.links.discard(self)
            self.client.close()
            if self.server:
                self.server.close()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.proxy.loses(self, data):
                    break
                self.passing.wait()
                if not self.deaf:
                    sink.sendall(data)
        # The end of a connection is held back like its data.
        self.passing.wait()
        self.cut()

    def cut(self) -> None:
        for end in (self.client, self.server):
            if end:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Stands before `target`, a port of `host`; a context manager."""

    def __init__(self, target: int):
        self.target, self.host = target, "127.0.0.1"
        self.links: set[Link] = set()
        self.passing = threading.Event()
        self.passing.set()
        self.dropping = False
        self.trap: tuple[re.Pattern[bytes], re.Pattern[bytes]] | None = None
        self.caught = b""  # what the trap holds
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                Link(self, client)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is held back, or going to be."""
        return (
            self.passing.is_set()
            and self.trap is None
            and all(link.passing is self.passing for link in list(self.links))
        )

    def stall(self) -> None:
        """Hold everything back; heal() lets it through, late."""
        self.passing.clear()

    def hold(self) -> None:
        """The same for the present connections; new ones work."""
        held = threading.Event()
        for link in list(self.links):
            link.passing = held

    def set_trap(self, lost: re.Pattern[bytes], held: re.Pattern[bytes]) -> None:
        """Cut connections that bring what matches `lost`, before it has passed, until one brings
        what matches `held`: that one alone is held, as by hold().
        """
        self.trap, self.caught = (lost, held), b""

    def loses(self, link: Link, data: bytes) -> bool:
        """Whether the trap has `data` lost, and the connection cut; it may hold the connection."""
        if not (trap := self.trap):
            return False
        lost, held = trap
        if held.search(data):
            link.passing, self.trap, self.caught = threading.Event(), None, data
            return False
        return bool(lost.search(data))

    def drop(self) -> None:
        """Lose everything sent on the present connections, and on new ones until heal(); neither
        end is told."""
        self.dropping = True
        for link in list(self.links):
            link.deaf = True
        self.passing.clear()

    def heal(self) -> None:
        self.dropping, self.trap = False, None
        self.passing.set()
        for link in list(self.links):
            held, link.passing = link.passing, self.passing
            held.set()

    def cut(self) -> None:
        """Close all connections on both sides."""
        for link in list(self.links):
            link.cut()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.cut()
