"""Stage functions as people write them: their lookups, and the outcome of their mistakes."""

import asyncio
import json
import math
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import requests
import trustme
from claims import LEASE_OVER, claim, connected, result, settle
from commands import run_here
from conftest import ROOT, install
from faults.network import require_root
from faults.test_claims import with_idle_worker
from raw_server import OK, answering, in_turn
from stage_functions import BREAK
from test_stage_http import black_hole
from waiting import AWAY, wait_until_idle

import trigger
from demo import five_stages
from trigger import boottime

ERROR = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
TABLE = "CREATE TABLE texts (job_id uuid, text text, proposal_id bigint)"
ADD = "INSERT INTO texts VALUES (%s, %s, %s)"
FIND = "SELECT text, proposal_id FROM texts WHERE job_id = %(job_id)s"


def fails(error: BaseException):
    """A stage function that raises."""

    def failing(call):
        raise error

    return failing


# --- mistakes ------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


MISTAKES = {
    "RuntimeError: broken": RuntimeError("broken"),
    "KeyError: 'x'": KeyError("x"),
    "OSError: [Errno 24] files": OSError(24, "files"),
    "SyntaxError: here": SyntaxError("here", ("stages.py", 7, 1, "def x(")),
    "asyncio.exceptions.CancelledError": asyncio.CancelledError(),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "SystemExit: 0": SystemExit(0),
}


@pytest.mark.parametrize(("text", "error"), MISTAKES.items(), ids=MISTAKES)
def test_exception_is_a_failed_attempt_with_a_traceback(
    database, accepting, caller, add_stage, text, error
):
    add_stage(fails(error))
    job = database.add_job("x")
    worker = caller(accepting.url, MAX_ATTEMPTS=2)
    attempt = worker.call()
    assert (attempt.outcome, attempt.error) == ("retry", text)
    assert f"job={job} stage=failing" in worker.line("단계 함수 오류")
    assert f"job={job} stage=failing attempt=1/2 error={text} → " in worker.line("실행 실패")
    assert worker.line("Traceback") and worker.line("raise error")
    assert worker.call_again().outcome == "failed"
    assert database.owed(job).given_up and accepting.connections == 0


def test_exception_that_cannot_be_printed_is_named(database, accepting, caller, add_stage):
    add_stage(fails(Unprintable()))
    database.add_job("x")
    worker = caller(accepting.url)
    attempt = worker.call()
    assert attempt.outcome == "retry" and "Unprintable: <exception str() failed>" in attempt.error
    assert "Unprintable" in worker.line("실행 실패")


def program(tmp_path, *lines: str):
    """A listener whose vlm_judge does what `lines` say."""
    path = tmp_path / "program.py"
    path.write_text("\n".join([
        "import asyncio, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import listener, ops",
        "from demo import five_stages",
        "def vlm_judge(call):",
        *[f"    {line}" for line in lines],
        "five_stages.PIPELINE['overlay', 'done'] = vlm_judge",
        "ops.main(listener.cli)",
    ]))  # fmt: skip
    return path


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit(3)", "asyncio.CancelledError"])
def test_worker_outlives_what_its_function_raises(database, api, listener, tmp_path, error):
    raising = program(tmp_path, f"if call.attempt == 1: raise {error}", "return call.post('/x')")
    process = listener(database, "run", "--workers", "1", api=api, program=raising)
    wait_until_idle(tmp_path)
    before = process.children()
    job = database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 2 FROM stage_attempts WHERE job_id = %s", job)
    assert database.attempts(job)[0].outcome == "retry"
    assert process.children() == before
    assert process.stop() == 0


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="Python 3.11 has notes first")
def test_note_of_an_exception_does_not_take_its_place(database, accepting, caller, add_stage):
    error = RuntimeError("broken")
    error.add_note("a hint")
    add_stage(fails(error))
    database.add_job("x")
    assert caller(accepting.url).call().error == "RuntimeError: broken"


