"""What breaks between a worker and its database, and what must come of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from waiting import (
    LISTENING,
    RECONNECTING,
    backends,
    until,
    wait_until_idle,
)

import calls
import db
from demo.stage_api import StageApi
from demo.stage_server import Answer

ROOT = Path(__file__).parent.parent
DONE = "SELECT count(*) = %s FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


@pytest.fixture
def conn(database) -> Iterator[db.Connection]:
    with closing(db.connect(database.settings())) as connected:
        yield connected


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Stop processes: the kernel still acknowledges what is sent to them."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


# --- errors of the driver ------------------------------------------------------------------


def test_notifications_of_a_terminated_backend_are_a_lost_connection(database, conn):
    db.listen(conn, database.settings())
    database.rows("SELECT pg_terminate_backend(%s)", conn.info.backend_pid)
    with pytest.raises(db.ConnectionLost):
        while True:
            db.hear(conn)


def test_statement_on_a_terminated_backend_is_a_lost_connection(database, conn):
    database.rows("SELECT pg_terminate_backend(%s, 10000)", conn.info.backend_pid)
    for _ in range(2):  # the second time psycopg2 raises InterfaceError
        with pytest.raises(db.ConnectionLost):
            db.execute(conn, "SELECT 1")
    with pytest.raises(db.ConnectionLost):
        db.hear(conn)


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "57014"])
def test_passing_errors_are_tried_again_on_the_same_connection(code, database, conn):
    database.rows("CREATE SEQUENCE tries")
    database.rows(
        "CREATE FUNCTION fail_twice() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('tries') < 3 THEN RAISE SQLSTATE '{code}'; END IF; RETURN lastval(); END $$"
    )
    assert db.execute(conn, "SELECT fail_twice() AS tries").fetchone().tries == 3


def test_errors_that_do_not_pass_are_raised_and_the_connection_stays_good(conn):
    with pytest.raises(psycopg2.errors.SerializationFailure):
        db.execute(conn, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
    with pytest.raises(psycopg2.errors.DivisionByZero):
        db.execute(conn, "SELECT 1/0")
    with pytest.raises(psycopg2.errors.InvalidTextRepresentation):
        calls.claim(conn, leases={"planner": 1}, worker="w", only="no uuid")
    assert db.execute(conn, "SELECT 1 AS one").fetchone().one == 1


@pytest.mark.parametrize("code", ["25006", "53300", "57P01", "57P03", "08006"])
def test_errors_of_a_server_that_cannot_serve_are_a_lost_connection(code, conn):
    with pytest.raises(db.ConnectionLost):
        db.execute(conn, f"DO $$ BEGIN RAISE SQLSTATE '{code}'; END $$")


def test_session_never_stays_in_a_transaction(database, conn):
    db.listen(conn, database.settings())
    calls.claim(conn, leases={"planner": 1}, worker="w")
    db.query(conn, "SELECT 1")
    with pytest.raises(psycopg2.Error):
        db.query(conn, "CREATE TABLE written ()")
    assert conn.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
    database.rows(f'NOTIFY "{db.CHANNEL}"')
    assert [n.channel for n in until(lambda: db.hear(conn), "a notification")] == [db.CHANNEL]


def test_application_sees_no_setting_of_ours(database, conn):
    db.execute(conn, "SELECT 1")
    assert database.value("SHOW enable_seqscan") == "on"


# --- workers and their connection ----------------------------------------------------------


def test_deadlock_in_a_worker_is_tried_again_without_reconnecting(database, api, listener):
    database.rows("CREATE SEQUENCE tries")
    database.rows(
        "CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('tries') = 1 THEN RAISE SQLSTATE '40P01'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER fail_once BEFORE UPDATE ON stage_calls"
        " FOR EACH ROW EXECUTE FUNCTION fail_once()"
    )
    process = listener(database, api=api)
    job = database.add_job("overlay", "done")
    database.wait_for(DONE, 1)
    assert database.value("SELECT last_value FROM tries") > 1
    assert len(api.calls(job)) == 1
    assert RECONNECTING not in process.output


def test_server_that_became_read_only_is_left_and_found_again(
    own_server, make_database, listener, tmp_path
):
    database = make_database(own_server)
    read_only = "ALTER SYSTEM SET default_transaction_read_only = {}"
    with StageApi(database.dsn) as api:
        process = listener(database, api=api)
        wait_until_idle(tmp_path)
        database.rows("SET default_transaction_read_only = off")
        job = database.add_job("overlay", "queued")
        database.rows(read_only.format("on"))
        database.rows("SELECT pg_reload_conf()")
        database.wait_for("SELECT setting = 'on' FROM pg_file_settings WHERE name = %s",
                          "default_transaction_read_only")  # fmt: skip
        database.move(job, "overlay", "done")
        process.wait_for_line("read-only")
        database.rows(read_only.format("off"))
        database.rows("SELECT pg_reload_conf()")
        database.wait_for(DONE, 1)
        assert len(api.calls(job)) == 1


@pytest.mark.slow
def test_frozen_server_is_noticed_and_used_again(own_server, make_database, listener, tmp_path):
    database = make_database(own_server)
    with StageApi(database.dsn) as api:
        process = listener(database, api=api, SWEEP_INTERVAL=0.1)
        wait_until_idle(tmp_path)
        job = database.add_job("overlay", "running")
        with frozen(backends(database)):
            database.move(job, "overlay", "done")
            process.wait_for_line("did not answer within 10 s")
            process.wait_for_line(LISTENING, count=2)
            database.wait_for(SUCCEEDED, job)
        until(lambda: len(backends(database)) == 1, "the end of the frozen backend")
        other = database.add_job("overlay", "done")
        database.wait_for(SUCCEEDED, other)
        assert [call.job_id for call in api.calls()] == [job, other]


def test_stop_does_not_wait_for_a_frozen_server(own_server, make_database, listener, tmp_path):
    database = make_database(own_server)
    slow = {"SWEEP_INTERVAL": 0.1, "JOB_STATE_LISTENER_RECONNECT_DELAY": 3600}
    process = listener(database, **slow)
    wait_until_idle(tmp_path)
    pid = own_server.embedded.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with frozen([pid, *map(int, children)]):
        assert process.stop() == 0
    assert "did not answer within 10 s" not in process.output


SPIN = """
import os, signal, time
import config, db, process
db.stop = process.Stop()
conn = db.connect(config.settings())
signal.signal(signal.SIGALRM, lambda *_: None)
os.kill(os.getpid(), signal.SIGALRM)
before = time.process_time()
db.execute(conn, "SELECT pg_sleep(1)")
print(time.process_time() - before)
"""


def test_signal_that_is_no_stop_does_not_make_the_wait_spin(database):
    """The alarm of a call writes to the wakeup socket as well."""
    environ = os.environ | database.environ
    command = [sys.executable, "-c", SPIN]
    seconds = subprocess.run(command, env=environ, cwd=ROOT, check=True, capture_output=True).stdout
    assert float(seconds) < 0.3


# --- several processes ---------------------------------------------------------------------


def sockets_to(port: int, pid: int) -> set[str]:
    """The inodes of a process's TCP connections to a port of this machine."""
    lines = [
        line for v in ("tcp", "tcp6") for line in Path("/proc/net", v).read_text().splitlines()
    ]
    table = [line.split() for line in lines]
    inodes = {f"socket:[{row[9]}]" for row in table if row[2].endswith(f":{port:04X}")}
    return inodes & {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}


def test_workers_share_no_connection_and_their_parent_has_none(database, api, listener, tmp_path):
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


def test_malformed_database_url_shows_no_password(database, listener):
    process = listener(database, DATABASE_URL=f"postgresql://me:{SECRET}@127.0.0.1:1/jobs")
    assert process.wait() == 2
    assert "DATABASE_URL=***" in process.output
    assert "s3cr3t" not in process.output


def test_unreachable_database_shows_no_password(database, listener):
    url = "postgresql://me:kP7-s3cr3t@127.0.0.1:1/jobs"
    process = listener(database, DATABASE_URL=url, LOG_LEVEL="DEBUG")
    process.wait_for_line(RECONNECTING)
    process.stop()
    assert "s3cr3t" not in process.output


def test_refusing_stage_api_shows_no_password(database, api, listener):
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
