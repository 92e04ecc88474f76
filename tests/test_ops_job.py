"""`job`: where one job is, what it owes, and every attempt so far."""

import json
import re
import shlex
import uuid
from datetime import datetime, timedelta

import pytest
from busy import BEFORE, TIME
from claims import LEASE_OVER, claim, connected, result, set_clock_back, settle
from reports import NOT_KNOWN, ONLY_COUNTED, read

import calls
from demo.stage_server import Answer
from ops.table import clock


@pytest.fixture
def run_command(run_here):
    return run_here


def test_job_tells_what_it_owes(database, run_command, busy):
    def owes(stage: str) -> str:
        done = run_command(database, "job", busy[stage])
        assert done.code == 0
        where = f"job {busy[stage]} is at ({BEFORE[stage]}, done), tenant tenant"
        assert done.lines[0] == where
        name, rest = done.lines[1].removeprefix("owes: ").split(" ", 1)
        assert name == stage
        return rest.split(", ", 1)[1].partition(")")[0] + rest.partition(")")[2]

    assert re.fullmatch(rf"1 attempt spent, \S+ is on it since {TIME}", owes("vlm_analyze"))
    waits = r"1 attempt spent, due in \d+ \w+; last error: HTTP 500: no memory"
    assert re.fullmatch(waits, owes("yolo_detect"))
    assert "0 attempts spent, due now; last error: HTTP 503" in owes("planner")
    assert owes("overlay") == (
        f"1 attempt spent, given up: HTTP 422: no text; ./jsl retry {busy['overlay']}"
    )
    assert owes("vlm_judge") == "0 attempts spent, due now"


def test_call_never_tried_is_said_to_be_due_although_the_clock_was_set_back(database, run_command):
    job = database.add_job("planner", "done")
    set_clock_back(database, 7200)
    assert run_command(database, "status").lines[1].startswith("oldest due 0 s, ")
    said = run_command(database, "job", job).lines
    assert said[1].endswith("0 attempts spent), due now") and "no listener is connected" in said[2]
    assert "overlay: due now" in run_command(database, "jobs", "--stage", "overlay").lines[1]


def test_call_without_an_answer_is_not_said_to_be_under_way(database, run_command):
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        row = claim(conn)
        database.move(job, "overlay", "running")
        settle(conn, result(row, "unknown", delay=0.0, after_lease=True))
    said = run_command(database, "job", job).lines[2]
    told = "no answer; the stage may run until"
    assert re.fullmatch(rf"called: overlay \(call \d+\), {told} {TIME}", said)
    assert f"overlay: {told} " in run_command(database, "jobs", "--stage", "overlay").lines[1]


def test_job_that_may_rest_unseen_is_not_shown_as_calm(database, run_command):
    job = database.add_job("x", "y")
    assert run_command(database, "job", job).code == 0
    database.rows(ONLY_COUNTED)
    done = run_command(database, "job", job)
    assert done.refused(1) == NOT_KNOWN and "owes: nothing" in done.out
    assert json.loads(run_command(database, "job", job, "--json").out)["problem"] == NOT_KNOWN
    said = read(database, job).section("jobs").one("article").one("ul", "said").all("li")
    assert said[-1].text == NOT_KNOWN


def test_job_whose_stage_has_accepted_it_and_left_it_alone_is_not_shown_as_calm(
    database, run_command
):
    """Until it rests: a minute after its last change, where that is later than the answer."""
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        settle(conn, result(claim(conn)))
    database.rows("UPDATE pipeline_stages SET timeout = 60")
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '30 s'")
    database.rows("UPDATE jobs SET updated_at = now() - interval '20 s'")
    accepted_at, changed_at = database.row(
        "SELECT finished_at, updated_at FROM stage_attempts, jobs"
    )
    said = run_command(database, "job", job).lines[2]
    rests_at = changed_at + timedelta(minutes=1)
    assert said == (f"accepted: since {clock(accepted_at)} overlay has not moved it on; "
                    f"from {clock(rests_at)} on it rests")  # fmt: skip
    found = json.loads(run_command(database, "job", job, "--json").out)["accepted"]
    assert found["stage"] == "overlay" and datetime.fromisoformat(found["rests_at"]) == rests_at
    database.rows(
        "INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker,"
        " started_at, finished_at, outcome) SELECT job_id, table_name, call_id, attempt + 1, stage,"
        " worker, started_at, finished_at, 'skipped' FROM stage_attempts"
    )
    assert run_command(database, "job", job).lines[2] == said
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 hour'")
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '1 hour'")
    assert run_command(database, "job", job).lines[2].startswith("rests since ")


def test_running_job_whose_call_nobody_makes_is_not_shown_as_calm(database, run_command):
    """Until it rests: its stage was cut off, or somebody else has called it."""
    said = "running: no call of it is under way; after the timeout of overlay it rests"
    job = database.add_job("overlay", "running")
    assert said in run_command(database, "job", job).lines
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 hour'")
    assert said not in run_command(database, "job", job).lines


def test_job_lists_every_attempt(database, api, listener, run_command):
    answers = [Answer(500, b"first"), Answer(507)]
    api.on("vlm_judge", lambda _: answers.pop(0) if answers else None)
    listener(database, api=api)
    job = database.add_job("overlay", "done")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    database.wait_for("SELECT count(*) = 3 FROM stage_attempts")
    done = run_command(database, "job", job)
    assert done.lines[:2] == [f"job {job} is at (vlm_judge, done), tenant tenant", "owes: nothing"]
    attempts = [line.split()[2:6] for line in done.lines[3:]]
    assert done.lines[2].split() == (
        ["started", "stage", "attempt", "outcome", "HTTP", "seconds", "error"]
    )
    assert attempts == [
        ["vlm_judge", "1", "retry", "500"],
        ["vlm_judge", "2", "retry", "507"],
        ["vlm_judge", "3", "succeeded", "200"],
    ]
    assert done.lines[3].endswith("HTTP 500: first")


