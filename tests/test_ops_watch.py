"""`status` and `job`: every column with the real thing behind it."""

import json
import re
import threading
import uuid

import pytest
from waiting import PATIENCE, gate, wait_for_call, wait_until_idle

from demo.stage_api import StageApi
from demo.stage_server import Answer

STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]
BEFORE = dict(zip(STAGES, ["img_gen", *STAGES], strict=False))


def rows(done) -> dict[str, list[str]]:
    """The table of `status`: the cells of each stage."""
    assert done.code == 0
    heading, *lines = done.lines[: len(STAGES) + 1]
    assert heading == "stage        owed  calling  retrying  given up  oldest due"
    return {line.split()[0]: line.split(maxsplit=5)[1:] for line in lines}


@pytest.fixture
def busy(database, api, listener):
    """One job in every situation, by stage: calling, retried, held, given up, due and not taken."""
    api.on("yolo_detect", lambda _: Answer(500, b"no memory"))
    api.on("planner", lambda _: Answer(503, headers={"Retry-After": "1800"}))
    api.on("overlay", lambda _: Answer(422, b"no text"))
    with gate(api):
        process = listener(database, "run", *[f"--stage={s}" for s in STAGES[:-1]], api=api,
                           RETRY_DELAY=3600)  # fmt: skip
        jobs = {stage: database.add_job(BEFORE[stage], "done") for stage in STAGES[1:]}
        process.wait_for_line("파이프라인 단계 실행 실패", count=3)
        jobs["vlm_analyze"] = database.add_job("img_gen", "done")
        wait_for_call(api, jobs["vlm_analyze"])
        yield jobs


def test_status_shows_every_situation(database, run_command, busy):
    database.rows(
        "UPDATE stage_calls SET due_at = now() - interval '3 h' WHERE stage = 'vlm_judge'"
    )
    database.add_job("overlay", "done")
    done = run_command(database, "status")
    table = rows(done)
    assert table["vlm_analyze"] == ["1", "1", "0", "0", "-"]
    assert table["yolo_detect"] == ["1", "0", "1", "0", "-"]
    assert table["planner"][:4] == ["1", "0", "1", "0"]
    assert table["overlay"] == ["1", "0", "0", "1", "-"]
    assert table["vlm_judge"] == ["2", "0", "0", "0", "3 h"]
    held, worker, hint = done.lines[-3:]
    assert held.startswith("held: planner until ")
    assert held.endswith(": HTTP 503")
    assert worker.endswith(f": calling vlm_analyze for job {busy['vlm_analyze']}")
    assert hint == "given up: look with python listener.py job JOB_ID, then retry JOB_ID"


def test_status_as_json_says_the_same(database, run_command, busy):
    said = json.loads("\n".join(run_command(database, "status", "--json").lines))
    assert [stage["stage"] for stage in said["stages"]] == STAGES
    by_name = {stage.pop("stage"): stage for stage in said["stages"]}
    assert by_name["planner"]["held_reason"] == "HTTP 503"
    assert by_name["planner"]["held_until"]
    columns = ("owed", "calling", "retrying", "given_up")
    assert [by_name["overlay"][name] for name in columns] == [1, 0, 0, 1]
    assert by_name["vlm_judge"]["oldest_due_seconds"] >= 0
    [worker] = said["workers"]
    assert (worker["stage"], worker["job_id"]) == ("vlm_analyze", busy["vlm_analyze"])


def test_status_of_an_idle_database_without_workers(database, run_command):
    done = run_command(database, "status")
    assert rows(done) == {stage: ["0", "0", "0", "0", "-"] for stage in STAGES}
    assert done.lines[-1] == "no worker is connected: start python listener.py"


def test_status_shows_idle_workers(database, listener, run_command, tmp_path):
    listener(database, "run", "--workers", "2")
    wait_until_idle(tmp_path, workers=2)
    workers = [line for line in run_command(database, "status").lines if "worker " in line]
    doing = [line.partition(": ")[2] for line in workers]
    assert doing == ["waiting for a job to change"] * 2


def test_status_of_another_host_shows_what_the_database_knows(
    database, api, listener, run_command, tmp_path
):
    listener(database, api=api)
    wait_until_idle(tmp_path)
    elsewhere = {"HEARTBEAT_DIR": tmp_path / "elsewhere"}
    assert run_command(database, "status", **elsewhere).lines[-1].endswith(": connected")
    with gate(api):
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        last = run_command(database, "status", **elsewhere).lines[-1]
        assert last.endswith(f": calling vlm_analyze for job {job}")


def test_worker_at_a_stage_that_has_taken_its_job_is_not_idle(database, listener, run_command):
    taken, finish = threading.Event(), threading.Event()

    def work(stage: str) -> float:
        taken.set()
        finish.wait(PATIENCE)
        return 0.0

    with StageApi(database.dsn, delay=work) as slow:
        listener(database, api=slow)
        job = database.add_job("planner", "done")
        assert taken.wait(PATIENCE)
        done = run_command(database, "status")
        finish.set()
    assert rows(done)["overlay"] == ["0", "0", "0", "0", "-"]
    assert done.lines[-1].endswith(f": calling overlay for job {job}")


# --- job -----------------------------------------------------------------------------------


def test_job_tells_what_it_owes(database, run_command, busy):
    def owes(stage: str) -> str:
        done = run_command(database, "job", busy[stage])
        assert done.code == 0
        where = f"job {busy[stage]} is at ({BEFORE[stage]}, done), tenant tenant"
        assert done.lines[0] == where
        name, rest = done.lines[1].removeprefix("owes: ").split(" ", 1)
        assert name == stage
        return rest.split(", ", 1)[1].partition(")")[0] + rest.partition(")")[2]

    assert re.fullmatch(r"1 attempts spent, \S+ is on it since [\d:]{8}", owes("vlm_analyze"))
    waits = r"1 attempts spent, due in \d+ \w+; last error: HTTP 500: no memory"
    assert re.fullmatch(waits, owes("yolo_detect"))
    assert "0 attempts spent, due now; last error: HTTP 503" in owes("planner")
    assert owes("overlay") == (
        "1 attempts spent, given up: HTTP 422: no text; python listener.py retry JOB_ID"
    )
    assert owes("vlm_judge") == "0 attempts spent, due now"


def test_job_lists_every_attempt(database, api, listener, run_command):
    answers = [Answer(500, b"first"), Answer(502)]
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
        ["vlm_judge", "2", "retry", "502"],
        ["vlm_judge", "3", "succeeded", "200"],
    ]
    assert done.lines[3].endswith("HTTP 500: first")


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


@pytest.mark.parametrize("command", ["job", "retry", "call"])
def test_unknown_job_gets_one_line_and_exit_1(database, run_command, command):
    job = str(uuid.uuid4())
    assert run_command(database, command, job).refused(1) == f"there is no job {job}"


@pytest.mark.parametrize("command", ["job", "retry", "call"])
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
    refused = run_command(empty_database, "job", "99999999999").refused(2)
    assert "99999999999" in refused
    assert "out of range" in refused
