"""Worker processes: whatever a stage function does to its own, it costs that one call."""

import os
import re
import resource
import signal
from collections.abc import Iterable
from datetime import timedelta
from textwrap import indent

import pytest
from stage_functions import COMPUTE, POST, program
from waiting import (
    backends,
    gate,
    is_gone,
    until,
    wait_for_call,
    wait_for_sweeps,
    wait_until_idle,
)

from listener import LONGEST_SLEEP

FAILED = "파이프라인 단계 실행 실패"
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


# --- a call that ends its worker -----------------------------------------------------------

HANGS = "no answer within {} s, so its worker was killed"
FATAL = {
    "exits": ("os._exit(3)", "its worker exited with 3"),
    "exits well": ("os._exit(0)", "its worker exited with 0"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "its worker was killed by SIGSEGV"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "its worker was killed by SIGKILL"),
    "is killed by a timer": ("os.kill(os.getpid(), 40)", "its worker was killed by signal 40"),
    "computes": (COMPUTE, HANGS),
    "blocks signals": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(600)",
        HANGS,
    ),
    "catches everything": (
        "while True:\n    try: time.sleep(600)\n    except BaseException: pass",
        HANGS,
    ),
    "waits for a thread": (
        "thread = threading.Thread(target=time.sleep, args=[600]); thread.start(); thread.join()",
        HANGS,
    ),
    "prints into a full pipe": ("os.dup2(os.pipe()[1], 1); print('x' * 2**20)", HANGS),
    "closes all files": (
        "os.closerange(0, 1024); time.sleep(600)",
        "its worker closed its connection to the listener",
    ),
    "writes into all files": (
        "for fd in range(3, 256):\n    try: os.write(fd, b'x' * 100)\n    except OSError: pass\n"
        "time.sleep(600)",
        "its worker sent what is no result, so it was killed",
    ),
}


def body_by_tenant(whats: Iterable[str]) -> str:
    """A stage function's body that does what the tenant of its job is called after."""
    return "".join(f"if call.tenant_id == {what!r}:\n{indent(FATAL[what][0], '    ')}\n"
                   for what in whats)  # fmt: skip


@pytest.mark.parametrize("timeout", [1, 600])
def test_call_that_ends_its_worker_is_one_unknown_call(timeout, database, api, listener, tmp_path):
    says = {what: said.format(timeout) for what, (_, said) in FATAL.items()
            if (said == HANGS) == (timeout == 1)}  # fmt: skip
    process = listener(database, api=api, program=program(tmp_path, body_by_tenant(says), timeout))
    wait_until_idle(tmp_path)
    before = backends(database)
    jobs = {what: database.add_job("overlay", tenant=what) for what in says}
    process.wait_for_line(FAILED, count=len(jobs))
    database.wait_for(SUCCEEDED, database.add_job("planner"))
    took = []
    for what, job in jobs.items():
        [line] = [line for line in process.lines if f"{FAILED}: job={job}" in line]
        assert "stage=vlm_judge attempt=1/5" in line and says[what] in line
        assert "리스 만료 후 재시도" in line
        [attempt] = database.attempts(job)
        assert attempt.outcome == "unknown" and says[what] in attempt.error
        took.append(attempt.finished_at - attempt.started_at)
    # And not when the loop wakes for something else.
    assert min(took) < timedelta(seconds=timeout + LONGEST_SLEEP / 2)
    assert backends(database) == before
    until(lambda: len(process.children()) == 4, "other workers")


def test_missing_workers_are_started_though_the_database_is_away(database, api, listener):
    """Else the loop would wake for them again and again."""
    process = listener(database, api=api, DB_PORT=1, JOB_STATE_LISTENER_RECONNECT_DELAY=600)
    until(lambda: len(process.children()) == 4, "four workers")


def test_worker_that_was_started_while_the_database_was_away_knows_nothing_of_that(
    database, api, listener, tmp_path
):
    """The traceback of its stage function begins with that function's error."""
    away = "UPDATE pg_database SET datallowconn = %s WHERE datname = current_database()"
    database.rows(away, False)
    process = listener(database, api=api, program=program(tmp_path, "1 / 0", 600))
    until(lambda: len(process.children()) == 4, "four workers")
    database.rows(away, True)
    database.add_job("overlay")
    process.wait_for_line("| ZeroDivisionError: ")
    assert "another exception occurred" not in process.output


