"""ALERT_COMMAND: gets each given-up call and each newly stalled stage once, and can do no harm."""

import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
from collections import Counter
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from claims import SHORT_WAIT, claim, connected, result, settle
from commands import run_here
from faults.test_claims import with_idle_worker
from guide import JOBS_TRIGGER
from stage_functions import POST, program
from test_turns import RENAME
from variants import stage as stage_called
from waiting import LISTENING, PATIENCE, gate, is_gone, until, wait_for_call

import alerts
import config
import db
import trigger
import troubles
import upkeep
import workers
from demo import five_stages
from demo.stage_server import Answer
from ops.install import apply

HERE = {"PIPELINE_MODULE": "variants", "PYTHONPATH": str(Path(__file__).parent)}
SHORT_ROUNDS = Path(__file__).with_name("short_rounds.py")

# A command that appends each alert to a file.
TELL = ["sh", "-c", 'exec cat >> "$0"']


@pytest.fixture
def run_command(run_here):
    return run_here


def python(script: str, *args: object) -> str:
    return shlex.join([sys.executable, "-c", script, *map(str, args)])


@pytest.fixture
def told(tmp_path):
    """told(): the alerts that the command got so far; told.command: the value of ALERT_COMMAND."""
    file = tmp_path / "told"
    file.touch()

    def read() -> list[dict]:
        return [json.loads(line) for line in file.read_text().splitlines()]

    read.command = shlex.join([*TELL, str(file)])
    return read


def test_given_up_calls_of_a_stage_are_told_once(database, api, run_command, told):
    api.on("planner", lambda _: Answer(422, b"no text"))
    jobs = {database.add_job("yolo_detect") for _ in range(3)}
    run_command(database, "run", "--once", api=api, ALERT_COMMAND=told.command)
    said, more = sorted(told(), key=lambda said: said.get("count", 0))
    assert {said["job"], more["job"]} < jobs and more["count"] == 2
    assert more["text"].startswith("2 more of the same, the last: job ")
    assert said["command"] == f"./jsl retry {said['job']}"
    assert said["text"] == (
        f"job {said['job']}: planner was given up: HTTP 422: no text;"
        f" to call it again: {said['command']}"
    )
    assert (said["event"], said["stage"], said["http_status"]) == ("given_up", "planner", 422)


@pytest.mark.parametrize("are_at_once", [False, True])
def test_first_job_that_a_stage_refuses_is_told_to_be_called_again(
    database, api, caller, told, are_at_once
):
    """Where both answers come in one turn, nobody hears that it was given up."""
    api.on("planner", lambda _: Answer(401, b"token"))
    calling = caller(api.url, ALERT_COMMAND=told.command)
    first, _ = database.add_job("yolo_detect"), database.add_job("yolo_detect")
    for call in [calling.claim(), calling.claim()]:
        calling.run(call)
        if not are_at_once:
            calling.settle()
    calling.settle()
    calling.listener.alerts.close()
    *given_up, refuses = sorted(told(), key=lambda said: said["event"])
    assert [said["job"] for said in given_up] == [first] * (not are_at_once)
    again = f"; job {first}, which was given up for it, is called again if still owed"
    assert refuses["event"] == "stage_refuses"
    assert refuses["text"].endswith(again) == (not are_at_once)
    assert not database.owed(first).given_up


def test_letters_that_a_stage_escaped_in_json_can_be_read(database, api, run_command, told):
    """In the log and in a chat, and not only in what commands show."""
    body = json.dumps({"detail": "글자 없음\n"}).encode()
    api.on("planner", lambda _: Answer(422, body))
    database.add_job("yolo_detect")
    done = run_command(database, "run", "--once", api=api, ALERT_COMMAND=told.command)
    error = 'HTTP 422: {"detail": "글자 없음\\n"}'
    assert b"\\uae00" in body and f"error={error} → 포기" in done.out
    [said] = told()
    assert said["error"] == error and f": {error}; " in said["text"]


def test_episodes_that_are_over_at_once_are_told_each(database, told):
    alerting = alerts.Alerts(database.settings(ALERT_COMMAND=told.command))
    for stage in ("planner", "overlay"):
        for _ in range(2):
            alerting.send("stage_refuses", "it refuses", stage=stage)
        alerting.send_recovered("stage_refuses", stage, "it accepts", at_once=False)
    for episode in alerting.episodes.values():
        episode.until = 0.0
    alerting.run()
    alerting.close()
    events = sorted((said["stage"], said["event"], said.get("count", 0)) for said in told())
    assert events == [
        (stage, *rest)
        for stage in ("overlay", "planner")
        for rest in [("recovered", 0), ("stage_refuses", 0), ("stage_refuses", 1)]
    ]


