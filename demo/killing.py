"""A worker of the listener is killed in the middle of a call, which the stage never sees."""

import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from glob import iglob

from demo.stage_server import Hangup, Request

LOOKED_AT_FOR = 1.5  # seconds that the call is under way, so that it is seen on the board


class Killing:
    """Ends the worker that makes the first call of a stage.

    Args:
        stage: the one whose first call does not get an answer.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self.request: Request | None = None
        self.is_done = False
        self._lock = threading.Lock()

    def wait_for(self, request: Request) -> None:
        """The stage's side: it hangs in that first call, without having taken the job.

        Raises:
            Hangup: the worker is gone. Where no worker can be found, the stage works as usual.
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
        """Kill the worker once its time has come; the call that it was making."""
        if not self.request or self.is_done:
            return None
        if time.monotonic() < self.request.time + LOOKED_AT_FOR:
            return None
        self.is_done = True
        with suppress(ProcessLookupError):
            if pid := worker_behind(self.request):
                os.kill(pid, signal.SIGKILL)
                return self.request
        return None


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end is closed, after a moment."""
    readable, _, _ = select.select([connection], [], [], 0.1)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


def worker_behind(request: Request) -> int | None:
    """The process that has sent a request, by its socket; None where /proc does not tell."""
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
