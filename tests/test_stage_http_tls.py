"""TLS: until the handshake is over nothing was sent, and from then on it may have been."""

import shutil
import socket
import ssl
import subprocess
import time

import pytest
from raw_server import OK, in_turn

import config
from stage_http import Answer, NoAnswer, StageApi, Unreachable

if not shutil.which("openssl"):
    pytest.skip("openssl, which makes the certificate, is not installed", allow_module_level=True)

CERTIFICATE = [
    "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
    "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The file of a certificate for 127.0.0.1 that nobody trusts, its key in it."""
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    made = subprocess.run([*CERTIFICATE, "-keyout", "-"], check=True, capture_output=True)
    file.write_bytes(made.stdout)
    return file


@pytest.fixture
def tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def trusting(certificate):
    """trusting(url): a StageApi that trusts the certificate."""

    def make(url: str) -> StageApi:
        api = StageApi(config.read({"STAGE_API_URL": url}))
        api.session.verify = str(certificate)
        return api

    return make


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


def test_environment_cannot_make_a_certificate_trusted(serve, tls, certificate, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))
    with pytest.raises(Unreachable, match="certificate verify failed"):
        post(StageApi(config.read({"STAGE_API_URL": serve(good, tls=tls).url})))


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
