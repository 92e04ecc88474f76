"""Faults around the process: signals, the disk, the clock, a pipe that nobody reads."""

import fcntl
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from tcp_proxy import TcpProxy
from waiting import until, wait_until_idle

from demo.stage_server import Answer
from faults.network import require_root
from heartbeat import ALIVE, HANGING, Heartbeat, heartbeats
from ops.check import verdict

SETTLE = "EXECUTE pay("
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


@pytest.fixture
def beats(tmp_path) -> Path:
    """The directory that the `listener` fixture uses as well."""
    directory = tmp_path / "heartbeats"
    directory.mkdir()
    return directory


# --- signals -------------------------------------------------------------------------------


def test_p1_first_process_of_a_container_hears_sigterm(database, listener, beats):
    require_root("unshare")
    process = listener(database, within=["unshare", "--pid", "--fork", "--kill-child"])
    until(lambda: [beat.pid for beat in heartbeats(str(beats))] == [1], "a listener with pid 1")
    (pid,) = process.children()
    os.kill(pid, signal.SIGTERM)
    assert process.wait() == 0
    assert "Job State Listener 중지됨" in process.output


def test_p1_container_runs_no_shell_that_would_keep_signals_to_itself():
    lines = re.findall(
        r"^(?:.* )?(?:CMD|ENTRYPOINT) (.*)$", (ROOT / "Dockerfile").read_text(), re.M
    )
    assert [json.loads(line)[0] for line in lines] == ["python", "python", "run"]


@pytest.mark.parametrize("stops", ["request", "answer"])
def test_p3_signal_between_the_answer_and_its_settling_loses_nothing(
    stops, database, api, listener, tmp_path
):
    api.on("vlm_judge", lambda _request: Answer(200))
    with TcpProxy(database.environ) as proxy:
        process = listener(database, api=api, **proxy.settings)
        wait_until_idle(tmp_path)
        settling = getattr(proxy, f"hold_{stops}")(SETTLE)
        job = database.add_job("overlay", "done")
        settling.wait()
        process.signal(signal.SIGTERM)
        settling.release()
        assert process.wait() == 0
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert database.owed(job) is None
    assert len(api.calls(job)) == 1


# --- the disk ------------------------------------------------------------------------------

SMALL_DISK = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16k none "$0" && exec "$@"')


def test_p5_full_disk_does_not_silence_the_heartbeat(database, api, listener, beats):
    require_root("unshare", "mount")
    process = listener(database, api=api, within=[*SMALL_DISK, beats], SWEEP_INTERVAL=0.1)
    inside = Path(f"/proc/{process.pid}/root{beats}")
    wait_until_idle(inside.parent)
    (file,) = inside.iterdir()
    with suppress(OSError), (inside / "log").open("wb", buffering=0) as log:
        while True:
            log.write(bytes(4096))

    def valid_until() -> float:
        return json.loads(file.read_text())["valid_until"]

    before = valid_until()
    until(lambda: valid_until() > before, "a heartbeat on a full disk")
    job = database.add_job("overlay", "done")
    database.wait_for(SUCCEEDED, job)
    assert verdict(str(inside))[0]
    assert "heartbeat 파일을 쓸 수 없음" not in process.output


# --- the clock -----------------------------------------------------------------------------

JUMPING = """
import itertools, time
real, jumps = time.time, itertools.cycle([-1e9, -3600, 0, 3600, 1e9])
time.time = lambda: real() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def test_p7_clock_that_jumps_changes_nothing(database, api, listener, run_command, beats, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    jumping = {"PYTHONPATH": tmp_path, "SWEEP_INTERVAL": 0.1}
    process = listener(database, api=api, **jumping)
    job = database.add_job()
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    assert len(api.calls(job)) == 5
    until(lambda: len({line[:4] for line in process.lines}) > 2, "several years")
    (file,) = beats.iterdir()
    for year in (1e9, 4e9):
        os.utime(file, (year, year))
        assert run_command(database, "check", **jumping).code == 0
    process.kill()
    assert "is dead" in run_command(database, "check", **jumping).out


# --- those who look ------------------------------------------------------------------------


def test_p8_overlapping_checks_do_not_take_each_other_for_a_listener(beats):
    living, dead = Heartbeat(str(beats), "living"), Heartbeat(str(beats), "dead")
    for heartbeat in (living, dead):
        heartbeat.beat("waiting", 60)
    os.close(dead.file)
    with dead.path.open() as first, living.path.open() as second:
        fcntl.flock(first, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as another check does
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        alive, line = verdict(str(beats))
    assert not alive and "listener dead" in line


@pytest.mark.slow
def test_p9_listener_whose_output_nobody_reads_is_seen_to_hang(database, listener, beats, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    unread = ("sh", "-c", 'exec "$@" > "$0"', pipe)
    listener(database, within=unread, SWEEP_INTERVAL=0.1)
    wait_until_idle(tmp_path)
    database.rows(
        "SELECT pg_notify('job_state_changed', n || repeat('x', 200))"
        " FROM generate_series(1, 2000) AS n"
    )

    def states() -> list[str]:
        return [beat.state for beat in heartbeats(str(beats))]

    until(lambda: states() == [HANGING], "a hanging listener", 180)
    assert not verdict(str(beats))[0]

    def read_on() -> bool:
        with suppress(BlockingIOError):
            os.read(reader, 1 << 20)
        return states() == [ALIVE]

    until(read_on, "a living listener")
    os.close(reader)