def test_call_that_cannot_be_claimed_is_told(database, api, run_command, told):
    job = database.add_job("yolo_detect")
    database.rows("UPDATE stage_calls SET attempts = 2147483647")
    run_command(database, "run", "--once", api=api, ALERT_COMMAND=told.command)
    [said] = told()
    assert (said["event"], said["job"], said["stage"]) == ("given_up", job, "planner")
    assert "its call cannot be claimed: " in said["error"]


def test_failure_that_is_retried_is_no_alert(database, api, listener, told):
    answers = [Answer(500), Answer(422)]
    api.on("vlm_judge", lambda _: answers.pop(0))
    listener(database, api=api, ALERT_COMMAND=told.command)
    database.add_job("overlay")
    until(told, "an alert")
    assert len(told()) == 1


STOPS = "UPDATE jobs SET status = 'stopped'"  # a state of no stage, where the job rests
LEFT_BY = {
    "cancelled": None,
    "deleted": "DELETE FROM jobs",
    "sent back": "UPDATE jobs SET current_step = 'img_gen'",
    "sent back to the same state": f"{STOPS}; UPDATE jobs SET status = 'done'",
}


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("left_by", LEFT_BY)
def test_refusal_of_a_call_that_was_left_under_way_is_no_alert(
    database, caller, run_command, told, left_by, is_killed
):
    calling = caller("http://127.0.0.1:1", ALERT_COMMAND=told.command)
    for change in (LEFT_BY[left_by], STOPS):
        job = database.add_job("yolo_detect")
        call = calling.claim(job)
        if change:
            database.rows(change)
        else:
            run_command(database, "cancel", job)
        ended = trigger.failure(call, "failed", "HTTP 422", 0, http_status=422)
        if is_killed:
            workers.settle_without_listener(calling.settings, call, ended)
        else:
            calling.listener.keep(call, ended)
            calling.settle()
    calling.listener.alerts.close()
    assert [(said["event"], said["job"]) for said in told()] == [("given_up", job)]


def test_second_refusal_of_a_job_that_is_sent_back_each_time_is_told(database, caller, told):
    """Its stage may send it back for ever."""
    calling = caller("http://127.0.0.1:1", ALERT_COMMAND=told.command)
    job = database.add_job("yolo_detect")
    for number in (1, 2):
        call = calling.claim(job)
        database.rows(LEFT_BY["sent back to the same state"])
        error = f"refusal {number}"
        calling.listener.keep(call, trigger.failure(call, "failed", error, 0, http_status=422))
        calling.settle()
    calling.listener.alerts.close()
    [said] = told()
    assert (said["event"], said["job"], said["error"]) == ("given_up", job, "refusal 2")


def test_hostile_data_reaches_no_shell(database, api, listener, told, tmp_path):
    hostile = "$(touch pwned); `touch pwned` '\"\n\x00"
    api.on("planner", lambda _: Answer(400, hostile.encode()))
    listener(database, api=api, ALERT_COMMAND=told.command)
    database.add_job("yolo_detect", tenant="$(touch pwned)")
    until(told, "an alert")
    assert "$(touch pwned)" in told()[0]["error"]
    assert not list(tmp_path.rglob("pwned"))


def test_secrets_are_not_in_the_environment_of_the_command(database, api, listener, tmp_path):
    file = tmp_path / "environment"
    script = "import os, sys; open(sys.argv[1], 'w').write(repr(dict(os.environ)) + 'END')"
    api.on("planner", lambda _: Answer(400))
    listener(database, api=api, ALERT_COMMAND=python(script, file),
             STAGE_API_URL_OVERLAY="http://u:hunter2@localhost")  # fmt: skip
    database.add_job("yolo_detect")
    until(lambda: file.exists() and file.read_text().endswith("END"), "the command to run")
    assert "HEARTBEAT_DIR" in file.read_text()
    assert "hunter2" not in file.read_text() and "DB_PASSWORD" not in file.read_text()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (python("import sys; sys.exit('no network')"), "알림 명령 실패: 종료 코드 1: no network"),
        ("/no/such/program", "알림 명령 실패: /no/such/program: No such file or directory"),
    ],
)
def test_command_that_fails_is_one_line_and_the_work_goes_on(
    database, api, listener, command, said
):
    api.on("planner", lambda _: Answer(400))
    process = listener(database, api=api, ALERT_COMMAND=command)
    database.add_job("yolo_detect")
    process.wait_for_line(said)
    database.add_job("overlay")
    database.wait_for("SELECT count(*) = 1 FROM jobs WHERE current_step = 'vlm_judge'")
    assert process.stop() == 0


