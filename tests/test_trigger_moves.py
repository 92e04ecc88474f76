"""A job that has moved on is left alone, and an accepted call is never made again: not even while
the stage that answered has not committed yet.
"""

from contextlib import closing

import pytest
from caller import WITHOUT_HOLDS
from claims import LEASE_OVER, make_due
from commands import run_here
from raw_server import in_turn

SKIPPED = "Job 상태가 변경되어 스킵"


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def move_unseen(database, job: str, step: str, status: str) -> None:
    """Move a job past the database trigger, as replication and restores do."""
    with closing(database.connect()) as conn:
        conn.cursor().execute("SET session_replication_role = replica")
        conn.cursor().execute(
            "UPDATE jobs SET current_step = %s, status = %s WHERE job_id = %s", (step, status, job)
        )


@pytest.mark.parametrize(
    ("step", "status"),
    [("vlm_analyze", "running"), ("img_gen", "failed"), ("overlay", "done"), (None, None)],
)
def test_job_that_moved_on_is_skipped(database, accepting, caller, step, status):
    job = database.add_job()
    move_unseen(database, job, step, status)
    worker = caller(accepting.url)
    assert worker.claim() is None
    assert accepting.connections == 0 and database.owed(job) is None
    [attempt] = database.attempts(job)
    assert (attempt.outcome, attempt.http_status) == ("skipped", None)
    assert attempt.error == f"the job has moved on: ({step}, {status})"
    assert f"{SKIPPED}: job={job} stage=vlm_analyze 현재=({step}, {status})" in worker.line(SKIPPED)


def test_deleted_job_is_skipped(database, accepting, caller):
    job = database.add_job()
    database.rows("DELETE FROM jobs WHERE job_id = %s", job)
    worker = caller(accepting.url)
    assert worker.claim() is None
    assert accepting.connections == 0 and database.owed(job) is None
    assert [attempt.outcome for attempt in database.attempts(job)] == ["skipped"]
    assert f"job={job}" in worker.line(SKIPPED) and "현재=deleted" in worker.line(SKIPPED)


def test_skipped_job_does_not_keep_the_next_one_waiting(database, accepting, caller):
    moved, owed = database.add_job(), database.add_job()
    move_unseen(database, moved, "img_gen", "failed")
    assert str(caller(accepting.url).claim().job_id) == owed


def test_job_that_moved_on_with_its_trigger_owes_the_next_stage_only(database, accepting, caller):
    job = database.add_job()
    database.move(job, "vlm_analyze", "done")
    worker = caller(accepting.url)
    assert worker.call().stage == "yolo_detect"
    assert worker.claim() is None and len(accepting.requests) == 1


