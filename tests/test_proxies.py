"""Proxies and application servers that answer in place of a stage (docs/answers.md).

Each test checks whether the stage may be working: then the call is not repeated before its lease is
over.
"""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import proxies
import pytest
from raw_server import OK, answering, in_turn

pytestmark = pytest.mark.slow

KINDS = ("nginx", "haproxy", "haproxy-tcp", "apache2", "varnishd")


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


@pytest.fixture
def between(tmp_path):
    """between(kind, backend, wait=60): a proxy that is running."""
    started = []

    def start(kind: str, backend: str, wait: int = 60) -> proxies.Server:
        started.append(proxies.proxy(kind, backend, tmp_path, wait).__enter__())
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def app_server(tmp_path):
    """app_server(module, app, *args): gunicorn or uvicorn, running."""
    started = []

    def start(module: str, app: str, *args: str) -> proxies.Server:
        started.append(proxies.python_server(module, app, tmp_path, *args).__enter__())
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def nobody():
    """The URL of a stage that is down: its port is taken, so that nobody else listens there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def outcome(database, caller, url: str) -> tuple[str, int | None]:
    """What the call of a job comes to; an unknown one must wait for its lease."""
    job = database.add_job()
    worker = caller(url)
    call = worker.claim()
    lease = database.owed(job).due_at
    worker.run(call)
    worker.settle()
    [attempt] = database.attempts(job)
    if attempt.outcome == "unknown":
        assert database.owed(job).due_at == lease
        assert database.value("SELECT bool_and(unanswered) FROM stage_leases")
    return attempt.outcome, attempt.http_status


def silent(connection) -> None:
    connection.receive()
    connection.closing.wait(30)


def closes(connection) -> None:
    connection.receive()


def resets(connection) -> None:
    connection.receive()
    connection.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_answer_comes_through(database, caller, serve, between, kind):
    assert outcome(database, caller, between(kind, serve(in_turn(OK)).url).url)[0] == "succeeded"


# A proxy that only passes bytes on closes the connection, as a stage does that was killed.
MAYBE = {kind: "unknown" for kind in KINDS} | {"haproxy-tcp": "retry"}
# Apache httpd says 502 and Varnish 503 where the others say 504.
IMPATIENT = {"nginx": 504, "haproxy": 504, "haproxy-tcp": None, "apache2": 502, "varnishd": 503}


@pytest.mark.parametrize("kind", KINDS)
def test_stage_that_works_longer_than_its_proxy_waits_is_not_called_beside(
    database, caller, serve, between, kind
):
    server = serve(silent)
    url = between(kind, server.url, wait=1).url
    assert outcome(database, caller, url) == (MAYBE[kind], IMPATIENT[kind])
    assert len(server.requests) == 1


BROKEN = {"nginx": 502, "haproxy": 502, "haproxy-tcp": None, "apache2": 502, "varnishd": 503}


@pytest.mark.parametrize("behaviour", [closes, resets])
@pytest.mark.parametrize("kind", KINDS)
def test_stage_whose_connection_breaks_behind_a_proxy_may_be_at_work(
    database, caller, serve, between, kind, behaviour
):
    url = between(kind, serve(behaviour).url).url
    assert outcome(database, caller, url) == (MAYBE[kind], BROKEN[kind])


# What nginx, Varnish and a TCP proxy say of a stage that is down, they say of one that broke.
DOWN = {
    "nginx": ("unknown", 502),
    "haproxy": ("held", 503),
    "haproxy-tcp": ("retry", None),
    "apache2": ("held", 503),
    "varnishd": ("unknown", 503),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stage_that_is_down_behind_a_proxy(database, caller, between, nobody, kind):
    assert outcome(database, caller, between(kind, nobody).url) == DOWN[kind]


UNROUTED = {
    "nginx": ("failed", 404),
    "haproxy": ("held", 503),
    "apache2": ("failed", 404),
    "varnishd": ("failed", 404),
}


@pytest.mark.parametrize("kind", UNROUTED)
def test_proxy_that_has_no_route(database, caller, serve, between, kind):
    server = serve(in_turn(OK))
    url = between(kind, server.url).url + "/nowhere"
    assert outcome(database, caller, url) == UNROUTED[kind]
    assert not server.requests


def test_body_that_nginx_finds_too_large_is_about_the_job(
    database, caller, serve, between, add_stage
):
    add_stage(lambda call: call.post("/x", page="x" * 2000))
    server = serve(in_turn(OK))
    url = between("nginx", server.url).url
    worker, job = caller(url), database.add_job("x")
    attempt = worker.call()
    assert (attempt.outcome, attempt.http_status) == ("failed", 413)
    assert database.owed(job).given_up and not server.requests


def test_cut_answer_is_still_cut_behind_a_proxy(database, caller, serve, between):
    cut = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")
    assert outcome(database, caller, between("nginx", serve(cut).url).url) == ("unknown", None)


@pytest.mark.parametrize("kind", ["nginx", "haproxy", "haproxy-tcp", "apache2"])
def test_reload_of_a_proxy_does_not_disturb_a_call(database, caller, serve, between, kind):
    arrived, go = threading.Event(), threading.Event()
    server = between(kind, serve(gated(arrived, go)).url)
    worker, job = caller(server.url), database.add_job()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(worker.run, worker.claim())
        assert arrived.wait(proxies.PATIENCE)
        server.reload()
        go.set()
        assert ended.result(proxies.PATIENCE).outcome == "succeeded"
    worker.settle()
    assert database.owed(job) is None


@pytest.mark.parametrize("kind", KINDS)
def test_proxy_that_is_killed_is_a_broken_connection(database, caller, serve, between, kind):
    arrived, go = threading.Event(), threading.Event()
    server = between(kind, serve(gated(arrived, go)).url)
    worker = caller(server.url)
    database.add_job()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(worker.run, worker.claim())
        assert arrived.wait(proxies.PATIENCE)
        server.kill()
        assert ended.result(proxies.PATIENCE).outcome == "retry"  # cannot be told from a reset
        go.set()


def gated(arrived: threading.Event, go: threading.Event):
    """A stage that says that it is at work, and answers when it may."""

    def work(connection) -> None:
        if connection.receive() is None:
            return  # the proxy was asked whether it is there
        arrived.set()
        go.wait(proxies.PATIENCE)
        connection.send(OK)

    return work


# --- application servers -------------------------------------------------------------------

HANGS = """
import hashlib, threading

def app(environ, start_response):
    threading.Event().wait(60)
"""
# No Python code runs in the meantime, so no signal handler either.
COMPUTES = HANGS.replace(
    "threading.Event().wait(60)", 'hashlib.pbkdf2_hmac("md5", b"a", b"b", 2**31 - 1)'
)
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.mark.parametrize("kind", [None, "nginx"])
def test_worker_that_gunicorn_ends_says_so(database, caller, app_server, between, kind):
    url = app_server("gunicorn", HANGS, "--timeout", "2").url
    url = between(kind, url).url if kind else url
    assert outcome(database, caller, url) == ("retry", 500)


@pytest.mark.parametrize("kind", [None, "nginx"])
def test_worker_that_gunicorn_must_kill_leaves_the_outcome_unknown(
    database, caller, app_server, between, kind
):
    url = app_server("gunicorn", COMPUTES, "--timeout", "2").url
    url = between(kind, url).url if kind else url
    assert outcome(database, caller, url) == (("unknown", 502) if kind else ("retry", None))


def test_uvicorn_that_has_all_the_work_it_may_have_is_held(database, caller, app_server):
    url = app_server("uvicorn", ASGI, "--limit-concurrency", "1").url
    assert outcome(database, caller, url) == ("held", 503)
