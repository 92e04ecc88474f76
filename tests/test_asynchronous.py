"""Asynchronous stages, which answer 202 and then work."""

import json
import re
from contextlib import closing

import pytest
from asynchronous import PIPELINE
from claims import LEASE_OVER, connected
from conftest import ROOT
from variants import TABLE, install, stage
from waiting import PATIENCE, is_gone, until, wait_until_idle

from demo.stage_server import Answer, Hangup
from ops.install import apply

TAKEN = Answer(202)
WORKING = "SELECT count(*) FROM stage_leases WHERE working"
# In one statement, as a listener that takes a move ends the call with it.
UNMOVED = f"SELECT NOT EXISTS (SELECT FROM stage_moves) AND ({WORKING}) = 1"
NOBODY = "SELECT count(*) = 0 FROM stage_leases"
ENDED = "SELECT outcome FROM stage_attempts WHERE job_id = %s"
FAILED = "파이프라인 단계 실행 실패"
UNFINISHED = "taken with HTTP 202, but not finished within its timeout"


class Site:
    """A database with asynchronous stages, their API, and a listener."""

    def __init__(self, variants, api, listener):
        self.variants, self.database, self.api, self.listener = (
            variants,
            variants.database,
            api,
            listener,
        )
        for name in ("vlm_analyze", "planner", "yolo_detect", "ad_copy"):
            api.on(f"/{name}", lambda request: TAKEN)

    def start(self, *args, **settings):
        given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "asynchronous",
                 "SWEEP_INTERVAL": 3600, "LISTENER_WORKERS": 1} | settings  # fmt: skip
        return self.listener(self.database, *args, api=self.api, **given)

    def calls(self, stage: str) -> list:
        return [request for request in self.api.calls() if request.path == f"/{stage}"]

    def wait_for_calls(self, stage: str, count: int) -> None:
        self.api.wait_for(lambda _: len(self.calls(stage)) >= count, PATIENCE)

    def wait_for_working(self, count: int) -> None:
        self.database.wait_for(f"SELECT ({WORKING}) = {count}")


@pytest.fixture
def site(database, use_pipeline, api, listener):
    use_pipeline(PIPELINE)
    return Site(install(database, TABLE), api, listener)


def test_worker_is_idle_while_calls_are_worked_on(site):
    jobs = [site.database.add_job("vlm_analyze", "done") for _ in range(5)]
    first = site.start()
    site.wait_for_working(5)
    assert not site.database.rows("SELECT * FROM stage_attempts")
    for job in jobs:
        site.database.move(job, "planner", "running")
    site.wait_for_working(5)
    assert first.stop() == 0  # a deploy does not wait for them
    site.start()
    for job in jobs:
        site.database.move(job, "planner", "done")
    site.database.wait_for(NOBODY)
    assert [site.database.value(ENDED, job) for job in jobs] == ["succeeded"] * 5
    assert len(site.calls("planner")) == 5


def test_state_of_the_job_is_what_ends_a_call(site):
    """Not (stage, 'running') or the state that owes the call, but any other, whoever sets it."""
    job = site.database.add_job()
    site.start()
    site.wait_for_working(1)
    for step, status in [
        ("vlm_analyze", "running"),
        ("img_gen", "done"),
        ("vlm_analyze", "running"),
    ]:
        site.database.move(job, step, status)
    site.database.rows("UPDATE jobs SET tenant_id = 'other'")
    assert site.database.value(UNMOVED)
    site.database.move(job, "cancelled", "by hand")
    site.database.wait_for(NOBODY)
    assert site.database.value(ENDED, job) == "succeeded"
    assert len(site.calls("vlm_analyze")) == 1


def test_idle_worker_of_a_killed_listener_says_nothing_of_a_call_that_is_worked_on(site):
    site.database.add_job()
    process = site.start()
    site.wait_for_working(1)
    process.remember_workers()
    process.kill_alone()
    until(lambda: all(map(is_gone, process.workers)), "the end of the workers")
    process.wait()  # until all that they wrote is read
    assert process.output.count("단계가 작업을 접수함") == 1
    assert "리스너가 사라져" not in process.output


def test_stage_that_moves_the_job_before_its_answer_is_read(site):
    def behave(request):
        with closing(site.database.connect()) as conn:
            for status in ("running", "done"):
                set_to = f"UPDATE jobs SET current_step = 'planner', status = '{status}'"
                conn.cursor().execute(set_to)
        return TAKEN

    site.api.on("/planner", behave)
    job = site.database.add_job("vlm_analyze", "done")
    site.start()
    site.database.wait_for(f"SELECT ({NOBODY}) AND EXISTS ({ENDED})", job)
    assert site.database.value(ENDED, job) == "succeeded"