@pytest.mark.parametrize(
    ("timeout", "whats"), [(3, ["computes"]), (60, ["exits", "crashes", "is killed"])]
)
def test_accepted_call_stays_accepted_though_its_worker_ends(
    timeout, whats, database, api, listener, tmp_path
):
    body = POST.removeprefix("return ") + "\n" + body_by_tenant(whats)
    process = listener(database, api=api, program=program(tmp_path, body, timeout))
    for number, what in enumerate(whats, 1):
        job = database.add_job("overlay", tenant=what)
        database.wait_for(SUCCEEDED, job)
        assert database.owed(job) is None and len(api.calls(job)) == 1
        (attempt,) = database.attempts(job)
        assert (attempt.outcome, attempt.http_status) == ("succeeded", 200)
        assert FATAL[what][1].format(timeout) in process.wait_for_line("    | ", count=number)


def test_thread_of_an_accepted_call_says_nothing_of_the_next(database, api, listener, tmp_path):
    """It may go on to POST when its worker makes another call already, and that call is unknown."""
    gone_on = tmp_path / "gone on"
    body = f"""
if call.tenant_id == 'first':
    def later():
        while not os.path.exists({str(gone_on)!r}): time.sleep(0.01)
        call.post('/api/yh/llava/stage2/judge')
        os._exit(3)
    threading.Thread(target=later, daemon=True).start()
    {POST}
open({str(gone_on)!r}, 'w').close()
time.sleep(600)
"""
    process = listener(database, "run", "--workers", "1", api=api,
                       program=program(tmp_path, body, 60))  # fmt: skip
    first = database.add_job("overlay", tenant="first")
    database.wait_for(SUCCEEDED, first)
    second = database.add_job("overlay")
    process.wait_for_line(FAILED)
    database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s", second)
    (attempt,) = database.attempts(second)
    assert attempt.outcome == "unknown" and "exited with 3" in attempt.error


def test_call_is_left_alone_until_its_lease_is_over(database, api, listener, tmp_path):
    died = tmp_path / "died"
    body = f"if not os.path.exists({str(died)!r}):\n    open({str(died)!r}, 'w'); os._exit(3)\n"
    listener(database, api=api, program=program(tmp_path, body + POST, 2), LEASE_MARGIN=1)
    job = database.add_job("overlay")
    database.wait_for(SUCCEEDED, job)
    lost, made = database.attempts(job)
    assert (lost.outcome, made.outcome) == ("unknown", "succeeded")
    assert made.started_at - lost.started_at >= timedelta(seconds=2 + 1)
    assert [call.headers["X-Attempt"] for call in api.calls(job)] == ["2"]


# --- a call that leaves something behind ---------------------------------------------------

