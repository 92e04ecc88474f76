"""The session of a listener: its limits, its transactions, and no secrets in it."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import psycopg2
import pytest
from claims import claim
from conftest import Database, Server, embedded_server
from waiting import (
    LISTENING,
    PATIENCE,
    RECONNECTING,
    backends,
    terminate_backends,
    until,
    wait_until_idle,
)

import db
import notifications
from demo.database import SYSTEM_INSTALLS
from demo.stage_server import Answer
from faults.network import require_root
from ops.check import verdict


@pytest.fixture
def conn(database) -> Iterator[db.Connection]:
    with closing(db.connect(database.settings())) as connected:
        yield connected


def test_a9_session_has_every_limit_that_frees_what_it_held(database, conn):
    for name, value in (db.SESSION | db.PEER).items():
        both = "SELECT current_setting(%(name)s), set_config(%(name)s, %(value)s, true)"
        now, wanted = db.execute(conn, both, {"name": name, "value": value}).fetchone()
        assert now == wanted, name


@pytest.mark.slow
def test_a9_statement_of_a_killed_listener_ends_by_itself(database, listener):
    database.rows(
        "CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;"
        "CREATE TRIGGER sleep AFTER UPDATE ON stage_calls FOR EACH ROW EXECUTE FUNCTION sleep()"
    )
    process = listener(database)
    job = database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    process.kill()
    until(lambda: not backends(database), "the end of its backend")
    database.rows("SET lock_timeout = '1ms'")
    database.move(job, "overlay", "failed")


# --- names ---------------------------------------------------------------------------------

OTHER_NAMES = ("unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"')


@pytest.mark.parametrize(("timeout", "outcome"), [(1, "unknown"), (60, "held")])
def test_a10_slow_name_lookup_outlasts_neither_lease_nor_heartbeat(
    timeout, outcome, database, listener, tmp_path
):
    require_root("unshare", "mount")
    resolver, directory = tmp_path / "resolv.conf", str(tmp_path / "heartbeats")
    address = f"127.53.{os.getpid() // 256 % 256}.{os.getpid() % 256}"
    resolver.write_text(f"nameserver {address}\noptions timeout:1 attempts:3\n")
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as silent:
        silent.bind((address, 53))
        job = database.add_job("overlay", "done")
        process = listener(
            database,
            within=[*OTHER_NAMES, resolver],
            STAGE_API_URL="http://stage-api.example",
            STAGE_TIMEOUT=timeout,
        )
        until(lambda: "making calls" in verdict(directory)[1], "a call")

        def ended():
            assert verdict(directory)[0]
            return database.attempts(job)

        attempt = until(ended, "the end of the call")[0]
        process.stop()
    assert attempt.outcome == outcome
    lookup, margin = attempt.finished_at - attempt.started_at, database.settings().LEASE_MARGIN
    assert timedelta(seconds=1) < lookup < timedelta(seconds=timeout + margin)


def test_a10_slow_name_lookup_of_the_database_looks_like_no_frozen_listener(
    database, listener, tmp_path
):
    """With two silent servers and a search list it takes 40 s, by the resolver's defaults."""
    require_root("unshare", "mount")
    resolver, directory = tmp_path / "resolv.conf", tmp_path / "heartbeats"
    address = f"127.54.{os.getpid() // 256 % 256}.{os.getpid() % 256}"
    resolver.write_text(f"nameserver {address}\n")
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as silent:
        silent.bind((address, 53))
        silent.settimeout(PATIENCE)
        listener(database, within=[*OTHER_NAMES, resolver], DB_HOST="db.example")
        silent.recv(512)
        [file] = directory.iterdir()
        assert json.loads(file.read_text())["valid_until"] > time.monotonic() + 100
        assert "connecting to the database" in verdict(str(directory))[1]


# --- encryption and encoding ---------------------------------------------------------------

CERTIFICATE = (
    "COPY (SELECT) TO PROGRAM 'cat; openssl req -x509 -newkey ec -pkeyopt"
    " ec_paramgen_curve:prime256v1 -nodes -subj /CN=db -keyout server.key -out server.crt'"
)


@pytest.fixture(scope="module")
def encrypting() -> Iterator[Database]:
    """A database of a server that speaks TLS, which the one in the wheel does not."""
    majors = sorted(int(path.name) for path in SYSTEM_INSTALLS.glob("*"))
    if not majors or not shutil.which("openssl"):
        pytest.skip("no PostgreSQL of the system's, or no openssl")
    with embedded_server(majors[-1]) as embedded:
        server = Server(embedded.settings(), embedded)
        with closing(Database(server, server.create_installed())) as database:
            for sql in (CERTIFICATE, "ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()"):
                database.rows(sql)
            database.wait_for("SELECT pg_read_file('server.key', 0, 1) = '-'")
            yield database


