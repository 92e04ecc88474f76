"""`check`, as cron and HEALTHCHECK use it: 0 alive, 1 not, and one line that says why."""

import os
import signal
from pathlib import Path

import pytest
from waiting import gate, until, wait_for_call, wait_until_idle

from heartbeat import DEAD, Beat, Heartbeat, heartbeats

AWAY = {"DB_PORT": 1}


def beats(directory: Path) -> list[Beat]:
    return heartbeats(str(directory / "heartbeats"))


def line(done, code: int) -> str:
    """The one line of a check that ended with `code`."""
    [text] = done.lines
    assert done.code == code, done
    assert text.startswith("ok: " if code == 0 else "not ok: ")
    return text.partition(": ")[2]


def test_no_worker_is_not_ok_and_says_what_to_start(database, run_command, tmp_path):
    told = line(run_command(database, "check"), 1)
    assert told == (
        f"no worker is running: no heartbeat in {tmp_path / 'heartbeats'}; start python listener.py"
    )


def test_heartbeats_that_cannot_be_read_are_not_taken_for_none(database, run_command):
    told = line(run_command(database, "check", HEARTBEAT_DIR="/" + "x" * 300), 1)
    assert told.startswith("the heartbeats cannot be read ([Errno 36] File name too long: ")
    assert told.endswith("): run check as the listener's user")


def test_idle_worker_is_alive_whatever_the_database_does(database, listener, run_command, tmp_path):
    listener(database)
    wait_until_idle(tmp_path)
    told = line(run_command(database, "check", **AWAY), 0)
    assert told == "1 worker alive: waiting for a job to change"


def test_worker_without_its_database_is_alive(database, listener, run_command):
    process = listener(database, **AWAY)
    process.wait_for_line("재연결 시도")
    assert "1 worker alive: database away: ConnectionLost: " in line(
        run_command(database, "check"), 0
    )


def test_long_call_is_no_hang(database, api, listener, run_command):
    with gate(api):
        listener(database, api=api)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        told = line(run_command(database, "check"), 0)
        assert told == f"1 worker alive: calling vlm_analyze for job {job}"


def test_killed_worker_is_named_with_what_it_did(database, api, listener, run_command, tmp_path):
    with gate(api):
        process = listener(database, api=api)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        process.kill()
        [beat] = beats(tmp_path)
        told = line(run_command(database, "check"), 1)
        doing = f"calling vlm_analyze for job {job}"
        assert told == f"worker {beat.worker} (pid {beat.pid}) is dead; it was {doing}"


def test_one_dead_worker_of_three_is_enough(database, listener, run_command, tmp_path):
    process = listener(database, "run", "--workers", "3")
    wait_until_idle(tmp_path, workers=3)
    assert line(run_command(database, "check"), 0).startswith("3 workers alive: waiting")
    process.signal(signal.SIGSTOP)  # else the parent would start another one
    os.kill(process.children()[1], signal.SIGKILL)
    until(lambda: DEAD in [beat.state for beat in beats(tmp_path)], "a dead worker")
    assert "is dead; it was waiting for a job" in line(run_command(database, "check"), 1)


def test_worker_past_its_time_hangs(database, run_command, tmp_path):
    heartbeat = Heartbeat(str(tmp_path / "heartbeats"), "stuck")
    heartbeat.beat("calling overlay for job 7", -1)
    try:
        told = line(run_command(database, "check"), 1)
        assert told.startswith("worker stuck hangs: ")
        assert told.endswith(" s calling overlay for job 7")
    finally:
        heartbeat.close()


def test_disabled_listener_is_ok(database, listener, run_command):
    listener(database, ENABLE_JOB_STATE_LISTENER="false").wait_for_line("비활성화됨")
    told = line(run_command(database, "check"), 0)
    assert told == "1 worker alive: disabled by ENABLE_JOB_STATE_LISTENER=false"


def test_stopped_listener_is_not_ok(database, listener, run_command, tmp_path):
    process = listener(database)
    wait_until_idle(tmp_path)
    process.stop()
    assert "no worker is running" in line(run_command(database, "check"), 1)


@pytest.fixture
def waiting(database, listener, tmp_path):
    """A worker for one stage only, and a call of another that nobody takes."""
    listener(database, "run", "--stage", "planner")
    wait_until_idle(tmp_path)
    job = database.add_job("img_gen", "done")
    database.rows("UPDATE stage_calls SET due_at = now() - interval '1 hour'")
    return job


def test_overdue_call_is_not_ok_with_max_lag(database, run_command, waiting):
    told = line(run_command(database, "check", "--max-lag", "60"), 1)
    assert told.startswith("the oldest due call has waited 36")
    assert told.endswith(" s, allowed are 60 s")
    assert line(run_command(database, "check"), 0)


def test_lag_below_the_limit_is_ok_and_shown(database, run_command, waiting):
    told = line(run_command(database, "check", "--max-lag", "7200"), 0)
    assert told.startswith("1 worker alive: waiting for a job to change; oldest due call 36")


def test_given_up_call_is_no_lag(database, run_command, waiting):
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    told = line(run_command(database, "check", "--max-lag", "60"), 0)
    assert told.endswith("; oldest due call 0 s")


def test_lag_of_a_database_that_is_away_is_not_known(database, run_command, waiting):
    told = line(run_command(database, "check", "--max-lag", "60", **AWAY), 1)
    assert told.startswith("the lag is not known: ")
    assert "onnection refused" in told