def test_attempts_that_do_not_count_have_no_number(database, run_command):
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        settle(conn, result(claim(conn), "held", free=True, spent=0, delay=0.0))
        settle(conn, result(claim(conn), "retry", spent=1, delay=0.0))
        claim(conn)
        database.rows(LEASE_OVER)
        calls.reap(conn)
    run_command(database, "cancel", job)
    lines = run_command(database, "job", job).lines[-4:]
    assert [line.split()[3:5] for line in lines] == [
        ["-", "held"],
        ["1", "retry"],
        ["2", "lost"],
        ["-", "cancelled"],
    ]


def test_job_as_json_has_the_whole_error(database, run_command, busy):
    database.rows("UPDATE stage_calls SET last_error = repeat('x', 1000) WHERE stage = 'overlay'")
    said = json.loads(run_command(database, "job", "--json", busy["overlay"]).out)
    assert said["job_id"] == busy["overlay"]
    assert said["job"] == {"current_step": "planner", "status": "done", "tenant_id": "tenant"}
    assert said["owes"]["given_up"]
    assert said["owes"]["last_error"] == "x" * 1000
    [attempt] = said["attempts"]
    assert (attempt["outcome"], attempt["http_status"]) == ("failed", 422)


def test_deleted_job_still_shows_its_history(database, api, listener, run_command):
    listener(database, api=api)
    job = database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'succeeded'")
    database.rows("DELETE FROM jobs")
    done = run_command(database, "job", job)
    assert done.lines[:2] == [f"job {job} was deleted", "owes: nothing"]
    assert len(done.lines) == 4


def test_job_that_never_owed_anything(database, run_command):
    job = database.add_job("img_gen", "queued")
    done = run_command(database, "job", job)
    assert done.lines == [f"job {job} is at (img_gen, queued), tenant tenant", "owes: nothing"]


def test_job_names_the_state_that_a_misspelt_one_was_meant_to_be(database, run_command):
    job = database.add_job("planner", "Done ")
    [_, owes] = run_command(database, "job", job).lines
    assert owes == "owes: nothing; PIPELINE has no such state: is (planner, done) meant?"


@pytest.mark.parametrize("command", ["job", "retry", "call", "cancel"])
def test_unknown_job_gets_one_line_and_exit_1(database, run_command, command):
    job = str(uuid.uuid4())
    assert run_command(database, command, job).refused(1) == f"there is no job {job}"


@pytest.mark.parametrize("command", ["job", "retry", "call", "cancel"])
def test_malformed_id_gets_one_line_and_exit_2(database, run_command, command):
    refused = run_command(database, command, "no-such-id").refused(2)
    assert refused == (
        'not a job id of this database: invalid input syntax for type uuid: "no-such-id"'
    )


def test_number_that_no_id_can_be_gets_one_line_and_exit_2(empty_database, run_command):
    empty_database.rows(
        "CREATE TABLE jobs (job_id int PRIMARY KEY, tenant_id int, current_step text, status text)"
    )
    run_command(empty_database, "install")
    refused = run_command(empty_database, "job", "99999999999999999999").refused(2)
    assert "99999999999999999999" in refused
    assert "out of range" in refused


def test_call_whose_earlier_one_is_under_way_says_so(database, run_command, conn):
    job = database.add_job("planner", "done")
    claim(conn)
    database.move(job, "overlay", "running")
    database.move(job, "planner", "done")
    waits = rf"overlay waits: an earlier call of overlay is under way, until {TIME} at the latest"
    assert re.fullmatch(waits, run_command(database, "job", job).lines[2])


AN_HOUR_AGO = (
    "UPDATE jobs SET updated_at = now() - interval '1 h';"
    " UPDATE stage_attempts SET finished_at = finished_at - interval '1 h'"
)


@pytest.mark.parametrize("outcome", ["succeeded", "retry"])
def test_call_that_was_cancelled_under_way_is_cancelled_unless_it_was_accepted(
    database, run_command, conn, outcome
):
    job = database.add_job("planner", "done")
    row = claim(conn)
    run_command(database, "cancel", job, "--reason", "twice")
    settle(conn, result(row, outcome))
    database.rows(AN_HOUR_AGO)
    said = "accepted by the stage, but" if outcome == "succeeded" else "cancelled by .*: twice"
    assert re.match(f"rests since .*: {said}", run_command(database, "job", job).lines[2])


def test_command_for_a_given_up_call_is_whole_however_long_its_id(empty_database, run_command):
    key = "s3://it's/\\u00e9/" + "x" * 220
    empty_database.rows("CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text,"
                        " current_step text, status text)")  # fmt: skip
    run_command(empty_database, "install")
    empty_database.rows("INSERT INTO jobs VALUES (%s, 't', 'planner', 'done')", key)
    empty_database.rows("UPDATE stage_calls SET due_at = 'infinity', last_error = 'HTTP 404'")
    command = run_command(empty_database, "job", key).lines[1].split("; ./jsl ")[1]
    assert shlex.split(command) == ["retry", key]