def test_command_that_hangs_delays_no_call_and_no_call_delays_its_next_try(
    database, api, listener, tmp_path
):
    api.on("planner", lambda _: Answer(400))
    hangs = tmp_path / "hangs"
    command = python(
        "import os, pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "is_first = not file.exists()\n"
        "file.write_text(f'{os.getpid()}.')\n"
        "is_first and time.sleep(600)",
        hangs,
    )
    more = "import alerts\nalerts.TIME_LIMIT, alerts.TRY_AGAIN_AFTER = 600, 0.1"
    listener(database, "run", "--workers", "1", api=api, ALERT_COMMAND=command,
             program=program(tmp_path, POST, 60, more))  # fmt: skip
    database.add_job("yolo_detect")
    until(lambda: hangs.exists() and hangs.read_text().endswith("."), "an alert")
    first = hangs.read_text()
    try:
        job = database.add_job("overlay")
        database.wait_for("SELECT current_step = 'vlm_judge' FROM jobs WHERE job_id = %s", job)
        with gate(api, "vlm_judge"):
            job = database.add_job("overlay")
            wait_for_call(api, job)  # no worker is idle
            os.kill(int(first[:-1]), signal.SIGKILL)
            until(lambda: hangs.read_text() not in ("", first), "the next try")
            assert not api.calls(job)[0].finished
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(first[:-1]), signal.SIGKILL)


# A command that fails the first time it is run.
FAILS_ONCE = """
import pathlib, sys
file = pathlib.Path(sys.argv[1])
given = sys.stdin.read()
if not (mark := file.with_suffix(".given")).exists():
    sys.exit(mark.write_text(given))
with file.open("a") as told:
    told.write(given)
"""


def test_alert_whose_command_fails_once_is_sent_again(monkeypatch, told, tmp_path):
    monkeypatch.setattr(alerts, "TRY_AGAIN_AFTER", 0.0)
    command = python(FAILS_ONCE, tmp_path / "told")
    sending = alerts.Alerts(config.read({"ALERT_COMMAND": command}))
    sending.send("stalled", "text", stage="overlay")
    until(lambda: not sending.run() and sending.next_run == math.inf, "the end of all tries")
    assert [said["text"] for said in told()] == ["text"]


@pytest.mark.parametrize("command", [python("exit(1)"), "/no/such/program"])
def test_alert_whose_command_always_fails_is_tried_a_few_times(monkeypatch, caplog, command):
    monkeypatch.setattr(alerts, "TRY_AGAIN_AFTER", 0.0)
    failing = alerts.Alerts(config.read({"ALERT_COMMAND": command}))
    failing.send("stalled", "text", stage="overlay")
    until(lambda: not failing.run() and failing.next_run == math.inf, "the end of all tries")
    assert len(caplog.messages) == alerts.TRIES + 1
    assert '"text": "text"' in caplog.messages[-1]
    monkeypatch.setattr(alerts, "TRY_AGAIN_AFTER", 600.0)
    caplog.clear()
    failing.send("stalled", "tried once", stage="planner")
    until(lambda: not failing.run(), "the first try")
    failing.send("given_up", "not tried yet")
    failing.close()
    said = Counter(message.partition(":")[0] for message in caplog.messages)
    assert said == {"알림 명령 실패": 4, "알림 명령이 받지 못한 알림": 2}


