"""Behind PgBouncer: heard or not, the pipeline works, and nothing leaks to other clients."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg2
import pytest
from proxies import accepts, free_port
from waiting import LISTENING, RECONNECTING, until, wait_until_idle

import db

DONE = "SELECT count(*) = %s FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIG = """
[databases]
* = host={DB_HOST} port={DB_PORT} user={DB_USER} password='{password}'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {pool_size}
"""

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")


class PgBouncer:
    def __init__(self, database, directory: Path, mode: str, pool_size: int):
        self.port = free_port()
        self.settings = {"DB_HOST": "127.0.0.1", "DB_PORT": self.port}
        password = database.environ["DB_PASSWORD"] or "none"
        values = {"port": self.port, "mode": mode, "pool_size": pool_size, "password": password}
        self.file = directory / "pgbouncer.ini"
        self.file.write_text(CONFIG.format(**database.environ, **values))
        self.start()

    def start(self) -> None:
        user = {}
        if os.geteuid() == 0:  # it refuses to run as root
            user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(self.file.parent, "nobody")
        self.process = subprocess.Popen([PGBOUNCER, "-q", self.file], **user)
        until(lambda: accepts(self.port) or self.process.poll() is not None, "PgBouncer")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def pooler(database) -> Iterator[Callable[[str, int], PgBouncer]]:
    """pooler(mode, pool_size): a PgBouncer in front of the database."""
    with TemporaryDirectory() as directory, ExitStack() as stack:

        def start(mode: str, pool_size: int) -> PgBouncer:
            bouncer = PgBouncer(database, Path(directory), mode, pool_size)
            stack.callback(bouncer.kill)
            return bouncer

        yield start


def test_a11_transaction_pooler_is_polled_and_nothing_leaks(
    database, pooler, api, listener, tmp_path
):
    # One server connection for all: what one client leaves behind, every other finds.
    bouncer = pooler("transaction", 1)
    process = listener(database, api=api, **bouncer.settings, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    job = database.add_job("planner", "done")
    database.wait_for(DONE, 1)
    assert [call.stage for call in api.calls(job)] == ["overlay", "vlm_judge"]
    process.wait_for_line("NOTIFY가 전달되지 않음")
    assert LISTENING not in process.output

    with (
        closing(psycopg2.connect(database.dsn, host="127.0.0.1", port=bouncer.port)) as conn,
        conn.cursor() as cursor,
    ):
        for name in db.SESSION:
            cursor.execute("SELECT setting = reset_val FROM pg_settings WHERE name = %s", [name])
            assert cursor.fetchone() == (True,), name
        cursor.execute("SELECT * FROM pg_listening_channels()")
        assert cursor.fetchall() == []
        conn.rollback()
    assert process.stop() == 0
    assert process.output.count("NOTIFY가 전달되지 않음") == 1


def test_a11_reconnecting_behind_a_pooler_does_not_repeat_the_warning(
    database, pooler, api, listener, tmp_path
):
    bouncer = pooler("transaction", 2)
    process = listener(database, api=api, **bouncer.settings)
    wait_until_idle(tmp_path)
    bouncer.kill()
    process.wait_for_line(RECONNECTING)
    bouncer.start()
    process.wait_for_line("PostgreSQL 연결 성공", count=2)
    database.add_job("overlay", "done")
    database.wait_for(DONE, 1)
    assert process.output.count("NOTIFY가 전달되지 않음") == 1


def test_a11_session_pooler_is_heard(database, pooler, api, listener, tmp_path):
    process = listener(database, api=api, **pooler("session", 4).settings, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    process.wait_for_line(LISTENING)
    job = database.add_job("planner", "done")
    database.wait_for(DONE, 1)
    assert process.wait_for_line(f"상태 변화 감지: job={job}")