def test_syntax_error_is_named(database, accepting, caller, add_stage):
    def careless(call):
        exec("1 +")

    add_stage(careless)
    database.add_job("x")
    assert caller(accepting.url).call().error == "SyntaxError: invalid syntax"


def test_loop_goes_on_after_a_mistake(database, accepting, caller, add_stage):
    add_stage(fails(RuntimeError("broken")))
    database.add_job("x"), database.add_job("img_gen")
    worker = caller(accepting.url)
    assert {worker.call().outcome, worker.call().outcome} == {"retry", "succeeded"}


@pytest.mark.parametrize("result", [None, "ok", 200, True, {"status": 200}])
def test_function_that_returns_no_answer_is_a_failed_attempt(
    database, accepting, caller, add_stage, result
):
    def odd(call):
        return result

    add_stage(odd)
    database.add_job("x")
    attempt = caller(accepting.url).call()
    assert attempt.outcome == "retry"
    assert attempt.error == "TypeError: stage function odd must return call.post(...)"


def test_function_that_forgets_to_return_its_answer_has_it_counted(
    database, accepting, caller, add_stage
):
    def forgetful(call):
        call.post("/api/x")

    add_stage(forgetful)
    database.add_job("x")
    assert caller(accepting.url).call().outcome == "succeeded"


def posts_and(then):
    """A stage function that goes on after its call was accepted."""

    def posting(call):
        call.post("/api/x")
        return then(call)

    return posting


def raise_error(call):
    raise RuntimeError("after the answer")


def lose_connection(call):
    call.fetch_one("SELECT pg_terminate_backend(pg_backend_pid())")


def find_nothing(call):
    call.fetch_one("SELECT 1 WHERE false")


def send_elsewhere(call):
    requests.post("http://127.0.0.1:9")


def be_refused_elsewhere(call):
    response = requests.Response()
    response.status_code = 500
    response.raise_for_status()


def be_interrupted(call):
    raise KeyboardInterrupt


AFTERWARDS = [raise_error, lose_connection, find_nothing, send_elsewhere, be_refused_elsewhere,
              be_interrupted, lambda call: 42]  # fmt: skip


@pytest.mark.parametrize("then", AFTERWARDS)
def test_accepted_call_stays_accepted_whatever_the_function_does_next(
    database, accepting, caller, add_stage, then
):
    add_stage(posts_and(then))
    job = database.add_job("x")
    assert caller(accepting.url).call().outcome == "succeeded"
    assert database.owed(job) is None and len(accepting.requests) == 1


def posts_twice(call):
    call.post("/api/x")
    call.post("/api/y")


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [([ERROR, OK], "succeeded"), ([OK, ERROR], "retry"), ([OK, OK[:-1]], "unknown")],
)
def test_last_of_several_posts_counts(database, serve, caller, add_stage, answers, outcome):
    add_stage(posts_twice)
    database.add_job("x")
    server = serve(in_turn(*answers))
    assert caller(server.url, STAGE_TIMEOUT=1).call().outcome == outcome
    assert len(server.requests) == 2


def test_exception_after_a_refusal_is_retried(database, serve, caller, add_stage):
    add_stage(posts_and(raise_error))
    database.add_job("x")
    attempt = caller(serve(in_turn(ERROR)).url).call()
    assert (attempt.outcome, attempt.error) == ("retry", "RuntimeError: after the answer")


def test_exception_after_an_answer_of_a_call_that_may_run_waits_for_its_lease(
    database, serve, caller, add_stage
):
    add_stage(posts_and(raise_error))
    database.add_job("x")
    gateway = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
    calling = caller(serve(in_turn(gateway)).url)
    assert calling.call().outcome == "unknown"
    assert calling.line("RuntimeError: after the answer")


def test_nan_in_a_field_is_a_failed_attempt(database, accepting, caller, add_stage):
    add_stage(lambda call: call.post("/api/x", score=float("nan")))
    database.add_job("x")
    attempt = caller(accepting.url).call()
    assert attempt.outcome == "retry" and "JSON" in attempt.error
    assert accepting.connections == 0


