"""A stage built on receiver/, and connections that something happens to at a chosen moment."""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import psycopg2

from receiver import Receiver, Stage

ANALYZE = Stage("vlm_analyze", after=("img_gen", "done"))
KEEPING = Stage("vlm_analyze", after=("img_gen", "done"), running=False)
EFFECTS = "CREATE TABLE IF NOT EXISTS effects (job_id text, made_by text)"
SESSIONS = "pg_stat_activity WHERE application_name = 'stage' AND datname = current_database()"
EFFECT = "INSERT INTO effects VALUES (%s, %s)"


class Site:
    """A database with jobs, the receiver's table and one for the effects of the work."""

    def __init__(self, database, stage: Stage = ANALYZE, **settings):
        self.database, self.stage = database, stage
        self.connect = lambda: psycopg2.connect(database.dsn, application_name="stage")
        self.receiver = self.make(**settings)
        self.worked: list[str] = []  # the keys for which the work was done
        self.receiver.install()
        database.rows(EFFECTS)

    def make(self, connect: Callable | None = None, **settings) -> Receiver:
        return Receiver(connect or self.connect, **settings)

    def request(self, job: str, key: str | None = None, **more) -> tuple[dict, bytes]:
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        return headers, json.dumps({"job_id": job, "tenant_id": "tenant"} | more).encode()

    def work(self, job) -> dict:
        self.worked.append(job.key)
        job.write(EFFECT, [job.id, job.key])
        return {"seen": "강아지"}

    def run(self, request, work: Callable | None = None, receiver: Receiver | None = None):
        return (receiver or self.receiver).run(self.stage, *request, work or self.work)

    def effects(self, job: str) -> int:
        return self.database.value("SELECT count(*) FROM effects WHERE job_id = %s", job)

    def remembered(self, request) -> SimpleNamespace:
        key = request[0]["Idempotency-Key"]
        return self.database.row("SELECT * FROM stage_requests WHERE key = %s", key)

    def sessions(self, condition: str) -> int:
        """How many sessions of the stage there are."""
        return self.database.value(f"SELECT count(*) FROM {SESSIONS} AND {condition}")

    def cut(self) -> None:
        """End every session of the stage, and wait until the server has let go of its locks."""
        self.database.rows(f"SELECT pg_terminate_backend(pid, 60000) FROM {SESSIONS}")


class Watched:
    """Connections of `connect` that tell `happens` of the moment after each statement and commit,
    which is the one before the next. Moments are numbered from 1."""

    def __init__(self, connect: Callable, happens: Callable):
        self.connect, self.happens, self.moment = connect, happens, 0

    def __call__(self) -> "Wire":
        return Wire(self, self.connect())

    def pass_through(self, wire: "Wire", do: Callable):
        done = do()
        self.moment += 1
        self.happens(self.moment, wire)
        return done


class Wire:
    """A connection, and its cursors."""

    def __init__(self, watched: Watched, real):
        self.watched, self.real, self.autocommit = watched, real, False

    def cursor(self):
        return Cursor(self, self.real.cursor())

    def commit(self):
        self.watched.pass_through(self, self.real.commit)

    def rollback(self):
        self.real.rollback()

    def close(self):
        self.real.close()

    def cut(self) -> None:
        """The server's end is closed, and ours hears of it."""
        pid = self.real.info.backend_pid
        other = self.watched.connect()
        other.autocommit = True
        other.cursor().execute("SELECT pg_terminate_backend(%s, 60000)", [pid])
        other.close()
        with suppress(psycopg2.Error):
            self.real.cursor().execute("SELECT 1")
        raise psycopg2.OperationalError("cut")


class Cursor:
    def __init__(self, wire: Wire, real):
        self.wire, self.real = wire, real

    def execute(self, *args):
        self.wire.watched.pass_through(self.wire, lambda: self.real.execute(*args))

    def __getattr__(self, name: str):
        return getattr(self.real, name)