@pytest.mark.parametrize("has_ended", [False, True], ids=["runs", "ended"])
@pytest.mark.parametrize("last", ["recovered", "stalled"])
def test_message_that_failed_is_not_sent_after_the_next_one(
    caplog, told, tmp_path, last, has_ended
):
    sending = alerts.Alerts(config.read({"ALERT_COMMAND": python(FAILS_ONCE, tmp_path / "told")}))
    to_send = {
        "stalled": partial(sending.send, "stalled", "text", stage="overlay"),
        "recovered": partial(sending.send_recovered, "stalled", "overlay", "no job is stalled"),
    }
    send_last = to_send.pop(last)
    [send_first] = to_send.values()
    send_first()
    if has_ended:
        until(lambda: not sending.run(), "its first try")
    else:
        until((tmp_path / "told.given").exists, "its first try")
    send_last()
    sending.close()  # tries once more, at once
    assert [said["event"] for said in told()] == [last]
    assert caplog.messages[-1].startswith("알림 명령이 받지 못한 알림")


# A command that takes database_away once there is a line in the pipe, and all else at once.
SLOW = """
import pathlib, sys
told, pipe = map(pathlib.Path, sys.argv[1:])
given = sys.stdin.read()
if '"event": "database_away"' in given:
    pipe.open().readline()
with told.open("a") as file:
    file.write(given)
"""


