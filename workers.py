"""The workers: processes that the listener forks, each of which makes one call at a time.

The first half is the listener's side, the second what happens in a worker. A worker knows nothing
of claiming: it is given a Call through a socket and gives back a Result.
"""

import contextlib
import json
import logging
import math
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg2.extensions

import db
import failures
import logs
import settling
import trigger
from alerts import TIME_LIMIT, Alerts
from calls import Result
from heartbeat import Heartbeat
from pipeline import Call
from signals import Signals
from trigger import GRACE, Trigger, boottime

log = logging.getLogger("listener.workers")

# A worker is replaced after so many calls: what a stage function leaks stays small.
CALLS = 500
# Seconds before another process is started, after one that could not be, or that made no call.
RESTART_DELAY = 1.0
# Seconds that a worker without a listener has for alerts and lines of the log.
TELLING = 2 * TIME_LIMIT

LENGTH = struct.Struct("!I")
ENCODER = json.JSONEncoder(default=str)
CHUNK = 2**16
LARGEST = 2**20  # bytes of a result; more was not written by us


def packed(message: Call | Result) -> bytes:
    """A message between listener and worker: its length, then JSON."""
    data = ENCODER.encode(vars(message)).encode()
    return LENGTH.pack(len(data)) + data


class Worker:
    """One worker process as the listener sees it."""

    def __init__(self, pid: int, end: socket.socket, shared_status: mmap.mmap):
        self.pid = pid
        self.end = end
        self.shared_status = shared_status  # the status of its last POST: see Call
        self.end.setblocking(False)
        self.is_open = True
        self.is_garbled = False  # what came is no result
        self.call: Call | None = None
        self.began = 0.0  # time.monotonic() at which it was given this call
        self.until = math.inf  # time.monotonic() at which the process is killed
        self.made = 0  # calls that it was given
        self.unsent = b""  # of its call
        self.received = bytearray()  # of its result

    def fileno(self) -> int:
        return self.end.fileno()

    def give(self, call: Call) -> None:
        self.shared_status[:2] = bytes(2)
        self.unsent = packed(call)
        self.call, self.made, self.began = call, self.made + 1, time.monotonic()
        self.until = self.began + call.timeout + GRACE
        self.send()

    def send(self) -> None:
        """Send what the socket takes now; that the worker has died is noticed elsewhere."""
        with contextlib.suppress(OSError):
            self.unsent = self.unsent[self.end.send(self.unsent) :]

    def read(self) -> None:
        """Take what has arrived. If the worker has closed its socket, it is killed after GRACE."""
        chunk = b"-" * CHUNK
        while len(chunk) == CHUNK:
            try:
                chunk = self.end.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            self.received += chunk
        if not chunk:
            self.is_open = False
            self.until = min(self.until, time.monotonic() + GRACE)

    def receive(self) -> Result | None:
        """The result, once all of it is here."""
        self.read()
        size = LENGTH.size
        if len(self.received) >= size:
            size += LENGTH.unpack_from(self.received)[0]
        try:
            if size > LARGEST:
                raise ValueError(f"a message of {size} bytes")
            if len(self.received) < size:
                return None
            result = Result(**json.loads(self.received[LENGTH.size : size]))
        except Exception as error:  # a stage function may have written to this socket
            log.error("워커가 알 수 없는 것을 보냄: %s", error)
            self.is_garbled, self.until = True, 0.0
            return None
        self.received, self.call, self.until = bytearray(), None, math.inf
        return result

    def has_ended(self) -> bool:
        """Whether the process has ended by itself. Its pid stays taken until `kill`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> int | None:
        """Kill it, and what it started; its exit code where it is known, negative for a signal."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self.end.close()
        self.shared_status.close()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


