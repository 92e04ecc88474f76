"""What a worker's session is, and what it must not be: open, shared, or telling secrets."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from waiting import RECONNECTING, backends, until, wait_until_idle

import calls
import db
from demo.stage_server import Answer


@pytest.fixture
def conn(database) -> Iterator[db.Connection]:
    with closing(db.connect(database.settings())) as connected:
        yield connected


def test_a16_session_never_stays_in_a_transaction(database, conn):
    db.listen(conn, database.settings())
    calls.claim(conn, stages=["planner"], worker="w", lease=1)
    db.query(conn, "SELECT 1")
    with pytest.raises(psycopg2.Error):
        db.query(conn, "CREATE TABLE written ()")
    assert conn.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
    database.rows(f'NOTIFY "{db.CHANNEL}"')
    assert [n.channel for n in until(lambda: db.hear(conn), "a notification")] == [db.CHANNEL]


def test_a11_application_sees_no_setting_of_ours(database, conn):
    db.execute(conn, "SELECT 1")
    assert database.value("SHOW enable_seqscan") == "on"


# --- several processes ---------------------------------------------------------------------


def sockets_to(port: int, pid: int) -> set[str]:
    """The inodes of a process's TCP connections to a port of this machine."""
    lines = [
        line for v in ("tcp", "tcp6") for line in Path("/proc/net", v).read_text().splitlines()
    ]
    table = [line.split() for line in lines]
    inodes = {f"socket:[{row[9]}]" for row in table if row[2].endswith(f":{port:04X}")}
    return inodes & {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}


def test_a15_workers_share_no_connection_and_their_parent_has_none(
    database, api, listener, tmp_path
):
    process = listener(database, "run", "--workers", "3", api=api)
    wait_until_idle(tmp_path, workers=3)
    port = int(database.environ["DB_PORT"])
    assert sockets_to(port, process.pid) == set()
    each = [sockets_to(port, pid) for pid in process.children()]
    assert [len(sockets) for sockets in each] == [1, 1, 1]
    assert len(set.union(*each)) == 3
    assert len(backends(database)) == 3


# --- secrets -------------------------------------------------------------------------------

SECRET = "kP7-s3cr3t%zz"


def test_a18_malformed_database_url_shows_no_password(database, listener):
    process = listener(database, DATABASE_URL=f"postgresql://me:{SECRET}@127.0.0.1:1/jobs")
    assert process.wait() == 2
    assert "DATABASE_URL=***" in process.output
    assert "s3cr3t" not in process.output


def test_a18_unreachable_database_shows_no_password(database, listener):
    url = "postgresql://me:kP7-s3cr3t@127.0.0.1:1/jobs"
    process = listener(database, DATABASE_URL=url, LOG_LEVEL="DEBUG")
    process.wait_for_line(RECONNECTING)
    process.stop()
    assert "s3cr3t" not in process.output


def test_a18_refusing_stage_api_shows_no_password(database, api, listener):
    api.on("vlm_judge", lambda request: Answer(400, request.headers["Authorization"].encode()))
    url = api.url.replace("//", "//me:kP7-s3cr3t@")
    process = listener(database, STAGE_API_URL=url, LOG_LEVEL="DEBUG")
    database.add_job("overlay", "done")
    process.wait_for_line("파이프라인 단계 실행 실패")
    api.close()
    database.add_job("overlay", "done")
    process.wait_for_line("stage API unreachable")
    process.stop()
    assert "s3cr3t" not in process.output
