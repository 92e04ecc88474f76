"""`test-job`: a job of its own goes through the pipeline, or the line says where it stalls."""

import re

import pytest
from waiting import LISTENING

from demo.stage_server import Answer

STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]


@pytest.fixture
def running(database, api, listener):
    """A listener that is ready."""
    listener(database, api=api, MAX_ATTEMPTS=2).wait_for_line(LISTENING)


def test_job_that_gets_through_prints_every_hop(database, run_command, running):
    done = run_command(database, "test-job")
    assert done.code == 0
    made, *hops, passed = done.lines
    job = re.fullmatch(r"job (\S+): \(img_gen, done\), tenant test_tenant", made)[1]
    hop = re.compile(r"  (\w+) +waited +\d+\.\d\d s, took +\d+\.\d\d s")
    assert [hop.fullmatch(line)[1] for line in hops] == STAGES
    assert re.fullmatch(r"passed: 5 stages in \d+\.\d s", passed)
    assert database.state(job) == ("vlm_judge", "done")


def test_clean_leaves_nothing_of_the_job(database, run_command, running):
    done = run_command(database, "test-job", "--clean")
    assert done.code == 0 and done.lines[-1].endswith("and its history are deleted")
    for table in ("jobs", "stage_calls", "stage_attempts"):
        assert database.value(f"SELECT count(*) FROM {table}") == 0


def test_given_up_stage_is_named_with_its_error(database, api, run_command, running):
    api.on("planner", lambda _: Answer(422, b"no text"))
    done = run_command(database, "test-job")
    assert done.code == 1
    assert re.search(r"stalls at planner: given up: HTTP 422: no text; look with python", done.err)
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == STAGES[:2]


def test_stage_that_fails_the_job_is_named(database, api, run_command, running):
    api.on("overlay", lambda request: api.work(request, "failed"))
    done = run_command(database, "test-job")
    assert done.code == 1 and "stalls at overlay: the stage set it to failed" in done.err


def test_stage_that_changes_nothing_is_named(database, api, run_command, running):
    api.on("yolo_detect", lambda _: Answer(202))
    done = run_command(database, "test-job", "--timeout", "0.5")
    assert done.code == 1
    assert "stalls at yolo_detect: accepted, but the job has not changed" in done.err


def test_paused_stage_is_named_with_who_did_it(database, run_command, running):
    run_command(database, "pause", "vlm_analyze", "--reason", "new GPU")
    done = run_command(database, "test-job", "--timeout", "0.5", "--clean")
    assert done.code == 1
    assert re.search(r"stalls at vlm_analyze: held by \S+: new GPU", done.err)
    assert database.value("SELECT count(*) FROM jobs") == 0


def test_without_a_listener_no_job_is_made(database, run_command):
    refused = run_command(database, "test-job").refused(1)
    assert refused == "no listener is connected: start python listener.py"
    assert database.value("SELECT count(*) FROM jobs") == 0


@pytest.mark.parametrize(
    "column",
    ["bigint GENERATED ALWAYS AS IDENTITY", "bigserial", "text", "integer", "uuid"],
)
def test_id_of_any_type(empty_database, run_command, listener, column):
    empty_database.rows(
        f"CREATE TABLE jobs (job_id {column} PRIMARY KEY, tenant_id text, current_step text,"
        " status text)"
    )
    run_command(empty_database, "install")
    listener(empty_database, STAGE_API_URL="http://127.0.0.1:1").wait_for_line(LISTENING)
    done = run_command(empty_database, "test-job", "--timeout", "0.5")
    assert done.code == 1 and "stalls at vlm_analyze: held by" in done.err


def test_table_that_wants_more_says_what(database, run_command, running):
    database.rows("ALTER TABLE jobs ADD COLUMN image text NOT NULL")
    done = run_command(database, "test-job")
    assert 'null value in column "image"' in done.refused(1)
