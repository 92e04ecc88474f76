"""Answers that are about the stage, and answers that are about one job: only others tell."""

import pytest
from raw_server import OK, in_turn


def answer(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


BUSY = answer("503 Busy")
HELD = "SELECT held_until > now() FROM pipeline_stages WHERE stage = 'vlm_analyze'"


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 No", "404 Not Found", "405 No"])
def test_wrong_answer_to_one_job_alone_gives_it_up(database, serve, caller, status):
    job = database.add_job()
    assert caller(serve(in_turn(answer(status))).url).call().outcome == "failed"
    assert database.owed(job).given_up and not database.value(HELD)


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "403 No", "405 No"])
def test_wrong_answer_to_several_jobs_is_about_the_stage(database, serve, caller, status):
    first, second = database.add_job(), database.add_job()
    worker = caller(serve(in_turn(answer(status))).url)
    assert [worker.call().outcome for _ in range(2)] == ["failed", "held"]
    assert database.value(HELD)
    assert not database.owed(first).given_up and not database.owed(second).given_up
    assert worker.line("단계가 모든 job을 거절함")
    # However long it takes, nothing is given up, and it is said once.
    assert {worker.call_again().outcome for _ in range(12)} == {"held"}
    assert not database.owed(first).given_up and not database.owed(second).given_up
    assert worker.line("단계가 모든 job을 거절함")
    # Claimed one at a time meanwhile.
    assert worker.listener.health.most("vlm_analyze", 8, 0) == 1
    assert worker.listener.health.most("vlm_analyze", 8, 1) == 0


def test_stage_that_accepts_again_is_called_as_before(database, serve, caller):
    jobs = [database.add_job() for _ in range(3)]
    worker = caller(serve(in_turn(answer("401 No"), answer("401 No"), OK)).url)
    worker.call(), worker.call()
    outcomes = [worker.call_again().outcome for _ in jobs]
    assert outcomes == ["succeeded"] * 3 and not database.value(HELD)
    assert worker.listener.health.most("vlm_analyze", 8, 0) == 8


def test_wrong_answers_with_a_success_between_are_about_the_jobs(database, serve, caller):
    jobs = [database.add_job() for _ in range(3)]
    worker = caller(serve(in_turn(answer("404 No"), OK, answer("404 No"))).url)
    assert [worker.call().outcome for _ in jobs] == ["failed", "succeeded", "failed"]
    assert not database.value(HELD)


@pytest.mark.parametrize("status", ["400 Bad", "422 Unprocessable", "413 Too Large", "301 Moved"])
def test_other_refusals_are_about_the_job_however_many_get_them(database, serve, caller, status):
    jobs = [database.add_job() for _ in range(3)]
    worker = caller(serve(in_turn(answer(status))).url)
    assert [worker.call().outcome for _ in jobs] == ["failed"] * 3
    assert not database.value(HELD)


@pytest.mark.parametrize("status", ["503 Busy", "429 Too Many"])
def test_job_that_is_put_off_while_others_are_accepted_spends_attempts(
    database, serve, caller, status
):
    deadly = database.add_job()
    worker = caller(serve(lambda connection: reply(connection, deadly, status)).url, MAX_ATTEMPTS=3)
    outcomes = []
    assert worker.call().outcome == "held"
    while not database.owed(deadly).given_up:
        database.add_job()
        for _ in range(2):
            worker.call_again()
        outcomes = [a.outcome for a in database.attempts(deadly)]
        assert len(outcomes) < 12
    assert outcomes[0] == "held" and outcomes[-3:] == ["retry", "retry", "failed"]


def reply(connection, deadly: str, status: str) -> None:
    while request := connection.receive():
        connection.send(answer(status) if deadly.encode() in request.body else OK)


def test_stage_that_puts_everybody_off_costs_nobody_an_attempt(database, serve, caller):
    jobs = [database.add_job() for _ in range(2)]
    worker = caller(serve(in_turn(BUSY)).url)
    worker.call()
    assert {worker.call_again().outcome for _ in range(10)} == {"held"}
    assert all(owed.attempts == owed.free_attempts for owed in map(database.owed, jobs))
