"""Whether a refusal is the fault of the stage or of the job is judged by calls of other jobs."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from claims import LEASE_OVER
from raw_server import OK, in_turn


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def answer(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


BUSY = answer("503 Busy")
# Compared with the end of the last attempt, as a hold of a second may be over by now().
HELD = """
SELECT held_until > (SELECT max(finished_at) FROM stage_attempts) FROM pipeline_stages
WHERE stage = 'vlm_analyze'
"""


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 No", "404 Not Found", "405 No"])
def test_wrong_answer_to_one_job_alone_gives_it_up(database, serve, caller, status):
    job = database.add_job()
    assert caller(serve(in_turn(answer(status))).url).call().outcome == "failed"
    assert database.owed(job).given_up and not database.value(HELD)


@pytest.mark.parametrize(
    "status",
    ["401 Unauthorized", "404 Not Found", "403 No", "405 No", "302 To the login", "308 To TLS",
     "414 Too Long", "431 Headers Too Large"],
)  # fmt: skip
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
    assert worker.listener.health.most("vlm_analyze", 8, []) == 1
    under_way = [SimpleNamespace(stage="vlm_analyze")]
    assert worker.listener.health.most("vlm_analyze", 8, under_way) == 0
    assert worker.listener.health.kept(under_way) == "vlm_analyze refuses every job"


def test_stage_without_an_answer_is_said_to_be_called_one_at_a_time(database, serve, caller):
    jobs = [database.add_job() for _ in range(4)]
    silent = answer("504 Gateway Timeout")
    worker = caller(serve(in_turn(silent, silent, silent, OK)).url)
    assert [worker.call().outcome for _ in jobs[1:]] == ["unknown"] * 3
    assert worker.line("응답하지 않는 단계").endswith(
        ": stage=vlm_analyze 2건 연속 → 응답할 때까지 한 건씩 호출"
    )
    assert worker.listener.health.most("vlm_analyze", 8, []) == 1
    assert worker.call().outcome == "succeeded"
    assert worker.listener.health.most("vlm_analyze", 8, []) == 8


def test_stage_that_accepts_again_is_called_as_before(database, serve, caller):
    jobs = [database.add_job() for _ in range(3)]
    worker = caller(serve(in_turn(answer("401 No"), answer("401 No"), OK)).url)
    worker.call(), worker.call()
    outcomes = [worker.call_again().outcome for _ in jobs]
    assert outcomes == ["succeeded"] * 3 and not database.value(HELD)
    assert worker.listener.health.most("vlm_analyze", 8, []) == 8
    episode = worker.listener.alerts.episodes["stage_refuses", "vlm_analyze"]
    assert episode.count == 0 and episode.recovered["of"] == "stage_refuses"


def test_call_whose_result_is_not_written_yet_is_revived_once_it_is(database, serve, caller):
    first, second = database.add_job(), database.add_job()
    worker = caller(serve(in_turn(answer("401 No"))).url)
    calls = worker.claim(), worker.claim()
    for call in calls:
        worker.run(call)
    worker.listener.health.revive(worker.conn, [calls[0].call_id])
    worker.settle()
    assert not database.owed(first).given_up and not database.owed(second).given_up
    assert worker.line("포기한 호출을 되살림")


def test_call_that_was_cancelled_is_not_said_to_be_revived(database, serve, caller):
    database.add_job(), database.add_job()
    worker = caller(serve(in_turn(answer("401 No"))).url)
    worker.call()
    worker.run(worker.claim())
    database.rows("DELETE FROM stage_calls WHERE due_at = 'infinity'")
    worker.settle()
    assert worker.line("단계가 모든 job을 거절함") and "되살림" not in worker.output.getvalue()


def test_wrong_answers_with_a_success_between_are_about_the_jobs(database, serve, caller):
    jobs = [database.add_job() for _ in range(3)]
    worker = caller(serve(in_turn(answer("404 No"), OK, answer("404 No"))).url)
    assert [worker.call().outcome for _ in jobs] == ["failed", "succeeded", "failed"]
    assert not database.value(HELD)


@pytest.mark.parametrize("status", ["400 Bad", "422 Unprocessable", "413 Too Large"])
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
    worker = caller(
        serve(lambda connection: reply(connection, [deadly], status)).url, MAX_ATTEMPTS=3
    )
    outcomes = []
    assert worker.call().outcome == "held"
    while not database.owed(deadly).given_up:
        database.add_job()
        for _ in range(2):
            worker.call_again()
        outcomes = [a.outcome for a in database.attempts(deadly)]
        assert len(outcomes) < 12
    assert outcomes[0] == "held" and outcomes[-3:] == ["retry", "retry", "failed"]


def test_job_that_is_put_off_waits_for_as_long_as_its_stage_asks(database, serve, caller):
    busy, later = database.add_job(), "503 Busy\r\nRetry-After: 600"
    worker = caller(serve(lambda connection: reply(connection, [busy], later)).url)
    while not database.attempts(busy) or database.attempts(busy)[-1].outcome == "held":
        database.add_job()
        worker.call_again()
        assert len(database.attempts(busy)) < 12
    last = database.attempts(busy)[-1]
    assert last.outcome == "retry"
    assert database.owed(busy).due_at - last.finished_at == timedelta(seconds=600)


def reply(connection, deadly: list[str], status: str) -> None:
    while request := connection.receive():
        is_deadly = any(job.encode() in request.body for job in deadly)
        connection.send(answer(status) if is_deadly else OK)


def test_stage_that_puts_everybody_off_costs_nobody_an_attempt(database, serve, caller):
    jobs = [database.add_job() for _ in range(2)]
    worker = caller(serve(in_turn(BUSY)).url)
    worker.call()
    assert {worker.call_again().outcome for _ in range(10)} == {"held"}
    assert all(owed.attempts == owed.free_attempts for owed in map(database.owed, jobs))


def test_every_deleted_job_is_given_up_once_another_was_accepted(database, serve, caller):
    deleted = [database.add_job() for _ in range(10)]
    good = database.add_job()  # the last one in the queue
    server = serve(lambda connection: reply(connection, deleted, "404 Gone"))
    worker = caller(server.url)
    while database.owed(good):
        worker.call_again()
        assert len(server.requests) <= len(deleted) + 1
    assert [database.owed(job).given_up for job in deleted] == [False] * len(deleted)
    for _ in deleted:
        worker.call_again()
    assert all(database.owed(job).given_up for job in deleted) and not database.value(HELD)
    assert worker.line("단계가 모든 job을 거절함")


def test_stage_that_refuses_every_job_is_asked_every_five_seconds(database, serve, caller):
    for _ in range(2):
        database.add_job()
    worker = caller(serve(in_turn(answer("401 No"))).url)
    worker.call()
    for _ in range(10):
        worker.call_again()
        assert database.value("SELECT max(hold_seconds) FROM pipeline_stages") == 5


def test_job_that_is_refused_beside_good_ones_is_given_up(database, serve, caller):
    worker, bad = None, database.add_job()
    worker = caller(serve(lambda connection: reply(connection, [bad], "404 Gone")).url)
    jobs = [database.add_job() for _ in range(5)]
    assert [worker.call().outcome for _ in (bad, *jobs)] == ["failed", *["succeeded"] * 5]
    assert database.owed(bad).given_up and not database.value(HELD)


def test_two_listeners_lose_nothing_while_the_stage_refuses_every_job(database, serve, caller):
    jobs = [database.add_job() for _ in range(4)]
    url = serve(in_turn(*[answer("401 No")] * 8, OK)).url
    pair = [caller(url, name) for name in ("one", "other")]
    assert [worker.call().outcome for worker in pair] == ["failed", "failed"]
    for _ in range(3):
        assert [worker.call_again().outcome for worker in pair] == ["held", "held"]
    assert not any(database.owed(job).given_up for job in jobs)
    for _ in jobs:
        assert pair[0].call_again().outcome == "succeeded"
    told = [line for line in pair[0].lines if "단계가 모든 job을 거절함" in line]
    assert len(told) == len(pair)  # both log to the same place


def test_listener_that_has_just_begun_gives_up_one_job_and_takes_it_back(database, serve, caller):
    jobs = [database.add_job() for _ in range(3)]
    url = serve(in_turn(answer("401 No"))).url
    for name in ("before", "after a restart"):
        worker = caller(url, name)
        outcomes = [worker.call_again().outcome for _ in range(3)]
        assert outcomes == ["failed", "held", "held"]
        assert not any(database.owed(job).given_up for job in jobs)


# --- a gateway that has lost its stage: nobody knows whether the work was done ---------------


LOST = ["502 Bad Gateway", "520 Unknown", "522 Timed Out"]


def call_after_leases(database, worker):
    database.rows(LEASE_OVER)
    return worker.call_again()


@pytest.mark.parametrize("status", LOST)
def test_stage_that_its_gateway_has_lost_is_held_and_costs_one_attempt(
    database, serve, caller, status
):
    jobs = [database.add_job() for _ in range(3)]
    worker = caller(serve(in_turn(*[answer(status)] * 12, OK)).url, MAX_ATTEMPTS=2)
    assert worker.call().outcome == "unknown" and not database.value(HELD)
    assert worker.call().outcome == "unknown" and database.value(HELD)
    for _ in range(10):
        assert call_after_leases(database, worker).outcome == "unknown"
        assert database.value(HELD)
        assert worker.listener.health.most("vlm_analyze", 8, []) == 1
    assert not any(database.owed(job).given_up for job in jobs)
    worker.line("단계가 모든 job을 거절함")
    for _ in jobs:
        assert call_after_leases(database, worker).outcome == "succeeded"


def test_held_stage_behind_a_gateway_is_not_called_beside_itself(database, serve, caller):
    jobs = [database.add_job() for _ in range(2)]
    worker = caller(serve(in_turn(answer("502 Bad Gateway"))).url)
    for _ in jobs:
        worker.call()
    leased = "SELECT due_at >= leased_until FROM stage_calls JOIN stage_leases USING (call_id)"
    assert database.rows(leased) == [(True,), (True,)]


def test_job_that_breaks_its_stage_behind_a_gateway_is_given_up(database, serve, caller):
    deadly = database.add_job()
    server = serve(lambda connection: reply(connection, [deadly], "502 Bad Gateway"))
    worker = caller(server.url, MAX_ATTEMPTS=3)
    for _ in range(3):
        database.add_job()
        for _ in range(2):
            call_after_leases(database, worker)
    call = worker.claim()
    while call is None and not database.owed(deadly).given_up:
        database.rows(LEASE_OVER)
        call = worker.claim()
        worker.settle()
    calls = [request for request in server.requests if deadly.encode() in request.body]
    assert len(calls) == 3 and database.owed(deadly).given_up


def test_gateway_that_gives_up_waiting_is_no_answer(database, serve, caller):
    for _ in range(2):
        database.add_job()
    worker = caller(serve(in_turn(answer("504 Gateway Timeout"))).url)
    assert [worker.call().outcome for _ in range(2)] == ["unknown", "unknown"]
    assert worker.listener.health.most("vlm_analyze", 8, []) == 1