def test_recovery_is_sent_after_the_alert_though_its_command_is_slow(told, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = python(SLOW, tmp_path / "told", tmp_path / "pipe")
    sending = alerts.Alerts(config.read({"ALERT_COMMAND": command}))
    sending.send("database_away", "text")
    sending.send_recovered("database_away", None, "text")
    sending.send("split_brain", "of something else")
    until(lambda: sending.run() and told(), "what need not wait")
    with open(tmp_path / "pipe", "r+b", buffering=0) as pipe:
        pipe.write(b"\n")
        sending.close()
    assert [said["event"] for said in told()] == ["split_brain", "database_away", "recovered"]


def test_alert_that_failed_is_sent_though_its_recovery_waits(monkeypatch, told, tmp_path):
    monkeypatch.setattr(alerts, "TRY_AGAIN_AFTER", 0.0)
    sending = alerts.Alerts(config.read({"ALERT_COMMAND": python(FAILS_ONCE, tmp_path / "told")}))
    sending.send("stage_refuses", "text", stage="overlay")
    sending.send_recovered("stage_refuses", "overlay", "it accepts", at_once=False)
    until(lambda: not sending.run() and not sending.again, "the end of all tries")
    assert [said["event"] for said in told()] == ["stage_refuses"]


def test_command_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(alerts, "TIME_LIMIT", 0.2)
    hanging = alerts.Alerts(config.read({"ALERT_COMMAND": python("import time; time.sleep(600)")}))
    hanging.send("given_up", "text")
    [run] = hanging.running
    hanging.close()
    assert run.process.returncode == -9 and not hanging.running


def test_command_that_hangs_is_ended_with_what_it_started(monkeypatch, tmp_path):
    file = tmp_path / "pid"
    script = (
        "import os, pathlib, sys, time; pid = os.fork()\n"
        "if pid: pathlib.Path(sys.argv[1]).write_text(f'{pid}.')\n"
        "time.sleep(600)"
    )
    hanging = alerts.Alerts(config.read({"ALERT_COMMAND": python(script, file)}))
    hanging.send("given_up", "text")
    until(lambda: file.exists() and file.read_text().endswith("."), "its child")
    hanging.running[0].until = 0.0
    assert hanging.run() is False
    until(lambda: is_gone(int(file.read_text()[:-1])), "the end of its child")


def test_alert_is_sent_though_no_file_can_be_made(monkeypatch, told):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/directory")
    sending = alerts.Alerts(config.read({"ALERT_COMMAND": told.command}))
    sending.send("given_up", "read-only")
    sending.close()
    assert [said["text"] for said in told()] == ["read-only"]


def test_text_that_utf8_has_not_is_sent(told):
    sending = alerts.Alerts(config.read({"ALERT_COMMAND": told.command}))
    sending.send("given_up", "KeyError: '\ud800'")
    sending.close()
    assert [said["text"] for said in told()] == ["KeyError: '\ud800'"]


def test_more_alerts_than_may_run_at_once_wait_their_turn(told):
    many = alerts.Alerts(config.read({"ALERT_COMMAND": told.command}))
    for number in range(3 * alerts.AT_ONCE):
        many.send("given_up", str(number), stage=number)
        assert len(many.running) <= alerts.AT_ONCE
    many.close()
    assert sorted(int(said["text"]) for said in told()) == list(range(3 * alerts.AT_ONCE))


def test_alert_in_hand_is_finished_before_the_listener_ends(database, api, run_command, told):
    api.on("planner", lambda _: Answer(400))
    database.add_job("yolo_detect")
    run_command(database, "run", "--once", api=api, ALERT_COMMAND=told.command)
    assert len(told()) == 1


@pytest.fixture
def stopping(database, api, listener, tmp_path):
    """stopping(command, limit): a listener that is told to stop while a call is under way, which
    is then given up; its program lets a stop wait `limit` seconds for alerts.
    """

    def stop(command: str, limit: float):
        more = f"import alerts\nalerts.STOP_LIMIT = {limit}"
        with gate(api, "vlm_judge", Answer(400)) as opened:
            process = listener(database, api=api, ALERT_COMMAND=command,
                               program=program(tmp_path, POST, 60, more))  # fmt: skip
            wait_for_call(api, database.add_job("overlay"))
            process.signal(signal.SIGTERM)
            process.wait_for_line("중지 요청")
            opened.set()
            assert process.wait() == 0
        return process

    return stop


def test_alert_that_is_sent_during_a_stop_is_waited_for(stopping, told):
    process = stopping(shlex.join(["sh", "-c", f"sleep 0.1; {told.command}"]), PATIENCE)
    assert [said["event"] for said in told()] == ["given_up"]
    assert "보내지 못한 알림" not in process.output


def test_alert_whose_command_outlasts_a_stop_is_logged(stopping, tmp_path):
    os.mkfifo(end := tmp_path / "end")
    process = stopping(shlex.join(["cat", str(end)]), 0.5)
    end.open("w").close()
    said = process.wait_for_line("중지하느라 보내지 못한 알림 (명령이 실행 중)")
    assert json.loads(said.partition("중): ")[2])["event"] == "given_up"


# --- stalled stages ------------------------------------------------------------------------


@pytest.fixture
def accepted(database):
    """A connection, and a job that planner accepted two hours ago and has not moved since."""
    job = database.add_job("yolo_detect")
    with connected(database) as conn:
        settle(conn, result(claim(conn)))
        database.rows("UPDATE stage_attempts SET finished_at = now() - interval '2 hours'")
        database.rows("UPDATE jobs SET updated_at = now() - interval '2 hours'")
        yield conn, job


@pytest.mark.parametrize("part", [None, "jobs"])  # where another table cannot be read
def test_stage_is_newly_stalled_once_until_nothing_of_it_is(database, accepted, part):
    conn, job = accepted
    [stalled] = troubles.newly_stalled(conn)
    assert (stalled.stage, stalled.jobs) == ("planner", 1)
    assert troubles.newly_stalled(conn) == []
    database.move(job, "planner", "done")
    [ended] = troubles.newly_stalled(conn, part)
    assert (ended.stage, ended.jobs) == ("planner", None)
    assert troubles.newly_stalled(conn) == []
    assert database.rows("SELECT 1 FROM pipeline_stages WHERE stalled_since IS NOT NULL") == []


@pytest.fixture
def task(caller, told):
    """The upkeep of a listener with ALERT_COMMAND; task.told(conn): what a round of it tells."""
    task = caller("http://127.0.0.1:1", ALERT_COMMAND=told.command).listener.upkeep

    def told_in_round(conn) -> list[dict]:
        before = len(told())
        for each in task.tasks:
            each.at = 0.0
        task.run(conn)
        task.alerts.close()
        return told()[before:]

    task.told = told_in_round
    return task


@pytest.mark.parametrize("change", [RENAME, "BEGIN; LOCK TABLE jobs_variants"])
def test_rows_of_a_table_are_told_though_another_cannot_be_read(variants, task, change):
    database = variants.database
    failed = database.add_job()
    with connected(database) as conn, closing(database.connect()) as other:
        db.execute(conn, SHORT_WAIT)
        settle(conn, result(claim(conn)))
        database.move(failed, "vlm_analyze", "failed")
        database.add_job("instagram", "running")
        database.rows("UPDATE jobs SET updated_at = now() - interval '2 hours'")
        other.cursor().execute(change)
        told = [one for one in task.told(conn) if one["event"] != "trigger_broken"]
        said = {(one["event"], one["stage"]) for one in told}
        assert said == {("failed_by_stage", "vlm_analyze"), ("stalled", "instagram")}
        assert task.stalled.every == upkeep.STALLED_INTERVAL
        assert task.told(conn) == []


def test_stage_is_not_told_as_stalled_no_more_while_its_rows_cannot_be_read(variants, task):
    variants.database.add_job("instagram", "running")
    variants.add(variants.database.add_job("x"), "yolo_detect", "running")
    variants.database.rows(
        "UPDATE jobs SET updated_at = now() - interval '2 hours';"
        "ALTER TABLE jobs_variants ADD updated_at timestamptz DEFAULT '2000-1-1'"
    )
    with connected(variants.database) as conn:
        reason = "running for longer than the timeout"
        assert {one["text"].partition(";")[0] for one in task.told(conn)} == {
            f"1 job is stalled at instagram: {reason}",
            f"1 row is stalled at yolo_detect: {reason}",
        }
        variants.database.rows(RENAME)
        assert [one["event"] for one in task.told(conn)] == ["trigger_broken"]


@pytest.mark.parametrize(
    ("damage", "what", "mend"),
    [
        ("ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger", "on jobs is disabled", ""),
        (JOBS_TRIGGER, "on jobs runs another function", ""),
        ("ALTER TABLE jobs RENAME status TO state", "jobs has no column status, so its triggers",
         "ALTER TABLE jobs RENAME state TO status"),
    ],
    ids=["disabled", "replaced", "column renamed"],
)  # fmt: skip
def test_triggers_that_record_no_call_are_told_once_and_when_that_is_over(
    database, task, damage, what, mend
):
    with connected(database) as conn:
        assert task.told(conn) == []
        database.rows(damage)
        [said] = task.told(conn)
        assert said["event"] == "trigger_broken" and what in said["reason"]
        assert task.told(conn) == []
        database.rows(mend or "SELECT")
        apply(conn)
        assert [(one["event"], one["of"]) for one in task.told(conn)] == [
            ("recovered", "trigger_broken")
        ]


def test_reason_of_looks_that_fail_is_without_our_sql(database, task):
    database.rows("ALTER TABLE jobs RENAME status TO state")
    with connected(database) as conn:
        said = [one for _ in range(5) for one in task.told(conn)]
        assert [one["event"] for one in said] == ["trigger_broken", "stalled"]
        assert "column r.status does not exist" in said[1]["reason"]
        assert "SELECT" not in said[1]["reason"]


def test_listener_that_is_the_first_one_later_tells_what_it_has_seen_before(database, task):
    database.rows("ALTER FUNCTION stalled_jobs RENAME TO taken_away;"
                  "ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger")  # fmt: skip
    with connected(database) as first, connected(database) as second:
        for conn in (first, second):
            db.name_session(conn, "w")
        assert [one for _ in range(4) for one in task.told(second)] == []
        gone = first.info.backend_pid
        first.close()
        database.wait_for("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s", gone)
        assert [one["event"] for one in task.told(second)] == ["trigger_broken", "stalled"]


def test_looks_for_stalled_jobs_that_fail_are_told_once_and_when_that_is_over(database, task):
    database.rows("ALTER FUNCTION stalled_jobs RENAME TO taken_away")
    with connected(database) as conn:
        [said] = [one for _ in range(5) for one in task.told(conn)]
        assert said["event"] == "stalled" and "3 looks for them have failed" in said["text"]
        assert said["reason"].startswith("jobs: function stalled_jobs() does not exist")
        database.rows("ALTER FUNCTION taken_away RENAME TO stalled_jobs")
        assert [(one["event"], one["of"]) for one in task.told(conn)] == [("recovered", "stalled")]
        assert task.told(conn) == []


def test_call_that_waits_is_told_though_no_call_can_be_claimed(database, listener, told):
    database.add_job()
    database.rows("UPDATE stage_calls SET due_at = now() - interval '1 hour';"
                  "ALTER TABLE jobs RENAME tenant_id TO customer")  # fmt: skip
    process = listener(database, "run", "--stage", "vlm_analyze", ALERT_COMMAND=told.command)
    until(lambda: any(said["event"] == "waiting" for said in told()), "an alert")
    process.wait_for_line("column r.tenant_id does not exist")


def test_listener_that_starts_counts_all_that_had_waited(database, api, run_command, told):
    for _ in range(4):
        database.add_job("overlay", "done")
    database.rows("UPDATE stage_calls SET due_at = now() - interval '3 hours'")
    run_command(database, "run", "--once", api=api, ALERT_COMMAND=told.command)
    [said] = [said for said in told() if said["event"] == "back"]
    assert said["calls"] == 4 and "the oldest for 3 h" in said["text"]


def test_stage_whose_table_the_listener_may_not_read_is_told_with_the_reason(
    variants, api, listener, run_command, make_role, told
):
    database, role = variants.database, make_role(variants.database)
    database.rows(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};"
                  f"REVOKE ALL ON jobs_variants FROM {role}")  # fmt: skip
    variants.add(database.add_job("x", "y"), "img_gen", "done")
    database.rows("UPDATE stage_calls SET due_at = now() - interval '3 hours'")
    listener(database, api=api, DB_USER=role, DB_PASSWORD=role, ALERT_COMMAND=told.command,
             ALERT_AFTER=1, **HERE)  # fmt: skip
    until(lambda: len(told()) > 1, "alerts")
    reason = "permission denied for table jobs_variants"
    [said] = [said for said in told() if said["event"] == "waiting"]
    assert said["text"] == (
        f"a call of yolo_detect has been due for 3 h: no call can be claimed: {reason}"
    )
    problem = f"PROBLEM  no call can be claimed of yolo_detect: {reason}"
    assert problem in run_command(database, "status", **HERE).lines


