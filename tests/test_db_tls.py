"""TLS to the database: what libpq takes for it works, and a refusal is one line."""

import os
import re
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
import trustme
from raw_server import Behaviour, Connection, RawServer
from waiting import LISTENING, RECONNECTING, wait_until_idle

import db
from demo.database import SYSTEM_INSTALLS, available_majors

# A server of the system has TLS itself; the embedded one has none, so TLS is put in front of it.
INSTALLED = [major for major in available_majors() if (SYSTEM_INSTALLS / str(major)).is_dir()]
MAJORS = sorted({available_majors()[0], *INSTALLED[:1]})
pytestmark = pytest.mark.parametrize("each_server", MAJORS, indirect=True, scope="session")

CERTIFIED = "localhost"
SSL_REQUEST = (80877103).to_bytes(4, "big")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


SHOWN = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@contextmanager
def own_tls(database, authority: trustme.CA) -> Iterator[SimpleNamespace]:
    """The server's own TLS, switched on for a while."""
    data = Path(database.value("SHOW data_directory"))
    certificate = authority.issue_cert(CERTIFIED)
    files = {
        "ssl_cert_file": certificate.cert_chain_pems[0],
        "ssl_key_file": certificate.private_key_pem,
        "ssl_ca_file": authority.cert_pem,
    }
    for name, pem in files.items():
        pem.write_to_path(data / name)
        (data / name).chmod(0o600)
        os.chown(data / name, data.stat().st_uid, data.stat().st_gid)
        database.rows(f"ALTER SYSTEM SET {name} = '{name}'")
    database.rows("ALTER SYSTEM SET ssl = on")
    database.rows("SELECT pg_reload_conf()")
    database.wait_for("SELECT setting = 'on' FROM pg_settings WHERE name = 'ssl'")
    try:
        yield SimpleNamespace(
            port=database.environ["DB_PORT"],
            client=lambda conn: db.execute(conn, SHOWN).fetchone().client_dn,
        )
    finally:
        database.rows("ALTER SYSTEM RESET ALL")
        database.rows("SELECT pg_reload_conf()")


def in_front_of(
    address: tuple[str, int], context: ssl.SSLContext, certificates: list[dict]
) -> Behaviour:
    """A behaviour: speaks TLS, as PostgreSQL does it, for a server that was built without."""

    def behave(connection: Connection) -> None:
        assert connection.sock.recv(8)[4:] == SSL_REQUEST
        connection.send(b"S")
        with (
            context.wrap_socket(connection.sock, server_side=True) as client,
            socket.create_connection(address) as server,
        ):
            certificates.append(client.getpeercert())
            while not connection.closing.is_set():
                known = [client] if client.pending() else []
                for source in known or select.select([client, server], [], [], 0.1)[0]:
                    data = source.recv(2**16)
                    if not data:
                        return
                    (server if source is client else client).sendall(data)

    return behave


