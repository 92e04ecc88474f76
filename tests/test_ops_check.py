"""`check`, as cron and HEALTHCHECK use it: 0 alive, 1 not, 3 no database; one line says why."""

import os
import signal
from pathlib import Path

import pytest
from claims import claim, connected, held, settle
from waiting import gate, until, wait_for_call, wait_until_idle

from heartbeat import Beat, Heartbeat, heartbeats

AWAY = {"DB_PORT": 1}


def beats(directory: Path) -> list[Beat]:
    return heartbeats(str(directory / "heartbeats"))


def line(done, code: int) -> str:
    """The one line of a check that ended with `code`."""
    [text] = done.lines
    assert done.code == code, done
    assert text.startswith("ok: " if code == 0 else "not ok: ")
    return text.partition(": ")[2]


def test_no_listener_is_not_ok_and_says_what_to_start(database, run_command, tmp_path):
    told = line(run_command(database, "check"), 1)
    directory = tmp_path / "heartbeats"
    assert told == (f"no listener is running: no heartbeat in {directory}; start ./jsl")


@pytest.mark.parametrize("name", ["LISTENER_ENABLED", "ENABLE_JOB_STATE_LISTENER"])
def test_no_listener_where_it_is_off_names_the_setting(database, run_command, name):
    told = line(run_command(database, "check", **{name: "false"}), 1)
    assert told.endswith(f"; it is off by {name}=false in the environment")


def test_heartbeats_that_cannot_be_read_are_not_taken_for_none(database, run_command):
    told = line(run_command(database, "check", HEARTBEAT_DIR="/" + "x" * 300), 1)
    assert told.startswith("the heartbeats cannot be read ([Errno 36] File name too long: ")
    assert told.endswith("): run check as the listener's user")


def test_idle_listener_is_alive_whatever_the_database_does(
    database, listener, run_command, tmp_path
):
    listener(database)
    wait_until_idle(tmp_path)
    told = line(run_command(database, "check", **AWAY), 0)
    assert told == "1 listener alive: waiting for a job to change"


def test_listener_without_its_database_is_alive(database, listener, run_command, tmp_path):
    process = listener(database, **AWAY, JOB_STATE_LISTENER_RECONNECT_DELAY=3600)
    process.wait_for_line("재연결 시도")
    until(lambda: "database away" in beats(tmp_path)[0].doing, "its heartbeat says so")
    assert line(run_command(database, "check"), 0).startswith(
        "1 listener alive: database away: ConnectionLost: "
    )


def test_listener_whose_statement_is_refused_is_said_to_try_again(
    database, listener, run_command, tmp_path
):
    database.rows("ALTER TABLE stage_calls RENAME COLUMN due_at TO gone")
    process = listener(database, JOB_STATE_LISTENER_RECONNECT_DELAY=3600)
    assert "due_at" in process.wait_for_line("재연결 시도")
    until(lambda: "trying again" in beats(tmp_path)[0].doing, "its heartbeat says so")
    assert "database away" not in line(run_command(database, "check"), 0)
    refused = run_command(database, "test-job").refused(1)
    assert refused.startswith("no listener is connected, though one is running: ./jsl check")


@pytest.fixture
def calling(database, api, listener, tmp_path):
    """A listener with a call under way."""
    with gate(api):
        process = listener(database, api=api)
        wait_for_call(api, database.add_job("img_gen", "done"))
        until(lambda: beats(tmp_path)[0].doing == "making calls", "its heartbeat says so")
        yield process


def test_listener_with_a_call_under_way_is_alive(database, calling, run_command):
    assert line(run_command(database, "check"), 0) == "1 listener alive: making calls"