class Workers:
    """`size` workers. They are forked from the listener and have nothing of its connection."""

    def __init__(
        self, settings: SimpleNamespace, size: int, signals: Signals, heartbeat: Heartbeat
    ):
        self.settings, self.size = settings, size
        self.signals, self.heartbeat = signals, heartbeat
        self.trigger = Trigger(settings)
        self.conn: db.Connection | None = None  # the listener's last one
        self.all: list[Worker] = []
        self.dying: list[int] = []  # pids that were killed and not yet waited for
        self.start_at = 0.0  # time.monotonic() at which a process may be started again

    @property
    def idle(self) -> list[Worker]:
        return [worker for worker in self.all if worker.call is None and worker.is_open]

    @property
    def calls(self) -> list[Call]:
        """The calls under way."""
        return [worker.call for worker in self.all if worker.call is not None]

    @property
    def pids(self) -> list[int]:
        """Of all processes that are not reaped yet."""
        return [*(worker.pid for worker in self.all), *self.dying]

    @property
    def reading(self) -> list[Worker]:
        """For select(): a result may come from them."""
        return [worker for worker in self.all if worker.is_open]

    @property
    def writing(self) -> list[Worker]:
        """For select(): they have not taken all of their call yet."""
        return [worker for worker in self.all if worker.unsent]

    @property
    def next_deadline(self) -> float:
        """time.monotonic() at which there is something to do, whatever the workers say."""
        times = [worker.until for worker in self.all]
        if len(self.all) < self.size:
            times.append(self.start_at)
        return min(times, default=math.inf)

    def start_missing(self) -> None:
        """Fork until there are `size` of them, unless that failed a moment ago."""
        while len(self.all) < self.size and time.monotonic() >= self.start_at:
            try:
                self.all.append(self.start())
            except OSError as error:
                self.start_at = time.monotonic() + RESTART_DELAY
                log.error("워커를 시작할 수 없음: %s → %.0f초 후 재시도", error, RESTART_DELAY)

    def start(self) -> Worker:
        ours, theirs = socket.socketpair()
        theirs.settimeout(None)  # whatever default a module of the stages has set
        shared_status = mmap.mmap(-1, 2)  # memory that a fork shares
        pid = os.fork()
        if pid == 0:
            live(self, theirs, shared_status, [ours, *(worker.end for worker in self.all)])
        theirs.close()
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # as the child does: whoever comes first
        return Worker(pid, ours, shared_status)

    def give(self, call: Call) -> None:
        """Have `call` made by an idle worker, whose last result is written."""
        worker = self.idle[0]
        if worker.made >= CALLS or worker.has_ended():
            with contextlib.suppress(OSError):  # the old one goes on where none can be started
                self.all.append(self.start())
                self.kill_and_remove(worker)
                worker = self.all[-1]
        worker.give(call)

    def collect(self, ready: Iterable[Any]) -> list[tuple[Call, Result]]:
        """What has come back, also of calls whose worker died or came to its deadline."""
        ready, now = set(ready), time.monotonic()
        ended: list[tuple[Call, Result]] = []
        # Reset before the processes are looked at: one that ends meanwhile sets it again.
        child_ended, self.signals.child_ended = self.signals.child_ended, False
        if child_ended:
            self.dying = [pid for pid in self.dying if not os.waitpid(pid, os.WNOHANG)[0]]
        for worker in list(self.all):
            if worker.unsent:
                worker.send()
            if not (worker in ready or child_ended or now >= worker.until):
                continue
            # has_ended() comes first, so that all is read that an ended process has sent.
            call, has_ended = worker.call, worker.has_ended()
            result = worker.receive()
            if call is not None and result is not None:
                ended.append((call, result))
            if has_ended or now >= worker.until:
                status = int.from_bytes(worker.shared_status[:2], "big")
                code = self.kill_and_remove(worker)
                if worker.call is not None:
                    reason = why_ended(worker, worker.call, has_ended, code)
                    result = self.result_of_dead(worker.call, worker.began, status, reason)
                    ended.append((worker.call, result))
        return ended

    def kill_and_remove(self, worker: Worker) -> int | None:
        """Kill a worker, so that another takes its place; its exit code as of Worker.kill()."""
        self.all.remove(worker)
        code = worker.kill()
        if code is None:
            self.dying.append(worker.pid)
        if worker.made == 0:
            self.start_at = time.monotonic() + RESTART_DELAY
            log.error("호출 없이 종료된 워커: %s → %.0f초 후 재시작", code, RESTART_DELAY)
        return code

    def result_of_dead(self, call: Call, began: float, status: int, reason: str) -> Result:
        """The result of a call whose worker died: unknown, but not if its stage had accepted it.

        Args:
            status: of the answer to its last POST; 0: there was none.
        """
        if ended := trigger.accepted(call, status):
            ended.traceback = f"{reason}, after the call was accepted"
        else:
            ended = trigger.failure(call, "unknown", reason, self.settings.RETRY_DELAY)
        ended.seconds = time.monotonic() - began
        return ended

    def kill_all(self) -> None:
        """Kill all workers: they are idle, or a second signal came; leases protect their calls."""
        for worker in list(self.all):
            worker.kill()
        self.all = []


