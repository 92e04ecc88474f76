"""What a call leaves in the log: the guide's keywords, one event one line, and no secrets."""

import json
import logging
import os
import re
import sys
from contextlib import closing

import pytest
from caller import Caller
from raw_server import OK, answering
from waiting import LISTENING

import config
import db
import logs
from demo.stage_server import Answer
from ops.install import apply

EVENT = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \[\d+\] ")
PID = os.getpid()
STARTED = "[TRIGGER] 파이프라인 단계 트리거"
SUCCEEDED = "파이프라인 단계 실행 성공"
FAILED = "파이프라인 단계 실행 실패"
LEVEL = {"retry": "WARNING", "held": "WARNING", "unknown": "WARNING", "failed": "ERROR"}


def error(status: int, body: str = "", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body.encode())}", *headers, "", ""]
    return ("\r\n".join(head) + body).encode()


def test_accepted_call_is_two_lines(database, accepting, caller):
    job = database.add_job()
    worker = caller(accepting.url)
    worker.call()
    started, succeeded = worker.lines
    assert f" INFO [{PID}] {STARTED}: job={job} stage=vlm_analyze attempt=1/5" in started
    assert f" {SUCCEEDED}: job={job} stage=vlm_analyze status=200 (" in succeeded
    assert re.search(r"\(\d+\.\d\d초\)$", succeeded)


@pytest.mark.parametrize(
    ("answer", "outcome", "then"),
    [
        (
            error(500, "oops"),
            "retry",
            r"error=HTTP 500: oops → [0-9.]+초 후 재시도"
            r" \(취소되지 않고 Job이 그대로면\)$",
        ),
        (
            error(404),
            "failed",
            r"error=HTTP 404 → 포기 \(취소되지 않고 Job이 그대로면\): ./jsl retry {job}$",
        ),
        (error(503, "", "Retry-After: 9"), "held", r"error=HTTP 503 → 단계 보류 9초$"),
        (error(429), "held", r"error=HTTP 429 → 단계 보류, 응답할 때까지 간격을 늘려 재시도$"),
        (OK[:-1], "unknown", r"error=.* → 리스 만료 후 재시도"),
        (b"", "retry", r"error=connection broke while waiting: .* → [0-9.]+초 후 재시도"),
    ],
)
def test_failure_is_one_line_that_says_what_happens_next(
    database, serve, caller, answer, outcome, then
):
    job = database.add_job()
    worker = caller(serve(answering(answer)).url)
    assert worker.call().outcome == outcome
    assert len(worker.lines) == 2
    line = worker.line(FAILED)
    assert f" {LEVEL[outcome]} [{PID}] {FAILED}: job={job} stage=vlm_analyze" in line
    assert re.search(then.format(job=job), line)


HOSTILE = "a\r\n2024-01-01 00:00:00,000 INFO [1] forged\x1b[2J\x00\u2028\x85z"


def test_answer_cannot_forge_a_line(database, serve, caller):
    database.add_job()
    worker = caller(serve(answering(error(500, HOSTILE))).url)
    worker.call()
    assert len(worker.lines) == 2 and all(EVENT.match(line) for line in worker.lines)
    assert r"a\r\n2024-01-01 00:00:00,000 INFO [1] forged\x1b[2J" in worker.line(FAILED)


def test_exception_text_cannot_forge_a_line(database, accepting, caller, add_stage):
    def hostile(call):
        raise RuntimeError(HOSTILE)

    add_stage(hostile)
    database.add_job("x")
    worker = caller(accepting.url)
    worker.call()
    events = [line for line in worker.lines if EVENT.match(line)]
    assert len(events) == 3
    assert all(line.startswith("    | ") for line in worker.lines if line not in events)


TEXT_JOBS = (
    "CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text, current_step text, status text)"
)


def test_job_id_cannot_forge_a_line(empty_database, serve):
    empty_database.rows(TEXT_JOBS)
    with closing(db.connect(empty_database.settings())) as conn:
        apply(conn)
    job = HOSTILE.replace("\0", "")
    empty_database.rows("INSERT INTO jobs VALUES (%s, %s, 'img_gen', 'done')", job, job)
    with Caller(empty_database, serve(answering(error(404))).url) as worker:
        assert worker.call().job_id == job
        assert len(worker.lines) == 2 and all(EVENT.match(line) for line in worker.lines)


def test_long_error_is_cut(database, serve, caller):
    job = database.add_job()
    worker = caller(serve(answering(error(500, "long " * 100_000))).url)
    attempt = worker.call()
    assert len(worker.line(FAILED)) < 1000
    assert len(attempt.error) <= 2010 and len(database.owed(job).last_error) <= 2010


# --- secrets -------------------------------------------------------------------------------

SECRET = "hunter2/correct-horse"
URL_SECRET = "hunter2%2Fcorrect-horse"


