"""Kills a worker of the listener in the middle of a call; the stage has not taken the job yet."""

import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from glob import iglob

from demo.stage_server import Hangup, Request

SHOWN_FOR = 1.5  # seconds that the call is under way before the kill, so that the board shows it


class Killing:
    """Ends the worker that makes the first call of a stage.

    Args:
        stage: the stage whose first call gets no answer.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self.request: Request | None = None
        self.is_done = False
        self._lock = threading.Lock()

    def wait_for(self, request: Request) -> None:
        """In the stage API: hang in the first call until the worker is killed. Other calls, and a
        call whose worker cannot be found, return at once and are worked on as usual.

        Raises:
            Hangup: the worker is gone.
        """
        with self._lock:
            if self.request or request.stage != self.stage or not worker_behind(request):
                return
            self.request = request
        with suppress(OSError):
            while not is_closed(request.connection):
                pass
        raise Hangup

    def look(self) -> Request | None:
        """Kill the worker when it is time; the request that it had sent, or None."""
        if not self.request or self.is_done:
            return None
        if time.monotonic() < self.request.time + SHOWN_FOR:
            return None
        self.is_done = True
        with suppress(ProcessLookupError):
            if pid := worker_behind(self.request):
                os.kill(pid, signal.SIGKILL)
                return self.request
        return None


def is_closed(connection: socket.socket) -> bool:
    """Wait a moment for data; whether the other end has closed the connection."""
    readable, _, _ = select.select([connection], [], [], 0.1)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


def worker_behind(request: Request) -> int | None:
    """The pid of the process that sent a request, found in /proc by its socket; None: not found."""
    with suppress(OSError, StopIteration):
        ends = request.connection.getpeername()[1], request.connection.getsockname()[1]
        ports = [f"{port:04X}" for port in ends]
        with open("/proc/net/tcp") as sockets:
            inode = next(one[9] for one in map(str.split, sockets)
                         if [end[-4:] for end in one[1:3]] == ports)  # fmt: skip
        for name in iglob("/proc/[0-9]*/fd/*"):
            with suppress(OSError):
                if os.readlink(name) == f"socket:[{inode}]":
                    return int(name.split("/")[2])
    return None
