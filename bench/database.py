"""The server that all peers share, and a fresh database on it for every run.

The server of DB_HOST (and DB_PORT, DB_USER, DB_PASSWORD) if set, else an embedded one with default
settings, where every commit of every peer waits for the disk.
"""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from urllib.parse import quote

import psycopg2

from bench.pipeline import CHILDREN, JOBS
from bench.processes import tree_seconds
from demo.database import EmbeddedDatabase

FIVE_STAGES = "demo.five_stages"
OPTIONS = {
    "max_connections": 300,
    "fsync": "on",
    "synchronous_commit": "on",
    "track_commit_timestamp": "on",
    "logging_collector": "on",
    "log_line_prefix": "%d %a ",
    "log_rotation_size": "0",
}
# Counts messages to execute, each of which may hold several statements.
QUERY = r"^{} (?!bench )\S.* LOG:  (statement|execute [^:]*): "

CONNECTED = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = %s AND backend_type = 'client backend' AND application_name <> 'bench'
"""
LOG = "SELECT coalesce(pg_read_file(pg_current_logfile()), '')"
LOGGED = "SELECT setting = %s FROM pg_settings WHERE name = 'log_statement'"

ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'tenant ' || n %% %s, %s, 'running' FROM generate_series(1, %s) AS n
RETURNING job_id::text
"""
# Commit timestamps exist only where the server has track_commit_timestamp on.
COMMITTED = """
SELECT job_id::text, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM jobs
WHERE current_setting('track_commit_timestamp')::boolean
"""


class Server:
    """A context manager. embedded: the EmbeddedDatabase; None where DB_HOST says where it is."""

    def __enter__(self) -> "Server":
        self.embedded = None
        if os.environ.get("DB_HOST"):
            names = {"DB_HOST": "", "DB_PORT": "5432", "DB_USER": "postgres", "DB_PASSWORD": ""}
            self.settings = {name: os.environ.get(name, value) for name, value in names.items()}
        else:
            self.embedded = EmbeddedDatabase(options=OPTIONS).start()
            self.settings = self.embedded.settings()
        self.numbers = itertools.count(1)
        self.conn = self.connect(os.environ.get("DB_NAME") or "postgres")
        return self

    def __exit__(self, *_: object) -> None:
        self.conn.close()
        if self.embedded:
            self.embedded.close()

    def dsn(self, name: str) -> str:
        user = quote(self.settings["DB_USER"], safe="")
        if self.settings["DB_PASSWORD"]:
            user += ":" + quote(self.settings["DB_PASSWORD"], safe="")
        host, port = self.settings["DB_HOST"], self.settings["DB_PORT"]
        return f"postgresql://{user}@{host}:{port}/{name}"

    def connect(self, name: str):
        conn = psycopg2.connect(self.dsn(name), application_name="bench")
        conn.autocommit = True
        return conn

    def cpu(self) -> float:
        """Seconds of CPU time that its processes have used; 0 where the server is not embedded."""
        return tree_seconds(self.embedded.pid) if self.embedded else 0.0

    def log(self, what: str) -> None:
        """Have every session log its statements ("all") or not ("none")."""
        self.value(f"ALTER SYSTEM SET log_statement = '{what}'")
        self.value("SELECT pg_reload_conf()")
        while not self.value(LOGGED, what):
            time.sleep(0.01)
        time.sleep(0.2)  # until the signal has reached the other sessions

    def value(self, sql: str, *params):
        cursor = self.conn.cursor()
        cursor.execute(sql, params)
        return cursor.fetchone()[0] if cursor.description else None


class Database:
    """A database of its own, with `jobs` and nothing else; dropped at the end.

    pipeline: the module of PIPELINE for our listener; with one of bench, there is jobs_variants.
    limit: the name of a limit of bench.limited.
    """

    def __init__(self, server: Server, pipeline: str = FIVE_STAGES, limit: str = "none"):
        self.pipeline, self.limit = pipeline, limit
        self.server, self.name = server, f"bench_{os.getpid()}_{next(server.numbers)}"
        self.dsn = server.dsn(self.name)

    def __enter__(self) -> "Database":
        self.server.conn.cursor().execute(f"CREATE DATABASE {self.name}")
        self.conn = self.server.connect(self.name)
        self.execute(JOBS)
        if self.pipeline != FIVE_STAGES:
            self.execute(CHILDREN)
        return self

    def __exit__(self, *_: object) -> None:
        self.conn.close()
        self.server.conn.cursor().execute(f"DROP DATABASE {self.name} WITH (FORCE)")

    def environ(self) -> dict[str, str]:
        """Environment variables with which our listener uses this database."""
        told = {"DB_NAME": self.name, "DATABASE_URL": "", "PIPELINE_MODULE": self.pipeline,
                "BENCH_LIMIT": self.limit}  # fmt: skip
        return self.server.settings | told

    def connect(self):
        return self.server.connect(self.name)

    def execute(self, sql: str, *params) -> list[tuple]:
        cursor = self.conn.cursor()
        cursor.execute(sql, params or None)
        return cursor.fetchall() if cursor.description else []

    def add_jobs(self, count: int, step: str = "img_gen", tenants: int = 1) -> list[str]:
        """Add jobs in (step, running), which owe no call yet; their ids."""
        return [job for (job,) in self.execute(ADD_JOBS, tenants, step, count)]

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[int]]:
        """A list that gets a number at the end of the `with`: queries of all but the benchmark.

        A backend that only hears of a notification runs a transaction, but no query.
        """
        found: list[int] = []
        if not self.server.embedded:
            yield found
            return
        self.server.log("all")
        before = len(self.server.value(LOG))
        yield found
        self.server.log("none")
        text = self.server.value(LOG)[before:]
        found.append(len(re.findall(QUERY.format(self.name), text, re.MULTILINE)))

    def committed(self) -> dict[str, float]:
        """When the server began to commit the last change of each job, by time.monotonic()."""
        offset = time.time() - time.monotonic()
        return {job: when - offset for job, when in self.execute(COMMITTED)}

    def connected(self) -> int:
        """How many connections there are but the benchmark's own."""
        return self.server.value(CONNECTED, self.name)
