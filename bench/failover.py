"""What a failover of the database costs: python -m bench.failover

A cluster of Patroni and etcd, an application that adds jobs, a listener that calls a stage for
each, and one fault. Needs `patroni` with its etcd3 extra (pip, in a venv of its own), `etcd`
(Debian: etcd-server) and, for those routes, `haproxy` and `pgbouncer`.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click
import psycopg2

import config
import db
from bench.ha_cluster import MODES, Cluster
from bench.processes import Processes
from demo.database import free_port
from demo.stage_api import StageApi
from demo.stage_server import Answer, Request

ROOT = Path(__file__).parent.parent
RATE = 20.0  # jobs a second
WORK = 0.05  # seconds that the stage works
APPLICATION_DEADLINE = 5.0  # seconds for a commit
STAGE_TIMEOUT, LEASE_MARGIN = 5, 30
BEFORE, AFTER, LONGEST = 5.0, 10.0, 75.0  # seconds: of calm, once calls go on, at the most
LISTENERS = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'job-state-listener%'"
)
INSERT = """
INSERT INTO jobs (job_id, tenant_id, current_step, status)
VALUES (%(job)s, 'bench', 'img_gen', 'done')
"""

HAPROXY = """
global
    maxconn 500
defaults
    mode tcp
    timeout connect 2s
    timeout check 2s
    timeout client 30m
    timeout server 30m
listen primary
    bind 127.0.0.1:{port}
    option httpchk GET /primary
    http-check expect status 200
    default-server inter 1s fall 2 rise 1 on-marked-down shutdown-sessions
    server m1 127.0.0.1:{m1.port} check port {m1.rest}
    server m2 127.0.0.1:{m2.port} check port {m2.rest}