HARMLESS = {
    "forks a child that returns": (
        "pid = os.fork()\nif pid == 0:\n    return None\nos.waitpid(pid, 0)"
    ),
    "forks a child that raises": "pid = os.fork()\nif pid == 0:\n    1 / 0\nos.waitpid(pid, 0)",
    "sets an alarm": "signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(600)",
    "sets an alarm without a handler": "signal.alarm(600)",
    "has handlers": "for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)",
    "gets a signal, of which nothing is written into its files": (
        "import select\npipes = [os.pipe() for _ in range(16)]\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert not select.select([read for read, _ in pipes], [], [], 0)[0]\n"
        "for pipe in pipes: os.close(pipe[0]), os.close(pipe[1])"
    ),
    "starts threads": "threading.Thread(target=time.sleep, args=[600], daemon=True).start()",
    "prints": "print('x' * 10_000)",
    "closes its output": "sys.stdout.close(); sys.stderr.close()",
    "changes directory": "os.chdir('/')",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_call_that_meddles_with_its_process_succeeds_and_so_does_the_next(
    what, database, api, listener, tmp_path
):
    process = listener(database, "run", "--workers", "1", api=api,
                       program=program(tmp_path, f"{HARMLESS[what]}\n{POST}", 60))  # fmt: skip
    wait_until_idle(tmp_path)
    workers = process.children()
    for _ in range(2):
        job = database.add_job("overlay")
        database.wait_for(SUCCEEDED, job)
        assert len(api.calls(job)) == 1
    assert process.children() == workers
    assert FAILED not in process.output
    assert process.stop() == 0


def test_programs_that_a_call_starts_obey_sigterm(database, api, listener, tmp_path):
    command = "['sh', '-c', 'kill -TERM $$; sleep 600']"
    # Without the end of a line, which alone would have it written at once.
    body = f"print('ended with %d' % subprocess.call({command}), end='')\n"
    process = listener(database, api=api, program=program(tmp_path, body + POST, 60))
    database.add_job("overlay")
    process.wait_for_line(f"ended with {-signal.SIGTERM}")


# In one write, as the listener writes to the same pipe.
STARTS_PROGRAM = (
    "print('started %d\\n' % subprocess.Popen(['sleep', '600']).pid, end='', flush=True)\n"
)


def pid_in(line: str) -> int:
    return int(re.search(r"(?:started|made by) (\d+)", line)[1])  # a line of the log may follow it


def test_programs_that_a_hanging_call_started_end_with_its_worker(
    database, api, listener, tmp_path
):
    body = STARTS_PROGRAM + "time.sleep(600)"
    process = listener(database, api=api, program=program(tmp_path, body, 1))
    database.add_job("overlay")
    started = pid_in(process.wait_for_line("started"))
    process.wait_for_line(FAILED)
    until(lambda: is_gone(started), "the end of what the call started")


def test_programs_that_calls_left_behind_end_when_their_worker_is_replaced(
    database, api, listener, tmp_path
):
    more = "workers.CALLS = 1"
    process = listener(database, "run", "--workers", "1", api=api,
                       program=program(tmp_path, STARTS_PROGRAM + POST, 60, more))  # fmt: skip
    for number in (1, 2):
        database.wait_for(SUCCEEDED, database.add_job("overlay"))
        process.wait_for_line("started", count=number)
    until(lambda: is_gone(pid_in(process.wait_for_line("started"))), "the end of the first")
    assert not is_gone(pid_in(process.wait_for_line("started", count=2)))


@pytest.mark.slow
def test_stage_function_may_have_a_connection_of_its_own(database, api, listener, tmp_path):
    body = (
        "import io, psycopg2\n"
        f"conn = psycopg2.connect({database.dsn!r})\n"
        "conn.cursor().execute('CREATE TEMPORARY TABLE t (n int); SELECT pg_sleep(11)')\n"
        "conn.cursor().copy_expert('COPY t FROM STDIN', io.StringIO('7\\n'))\n"
        "conn.close()\n"
    )
    connecting = program(tmp_path, body + POST, 60)
    process = listener(database, api=api, program=connecting)
    job = database.add_job("overlay")
    database.wait_for(SUCCEEDED, job)
    assert process.stop() == 0 and FAILED not in process.output
    job = database.add_job("overlay")
    assert listener(database, "call", job, api=api, program=connecting).wait() == 0


# --- starting and replacing them -----------------------------------------------------------


def test_worker_is_replaced_after_so_many_calls(database, api, listener, tmp_path):
    body = "print('made by %d\\n' % os.getpid(), end='', flush=True)\n"
    process = listener(database, "run", "--workers", "1", api=api,
                       program=program(tmp_path, body + POST, 60, "workers.CALLS = 2"))  # fmt: skip
    for _ in range(5):
        database.wait_for(SUCCEEDED, database.add_job("overlay"))
    pids = [pid_in(process.wait_for_line("made by", count=n)) for n in range(1, 6)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    until(lambda: process.children() == [pids[4]], "the end of the worker before")
    assert "ERROR" not in process.output


def test_idle_worker_that_is_killed_is_replaced(database, api, listener, tmp_path):
    process = listener(database, "run", "--workers", "1", api=api, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    os.kill(process.children()[0], signal.SIGKILL)
    process.wait_for_line("호출 없이 종료된 워커: -9 → 1초 후 재시작")
    job = database.add_job("overlay")
    database.wait_for(SUCCEEDED, job)
    assert len(process.children()) == 1


def test_default_timeout_of_sockets_ends_no_worker(database, api, listener, tmp_path):
    more = "import socket\nsocket.setdefaulttimeout(0.1)"
    process = listener(database, api=api, SWEEP_INTERVAL=0.2,
                       program=program(tmp_path, POST, 60, more))  # fmt: skip
    wait_until_idle(tmp_path)
    workers = process.children()
    wait_for_sweeps(database)
    database.wait_for(SUCCEEDED, database.add_job("overlay"))
    assert process.children() == workers


def test_worker_that_cannot_be_started_is_started_later(database, api, listener, tmp_path):
    process = listener(database, "run", "--workers", "1", api=api, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
    os.kill(process.children()[0], signal.SIGKILL)
    process.wait_for_line("워커를 시작할 수 없음")
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
    database.wait_for(SUCCEEDED, database.add_job("overlay"))


def test_death_of_one_worker_leaves_the_calls_of_the_others_alone(
    database, api, listener, tmp_path
):
    with gate(api) as opened:
        process = listener(database, "run", "--workers", "2", api=api,
                           program=program(tmp_path, "os._exit(3)"))  # fmt: skip
        job = database.add_job()
        wait_for_call(api, job)
        database.add_job("overlay")
        process.wait_for_line("its worker exited with 3")
        opened.set()
        database.wait_for(SUCCEEDED + " AND stage = 'vlm_analyze'", job)
    assert len(api.calls(job, "vlm_analyze")) == 1
