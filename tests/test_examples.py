"""examples/: each pipeline runs to its end with a real listener, and is small enough to copy."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
from waiting import LISTENING, PATIENCE

from demo.stage_api import StageApi
from demo.stage_examples import EXAMPLES

ROOT = Path(__file__).parent.parent
OF_A_VARIANT = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge", "ocr_eval",
                "readability_eval", "iou_eval"]  # fmt: skip


class Example:
    """A database with the example's tables, installed; its jobs, and its stage API."""

    def __init__(self, name, database, api, run_command):
        self.database, self.api = database, api
        self.module = f"examples.{name}.stages"
        self.example_job = importlib.import_module(self.module).example_job
        self.settings = {"PIPELINE_MODULE": self.module, "RETRY_DELAY": 0.1}
        self.run_command = run_command
        database.rows((ROOT / "examples" / name / "schema.sql").read_text())
        self.installed = self.command("install")

    def command(self, *args):
        return self.run_command(self.database, *args, api=self.api, **self.settings)

    def add_job(self) -> str:
        return str(self.example_job(self.database.conn))

    def calls(self) -> Counter:
        return Counter((request.row_id, request.stage) for request in self.api.calls())


@pytest.fixture
def example(request, empty_database, run_command):
    """The example that the test's parameter names."""
    with StageApi(empty_database.dsn, stages=EXAMPLES[request.param]) as api:
        yield Example(request.param, empty_database, api, run_command)


def each(*names):
    return pytest.mark.parametrize("example", names, indirect=True)


@pytest.fixture
def running(example, listener):
    process = listener(example.database, api=example.api, **example.settings)
    process.wait_for_line(LISTENING)
    return example


def wait_until_done(example, stage: str, jobs: int) -> None:
    ended = "SELECT count(*) = %s FROM jobs WHERE current_step = %s AND status = 'done'"
    example.database.wait_for(ended, jobs, stage)
    example.api.wait_for(lambda api: all(r.finished for r in api.requests), PATIENCE)


@each("five_stages")
def test_five_stages_call_each_stage_once_and_overlay_with_its_text(running):
    jobs = [running.add_job() for _ in range(3)]
    wait_until_done(running, "vlm_judge", jobs=3)
    stages = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]
    assert running.calls() == {(job, stage): 1 for job in jobs for stage in stages}
    assert {call.body["text"] for call in running.api.calls(stage="overlay")} == {"오늘의 커피"}


@each("variants")
def test_variants_call_each_stage_once_and_ocr_eval_until_it_succeeds(running):
    jobs = [running.add_job() for _ in range(2)]
    wait_until_done(running, "instagram_feed_gen", jobs=2)
    rows = running.database.rows("SELECT job_variants_id::text FROM jobs_variants")
    expected = {(row, stage): 1 for [row] in rows for stage in OF_A_VARIANT}
    expected |= {(row, "ocr_eval"): 3 for [row] in rows}
    expected |= {(job, stage): 1 for job in jobs for stage in
                 ("ad_copy_gen_kor", "instagram_feed_gen")}  # fmt: skip
    assert len(rows) == 6
    assert running.calls() == expected
    running.database.wait_for("SELECT count(*) = 0 FROM stage_calls")


@each("variants")
def test_join_is_made_again_after_it_failed_and_after_a_variant_was_redone(running):
    running.api.on("ad_copy_gen_kor", lambda request: running.api.work(request, "failed"))
    job = running.add_job()
    running.database.wait_for("SELECT count(*) = 1 FROM stage_calls WHERE due_at = 'infinity'")
    running.api.on("ad_copy_gen_kor", None)
    running.command("again", "--stage", "ad_copy_gen_kor", job)
    wait_until_done(running, "instagram_feed_gen", jobs=1)
    running.database.rows("UPDATE jobs_variants SET current_step = 'readability_eval'"
                          " WHERE ctid = (SELECT ctid FROM jobs_variants LIMIT 1)")  # fmt: skip
    expected = {"ad_copy_gen_kor": [500, 200, 200], "instagram_feed_gen": [200, 200]}
    running.api.wait_for(
        lambda api: all([r.status for r in api.calls(stage=stage)] == answers
                        for stage, answers in expected.items()),
        PATIENCE,
    )  # fmt: skip


