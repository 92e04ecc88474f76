"""Fixtures: a real PostgreSQL, a real stage API, real listener processes.

Every test gets a database of its own. Tests wait for events: a log line, a request, a row.
"""

import gc
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import commands
import launcher
import psycopg2
import psycopg2.extras
import pytest
from waiting import PATIENCE

import config
import db
from demo import five_stages
from demo.database import EmbeddedDatabase, available_majors
from demo.stage_api import StageApi
from ops.install import apply

# Let the programs that tests start use compiled modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The pipeline of the tests, whatever stages.py and .env contain.
PIPELINE = {"PIPELINE_MODULE": "demo.five_stages"}
os.environ |= PIPELINE

FIVE_STAGES = five_stages.PIPELINE
pytest_plugins = ["claims", "busy", "variants", "caller"]

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "listener.py"
MAJORS = available_majors()

_number = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Started in the background of a shell, or by nohup, pytest's children would ignore these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if config.getoption("numprocesses", None):
        rewrite_asserts()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is collected stays until the end: the garbage collector need not look at it."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


def rewrite_asserts() -> None:
    """Let pytest cache the test modules with their asserts rewritten, each of them once.

    The workers of pytest-xdist import all test modules at the same time, so without the cache each
    of them rewrites all of them, which takes some five seconds of CPU each time.
    """
    modules = [module for module in ROOT.glob("tests/**/test_*.py") if not is_cached(module)]
    modules.sort(key=lambda module: module.stat().st_size)
    collect = [sys.executable, "-m", "pytest", "-n0", "--collect-only", "-p", "no:cacheprovider"]
    count = min(os.cpu_count(), len(modules))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the run tells
    started = [
        subprocess.Popen([*collect, *modules[number::count]], cwd=ROOT, **silent)
        for number in range(count)
    ]
    for process in started:
        process.wait()


