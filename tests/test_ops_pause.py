"""`pause`, `resume` and `cancel`: on the running system, whatever is under way."""

import getpass
import json
import socket
from contextlib import closing

import pytest
from variants import stage
from waiting import LISTENING, gate, wait_for_call, wait_for_sweeps, wait_until_idle

import db
from demo import five_stages
from demo.stage_server import Answer
from ops.install import apply

OPERATOR = f"{getpass.getuser()}@{socket.gethostname()}"
GPU = ("--reason", "GPU maintenance")
PAUSED = "SELECT held_until = 'infinity' AND held_by = %s FROM pipeline_stages WHERE stage = %s"
NOT_HELD = "SELECT held_until IS NULL FROM pipeline_stages WHERE stage = %s"


@pytest.fixture
def run_command(run_here):
    return run_here


def install(database) -> None:
    with closing(db.connect(database.settings())) as conn:
        apply(conn)


def pause(run_command, database, stage: str = "planner", *args: str) -> None:
    done = run_command(database, "pause", stage, *args)
    assert (done.code, done.lines) == (
        0,
        [f"paused: {stage}; ./jsl resume {stage}"],
    )


def paused(database, stage: str = "planner") -> bool:
    return database.value(PAUSED, OPERATOR, stage)


# --- pause and resume ----------------------------------------------------------------------


def test_calls_of_a_paused_stage_pile_up_and_drain_when_it_is_resumed(
    database, api, listener, run_command
):
    pause(run_command, database)
    listener(database, api=api, SWEEP_INTERVAL=0.1)
    jobs = [database.add_job("yolo_detect", "done") for _ in range(3)]
    other = database.add_job("overlay", "done")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE job_id = %s", other)
    wait_for_sweeps(database)
    assert api.calls(stage="planner") == []
    done = run_command(database, "resume", "planner")
    assert done.lines == [
        f"resumed: planner, which owes 3 calls (was paused by {OPERATOR}: paused by hand)"
    ]
    for job in jobs:
        database.wait_for(
            "SELECT (current_step, status) = ('vlm_judge', 'done') FROM jobs WHERE job_id = %s", job
        )
        assert len([call for call in api.calls(job) if call.stage == "planner"]) == 1


def test_pause_outlasts_a_restart_and_an_install(database, api, listener, run_command):
    pause(run_command, database, "planner", *GPU)
    first = listener(database, api=api)
    first.wait_for_line(LISTENING)
    assert first.stop() == 0
    assert run_command(database, "install").code == 0
    listener(database, api=api, SWEEP_INTERVAL=0.1)
    job = database.add_job("yolo_detect", "done")
    wait_for_sweeps(database)
    assert api.requests == [] and paused(database)
    assert database.owed(job).stage == "planner"


FIVE = five_stages.PIPELINE
CHANGED = {
    "the stage before it goes": {
        ("img_gen", "done"): FIVE["img_gen", "done"],
        ("vlm_analyze", "done"): FIVE["yolo_detect", "done"],
    },
    "another comes before it": FIVE
    | {("yolo_detect", "done"): stage("resize"), ("resize", "done"): FIVE["yolo_detect", "done"]},
    "another state leads to it as well": FIVE | {("again", "done"): FIVE["yolo_detect", "done"]},
}


@pytest.mark.parametrize("routes", CHANGED.values(), ids=CHANGED)
def test_pause_stays_with_its_stage_whatever_leads_to_it(
    database, run_command, use_pipeline, routes
):
    pause(run_command, database, "planner", *GPU)
    use_pipeline(routes)
    install(database)
    held = database.rows("SELECT DISTINCT stage, held_reason FROM pipeline_stages ORDER BY 1")
    names = sorted({function.__name__ for function in routes.values()})
    assert held == [(name, "GPU maintenance" if name == "planner" else None) for name in names]


def test_pause_stays_with_a_stage_that_is_renamed(database, run_command, use_pipeline):
    pause(run_command, database, "planner", *GPU)
    layout = stage("layout")
    use_pipeline(FIVE | {("yolo_detect", "done"): layout, ("again", "done"): layout})
    database.rows("CREATE TABLE known_stages (); CREATE TABLE wanted_stages ()")
    install(database)
    held = "SELECT count(*) FROM pipeline_stages WHERE stage = 'layout' AND held_until = 'infinity'"
    assert database.value(held) == 2