# --- requests of its own -------------------------------------------------------------------


def sends(**options):
    """A stage function that sends its request itself."""

    def own_request(call):
        return requests.post(call.api.url + "/api/x", json={"id": call.key}, **options)

    return own_request


def reply(status: int, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 %d X" % status, b"Content-Length: 2", *headers, b"", b"no"])


STATUSES = {
    200: "succeeded", 204: "succeeded", 302: "failed", 404: "failed", 409: "unknown",
    429: "held", 500: "retry", 503: "held", 504: "unknown",
}  # fmt: skip


@pytest.mark.parametrize(("status", "outcome"), STATUSES.items())
def test_response_of_its_own_request_counts_as_that_of_post(
    database, serve, caller, add_stage, status, outcome
):
    add_stage(sends(allow_redirects=False))
    database.add_job("x")
    answer = b"HTTP/1.1 204 X\r\n\r\n" if status == 204 else reply(status, b"Retry-After: 7")
    attempt = caller(serve(in_turn(answer)).url).call()
    assert (attempt.outcome, attempt.http_status) == (outcome, status)
    assert attempt.error == (None if outcome == "succeeded" else f"HTTP {status}: no")
    holds = database.rows("SELECT hold_seconds FROM pipeline_stages WHERE held_until > now()")
    assert holds == ([(7,)] if outcome == "held" else [])


@pytest.mark.parametrize(("status", "outcome"), [(404, "failed"), (500, "retry"), (503, "held")])
def test_raise_for_status_says_what_the_answer_says(
    database, serve, caller, add_stage, status, outcome
):
    def raising(call):
        response = sends()(call)
        response.raise_for_status()
        return response

    add_stage(raising)
    database.add_job("x")
    worker = caller(serve(in_turn(reply(status))).url)
    attempt = worker.call()
    assert (attempt.outcome, attempt.http_status) == (outcome, status)
    assert attempt.error == f"HTTP {status}: no" and "Traceback" not in worker.output.getvalue()


@pytest.mark.parametrize(("status", "outcome"), [(200, "succeeded"), (500, "retry")])
def test_response_that_the_function_has_read_as_a_stream_counts(
    database, serve, caller, add_stage, status, outcome
):
    def streaming(call):
        response = sends(stream=True)(call)
        assert [*response.iter_lines()] == [b"no"]
        response.raise_for_status()
        return response

    add_stage(streaming)
    database.add_job("x")
    attempt = caller(serve(in_turn(reply(status))).url).call()
    assert (attempt.outcome, attempt.http_status) == (outcome, status)
    assert attempt.error == (None if outcome == "succeeded" else "HTTP 500")


@pytest.mark.parametrize(
    ("status", "outcome", "method"),
    [(302, "failed", "GET"), (303, "failed", "GET"), (307, "succeeded", "POST")],
)
def test_redirect_that_is_followed_with_a_get_is_not_the_answer_of_the_stage(
    database, serve, caller, add_stage, status, outcome, method
):
    login = serve(in_turn(OK))
    add_stage(sends())
    database.add_job("x")
    redirect = reply(status, b"Location: %s/login" % login.url.encode())
    attempt = caller(serve(in_turn(redirect)).url).call()
    assert (attempt.outcome, attempt.http_status) == (outcome, 200 if method == "POST" else status)
    assert login.requests[0].head.startswith(f"{method} /login ")


def test_http_error_without_an_answer_is_named(database, accepting, caller, add_stage):
    add_stage(fails(requests.HTTPError("made up")))
    database.add_job("x")
    attempt = caller(accepting.url).call()
    assert (attempt.outcome, attempt.error) == ("retry", "requests.exceptions.HTTPError: made up")


def silent(connection) -> None:
    connection.receive()
    connection.closing.wait(30)


def reset(connection) -> None:
    connection.receive()
    connection.reset()


def untrusted(serve) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return serve(in_turn(OK), tls=context).url


NO_GZIP = OK.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
BROKEN = {
    "read timeout": (silent, {"timeout": 0.3}, "unknown", "timed out"),
    "cut": (answering(OK[:-1]), {}, "unknown", "IncompleteRead"),
    "cut in a stream": (answering(OK[:-1]), {"stream": True}, "unknown", "IncompleteRead"),
    "no gzip": (answering(NO_GZIP), {}, "unknown", "incorrect header check"),
    "reset": (reset, {}, "retry", "connection broke while waiting: ConnectionResetError"),
}


@pytest.mark.parametrize(("behaviour", "options", "outcome", "text"), BROKEN.values(), ids=BROKEN)
def test_own_request_that_breaks_is_told_apart(
    database, serve, caller, add_stage, behaviour, options, outcome, text
):
    add_stage(sends(**options))
    database.add_job("x")
    worker = caller(serve(behaviour).url)
    attempt = worker.call()
    assert attempt.outcome == outcome and text in attempt.error
    assert "Traceback" not in worker.output.getvalue()


def test_own_request_that_is_reset_within_its_answer_waits_for_its_lease(
    database, serve, caller, add_stage
):
    begun = threading.Event()

    def reset_within(connection):
        connection.answer(OK[:-1])
        begun.wait(30)
        connection.reset()

    def streaming(call):
        response = sends(stream=True)(call)
        begun.set()
        return response

    add_stage(streaming)
    database.add_job("x")
    attempt = caller(serve(reset_within).url).call()
    assert attempt.outcome == "unknown" and "ConnectionResetError" in attempt.error


@pytest.mark.parametrize(
    "url", [lambda _: "http://127.0.0.1:9", lambda _: "http://stage-api.invalid", untrusted],
    ids=["refused", "DNS", "TLS"],
)  # fmt: skip
def test_own_request_that_cannot_connect_holds_the_stage(database, serve, caller, add_stage, url):
    add_stage(sends())
    job = database.add_job("x")
    attempt = caller(url(serve)).call()
    assert attempt.outcome == "held" and attempt.error.startswith("stage API unreachable: ")
    assert database.owed(job).free_attempts == 1
    held = "SELECT hold_seconds FROM pipeline_stages WHERE held_until IS NOT NULL"
    assert database.value(held) == 1


NO_TUNNEL = answering(b"HTTP/1.1 503 No tunnel\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(
    ("behaviour", "scheme", "outcome"),
    [(reset, "http", "retry"), (answering(b""), "http", "retry"), (NO_TUNNEL, "https", "held")],
    ids=["reset", "closed", "no tunnel"],
)
def test_own_request_whose_proxy_breaks_is_told_from_one_that_it_refuses(
    database, serve, caller, add_stage, behaviour, scheme, outcome
):
    proxy, url = serve(behaviour), f"{scheme}://stage-api.invalid"
    add_stage(lambda call: requests.post(url, proxies={scheme: proxy.url}))
    database.add_job("x")
    assert caller(url).call().outcome == outcome and len(proxy.requests) == 1


def test_own_request_whose_connect_times_out_holds_the_stage(database, caller, add_stage):
    add_stage(sends(timeout=0.3))
    database.add_job("x")
    with black_hole() as url:
        assert caller(url).call().outcome == "held"


# --- texts ---------------------------------------------------------------------------------

ODD_TEXTS = {
    "surrogate": "lone \ud800 surrogate",
    "NUL": "NUL \0",
    "long": "x" * 10**6,
    "control": "\r\n\x1b[31m",
}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_any_error_text_can_be_recorded(database, accepting, caller, add_stage, text):
    add_stage(fails(RuntimeError(text)))
    job = database.add_job("x")
    attempt = caller(accepting.url).call()
    assert attempt.outcome == "retry" and attempt.error.startswith("RuntimeError: ")
    assert len(attempt.error) <= 2000 and len(database.owed(job).last_error) <= 2000


def test_call_of_a_state_that_left_pipeline_waits_and_is_made_once_it_is_back(
    database, accepting, caller, add_stage
):
    def leaving(call):
        return call.post("/api/x")

    add_stage(leaving, "x")
    add_stage(leaving, "y")  # so that its calls are claimed
    job = database.add_job("x")
    del five_stages.PIPELINE["x", "done"]
    database.rows("DELETE FROM pipeline_stages WHERE current_step = 'x'")
    worker = caller(accepting.url)
    assert worker.claim() is None
    database.rows("UPDATE stage_calls SET due_at = now()")
    assert worker.claim() is None and database.owed(job).attempts == 1  # not claimed again
    assert database.attempts(job) == [] and not database.owed(job).given_up
    assert worker.line("다른 PIPELINE의 호출을 미룸").endswith("(x, done) → leaving")
    said = run_here(database.environ, "status").out
    assert "5 min: ./jsl cancel --stage 'leaving of (x, done)'" in said
    said = run_here(database.environ, "job", job).out
    assert "leaving of (x, done) waits: PIPELINE has no stage leaving of (x, done)" in said
    five_stages.PIPELINE["x", "done"] = leaving
    install(database)
    call = caller(accepting.url, "new").claim()
    assert (call.job_id, call.spent, database.owed(job).stage) == (job, 1, "leaving")


def test_call_of_a_newer_pipeline_waits_for_its_listener(database, accepting, caller, add_stage):
    """`make trigger` comes first in a deploy; the old listener is still there."""

    def arriving(call):
        return call.post("/api/x")

    add_stage(arriving, "x")
    add_stage(arriving, "y")
    job = database.add_job("x")
    del five_stages.PIPELINE["x", "done"]
    old = caller(accepting.url)
    for _ in range(8):
        assert old.claim() is None
        database.rows("UPDATE stage_calls SET due_at = now()")
    assert database.attempts(job) == [] and not database.owed(job).given_up
    assert "(x, done)" in old.line("다른 PIPELINE의 호출을 미룸")
    five_stages.PIPELINE["x", "done"] = arriving
    call = caller(accepting.url, "new").claim()
    assert (call.job_id, call.spent) == (job, 1)


def test_call_of_a_table_that_left_pipeline_keeps_no_other_from_being_made(
    database, accepting, caller, add_stage
):
    def shared(call):
        return call.post("/api/x")

    add_stage(shared, "x")
    gone, job = database.add_job("x"), database.add_job("x")
    database.rows("UPDATE stage_calls SET table_name = 'variants' WHERE job_id = %s", gone)
    worker = caller(accepting.url, RETRY_DELAY=600)
    assert worker.call().outcome == "succeeded" and database.owed(job) is None
    assert worker.claim() is None
    assert database.attempts(gone) == [] and not database.owed(gone).given_up
    assert "variants (x, done) → shared" in worker.line("다른 PIPELINE의 호출을 미룸")


def test_call_of_a_stage_that_left_pipeline_stays_visible(database, accepting, caller, add_stage):
    def leaving(call):
        return call.post("/api/x")

    add_stage(leaving, "x")
    job = database.add_job("x")
    del five_stages.PIPELINE["x", "done"]
    assert caller(accepting.url).claim() is None
    assert database.owed(job).stage == "leaving"


# --- what the body needs -------------------------------------------------------------------


@pytest.fixture
def asking(database, accepting, caller, add_stage):
    """asking(sql): a worker whose stage adds what the query finds, and a job that owes its call."""

    def make(sql: str, **params):
        def overlay_with_text(call):
            found = call.fetch_one(sql, **params)
            return call.post("/api/x", **found._asdict())

        add_stage(overlay_with_text)
        database.rows(TABLE)
        return caller(accepting.url), database.add_job("x")

    return make


def test_query_adds_what_it_finds(database, accepting, asking):
    worker, job = asking(FIND)
    database.rows(ADD, job, "안녕", 7)
    assert worker.call().outcome == "succeeded"
    body = json.loads(accepting.requests[0].body)
    assert body == {"job_id": job, "tenant_id": "tenant", "text": "안녕", "proposal_id": 7}


def test_query_has_parameters_of_its_own(database, accepting, asking):
    sql = "SELECT %(job_id)s::text AS job, %(tenant_id)s AS tenant, %(limit)s AS limit"
    worker, job = asking(sql, limit=3)
    worker.call()
    body = json.loads(accepting.requests[0].body)
    assert (body["job"], body["tenant"], body["limit"]) == (job, "tenant", 3)


def test_query_without_a_row_is_a_failed_attempt_that_says_so(accepting, asking):
    worker, _ = asking(FIND)
    attempt = worker.call()
    assert attempt.outcome == "retry"
    assert attempt.error == f"pipeline.MissingValue: no row for this job in: {FIND}"
    assert accepting.connections == 0
    assert "Traceback" not in worker.output.getvalue()


@pytest.mark.parametrize(
    ("values", "missing"),
    [((None, 7), "text"), (("a", None), "proposal_id"), ((None, None), "text, proposal_id")],
)
def test_null_is_a_failed_attempt_that_names_the_column(
    database, accepting, asking, values, missing
):
    worker, job = asking(FIND)
    database.rows(ADD, job, *values)
    assert worker.call().error.startswith(f"pipeline.MissingValue: {missing} is NULL in: ")
    assert accepting.connections == 0


def test_missing_value_is_found_by_a_later_attempt(database, asking):
    worker, job = asking(FIND)
    worker.call()
    database.rows(ADD, job, "late", 1)
    assert worker.call_again().outcome == "succeeded"


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        (
            "INSERT INTO texts VALUES (%(job_id)s) RETURNING 1 AS one",
            "psycopg2.errors.ReadOnlySqlTransaction: ",
        ),
        ("SELECT nextval('stage_calls_call_id_seq')", "psycopg2.errors.ReadOnlySqlTransaction: "),
        ("SELECT * FROM nowhere", "psycopg2.errors.UndefinedTable: "),
        ("SELEKT", "psycopg2.errors.SyntaxError: "),
        ("SELECT 1/0", "psycopg2.errors.DivisionByZero: "),
        ("SELECT %(unknown)s", "KeyError: "),
    ],
)
def test_query_that_fails_is_a_failed_attempt(database, accepting, asking, sql, error):
    worker, job = asking(sql)
    attempt = worker.call()
    assert (attempt.outcome, attempt.error[: len(error)]) == ("retry", error)
    assert worker.line("Traceback") and accepting.connections == 0
    assert database.owed(job).free_attempts == 0
    assert database.value("SELECT count(*) FROM texts") == 0


