"""Whatever a stage API sends, a call ends in time as an Answer or as one of three exceptions, and
is accepted only where the answer came as a whole.
"""

import io
import time
from contextlib import suppress

import pytest
from fuzzing import fuzzed, joined
from hypothesis import given
from hypothesis import strategies as st
from raw_server import OK, RawServer, answering, in_turn

import config
from stage_http import Answer, Interrupted, NoAnswer, StageApi, Unreachable

pytestmark = pytest.mark.slow

# Much longer than any call here may take, on however busy a machine.
PATIENCE = 20.0


def outcome(url: str, left: float) -> Answer | Exception:
    api = StageApi(config.read({"STAGE_API_URL": url}))
    began = time.monotonic()
    try:
        return api.post("/x", {"job_id": 1}, {}, began + left)
    except (Unreachable, Interrupted, NoAnswer) as error:
        return error
    finally:
        api.close()
        assert time.monotonic() - began < PATIENCE


def accepted(result) -> bool:
    return isinstance(result, Answer) and 200 <= result.status < 300


# --- a second opinion ----------------------------------------------------------------------


def head(answer: io.BytesIO) -> list[bytes]:
    """The header lines up to the empty line; EOFError where they are cut."""
    lines = []
    while True:
        line = answer.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        if not line.strip(b"\r\n"):
            return lines
        lines += line.lower().rstrip(b"\r\n").split(b"\r")


def exactly(answer: io.BytesIO, size: int) -> None:
    if len(answer.read(min(size, 2**30))) < size:
        raise EOFError


def ends_as_said(answer: io.BytesIO, name: bytes, value: bytes) -> None:
    """Read the body; EOFError where it is shorter than the header says, or nothing says it."""
    if name == b"content-length":
        exactly(answer, int(value.split(b",")[0]))
    elif name == b"transfer-encoding" and value.strip() == b"chunked":
        while size := int(answer.readline().split(b";")[0], 16):
            exactly(answer, size + 2)
        head(answer)
    else:
        raise EOFError


def is_whole(sent: bytes) -> bool:
    """Whether `sent` begins with a whole answer, by any of its headers that say how long it is."""
    answer = io.BytesIO(sent)
    with suppress(EOFError, IndexError, ValueError):
        status, *headers = head(answer)
        while status.split()[1] == b"100":
            status, *headers = head(answer)
        if status.split()[1] == b"204":
            return True
        body = answer.read()
        for header in headers:
            with suppress(EOFError, ValueError):
                name, _, value = header.partition(b":")
                ends_as_said(io.BytesIO(body), name, value)
                return True
    return False


# --- answers -------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = {
    "length": b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 12\r\n\r\nhello, world",
    "no body": b"HTTP/1.1 201 Made\r\nContent-Length: 0\r\nServer: x\r\n\r\n",
    "chunks": CHUNKED + b"10\r\n0123456789abcdef\r\n2;x=y\r\n, \r\n00\r\nX: y\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
}


@pytest.mark.parametrize("sent", WHOLE.values(), ids=WHOLE)
def test_answer_is_accepted_whole_and_cut_nowhere(sent):
    cuts = [sent[:length] for length in range(len(sent) + 1)]
    with RawServer(*map(answering, cuts)) as server:
        taken = [cut for cut in cuts if accepted(outcome(server.url, left=PATIENCE))]
    assert taken == [sent] and is_whole(sent)


BODIES_UNTIL_THE_END = [
    b"Content-Length: \xb2", b"Content-Length: " + b"9" * 5000, b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked ", b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked\r\nContent-Length: 50", b"Content-Length : 5",
]  # fmt: skip


@pytest.mark.parametrize("headers", BODIES_UNTIL_THE_END)
def test_body_that_only_looks_framed_is_not_accepted(headers):
    with RawServer(answering(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n5\r\nhel" % headers)) as server:
        assert isinstance(outcome(server.url, left=PATIENCE), NoAnswer)


STATUS_LINES = joined(
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2", b" ", b" ", b" ", b"OK", b"\n",
    b"200", b"204", b"202", b"100", b"102", b"302", b"404", b"429", b"500", b"503", b"99", b"-200",
    other=st.binary(max_size=3), at_most=5,
)  # fmt: skip
HEADER_LINES = [
    b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: 99999999999999999999",
    b"Content-Length: 5, 5", b"Content-Length: -1", b"Content-Length:", b"Content-Length: +5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: CHUNKED", b"Transfer-Encoding: identity",
    b"Content-Encoding: gzip", b"Content-Encoding: br, zstd, x",
    b"Content-Type: text/html; charset=\xff;=;;\"", b"Connection: close",
    b"Retry-After: 3", b"Retry-After: Fri, 99 Foo 2099 25:61:61 -99999999", b"Date: soon",
    b"Set-Cookie: a=b; expires=Fri, 99-Foo-2099; domain=.; path=/; max-age=1e9",
    b"Set-Cookie: =;;,\x00", b"Location: http://[::1", b"Location: \xff//",
    b"Keep-Alive: timeout=x", b" folded", b"no colon", b": no name", b"X" * 70_000,
]  # fmt: skip
HEADERS = joined(
    *[line + b"\r\n" for line in HEADER_LINES],
    other=st.binary(max_size=9).map(lambda junk: b"X: %s\r\n" % junk),
    at_most=5,
)
BODIES = joined(
    b"hello", b"5\r\nhello\r\n", b"5;x\r\nhello\r\n", b"0\r\n", b"0\r\n\r\n", b"-1\r\n",
    b"fffffffffff\r\n", b"zz\r\n", b"\r\n", b"\x1f\x8b\x08\x00", OK, b"x" * 100_000,
    other=st.binary(max_size=9), at_most=4,
)  # fmt: skip
DAMAGED = st.builds(
    lambda sent, at, missing, junk: sent[:at] + junk + sent[at + missing :],
    st.sampled_from(list(WHOLE.values())), st.integers(0, 90), st.integers(0, 3),
    st.just(b"") | st.binary(max_size=3) | HEADERS,
)  # fmt: skip
STRANGE = st.tuples(st.just(b"HTTP/1.1 200 OK") | STATUS_LINES, HEADERS, BODIES).map(
    lambda parts: b"%s\r\n%s\r\n%s" % parts
)
ANSWERS = DAMAGED | STRANGE


@pytest.mark.filterwarnings("error")
@fuzzed(150)
@given(sent=ANSWERS, cut=st.none() | st.integers(0, 200), end=st.sampled_from(["close", "reset"]))
def test_any_answer_has_an_outcome_and_success_is_whole(sent, cut, end):
    sent = sent[:cut]

    def behave(connection) -> None:
        connection.answer(sent)
        if end == "reset":
            connection.reset()

    with RawServer(behave, in_turn(OK)) as server:
        result = outcome(server.url, left=PATIENCE)
        assert is_whole(sent) or not accepted(result), (sent, result)


@fuzzed(12)
@given(sent=ANSWERS)
def test_any_answer_that_does_not_end_has_its_outcome_in_time(sent):
    def behave(connection) -> None:
        connection.answer(sent)
        connection.closing.wait(2 * PATIENCE)

    with RawServer(behave) as server:
        result = outcome(server.url, left=0.3)
        assert is_whole(sent) or not accepted(result), (sent, result)