"""
PGBOUNCER = """
[databases]
* = host=127.0.0.1 port={target} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 20
server_login_retry = 1
server_connect_timeout = 5
query_wait_timeout = 30
"""


# --- the ways to the primary ---------------------------------------------------------------


@contextmanager
def hosts(cluster: Cluster) -> Iterator[str]:
    """All hosts in DATABASE_URL."""
    yield ",".join(f"127.0.0.1:{member.port}" for member in cluster.members)


@contextmanager
def haproxy(cluster: Cluster) -> Iterator[str]:
    port, (m1, m2) = free_port(), cluster.members
    file = cluster.directory / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, m1=m1, m2=m2))
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    with running([program, "-f", file, "-q"]):
        yield f"127.0.0.1:{port}"


def pgbouncer(mode: str) -> Callable:
    @contextmanager
    def route(cluster: Cluster) -> Iterator[str]:
        with haproxy(cluster) as target:
            port, file = free_port(), cluster.directory / "pgbouncer.ini"
            file.write_text(PGBOUNCER.format(port=port, mode=mode, target=target.split(":")[1]))
            program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
            with running([program, "-q", file], **cluster.process):
                yield f"127.0.0.1:{port}"

    return route


@contextmanager
def running(command: list, **options) -> Iterator[None]:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **({"start_new_session": True} | silent | options))
    try:
        yield
    finally:
        process.kill()
        process.wait()


ROUTES = {
    "hosts": hosts,
    "haproxy": haproxy,
    "pgbouncer session": pgbouncer("session"),
    "pgbouncer transaction": pgbouncer("transaction"),
}


# --- the faults ----------------------------------------------------------------------------


@contextmanager
def switchover(cluster: Cluster) -> Iterator[None]:
    thread = threading.Thread(target=cluster.switch_over, daemon=True)
    thread.start()
    yield


@contextmanager
def kill(cluster: Cluster) -> Iterator[None]:
    cluster.members[0].kill()
    yield


@contextmanager
def freeze(cluster: Cluster) -> Iterator[None]:
    """Freeze Patroni and PostgreSQL of the leader; once thawed, it still believes it is primary."""
    with frozen(cluster.members[0]):
        yield


@contextmanager
def partition(cluster: Cluster) -> Iterator[None]:
    """Cut the leader off from etcd and its standby; clients still reach it."""
    cluster.members[0].cut()
    yield
    cluster.members[0].heal()


@contextmanager
def standby(cluster: Cluster) -> Iterator[None]:
    with frozen(cluster.members[1]):
        yield


@contextmanager
def frozen(member) -> Iterator[None]:
    pids = member.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


FAULTS = {"switchover": switchover, "kill": kill, "freeze": freeze, "partition": partition,
          "standby away": standby}  # fmt: skip
FAILS_OVER = ("switchover", "kill", "freeze", "partition")


# --- a run ---------------------------------------------------------------------------------


class Application(threading.Thread):
    """Adds jobs over one connection, and reconnects as it must."""

    def __init__(self, settings):
        super().__init__(daemon=True)
        self.settings = settings
        self.acknowledged: dict[str, float] = {}  # by job: time.monotonic()
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        conn = None
        while not self.over.wait(1 / RATE):
            job = str(uuid.uuid4())
            try:
                if conn is None:
                    conn = db.connect(self.settings, "application")
                    conn.deadline = APPLICATION_DEADLINE
                db.execute(conn, INSERT, {"job": job})
                self.acknowledged[job] = time.monotonic()
            except psycopg2.Error:
                if conn is not None:
                    conn.close()
                conn = None

    def stop(self) -> None:
        self.over.set()
        self.join(30)


class Sessions(threading.Thread):
    """The most sessions that the listener had on any server."""

    def __init__(self, cluster: Cluster):
        super().__init__(daemon=True)
        self.cluster, self.most, self.over = cluster, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(1.0):
            for member in self.cluster.members:
                with suppress(psycopg2.Error, OSError):
                    self.most = max(self.most, member.query(LISTENERS)[0][0])


def longest_gap(times: list[float], since: float) -> tuple[float, float]:
    """The longest time between two of `times` that ends after `since`, and where it ends."""
    gaps = [(after - before, after) for before, after in itertools.pairwise(sorted(times))
            if after >= since]  # fmt: skip
    return max(gaps, default=(float("inf"), float("inf")))


def measure(
    patroni: str, mode: str, route: str, fault: str, listeners: int, delay: float, keep: Path | None
) -> dict:
    """Measure one failover: start a cluster, cause one fault, and see what became of the jobs."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(mode, patroni))
        where = stack.enter_context(ROUTES[route](cluster))
        url = f"postgresql://postgres@{where}/postgres"
        api = stack.enter_context(StageApi(""))
        api.on("vlm_analyze", answer)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environ = {
            "DATABASE_URL": url, "STAGE_API_URL": api.url, "HEARTBEAT_DIR": str(directory),
            "PIPELINE_MODULE": "demo.five_stages", "STAGE_TIMEOUT": str(STAGE_TIMEOUT),
            "LEASE_MARGIN": str(LEASE_MARGIN), "JOB_STATE_LISTENER_RECONNECT_DELAY": str(delay),
            "PYTHONIOENCODING": "utf-8",
        }  # fmt: skip
        (directory / ".env").touch()
        settings = config.read(environ)
        program = str(ROOT / "listener.py")
        subprocess.run([sys.executable, program, "install"], env=os.environ | environ, check=True,
                       cwd=directory, stdout=subprocess.DEVNULL)  # fmt: skip
        commands = [[sys.executable, program, "run"]] * listeners
        running_listeners = stack.enter_context(Processes(commands, environ, directory))
        application, sessions = Application(settings), Sessions(cluster)
        stack.callback(application.stop)
        api.wait_for(lambda api: len(api.requests) > BEFORE * RATE, 60)
        began = time.monotonic()
        with FAULTS[fault](cluster):
            wait_until_calls_go_on(api, began, fault)
        if fault == "kill":
            cluster.members[0].start()
        time.sleep(AFTER)
        application.stop()
        found = account(cluster, api, application, began, fault)
        sessions.over.set()
        running_listeners.check()
        if keep:
            name = f"{mode}-{route}-{fault}".replace(" ", "-")
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}.log").write_text(running_listeners.log_text())
            for member in cluster.members:
                shutil.copy(member.directory / "log", keep / f"{name}-{member.name}.log")
        return found | {"sessions": sessions.most}


