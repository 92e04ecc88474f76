"""A stage built on receiver/, for tests."""

import json
import uuid
from collections.abc import Callable
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

    def cut(self, sessions: str = SESSIONS) -> None:
        """End every session of the stage, and wait until the server has let go of its locks."""
        ended = self.database.rows(f"SELECT pid, pg_terminate_backend(pid) FROM {sessions}")
        gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ANY(%s)"
        self.database.wait_for(gone, [session.pid for session in ended])
