"""Signals: a worker finishes the call in hand, its parent passes on, and nobody is left behind."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from tcp_proxy import TcpProxy
from waiting import (
    CLAIM,
    LISTENING,
    WORKERS,
    gate,
    pid_of,
    until,
    wait_for_call,
    wait_until_idle,
)

from demo.stage_api import StageApi
from demo.stage_server import Answer

NEVER = {"SWEEP_INTERVAL": 3600}  # whoever waits for the clock waits longer than a test
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


def is_gone(pid: int) -> bool:
    """Whether a process has ended; where nobody reaps it, it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- one worker ----------------------------------------------------------------------------


def test_signal_ends_an_idle_worker(database, listener, tmp_path):
    process = listener(database, **NEVER)
    wait_until_idle(tmp_path)
    assert process.stop() == 0
    assert process.lines[-1].split("] ")[1].startswith("Job State Listener 중지됨")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_call_finish_and_starts_no_other(number, database, api, listener):
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, api=api)
        job = database.add_job()
        wait_for_call(api, job)
        other = database.add_job()
        process.signal(number)
        opened.set()
        assert process.wait() == 0
    assert database.owed(job) is None
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert database.owed(other).attempts == 0
    assert len(api.calls()) == 1


def test_second_signal_leaves_at_once_and_the_lease_covers_the_call(database, api, listener):
    with gate(api):
        process = listener(database, api=api)
        job = database.add_job()
        wait_for_call(api, job)
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGINT)
        assert process.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        owed = database.owed(job)
        assert pid_of(owed.worker) == process.pid
        assert database.value("SELECT %s > now()", owed.due_at)
        assert database.attempts(job) == []


def test_claim_that_arrives_together_with_the_signal_is_given_back(
    database, api, listener, tmp_path
):
    with TcpProxy(database.environ) as proxy:
        process = listener(database, api=api, **proxy.settings)
        wait_until_idle(tmp_path)
        claimed = proxy.hold_answer(CLAIM)
        job = database.add_job()
        claimed.wait()
        process.signal(signal.SIGTERM)
        claimed.release()
        assert process.wait() == 0
    owed = database.owed(job)
    assert (owed.worker, owed.attempts, owed.free_attempts) == (None, 1, 1)
    assert database.value("SELECT %s <= now()", owed.due_at)
    assert not api.calls()


def test_result_is_written_after_the_stop_once_the_database_is_back(
    own_server, make_database, listener
):
    database = make_database(own_server)
    with StageApi(database.dsn) as api, gate(api, answer=Answer(200)) as opened:
        process = listener(database, api=api, JOB_STATE_LISTENER_RECONNECT_DELAY=0.1)
        job = database.add_job()
        wait_for_call(api, job)
        own_server.embedded.stop("immediate")
        process.signal(signal.SIGTERM)
        opened.set()
        process.wait_for_line("(4번째)")
        own_server.embedded.start()
        assert process.wait() == 0
        database.conn = database.connect()
        assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
        assert database.owed(job) is None


# --- several workers -----------------------------------------------------------------------


def test_parent_passes_the_signal_on_and_the_calls_finish(database, api, listener):
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, "run", "--workers", "3", api=api, **NEVER)
        process.wait_for_line(LISTENING, count=3)
        jobs = [database.add_job() for _ in range(2)]
        api.wait_for(lambda api: len(api.calls()) == 2)
        process.signal(signal.SIGTERM)
        process.wait_for_line("Job State Listener 중지됨")  # the third, which had no call
        opened.set()
        assert process.wait() == 0
    assert [row.outcome for job in jobs for row in database.attempts(job)] == ["succeeded"] * 2
    assert database.value("SELECT count(*) FROM stage_calls") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_whole_group_lets_the_calls_finish(number, database, api, listener):
    """Ctrl-C reaches every process of a terminal, a service manager's SIGTERM all of a service."""
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, "run", "--workers", "3", api=api, **NEVER)
        process.wait_for_line(LISTENING, count=3)
        jobs = [database.add_job() for _ in range(2)]
        api.wait_for(lambda api: len(api.calls()) == 2)
        for pid in process.children():
            os.kill(pid, number)
        if number == signal.SIGTERM:
            process.wait_for_line("Job State Listener 중지됨")  # heard once, and now again
        process.signal(number)
        process.wait_for_line("Job State Listener 중지됨")
        opened.set()
        assert process.wait() == 0
    assert [row.outcome for job in jobs for row in database.attempts(job)] == ["succeeded"] * 2


def test_second_signal_to_the_parent_ends_all_workers_at_once(database, api, listener):
    with gate(api):
        process = listener(database, "run", "--workers", "2", api=api, **NEVER)
        process.wait_for_line(LISTENING, count=2)
        job = database.add_job()
        wait_for_call(api, job)
        workers = process.children()
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGINT)
        assert process.wait() != 0
        assert all(map(is_gone, workers))
        assert pid_of(database.owed(job).worker) in workers


def test_workers_of_a_killed_parent_finish_and_stop_by_themselves(database, api, listener):
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, "run", "--workers", "2", api=api, SWEEP_INTERVAL=0.1)
        process.wait_for_line(LISTENING, count=2)
        job = database.add_job()
        wait_for_call(api, job)
        workers = process.children()
        process.signal(signal.SIGKILL)
        opened.set()
        try:
            until(lambda: all(map(is_gone, workers)), "the end of the workers")
        finally:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert database.rows(f"SELECT 1 FROM pg_stat_activity WHERE {WORKERS}") == []


def test_workers_that_cannot_start_end_their_parent(empty_database, listener):
    process = listener(empty_database, "run", "--workers", "3")
    assert process.wait() == 2
    assert "make trigger" in process.output
    assert "재시작" not in process.output


def test_worker_that_dies_again_is_restarted_later(database, listener):
    process = listener(database, "run", "--workers", "2")
    process.wait_for_line(LISTENING, count=2)
    survivor, victim = process.children()
    os.kill(victim, signal.SIGKILL)
    process.wait_for_line("종료됨 (-9) → 1초 후 재시작")
    process.wait_for_line(LISTENING, count=3)
    os.kill(next(pid for pid in process.children() if pid != survivor), signal.SIGKILL)
    process.wait_for_line("종료됨 (-9) → 2초 후 재시작")
    assert process.stop() == 0
    assert is_gone(survivor)
