"""Signals: the listener waits for the calls under way, and leaves nobody behind."""

import os
import signal
from types import SimpleNamespace

import pytest
from stage_functions import POST, program
from tcp_proxy import TcpProxy
from waiting import (
    CLAIM,
    LISTENERS,
    RECONNECTING,
    gate,
    is_gone,
    until,
    wait_for_call,
    wait_until_idle,
)

from chaos.history import pid_of
from demo.stage_api import StageApi
from demo.stage_server import Answer

NEVER = {"SWEEP_INTERVAL": 3600}  # no sweep happens during a test


# --- the first signal ----------------------------------------------------------------------


def test_signal_ends_an_idle_listener_and_its_workers(database, listener, tmp_path):
    process = listener(database, **NEVER)
    wait_until_idle(tmp_path)
    workers = process.children()
    assert process.stop() == 0
    assert len(workers) == 4
    until(lambda: all(map(is_gone, workers)), "the end of the workers")
    assert process.lines[-1].split("] ")[1].startswith("Job State Listener 중지됨")


def test_row_of_another_table_whose_call_is_waited_for_is_named(variants, caller):
    [row] = variants.add(variants.database.add_job("new"), status="done")
    stopping = caller("http://127.0.0.1:1")
    stopping.listener.workers.all = [SimpleNamespace(call=stopping.claim())]
    stopping.listener.signals.stops.append(signal.SIGTERM)
    stopping.listener.obey()
    assert f"(yolo_detect {row})" in stopping.line("중지 요청: 진행 중인 호출을 기다림")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_lets_the_call_finish_and_starts_no_other(number, database, api, listener):
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, api=api)
        job = database.add_job()
        wait_for_call(api, job)
        process.signal(number)
        assert f"(vlm_analyze {job})" in process.wait_for_line("중지 요청: 진행 중인 호출을 기다림")
        other = database.add_job()
        opened.set()
        assert process.wait() == 0
    assert database.owed(job) is None
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert database.owed(other).attempts == 0
    assert len(api.calls()) == 1


def test_claim_that_arrives_together_with_the_signal_is_called_and_waited_for(
    database, api, listener, tmp_path
):
    with TcpProxy(database.environ) as proxy:
        process = listener(database, api=api, **proxy.settings)
        wait_until_idle(tmp_path)
        claimed = proxy.hold_answer(CLAIM)
        job = database.add_job("overlay", "done")
        claimed.wait()
        process.signal(signal.SIGTERM)
        claimed.release()
        assert process.wait() == 0
    assert f"(vlm_judge {job})" in process.output
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert len(api.calls(job)) == 1


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


def test_stop_says_that_a_result_waits_for_the_database(own_server, make_database, listener):
    database = make_database(own_server)
    with StageApi(database.dsn) as api, gate(api, answer=Answer(200)) as opened:
        process = listener(database, api=api, JOB_STATE_LISTENER_RECONNECT_DELAY=0.1)
        wait_for_call(api, database.add_job())
        own_server.embedded.stop("immediate")
        opened.set()
        process.wait_for_line("파이프라인 단계 실행 성공")
        process.signal(signal.SIGTERM)
        process.wait_for_line("중지 요청: 결과 1건이 기록되기를 기다림")
        insist(process, signal.SIGTERM)
        assert "바로 중지: 호출 0건, 기록 못 한 결과 1건" in process.output
        own_server.embedded.start()


def test_two_signals_at_once_are_one_request(database, api, listener):
    """As of a terminal that is closed: its shell sends a second SIGHUP."""
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, api=api)
        job = database.add_job()
        wait_for_call(api, job)
        process.signal(signal.SIGHUP)
        process.signal(signal.SIGTERM)
        process.wait_for_line("중지 요청: 진행 중인 호출을 기다림")
        opened.set()
        assert process.wait() == 0
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]


@pytest.mark.parametrize("ignored", ["HUP", "INT"])
def test_signal_that_was_ignored_at_the_start_does_not_stop(
    ignored, database, api, listener, tmp_path
):
    """As `nohup` and a script's `&` ignore them."""
    within = ("sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh")
    body = f"subprocess.run(['sh', '-c', 'kill -{ignored} $$; echo goes on'])\n{POST}"
    process = listener(database, api=api, within=within, program=program(tmp_path, body, 60))
    wait_until_idle(tmp_path)
    process.signal(signal.Signals[f"SIG{ignored}"])
    database.add_job("overlay")
    process.wait_for_line("goes on")
    assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_every_process_lets_the_calls_finish(number, database, api, listener):
    """A service manager's SIGTERM reaches all of a service."""
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, "run", "--workers", "3", api=api, **NEVER)
        jobs = [database.add_job() for _ in range(2)]
        api.wait_for(lambda api: len(api.calls()) == 2)
        for pid in (*process.children(), process.pid):
            os.kill(pid, number)
        process.wait_for_line("중지 요청: 진행 중인 호출을 기다림")
        opened.set()
        assert process.wait() == 0
    assert [row.outcome for job in jobs for row in database.attempts(job)] == ["succeeded"] * 2


# --- the second signal ---------------------------------------------------------------------


def insist(process, number: int) -> None:
    """Send a signal until it counts: those shortly after the last request are part of it."""

    def has_ended() -> bool:
        process.signal(number)
        return process.process.poll() is not None

    until(has_ended, "the end of the listener")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_kills_the_workers_and_the_lease_covers_the_call(
    second, database, api, listener
):
    with gate(api):
        process = listener(database, api=api)
        job = database.add_job()
        wait_for_call(api, job)
        workers = process.children()
        process.signal(signal.SIGTERM)
        process.wait_for_line("한 번 더 요청하면 바로 중지")
        insist(process, second)
        assert process.wait() == 128 + second
        assert "바로 중지: 호출 1건, 기록 못 한 결과 0건" in process.output
        until(lambda: all(map(is_gone, workers)), "the end of the workers")
    owed = database.owed(job)
    assert pid_of(owed.worker) == process.pid
    assert database.value("SELECT %s > now()", owed.due_at)
    assert database.attempts(job) == []
    database.wait_for(f"SELECT count(*) = 0 FROM pg_stat_activity WHERE {LISTENERS}")


def test_second_signal_leaves_although_the_database_is_away(own_server, make_database, listener):
    database = make_database(own_server)
    with StageApi(database.dsn) as api, gate(api):
        process = listener(database, api=api)
        wait_for_call(api, database.add_job())
        own_server.embedded.stop("immediate")
        process.wait_for_line(RECONNECTING)
        process.signal(signal.SIGTERM)
        process.wait_for_line("한 번 더 요청하면 바로 중지")
        insist(process, signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        own_server.embedded.start()
        database.conn = database.connect()
