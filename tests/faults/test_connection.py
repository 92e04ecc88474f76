"""Faults between a listener and its database."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from claims import claim
from conftest import ROOT
from tcp_proxy import TcpProxy
from waiting import (
    CLAIM,
    LISTENING,
    RECONNECTING,
    backends,
    terminate_backends,
    until,
    wait_until_idle,
)

import db
import notifications
from demo.stage_api import StageApi
from ops.check import verdict

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


def processes(server) -> list[int]:
    """All of an embedded server, the one that accepts connections first."""
    pid = server.embedded.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


# --- errors of the driver ------------------------------------------------------------------


def test_a3_notifications_of_a_terminated_backend_are_a_lost_connection(database, conn):
    notifications.listen(conn)
    database.rows("SELECT pg_terminate_backend(%s)", conn.info.backend_pid)
    with pytest.raises(db.ConnectionLost):
        until(lambda: notifications.hear(conn) is None, "the end of the connection")


def test_a3_statement_on_a_terminated_backend_is_a_lost_connection(database, conn):
    database.rows("SELECT pg_terminate_backend(%s)", conn.info.backend_pid)
    for _ in range(2):  # the second time psycopg2 raises InterfaceError
        with pytest.raises(db.ConnectionLost):
            db.execute(conn, "SELECT 1")
    with pytest.raises(db.ConnectionLost):
        notifications.hear(conn)


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "57014"])
def test_a4_passing_errors_are_tried_again_on_the_same_connection(code, database, conn):
    database.rows("CREATE SEQUENCE tries")
    database.rows(
        "CREATE FUNCTION fail_first() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('tries') < 2 THEN RAISE SQLSTATE '{code}'; END IF; RETURN lastval(); END $$"
    )
    assert db.execute(conn, "SELECT fail_first() AS tries").fetchone().tries == 2


def test_a4_statement_that_took_long_is_not_tried_again(database, conn, monkeypatch):
    database.rows("CREATE SEQUENCE tries")
    slow = "SET LOCAL statement_timeout = '50ms'; SELECT nextval('tries'), pg_sleep(60)"
    for within, tries in ((3600.0, 2), (0.0, 3)):
        monkeypatch.setattr(db, "TRY_AGAIN_WITHIN", within)
        with pytest.raises(psycopg2.errors.QueryCanceled):
            db.execute(conn, slow)
        assert database.value("SELECT last_value FROM tries") == tries


def test_a4_errors_that_do_not_pass_are_raised_and_the_connection_stays_good(conn):
    with pytest.raises(psycopg2.errors.SerializationFailure):
        db.execute(conn, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
    with pytest.raises(psycopg2.errors.DivisionByZero):
        db.execute(conn, "SELECT 1/0")
    with pytest.raises(psycopg2.errors.InvalidTextRepresentation):
        claim(conn, only="no uuid")
    assert db.execute(conn, "SELECT 1 AS one").fetchone().one == 1


@pytest.mark.parametrize("code", ["25006", "53300", "57P01", "57P03", "08006"])
def test_a4_errors_of_a_server_that_cannot_serve_are_a_lost_connection(code, conn):
    with pytest.raises(db.ConnectionLost):
        db.execute(conn, f"DO $$ BEGIN RAISE SQLSTATE '{code}'; END $$")


# --- a listener and its connection ---------------------------------------------------------


def test_a3_terminated_backend_is_noticed_at_once(database, api, listener, tmp_path):
    process = listener(database, api=api, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    terminate_backends(database)
    process.wait_for_line(LISTENING, count=2)
    job = database.add_job("overlay", "done")
    database.wait_for(SUCCEEDED, job)
    assert len(api.calls(job)) == 1


def test_a4_deadlock_of_a_claim_is_tried_again_without_reconnecting(database, api, listener):
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


def new_session_is_read_only(database) -> bool:
    with closing(database.connect()) as conn, conn.cursor() as cursor:
        cursor.execute("SHOW default_transaction_read_only")
        return cursor.fetchone() == ("on",)


def test_a12_server_that_became_read_only_is_left_and_found_again(
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
        # New sessions are read-only, and the present ones from their next statement on.
        until(lambda: new_session_is_read_only(database), "the server to read its configuration")
        database.move(job, "overlay", "done")
        process.wait_for_line("read-only")
        database.rows(read_only.format("off"))
        database.rows("SELECT pg_reload_conf()")
        database.wait_for(DONE, 1)
        assert len(api.calls(job)) == 1


REFUSALS = {
    "role": ("ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN"),
    "database": ("ALTER DATABASE {db} ALLOW_CONNECTIONS false",
                 "ALTER DATABASE {db} ALLOW_CONNECTIONS true"),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSALS)
def test_a5_refusing_server_is_asked_again_until_it_gives_way(
    refused, server, database, make_role, listener, tmp_path
):
    role = make_role(database)
    refuse, allow = (sql.format(role=role, db=database.name) for sql in REFUSALS[refused])
    database.rows(f"ALTER ROLE {role} SUPERUSER")
    elsewhere = server.connect().cursor()
    elsewhere.execute(refuse)
    who = {"DB_USER": role, "DB_PASSWORD": role, "JOB_STATE_LISTENER_RECONNECT_DELAY": 0.1}
    process = listener(database, **who)
    process.wait_for_line("(4번째)")
    until(lambda: "database away" in verdict(str(tmp_path / "heartbeats"))[1], "a heartbeat")
    assert verdict(str(tmp_path / "heartbeats"))[0]
    elsewhere.execute(allow)
    process.wait_for_line(LISTENING)
    assert process.output.count("리스너 오류 발생") == 1


@pytest.mark.slow
def test_a5_server_that_accepts_and_says_nothing_is_left(database, listener):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = listener(database, DB_PORT=silent.getsockname()[1])
        process.wait_for_line("timeout expired")
        process.wait_for_line(RECONNECTING)
        assert process.stop() == 0


@pytest.mark.slow
def test_a7_frozen_server_is_noticed_and_used_again(own_server, make_database, listener, tmp_path):
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


@pytest.mark.slow
def test_a7_frozen_server_is_given_up_while_connecting(own_server, make_database, listener):
    database = make_database(own_server)
    with frozen(processes(own_server)):
        process = listener(database)
        process.wait_for_line("timeout expired")
    process.wait_for_line(LISTENING)


@pytest.mark.slow
def test_a7_stalled_proxy_is_left_for_a_new_connection(database, api, listener, tmp_path):
    with TcpProxy(database.environ) as proxy:
        process = listener(database, api=api, **proxy.settings, SWEEP_INTERVAL=3600)
        wait_until_idle(tmp_path)
        stalled = proxy.hold_request(CLAIM)
        job = database.add_job("overlay", "done")
        stalled.wait()
        process.wait_for_line("did not answer within 10 s")
        database.wait_for(SUCCEEDED, job)
        assert len(api.calls(job)) == 1


def test_a8_stop_does_not_wait_for_a_frozen_server(own_server, make_database, listener, tmp_path):
    database = make_database(own_server)
    slow = {"SWEEP_INTERVAL": 0.1, "JOB_STATE_LISTENER_RECONNECT_DELAY": 3600}
    process = listener(database, **slow)
    wait_until_idle(tmp_path)
    with frozen(processes(own_server)):
        assert process.stop() == 0
    assert "did not answer within 10 s" not in process.output


SPIN = """
import os, signal, time
import config, db, signals
conn = db.connect(config.settings(), stop=signals.Signals())
os.kill(os.getpid(), signal.SIGCHLD)
before = time.process_time()
db.execute(conn, "SELECT pg_sleep(1)")
print(time.process_time() - before)
"""


def test_a8_signal_that_is_no_stop_does_not_make_the_wait_spin(database):
    """The end of a worker writes to the wakeup socket as well."""
    environ = os.environ | database.environ
    command = [sys.executable, "-c", SPIN]
    seconds = subprocess.run(command, env=environ, cwd=ROOT, check=True, capture_output=True).stdout
    assert float(seconds) < 0.3
