"""A call is over in time and in bounded memory, and its connection is only reused while fresh."""

import gzip
import time
import tracemalloc
from contextlib import contextmanager

import pytest
from conftest import ROOT
from raw_server import OK, in_turn

import config
import stage_http
from stage_http import Answer, NoAnswer, StageApi

HEAD = b"HTTP/1.1 200 OK\r\n"
MEBIBYTE = 2**20


@pytest.fixture
def api():
    """api(url): a worker's StageApi."""
    return lambda url: StageApi(config.read({"STAGE_API_URL": url}))


def post(api: StageApi, left: float = 30.0) -> Answer:
    return api.post("/x", {"job_id": 1}, {}, time.monotonic() + left)


good = in_turn(OK)


# --- deadlines -----------------------------------------------------------------------------


def silent(connection) -> None:
    connection.receive()
    connection.closing.wait(30)


def silent_within(connection) -> None:
    connection.answer(HEAD + b"Content-Length: 100\r\n\r\nx")
    connection.closing.wait(30)


@pytest.mark.parametrize("behaviour", [silent, silent_within])
def test_server_that_falls_silent_is_not_waited_for(serve, api, behaviour):
    stage_api = api(serve(behaviour, good).url)
    with pytest.raises(NoAnswer, match="timed out"):
        post(stage_api, left=0.5)
    assert post(stage_api) == Answer(200, "ok")


def test_request_that_nobody_reads_ends_at_its_deadline(serve, api):
    stage_api = api(serve(lambda connection: connection.closing.wait(30), good).url)
    with pytest.raises(NoAnswer, match="timed out"):
        stage_api.post("/x", {"text": "x" * 2**24}, {}, time.monotonic() + 2)
    assert post(stage_api) == Answer(200, "ok")


def read_late(connection) -> None:
    while not connection.closing.wait(0.5) and connection.receive():
        connection.send(OK)


