"""Stage functions as people write them: what they may ask, and what their mistakes cost."""

import json

import pytest
from raw_server import in_turn

import db
import stages

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


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyError("x"), OSError(24, "files"), SystemExit(0)]
)
def test_exception_is_a_failed_attempt_with_a_traceback(
    database, accepting, caller, add_stage, error
):
    add_stage(fails(error))
    job = database.add_job("x")
    worker = caller(accepting.url, MAX_ATTEMPTS=2)
    attempt = worker.call()
    assert attempt.outcome == "retry"
    assert attempt.error == f"{type(error).__name__}: {error}"
    assert f"job={job} stage=failing" in worker.line("단계 함수 오류")
    assert worker.line("Traceback") and worker.line("raise error")
    assert worker.call_again().outcome == "failed"
    assert database.owed(job).given_up and accepting.connections == 0


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


@pytest.mark.parametrize("then", [raise_error, lose_connection, find_nothing, lambda call: 42])
def test_accepted_call_stays_accepted_whatever_the_function_does_next(
    database, accepting, caller, add_stage, then
):
    add_stage(posts_and(then))
    job = database.add_job("x")
    worker = caller(accepting.url)
    worker.trigger.run(worker.claim())
    second = caller(accepting.url, name="second")
    worker.trigger.leave(second.conn)
    assert [a.outcome for a in database.attempts(job)] == ["succeeded"]
    assert database.owed(job) is None and len(accepting.requests) == 1


def test_exception_after_a_refusal_is_retried(database, serve, caller, add_stage):
    add_stage(posts_and(raise_error))
    database.add_job("x")
    attempt = caller(serve(in_turn(ERROR)).url).call()
    assert (attempt.outcome, attempt.error) == ("retry", "RuntimeError: after the answer")


def test_nan_in_a_field_is_a_failed_attempt(database, accepting, caller, add_stage):
    add_stage(lambda call: call.post("/api/x", score=float("nan")))
    database.add_job("x")
    attempt = caller(accepting.url).call()
    assert attempt.outcome == "retry" and "JSON" in attempt.error
    assert accepting.connections == 0


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


def test_function_that_left_pipeline_is_a_failed_attempt(database, accepting, caller, add_stage):
    def leaving(call):
        return call.post("/api/x")

    add_stage(leaving, "x")
    job = database.add_job("x")
    worker = caller(accepting.url)
    del stages.PIPELINE["x", "done"]
    attempt = worker.call()
    assert attempt.outcome == "retry" and "'x', 'done'" in attempt.error
    assert accepting.connections == 0 and not database.owed(job).given_up


def test_call_of_a_stage_that_left_pipeline_stays_visible(database, accepting, caller, add_stage):
    def leaving(call):
        return call.post("/api/x")

    add_stage(leaving, "x")
    job = database.add_job("x")
    del stages.PIPELINE["x", "done"]
    assert caller(accepting.url).claim() is None
    assert database.owed(job).stage == "leaving"


# --- what the body needs -------------------------------------------------------------------


@pytest.fixture
def asking(database, accepting, caller, add_stage):
    """asking(sql): a worker whose stage adds what the query finds, and a job that owes its call."""
    database.rows(TABLE)

    def make(sql: str, **params):
        def overlay_with_text(call):
            found = call.fetch_one(sql, **params)
            return call.post("/api/x", **found._asdict())

        add_stage(overlay_with_text)
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
    assert attempt.error == f"stages.MissingValue: no row for this job in: {FIND}"
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
    assert worker.call().error.startswith(f"stages.MissingValue: {missing} is NULL in: ")
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
    assert (database.owed(job).free_attempts, database.value("SELECT count(*) FROM texts")) == (
        0,
        0,
    )
    assert db.query(worker.conn, "SELECT 1") == [(1,)]  # the connection is still good


def test_lost_connection_is_a_failed_attempt_and_sends_nothing(database, accepting, caller, asking):
    worker, job = asking("SELECT pg_terminate_backend(pg_backend_pid())")
    worker.trigger.run(worker.claim())
    worker.trigger.leave(caller(accepting.url, name="second").conn)
    assert [a.outcome for a in database.attempts(job)] == ["retry"]
    assert (database.owed(job).attempts, database.owed(job).free_attempts) == (1, 0)
    assert accepting.connections == 0


def test_query_is_planned_as_usual(database, accepting, asking):
    names = ["enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_sort"]
    settings = "SELECT " + ", ".join(f"current_setting('{name}') AS {name}" for name in names)
    worker, _ = asking(settings)
    worker.call()
    found = json.loads(accepting.requests[0].body)
    assert {name: found[name] for name in names} == database.row(settings)._asdict()
    assert set(db.execute(worker.conn, settings).fetchone()) == {"off"}  # for our own again
