"""A PostgreSQL cluster managed by Patroni and etcd, all on 127.0.0.1, whose links can be cut."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psycopg2

from chaos.proxy import Proxy
from demo.database import ENVIRONMENT, _binaries, free_port

START_LIMIT = 90.0  # seconds
# Shorter than Patroni's defaults (30, 10, 10), which make a failover ten seconds slower.
TTL, LOOP_WAIT, RETRY_TIMEOUT = 20, 5, 5
MODES = {
    "asynchronous": {},
    "synchronous": {"synchronous_mode": True},
    "remote_apply": {"synchronous_mode": True},
    "strict": {"synchronous_mode": True, "synchronous_mode_strict": True},
}
SYNCHRONOUS_COMMIT = {"remote_apply": "remote_apply"}


class Member:
    """One Patroni with its PostgreSQL. Its links to the other member and to etcd can be cut."""

    def __init__(self, cluster: "Cluster", number: int):
        self.cluster, self.name = cluster, f"m{number}"
        self.directory = cluster.directory / self.name
        self.port, self.rest = free_port(), free_port()
        stack = cluster.stack
        self.links = [stack.enter_context(Proxy(port))
                      for port in (self.port, self.rest, cluster.etcd_port)]  # fmt: skip
        self.process: Any = None  # subprocess.Popen

    def start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        shutil.chown(self.directory, *self.cluster.owner)
        file = self.directory / "patroni.json"  # JSON is YAML
        file.write_text(json.dumps(self.config()))
        log = (self.directory / "log").open("a")
        self.process = subprocess.Popen(
            [self.cluster.patroni, str(file)], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            **self.cluster.process,
        )  # fmt: skip

    def config(self) -> dict:
        ours, rest, etcd = self.links
        return {
            "scope": "bench", "name": self.name,
            "restapi": {"listen": f"127.0.0.1:{self.rest}",
                        "connect_address": f"127.0.0.1:{rest.port}"},
            "etcd3": {"hosts": [f"127.0.0.1:{etcd.port}"], "use_proxies": True},
            "bootstrap": {"dcs": self.cluster.dcs(),
                          "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "no-sync"]},
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{ours.port}",
                "bin_dir": str(self.cluster.binaries),
                "data_dir": str(self.directory / "data"),
                "pgpass": str(self.directory / "pgpass"),
                "pg_hba": ["local all all trust", "host all all 127.0.0.1/32 trust",
                           "host replication all 127.0.0.1/32 trust"],
                "authentication": {"superuser": {"username": "postgres"},
                                   "replication": {"username": "replicator"},
                                   "rewind": {"username": "postgres"}},
                "parameters": {"unix_socket_directories": str(self.directory)},
            },
        }  # fmt: skip

    def pids(self) -> list[int]:
        """Patroni first, then the server and its processes."""
        found = [self.process.pid]
        with suppress(OSError, ValueError, IndexError):
            found.append(int((self.directory / "data/postmaster.pid").read_text().split()[0]))
        for pid in list(found):
            with suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                found += [int(child) for child in children]
        return list(dict.fromkeys(found))

    def signal(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def cut(self) -> None:
        """Cut its links to the other member and to etcd; clients still reach it."""
        for link in self.links:
            link.drop()

    def heal(self) -> None:
        for link in self.links:
            link.heal()
            link.cut()

    def role(self) -> str:
        """Its role by its Patroni; "" where that does not answer."""
        with suppress(OSError, ValueError):
            url = f"http://127.0.0.1:{self.rest}/patroni"
            try:
                text = urllib.request.urlopen(url, timeout=2).read()
            except urllib.error.HTTPError as error:
                text = error.read()
            said = json.loads(text)
            return said["role"] if said["state"] in ("running", "streaming") else ""
        return ""

    def query(self, sql: str, *params: object, database: str = "postgres") -> list[tuple]:
        dsn = f"host=127.0.0.1 port={self.port} user=postgres dbname={database}"
        options = "-c synchronous_commit=local -c statement_timeout=3s"
        with closing(psycopg2.connect(dsn, connect_timeout=2, options=options)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(sql, params or None)
                return cursor.fetchall() if cursor.description else []


class Cluster:
    """Two members and an etcd; a context manager.

    mode: a key of MODES.
    patroni: its program.
    """

    def __init__(self, mode: str, patroni: str):
        self.mode, self.patroni = mode, patroni
        self.stack = ExitStack()

    def __enter__(self) -> "Cluster":
        with self.stack:
            account = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
            self.owner = account.pw_uid, account.pw_gid
            self.process: dict[str, Any] = {"env": ENVIRONMENT, "cwd": "/"}
            self.process["start_new_session"] = True
            if os.geteuid() == 0:  # PostgreSQL refuses to run as root
                self.process |= {"user": self.owner[0], "group": self.owner[1], "extra_groups": []}
            self.directory = Path(tempfile.mkdtemp(prefix="jsl-failover-", dir="/tmp"))
            self.directory.chmod(0o755)
            self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.binaries = _binaries()[max(_binaries())]
            self.start_etcd()
            self.members = [Member(self, number) for number in (1, 2)]
            self.stack.callback(self.stop)
            self.members[0].start()
            self.wait_for(lambda: self.leader() is self.members[0])
            self.members[1].start()
            self.wait_for(lambda: self.replica().role() == "replica" and self.is_streaming())
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def start_etcd(self) -> None:
        self.etcd_port, peer = free_port(), free_port()
        url, peer_url = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{peer}"
        words = ["--data-dir", str(self.directory / "etcd"), "--listen-client-urls", url,
                 "--advertise-client-urls", url, "--listen-peer-urls", peer_url,
                 "--initial-advertise-peer-urls", peer_url,
                 "--initial-cluster", f"default={peer_url}", "--unsafe-no-fsync"]  # fmt: skip
        log = (self.directory / "etcd.log").open("a")
        etcd = subprocess.Popen(["etcd", *words], stdout=log, stderr=log, start_new_session=True)
        self.stack.callback(etcd.wait)
        self.stack.callback(etcd.kill)

    def dcs(self) -> dict:
        parameters = {"synchronous_commit": SYNCHRONOUS_COMMIT.get(self.mode, "on"),
                      "max_connections": 100, "fsync": "off"}  # fmt: skip
        return {"ttl": TTL, "loop_wait": LOOP_WAIT, "retry_timeout": RETRY_TIMEOUT,
                "postgresql": {"use_pg_rewind": True, "parameters": parameters},
                **MODES[self.mode]}  # fmt: skip

    def leader(self) -> Member | None:
        leading = [each for each in self.members
                   if each.process and each.role() in ("primary", "master")]  # fmt: skip
        return leading[0] if leading else None

    def replica(self) -> Member:
        return self.members[1]

    def is_streaming(self) -> bool:
        """Whether the standby streams, and is synchronous where the mode says so."""
        states = self.members[0].query("SELECT sync_state FROM pg_stat_replication")
        wanted = "sync" if MODES[self.mode] else "async"
        return [state for (state,) in states] == [wanted]

    def wait_for(self, predicate) -> None:
        end = time.monotonic() + START_LIMIT
        while True:
            with suppress(psycopg2.Error):
                if predicate():
                    return
            if time.monotonic() > end:
                logs = [(m.directory / "log").read_text()[-1500:]
                        for m in self.members if m.process]  # fmt: skip
                raise RuntimeError("the cluster did not come up:\n" + "\n".join(logs))
            time.sleep(0.2)

    def switch_over(self) -> None:
        old, new = self.members
        body = json.dumps({"leader": old.name, "candidate": new.name}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{old.rest}/switchover", data=body,
            headers={"Content-Type": "application/json"})  # fmt: skip
        urllib.request.urlopen(request, timeout=60).read()

    def stop(self) -> None:
        for member in self.members:
            if member.process:
                member.signal(signal.SIGCONT)
                member.kill()