def test_stage_that_commits_after_its_answer(site):
    job = site.database.add_job("vlm_analyze", "done")
    with closing(site.database.connect()) as conn:
        conn.autocommit = False
        cursor = conn.cursor()

        def behave(request):
            cursor.execute("UPDATE jobs SET current_step = 'planner' WHERE job_id = %s", [job])
            return TAKEN

        site.api.on("/planner", behave)
        site.start()
        site.wait_for_working(1)
        conn.commit()
    site.database.wait_for(NOBODY)
    assert site.database.value(ENDED, job) == "succeeded"


def test_limit_counts_what_is_worked_on(site, run_command):
    jobs = [site.database.add_job() for _ in range(4)]
    site.start(LISTENER_WORKERS=4)
    site.wait_for_working(2)
    site.database.move(site.calls("vlm_analyze")[0].job_id, "vlm_analyze", "running")
    assert len(site.calls("vlm_analyze")) == 2
    waiting = next(job for job in jobs if job not in {r.job_id for r in site.calls("vlm_analyze")})
    by_hand = run_command(site.database, "call", waiting, PYTHONPATH=str(ROOT / "tests"),
                          PIPELINE_MODULE="asynchronous")  # fmt: skip
    assert "vlm_analyze is at its limit of 2 calls at once; try again" in by_hand.refused(1)
    site.database.move(site.calls("vlm_analyze")[0].job_id, "x", "done")
    site.wait_for_calls("vlm_analyze", 3)
    site.database.move(site.calls("vlm_analyze")[1].job_id, "x", "done")
    site.wait_for_calls("vlm_analyze", 4)
    assert {request.job_id for request in site.calls("vlm_analyze")} == set(jobs)


@pytest.mark.parametrize("dies", ["listener", "both"])
def test_listener_that_is_killed_leaves_them_to_the_next(site, dies):
    jobs = [site.database.add_job("vlm_analyze", "done") for _ in range(2)]
    first = site.start()
    site.wait_for_working(2)
    first.kill_alone() if dies == "listener" else first.kill()
    site.database.move(jobs[0], "planner", "done")
    site.start()
    site.database.wait_for(f"{NOBODY.replace('= 0', '= 1')}")
    site.database.move(jobs[1], "planner", "done")
    site.database.wait_for(NOBODY)
    assert len(site.calls("planner")) == 2


def test_stage_that_never_finishes_is_called_again_under_the_same_key(site):
    job = site.database.add_job("vlm_analyze", "done")
    running = site.start(SWEEP_INTERVAL=0.1, MAX_ATTEMPTS=2)
    for number, then in (1, "재시도"), (2, "포기"):
        site.wait_for_calls("planner", number)
        site.wait_for_working(1)
        site.database.rows(LEASE_OVER)
        line = running.wait_for_line(f"{FAILED}: job={job} stage=planner attempt={number}/2")
        assert re.search(rf" WARNING .*={UNFINISHED} \(\d+초\) → {then} \(취소되지 않고", line)
    site.database.wait_for("SELECT due_at = 'infinity' FROM stage_calls")
    first, second = site.calls("planner")
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert [row.outcome for row in site.database.attempts(job)] == ["unknown", "unknown", "failed"]
    assert site.database.attempts(job)[0].error == UNFINISHED
    assert running.output.count(f"error={UNFINISHED}") == 2  # said once for each


def test_call_given_up_after_its_timeout_says_why_and_how_often_it_was_made(
    site, run_command, tmp_path
):
    job = site.database.add_job("vlm_analyze", "done")
    alerts = tmp_path / "alerts"
    running = site.start(SWEEP_INTERVAL=0.1, MAX_ATTEMPTS=1, ALERT_COMMAND=f"tee -a {alerts}")
    site.wait_for_working(1)
    site.database.rows(LEASE_OVER)
    error = f"no attempt is left; the last one: {UNFINISHED}"
    assert " ERROR " in running.wait_for_line(f"stage=planner attempt=1/1 error={error} → 포기")
    site.database.wait_for("SELECT due_at = 'infinity' FROM stage_calls")
    running.stop()
    assert json.loads(alerts.read_text())["error"] == error
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "asynchronous"}
    said = run_command(site.database, "job", job, **module).out
    assert f", 1 attempt spent), given up: {error}" in said
    assert [line.split()[2:5] for line in said.splitlines()[-2:]] == [
        ["planner", "1", "unknown"],
        ["planner", "1", "failed"],
    ]
    [row] = json.loads(run_command(site.database, "jobs", "--given-up", "--json", **module).out)[
        "jobs"
    ]
    assert (row["attempts"], row["last_error"]) == (1, error)