def is_cached(module: Path) -> bool:
    changed = module.stat().st_mtime
    cached = module.parent.glob(f"__pycache__/{module.stem}.*-pytest-*.pyc")
    return any(file.stat().st_mtime >= changed for file in cached)


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a test waits longer than it works, so two cores have time for five."""
    return max(5, os.cpu_count())


class Server:
    """A PostgreSQL to make databases on: the embedded one, or that of DB_HOST."""

    def __init__(self, environ: dict[str, str], embedded: EmbeddedDatabase | None = None):
        self.environ = environ | PIPELINE
        self.embedded = embedded
        self.templates: dict[str, str] = {}  # names of template databases by their key
        self.admin: psycopg2.extensions.connection | None = None

    def connect(self, name: str = "postgres"):
        conn = psycopg2.connect(
            host=self.environ["DB_HOST"],
            port=self.environ["DB_PORT"],
            user=self.environ["DB_USER"],
            password=self.environ["DB_PASSWORD"],
            dbname=name,
        )
        conn.autocommit = True
        return conn

    @cached_property
    def version(self) -> int:
        with closing(self.connect()) as conn:
            return conn.server_version // 10000

    def administer(self, sql: str) -> None:
        """Run `sql` on a connection that is kept; on a new one after a restart of the server."""
        if self.admin is None or self.admin.closed:
            self.admin = self.connect()
        try:
            self.admin.cursor().execute(sql)
        except psycopg2.OperationalError:
            if not self.admin.closed:
                raise
            self.administer(sql)

    def create(self, template: str = "template1", name: str | None = None) -> str:
        name = name or f"jsl_test_{os.getpid()}_{next(_number)}"
        # Copying files, as PostgreSQL 14 does, is cheaper than writing every page to the WAL.
        how = "STRATEGY FILE_COPY" if self.version >= 15 else ""
        self.administer(f"CREATE DATABASE {name} TEMPLATE {template} {how}")
        return name

    def drop(self, name: str) -> None:
        self.administer(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def template(
        self, key: str, prepare: "Callable[[Database], None]", base: str = "template1"
    ) -> str:
        """The name of a template: a copy of `base` after `prepare`. Made once for each `key`."""
        if key not in self.templates:
            database = Database(self, template=base)
            with closing(database.conn):
                prepare(database)
            self.templates[key] = database.name
        return self.templates[key]

    def installed(self) -> str:
        """The template with the schema and five stages, whichever test needs it first."""

        def prepare(database: "Database") -> None:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(five_stages, "PIPELINE", FIVE_STAGES)
                install(database)

        return self.template("installed", prepare)

    def create_installed(self) -> str:
        return self.create(self.installed())

    def close(self) -> None:
        for name in self.templates.values():
            self.drop(name)


class Database:
    """One test's database: SQL in, rows out.

    name: one that is there; None: it is copied from `template` when it is first used.
    """

    def __init__(self, server: Server, name: str | None = None, template: str = "template1"):
        self.server, self.template = server, template
        if name is not None:
            self.name = name

    @cached_property
    def name(self) -> str:
        return self.server.create(self.template)

    @cached_property
    def environ(self) -> dict[str, str]:
        return self.server.environ | {"DB_NAME": self.name}

    @cached_property
    def dsn(self) -> str:
        return psycopg2.extensions.make_dsn(
            host=self.environ["DB_HOST"],
            port=self.environ["DB_PORT"],
            user=self.environ["DB_USER"],
            password=self.environ["DB_PASSWORD"],
            dbname=self.name,
        )

    @cached_property
    def conn(self):
        return self.server.connect(self.name)

    def connect(self):
        """A further autocommit connection, as the application has it."""
        return self.server.connect(self.name)

    def settings(self, **changed: object) -> SimpleNamespace:
        return config.read(self.environ | {name: str(value) for name, value in changed.items()})

    def rows(self, sql: str, *params: object) -> list:
        with self.conn.cursor(cursor_factory=psycopg2.extras.NamedTupleCursor) as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def row(self, sql: str, *params: object):
        found = self.rows(sql, *params)
        assert len(found) <= 1, f"{len(found)} rows from {sql}"
        return found[0] if found else None

    def value(self, sql: str, *params: object):
        return self.row(sql, *params)[0]

    def add_job(self, step: str = "img_gen", status: str = "done", tenant: str = "tenant") -> str:
        job_id = str(uuid.uuid4())
        values = (
            "INSERT INTO jobs (job_id, tenant_id, current_step, status) VALUES (%s, %s, %s, %s)"
        )
        self.rows(values, job_id, tenant, step, status)
        return job_id

    def move(self, job_id: str, step: str, status: str) -> None:
        self.rows(
            "UPDATE jobs SET current_step = %s, status = %s WHERE job_id = %s", step, status, job_id
        )

    def state(self, job_id: str) -> tuple[str, str]:
        return tuple(self.row("SELECT current_step, status FROM jobs WHERE job_id = %s", job_id))

    def owed(self, job_id: str):
        """The open call of a job, or None."""
        return self.row(
            "SELECT *, due_at = 'infinity' AS given_up FROM stage_calls WHERE job_id = %s", job_id
        )

    def attempts(self, job_id: str) -> list:
        return self.rows(
            "SELECT * FROM stage_attempts WHERE job_id = %s"
            " ORDER BY started_at, attempt, finished_at",
            job_id,
        )

    def wait_for(self, sql: str, *params: object, timeout: float = PATIENCE):
        """Run the query until the first column of its first row is true; that row."""
        end = time.monotonic() + timeout
        while True:
            found = self.rows(sql, *params)
            if found and found[0][0]:
                return found[0]
            assert time.monotonic() < end, f"did not become true within {timeout} s: {sql}"
            threading.Event().wait(0.02)

    def become(self, template: str) -> None:
        """Make this database a copy of `template`, or replace it by one."""
        self.template = template
        if "name" in vars(self):
            self.close()
            self.server.create(template, self.name)
            self.conn = self.server.connect(self.name)

    def close(self) -> None:
        if "name" in vars(self):
            self.conn.close()
            self.server.drop(self.name)


def install(database: Database) -> None:
    """Install the schema and the PIPELINE in use."""
    with closing(db.connect(database.settings())) as conn:
        apply(conn)


class Listener:
    """`python listener.py …` as a process of its own, its output read line by line.

    within: a command that runs it, such as ("ip", "netns", "exec", "a").
    program: the script to run instead of listener.py.
    """

    def __init__(
        self,
        environ: dict[str, str],
        directory: Path,
        *args: str,
        within: Sequence[str] = (),
        program: Path = PROGRAM,
    ):
        self.lines: list[str] = []
        self.workers: dict[int, str | None] = {}  # pid: when it started
        self._arrived: queue.Queue[str | None] = queue.Queue()
        environ = {k: v for k, v in os.environ.items() if k not in config.SETTINGS} | environ
        argv = [str(program), *args]
        if within or not launcher.can_launch(environ):
            self.process = subprocess.Popen(
                [*within, sys.executable, *argv],
                env=environ,
                cwd=directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
            )
        else:
            self.process = launcher.start(argv, environ, directory)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._arrived.put(line)
        self._arrived.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, text: str, count: int = 1, timeout: float = PATIENCE) -> str:
        """Block until `count` lines contain `text`; the last of them."""
        end = time.monotonic() + timeout
        while True:
            found = [line for line in list(self.lines) if text in line]
            if len(found) >= count:
                return found[count - 1]
            try:
                ended = self._arrived.get(timeout=max(0.01, end - time.monotonic())) is None
            except queue.Empty:
                raise AssertionError(f"no {text!r} within {timeout} s in:\n{self.output}") from None
            assert not ended, f"ended without {text!r}:\n{self.output}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, once it has ended and all its output is read."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def children(self) -> list[int]:
        """The pids of its worker processes; none where it has ended."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in children.split()]

    def remember_workers(self) -> None:
        """Remember the workers by pid and start time, so that kill() finds them once the listener
        is gone, and no other process that got one of the pids.
        """
        if self.process.poll() is None:
            self.workers |= {pid: started(pid) for pid in self.children()}

    def kill(self) -> None:
        """Kill it with its workers and whatever they started."""
        self.remember_workers()
        if self.process.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)
        for pid, since in self.workers.items():
            if since is not None and started(pid) == since:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        self.wait()
        self.process.stdout.close()

    def kill_alone(self) -> None:
        """Kill the listener, and leave its workers to themselves."""
        self.remember_workers()
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def started(pid: int) -> str | None:
    """The start time of a process, in the kernel's ticks; None where there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return None


MEMORY, ENOUGH = "/dev/shm", 8 << 30


@cache
def in_memory() -> str | None:
    """A directory in memory with room for all servers; None where there is none.

    Every test makes and removes a database of a thousand files. That is slow on ext4, which
    searches all inodes that were freed in the last seconds for an unused one.
    """
    with suppress(OSError):
        found = os.statvfs(MEMORY)
        if found.f_bavail * found.f_frsize >= ENOUGH and not found.f_flag & os.ST_NOEXEC:
            return MEMORY
    return None


def embedded_server(major: int = MAJORS[0], **options: object) -> EmbeddedDatabase:
    """An embedded server without fsync."""
    small = {"fsync": "off", "min_wal_size": "32MB", "max_wal_size": "128MB"}
    return EmbeddedDatabase(major, small | options, in_memory())


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """DB_HOST's server where one is given, else an embedded PostgreSQL 18."""
    if os.environ.get("DB_HOST"):
        names = ("DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD")
        defaults = {"DB_PORT": "5432", "DB_USER": "postgres", "DB_PASSWORD": ""}
        given = {name: os.environ.get(name, defaults.get(name, "")) for name in names}
        with closing(Server(given)) as server:
            yield server
    else:
        with embedded_server(max_connections=200) as embedded:
            yield Server(embedded.settings(), embedded)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run on the newest PostgreSQL and on the oldest are slow on the oldest."""
    newest, oldest = MAJORS[0], MAJORS[-1]
    for item in items:
        params = getattr(item, "callspec", None)
        if newest != oldest and params and params.params.get("each_server") == oldest:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", params=sorted({MAJORS[0], MAJORS[-1]}, reverse=True))
def each_server(request: pytest.FixtureRequest, server: Server) -> Iterator[Server]:
    """The newest and the oldest PostgreSQL that this machine has."""
    if server.embedded is not None and server.embedded.major == request.param:
        yield server
        return
    with embedded_server(request.param) as embedded:
        yield Server(embedded.settings(), embedded)


@pytest.fixture(scope="session")
def fragile_server() -> Iterator[Server]:
    with embedded_server() as embedded:
        yield Server(embedded.settings(), embedded)


@pytest.fixture
def own_server(fragile_server: Server) -> Iterator[Server]:
    """A server that this test may stop, freeze and kill; the next one finds it running."""
    yield fragile_server
    fragile_server.embedded.restart("immediate")


@pytest.fixture
def make_database() -> Iterator[Callable[..., Database]]:
    """make_database(server, installed=True, template=None): a Database, dropped afterwards. With
    at_once=False it is made when it is first used.
    """
    made: list[Database] = []

    def make(
        server: Server, installed: bool = True, template: str | None = None, at_once: bool = True
    ) -> Database:
        template = template or (server.installed() if installed else "template1")
        made.append(Database(server, template=template))
        if at_once:  # the test may stop the server next
            made[-1].rows("SELECT")
        return made[-1]

    yield make
    for database in made:
        database.close()


@pytest.fixture
def database(server: Server, make_database) -> Database:
    """A database with the schema installed."""
    return make_database(server, at_once=False)


@pytest.fixture
def each_database(each_server: Server, make_database) -> Database:
    """The same, on the newest and the oldest PostgreSQL."""
    return make_database(each_server, at_once=False)


@pytest.fixture
def empty_database(server: Server, make_database) -> Database:
    """A database with nothing in it."""
    return make_database(server, installed=False, at_once=False)


class SharedDatabase(Database):
    """An installed database for the many tests that change nothing but rows."""

    def __init__(self, server: Server):
        super().__init__(server, template=server.installed())

    def emptied(self) -> Database:
        self.rows("ROLLBACK; RESET ROLE; RESET ALL; DELETE FROM jobs; DELETE FROM stage_calls")
        self.rows(
            "DELETE FROM stage_attempts; DELETE FROM stage_leases; DELETE FROM stage_limits;"
            " DELETE FROM stage_moves;"
            " DELETE FROM stage_totals; UPDATE stage_totals_mark SET counted_until = DEFAULT"
        )
        self.rows("UPDATE pipeline_stages SET held_until = NULL, hold_seconds = NULL,"
                  " held_reason = NULL, held_by = NULL, stalled_since = NULL,"
                  " waiting_since = NULL, refusing_since = NULL")  # fmt: skip
        return self


@pytest.fixture(scope="session")
def shared_database(server: Server) -> Iterator[SharedDatabase]:
    with closing(SharedDatabase(server)) as database:
        yield database


@pytest.fixture(scope="session")
def each_shared_database(each_server: Server) -> Iterator[SharedDatabase]:
    with closing(SharedDatabase(each_server)) as database:
        yield database


@pytest.fixture
def make_role(make_database) -> Iterator[Callable[..., str]]:
    """make_role(database): a new role that may log in, with its name as password, and no more."""
    made: list[tuple[Database, str]] = []

    def make(database: Database, name: str = "jsl_role") -> str:
        name = f"{name}_{os.getpid()}_{next(_number)}"
        database.rows(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{name}'")
        made.append((database, name))
        return name

    yield make
    for database, name in made:
        with closing(database.connect()) as conn:
            conn.cursor().execute(f'DROP OWNED BY "{name}" CASCADE; DROP ROLE "{name}"')


@pytest.fixture
def login_with(make_role) -> Callable[[Database, str], dict[str, str]]:
    """login_with(database, password): the settings of a new superuser, who has this password."""

    def make(database: Database, password: str) -> dict[str, str]:
        name = make_role(database)
        database.rows(f"ALTER ROLE {name} SUPERUSER PASSWORD '{password}'")
        return {"DB_USER": name, "DB_PASSWORD": password}

    return make


@pytest.fixture
def api(database: Database) -> Iterator[StageApi]:
    """The stand-in stage API on `database`, answering at once."""
    with StageApi(database.dsn) as served:
        yield served


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    """listener(database, *args, api=…, **settings): a running `python listener.py`.

    `within` and `program` are those of Listener.
    """
    started: list[Listener] = []
    # An empty .env in the working directory is read instead of the developer's own.
    (tmp_path / ".env").touch()
    heartbeats = tmp_path / "heartbeats"

    def start(database, *args: str, api=None, within=(), program=PROGRAM, **settings: object):
        fast = {"JOB_STATE_LISTENER_RECONNECT_DELAY": "0.2", "RETRY_DELAY": "0.05"}
        environ = database.environ | fast | {"HEARTBEAT_DIR": str(heartbeats)}
        if api is not None:
            environ["STAGE_API_URL"] = api.url
        environ |= {name: str(value) for name, value in settings.items()}
        started.append(Listener(environ, tmp_path, *args, within=within, program=program))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., commands.Done]:
    """run_command(database, *args, api=…, stdin=…, python=…, **settings): see commands.run."""
    (tmp_path / ".env").touch()

    def run(database, *args: str, api=None, stdin="", python=(), **settings: object):
        environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path / "heartbeats")}
        environ |= {"STAGE_API_URL": api.url} if api else {}
        environ |= {name: str(value) for name, value in settings.items()}
        return commands.run(environ, tmp_path, *args, stdin=stdin, python=python)

    return run


@pytest.fixture
def run_here(run_command, tmp_path: Path, monkeypatch) -> Callable[..., commands.Done]:
    """run_command, but within this process, which takes half the CPU: see commands.run_here.

    What starts workers, reads standard input or is given variables that are no settings of ours
    is still run as a process of its own.
    """
    monkeypatch.chdir(tmp_path)

    def run(database, *args: str, api=None, **given: object):
        if args[0] in ("run", "call", "test-job") or not given.keys() <= config.SETTINGS.keys():
            return run_command(database, *args, api=api, **given)
        environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path / "heartbeats")}
        environ |= {"STAGE_API_URL": api.url} if api else {}
        return commands.run_here(environ | {n: str(v) for n, v in given.items()}, *args)

    return run
