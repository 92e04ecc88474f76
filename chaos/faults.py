"""The faults: each is a context manager that begins it, and ends it when its time is over."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field

import psycopg2

import db
from chaos.clock import STEP, Clock
from chaos.history import pid_of
from chaos.listeners import Listener
from chaos.pipeline import Pipeline
from chaos.plan import CLOCK, CLOCK_STEPS, SWEEP_INTERVAL
from chaos.proxy import Proxy
from demo.database import START_TIMEOUT, EmbeddedDatabase
from demo.standby import follow, promote, rebuild

BACKENDS = """
SELECT pid, application_name FROM pg_stat_activity
WHERE starts_with(application_name, %s) ORDER BY backend_start
"""
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE starts_with(application_name, %s)
"""
SENDERS = "SELECT pid FROM pg_stat_replication WHERE state = 'streaming'"
# Makes each commit wait for the standby, but only once the checkpointer has read the setting. A
# CHECKPOINT afterwards shows that it has.
WAIT_FOR_STANDBY = "ALTER SYSTEM SET synchronous_standby_names = '*'"
WAIT_NO_MORE = "ALTER SYSTEM RESET synchronous_standby_names"
STANDBY_TIMEOUT = 5.0  # seconds
LOST = 1.0  # seconds whose commits a failover may lose
SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
# What an application does to its table, and the way back. tenant_id is read by our trigger, which
# reads each row by a dynamic statement while the column is another than at install.
COLUMNS = [
    ("ALTER TABLE jobs ADD remark text NOT NULL DEFAULT ''", "ALTER TABLE jobs DROP remark"),
    (
        "ALTER TABLE jobs RENAME created_at TO made_at",
        "ALTER TABLE jobs RENAME made_at TO created_at",
    ),
    (
        "ALTER TABLE jobs ALTER tenant_id TYPE varchar(99)",
        "ALTER TABLE jobs ALTER tenant_id TYPE text",
    ),
]
REWRITES = [
    "VACUUM FULL jobs",
    "CLUSTER jobs USING jobs_pkey",
    "REINDEX TABLE jobs",
    "VACUUM FULL stage_calls",
    "REINDEX TABLE stage_leases",
]
# Whoever waits for a lock on a table has everybody else wait behind.
WAIT_FOR_LOCK = "-c lock_timeout=2000"
# The answer to a claim that has claimed something, and the statement that gives it back.
CLAIMED = re.compile(rb"routed_to.*\bdone\b", re.DOTALL)
GIVING_BACK = re.compile(rb"AS given_back")
CALLING = 3.0  # seconds to wait for a call of its listener
GARBAGE = ["", "{", "null", "[1]", '{"job_id": 1}', "x" * 7000, '{"job_id": {}, "status": []}']


class NotNow(Exception):
    """There is nothing to do this fault to."""


@dataclass(frozen=True)
class PlannedFault:
    """at: seconds since the run began. pick: which listener, worker or backend, counted round."""

    at: float
    kind: str
    seconds: float
    pick: int


@dataclass
class Target:
    """Whom a fault concerns, filled in as it begins: see history.Fault."""

    reach: str
    slots: list[int]
    pids: list[int] = field(default_factory=list)
    locked: list[tuple[float, float]] = field(default_factory=list)
    lost: list[tuple[float, float]] = field(default_factory=list)
    ended: float = 0.0  # time.time() of the end, if before the clean-up; 0: after the clean-up