MAY_NOT = """
GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role};
REVOKE ALL ON {table} FROM {role}
"""


@pytest.mark.parametrize(
    ("kind", "table", "undone", "of"),
    [
        ("join_look", "stage_looks", "recorded of joins", "jobs_variants (iou_eval, done)"),
        ("move_look", "stage_moves", "ended of asynchronous stages", "jobs"),
    ],
)
def test_looks_that_fail_are_in_status_and_told_once_and_when_that_is_over(
    variants, caller, run_command, make_role, told, kind, table, undone, of
):
    database, role = variants.database, make_role(variants.database)
    database.rows(MAY_NOT.format(table=table, role=role))
    calling = caller("http://127.0.0.1:1", DB_USER=role, DB_PASSWORD=role,
                     ALERT_COMMAND=told.command)  # fmt: skip
    listener = calling.listener
    look = getattr(listener, kind)

    def problems() -> list[str]:
        listener.beat(listener.doing(calling.conn), PATIENCE)
        said = run_command(database, "status", HEARTBEAT_DIR=calling.directory.name, **HERE)
        return [line for line in said.lines if "PROBLEM" in line]

    look.run(calling.conn)
    assert problems() == []  # it may have met a lock that is gone
    look.run(calling.conn)
    [said] = problems()
    reason = f"{of}: permission denied for table {table}"
    assert said.startswith(f"PROBLEM  no call can be {undone}: ") and reason in said
    listener.failing.since[look.undone] -= calling.settings.ALERT_AFTER
    for _ in range(2):
        look.run(calling.conn)
    database.rows(f"GRANT ALL ON {table} TO {role}")
    look.run(calling.conn)
    assert problems() == []
    listener.alerts.close()
    begun, over = told()
    assert begun["event"] == "waiting" and begun["text"].startswith(
        f"for 10 min, no call can be {undone}: "
    )
    assert reason in begun["reason"]
    assert (over["event"], over["of"]) == ("recovered", "waiting")


