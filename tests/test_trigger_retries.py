"""How often a call is tried: back-off, holds, giving up, and attempts whose worker was lost."""

import itertools
import os
import resource
from contextlib import closing
from datetime import timedelta

import pytest
from claims import LEASE_OVER, make_due
from raw_server import OK, answering, in_turn
from waiting import wait_until_idle

import db
from pipeline import limits
from trigger import backoff

ERROR = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
BUSY_A_MINUTE = BUSY.replace(b"Content", b"Retry-After: 60\r\nContent")
HOLD = "SELECT hold_seconds, held_until > now() AS held FROM pipeline_stages WHERE stage = %s"


# --- back-off ------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.01, 5, 3600])
@pytest.mark.parametrize("spent", [1, 2, 3, 6, 7, 40, 999, 5000])
def test_back_off_doubles_up_to_five_minutes_with_full_jitter(delay, spent):
    longest = min(300, delay * 2 ** min(spent - 1, 99))
    waits = [backoff(spent, delay) for _ in range(200)]
    assert all(0 <= wait <= longest for wait in waits)
    assert min(waits) < longest / 4 and max(waits) > longest * 3 / 4


def test_stage_may_be_tried_thousands_of_times(database, serve, caller, add_stage):
    @limits(max_attempts=5000)
    def patient(call):
        return call.post("/api/x")

    add_stage(patient)
    job = database.add_job("x")
    database.rows("UPDATE stage_calls SET attempts = 4000")
    attempt = caller(serve(in_turn(ERROR)).url).call()
    assert (attempt.outcome, attempt.attempt) == ("retry", 4001)
    assert database.owed(job).due_at - attempt.finished_at <= timedelta(minutes=5)


# --- giving up -----------------------------------------------------------------------------


def test_call_is_given_up_after_max_attempts(database, serve, caller):
    job = database.add_job()
    server = serve(in_turn(ERROR))
    worker = caller(server.url, MAX_ATTEMPTS=3)
    outcomes = [worker.call().outcome] + [worker.call_again().outcome for _ in range(2)]
    assert outcomes == ["retry", "retry", "failed"]
    owed = database.owed(job)
    assert owed.given_up and owed.last_error == "HTTP 500 (attempt 3, the last one)"
    assert (owed.attempts, owed.worker) == (3, None)
    assert [request.headers["x-attempt"] for request in server.requests] == ["1", "2", "3"]
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 1
    assert [line for line in worker.lines if " ERROR " in line] == [worker.line(" → 포기 (")]


def test_last_attempt_without_an_answer_is_given_up_once_its_lease_is_over(database, serve, caller):
    job = database.add_job()
    server = serve(answering(OK[:-1]))
    worker = caller(server.url, MAX_ATTEMPTS=1)
    assert worker.call().outcome == "unknown"
    assert "리스 만료 후 포기" in worker.line("실행 실패")
    # The stage may still be at work: not even a person gets the call before the lease is over.
    assert not database.owed(job).given_up and worker.claim(only=job) is None
    database.rows(LEASE_OVER)
    assert worker.claim() is None
    assert [a.outcome for a in database.attempts(job)] == ["unknown", "failed"]
    assert database.owed(job).given_up and len(server.requests) == 1


def test_given_up_call_is_not_claimed_until_a_person_retries_it(database, serve, caller):
    job = database.add_job()
    worker = caller(serve(in_turn(ERROR, OK)).url, MAX_ATTEMPTS=1)
    assert worker.call().outcome == "failed"
    assert worker.claim() is None
    make_due(worker.conn, job)
    assert worker.call().outcome == "succeeded"


