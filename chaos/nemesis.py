"""Carries out the planned faults: each is a context manager that begins it, and ends it when its
time is over. What could not be done, because another fault was in the way, is not recorded.
"""

import heapq
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field

import psycopg2

import db
from chaos.history import Fault, pid_of
from chaos.listeners import Listener
from chaos.pipeline import Pipeline
from chaos.plan import PlannedFault
from chaos.proxy import Proxy
from demo.database import EmbeddedDatabase

BACKENDS = """
SELECT pid, application_name FROM pg_stat_activity
WHERE starts_with(application_name, %s) ORDER BY backend_start
"""
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE starts_with(application_name, %s)
"""
GARBAGE = ["", "{", "null", "[1]", '{"job_id": 1}', "x" * 7000, '{"job_id": {}, "status": []}']


class NotNow(Exception):
    """There is nothing to do this fault to."""


@dataclass
class World:
    """What there is to break. behind: the slots of the listeners behind the proxies."""

    database: EmbeddedDatabase
    api: Pipeline
    listeners: list[Listener]
    database_proxy: Proxy
    stage_proxy: Proxy
    behind: list[int]

    def query(self, sql: str, *params: object) -> list[tuple]:
        with closing(psycopg2.connect(self.database.dsn(), connect_timeout=2)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(sql, params)
                return cursor.fetchall() if cursor.description else []


@dataclass
class Target:
    """Whom a fault concerns, filled in as it begins."""

    reach: str
    slots: list[int]
    pids: list[int] = field(default_factory=list)


class Nemesis:
    """run() follows the plan until `stop` is set, then ends what is still under way."""

    def __init__(self, world: World, planned: list[PlannedFault]):
        self.world, self.planned = world, planned
        self.faults: list[Fault] = []
        self.not_now = 0
        self.stop = threading.Event()
        self.frozen: set[int] = set()  # backends
        self.database_up = True
        self._order = itertools.count()
        self._ends: list[tuple] = []  # (time, number, plan, target, context, began)

    def run(self) -> None:
        began = time.monotonic()
        for plan in self.planned:
            if self.wait_until(began + plan.at):
                break
            self.begin(plan)
        while self._ends and not self.wait_until(self._ends[0][0]):
            pass
        while self._ends:
            self.end(heapq.heappop(self._ends))

    def wait_until(self, when: float) -> bool:
        """Sleep, ending the faults whose time is over; True when told to stop."""
        while True:
            while self._ends and self._ends[0][0] <= time.monotonic():
                self.end(heapq.heappop(self._ends))
            following = min([when, *(end[0] for end in self._ends[:1])])
            if self.stop.wait(max(0.0, following - time.monotonic())):
                return True
            if time.monotonic() >= when:
                return False

    def begin(self, plan: PlannedFault) -> None:
        target = Target("worker", [])
        context = KINDS[plan.kind](self, plan, target)
        began = time.time()
        try:
            context.__enter__()
        except (NotNow, ProcessLookupError, psycopg2.Error):
            self.not_now += 1
            return
        until = time.monotonic() + plan.seconds
        heapq.heappush(self._ends, (until, next(self._order), plan, target, context, began))

    def end(self, fault: tuple) -> None:
        _, _, plan, target, context, began = fault
        with suppress(ProcessLookupError):
            context.__exit__(None, None, None)
        self.faults.append(Fault(plan.kind, began=began, ended=time.time(), **vars(target)))

    def every_slot(self) -> list[int]:
        return [listener.slot for listener in self.world.listeners]

    def listener(self, plan: PlannedFault, parents: bool = False) -> Listener:
        among = [each for each in self.world.listeners if each.workers > 1 or not parents]
        return among[plan.pick % len(among)]

    def worker(self, plan: PlannedFault, target: Target) -> int:
        """One worker process, by the plan's choice."""
        listener = self.listener(plan)
        pids = listener.pids()
        if not pids:
            raise NotNow
        target.slots, target.pids = [listener.slot], [pids[plan.pick % len(pids)]]
        return target.pids[0]

    def backend(self, plan: PlannedFault, target: Target) -> int:
        """The server's process for one worker, by the plan's choice."""
        found = self.world.query(BACKENDS, db.WORKER_APPLICATION)
        if not found:
            raise NotNow
        pid, name = found[plan.pick % len(found)]
        target.reach, target.slots = "database", self.every_slot()
        target.pids = [pid_of(name)]
        return pid