def test_pause_is_shown_in_status_with_its_reason(database, run_command):
    pause(run_command, database, "planner", *GPU)
    said = f"planner      paused by {OPERATOR}: GPU maintenance"
    assert said in run_command(database, "status").lines
    stages = json.loads(run_command(database, "status", "--json").out)["stages"]
    shown = {stage["stage"]: stage for stage in stages}
    assert shown["planner"]["paused"] and shown["planner"]["held_until"] == "infinity"
    assert shown["planner"]["held_reason"] == "GPU maintenance"
    assert not shown["overlay"]["paused"]
    run_command(database, "resume", "planner")
    assert "paused" not in run_command(database, "status").out


def test_pause_keeps_the_reason_of_the_one_before_unless_it_has_its_own(database, run_command):
    pause(run_command, database, "planner", *GPU)
    database.rows("UPDATE pipeline_stages SET held_by = 'kim@ops1' WHERE stage = 'planner'")
    [again] = run_command(database, "pause", "planner").lines
    [said, mend] = again.split("; ")
    assert said == "unchanged: planner is paused by kim@ops1: GPU maintenance"
    assert mend == "./jsl resume planner"
    held = "SELECT held_by, held_reason FROM pipeline_stages WHERE stage = 'planner'"
    assert database.row(held) == ("kim@ops1", "GPU maintenance")
    pause(run_command, database, "planner", "--reason", "still")
    assert database.row(held) == (OPERATOR, "still")


def test_listener_logs_what_the_operator_did(database, api, listener, run_command, tmp_path):
    process = listener(database, api=api)
    wait_until_idle(tmp_path)
    pause(run_command, database, "planner", "--reason", "GPU\nmaintenance")
    said = f"): planner paused by {OPERATOR}: GPU\\nmaintenance"
    assert process.wait_for_line("NOTIFY로 온 메시지 (누구나", count=1).endswith(said)
    run_command(database, "resume", "planner")
    assert process.wait_for_line("NOTIFY로 온 메시지 (누구나", count=2).endswith(
        f"): planner resumed by {OPERATOR}"
    )


@pytest.mark.parametrize(
    "answer", [None, Answer(503, headers={"Retry-After": "1"})], ids=["success", "503"]
)
def test_call_under_way_is_finished_and_does_not_touch_the_pause(
    database, api, listener, run_command, answer
):
    with gate(api, answer=answer) as opened:
        listener(database, api=api, SWEEP_INTERVAL=0.1)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        pause(run_command, database, "vlm_analyze")
        opened.set()
        outcome = "held" if answer else "succeeded"
        database.wait_for(
            "SELECT count(*) = 1 FROM stage_attempts WHERE stage = 'vlm_analyze' AND outcome = %s",
            outcome,
        )
    wait_for_sweeps(database)
    assert paused(database, "vlm_analyze")
    assert len(api.calls(job, "vlm_analyze")) == 1


def test_resume_ends_a_hold_that_nobody_asked_for(database, api, listener, run_command):
    api.on("planner", lambda _: Answer(503, headers={"Retry-After": "3000"}))
    listener(database, api=api)
    job = database.add_job("yolo_detect", "done")
    database.wait_for("SELECT held_until > now() FROM pipeline_stages WHERE stage = 'planner'")
    api.on("planner", None)
    done = run_command(database, "resume", "planner")
    assert done.lines[0].startswith("resumed: planner, which owes 1 call (was held by ")
    assert done.lines[0].endswith(": HTTP 503)")
    wait_for_call(api, job, count=2)


def test_second_pause_has_the_last_word_on_the_reason(database, run_command):
    pause(run_command, database)
    pause(run_command, database, "planner", *GPU)
    assert f"{OPERATOR}: GPU maintenance)" in run_command(database, "resume", "planner").out
    assert database.value(NOT_HELD, "planner")


def test_resume_of_a_stage_that_is_not_held_says_so(database, run_command):
    done = run_command(database, "resume", "planner")
    assert (done.code, done.lines) == (0, ["planner was neither paused nor held"])


def test_stage_that_the_database_does_not_know_gets_one_line(database, run_command):
    database.rows("DELETE FROM pipeline_stages WHERE stage = 'planner'")
    refused = run_command(database, "pause", "planner").refused(1)
    assert refused == (
        "the database does not know planner: run `make trigger` (./jsl install), if this PIPELINE "
        "is the newer one"
    )


def test_several_stages_are_paused_and_resumed_at_once(database, run_command):
    done = run_command(database, "pause", "planner", "overlay", *GPU)
    assert [line.split(";")[0] for line in done.lines] == ["paused: planner", "paused: overlay"]
    assert paused(database, "planner") and paused(database, "overlay")
    assert len(run_command(database, "resume", "planner", "overlay").lines) == 2
    assert database.value(NOT_HELD, "planner") and database.value(NOT_HELD, "overlay")


