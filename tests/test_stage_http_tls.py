"""TLS: until the handshake is over nothing was sent, and from then on it may have been."""

import shutil
import socket
import ssl
import time

import pytest
import trustme
from raw_server import OK, in_turn

import config
import stage_http
from stage_http import Answer, NoAnswer, StageApi, Unreachable

HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority that nobody trusts, unless told to."""
    return trustme.CA()


@pytest.fixture(scope="module")
def bundle(authority, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(file)
    return str(file)


def certified(authority: trustme.CA, name: str = HERE) -> ssl.SSLContext:
    """What a server needs to show a certificate for `name`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
def tls(authority) -> ssl.SSLContext:
    return certified(authority)


@pytest.fixture
def trusting(bundle):
    """trusting(url): a StageApi that trusts the authority."""
    return lambda url: StageApi(config.read({"STAGE_API_URL": url, "STAGE_API_CA_BUNDLE": bundle}))


def post(api: StageApi, left: float = 30.0) -> Answer:
    return api.post("/x", {"job_id": 1}, {}, time.monotonic() + left)


good = in_turn(OK)


def test_trusted_server_is_called(serve, tls, trusting):
    api = trusting(serve(good, tls=tls).url)
    assert [post(api), post(api)] == [Answer(200, "ok")] * 2


def test_untrusted_certificate_is_not_sent(serve, tls):
    server = serve(good, tls=tls)
    with pytest.raises(Unreachable, match="certificate verify failed"):
        post(StageApi(config.read({"STAGE_API_URL": server.url})))
    assert server.requests == []


def test_certificate_of_another_authority_or_for_another_host_is_not_sent(
    serve, authority, trusting
):
    servers = [
        serve(good, tls=certified(trustme.CA())),
        serve(good, tls=certified(authority, "stage-api.example")),
    ]
    with pytest.raises(Unreachable, match="unable to get local issuer certificate"):
        post(trusting(servers[0].url))
    with pytest.raises(Unreachable, match=f"IP address mismatch.*'{HERE}'"):
        post(trusting(servers[1].url))
    assert [server.requests for server in servers] == [[], []]


def test_environment_cannot_make_a_certificate_trusted(serve, tls, bundle, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, bundle)
    with pytest.raises(Unreachable, match="certificate verify failed"):
        post(StageApi(config.read({"STAGE_API_URL": serve(good, tls=tls).url})))


def test_verify_trusts_what_calls_trust(database, run_command, serve, tls, bundle):
    url = serve(good, tls=tls).url
    untrusted = run_command(database, "verify", STAGE_API_URL=url)
    [problem] = [line for line in untrusted.lines if line.startswith("PROBLEM")]
    assert untrusted.code == 1 and "certificate verify failed" in problem
    assert problem.endswith(" → set STAGE_API_CA_BUNDLE")
    trusted = run_command(database, "verify", STAGE_API_URL=url, STAGE_API_CA_BUNDLE=bundle)
    assert trusted.code == 0 and f"stage API {url} answers (HTTP 200" in trusted.out


def test_without_the_file_of_authorities_nothing_is_sent(serve, tls, bundle, tmp_path):
    server, file = serve(good, tls=tls), tmp_path / "ca.pem"
    shutil.copy(bundle, file)
    api = StageApi(config.read({"STAGE_API_URL": server.url, "STAGE_API_CA_BUNDLE": str(file)}))
    file.unlink()
    with pytest.raises(Unreachable, match=f"invalid path: {file}"):
        post(api)
    shutil.copy(bundle, file)
    assert post(api) == Answer(200, "ok") and len(server.requests) == 1


def answer_plainly(connection) -> None:
    connection.sock.recv(1)
    connection.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    connection.sock.recv(4096)


def close(connection) -> None:
    connection.sock.recv(4096)


def reset(connection) -> None:
    connection.sock.recv(1)
    connection.reset()


def stay_silent(connection) -> None:
    connection.closing.wait(30)


@pytest.mark.parametrize("behaviour", [answer_plainly, close, reset, stay_silent])
def test_handshake_with_a_plain_port_is_not_sent(serve, behaviour):
    url = serve(behaviour).url.replace("http:", "https:")
    with pytest.raises(Unreachable):
        post(StageApi(config.read({"STAGE_API_URL": url})), left=0.5)


def test_handshake_has_the_time_for_connecting_alone(serve, monkeypatch):
    monkeypatch.setattr(stage_http, "CONNECT_TIMEOUT", 0.2)
    url = serve(stay_silent).url.replace("http:", "https:")
    with pytest.raises(Unreachable, match="timed out"):
        post(StageApi(config.read({"STAGE_API_URL": url})), left=60)


@pytest.mark.parametrize(
    "begun",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok"],
    ids=["before the answer", "within the answer"],
)
def test_tls_that_breaks_after_the_request_is_not_known(serve, tls, trusting, begun):
    def break_off(connection):
        connection.answer(begun)
        # Past the encryption, as from a proxy that lost its other side.
        with socket.socket(fileno=connection.sock.detach()) as plain:
            plain.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

    server = serve(break_off, good, tls=tls)
    api = trusting(server.url)
    with pytest.raises(NoAnswer):
        post(api)
    assert len(server.requests) == 1
    assert post(api) == Answer(200, "ok")
