"""What a stage function does after its POST does not hide what came of that."""

import contextlib
import signal
import threading

import pytest
import requests
from raw_server import OK, answering, in_turn
from test_trigger import reset, silent

from stage_http import Answer


def answer(status: int) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status


CUT, GATEWAY_TIMEOUT = answering(OK[:-1]), answering(answer(504))


# --- a POST without an answer --------------------------------------------------------------


def wraps(call):
    try:
        return call.post("/api/x")
    except Exception as error:
        raise RuntimeError("planner failed") from error


def swallows(call):
    with contextlib.suppress(Exception):
        call.post("/api/x")


def fails_at_its_end(call):
    try:
        return call.post("/api/x")
    finally:
        raise KeyError("files")


UNANSWERED = {
    "cut": (CUT, "unknown", "IncompleteRead"),
    "reset": (reset, "retry", "connection broke while waiting"),
    "refused": (None, "held", "stage API unreachable"),
}


@pytest.mark.parametrize("function", [wraps, swallows, fails_at_its_end])
@pytest.mark.parametrize(("behaviour", "outcome", "text"), UNANSWERED.values(), ids=UNANSWERED)
def test_post_without_an_answer_counts_whatever_the_function_makes_of_it(
    database, serve, caller, add_stage, function, behaviour, outcome, text
):
    add_stage(function)
    database.add_job("x")
    worker = caller(serve(behaviour).url if behaviour else "http://127.0.0.1:9")
    attempt = worker.call()
    assert attempt.outcome == outcome and text in attempt.error
    assert worker.line("단계 함수 오류")


def posts_again(call):
    swallows(call)
    return call.post("/api/x")


def posts_again_and_raises(call):
    posts_again(call)
    raise KeyError("files")


@pytest.mark.parametrize("function", [posts_again, posts_again_and_raises])
@pytest.mark.parametrize(("behaviour", "outcome"), [
    (in_turn(answer(500)), "unknown"), (in_turn(answer(404)), "unknown"),
    (in_turn(answer(503)), "unknown"), (reset, "unknown"), (in_turn(OK), "succeeded"),
])  # fmt: skip
def test_post_without_an_answer_may_still_run_until_another_is_accepted(
    database, serve, caller, add_stage, function, behaviour, outcome
):
    add_stage(function)
    database.add_job("x")
    assert caller(serve(CUT, behaviour).url).call().outcome == outcome


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("statuses", "outcome"), [
    ((504, 500), "unknown"), ((502, 404), "unknown"), ((409, 503), "unknown"),
    ((504, 429, 500), "unknown"), ((504, 200), "succeeded"), ((504, 200, 500), "retry"),
    ((503, 500), "retry"),
])  # fmt: skip
def test_post_whose_answer_leaves_it_open_may_run_until_another_is_accepted(
    database, serve, caller, add_stage, statuses, outcome, raises
):
    def posting(call):
        *_, last = [call.post("/api/x") for _ in statuses]
        return last if not raises else {}["files"]

    add_stage(posting)
    database.add_job("x")
    attempt = caller(serve(in_turn(*map(answer, statuses))).url).call()
    assert attempt.outcome == outcome
    if outcome == "unknown":
        assert (attempt.http_status, attempt.error) == (statuses[0], f"HTTP {statuses[0]}")


@pytest.mark.parametrize(("status", "outcome"), [
    (500, "unknown"), (422, "unknown"), (503, "unknown"), (200, "succeeded"),
])  # fmt: skip
def test_answer_of_its_own_ends_no_post_without_one_unless_it_accepts(
    database, serve, caller, add_stage, status, outcome
):
    def answering_itself(call):
        swallows(call)
        return Answer(status, "no image")

    add_stage(answering_itself)
    database.add_job("x")
    assert caller(serve(CUT).url).call().outcome == outcome


def test_answer_of_its_own_refuses_what_was_accepted(database, accepting, caller, add_stage):
    def refusing(call):
        call.post("/api/x")
        return Answer(500, "no text in it")

    add_stage(refusing)
    database.add_job("x")
    attempt = caller(accepting.url).call()
    assert (attempt.outcome, attempt.error) == ("retry", "HTTP 500: no text in it")