def test_listener_that_takes_no_call_says_whether_it_is_busy_or_stopping(
    database, api, listener, run_command, tmp_path
):
    with gate(api):
        process = listener(database, "run", "--workers=1", api=api)
        wait_for_call(api, database.add_job())
        until(lambda: "all workers are busy" in beats(tmp_path)[0].doing, "its heartbeat says so")
        told = line(run_command(database, "check"), 0)
        assert told == "1 listener alive: making calls, all workers are busy"
        waiting = database.add_job()
        assert run_command(database, "job", waiting).lines[-1].endswith(": all workers are busy")
        process.signal(signal.SIGTERM)
        until(lambda: "stopping" in beats(tmp_path)[0].doing, "its heartbeat says so")
        told = line(run_command(database, "check"), 0)
        assert told == "1 listener alive: stopping: waits for 1 call"
        assert "stopping: waits for 1 call" in run_command(database, "status").out
        assert run_command(database, "job", waiting).lines[-1].endswith(": it is stopping")


def test_killed_listener_is_dead_though_its_workers_go_on(database, calling, run_command, tmp_path):
    calling.kill_alone()
    [beat] = beats(tmp_path)
    told = line(run_command(database, "check"), 1)
    assert (
        told
        == f"listener {beat.listener} (pid {beat.pid}) is dead; it was making calls; start ./jsl"
    )


def test_one_dead_listener_of_two_is_enough(database, listener, run_command, tmp_path):
    first, _ = listener(database), listener(database)
    wait_until_idle(tmp_path, listeners=2)
    assert line(run_command(database, "check"), 0).startswith("2 listeners alive: waiting")
    first.kill()
    assert "is dead; it was waiting for a job" in line(run_command(database, "check"), 1)


def test_listener_is_alive_whatever_becomes_of_its_workers(
    database, listener, run_command, tmp_path
):
    process = listener(database)
    wait_until_idle(tmp_path)
    for pid in process.children():
        os.kill(pid, signal.SIGSTOP)
    assert line(run_command(database, "check"), 0).startswith("1 listener alive: ")


def test_listener_past_its_time_hangs(database, run_command, tmp_path):
    heartbeat = Heartbeat(str(tmp_path / "heartbeats"), "stuck")
    heartbeat.beat("making calls", -1)
    try:
        told = line(run_command(database, "check"), 1)
        assert told.startswith("listener stuck hangs: ")
        assert told.endswith(" s making calls")
    finally:
        heartbeat.close()


def test_disabled_listener_is_ok(database, listener, run_command):
    listener(database, ENABLE_JOB_STATE_LISTENER="false").wait_for_line("비활성화됨")
    told = line(run_command(database, "check"), 0)
    assert told == (
        "1 listener alive: disabled by ENABLE_JOB_STATE_LISTENER=false in the environment"
    )


def test_stopped_listener_is_not_ok(database, listener, run_command, tmp_path):
    process = listener(database)
    wait_until_idle(tmp_path)
    process.stop()
    assert "no listener is running" in line(run_command(database, "check"), 1)


@pytest.fixture
def waiting(database, listener, tmp_path):
    """A listener for one stage only, and a call of another that nobody takes."""
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
    assert told.startswith("1 listener alive: waiting for a job to change; oldest due call 36")


def test_lag_of_a_stage_that_is_down_does_not_start_again_at_each_try(
    database, run_command, waiting
):
    database.rows("UPDATE stage_calls SET created_at = now() - interval '1 hour'")
    with connected(database) as conn:
        settle(conn, held(claim(conn)))
    told = line(run_command(database, "check", "--max-lag", "60"), 1)
    assert told.startswith("the oldest due call has waited 36")


def test_given_up_call_is_no_lag(database, run_command, waiting):
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    told = line(run_command(database, "check", "--max-lag", "60"), 0)
    assert told.endswith("; no call is due")


def test_lag_of_a_database_that_is_away_is_not_known(database, run_command, waiting):
    told = line(run_command(database, "check", "--max-lag", "60", **AWAY), 3)
    assert told.startswith("the lag is not known: ")
    assert "onnection refused" in told
