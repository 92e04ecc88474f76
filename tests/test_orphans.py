"""The listener is killed, stopped, or late: no answer is lost, and no two calls overlap."""

import json
import os
import re
import signal
from collections import Counter
from contextlib import closing

import pytest
from claims import LEASE_OVER
from faults.test_connection import frozen
from raw_server import in_turn
from stage_functions import POST, program
from tcp_proxy import TcpProxy
from waiting import (
    CLAIM,
    LISTENERS,
    PATIENCE,
    gate,
    is_gone,
    terminate_backends,
    until,
    wait_for_call,
    wait_until_idle,
)

import trigger
import workers
from demo.stage_api import StageApi
from demo.stage_server import Answer

STAGE = "vlm_judge"
TOO_SHORT = "리스가 모자라 호출하지 않고 되돌림"
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"
ALL_SUCCEEDED = "SELECT count(*) = %s FROM stage_attempts WHERE outcome = 'succeeded'"
CLAIMED_FOR = (
    "SELECT count(*) = %s FROM stage_calls WHERE worker IS NOT NULL"
    " AND clock_timestamp() - started_at > make_interval(secs => %s)"
)


# --- killed --------------------------------------------------------------------------------


def test_answers_that_come_after_the_listener_was_killed_are_recorded(database, api, listener):
    with gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api)
        jobs = [database.add_job("overlay") for _ in range(16)]
        api.wait_for(lambda api: len(api.calls()) == 16)
        workers = process.children()
        process.kill_alone()
        opened.set()
        database.wait_for(ALL_SUCCEEDED, 16)
        until(lambda: all(map(is_gone, workers)), "the end of the workers")
    assert database.value("SELECT count(*) FROM stage_calls") == 0
    assert database.value("SELECT count(*) FROM stage_leases") == 0
    assert listener(database, "run", "--once", api=api).wait() == 0
    assert sorted(call.job_id for call in api.calls()) == sorted(jobs)
    database.wait_for(f"SELECT count(*) = 0 FROM pg_stat_activity WHERE {LISTENERS}")


def test_call_that_is_given_up_after_the_listener_was_killed_is_told_once(
    database, api, listener, tmp_path
):
    told = tmp_path / "told"
    with gate(api, STAGE, Answer(422)) as opened:
        process = listener(database, "run", "--workers", "2", api=api,
                           ALERT_COMMAND=f"tee -a {told}")  # fmt: skip
        job = database.add_job("overlay")
        wait_for_call(api, job)
        api.on("overlay", lambda _: Answer(422))
        known = database.add_job("planner", "done", tenant="told by the listener")
        until(lambda: told.exists() and known in told.read_text(), "its alert")
        database.wait_for("SELECT count(*) = 1 FROM stage_attempts")  # which comes after it
        workers = process.children()
        process.kill_alone()
        opened.set()
        until(lambda: all(map(is_gone, workers)), "the end of the workers")
    said = [json.loads(line) for line in told.read_text().splitlines()]
    assert sorted((one["event"], one["job"]) for one in said) == sorted(
        ("given_up", str(one)) for one in (job, known)
    )
    process.wait()  # until all that its workers wrote is read
    assert [line for line in process.lines if "실행 실패" in line and job in line]


def test_row_that_its_stage_set_failed_after_the_listener_was_killed_is_told_so(
    database, caller, tmp_path
):
    told = tmp_path / "told"
    calling = caller("http://127.0.0.1:1", ALERT_COMMAND=f"tee -a {told}")
    job = database.add_job("yolo_detect")
    call = calling.claim()
    database.move(job, "planner", "failed")
    ended = trigger.failure(call, "failed", "HTTP 422: no GPU", 0, http_status=422)
    workers.settle_without_listener(calling.settings, call, ended)
    said = json.loads(told.read_text())
    assert (said["event"], said["job"]) == ("failed_by_stage", job)
    [attempt] = database.attempts(job)
    assert "set failed by its stage" in attempt.error


