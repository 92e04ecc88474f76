"""Signals that wake a select(): those that ask to stop, and SIGCHLD at the end of a child; and the
reaping of children that nobody waits for.
"""

import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Signals within so many seconds are one request: `timeout`, systemd with SendSIGHUP and a shell
# whose terminal was closed send two at once.
ONE_REQUEST = 0.5


class Signals:
    """Notes signals that were received. The handlers do nothing else; the loop acts on them."""

    def __init__(self):
        self.stops: list[int] = []  # the signals that asked to stop, one for each request
        self.stopped_at = -math.inf  # time.monotonic() of the last of them
        self.child_ended = False
        self.receiving, self.sending = socket.socketpair()
        self.receiving.setblocking(False)
        self.sending.setblocking(False)
        signal.set_wakeup_fd(self.sending.fileno(), warn_on_full_buffer=False)
        # nohup ignores SIGHUP, and a script ignores SIGINT for what it starts with &.
        self.stopping = [number for number in STOPPING if number == signal.SIGTERM
                         or signal.getsignal(number) != signal.SIG_IGN]  # fmt: skip
        for number in self.stopping:
            signal.signal(number, self.stop)
        signal.signal(signal.SIGCHLD, self.child)

    def stop(self, number, _frame) -> None:
        now = time.monotonic()
        if now - self.stopped_at > ONE_REQUEST:
            self.stops.append(number)
            self.stopped_at = now

    def child(self, _number, _frame) -> None:
        self.child_ended = True

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return bool(self.stops)

    def fileno(self) -> int:
        return self.receiving.fileno()

    def drain(self) -> None:
        """Read the bytes that woke the select()."""
        with contextlib.suppress(BlockingIOError):
            while self.receiving.recv(4096):
                pass

    def leave(self) -> None:
        """In a forked child: ignore these signals, and do not wake the parent by them.

        The handlers do nothing. SIG_IGN would be inherited by programs that the child starts.
        """
        signal.set_wakeup_fd(-1)
        for number in self.stopping:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.receiving.close()
        self.sending.close()


def reap_orphans(ours: Iterable[int]) -> list[int]:
    """Reap the ended children that are not `ours`; their pids.

    What a stage function or ALERT_COMMAND started and left becomes a child of process 1 when its
    parent ends. A process with another number has no such children.
    """
    if os.getpid() != 1:
        return []
    reaped, kept = [], set(ours)
    with contextlib.suppress(OSError):  # no /proc, or one without this file
        for pid in map(int, Path("/proc/1/task/1/children").read_text().split()):
            with contextlib.suppress(ChildProcessError):
                if pid not in kept and os.waitpid(pid, os.WNOHANG)[0]:
                    reaped.append(pid)
    return reaped
