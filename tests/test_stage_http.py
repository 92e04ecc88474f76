"""The outcome of a POST, whatever the server does: accepted, not sent, broken, or not known."""

import contextlib
import socket
import time

import pytest
from raw_server import OK, answering, in_turn

import config
import stage_http
from stage_http import Answer, Interrupted, NoAnswer, StageApi, Unreachable

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def api():
    """api(url): a worker's StageApi."""
    return lambda url: StageApi(config.read({"STAGE_API_URL": url}))


def post(api: StageApi, left: float = 30.0) -> Answer:
    return api.post("/x", {"job_id": 1}, {}, time.monotonic() + left)


def assert_usable(api: StageApi) -> None:
    """The next call gets its own answer."""
    assert post(api) == Answer(200, "ok")


good = in_turn(OK)


# --- accepted ------------------------------------------------------------------------------


COMPLETE = {
    "length": (HEAD + b"Content-Length: 5\r\n\r\nhello", Answer(200, "hello")),
    "empty": (HEAD + b"Content-Length: 0\r\n\r\n", Answer(200)),
    "chunks": (CHUNKED + b"5\r\nhello\r\n3\r\n, x\r\n0\r\n\r\n", Answer(200, "hello, x")),
    "no chunks": (CHUNKED + b"0\r\n\r\n", Answer(200)),
    "202": (b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", Answer(202)),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204)),
    "HTTP 1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", Answer(200, "ok")),
    "100 before": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Answer(200, "ok")),
    "102 before": (b"HTTP/1.1 102 Processing\r\n\r\n" + OK, Answer(200, "ok")),
    "103 before": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK, Answer(200, "ok")),
    "many before": (
        (b"HTTP/1.1 102 X\r\n\r\nHTTP/1.1 100 X\r\n\r\nHTTP/1.1 199 X\r\nA: b\r\n\r\n" * 9) + OK,
        Answer(200, "ok"),
    ),
    "bytes": (HEAD + b"Content-Length: 4\r\n\r\n\xff\x00\xea\xb0", Answer(200, "\ufffd\0\ufffd")),
    "HTML": (HEAD + b"Content-Length: 13\r\n\r\n<html></html>", Answer(200, "<html></html>")),
    "NaN": (HEAD + b"Content-Length: 3\r\n\r\nNaN", Answer(200, "NaN")),
}


@pytest.mark.parametrize(("sent", "answer"), COMPLETE.values(), ids=COMPLETE)
def test_complete_answer_is_accepted(serve, api, sent, answer):
    assert post(api(serve(answering(sent)).url)) == answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"HTTP/1.1 500 Oops\r\n\r\nno length", 500),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", 404),
        (b"HTTP/1.1 302 Found\r\nLocation: /login\r\n\r\n", 302),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", 304),
    ],
)
def test_refusal_needs_no_framing(serve, api, sent, status):
    assert post(api(serve(answering(sent)).url)).status == status


# --- not known -----------------------------------------------------------------------------


CUT = {
    "half a status line": b"HTTP/1.1 20",
    "a status line": b"HTTP/1.1 200",
    "a complete status line": HEAD,
    "half a header": HEAD + b"Content-Len",
    "half a body": HEAD + b"Content-Length: 20\r\n\r\nhello",
    "no length": HEAD + b"\r\nhello",
    "a length in words": HEAD + b"Content-Length: two\r\n\r\nok",
    "a negative length": HEAD + b"Content-Length: -2\r\n\r\nok",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\nok",
    "no chunk": CHUNKED,
    "no last chunk": CHUNKED + b"5\r\nhello\r\n",
    "half a chunk": CHUNKED + b"5\r\nhe",
    "a bad chunk": CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n",
    "a negative chunk": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "200 headers": HEAD + b"X: y\r\n" * 200 + b"Content-Length: 0\r\n\r\n",
    "a long header": HEAD + b"X: " + b"y" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\n\r\n",
    "half an interim answer": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n",
    "another protocol instead": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
}


@pytest.mark.parametrize("sent", CUT.values(), ids=CUT)
def test_answer_that_may_have_been_cut_is_not_known(serve, api, sent):
    stage_api = api(serve(answering(sent), good).url)
    with pytest.raises(NoAnswer):
        post(stage_api)
    assert_usable(stage_api)


def test_connection_reset_within_the_answer_is_not_known(serve, api):
    def reset_in_body(connection):
        # More than the buffers take, so that its beginning has been read before the reset.
        connection.answer(HEAD + b"Content-Length: %d\r\n\r\n" % 2**25 + bytes(2**24))
        connection.reset()

    stage_api = api(serve(reset_in_body, good).url)
    with pytest.raises(NoAnswer):
        post(stage_api)
    assert_usable(stage_api)