def test_call_that_was_released_is_left_to_its_lease_by_a_worker(database, caller):
    calling, job = caller("http://127.0.0.1:1"), database.add_job()
    call = calling.claim()
    workers.settle_without_listener(calling.settings, call, trigger.result(call, "released"))
    assert (database.owed(job).given_up, database.attempts(job)) == (False, [])


def test_result_that_the_listener_wrote_as_another_outcome_is_left_by_a_worker(
    database, serve, caller
):
    calling = caller(serve(in_turn(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")).url)
    database.add_job()
    database.add_job()
    calling.call()
    call = calling.claim()
    ended = calling.trigger.run(call)
    calling.listener.keep(call, calling.listener.health.revise(call, ended))
    calling.settle()
    workers.settle_without_listener(calling.settings, call, ended)
    assert (ended.outcome, [one.outcome for one in database.attempts(call.key)]) == (
        "failed",
        ["held"],  # as the stage refuses every job, which the worker does not know
    )


def test_worker_that_has_recorded_a_result_names_the_row_of_another_table(variants, caller):
    [row] = variants.add(variants.database.add_job("new"), status="done")
    calling = caller("http://127.0.0.1:1")
    call = calling.claim()
    ended = trigger.result(call, "succeeded", http_status=200, seconds=0.1)
    workers.settle_without_listener(calling.settings, call, ended)
    assert f": job_variants_id={row} job_id=" in calling.line("리스너가 사라져")


def test_answer_is_recorded_by_a_worker_while_the_table_of_the_row_is_locked(database, caller):
    calling = caller("http://127.0.0.1:1")
    job = database.add_job("yolo_detect")
    call = calling.claim()
    ended = trigger.failure(call, "failed", "HTTP 422: no GPU", 0, http_status=422)
    with database.connect() as change:
        change.autocommit = False
        change.cursor().execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        workers.settle_without_listener(calling.settings, call, ended)
        assert [attempt.outcome for attempt in database.attempts(job)] == ["failed"]
        change.rollback()


def test_call_that_a_worker_gave_up_under_a_lock_is_not_made_again(database, caller):
    calling = caller("http://127.0.0.1:1")
    job = database.add_job()
    call = calling.claim()
    ended = trigger.failure(call, "failed", "HTTP 422: no GPU", 0, http_status=422)
    with closing(database.connect()) as held:
        held.cursor().execute("BEGIN; UPDATE jobs SET status = 'running'")
        workers.settle_without_listener(calling.settings, call, ended)
    assert [attempt.outcome for attempt in database.attempts(job)] == ["failed"]
    database.rows(LEASE_OVER)
    assert calling.claim() is None and database.owed(job).given_up


def test_answers_that_the_killed_listener_had_not_read_are_recorded(
    database, api, listener, tmp_path
):
    body = f"answer = {POST.removeprefix('return ')}\nos.write(1, b'answered\\n')\nreturn answer"
    with gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api,
                           program=program(tmp_path, body, 60))  # fmt: skip
        for _ in range(16):
            database.add_job("overlay")
        api.wait_for(lambda api: len(api.calls()) == 16)
        process.signal(signal.SIGSTOP)
        opened.set()
        process.wait_for_line("answered", count=16)
        assert database.value("SELECT count(*) FROM stage_attempts") == 0
        process.kill_alone()
        database.wait_for(ALL_SUCCEEDED, 16)
    assert listener(database, "run", "--once", api=api).wait() == 0
    assert len(api.calls()) == 16


def test_calls_are_finished_by_workers_of_a_listener_that_an_error_has_ended(
    database, api, listener, tmp_path
):
    more = "def bug(*_): raise MemoryError\nlistener.Listener.wait_to_reconnect = bug"
    with gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, api=api, program=program(tmp_path, POST, 60, more))
        jobs = [database.add_job("overlay") for _ in range(2)]
        api.wait_for(lambda api: len(api.calls()) == 2)
        workers = process.children()
        terminate_backends(database)
        assert process.process.wait(PATIENCE) == 1
        opened.set()
        database.wait_for(ALL_SUCCEEDED, 2)
        until(lambda: all(map(is_gone, workers)), "the end of the workers")
    process.wait_for_line("MemoryError")
    assert [database.owed(job) for job in jobs] == [None, None]


def test_idle_workers_of_a_killed_listener_end(database, listener, tmp_path):
    process = listener(database)
    wait_until_idle(tmp_path)
    workers = process.children()
    process.kill_alone()
    until(lambda: all(map(is_gone, workers)), "the end of the workers")


def test_answers_are_recorded_although_listener_and_database_were_gone(
    own_server, make_database, listener
):
    database = make_database(own_server)
    with StageApi(database.dsn) as api, gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api)
        for _ in range(16):
            database.add_job("overlay")
        api.wait_for(lambda api: len(api.calls()) == 16)
        own_server.embedded.stop("immediate")
        process.kill_alone()
        opened.set()
        process.wait_for_line("워커가 결과를 기록할 수 없음", count=32)
        own_server.embedded.start()
        database.conn = database.connect()
        database.wait_for(ALL_SUCCEEDED, 16)
        assert len(api.calls()) == 16


