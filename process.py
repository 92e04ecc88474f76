"""The process around a worker: being told to stop, and the parent of several workers."""

import contextlib
import fcntl
import itertools
import logging
import mmap
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import logs

log = logging.getLogger("listener.process")

# A worker that ends with this code would fail again: its parent stops instead.
EXIT_CANNOT_START = 2


# --- being told to stop --------------------------------------------------------------------


class Stop:
    """SIGTERM or SIGINT was received; `select` wakes on it.

    The handler only counts. In a worker the second signal leaves at once, and the lease
    covers the call in hand. A child hears one signal twice where a whole group gets it, so
    its parent passes the second one on as SIGKILL.

    Args:
        role: "worker", "child" (of a parent that passes signals on) or "parent".
    """

    def __init__(self, role: str = "worker"):
        self.signals = 0
        self.role = role
        self.parent = os.getppid()
        self.receiving, self.sending = socket.socketpair()
        self.receiving.setblocking(False)
        self.sending.setblocking(False)
        signal.set_wakeup_fd(self.sending.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self.handle)
        # Ctrl-C reaches the whole group: from the parent's SIGTERM a child would hear it twice.
        signal.signal(signal.SIGINT, signal.SIG_IGN if role == "child" else self.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})

    def handle(self, number, _frame) -> None:
        self.signals += 1
        if self.role == "worker" and self.signals > 1:
            logs.write()
            os._exit(128 + number)

    @property
    def requested(self) -> bool:
        # A child whose parent was killed would go on unseen.
        return self.signals > 0 or (self.role == "child" and os.getppid() != self.parent)

    def fileno(self) -> int:
        return self.receiving.fileno()

    def wait(self, seconds: float, *others) -> None:
        """Sleep until a signal, until one of `others` is readable, or for `seconds`."""
        logs.write()
        if not self.requested:
            select.select([self, *others], [], [], max(0.0, seconds))
        self.drain()

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.receiving.recv(4096):
                pass


# --- the watch -----------------------------------------------------------------------------

BUSY, IDLE, ON_WATCH = range(3)  # what a worker says of itself, a byte for each
# Times that they share, by time.monotonic(): of anybody's last look, and of what is done next.
LOOKED_AT, REAP_AT, HISTORY_AT, STALLED_AT = range(4)


class Watch:
    """One of the idle workers of a parent is on watch: it listens for all of them, and wakes
    another for each bell. So a NOTIFY wakes one process and not all, and one asks the database.

    What the workers say of themselves is in memory that they share. The watch is a lock, which
    is free again when its owner dies.
    """

    def __init__(self, workers: int = 1):
        self.number = 0  # of this worker: set after the fork
        self.states = mmap.mmap(-1, workers)
        self.times = memoryview(mmap.mmap(-1, 32)).cast("d")
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(workers)]
        for end in itertools.chain(*self.pairs):
            end.setblocking(False)
        # Open for as long as this process; one worker alone needs no lock.
        self.file = tempfile.TemporaryFile() if workers > 1 else None  # noqa: SIM115

    def begin_look(self) -> None:
        """Before a look for due calls, which will see whatever this worker was woken for."""
        self.states[self.number] = BUSY
        self.is_woken()
        self.times[LOOKED_AT] = time.monotonic()

    def leave(self) -> None:
        """Be busy, or without a connection: another takes the watch, and looks."""
        self.states[self.number] = BUSY
        if self.file:
            fcntl.lockf(self.file, fcntl.LOCK_UN)
        self.wake_another()

    def rest(self) -> bool:
        """After a look that found nothing. Whether this worker is the one on watch."""
        # In this order: who gives the watch up while this worker does not get it must see it idle.
        self.states[self.number] = IDLE
        try:
            if self.file:  # of a process, unlike flock's: it was opened before the fork
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        self.states[self.number] = ON_WATCH
        return True

    def wake_another(self) -> bool:
        """Wake another idle worker, the one on watch only where there is no other."""
        for state in (IDLE, ON_WATCH):
            for number, said in enumerate(bytes(self.states)):
                if said == state and number != self.number:
                    self.states[number] = BUSY
                    with contextlib.suppress(OSError):  # full of such bytes already
                        self.pairs[number][1].send(b".")
                    return True
        return False

    def fileno(self) -> int:
        return self.pairs[self.number][0].fileno()

    def is_woken(self) -> bool:
        """Whether another one woke this worker."""
        woken = False
        with contextlib.suppress(BlockingIOError):
            while self.pairs[self.number][0].recv(1):
                woken = True
        return woken


# --- several workers -----------------------------------------------------------------------

SHORTEST_RESTART, LONGEST_RESTART = 1.0, 60.0  # seconds


@dataclass
class Slot:
    """A place for one worker; its process comes and goes."""

    number: int
    pid: int | None = None
    started: float = 0.0
    start_at: float = 0.0
    delay: float = SHORTEST_RESTART

    def start(self, work: Callable[[int], int]) -> None:
        self.pid, self.started = fork(work, self.number), time.monotonic()

    def ended(self) -> int | None:
        """The exit code, once the process is gone (negative: the signal that killed it)."""
        if self.pid is None:
            return None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.pid = None
        return os.waitstatus_to_exitcode(status)

    def restart_later(self, code: int) -> None:
        """Back off: a worker that dies at once is started less and less often."""
        if time.monotonic() - self.started > LONGEST_RESTART:
            self.delay = SHORTEST_RESTART
        log.error("워커 %d 종료됨 (%d) → %.0f초 후 재시작", self.number, code, self.delay)
        self.start_at = time.monotonic() + self.delay
        self.delay = min(2 * self.delay, LONGEST_RESTART)


def run_workers(count: int, work: Callable[[int], int], restart: bool = True) -> int:
    """Run `work(number)` in `count` processes and start those that die again.

    The parent never talks to the database. It passes every SIGTERM and SIGINT on, so a second
    one ends the workers at once.

    Returns:
        The exit code: 0, or that of a worker that is not started again.
    """
    stop = Stop("parent")
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the select
    slots = [Slot(number) for number in range(1, count + 1)]
    code = passed_on = 0
    while slots:
        for slot in slots:
            if slot.pid is None and slot.start_at <= time.monotonic():
                slot.start(work)
        sleeping = [slot.start_at for slot in slots if slot.pid is None]
        seconds = min(sleeping) - time.monotonic() if sleeping else None
        select.select([stop], [], [], None if seconds is None else max(0.0, seconds))
        stop.drain()
        for slot in list(slots):
            ended = slot.ended()
            if ended is None:
                continue
            if ended == EXIT_CANNOT_START or not restart or stop.signals or passed_on:
                slots.remove(slot)
                code = code or ended
            else:
                slot.restart_later(ended)
        if stop.signals or code == EXIT_CANNOT_START:
            slots = [slot for slot in slots if slot.pid is not None]
        while passed_on < max(stop.signals, code == EXIT_CANNOT_START):
            passed_on += 1
            for slot in slots:
                os.kill(slot.pid, signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
    return 128 - code if code < 0 else code


def fork(work: Callable[[int], int], number: int) -> int:
    """A child that runs `work(number)` and exits with its code. Returns the child's pid."""
    # No signal may be lost before the child's own Stop is there to receive it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        return pid
    code = 1
    try:
        code = work(number)
    except BaseException:
        log.exception("워커 %d 오류", number)
    finally:
        logging.shutdown()
        os._exit(code)