def test_answer_after_an_interim_one_is_not_taken_for_that_of_the_next_call(
    serve, api, monkeypatch
):
    monkeypatch.setattr(stage_http, "REUSE_WITHIN", 60.0)  # on a slow machine, too

    def interim(connection):
        connection.answer(OK)  # so that the connection is kept alive
        connection.answer(b"HTTP/1.1 102 Processing\r\n\r\n")
        connection.send(HEAD + b"Content-Length: 10\r\n\r\nthe second")
        connection.answer(OK)

    stage_api = api(serve(interim).url)
    assert_usable(stage_api)
    assert post(stage_api) == Answer(200, "the second")
    assert_usable(stage_api)


# --- the connection broke ------------------------------------------------------------------


def reset(connection) -> None:
    connection.receive()
    connection.reset()


@pytest.mark.parametrize("hang_up", [reset, answering(b"")], ids=["reset", "close"])
def test_connection_that_ends_before_the_answer_is_broken(serve, api, hang_up):
    stage_api = api(serve(hang_up, good).url)
    with pytest.raises(Interrupted):
        post(stage_api)
    assert_usable(stage_api)


# --- not sent ------------------------------------------------------------------------------


def test_refused_connection_is_not_sent(api):
    with pytest.raises(Unreachable, match="refused"):
        post(api("http://127.0.0.1:9"))


def test_unknown_host_is_not_sent(api):
    with pytest.raises(Unreachable):
        post(api("http://stage-api.invalid"))


@contextlib.contextmanager
def black_hole():
    """A port of 127.0.0.1 that neither accepts nor refuses: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_connect_that_is_never_answered_is_not_sent(api):
    with black_hole() as url, pytest.raises(Unreachable):
        post(api(url), left=0.5)


# --- redirects -----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(serve, api, status):
    elsewhere = serve(good)
    location = f"Location: {elsewhere.url}/there\r\n".encode()
    redirect = b"HTTP/1.1 %d Moved\r\n%sContent-Length: 0\r\n\r\n" % (status, location)
    server = serve(in_turn(redirect))
    assert post(api(server.url)).status == status
    assert (len(server.requests), elsewhere.connections) == (1, 0)


@pytest.mark.parametrize("location", [b"http://[::1", b"\xff\xfe", b"//", b"http://", b""])
def test_redirect_to_nonsense_is_a_redirect(serve, api, location):
    answer = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % location
    assert post(api(serve(answering(answer)).url)) == Answer(302)


# --- cookies -------------------------------------------------------------------------------


def test_cookie_of_one_answer_is_not_sent_with_the_next_call(serve, api):
    answer = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: session=stolen; Path=/\r\n\r\n")
    server = serve(in_turn(answer))
    stage_api = api(server.url)
    assert [post(stage_api), post(stage_api)] == [Answer(200, "ok")] * 2
    assert ["cookie" in request.headers for request in server.requests] == [False, False]


# --- Retry-After ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3), (" 3 ", 3), ("0", None), ("-5", None), ("soon", None), ("", None),
        ("1e9", None), ("3.5", None), ("3600", 3600), ("999999999", 3600), ("9" * 5000, 3600),
        ("Fri, 01 Jan 2099 00:00:00 GMT", 3600), ("Fri, 99 Jan 2099 00:00:00 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None), ("Sun Nov  6 08:49:37 1994", None),
        ("3, 4", None), ("\xb3", None), ("0x10", None),
    ],
)  # fmt: skip
def test_retry_after_is_safely_read_and_clamped(serve, api, text, seconds):
    header = f"Retry-After: {text}\r\n".encode("latin-1")
    answer = b"HTTP/1.1 503 Busy\r\n%sContent-Length: 0\r\n\r\n" % header
    assert post(api(serve(answering(answer)).url)).retry_after == seconds


def test_retry_after_date_is_measured_by_the_clock_of_the_server(serve, api):
    dates = "Date: Sun, 06 Nov 1994 08:00:00 GMT\r\nRetry-After: Sun, 06 Nov 1994 08:00:20 GMT"
    answer = f"HTTP/1.1 429 Wait\r\n{dates}\r\nContent-Length: 0\r\n\r\n".encode()
    assert post(api(serve(answering(answer)).url)).retry_after == 20


def test_retry_after_date_is_seconds_from_now(serve, api):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 600))
    answer = f"HTTP/1.1 429 Wait\r\nRetry-After: {date}\r\nContent-Length: 0\r\n\r\n".encode()
    assert 500 < post(api(serve(answering(answer)).url)).retry_after <= 600


# --- the address ---------------------------------------------------------------------------


def test_ipv6_address_is_called(serve, api):
    server = serve(good, host="::1")
    assert post(api(server.url)) == Answer(200, "ok")
    assert server.requests[0].headers["host"] == server.url.removeprefix("http://")