Context = AbstractContextManager[None]


@contextmanager
def kill_worker(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    os.kill(nemesis.worker(plan, target), signal.SIGKILL)
    yield


@contextmanager
def kill_parent(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    """Its workers go on with the call in hand, and then end by themselves."""
    listener = nemesis.listener(plan, parents=True)
    target.slots = [listener.slot]
    for pid in listener.parent():
        target.pids = [pid]
        os.kill(pid, signal.SIGKILL)
    yield


@contextmanager
def terminate(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    listener = nemesis.listener(plan)
    if listener.asked:  # a second signal would be a kill
        raise NotNow
    target.slots = [listener.slot]
    listener.terminate()
    yield


@contextmanager
def freeze_worker(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    pid = nemesis.worker(plan, target)
    os.kill(pid, signal.SIGSTOP)
    yield
    os.kill(pid, signal.SIGCONT)


@contextmanager
def terminate_backend(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    pid = nemesis.backend(plan, target)
    nemesis.world.query("SELECT pg_terminate_backend(%s)", pid)
    yield


@contextmanager
def terminate_backends(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach, target.slots = "database", nemesis.every_slot()
    nemesis.world.query(TERMINATE, db.WORKER_APPLICATION)
    yield


@contextmanager
def kill_backend(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The server ends all connections and recovers, as after the kernel's OOM killer."""
    os.kill(nemesis.backend(plan, target), signal.SIGKILL)
    target.pids = []
    yield
    while not nemesis.stop.wait(0.05):
        with suppress(psycopg2.Error):
            nemesis.world.query("SELECT")
            break


@contextmanager
def freeze_backend(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The kernel still acknowledges its packets: to the worker it is just silent."""
    pid = nemesis.backend(plan, target)
    os.kill(pid, signal.SIGSTOP)
    nemesis.frozen.add(pid)
    yield
    if pid in nemesis.frozen:
        nemesis.frozen.discard(pid)
        os.kill(pid, signal.SIGCONT)


def restart_database(mode: str) -> Callable[..., Context]:
    @contextmanager
    def restart(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
        if not nemesis.database_up:
            raise NotNow
        target.reach, target.slots = "database", nemesis.every_slot()
        for pid in nemesis.frozen:  # it would never end, and the server waits for it
            os.kill(pid, signal.SIGCONT)
        nemesis.frozen.clear()
        nemesis.database_up = False
        nemesis.world.database.stop(mode)
        yield
        nemesis.world.database.start()
        nemesis.database_up = True

    return restart


def network(which: str, what: str) -> Callable[..., Context]:
    @contextmanager
    def disturb(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
        proxy: Proxy = getattr(nemesis.world, f"{which}_proxy")
        if not proxy.passing.is_set():
            raise NotNow
        target.reach, target.slots = which, nemesis.world.behind
        getattr(proxy, what)()
        yield
        proxy.heal()

    return disturb


@contextmanager
def restart_api(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    if nemesis.world.api.closing.is_set():
        raise NotNow
    target.reach, target.slots = "stage", nemesis.every_slot()
    nemesis.world.api.close(grace=0)
    yield
    nemesis.world.api.start()


@contextmanager
def garbage(nemesis: Nemesis, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach = "nothing"
    for payload in GARBAGE:
        nemesis.world.query("SELECT pg_notify(%s, %s)", db.CHANNEL, payload)
    yield


KINDS: dict[str, Callable[..., Context]] = {
    "kill -9 worker": kill_worker,
    "kill -9 parent": kill_parent,
    "SIGTERM": terminate,
    "freeze worker": freeze_worker,
    "freeze worker beyond its lease": freeze_worker,
    "terminate backend": terminate_backend,
    "terminate all backends": terminate_backends,
    "kill -9 backend": kill_backend,
    "freeze backend": freeze_backend,
    "freeze backend beyond the deadline": freeze_backend,
    "restart database, fast": restart_database("fast"),
    "restart database, immediate": restart_database("immediate"),
    "stall database network": network("database", "stall"),
    "drop database network": network("database", "drop"),
    "cut database network": network("database", "cut"),
    "stall stage network": network("stage", "stall"),
    "drop stage network": network("stage", "drop"),
    "cut stage network": network("stage", "cut"),
    "restart stage API": restart_api,
    "malformed notifications": garbage,
}