def test_stage_that_has_set_running_and_never_finishes_is_stalled(site):
    job = site.database.add_job("vlm_analyze", "done")
    site.start(LISTENER_WORKERS=1)
    site.wait_for_working(1)
    site.database.move(job, "planner", "running")
    site.database.rows(LEASE_OVER)
    line = site.start().wait_for_line(f"{FAILED}: job={job} stage=planner attempt=1/5")
    assert line.endswith(f" → 취소되었거나 Job 상태가 변경됨: ./jsl job --table jobs {job}")
    assert site.database.value("SELECT reason FROM resting_rows()").startswith("running for longer")
    assert len(site.calls("planner")) == 1


def test_answer_that_is_lost_after_the_job_has_moved_on(site):
    def hang_up(request):
        with closing(site.database.connect()) as conn:
            conn.cursor().execute("UPDATE jobs SET current_step = 'planner', status = 'done'")
        raise Hangup

    site.api.on("/planner", hang_up)
    job = site.database.add_job("vlm_analyze", "done")
    site.start()
    site.database.wait_for(f"SELECT ({NOBODY}) AND EXISTS ({ENDED})", job)
    assert site.database.owed(job) is None
    assert len(site.calls("planner")) == 1


def test_failed_is_called_again_and_given_up_after_the_last_attempt(site):
    job = site.database.add_job()
    site.start(MAX_ATTEMPTS=2, RETRY_DELAY=0.01)
    for number in (1, 2):
        site.wait_for_calls("vlm_analyze", number)
        site.wait_for_working(1)
        site.database.move(job, "vlm_analyze", "running")
        site.database.move(job, "vlm_analyze", "failed")
    site.database.wait_for("SELECT due_at = 'infinity' FROM stage_calls WHERE job_id = %s", job)
    assert len(site.calls("vlm_analyze")) == 2


def test_failed_that_nothing_follows_from_is_told(site):
    job = site.database.add_job("vlm_analyze", "done")
    running = site.start()
    site.wait_for_working(1)
    site.database.move(job, "planner", "failed")
    assert "send" not in running.wait_for_line("단계가 failed로 설정함")
    assert site.database.value(ENDED, job) == "failed"
    assert site.database.value("SELECT kind FROM resting_rows()") == "failed"


def test_trigger_records_no_moves_where_no_stage_is_asynchronous(site, use_pipeline):
    source = "SELECT prosrc FROM pg_proc WHERE proname = 'notify_job_state_change'"
    assert "stage_moves" in site.database.value(source)
    use_pipeline({("img_gen", "done"): stage("vlm_analyze")})
    with connected(site.database) as conn:
        apply(conn)
    assert "stage_moves" not in site.database.value(source)


def test_log_as_json_names_the_row_that_failed_and_why(site):
    job = site.database.add_job("vlm_analyze", "done")
    [variant] = site.variants.add(job, "img_gen", "done")
    running = site.start(LOG_FORMAT="json", LISTENER_WORKERS=2)
    site.wait_for_working(2)
    site.variants.move(variant, "yolo_detect", "failed")
    site.database.move(job, "planner", "failed")
    site.database.wait_for(NOBODY)
    running.stop()
    ended = [said for said in map(json.loads, running.lines) if said["event"] == "call_failed"]
    assert [said["job"] for said in ended] == [job, job]
    assert {said.get("id") for said in ended} == {variant, None}
    for said in ended:
        if "id" in said:
            assert said["table"] == "jobs_variants"
            assert f"={variant} job_id={job} stage=yolo_detect " in said["message"]
        assert (said["outcome"], said["status"]) == ("failed", 202)
        assert said["error"] == "set failed by its stage"
        row = said.get("id") or job
        assert said["message"].endswith(f" → ./jsl job --table {said.get('table', 'jobs')} {row}")


@pytest.mark.parametrize("status", ["done", "failed"])
def test_child_and_join_are_worked_on(site, status):
    job = site.database.add_job("x", "y")
    [variant] = site.variants.add(job, "img_gen", "done")
    site.start()
    site.wait_for_working(1)
    site.variants.move(variant, "yolo_detect", "done")
    site.wait_for_calls("ad_copy", 1)
    site.wait_for_working(1)
    site.database.move(job, "ad_copy", "running")
    site.database.move(job, "ad_copy", status)
    site.database.wait_for(NOBODY)
    assert [row.stage for row in site.database.attempts(variant)] == ["yolo_detect"]
    if status == "done":
        assert site.database.value(ENDED, job) == "succeeded" and site.variants.owed() == []
    else:
        call = site.database.owed(job)
        assert call.given_up and call.last_error == "set failed by its stage"


PARTITIONED = """
ALTER TABLE jobs RENAME TO jobs_before;
CREATE TABLE jobs (LIKE jobs_before INCLUDING DEFAULTS) PARTITION BY LIST (status);
CREATE INDEX ON jobs (job_id);
CREATE TABLE running PARTITION OF jobs FOR VALUES IN ('running');
CREATE TABLE others PARTITION OF jobs DEFAULT;
"""