def test_pause_waits_until_calls_under_way_are_over(database, api, listener, run_command):
    with gate(api) as opened:
        listener(database, api=api)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        given_up = run_command(database, "pause", "vlm_analyze", "--wait", "--timeout", "0")
        refused = given_up.refused(1)
        assert refused.startswith(f"after 0 s there is still under way: vlm_analyze {job} (until ")
        assert refused.endswith("; the pause stays") and paused(database, "vlm_analyze")
        waiting = listener(database, "pause", "vlm_analyze", "planner", "--wait")
        waiting.wait_for_line(f"waiting for vlm_analyze {job} (until ")
        opened.set()
        assert waiting.wait() == 0
    assert waiting.lines[2].startswith("waiting for ")
    assert waiting.lines[-1] == "no call of them is under way"
    assert database.value("SELECT count(*) = 0 FROM stage_leases WHERE stage = 'vlm_analyze'")


def test_pause_waits_for_a_claim_that_is_not_committed_yet(database, run_command):
    """Its listener began it before the pause."""
    job = database.add_job("yolo_detect", "done")
    with closing(database.connect()) as conn:
        conn.autocommit = False
        cursor = conn.cursor()
        cursor.execute("SET application_name = 'job-state-listener run 1/test'")
        cursor.execute(
            "INSERT INTO stage_leases VALUES (%s, 1, 1, 'planner', 'w', now(), now() + '1 h')",
            [job],
        )
        done = run_command(database, "pause", "planner", "--wait", "--timeout", "0")
        conn.rollback()
    said = "after 0 s there is still under way: a claim of a listener; the pause stays"
    assert done.refused(1) == said
    assert run_command(database, "pause", "planner", "--wait").lines[-1] == (
        "no call of planner is under way"
    )


# --- cancel --------------------------------------------------------------------------------


def cancelled(database, job: str) -> tuple[str, str, str]:
    """Stage, operator and reason, as the history has them."""
    [row] = [row for row in database.attempts(job) if row.outcome == "cancelled"]
    return row.stage, row.worker, row.error


def test_cancelled_job_owes_nothing_and_the_reason_is_kept(database, run_command):
    job = database.add_job("planner", "done")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', attempts = 5, last_error = 'x'")
    done = run_command(database, "cancel", job, "--reason", "duplicate of 7")
    assert (done.code, done.lines) == (0, [f"cancelled: job {job}, stage overlay"])
    assert database.owed(job) is None
    assert database.state(job) == ("planner", "done")
    assert cancelled(database, job) == ("overlay", OPERATOR, "duplicate of 7")
    shown = run_command(database, "job", job).lines
    assert shown[1] == "owes: nothing" and shown[-1].endswith("duplicate of 7")


def test_cancelled_job_owes_again_when_its_state_changes(database, run_command):
    job = database.add_job("planner", "done")
    run_command(database, "cancel", job)
    database.move(job, "overlay", "done")
    assert database.owed(job).stage == "vlm_judge"


def test_call_under_way_goes_on_but_is_not_repeated(database, api, listener, run_command):
    with gate(api, answer=Answer(500)) as opened:
        process = listener(database, api=api, SWEEP_INTERVAL=0.1)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        worker = database.owed(job).worker
        done = run_command(database, "cancel", job)
        said = f"{worker} is calling it right now; that call goes on, but only once"
        assert done.lines == [f"cancelled: job {job}, stage vlm_analyze", said]
        opened.set()
        process.wait_for_line("파이프라인 단계 실행 실패")
    wait_for_sweeps(database)
    assert len(api.calls(job)) == 1 and database.owed(job) is None
    assert {row.outcome for row in database.attempts(job)} == {"cancelled", "retry"}
    assert cancelled(database, job)[2] == "cancelled by hand"


def test_call_that_another_transaction_holds_is_left_to_it(database, run_command):
    job = database.add_job("planner", "done")
    with closing(database.connect()) as conn:
        conn.autocommit = False
        conn.cursor().execute("UPDATE jobs SET status = 'running' WHERE job_id = %s", [job])
        refused = run_command(database, "cancel", job).refused(1)
    assert refused == (
        f"job {job}: another transaction holds its call to overlay; nothing was changed: try again"
    )
    assert database.owed(job).stage == "overlay" and database.attempts(job) == []


def test_job_that_owes_nothing_has_nothing_to_cancel(database, run_command):
    job = database.add_job("planner", "running")
    refused = run_command(database, "cancel", job).refused(1)
    assert refused == f"job {job} owes no call: it is at (planner, running)"