def test_a13_burst_over_tls_is_heard_to_its_last_notification(encrypting, api, listener, tmp_path):
    database = encrypting
    url = database.server.embedded.dsn(database.name) + "?sslmode=require"
    process = listener(database, api=api, DATABASE_URL=url, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    ssl = "SELECT ssl FROM pg_stat_ssl WHERE pid = %s"
    assert database.value(ssl, backends(database)[0])
    database.rows(
        "SELECT pg_notify('job_state_changed', n || repeat('x', 7000))"
        " FROM generate_series(1, 900) AS n"
    )
    process.wait_for_line("알 수 없는 NOTIFY 무시: 900xxx")
    assert process.output.count("알 수 없는 NOTIFY 무시") == 900


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_KR"])
def test_a14_client_encoding_of_the_environment_has_no_say(encoding, database, api, listener):
    database.rows(f"ALTER DATABASE {database.name} SET client_encoding = '{encoding}'")
    api.on("vlm_judge", lambda _request: Answer(200))
    process = listener(database, api=api, PGCLIENTENCODING=encoding)
    process.wait_for_line(LISTENING)
    tenant = "한글 é 😀"
    job = database.add_job("overlay", "done", tenant)
    database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'succeeded'")
    assert [call.tenant_id for call in api.calls(job)] == [tenant]
    assert RECONNECTING not in process.output


# --- transactions and processes ------------------------------------------------------------


def test_a16_session_never_stays_in_a_transaction(database, conn):
    notifications.listen(conn)
    claim(conn)
    assert conn.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
    database.rows(f'NOTIFY "{db.CHANNEL}"')
    assert [n.channel for n in until(lambda: notifications.hear(conn), "a notification")] == [
        db.CHANNEL
    ]


def test_a16_lookup_of_a_stage_function_writes_nothing_and_leaves_no_session(database):
    settings = database.settings()
    assert db.query(settings, "SELECT 1 AS one")[0].one == 1
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        db.query(settings, "CREATE TABLE written ()")
    database.wait_for(
        "SELECT count(*) = 0 FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE '%%lookup'"
    )


def test_a11_application_sees_no_setting_of_ours(database, conn):
    db.execute(conn, "SELECT 1")
    assert database.value("SHOW enable_seqscan") == "on"


def opened(pid: int) -> set[str]:
    """The files and sockets of a process, its standard streams aside."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed meanwhile
            if int(file.name) > 2:
                found.add(os.readlink(file))
    return found - {os.devnull}


def sockets_to(port: int, pid: int) -> set[str]:
    """The inodes of a process's TCP connections to a port of this machine."""
    lines = [
        line for v in ("tcp", "tcp6") for line in Path("/proc/net", v).read_text().splitlines()
    ]
    table = [line.split() for line in lines]
    return {f"socket:[{row[9]}]" for row in table if row[2].endswith(f":{port:04X}")} & opened(pid)


def share_nothing(process) -> bool:
    """Whether no worker has anything that its listener has open: the connection, the heartbeat,
    the ends of other workers, what wakes the loop.
    """
    return not any(opened(pid) & opened(process.pid) for pid in process.children())


def test_a15_listener_has_one_connection_and_its_workers_have_none(
    database, api, listener, tmp_path
):
    process = listener(database, "run", "--workers", "3", api=api)
    wait_until_idle(tmp_path)
    port = int(database.environ["DB_PORT"])
    assert len(sockets_to(port, process.pid)) == 1
    assert len(process.children()) == 3
    until(lambda: share_nothing(process), "workers that share nothing with their listener")
    assert len(backends(database)) == 1


def test_a15_workers_started_after_a_reconnect_have_no_connection_either(
    database, api, listener, tmp_path
):
    process = listener(database, "run", "--workers", "3", api=api)
    wait_until_idle(tmp_path)
    terminate_backends(database)
    process.wait_for_line(LISTENING, count=2)
    before = process.children()
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(set(process.children()) - {before[0]}) == 3, "another worker")
    wait_until_idle(tmp_path)
    until(lambda: share_nothing(process), "workers that share nothing with their listener")
    assert len(backends(database)) == 1


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