def test_job_that_moves_on_between_two_attempts_is_not_called_again(database, serve, caller):
    job = database.add_job()
    server = serve(in_turn(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"))
    worker = caller(server.url)
    worker.call()
    move_unseen(database, job, "vlm_analyze", "running")
    database.rows(LEASE_OVER)
    assert worker.claim() is None
    assert [a.outcome for a in database.attempts(job)] == ["retry", "skipped"]
    assert len(server.requests) == 1


def test_result_of_a_job_that_moved_on_meanwhile_is_recorded(database, accepting, caller):
    job = database.add_job()
    worker = caller(accepting.url)
    call = worker.claim()
    database.move(job, "vlm_analyze", "done")
    worker.run(call)
    assert worker.claim().stage == "yolo_detect"
    assert [a.outcome for a in database.attempts(job)] == ["succeeded"]


def test_job_that_comes_back_owes_a_new_call(database, accepting, caller):
    job = database.add_job()
    worker = caller(accepting.url)
    worker.call()
    database.move(job, "img_gen", "running")
    database.move(job, "img_gen", "done")
    assert worker.call().attempt == 1
    first, second = (request.headers["idempotency-key"] for request in accepting.requests)
    assert first != second


# --- a stage that answers before it commits ------------------------------------------------


def answer_before_commit(database, stage, worker, lease_over: bool = False) -> str:
    """A job whose stage has answered, and still holds its row."""
    job = database.add_job()
    call = worker.claim()
    if lease_over:
        database.rows(LEASE_OVER)
    stage.cursor().execute(
        "UPDATE jobs SET current_step = 'vlm_analyze', status = 'running' WHERE job_id = %s", (job,)
    )
    worker.run(call)
    assert worker.claim() is None
    return job


def settle_again(worker) -> None:
    """Settle again, as the listener does every second while the stage holds the row of a call."""
    worker.listener.unwritten.retry_locked()
    worker.settle()


def test_result_is_recorded_at_once_and_does_not_wait(database, accepting, caller, stage):
    worker = caller(accepting.url)
    job = answer_before_commit(database, stage, worker)
    assert [a.outcome for a in database.attempts(job)] == ["succeeded"]
    assert database.owed(job).worker == "caller"  # as others see it
    assert len(worker.listener.unwritten.locked) == 1


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_call_is_settled_later_and_never_made_twice(database, accepting, caller, stage, end):
    worker = caller(accepting.url)
    job = answer_before_commit(database, stage, worker)
    settle_again(worker)
    assert len(worker.listener.unwritten.locked) == 1
    getattr(stage, end)()
    settle_again(worker)
    assert worker.listener.unwritten.locked == []
    assert database.owed(job) is None and len(accepting.requests) == 1
    assert [a.outcome for a in database.attempts(job)] == ["succeeded"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_others_leave_it_alone_after_its_lease_as_well(database, accepting, caller, stage, end):
    job = answer_before_commit(database, stage, caller(accepting.url), lease_over=True)
    second = caller(accepting.url, name="second")
    assert second.claim() is None
    getattr(stage, end)()
    assert second.claim() is None
    assert database.owed(job) is None and len(accepting.requests) == 1


def test_failure_before_a_rollback_is_settled_later(database, serve, caller, stage):
    server = serve(in_turn(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"))
    worker = caller(server.url)
    job = answer_before_commit(database, stage, worker)
    stage.rollback()
    settle_again(worker)
    owed = database.owed(job)
    assert (owed.worker, owed.attempts, owed.last_error) == (None, 1, "HTTP 500")


def test_failure_before_a_rollback_that_a_person_cancels_is_over(database, serve, caller, stage):
    server = serve(in_turn(b"HTTP/1.1 422 No\r\nContent-Length: 0\r\n\r\n"))
    worker = caller(server.url)
    job = answer_before_commit(database, stage, worker)
    stage.rollback()
    said = run_here(database.environ, "cancel", job).lines
    assert said == [f"cancelled: job {job}, stage vlm_analyze"]  # nobody is calling it
    settle_again(worker)
    assert worker.listener.unwritten.locked == [] and database.owed(job) is None
    assert {a.outcome for a in database.attempts(job)} == {"failed", "cancelled"}


@pytest.mark.parametrize(("status", "spent"), [(500, 2), (503, 1)])
def test_listener_that_ends_leaves_a_failed_call_to_its_lease(
    database, serve, caller, stage, status, spent
):
    server = serve(in_turn(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status))
    first = caller(server.url)
    job = answer_before_commit(database, stage, first)
    first.listener.signals.requested = True
    assert first.listener.unwritten.locked and first.listener.finished()
    stage.rollback()
    database.rows(WITHOUT_HOLDS)
    second = caller(server.url, name="second")
    assert second.claim() is None
    database.rows(LEASE_OVER)
    call = second.claim()
    assert (call.key, call.attempt, call.spent) == (job, 2, spent)


def test_leaving_keeps_the_call_from_being_made_again(database, accepting, caller, stage):
    worker = caller(accepting.url)
    job = answer_before_commit(database, stage, worker)
    worker.settle()
    stage.rollback()
    database.rows(LEASE_OVER)
    second = caller(accepting.url, name="second")
    assert second.claim() is None
    assert [a.outcome for a in database.attempts(job)] == ["succeeded", "skipped"]
    assert len(accepting.requests) == 1 and "이미 수락된 호출" in second.lines[0]


@pytest.mark.parametrize("most", [1, 5])
def test_call_that_was_given_up_before_a_rollback_waits_for_a_person(
    database, serve, caller, stage, most
):
    server = serve(in_turn(b"HTTP/1.1 422 No\r\nContent-Length: 0\r\n\r\n"))
    job = answer_before_commit(database, stage, caller(server.url, MAX_ATTEMPTS=most))
    stage.rollback()
    said = run_here(database.environ, "retry", job, "--now").refused(1)
    assert "its row was locked when its last attempt ended; looked at from " in said
    assert "1 attempt spent), due in " in run_here(database.environ, "job", job).out
    database.rows(LEASE_OVER)
    second = caller(server.url, name="second", MAX_ATTEMPTS=most)
    assert second.claim() is None and len(server.requests) == 1
    assert second.listener.alerts.episodes == {}  # the first one has told people
    assert database.owed(job).given_up and database.owed(job).last_error == "HTTP 422"
    assert [a.outcome for a in database.attempts(job)] == ["failed", "failed"]
    make_due(second.conn, job)
    for _ in ("retried", "lost")[:most]:
        assert second.claim()
        database.rows(LEASE_OVER)