@pytest.mark.parametrize(
    ("behaviour", "url"),
    [(silent, None), (CUT, "http://127.0.0.1:9"), (GATEWAY_TIMEOUT, "http://127.0.0.1:9")],
    ids=["late", "refused", "refused after 504"],
)
def test_post_that_is_not_sent_says_nothing_of_the_one_before_it(
    database, serve, caller, add_stage, behaviour, url
):
    def trying_twice(call):
        swallows(call)
        call.api.url = url or call.api.url
        call.api.close()
        return call.post("/api/x")

    add_stage(trying_twice)
    database.add_job("x")
    server = serve(behaviour)
    assert caller(server.url, STAGE_TIMEOUT=0.5).call().outcome == "unknown"
    assert len(server.requests) == 1


@pytest.mark.parametrize("raised", [LookupError, SystemExit])
def test_post_that_a_signal_handler_ends_waits_for_its_lease(
    database, serve, caller, add_stage, raised
):
    def interrupt(connection):
        connection.receive()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        connection.closing.wait(30)

    def late(number, frame):
        raise raised("too late")

    before = signal.signal(signal.SIGUSR1, late)
    try:
        add_stage(lambda call: call.post("/api/x"))
        database.add_job("x")
        worker = caller(serve(interrupt).url)
        assert worker.call().outcome == "unknown"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert f"error={raised.__name__}: too late → " in worker.line("실행 실패")


# --- another request of the function -------------------------------------------------------


def tells_another(url):
    """A stage function that sends a second request, to `url`, which fails where it is refused."""

    def telling(call):
        posted = call.post("/api/x")
        requests.post(url).raise_for_status()
        return posted

    return telling


@pytest.mark.parametrize(("status", "then", "outcome"), [
    (409, 500, "unknown"), (504, 503, "unknown"), (504, 404, "unknown"), (502, 400, "unknown"),
    (503, 404, "held"), (429, 404, "held"), (503, 500, "held"),
    (500, 404, "retry"), (400, 404, "retry"), (500, 503, "retry"), (500, 504, "unknown"),
    (200, 504, "succeeded"),
])  # fmt: skip
def test_other_request_that_is_refused_does_not_replace_the_answer(
    database, serve, caller, add_stage, status, then, outcome
):
    add_stage(tells_another(serve(in_turn(answer(then))).url))
    database.add_job("x")
    attempt = caller(serve(in_turn(answer(status))).url).call()
    assert attempt.outcome == outcome
    assert attempt.http_status == (status if status in (200, 409, 429, 502, 503, 504) else None)


def test_other_request_that_is_refused_does_not_replace_a_post_without_an_answer(
    database, serve, caller, add_stage
):
    other = serve(in_turn(answer(404))).url

    def telling(call):
        swallows(call)
        requests.post(other).raise_for_status()

    add_stage(telling)
    database.add_job("x")
    assert caller(serve(CUT).url).call().outcome == "unknown"


@pytest.mark.parametrize("behaviour", [reset, in_turn(answer(503)), in_turn(answer(500))])
def test_other_request_without_an_answer_may_still_run(
    database, serve, caller, add_stage, behaviour
):
    other = serve(CUT).url

    def trying_elsewhere(call):
        swallows(call)
        requests.post(other)

    add_stage(trying_elsewhere)
    database.add_job("x")
    assert caller(serve(behaviour).url, MAX_ATTEMPTS=1).call().outcome == "unknown"


def test_exception_after_an_answer_that_asks_for_patience_holds_the_stage(
    database, serve, caller, add_stage
):
    def raising(call):
        call.post("/api/x")
        raise RuntimeError("busy")

    add_stage(raising)
    database.add_job("x")
    worker = caller(serve(in_turn(answer(503))).url)
    assert worker.call().outcome == "held" and worker.line("RuntimeError: busy")