@dataclass
class World:
    """What there is to break. database: the primary. behind: the slots of the listeners behind the
    proxies. command: runs one of the product's; its exit code. clock: that of both servers; None:
    it cannot be set.
    """

    database: EmbeddedDatabase
    standby: EmbeddedDatabase
    api: Pipeline
    listeners: list[Listener]
    database_proxy: Proxy
    stage_proxy: Proxy
    behind: list[int]
    command: Callable[..., int]
    clock: Clock | None = None
    database_up: bool = True
    undone: list[Callable[[], object]] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)  # backends

    def query(self, sql: str, *params: object) -> list[tuple]:
        given = {"connect_timeout": 2, "options": WAIT_FOR_LOCK}
        with closing(psycopg2.connect(self.database.dsn(), **given)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(sql, params)
                return cursor.fetchall() if cursor.description else []

    def change(self, sql: str, target: Target) -> None:
        """Changes a table. Raises psycopg2.Error where somebody holds a lock for too long."""
        with self.locking(target):
            self.query(sql)

    def install(self, target: Target, *options: str) -> None:
        """Raises NotNow where it is refused: somebody holds a lock, or the database is away."""
        with self.locking(target):
            if self.command("install", *options):
                raise NotNow

    @contextmanager
    def locking(self, target: Target) -> Iterator[None]:
        """Note how long a statement holds or waits for the lock of a table, even if it gives up."""
        if not self.database_up:
            raise NotNow
        began = time.time()
        try:
            yield
        finally:
            target.locked.append((began, time.time()))

    def undo(self, do: Callable[[], object]) -> None:
        """Do it again and again until nothing is in the way; where the database is stopped, once it
        is there.
        """
        end = time.monotonic() + START_TIMEOUT
        while self.database_up:
            try:
                do()
            except (psycopg2.Error, NotNow):
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return
        self.undone.append(do)

    def require_standby(self) -> None:
        """Raises NotNow unless it follows, and no frozen backend can keep a checkpoint waiting."""
        if not self.database_up or self.frozen or not self.query(SENDERS):
            raise NotNow

    def wait_for_standby(self) -> None:
        """Make each commit wait until the standby has it. Raises NotNow if the standby is gone."""
        self.reload(WAIT_FOR_STANDBY)
        end = time.monotonic() + STANDBY_TIMEOUT
        while not self.query(SYNCHRONOUS)[0][0]:
            if time.monotonic() > end:
                self.undo(lambda: self.reload(WAIT_NO_MORE))
                raise NotNow
            time.sleep(0.05)
        self.query("CHECKPOINT")

    def reload(self, setting: str) -> None:
        self.query(setting)
        self.query("SELECT pg_reload_conf()")

    def fail_over(self, target: Target) -> None:
        """Promote the standby and lead the proxy to it; connections to the old primary are cut. The
        old primary becomes the standby, and the caller has to start it.
        """
        promote(self.standby)
        self.database, self.standby = self.standby, self.database
        self.database_proxy.host = self.database.host
        self.database_proxy.cut()
        self.database_is_up()
        target.ended = time.time()

    def stop_database(self, mode: str, target: Target) -> None:
        """Raises NotNow where it is stopped already."""
        if not self.database_up:
            raise NotNow
        target.reach, target.slots = "database", self.every_slot()
        for pid in self.frozen:  # it would never end, and the server waits for it
            os.kill(pid, signal.SIGCONT)
        self.frozen.clear()
        self.database_up = False
        self.database.stop(mode)

    def database_is_up(self) -> None:
        self.database_up = True
        while self.undone:
            self.undo(self.undone.pop())

    @property
    def is_silent(self) -> bool:
        """Whether nobody has called a stage for a second."""
        return all(request.time < time.monotonic() - 1 for request in self.api.requests[-1:])

    def is_calling(self, statement: bytes) -> bool:
        """Whether the listener that a statement names has a request under way."""
        slots = {one.slot for one in self.listeners
                 if any(name.encode() in statement for name in one.names)}  # fmt: skip
        return any(request.slot in slots for request in self.api.requests if not request.finished)

    def every_slot(self) -> list[int]:
        return [listener.slot for listener in self.listeners]

    def listener(self, plan: PlannedFault) -> Listener:
        return self.listeners[plan.pick % len(self.listeners)]

    def processes(self, plan: PlannedFault, target: Target) -> list[int]:
        """The pids of one listener, by the plan's choice, and of its workers."""
        listener = self.listener(plan)
        pids = listener.pids()
        if not pids:
            raise NotNow
        target.slots, target.pids = [listener.slot], pids[:1]
        return pids

    def worker(self, plan: PlannedFault, target: Target) -> int:
        """One of its workers, likewise."""
        _, *workers = self.processes(plan, target)
        if not workers:
            raise NotNow
        target.reach = "worker"
        return workers[plan.pick % len(workers)]

    def backend(self, plan: PlannedFault, target: Target) -> int:
        """The server's process for one listener, by the plan's choice."""
        found = self.query(BACKENDS, db.LISTENER_APPLICATION)
        if not found:
            raise NotNow
        pid, name = found[plan.pick % len(found)]
        target.reach, target.slots = "database", self.every_slot()
        target.pids = [pid_of(name)]
        return pid


Context = AbstractContextManager[None]


@contextmanager
def kill_worker(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    os.kill(world.worker(plan, target), signal.SIGKILL)
    yield


@contextmanager
def kill_listener(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """Its workers finish the call in hand, write what came of it, and end."""
    os.kill(world.processes(plan, target)[0], signal.SIGKILL)
    yield


@contextmanager
def kill_all(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """As a container or a host ends that loses its power."""
    for pid in world.processes(plan, target):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    yield


@contextmanager
def terminate(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    listener = world.listener(plan)
    if listener.asked:  # a second signal would be a kill
        raise NotNow
    target.slots = [listener.slot]
    listener.terminate()
    yield


@contextmanager
def freeze_worker(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    with frozen(world.worker(plan, target)):
        yield


@contextmanager
def freeze_listener(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """Its workers go on; nobody takes their results, and nobody ends them but their lease."""
    with frozen(world.processes(plan, target)[0]):
        yield


@contextmanager
def freeze_all(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """As `docker pause` does."""
    with frozen(*world.processes(plan, target)):
        yield


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def freeze_between(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The listener has sent a claim, which is committed while the listener does not run.

    Its backend is frozen until the claim must have been sent.
    """
    backend = world.backend(plan, target)
    listener = target.pids[0]
    os.kill(backend, signal.SIGSTOP)
    try:
        time.sleep(SWEEP_INTERVAL + 0.2)
        os.kill(listener, signal.SIGSTOP)
    finally:
        os.kill(backend, signal.SIGCONT)
    target.reach = "listener"
    yield
    os.kill(listener, signal.SIGCONT)


@contextmanager
def terminate_backend(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    pid = world.backend(plan, target)
    world.query("SELECT pg_terminate_backend(%s)", pid)
    yield


@contextmanager
def terminate_backends(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach, target.slots = "database", world.every_slot()
    world.query(TERMINATE, db.LISTENER_APPLICATION)
    yield


@contextmanager
def kill_backend(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The server ends all connections and recovers, as after the kernel's OOM killer."""
    os.kill(world.backend(plan, target), signal.SIGKILL)
    target.pids = []
    yield
    world.undo(lambda: world.query("SELECT"))


@contextmanager
def freeze_backend(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The kernel still acknowledges its packets: to the listener it is just silent."""
    pid = world.backend(plan, target)
    os.kill(pid, signal.SIGSTOP)
    world.frozen.add(pid)
    yield
    if world.is_silent:  # it holds a lock that everybody needs, such as that of NOTIFY at a commit
        target.pids = []
    if pid in world.frozen:
        world.frozen.discard(pid)
        os.kill(pid, signal.SIGCONT)


def restart_database(mode: str) -> Callable[..., Context]:
    @contextmanager
    def restart(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
        world.stop_database(mode, target)
        yield
        world.database.start()
        world.database_is_up()

    return restart


@contextmanager
def switch_over(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The primary is stopped, which gives its standby all it has; that is the primary then, and the
    other one follows it. The proxy leads to the new one, and ends the connections to the old."""
    if not world.database_up or not world.query(SENDERS):
        raise NotNow
    world.stop_database("fast", target)
    yield
    world.fail_over(target)
    follow(world.standby, world.database)


@contextmanager
def crash(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """Kill all processes of the primary while each commit waits for the standby, and promote the
    standby. The old primary is rebuilt from a copy of the new one.
    """
    world.require_standby()
    world.wait_for_standby()
    with crashed(world, target):
        yield


@contextmanager
def lose_commits(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The same, but what was committed in the last moments did not reach the standby."""
    world.require_standby()
    began = time.time()
    for (pid,) in world.query(SENDERS):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LOST)
    with crashed(world, target):
        target.lost.append((began, time.time()))
        yield


@contextmanager
def crashed(world: World, target: Target) -> Iterator[None]:
    target.reach, target.slots = "database", world.every_slot()
    world.database_up = False
    world.database.kill()
    yield
    world.fail_over(target)
    rebuild(world.standby, world.database)


def network(which: str, what: str) -> Callable[..., Context]:
    @contextmanager
    def disturb(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
        proxy: Proxy = getattr(world, f"{which}_proxy")
        if not proxy.is_whole:
            raise NotNow
        target.reach, target.slots = which, world.behind
        getattr(proxy, what)()
        yield
        proxy.heal()

    return disturb


@contextmanager
def hold_giving_back(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The answer to a claim is lost. What gives the claim back comes late, while its listener makes
    a call that it has claimed over another connection.
    """
    proxy = world.database_proxy
    if not proxy.is_whole:
        raise NotNow
    target.reach, target.slots = "database", world.behind
    proxy.set_trap(CLAIMED, GIVING_BACK)
    yield
    end = time.monotonic() + CALLING
    while not world.is_calling(proxy.caught) and time.monotonic() < end:
        time.sleep(0.01)
    proxy.heal()


@contextmanager
def restart_api(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    if world.api.closing.is_set():
        raise NotNow
    target.reach, target.slots = "stage", world.every_slot()
    world.api.close(grace=0)
    yield
    world.api.start()


@contextmanager
def garbage(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach = "nothing"
    for payload in GARBAGE:
        world.query("SELECT pg_notify(%s, %s)", db.CHANNEL, payload)
    yield


# What follows are changes by an application or operator, not faults. The checker accepts a repeated
# call because of one only while it locks a table.


@contextmanager
def change_columns(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach = "nothing"
    change, back = COLUMNS[plan.pick % len(COLUMNS)]
    world.change(change, target)
    yield
    world.undo(lambda: world.change(back, target))


@contextmanager
def rewrite_tables(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach = "nothing"
    world.change(REWRITES[plan.pick % len(REWRITES)], target)
    yield


@contextmanager
def install(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    target.reach = "nothing"
    world.install(target)
    yield


@contextmanager
def install_silent(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """The triggers are made anew, and calls are found by polling; then again as before."""
    target.reach = "nothing"
    world.install(target, "--no-notify")
    yield
    world.undo(lambda: world.install(target, "--notify"))


@contextmanager
def step_clock(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """Forwards or backwards, and back again."""
    target.reach = "clock"
    listener = world.listener(plan)
    step(listener, CLOCK_STEPS[plan.pick % len(CLOCK_STEPS)])
    yield
    step(listener, 0.0)


def step(listener: Listener, seconds: float) -> None:
    with open(listener.environ["CHAOS_CLOCK"], "r+b") as clock:
        clock.write(CLOCK.pack(seconds))


@contextmanager
def set_back(world: World, plan: PlannedFault, target: Target) -> Iterator[None]:
    """For good: a clock that is set forward past the end of a lease may repeat a call."""
    if world.clock is None:
        raise NotNow
    target.reach, target.slots = "database", world.every_slot()
    servers = [world.database, world.standby] if world.database_up else [world.standby]
    with frozen(*(server.pid for server in servers)):  # so that they start no others
        children = {pid for server in servers for pid in server.children()}
        with frozen(*(children - world.frozen)):
            world.clock.set_back(STEP)
    yield