def answer(_request: Request) -> Answer:
    time.sleep(WORK)
    return Answer(200)


def wait_until_calls_go_on(api: StageApi, began: float, fault: str) -> None:
    """Block until calls have gone on for a while; where a standby is away, for LONGEST seconds."""
    end, goes_on = began + LONGEST, False
    while time.monotonic() < end and not goes_on:
        time.sleep(1.0)
        now = time.monotonic()
        times = [now - AFTER, *(r.time for r in list(api.requests) if r.time > now - AFTER), now]
        goes_on = fault in FAILS_OVER and now > began + 2 * AFTER and longest_gap(times, 0)[0] < 1.0


def account(cluster, api, application, began: float, fault: str) -> dict:
    """Wait until nothing is owed; then count what became of the jobs."""
    end = time.monotonic() + STAGE_TIMEOUT + LEASE_MARGIN + 30
    leader = None
    while time.monotonic() < end:
        leader = cluster.leader()
        with suppress(psycopg2.Error):
            if leader and not leader.query("SELECT count(*) FROM stage_calls")[0][0]:
                break
        time.sleep(0.5)
    if leader is None:
        raise RuntimeError("in the end no member is the leader")
    rows = {job for (job,) in leader.query("SELECT job_id::text FROM jobs")}
    calls = Counter(request.job_id for request in list(api.requests))
    acknowledged = application.acknowledged
    pause, _ = longest_gap([request.time for request in list(api.requests)], began)
    database_pause, _ = longest_gap(list(acknowledged.values()), began)
    return {
        "pause": pause,
        "commits": database_pause,
        "jobs": len(acknowledged),
        "gone": len(acknowledged.keys() - rows),
        "lost": len(rows - calls.keys()),
        "repeated": sum(count > 1 for count in calls.values()),
    }


HEAD = """
| route | replication | fault | commits paused | calls paused | jobs | jobs gone | lost | repeated | sessions |
|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def row(route: str, mode: str, fault: str, found: dict) -> str:
    return (
        f"| {route} | {mode} | {fault} | {found['commits']:.1f} s | {found['pause']:.1f} s"
        f" | {found['jobs']} | {found['gone']} | {found['lost']} | {found['repeated']}"
        f" | {found['sessions']} |"
    )


@click.command()
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)))
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(MODES)))
@click.option("--route", "routes", multiple=True, type=click.Choice(list(ROUTES)))
@click.option("--listeners", default=1, show_default=True, type=click.IntRange(1))
@click.option("--reconnect-delay", default=1.0, show_default=True, help="Seconds.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1))
@click.option("--patroni", default="patroni", help="Its program, where it is not in PATH.")
@click.option("--keep", type=click.Path(path_type=Path), help="A directory for the logs.")
def main(faults, modes, routes, listeners, reconnect_delay, repeat, patroni, keep) -> None:
    """Fail over, and tell what it cost; about a minute each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no process behind
    for program in (patroni, "etcd"):
        if not shutil.which(program):
            raise click.UsageError(f"{program} is not installed: see docs/HA.md")
    patroni = shutil.which(patroni)  # it is started with a PATH of its own
    click.echo(HEAD)
    wrong = False
    for mode, route, fault in itertools.product(
        modes or ["asynchronous", "synchronous", "remote_apply"], routes or ["hosts"],
        faults or FAILS_OVER,
    ):  # fmt: skip
        for _ in range(repeat):
            try:
                found = measure(patroni, mode, route, fault, listeners, reconnect_delay, keep)
            except Exception as error:
                click.echo(f"{route}, {mode}, {fault}: {type(error).__name__}: {error}", err=True)
                wrong = True
                continue
            click.echo(row(route, mode, fault, found))
            wrong |= bool(found["lost"])
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