def test_looks_that_failed_are_forgotten_where_none_is_needed_any_more(
    database, conn, caller, make_role
):
    database.add_job()
    settle(conn, result(claim(conn), "taken"))
    role = make_role(database)
    database.rows(MAY_NOT.format(table="stage_moves", role=role))
    calling = caller("http://127.0.0.1:1", DB_USER=role, DB_PASSWORD=role)
    look, failing = calling.listener.move_look, calling.listener.failing
    look.sweep(calling.conn)
    for _ in range(2):
        look.run(calling.conn)
    assert "stage_moves" in failing.said[look.undone] and look.at < math.inf
    database.rows("DELETE FROM stage_leases")
    look.sweep(calling.conn)
    assert failing.said == {} and look.at == math.inf


@pytest.mark.parametrize(
    ("table", "mode"), [("stage_attempts", "ACCESS EXCLUSIVE"), ("stage_leases", "SHARE")]
)
def test_listener_that_claims_of_no_stage_is_told_once_and_when_that_is_over(
    database, caller, told, table, mode
):
    """Nothing else tells it where a table of ours is locked: upkeep waits for it as well."""
    calling = caller("http://127.0.0.1:1", ALERT_COMMAND=told.command)
    listener = with_idle_worker(calling.listener)
    db.execute(calling.conn, SHORT_WAIT)
    database.add_job()

    def turn() -> None:
        listener.claiming.sweep_at = 0.0
        for _ in range(3):  # also between two sweeps
            listener.settle_and_claim(calling.conn)

    with closing(database.connect()) as other:
        other.cursor().execute(f"BEGIN; LOCK TABLE {table} IN {mode} MODE")
        for _ in range(2):
            turn()
        listener.stuck_since -= calling.settings.ALERT_AFTER
        for _ in range(2):
            turn()
        locked = f"{table} is locked by server process {other.info.backend_pid}"
    turn()
    listener.alerts.close()
    begun, over = told()
    assert begun["event"] == "database_away" and locked in begun["reason"]
    assert (over["event"], over["of"]) == ("recovered", "database_away")