@contextmanager
def tls_in_front(database, authority: trustme.CA) -> Iterator[SimpleNamespace]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(CERTIFIED).configure_cert(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    authority.configure_trust(context)
    address = (database.environ["DB_HOST"], int(database.environ["DB_PORT"]))
    certificates: list[dict] = []
    with RawServer(in_front_of(address, context, certificates)) as server:
        yield SimpleNamespace(
            port=server.url.rsplit(":")[-1], client=lambda _: str(certificates[-1])
        )


@pytest.fixture
def tls(each_database, authority) -> Iterator[SimpleNamespace]:
    """`port`: of localhost, where the database speaks TLS; `client(conn)`: whom it takes us for."""
    has_tls = each_database.value("SHOW ssl_library") != ""
    with (own_tls if has_tls else tls_in_front)(each_database, authority) as started:
        yield started


@pytest.fixture
def trusted(authority, tmp_path) -> Path:
    """The file of the authorities to trust."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


@pytest.fixture
def url(each_database, tls, trusted):
    """url(**parameters): a DATABASE_URL with verify-full, as it should be but for `parameters`."""

    def make(host: str = CERTIFIED, **parameters: object) -> str:
        given = {"sslmode": "verify-full", "sslrootcert": trusted} | parameters
        user, name = each_database.environ["DB_USER"], each_database.name
        return f"postgresql://{user}@{host}:{tls.port}/{name}?{urlencode(given)}"

    return make


def test_right_authority_and_right_host_are_connected_to(each_database, url):
    with closing(db.connect(each_database.settings(DATABASE_URL=url()))) as conn:
        assert conn.info.ssl_in_use
        assert db.execute(conn, "SELECT current_database()").fetchone()[0] == each_database.name


def test_wrong_authority_is_one_line_and_exit_3(each_database, run_command, url, trusted):
    trustme.CA().cert_pem.write_to_path(trusted)
    said = run_command(each_database, "status", DATABASE_URL=url()).refused(3)
    assert said.startswith("the database cannot be reached: ")
    assert "certificate verify failed" in said


def test_wrong_host_is_one_line_and_exit_3(each_database, run_command, url):
    elsewhere = url("db.example", hostaddr="127.0.0.1")
    said = run_command(each_database, "status", DATABASE_URL=elsewhere).refused(3)
    assert 'server certificate for "localhost" does not match host name "db.example"' in said


def test_missing_file_of_authorities_is_one_line_and_exit_3(each_database, run_command, url):
    missing = url(sslrootcert="/no/such/file")
    said = run_command(each_database, "status", DATABASE_URL=missing).refused(3)
    assert 'root certificate file "/no/such/file" does not exist' in said


def test_server_without_tls_is_one_line_and_exit_3(each_database, run_command):
    said = run_command(each_database, "status", PGSSLMODE="require").refused(3)
    assert "server does not support SSL, but SSL was required" in said


def test_variables_of_libpq_serve_those_who_set_db_host(each_database, run_command, tls, trusted):
    given = {"DB_HOST": CERTIFIED, "DB_PORT": tls.port}
    given |= {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": trusted}
    assert run_command(each_database, "status", **given).code == 0
    trustme.CA().cert_pem.write_to_path(trusted)
    assert "certificate verify failed" in run_command(each_database, "status", **given).refused(3)


def test_listener_tries_again_until_it_trusts_the_server(
    each_database, listener, url, authority, trusted
):
    trustme.CA().cert_pem.write_to_path(trusted)
    process = listener(each_database, DATABASE_URL=url())
    said = process.wait_for_line("리스너 오류 발생: ConnectionLost: ")
    assert "certificate verify failed" in said
    process.wait_for_line(RECONNECTING)
    authority.cert_pem.write_to_path(trusted)
    process.wait_for_line(LISTENING)


def test_notification_over_tls_is_heard(each_database, listener, url, tmp_path):
    process = listener(each_database, DATABASE_URL=url(), SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    for tenant in ("short", "long" * 1900):  # about as much as a payload takes
        job = each_database.add_job("img_gen", "done", tenant)
        process.wait_for_line(f"Job 상태 변화 감지: job={job}")


def test_certificate_of_the_client_is_shown(each_database, url, tls, authority, tmp_path):
    mine = authority.issue_cert("listener.example", common_name="us")
    mine.private_key_pem.write_to_path(tmp_path / "my.key")
    (tmp_path / "my.key").chmod(0o600)  # libpq refuses one that others can read
    mine.cert_chain_pems[0].write_to_path(tmp_path / "my.crt")
    with_mine = url(sslcert=tmp_path / "my.crt", sslkey=tmp_path / "my.key")
    with closing(db.connect(each_database.settings(DATABASE_URL=with_mine))) as conn:
        assert re.search(r"\bus\b", tls.client(conn))


def test_key_that_others_can_read_is_one_line_and_exit_3(each_database, run_command, url, tmp_path):
    mine = trustme.CA().issue_cert("listener.example")
    mine.private_key_and_cert_chain_pem.write_to_path(tmp_path / "my.pem")
    (tmp_path / "my.pem").chmod(0o644)
    careless = url(sslcert=tmp_path / "my.pem", sslkey=tmp_path / "my.pem")
    said = run_command(each_database, "status", DATABASE_URL=careless).refused(3)
    assert "my.pem" in said and "has group or world access" in said