def test_lookup_without_a_database_costs_no_attempt_and_holds_its_stage(database, asking):
    worker, job = asking("SELECT 1 AS one")
    call, there = worker.claim(), vars(worker.settings).copy()
    vars(worker.settings).update(AWAY)
    worker.run(call)
    vars(worker.settings).update(there)
    worker.settle()
    [attempt], owed = database.attempts(job), database.owed(job)
    assert attempt.outcome == "held"
    assert attempt.error.startswith("no database for the stage function: ")
    assert (owed.attempts, owed.free_attempts, owed.worker) == (1, 1, None)
    assert owed.due_at - attempt.finished_at == timedelta(seconds=1)
    held = "SELECT stage FROM pipeline_stages WHERE held_until > %s"
    assert database.value(held, attempt.finished_at) == attempt.stage
    assert "Traceback" not in worker.output.getvalue()
    assert worker.call_again().outcome == "succeeded"


def test_lookup_that_loses_its_connection_sends_nothing_and_is_an_attempt(
    database, accepting, asking
):
    worker, job = asking("SELECT pg_terminate_backend(pg_backend_pid())")
    assert worker.call().outcome == "retry"
    assert database.owed(job).free_attempts == 0
    assert accepting.connections == 0


def test_lookup_leaves_no_connection_while_the_stage_works(database, serve, caller, add_stage):
    def looking(call):
        found = call.fetch_one("SELECT pg_backend_pid() AS pid")
        return call.post("/api/x", pid=found.pid)

    def check(connection) -> None:
        pid = json.loads(connection.receive().body)["pid"]
        gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
        database.wait_for(gone, pid)
        connection.send(OK)

    add_stage(looking)
    database.add_job("x")
    assert caller(serve(check).url).call().outcome == "succeeded"


