"""Being told to stop, several workers, and the lines of the log: without a database."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import config
from logs import LONGEST_LINE, OneLine

ROOT = Path(__file__).parent.parent
PRELUDE = """
import logging, os, signal, sys
import process
from process import Stop, run_workers
logging.basicConfig(stream=sys.stdout, format="%(message)s")

def wait_for_stop(role):
    stop = Stop(role)
    print("waiting", flush=True)
    while not stop.requested:
        stop.wait(3600)
    return 0
"""


@pytest.fixture
def script():
    """script(text): a running Python process with the names of PRELUDE."""
    started: list[subprocess.Popen] = []

    def start(text: str) -> subprocess.Popen:
        command = [sys.executable, "-u", "-c", PRELUDE + text]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(
            subprocess.Popen(command, cwd=ROOT, encoding="utf-8", start_new_session=True, **pipes)
        )
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
        process.communicate()


# --- being told to stop --------------------------------------------------------------------


def test_signal_ends_the_wait(script):
    process = script("sys.exit(wait_for_stop('worker'))")
    assert process.stdout.readline() == "waiting\n"
    process.terminate()
    assert process.wait(60) == 0


def test_signal_before_the_wait_is_not_slept_over(script):
    process = script("stop = Stop(); os.kill(os.getpid(), signal.SIGTERM); stop.wait(3600)")
    assert process.wait(60) == 0


def test_wait_ends_when_another_file_is_readable(script):
    process = script("stop = Stop(); stop.wait(3600, sys.stdin); print(stop.requested)")
    assert process.communicate(timeout=60)[0] == "False\n"


def test_second_signal_leaves_a_worker_at_once(script):
    process = script(
        "stop = Stop(); os.kill(os.getpid(), signal.SIGTERM); print(stop.requested);"
        "os.kill(os.getpid(), signal.SIGTERM); print('never reached')"
    )
    assert process.communicate(timeout=60)[0] == "True\n"
    assert process.returncode == 143


def test_child_ends_with_its_parent(script):
    process = script(
        "read, write = os.pipe()\n"
        "if pid := os.fork():\n"
        "    os.read(read, 1); os._exit(0)\n"
        "stop = Stop('child'); print(stop.requested); os.write(write, b'.')\n"
        "while not stop.requested: stop.wait(0.01)\n"
        "print(stop.requested)"
    )
    assert process.communicate(timeout=60)[0] == "False\nTrue\n"


# --- several workers -----------------------------------------------------------------------


def test_parent_ends_when_all_workers_are_done(script):
    process = script(
        "sys.exit(run_workers(3, lambda n: os.write(1, b'%d ' % n) * 0, restart=False))"
    )
    assert sorted(process.communicate(timeout=60)[0].split()) == ["1", "2", "3"]
    assert process.returncode == 0


def test_exit_code_of_a_worker_that_is_not_started_again_is_the_parents(script):
    process = script("sys.exit(run_workers(3, lambda n: 3 if n == 2 else 0, restart=False))")
    assert process.wait(60) == 3


def test_worker_that_cannot_start_ends_the_others(script):
    process = script("sys.exit(run_workers(3, lambda n: 2 if n == 2 else wait_for_stop('child')))")
    assert process.wait(60) == 2


def lines_until(process: subprocess.Popen, text: str) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in {lines}")


def test_bug_in_a_worker_is_logged_and_the_worker_started_again(script):
    process = script(
        "first = os.pipe2(os.O_NONBLOCK)\n"
        "os.write(first[1], b'.')\n"
        "def work(number):\n"
        "    try: os.read(first[0], 1)\n"
        "    except BlockingIOError: return wait_for_stop('child')\n"
        "    1 / 0\n"
        "sys.exit(run_workers(1, work))"
    )
    output = lines_until(process, "waiting")
    assert "ZeroDivisionError" in output
    assert "워커 1 종료됨 (1) → 1초 후 재시작" in output
    process.terminate()
    assert process.wait(60) == 0


def test_worker_that_ends_by_itself_is_started_again(script):
    process = script("sys.exit(run_workers(1, lambda number: 0))")
    lines_until(process, "워커 1 종료됨 (0) → 2초 후 재시작")
    process.terminate()
    assert process.wait(60) == 0


def test_signal_before_a_child_can_receive_it_is_not_lost(script):
    process = script(
        "def work(number):\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "    while signal.SIGTERM not in signal.sigpending(): os.sched_yield()\n"
        "    return wait_for_stop('child')\n"
        "sys.exit(run_workers(1, work))"
    )
    assert process.wait(60) == 0


# --- memory --------------------------------------------------------------------------------


def test_listener_loads_no_guesser_of_encodings_and_says_nothing_about_it(script):
    process = script("import listener; sys.exit('charset_normalizer' in sys.modules)")
    assert process.stdout.read() == ""
    assert process.wait(60) == 0


# --- the log -------------------------------------------------------------------------------


def line(message: str, *args: object, exc_info=None, **settings: str) -> str:
    record = logging.LogRecord("listener", logging.INFO, "", 1, message, args, exc_info)
    return OneLine(config.read(settings)).format(record)


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028", "\u2029"])
def test_data_cannot_begin_a_line_of_its_own(character):
    text = line("job=%s", f"a{character}2025-01-01 INFO [1] forged")
    assert character not in text
    assert len(text.splitlines()) == 1


def test_korean_and_emoji_stay_readable():
    assert line("Job 상태 변화 감지: %s", "작업 🎨").endswith("Job 상태 변화 감지: 작업 🎨")


def test_long_line_is_cut():
    text = line("job=%s", "x" * 10 * LONGEST_LINE)
    assert text.endswith("x…")
    assert len(text) < LONGEST_LINE + 100


SECRETS = {
    "DB_PASSWORD": "pw-of-db",
    "STAGE_API_URL": "http://me:pw-of%2Fapi@127.0.0.1",
    "DATABASE_URL": "postgresql://me:pw%2Fof-url@host/jobs",
}


@pytest.mark.parametrize(
    "secret", ["pw-of-db", "pw-of%2Fapi", "pw-of/api", "pw%2Fof-url", "pw/of-url"]
)
def test_known_secrets_are_replaced_wherever_they_stand(secret):
    assert secret not in line("could not use '%s' here", secret, **SECRETS)
    assert line("before %s after", secret, **SECRETS).endswith("before *** after")


@pytest.mark.parametrize("text", ["http://someone:else@host/path", "host=h password = else"])
def test_what_looks_like_a_secret_is_replaced(text):
    assert "else" not in line(text)


def raised(text: str):
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


def test_every_line_of_a_traceback_is_marked():
    error = raised("first\n2025-01-01 00:00:00,000 INFO [1] forged\r\x1b[2Jend")
    first, *trace = line("단계 함수 오류", exc_info=error).split("\n")
    assert first.endswith("단계 함수 오류")
    assert all(text.startswith("    | ") for text in trace)
    assert "    | 2025-01-01 00:00:00,000 INFO [1] forged\\r\\x1b[2Jend" in trace


def test_traceback_shows_no_secret_and_is_bounded():
    assert "pw-of-db" not in line("오류", exc_info=raised("with pw-of-db"), **SECRETS)
    assert len(line("오류", exc_info=raised("y" * 1_000_000))) < 25_000