def test_given_up_call_ends_when_the_job_moves_on(database, serve, caller):
    job = database.add_job()
    worker = caller(serve(in_turn(ERROR, OK)).url, MAX_ATTEMPTS=1)
    worker.call()
    database.move(job, "vlm_analyze", "done")
    attempt = worker.call()
    assert (attempt.stage, attempt.outcome, attempt.attempt) == ("yolo_detect", "succeeded", 1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", None], ids=["unreachable", "throttling"])
def test_fifty_holds_cost_no_attempt(database, serve, caller, url):
    job = database.add_job()
    worker = caller(url or serve(in_turn(BUSY)).url)
    outcomes = [worker.call().outcome] + [worker.call_again().outcome for _ in range(49)]
    assert outcomes == ["held"] * 50
    owed = database.owed(job)
    assert (owed.attempts, owed.free_attempts, owed.given_up) == (50, 50, False)
    assert "attempt=1/5" in worker.lines[-1]


def test_attempts_after_holds_count_from_one(database, serve, caller):
    database.add_job()
    server = serve(in_turn(BUSY, BUSY, ERROR))
    worker = caller(server.url, MAX_ATTEMPTS=2)
    outcomes = [worker.call().outcome] + [worker.call_again().outcome for _ in range(3)]
    assert outcomes == ["held", "held", "retry", "failed"]


# --- holds ---------------------------------------------------------------------------------


def test_hold_doubles_up_to_a_minute(database, serve, caller):
    database.add_job()
    worker = caller(serve(in_turn(BUSY)).url)
    worker.call()
    lengths = [database.row(HOLD, "vlm_analyze").hold_seconds]
    for _ in range(8):
        worker.call_again()
        lengths.append(database.row(HOLD, "vlm_analyze").hold_seconds)
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_hold_is_for_all_workers_and_for_this_stage_alone(database, serve, caller):
    database.add_job(), database.add_job()
    other_stage = database.add_job("planner", "done")
    server = serve(in_turn(BUSY_A_MINUTE, OK))
    caller(server.url).call()
    second = caller(server.url, name="second")
    assert str(second.claim().job_id) == other_stage
    assert second.claim() is None


def test_first_success_lifts_the_hold(database, serve, caller):
    database.add_job()
    worker = caller(serve(in_turn(BUSY_A_MINUTE, OK)).url)
    worker.call()
    assert database.row(HOLD, "vlm_analyze").held
    worker.call_again()
    assert database.row(HOLD, "vlm_analyze") == (None, None)


def test_success_that_began_before_the_hold_does_not_lift_it(database, serve, caller):
    database.add_job(), database.add_job()
    early = caller(serve(in_turn(OK)).url, name="early")
    call = early.claim()
    caller(serve(in_turn(BUSY_A_MINUTE)).url).call()
    early.run(call)
    early.settle()
    assert database.row(HOLD, "vlm_analyze").held


def test_calls_under_way_when_the_hold_began_do_not_lengthen_it(database, serve, caller):
    workers = [caller(serve(in_turn(BUSY)).url, name=name) for name in "abc"]
    begun = []
    for worker in workers:
        database.add_job()
        begun.append(worker.claim())
    for worker, call in zip(workers, begun, strict=True):
        worker.run(call)
        worker.settle()
    assert database.row(HOLD, "vlm_analyze").hold_seconds == 1


def test_worker_that_runs_out_of_file_descriptors_lives_on(database, api, listener, tmp_path):
    process = listener(database, "run", "--workers", "1", api=api)
    wait_until_idle(tmp_path)
    [worker] = process.children()
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    open_files = {int(file) for file in os.listdir(f"/proc/{worker}/fd")}
    lowest_free = next(file for file in itertools.count() if file not in open_files)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    job = database.add_job()
    assert "Too many open files" in process.wait_for_line("파이프라인 단계 실행 실패")
    resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    assert [call.stage for call in api.calls(job)][:2] == ["vlm_analyze", "yolo_detect"]
    assert process.children() == [worker]
    assert process.stop() == 0


# --- workers that were lost ----------------------------------------------------------------


def test_call_whose_worker_is_lost_every_time_is_given_up_without_a_post(database, serve, caller):
    job = database.add_job()
    server = serve(in_turn(OK))
    names = ("lost-0", "lost-1", "last")
    *lost, last = (caller(server.url, name=name, MAX_ATTEMPTS=2) for name in names)
    for worker in lost:
        assert worker.claim().attempt
        database.rows(LEASE_OVER)
    assert last.claim() is None
    assert [attempt.outcome for attempt in database.attempts(job)] == ["lost", "lost", "failed"]
    assert [a.worker for a in database.attempts(job)] == [*names]
    for number, then in (1, "재시도"), (2, "포기"):
        line = last.line(f"job={job} stage=vlm_analyze attempt={number}/2 error=the listener did")
        assert f"초) → {then} (취소되지 않고 Job이 그대로면)" in line and " WARNING " in line
    assert database.owed(job).given_up and server.connections == 0
    error = "no attempt is left; the last one: the listener did not come back"
    assert " ERROR " in last.line(f"attempt=2/2 error={error}")


def test_late_result_leaves_the_call_alone_once_the_lease_was_taken_over(database, serve, caller):
    job = database.add_job()
    late = caller(serve(in_turn(ERROR)).url, name="late", MAX_ATTEMPTS=1)
    call = late.claim()
    database.rows(LEASE_OVER)
    second = caller(serve(in_turn(OK)).url, name="second")
    assert second.claim().attempt == 2
    before = database.owed(job)
    late.run(call)
    late.settle()
    assert database.owed(job) == before
    known = [(a.worker, a.outcome) for a in database.attempts(job)]
    assert known == [("late", "lost"), ("late", "failed")]


def test_late_success_is_still_settled_where_nobody_took_the_call_over(database, serve, caller):
    job = database.add_job()
    late = caller(serve(in_turn(OK)).url, name="late")
    call = late.claim()
    late.run(call)
    database.rows(LEASE_OVER)
    with closing(db.connect(late.settings)) as conn:
        late.settle(conn)
    assert [a.outcome for a in database.attempts(job)] == ["succeeded"]
    assert database.owed(job) is None