def test_query_is_planned_as_usual(database, accepting, asking):
    names = ["enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_sort"]
    settings = "SELECT " + ", ".join(f"current_setting('{name}') AS {name}" for name in names)
    worker, _ = asking(settings)
    worker.call()
    found = json.loads(accepting.requests[0].body)
    assert {name: found[name] for name in names} == database.row(settings)._asdict()


# --- a lease that does not cover the call --------------------------------------------------


def test_call_that_its_lease_does_not_cover_is_not_made(database, accepting, asking):
    worker, _ = asking("SELECT 1 AS one")
    call = worker.claim()
    call.leased_until = boottime() + call.timeout
    assert worker.trigger.run(call).outcome == "released"
    assert accepting.connections == 0


def test_lease_runs_on_while_the_machine_is_suspended():
    """A namespace sets that clock apart which counts such a time, as a suspension would."""
    require_root("unshare")
    asked = "import time, trigger; print(trigger.boottime() - time.monotonic())"
    suspended = ["unshare", "--time", "--boottime", "3600", "--fork"]
    done = subprocess.run([*suspended, sys.executable, "-c", asked], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    if "unshare" in done.stderr:
        pytest.skip(f"no time namespaces here: {done.stderr}")
    assert float(done.stdout) > 3000


def test_call_released_at_a_stop_is_due_again_at_once(database, api, listener, tmp_path):
    lease = {"STAGE_TIMEOUT": 30, "LEASE_MARGIN": 1}
    process = listener(database, "run", "--workers", "1", api=api, **lease)
    wait_until_idle(tmp_path)
    [worker] = process.children()
    os.kill(worker, signal.SIGSTOP)
    database.add_job("overlay", "done")
    database.wait_for("SELECT clock_timestamp() > started_at + interval '1 s' FROM stage_calls")
    process.signal(signal.SIGTERM)
    process.wait_for_line("중지 요청")
    os.kill(worker, signal.SIGCONT)
    assert process.wait() == 0 and api.requests == []
    due = "SELECT due_at <= now() AND attempts = free_attempts FROM stage_calls"
    assert database.value(due)
    assert database.value("SELECT count(*) FROM stage_leases") == 0


def test_run_once_does_not_end_before_a_released_call_is_made(
    database, accepting, caller, monkeypatch
):
    database.add_job("overlay", "done")
    claiming = caller(accepting.url)
    listener = with_idle_worker(claiming.listener)
    listener.once = True
    [call] = listener.settle_and_claim(claiming.conn)
    assert listener.settle_and_claim(claiming.conn) == [] and listener.finished()
    released = [(call, trigger.result(call, "released"))]
    monkeypatch.setattr(listener.workers, "collect", lambda ready: released)
    listener.collect([])
    assert not listener.finished()
    [again] = listener.settle_and_claim(claiming.conn)
    assert again.attempt == 2


def test_call_released_while_others_end_at_a_stop_is_given_back(
    database, accepting, caller, monkeypatch
):
    database.add_job("overlay", "done")
    claiming = caller(accepting.url)
    listener = with_idle_worker(claiming.listener)
    [call] = listener.settle_and_claim(claiming.conn)
    listener.signals.requested = True
    released = [(call, trigger.result(call, "released"))]
    monkeypatch.setattr(listener.workers, "collect", lambda ready: released)
    listener.collect([])
    assert listener.next_turn <= time.monotonic()
    assert listener.settle_and_claim(claiming.conn) == []
    assert database.value("SELECT count(*) FROM stage_leases") == 0


def test_released_call_whose_row_is_held_is_given_back_once_it_is_let_go(
    database, accepting, caller, monkeypatch
):
    database.add_job("overlay", "done")
    claiming = caller(accepting.url)
    listener = with_idle_worker(claiming.listener)
    [call] = listener.settle_and_claim(claiming.conn)
    released = [(call, trigger.result(call, "released"))]
    monkeypatch.setattr(listener.workers, "collect", lambda ready: released)
    with connected(database) as application:
        application.autocommit = False
        application.cursor().execute("UPDATE jobs SET status = 'running'")
        listener.collect([])
        assert listener.settle_and_claim(claiming.conn) == []
        application.rollback()
    listener.claiming.claim_at = listener.claiming.sweep_at = math.inf
    assert listener.next_turn == listener.again_at
    listener.again_at = listener.doubtful_until = 0.0
    [again] = listener.settle_and_claim(claiming.conn)
    assert again.attempt == 2


def test_accepted_result_has_time_to_be_written_once_a_second_claim_is_given_back(
    database, accepting, caller
):
    """The second claim ran as a frozen server went on, after the lease of the first."""
    database.add_job("overlay", "done")
    claiming = caller(accepting.url)
    listener = with_idle_worker(claiming.listener)
    first = claim(claiming.conn, "first")
    database.rows(LEASE_OVER)
    listener.claiming.claimed_at = time.monotonic()
    [call] = listener.settle_and_claim(claiming.conn)
    assert call.attempt == 2
    listener.give_back(claiming.conn)
    assert database.value("SELECT due_at > now() + interval '2 s' FROM stage_calls")
    settle(claiming.conn, result(first, "succeeded", "first"))
    database.rows("UPDATE stage_calls SET due_at = now()")
    assert claim(claiming.conn, "third").accepted


# --- by hand -------------------------------------------------------------------------------

AT_THE_PROMPT = f"{BREAK}\ncontinue\n"


@pytest.mark.slow
def test_call_that_outlasts_its_lease_at_the_prompt_is_released(database, api, run_command):
    job = database.add_job("overlay", "done")
    typed = AT_THE_PROMPT + "import time; time.sleep(4)\ncontinue\nq\n"
    lease = {"STAGE_TIMEOUT": 1, "LEASE_MARGIN": 3}
    done = run_command(database, "call", job, api=api, stdin=typed, python=("-m", "pdb"), **lease)
    assert "리스가 모자라 호출하지 않고 되돌림" in done.out
    assert "The program exited via sys.exit(). Exit status: 1" in done.out
    owed = database.owed(job)
    assert (owed.attempts, owed.free_attempts, owed.worker) == (1, 1, None)
    assert database.value("SELECT count(*) FROM stage_leases") == 0 and not api.calls()


@pytest.mark.slow
def test_call_that_takes_its_time_at_the_prompt_is_made(database, api, run_command):
    job = database.add_job("overlay", "done")
    typed = AT_THE_PROMPT + "import time; time.sleep(2)\ncontinue\nq\n"
    done = run_command(
        database, "call", job, api=api, stdin=typed, python=("-m", "pdb"), STAGE_TIMEOUT=1
    )
    assert "The program exited via sys.exit(). Exit status: 0" in done.out
    assert database.state(job) == ("vlm_judge", "done")


def test_call_that_is_left_at_the_prompt_has_an_unknown_outcome(database, api, run_command):
    job = database.add_job("overlay", "done")
    run_command(database, "call", job, api=api, stdin=AT_THE_PROMPT + "q\n", python=("-m", "pdb"))
    [attempt] = database.attempts(job)
    assert (attempt.outcome, attempt.error) == ("unknown", "stopped by hand")
    assert not api.calls()