@pytest.fixture
def secretive(database, serve, add_stage, login_with):
    """The settings of a worker that has secrets, and a stage that cannot keep them."""

    def tell_tale(call):
        raise RuntimeError(
            f"cannot reach {call.api.url} or postgresql://app:{URL_SECRET}@db/x"
            f" with password={SECRET} or plain {SECRET} or {URL_SECRET}"
        )

    add_stage(tell_tale)
    url = serve(answering(OK)).url.replace("//", f"//user:{URL_SECRET}@")
    login = login_with(database, SECRET)
    where = database.environ | login
    dsn = f"postgresql+asyncpg://{where['DB_USER']}:{URL_SECRET}@{where['DB_HOST']}"
    dsn += f":{where['DB_PORT']}/{where['DB_NAME']}"
    return {"url": url, "DATABASE_URL": dsn, **login}


def test_secrets_stay_out_of_log_and_history(database, caller, secretive):
    job = database.add_job("x")
    worker = caller(**secretive)
    attempt = worker.call()
    for text in (worker.output.getvalue(), attempt.error, database.owed(job).last_error):
        assert "cannot reach http://user:***@127.0.0.1" in text
        assert "hunter2" not in text and "horse" not in text


def test_every_line_of_the_log_is_redacted(caller, secretive):
    worker = caller(**secretive)
    logging.getLogger("listener.any").error("said %s", SECRET)
    assert worker.line("said ").endswith("said ***")


def test_secrets_stay_out_when_the_stage_is_unreachable(database, caller):
    job = database.add_job()
    worker = caller(f"http://user:{URL_SECRET}@127.0.0.1:9")
    assert worker.call().outcome == "held"
    assert "horse" not in worker.output.getvalue() + database.owed(job).last_error


def test_path_without_a_slash_does_not_tell_the_password(database, caller, secretive, add_stage):
    def careless(call):
        return call.post("api/x")

    add_stage(careless, "y")
    database.add_job("y")
    worker = caller(**secretive)
    assert "horse" not in worker.call().error + worker.output.getvalue()


# --- as JSON -------------------------------------------------------------------------------


def test_json_has_the_same_events_with_fields(database, api, listener):
    api.on("vlm_judge", lambda _: Answer(404, "없음\n".encode()))
    process = listener(database, "run", api=api, LOG_FORMAT="json")
    process.wait_for_line(LISTENING)
    job = database.add_job("overlay")
    for keyword in (FAILED, "감지"):
        process.wait_for_line(keyword)
    process.stop()
    said = [json.loads(line) for line in process.lines]
    assert all({"time", "level", "event", "pid", "message"} <= event.keys() for event in said)
    names = [event["event"] for event in said]
    for name in ("listener_started", "listening", "state_changed", "call_started", "call_failed"):
        assert name in names
    assert names[-1] == "listener_stopped" and None not in names
    [started] = [event for event in said if STARTED in event["message"]]
    assert (started["job"], started["stage"], started["attempt"]) == (job, "vlm_judge", 1)
    [failed] = [event for event in said if FAILED in event["message"]]
    assert (failed["level"], failed["status"], failed["outcome"]) == ("ERROR", 404, "failed")
    assert failed["error"] == "HTTP 404: 없음\n" and failed["duration"] >= 0
    heard = [event for event in said if "감지" in event["message"]]
    assert (heard[0]["current_step"], heard[0]["status"]) == ("overlay", "done")


def test_traceback_and_hostile_text_stay_in_one_json_object(settings, emitted):
    hostile = "a\nb\x9b\u2028\x00"
    try:
        raise ValueError(hostile)
    except ValueError:
        line = emitted(logs.OneObject(settings), "%s", hostile, exc_info=True)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028]", line)
    said = json.loads(line)
    assert said["traceback"].startswith("Traceback") and "ValueError" in said["traceback"]


def test_json_shows_no_secret_in_any_field(emitted):
    settings = config.read({"DB_PASSWORD": "hunter2", "STAGE_API_TOKEN": "s3cr3t-token"})
    line = emitted(logs.OneObject(settings), "x hunter2", extra=logs.about(
        error="Bearer s3cr3t-token", attempt=1))  # fmt: skip
    assert "hunter2" not in line and "s3cr3t-token" not in line
    assert json.loads(line)["attempt"] == 1


@pytest.fixture
def settings():
    return config.read({})


@pytest.fixture
def emitted():
    """emitted(formatter, message, *args, …): the text of one log record."""

    def emit(formatter: logging.Formatter, message: str, *args, exc_info=False, extra=None) -> str:
        info = sys.exc_info() if exc_info else None
        record = logging.makeLogRecord({"msg": message, "args": args, "exc_info": info})
        vars(record).update(extra or {})
        return formatter.format(record)

    return emit