def why_ended(worker: Worker, call: Call, has_ended: bool, code: int | None) -> str:
    """Why a worker's process ended in the middle of `call`.

    Args:
        has_ended: by itself; else the listener has killed it.
        code: of its exit, negative for a signal; None: not known.
    """
    if has_ended and code is not None and code < 0:
        names = {one.value: one.name for one in signal.Signals}  # not of all real-time signals
        return f"its worker was killed by {names.get(-code, f'signal {-code}')}"
    if has_ended:
        return f"its worker exited with {code}"
    if worker.is_garbled:
        return "its worker sent what is no result, so it was killed"
    if not worker.is_open:
        return "its worker closed its connection to the listener"
    return f"no answer within {call.timeout:g} s, so its worker was killed"


# --- in a worker ---------------------------------------------------------------------------


def live(
    workers: Workers, end: socket.socket, shared_status: mmap.mmap, others: list[socket.socket]
) -> None:
    """The life of a worker, from the fork to its end; does not return."""
    code = 1
    try:
        if workers.conn is not None and not workers.conn.closed:
            # The fork has copied the listener's connection. /dev/null takes the place of its
            # socket, so that nothing done in here reaches the server, nor the end of this process.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, workers.conn.fileno())
            os.close(null)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        workers.signals.leave()
        workers.heartbeat.leave()
        for other in others:
            other.close()
        psycopg2.extensions.set_wait_callback(None)  # see where db.py sets it
        make_calls(workers, end, shared_status)
        code = 0
    except BaseException:
        log.exception("워커 오류")
    finally:
        flush_output()
        os._exit(code)


def make_calls(workers: Workers, end: socket.socket, shared_status: mmap.mmap) -> None:
    """One call after the other, for as long as the listener lives."""
    last: tuple[Call, Result] | None = None
    for call in given(end):
        last = None  # written: only then does the listener give another call
        if trigger.seconds_left(call) >= call.timeout:  # else it is released
            arm(call)
        call.shared_status = shared_status
        result = workers.trigger.run(call)
        call.shared_status = None  # a thread that it left behind may go on to POST
        flush_output()
        last = call, result
        try:
            end.sendall(packed(result))
        except OSError:
            break
        signal.setitimer(signal.ITIMER_REAL, 0)
    if last is not None:
        settle_without_listener(workers.settings, *last)


def given(end: socket.socket) -> Iterator[Call]:
    """Each call that the listener gives, until it is gone."""
    # A listener that dies with a result unread resets the connection.
    with contextlib.suppress(OSError), end.makefile("rb") as file:
        while len(head := file.read(LENGTH.size)) == LENGTH.size:
            yield Call(**json.loads(file.read(LENGTH.unpack(head)[0])))


def arm(call: Call) -> None:
    """Have the kernel end this process with its lease, should the listener be frozen or gone."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, call.leased_until - boottime()))


def settle_without_listener(settings: SimpleNamespace, call: Call, result: Result) -> None:
    """The listener is gone: write the result here, as long as the lease lasts.

    It may have been written already. Then nothing is done, or said.
    """
    if result.outcome == "released":
        return
    arm(call)
    name = db.LISTENER_APPLICATION + call.listener
    settled = settling.settle_within_lease(settings, name, call, result, unless_recorded=True)
    # It is written. What is left may wait for a reader of our output, but not for ever.
    signal.setitimer(signal.ITIMER_REAL, TELLING)
    if settled.is_new:
        alerts = Alerts(settings)
        failures.tell(alerts, settled.result)
        trigger.log_end(call, result)
        outcome = settled.result.outcome
        log.warning("리스너가 사라져 워커가 결과를 기록함: %s stage=%s outcome=%s",
                    logs.ids(call.ids), call.stage, outcome,
                    extra=trigger.about(call, outcome=outcome))  # fmt: skip
        alerts.close()
    signal.setitimer(signal.ITIMER_REAL, 0)


def flush_output() -> None:
    """Flush what a stage function printed, as the process may be killed; not where that blocks."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, not there
            if settling.takes_output(stream):
                stream.flush()