def test_listener_that_cannot_log_in_any_more_is_told_once(
    database, api, listener, make_role, told
):
    role = make_role(database)
    database.rows(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};"
                  f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")  # fmt: skip
    process = listener(database, api=api, DB_USER=role, DB_PASSWORD=role, ALERT_AFTER=1,
                       ALERT_COMMAND=told.command)  # fmt: skip
    process.wait_for_line(LISTENING)
    database.rows(f"ALTER ROLE {role} NOLOGIN;"
                  "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                  f" WHERE usename = '{role}'")  # fmt: skip
    until(lambda: told(), "an alert")
    process.wait_for_line("번째")
    database.rows(f"ALTER ROLE {role} LOGIN")
    until(lambda: len(told()) > 1, "another alert")
    away, back = told()
    assert away["event"] == "database_away" and "not permitted to log in" in away["reason"]
    assert (back["event"], back["of"]) == ("recovered", "database_away")


def test_newly_stalled_stage_is_told(database, accepted, api, run_command, told):
    done = run_command(database, "run", "--once", api=api, ALERT_COMMAND=told.command)
    [said] = told()
    assert (said["event"], said["stage"], said["jobs"]) == ("stalled", "planner", 1)
    reason = "accepted by the stage, but the job has not changed"
    assert f"stage=planner jobs=1 {reason} → ./jsl jobs --stalled --stage planner\n" in done.out
    assert said["command"] == "./jsl jobs --stalled --stage planner"
    assert said["text"] == f"1 job is stalled at planner: {reason}; to see which: {said['command']}"


def test_listener_that_was_not_restarted_after_an_install_says_so(
    database, api, listener, run_command, told, use_pipeline, tmp_path
):
    alerting = {"ALERT_COMMAND": told.command, "ALERT_AFTER": 1}
    process = listener(database, api=api, program=SHORT_ROUNDS, **alerting)
    process.wait_for_line(LISTENING)
    added = {("recheck", "done"): five_stages.planner, ("x", "done"): stage_called("newer")}
    use_pipeline(five_stages.PIPELINE | added)
    with closing(db.connect(database.settings())) as conn:
        apply(conn)
    line = process.wait_for_line("데이터베이스의 PIPELINE이 다름")
    assert "(recheck, done) → nothing in" in line
    until(lambda: told(), "an alert")
    [said] = told()
    assert said["event"] == "pipeline_differs" and said["text"].endswith(": restart it")
    job = database.add_job("recheck", "done")
    process.wait_for_line("다른 PIPELINE의 호출을 미룸")
    until(lambda: database.owed(job).worker is None, "the call is put off")
    typed = partial(run_here, database.environ | {"HEARTBEAT_DIR": str(tmp_path / "heartbeats")})
    waits = "planner waits: put off by a listener whose PIPELINE does not lead to it: start one"
    assert waits in typed("job", job).out
    unknown = database.add_job("x", "done")  # its stage is not one that the listener has
    waits = r"\nnewer waits: \S+: PIPELINE differs, restart it\n"
    assert re.search(waits, typed("job", unknown).out)
    for command in ("status", "check"):
        assert "PIPELINE differs, restart it; waiting for a job" in typed(command).out
    assert process.output.count("데이터베이스의 PIPELINE이 다름") == 1