def test_request_that_is_read_late_has_the_time_of_the_call(serve, api, monkeypatch):
    monkeypatch.setattr(stage_http, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(stage_http, "REUSE_WITHIN", 60.0)  # on a slow machine, too
    server = serve(read_late)
    stage_api = api(server.url)
    for _ in range(2):  # on a new connection, and on the one that is kept alive
        answer = stage_api.post("/x", {"text": "x" * 2**24}, {}, time.monotonic() + 30)
        assert answer == Answer(200, "ok") and server.connections == 1


def body_drip(connection) -> None:
    connection.answer(HEAD + b"Content-Length: 100000\r\n\r\n")
    connection.drip(b"x")


def header_drip(connection) -> None:
    connection.answer(HEAD)
    connection.drip(b"x")


def interim_drip(connection) -> None:
    connection.receive()
    connection.drip(b"HTTP/1.1 100 Continue\r\n\r\n")


def chunk_drip(connection) -> None:
    connection.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    connection.drip(b"1\r\nx\r\n")


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", [body_drip, header_drip, interim_drip, chunk_drip])
def test_call_whose_answer_comes_drop_by_drop_ends_at_its_deadline(
    database, serve, listener, behaviour
):
    process = listener(database, STAGE_API_URL=serve(behaviour).url, STAGE_TIMEOUT=1)
    assert_killed(database, process, database.add_job())


def test_call_whose_name_is_looked_up_for_ever_ends_at_its_deadline(database, listener, tmp_path):
    # As a resolver that does not answer: nothing of Python's runs within getaddrinfo().
    program = tmp_path / "hanging.py"
    program.write_text(HANGING_LOOKUP)
    process = listener(
        database, "run", program=program, STAGE_API_URL="http://stage.example", STAGE_TIMEOUT=1
    )
    assert_killed(database, process, database.add_job())


HANGING_LOOKUP = f"""
import ctypes, socket, sys
sys.path.insert(0, {str(ROOT)!r})
import listener, ops
known = socket.getaddrinfo
def lookup(host, *args, **options):
    if host == "stage.example":
        ctypes.PyDLL(None).sleep(600)  # and holds the interpreter's lock meanwhile
    return known(host, *args, **options)
socket.getaddrinfo = lookup
ops.main(listener.cli)
"""


def assert_killed(database, process, job: str) -> None:
    """The call's worker was killed, and another one has taken its place."""
    line = process.wait_for_line("파이프라인 단계 실행 실패")
    assert f"job={job} stage=vlm_analyze" in line
    assert "error=no answer within 1 s, so its worker was killed → 리스 만료 후" in line
    database.wait_for("SELECT outcome = 'unknown' FROM stage_attempts WHERE job_id = %s", job)
    assert (database.owed(job).attempts, database.owed(job).free_attempts) == (1, 0)
    assert process.stop() == 0
    assert process.output.count("실행 실패") == 1


# --- bounded memory ------------------------------------------------------------------------


@contextmanager
def at_most(size: int):
    """Fail where more than `size` bytes were in use at some time within."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size, f"{peak / MEBIBYTE:.0f} MiB were in use"


def endless_chunks(connection) -> None:
    connection.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while not connection.closing.is_set():
        connection.send(b"10000\r\n" + b"x" * 2**16 + b"\r\n")


def long(status: int, size: int):
    """A behaviour: an answer of so many MiB."""

    def answer(connection) -> None:
        head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, size * MEBIBYTE)
        connection.answer(head)
        connection.drip(b"x" * 2**16, seconds=0, times=size * 16)

    return answer


@pytest.mark.parametrize(("behaviour", "left"), [(endless_chunks, 1), (long(500, 17), 30)])
def test_long_answer_is_dropped_and_not_known(serve, api, behaviour, left):
    stage_api = api(serve(behaviour, good).url)
    with at_most(4 * MEBIBYTE), pytest.raises(NoAnswer, match="16 MiB"):
        post(stage_api, left)
    assert post(stage_api) == Answer(200, "ok")


@pytest.mark.parametrize("size", [15, 17])
def test_long_answer_that_accepts_is_read_to_its_end_and_not_kept(serve, api, size):
    stage_api = api(serve(long(200, size)).url)
    with at_most(4 * MEBIBYTE):
        assert post(stage_api) == Answer(200, "x" * 2000)


@pytest.mark.parametrize("status", [200, 302, 500])
def test_gzip_bomb_is_not_decoded(serve, api, status):
    bomb = gzip.compress(bytes(64 * MEBIBYTE), 1)
    head = b"HTTP/1.1 %d X\r\nLocation: /y\r\nContent-Encoding: gzip\r\n" % status
    answer = head + b"Content-Length: %d\r\n\r\n" % len(bomb) + bomb
    stage_api = api(serve(lambda connection: connection.answer(answer)).url)
    with at_most(4 * MEBIBYTE):
        assert post(stage_api).status == status


# --- reuse ---------------------------------------------------------------------------------


def test_connection_is_kept_alive_while_fresh(serve, api):
    server = serve(good)
    stage_api = api(server.url)
    for _ in range(3):
        stage_api.used_at = time.monotonic() - 0.1 if stage_api.used_at else 0.0
        post(stage_api)
    assert [request.connection for request in server.requests] == [1, 1, 1]


def test_connection_idle_for_more_than_two_seconds_is_not_reused(serve, api):
    server = serve(good)
    stage_api = api(server.url)
    post(stage_api)
    stage_api.used_at -= 2.1
    post(stage_api)
    assert [request.connection for request in server.requests] == [1, 2]


def test_post_on_a_connection_that_died_is_not_sent_again(serve, api, monkeypatch):
    monkeypatch.setattr(stage_http, "REUSE_WITHIN", 60.0)  # on a slow machine, too

    def once(connection):
        connection.answer(OK)
        connection.receive()

    server = serve(once, good)
    stage_api = api(server.url)
    post(stage_api)
    with pytest.raises(stage_http.Interrupted):
        post(stage_api)
    assert len(server.requests) == 2
    assert post(stage_api) == Answer(200, "ok")


def test_connection_that_the_server_closed_is_replaced(serve, api):
    def once(connection):
        connection.answer(HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok")

    server = serve(once)
    stage_api = api(server.url)
    assert [post(stage_api).status for _ in range(3)] == [200] * 3
    assert server.connections == 3