def test_row_that_leaves_running_for_another_partition(site, tmp_path):
    site.database.rows(PARTITIONED)
    with connected(site.database) as conn:
        apply(conn)
    job = site.database.add_job("vlm_analyze", "done")
    site.start()
    site.wait_for_working(1)
    site.database.move(job, "planner", "running")
    wait_until_idle(tmp_path)
    assert site.database.value(UNMOVED)
    site.database.move(job, "planner", "failed")  # an INSERT there, which owes no call
    site.database.wait_for(NOBODY)


@pytest.mark.parametrize("how", ["DELETE FROM jobs", "moved past the triggers"])
def test_row_that_no_trigger_has_seen_moving(site, how):
    job = site.database.add_job("vlm_analyze", "done")
    site.start(SWEEP_INTERVAL=0.2)
    site.wait_for_working(1)
    if how.startswith("DELETE"):
        site.database.rows(how)
    else:
        site.database.rows("SET session_replication_role = replica;"
                           " UPDATE jobs SET current_step = 'planner'; RESET ALL")  # fmt: skip
    site.database.wait_for(NOBODY)
    assert site.database.value(ENDED, job) == ("skipped" if "DELETE" in how else "succeeded")


def test_commands_say_that_it_is_worked_on(site, run_command):
    job = site.database.add_job("vlm_analyze", "done")
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "asynchronous"}
    site.start()
    site.wait_for_working(1)

    def said(*args: str) -> str:
        done = run_command(site.database, *args, **module)
        return done.out + done.err

    assert "planner works on it since" in said("job", job)
    assert "planner works on it since" in said("jobs", "--stage", "planner")
    assert {"1 taken and worked on", "asynchronous"} <= set(re.split(r" {2,}|\n", said("status")))
    ends = r"; from \d\d:\d\d:\d\d on it counts as a call without an answer"
    assert re.search(f"planner has taken it and works on it{ends}; nothing", said("again", job))
    waits = said("pause", "planner", "--wait", "--timeout", "0")
    assert re.search(rf"planner {job} \(its stage works on it{ends}\)", waits)
    assert not re.search(r"\d+ calls? under way", said("status"))
    assert "planner has taken it: its work goes on" in said("cancel", job)
    site.database.move(job, "planner", "done")
    site.database.wait_for(NOBODY)
    assert "no call of planner is under way" in said("pause", "planner", "--wait")


def test_call_by_hand_is_taken(site, run_command):
    job = site.database.add_job("vlm_analyze", "done")
    done = run_command(site.database, "call", job, api=site.api, PIPELINE_MODULE="asynchronous",
                       PYTHONPATH=str(ROOT / "tests"))  # fmt: skip
    assert done.code == 0
    assert site.database.value(WORKING) == 1


def test_stage_that_became_asynchronous_needs_an_install(site, run_command):
    changed = "UPDATE pipeline_stages SET asynchronous = NOT asynchronous WHERE stage = 'planner'"
    site.database.rows(changed)
    running = site.start()
    assert running.wait() == 2 and "make trigger" in running.lines[-1]
    said = "stage planner is asynchronous in asynchronous.py, not in the database"
    given = {"PIPELINE_MODULE": "asynchronous", "PYTHONPATH": str(ROOT / "tests")}
    done = run_command(site.database, "verify", api=site.api, **given)
    assert done.code == 1 and said in done.out
    assert run_command(site.database, "install", **given).code == 0
    done = run_command(site.database, "verify", api=site.api, **given)
    assert done.code == 0 and said not in done.out


def test_more_moves_than_are_looked_at_at_once_hide_none(site):
    """Rows of a bulk load have left the stage, too, and nobody was called for them."""
    job = site.database.add_job("vlm_analyze", "done")
    site.start()
    site.wait_for_working(1)
    site.database.rows("INSERT INTO stage_moves (job_id, table_name, stage, is_failed)"
                       " SELECT gen_random_uuid(), 'jobs', 'planner', false"
                       " FROM generate_series(1, 3500)")  # fmt: skip
    site.database.move(job, "planner", "done")
    site.database.wait_for(NOBODY)
    site.database.wait_for("SELECT count(*) = 0 FROM stage_moves")
    assert site.database.value(ENDED, job) == "succeeded"


def test_moves_that_cannot_be_read_keep_no_call_from_being_made(site):
    site.database.rows("ALTER TABLE stage_moves RENAME moved_at TO elsewhere")
    running = site.start()
    running.wait_for_line("작업 완료 확인 실패")
    site.database.add_job("vlm_analyze", "done")
    site.wait_for_calls("planner", 1)