def test_answer_is_recorded_and_told_though_nobody_reads_the_output(
    database, api, listener, tmp_path
):
    pipe, told = (tmp_path / name for name in ("pipe", "told"))
    os.mkfifo(pipe)
    unread = ("sh", "-c", 'exec "$@" > "$0"', pipe)
    body = f"{POST.replace('return', 'answer =')}\nprint('x', end='')\nreturn answer"
    with (
        os.fdopen(os.open(pipe, os.O_RDWR | os.O_NONBLOCK), "wb", 0) as output,
        gate(api, STAGE, Answer(422)) as opened,
    ):
        process = listener(database, api=api, within=unread, ALERT_COMMAND=f"tee -a {told}",
                           program=program(tmp_path, body, 60))  # fmt: skip
        job = database.add_job("overlay")
        wait_for_call(api, job)
        workers = process.children()
        while output.write(b"x" * 100):
            pass
        process.kill_alone()
        opened.set()
        database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s", job)
        until(lambda: told.exists() and job in told.read_text(), "the alert")
        assert not all(map(is_gone, workers))  # the one that cannot write its line
    until(lambda: all(map(is_gone, workers)), "the end of the workers")


# --- stopped, and going on later -----------------------------------------------------------


def stop(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


@pytest.mark.slow
def test_workers_of_a_stopped_listener_end_with_their_leases(database, api, listener, tmp_path):
    workers = []

    def answer(_request) -> Answer:
        if not workers:
            api.closing.wait(60)
        until(lambda: all(map(is_gone, workers)), "the end of the first workers")
        return Answer(200)

    api.on(STAGE, answer)
    handled = "signal.signal(signal.SIGALRM, lambda *_: None)"  # as a module of the stages may do
    endless = program(tmp_path, "call.until = time.monotonic() + 600\n" + POST, 5, handled)
    first = listener(database, "run", "--workers", "16", api=api, program=endless, LEASE_MARGIN=3)
    jobs = [database.add_job("overlay") for _ in range(16)]
    api.wait_for(lambda api: len(api.calls()) == 16)
    workers.extend(first.children())
    first.signal(signal.SIGSTOP)
    listener(database, "run", "--workers", "16", api=api)
    database.wait_for(ALL_SUCCEEDED, 16)
    first.signal(signal.SIGCONT)
    first.wait_for_line("its worker was killed by SIGALRM", count=16)
    other = database.add_job("overlay")
    database.wait_for(SUCCEEDED, other)
    assert Counter(call.job_id for call in api.calls()) == dict.fromkeys(jobs, 2) | {other: 1}


def test_calls_whose_workers_were_stopped_for_too_long_are_not_made_but_claimed_again(
    database, api, listener, tmp_path
):
    """A lease has to cover the timeout of its call: they are stopped for longer than the margin."""
    api.on(STAGE, lambda _: Answer(200))
    process = listener(database, "run", "--workers", "16", api=api,
                       STAGE_TIMEOUT=20, LEASE_MARGIN=2, SWEEP_INTERVAL=3600)  # fmt: skip
    wait_until_idle(tmp_path)
    workers = process.children()
    with frozen(workers):
        jobs = [database.add_job("overlay") for _ in range(16)]
        database.wait_for(CLAIMED_FOR, 16, 2)
    process.wait_for_line(TOO_SHORT, count=16)
    for job in jobs:
        database.wait_for(SUCCEEDED, job)
        [call], [attempt] = api.calls(job), database.attempts(job)
        assert int(call.headers["X-Attempt"]) == attempt.attempt > 1
    process.wait_for_line("[TRIGGER]", count=32)
    assert "attempt=2/5" not in process.output  # none was spent
    assert process.children() == workers


def test_calls_of_a_listener_that_was_stopped_after_its_claim_are_made_by_another_alone(
    database, api, listener, tmp_path
):
    """It is stopped before it reads the answer, for longer than its leases."""
    api.on(STAGE, lambda _: Answer(200))
    with TcpProxy(database.environ) as proxy:
        process = listener(database, "run", "--workers", "16", api=api, **proxy.settings,
                           STAGE_TIMEOUT=3, LEASE_MARGIN=2, SWEEP_INTERVAL=3600)  # fmt: skip
        wait_until_idle(tmp_path)
        workers, claimed = process.children(), proxy.hold_answer(CLAIM)
        database.rows("INSERT INTO jobs (current_step, status)"
                      " SELECT 'overlay', 'done' FROM generate_series(1, 16)")  # fmt: skip
        claimed.wait()
        process.signal(signal.SIGSTOP)
        claimed.release()
        listener(database, "run", "--workers", "16", api=api, SWEEP_INTERVAL=1)
        database.wait_for(ALL_SUCCEEDED, 16)
        process.signal(signal.SIGCONT)
        process.wait_for_line(TOO_SHORT, count=16)
        assert process.children() == workers
        assert process.stop() == 0
    assert len({call.job_id for call in api.calls()}) == len(api.calls()) == 16


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "during"])
def test_calls_whose_workers_stay_stopped_are_made_again_after_their_leases(
    when, database, api, listener, tmp_path
):
    with gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api,
                           STAGE_TIMEOUT=4, LEASE_MARGIN=3)  # fmt: skip
        wait_until_idle(tmp_path)
        workers = process.children()
        if when == "before":
            stop(workers)
        jobs = [database.add_job("overlay") for _ in range(16)]
        if when == "during":
            api.wait_for(lambda api: len(api.calls()) == 16)
            stop(workers)
        process.wait_for_line("no answer within 4 s, so its worker was killed", count=16)
        opened.set()
        for job in jobs:
            database.wait_for(SUCCEEDED, job)
            outcomes = [attempt.outcome for attempt in database.attempts(job)]
            assert outcomes == ["unknown", "succeeded"]
            calls = api.calls(job)
            assert len(calls) == (1 if when == "before" else 2)
            assert int(calls[-1].headers["X-Attempt"]) > 1


def test_stage_has_its_whole_timeout_however_long_the_claim_took(database, api, listener, tmp_path):
    # In one write, as the listener writes to the same pipe.
    body = "print('left %f\\n' % (call.until - time.monotonic()), end='', flush=True)\n"
    with TcpProxy(database.environ) as proxy:
        process = listener(database, api=api, **proxy.settings, SWEEP_INTERVAL=3600,
                           program=program(tmp_path, body + POST, 2))  # fmt: skip
        wait_until_idle(tmp_path)
        claimed = proxy.hold_answer(CLAIM)
        job = database.add_job("overlay")
        database.wait_for(CLAIMED_FOR, 1, 2.5)
        claimed.release()
        database.wait_for(SUCCEEDED, job)
        left = re.search(r"left ([\d.]+)", process.wait_for_line("left"))[1]
        assert float(left) > 0.5  # and not less than nothing
    assert len(api.calls(job)) == 1
