"""`install --notify-owed`: NOTIFY only where a listener has something to do."""

import asynchronous
import pytest
from claims import connected
from conftest import ROOT
from subscription import Subscription
from variants import PIPELINE, TABLE, Variants
from waiting import wait_until_idle

import db
from demo.stage_server import Answer
from ops.install import apply
from ops.routes import announced

TRIGGERS = "SELECT oid, tgname FROM pg_trigger WHERE tgrelid = 'jobs'::regclass ORDER BY tgname"


@pytest.fixture
def run_command(run_here):
    return run_here


def test_only_a_change_that_owes_a_call_is_announced(database, run_command):
    done = run_command(database, "install", "--notify-owed")
    assert done.code == 0 and any("only changes that owe a call" in line for line in done.lines)
    with Subscription(database) as changes:
        job = database.add_job("img_gen", "queued")
        database.move(job, "img_gen", "done")
        [said] = changes.messages()
        assert (said["job_id"], said["current_step"], said["status"]) == (job, "img_gen", "done")
        assert database.owed(job).stage == "vlm_analyze"
        database.move(job, "vlm_analyze", "running")
        database.move(job, "vlm_analyze", "failed")
        assert changes.messages() == [] and database.owed(job) is None
        database.move(job, "vlm_analyze", "done")
        database.move(job, "yolo_detect", "done")  # from one state that owes a call to another
        assert [said["current_step"] for said in changes.messages()] == [
            "vlm_analyze",
            "yolo_detect",
        ]


def test_choice_stays_until_another_one_is_made(database, run_command):
    run_command(database, "install", "--notify-owed")
    before = database.rows(TRIGGERS)
    run_command(database, "install")
    assert database.rows(TRIGGERS) == before
    with connected(database) as conn:
        assert announced(conn) == "owed"
        apply(conn, insert=False)
        assert announced(conn) == "owed"
        apply(conn, notify=False)
        assert announced(conn) == "nothing"
        apply(conn, notify="owed")
        apply(conn, notify=True)
        assert announced(conn) == "all"
    with Subscription(database) as changes:
        database.move(database.add_job("img_gen", "queued"), "img_gen", "running")
        assert len(changes.messages()) == 1


def test_verify_and_status_say_so(database, api, run_command):
    run_command(database, "install", "--notify-owed")
    done = run_command(database, "verify", api=api)
    assert done.code == 0
    assert any(line.endswith(", NOTIFY only where a call is owed") for line in done.lines)
    said = "{} (install --{})"
    owed = said.format("only changes that owe a call are announced", "notify-owed")
    assert owed in run_command(database, "status").lines
    run_command(database, "install", "--no-notify")
    nothing = said.format("nothing is announced", "no-notify")
    assert f"{nothing}: listeners look every POLL_INTERVAL" in run_command(database, "status").lines
    run_command(database, "install", "--notify")
    assert not any("announced" in line for line in run_command(database, "status").lines)


def test_two_choices_at_once_are_refused(database, run_command):
    for other in ["--notify", "--no-notify"]:
        refused = run_command(database, "install", "--notify-owed", other).refused(2)
        assert "--notify, --no-notify and --notify-owed exclude each other" in refused


def test_listener_makes_all_calls_without_looking_by_itself(
    database, api, listener, run_command, tmp_path
):
    run_command(database, "install", "--notify-owed")
    process = listener(database, api=api, SWEEP_INTERVAL=600, POLL_INTERVAL=600)
    process.wait_for_line("LISTEN 'job_state_changed' 시작")
    wait_until_idle(tmp_path)
    database.move(database.add_job("img_gen", "queued"), "img_gen", "done")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")


def test_join_is_looked_at(database, use_pipeline):
    use_pipeline(PIPELINE)
    database.rows(TABLE)
    variants = Variants(database)
    with connected(database) as conn:
        apply(conn, notify="owed")
        [variant] = variants.add(database.add_job("img_gen", "queued"))
        with Subscription(database, "job_variant_state_changed") as changes:
            with Subscription(database, db.JOIN_CHANNEL) as looks:
                variants.move(variant, "iou_eval", "running")
                variants.move(variant, "iou_eval", "done")
                assert looks.payloads() == [""]
            assert changes.payloads() == []


def test_end_of_an_asynchronous_call_is_noticed(database, use_pipeline, api, listener):
    use_pipeline(asynchronous.PIPELINE)
    database.rows(TABLE)
    with connected(database) as conn:
        apply(conn, notify="owed")
    api.on("/planner", lambda request: Answer(202))
    job = database.add_job("vlm_analyze", "done")
    given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "asynchronous"}
    listener(database, api=api, SWEEP_INTERVAL=3600, POLL_INTERVAL=3600, **given)
    database.wait_for("SELECT EXISTS (SELECT FROM stage_leases WHERE working)")
    database.move(job, "planner", "running")
    database.move(job, "planner", "failed")  # owes no call
    database.wait_for("SELECT NOT EXISTS (SELECT FROM stage_leases)")