@each("variants")
def test_what_a_stage_has_made_is_sent_to_the_next(running):
    running.add_job()
    wait_until_done(running, "instagram_feed_gen", jobs=1)
    database, api = running.database, running.api
    proposals = dict(database.rows(
        "SELECT job_variants_id::text, proposal_id::text FROM planner_proposals"))  # fmt: skip
    assert {r.row_id: r.body["proposal_id"] for r in api.calls(stage="overlay")} == proposals
    overlays = dict(database.rows("SELECT job_variants_id::text, overlay_id::text FROM overlays"))
    assert {r.row_id: r.body["overlay_id"] for r in api.calls(stage="vlm_judge")} == overlays


@each("variants")
def test_optional_value_may_be_missing(running):
    running.database.rows("CREATE RULE no_overlay AS ON INSERT TO overlays DO INSTEAD NOTHING")
    running.add_job()
    wait_until_done(running, "instagram_feed_gen", jobs=1)
    assert [r.body["overlay_id"] for r in running.api.calls(stage="vlm_judge")] == [None] * 3


@each("five_stages", "variants")
def test_install_says_every_route_and_changes_nothing_again(running):
    routes = len(importlib.import_module(running.module).PIPELINE)
    assert sum("  routed   " in line for line in running.installed.lines) == routes
    again = running.command("install").lines
    assert not [line for line in again if line.startswith(("  routed", "  created"))]


@each("five_stages", "variants")
def test_test_job_follows_the_job_to_its_end(running):
    done = running.command("test-job")
    assert done.code == 0
    last = list(importlib.import_module(running.module).PIPELINE.values())[-1].__name__
    assert done.lines[-2].split()[0] == last
    wait_until_done(running, last, jobs=1)


@each("variants")
def test_test_job_prints_the_hops_of_every_row_and_removes_all(running):
    done = running.command("test-job", "--clean")
    assert done.code == 0
    hops = Counter(line.split()[0] for line in done.lines if " waited " in line)
    assert hops == dict.fromkeys(OF_A_VARIANT, 3) | {"ad_copy_gen_kor": 1, "instagram_feed_gen": 1}
    assert sum(line.startswith("  with jobs_variants ") for line in done.lines) == 3
    assert sum("3 attempts" in line for line in done.lines) == 3
    assert done.lines[-2].startswith("passed: 10 stages with 4 rows in ")
    for table in ("jobs", "jobs_variants", "job_inputs", "planner_proposals", "overlays",
                  "stage_calls", "stage_attempts", "stage_looks", "stage_joins"):  # fmt: skip
        assert running.database.value(f"SELECT count(*) FROM {table}") == 0, table


@each("variants")
def test_test_job_names_the_row_that_stalls(running):
    running.api.on("iou_eval", lambda request: running.api.work(request, "failed"))
    done = running.command("test-job", "--clean")
    assert done.code == 1
    assert "jobs_variants " in done.err and " stalls at iou_eval: the stage set it to" in done.err
    for table in ("jobs", "jobs_variants", "stage_looks", "stage_joins"):
        assert running.database.value(f"SELECT count(*) FROM {table}") == 0, table


@each("variants")
def test_example_job_of_the_documentation_works(example):
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "docs/STAGES.md").read_text(), re.DOTALL)
    given: dict = {}
    exec(next(block for block in blocks if block.startswith("def example_job")), given)
    job = given["example_job"](example.database.conn)
    assert example.database.value("SELECT count(*) FROM stage_calls") == 1
    assert example.database.state(job) == ("img_gen", "done")


@pytest.mark.parametrize("name", EXAMPLES)
def test_stages_py_is_short_and_has_a_readme(name):
    folder = ROOT / "examples" / name
    assert len((folder / "stages.py").read_text().splitlines()) <= 80
    assert "schema.sql" in (folder / "README.md").read_text()
