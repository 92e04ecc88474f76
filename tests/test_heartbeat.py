"""The heartbeat files, and what `check` concludes from them."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAM
from waiting import gate, until, wait_for_call, wait_until_idle

import db
from heartbeat import ALIVE, DEAD, HANGING, Heartbeat, carefully, heartbeats
from listener import HEARTBEAT_MARGIN
from ops.check import verdict

# The seconds within which a listener that is frozen is noticed, and one more.
SOON = 25 + 1


@pytest.fixture
def beats(tmp_path) -> Path:
    """The directory that the `listener` fixture uses as well."""
    return tmp_path / "heartbeats"


def states(directory: Path) -> dict[str, str]:
    return {beat.listener: beat.state for beat in heartbeats(str(directory))}


def die(heartbeat: Heartbeat) -> None:
    """Close the file, as the kernel does when a process ends."""
    os.close(heartbeat.file)


# --- the file ------------------------------------------------------------------------------


def test_living_listener_says_what_it_is_doing(beats):
    Heartbeat(str(beats), "one").beat("waiting", 60)
    (beat,) = heartbeats(str(beats))
    assert (beat.listener, beat.pid, beat.doing) == ("one", os.getpid(), "waiting")
    assert beat.state == ALIVE
    assert verdict(str(beats)) == (True, "1 listener alive: waiting")


def test_freed_lock_means_dead_although_the_pid_lives(beats):
    heartbeat = Heartbeat(str(beats), "one")
    heartbeat.beat("waiting", 3600)
    die(heartbeat)
    assert states(beats) == {"one": DEAD}
    assert verdict(str(beats)) == (
        False,
        f"listener one (pid {os.getpid()}) is dead; it was waiting; start ./jsl",
    )


@pytest.mark.parametrize("opened", [1, 2], ids=["as it is read", "as its lock is looked at"])
def test_listener_that_ends_while_it_is_looked_at_is_not_dead(beats, monkeypatch, opened):
    ending, opens = Heartbeat(str(beats), "one"), itertools.count(1)
    ending.beat("waiting", 60)

    def end_meanwhile(path: str, flags: int) -> int:
        file = carefully(path, flags)
        if next(opens) == opened:
            ending.close()
        return file

    monkeypatch.setattr("heartbeat.carefully", end_meanwhile)
    assert states(beats) == {} and next(opens) > opened


def test_heartbeat_of_another_boot_is_dead(beats):
    heartbeat = Heartbeat(str(beats), "one")
    heartbeat.beat("waiting", 3600)
    said = json.loads(heartbeat.path.read_text())
    os.pwrite(heartbeat.file, json.dumps(said | {"boot": "before"}).encode().ljust(4096), 0)
    assert states(beats) == {"one": DEAD}


def test_new_listener_removes_the_files_of_the_dead_only(beats):
    living, dead = Heartbeat(str(beats), "living"), Heartbeat(str(beats), "dead")
    for heartbeat in (living, dead):
        heartbeat.beat("waiting", 60)
    die(dead)
    Heartbeat(str(beats), "new").beat("waiting", 60)
    assert states(beats) == {"living": ALIVE, "new": ALIVE}


def test_closed_heartbeat_leaves_no_file(beats):
    heartbeat = Heartbeat(str(beats), "one")
    heartbeat.beat("waiting", 60)
    heartbeat.close()
    assert list(beats.iterdir()) == []


def test_long_text_in_any_script_fits_the_file(beats):
    heartbeat = Heartbeat(str(beats), "one")
    for doing in ("🎨" * 4000, "작업" * 4000, "\x01" * 4000, "waiting"):
        heartbeat.beat(doing, 60)
        assert states(beats) == {"one": ALIVE}
    assert verdict(str(beats)) == (True, "1 listener alive: waiting")


def test_time_counts_from_the_beginning_of_what_it_is_doing(beats):
    heartbeat = Heartbeat(str(beats), "one")
    for _ in range(2):
        heartbeat.beat("calling", 60)
        since = json.loads(heartbeat.path.read_text())["since"]
    heartbeat.beat("calling", 60)
    assert json.loads(heartbeat.path.read_text())["since"] == since
    heartbeat.beat("waiting", 60)
    assert json.loads(heartbeat.path.read_text())["since"] > since


def test_foreign_and_broken_files_are_passed_over(beats):
    Heartbeat(str(beats), "one").beat("waiting", 60)
    for name, text in {"empty": "", "cut": '{"pid": 1', "list": "[]", "other": "{}"}.items():
        (beats / f"{name}.heartbeat").write_text(text)
    assert states(beats) == {"one": ALIVE}


def test_link_or_pipe_that_others_put_there_is_not_followed_nor_waited_for(beats):
    Heartbeat(str(beats), "one").beat("waiting", 60)
    os.mkfifo(beats / "pipe.heartbeat")
    (beats / "endless.heartbeat").symlink_to("/dev/zero")
    (beats / "two.heartbeat").symlink_to(beats / "kept")
    (beats / "kept").write_text("kept")
    assert states(beats) == {"one": ALIVE}
    Heartbeat(str(beats), "two").beat("waiting", 60)  # says that it cannot, and goes on
    assert states(beats) == {"one": ALIVE}
    assert (beats / "kept").read_text() == "kept"


def test_heartbeat_is_for_its_own_user_alone(beats):
    Heartbeat(str(beats), "one").beat("waiting", 60)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (beats, beats / "one.heartbeat")]
    assert modes == [0o700, 0o600]


def test_file_of_another_program_is_never_removed(beats):
    beats.mkdir()
    (beats / "orders.json").write_text("{}")
    Heartbeat(str(beats), "one").close()
    assert [path.name for path in beats.iterdir()] == ["orders.json"]


# --- what a cleaner or a full disk does to it ----------------------------------------------


def remove_file(heartbeat: Heartbeat) -> None:
    heartbeat.path.unlink()


def remove_directory(heartbeat: Heartbeat) -> None:
    # A listener may make its file anew meanwhile.
    shutil.rmtree(heartbeat.path.parent, ignore_errors=True)


def replace_directory(heartbeat: Heartbeat) -> None:
    heartbeat.path.parent.rename(heartbeat.path.parent.with_name("moved"))
    heartbeat.path.parent.mkdir(exist_ok=True)


def replace_file(heartbeat: Heartbeat) -> None:
    """As a copy that was restored from a backup: nobody holds its lock."""
    text = heartbeat.path.read_text()
    heartbeat.path.unlink()
    heartbeat.path.write_text(text)


REMOVALS = [remove_file, remove_directory, replace_directory, replace_file]


@pytest.mark.parametrize("remove", REMOVALS)
def test_heartbeat_that_was_removed_is_made_anew(beats, remove):
    heartbeat = Heartbeat(str(beats), "one")
    heartbeat.beat("waiting", 60)
    remove(heartbeat)
    heartbeat.make_at = 0.0
    heartbeat.beat("calling", 60)
    assert verdict(str(beats)) == (True, "1 listener alive: calling")
    heartbeat.close()
    assert list(beats.iterdir()) == []


@pytest.mark.parametrize("remove", REMOVALS)
def test_listener_whose_heartbeat_was_removed_is_alive(database, listener, beats, tmp_path, remove):
    process = listener(database, SWEEP_INTERVAL=0.2)
    wait_until_idle(tmp_path)
    (file,) = beats.iterdir()
    remove(SimpleNamespace(path=file))
    until(lambda: verdict(str(beats))[0], "a heartbeat")
    assert states(beats) == {file.stem: ALIVE}
    assert process.stop() == 0
    assert list(beats.iterdir()) == []


def test_heartbeat_leaves_the_file_of_another_listener_in_its_place(beats):
    heartbeat = Heartbeat(str(beats), "one")
    heartbeat.beat("waiting", 60)
    remove_file(heartbeat)
    other = Heartbeat(str(beats), "one")
    other.beat("waiting", 60)
    heartbeat.close()
    assert states(beats) == {"one": ALIVE}


def test_directory_that_can_be_made_only_later_is_made_then(tmp_path):
    (tmp_path / "file").touch()
    heartbeat = Heartbeat(str(tmp_path / "file" / "beats"), "one")
    heartbeat.beat("waiting", 60)
    (tmp_path / "file").unlink()
    heartbeat.make_at = 0.0
    heartbeat.beat("calling", 60)
    assert states(tmp_path / "file" / "beats") == {"one": ALIVE}


def test_heartbeat_that_cannot_be_locked_leaves_no_open_file(beats, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    before = os.listdir("/proc/self/fd")
    heartbeat = Heartbeat(str(beats), "one")
    heartbeat.beat("waiting", 60)
    assert heartbeat.file is None and len(os.listdir("/proc/self/fd")) == len(before)


def test_listener_that_starts_on_a_full_disk_is_alive(beats):
    heartbeat = Heartbeat(str(beats), "one")  # an empty file: there was no room for more
    alive, line = verdict(str(beats))
    assert alive and "disk full?" in line
    die(heartbeat)
    assert verdict(str(beats))[0] is False


def test_listener_on_a_disk_that_was_full_at_its_start(database, api, listener, beats, tmp_path):
    full = tmp_path / "full.py"
    full.write_text(
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
        f"sys.path.insert(0, {str(PROGRAM.parent)!r})\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    )
    process = listener(database, api=api, program=full, SWEEP_INTERVAL=0.2)
    process.wait_for_line("heartbeat 파일을 쓸 수 없음")
    database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 1 FROM jobs WHERE current_step = 'vlm_judge'")
    assert verdict(str(beats))[0] is True
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    until(lambda: "waiting for a job" in verdict(str(beats))[1], "a heartbeat")


# --- listeners and `check` -----------------------------------------------------------------


def test_check_counts_several_listeners_and_asks_no_database(database, listener, beats, tmp_path):
    for _ in range(2):
        listener(database, "run", "--workers", "2")
    wait_until_idle(tmp_path, listeners=2)
    check = listener(database, "check", DB_HOST="")
    assert check.wait() == 0
    assert check.output == "ok: 2 listeners alive: waiting for a job to change"


def test_statements_that_take_long_are_not_a_hang(database, caller, beats, monkeypatch):
    """One after the other, they may take longer than a heartbeat allows for."""
    monkeypatch.setattr(db, "BEAT_EVERY", 0.01)
    listener = caller("http://127.0.0.1:1", HEARTBEAT_DIR=beats).listener
    listener.signals = None  # that of a test has no file descriptor
    conn = listener.connect()
    listener.beat("making calls", -HEARTBEAT_MARGIN)
    assert list(states(beats).values()) == [HANGING]
    db.execute(conn, "SELECT pg_sleep(0.1)")
    assert list(states(beats).values()) == [ALIVE]
    conn.close()


@pytest.mark.slow
def test_long_call_is_not_a_hang(database, api, listener, beats):
    with gate(api):
        listener(database, "run", "--workers", "1", api=api, STAGE_TIMEOUT=600)
        job = database.add_job()
        wait_for_call(api, job)
        until(lambda: "making calls" in verdict(str(beats))[1], "a heartbeat")
        (file,) = beats.iterdir()
        before = json.loads(file.read_text())["valid_until"]
        until(lambda: json.loads(file.read_text())["valid_until"] > before, "the next heartbeat")
        said = "1 listener alive: making calls, all workers are busy"
        assert verdict(str(beats)) == (True, said)
        assert json.loads(file.read_text())["valid_until"] < time.monotonic() + SOON


@pytest.mark.slow
def test_stopped_listener_is_noticed_soon_though_its_worker_is_in_a_long_call(
    database, api, listener, beats
):
    with gate(api):
        process = listener(database, api=api, STAGE_TIMEOUT=600)
        job = database.add_job()
        wait_for_call(api, job)
        until(lambda: "making calls" in verdict(str(beats))[1], "a heartbeat")
        process.signal(signal.SIGSTOP)
        until(lambda: not verdict(str(beats))[0], "the end of its time", SOON)
        assert "hangs" in verdict(str(beats))[1] and "making calls" in verdict(str(beats))[1]
        process.signal(signal.SIGCONT)
        until(lambda: verdict(str(beats))[0], "a heartbeat")


def test_directory_that_cannot_be_written_is_no_reason_to_stop(database, api, listener, tmp_path):
    (tmp_path / "file").touch()
    process = listener(database, api=api, HEARTBEAT_DIR=tmp_path / "file" / "beats")
    for _ in range(3):
        database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 3 FROM jobs WHERE current_step = 'vlm_judge'")
    assert process.stop() == 0
    assert process.output.count("heartbeat 파일을 쓸 수 없음") == 1


def test_full_disk_is_no_reason_to_stop(database, api, listener, beats, tmp_path):
    process = listener(database, api=api, SWEEP_INTERVAL=0.1)
    wait_until_idle(tmp_path)
    (file,) = beats.iterdir()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    process.wait_for_line("heartbeat 파일을 쓸 수 없음")
    stopped_at = json.loads(file.read_text())["valid_until"]
    database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 1 FROM jobs WHERE current_step = 'vlm_judge'")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    until(lambda: json.loads(file.read_text())["valid_until"] > stopped_at, "a heartbeat")
    assert process.output.count("heartbeat 파일을 쓸 수 없음") == 1
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    process.wait_for_line("heartbeat 파일을 쓸 수 없음", count=2)
