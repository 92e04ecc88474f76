"""`install --no-notify`: the debt is written, nothing is notified, and listeners poll."""

import pytest
from claims import connected
from subscription import Subscription
from waiting import wait_until_idle

from ops.install import apply
from ops.routes import announced

OBJECTS = "SELECT oid, tgname FROM pg_trigger WHERE tgrelid = 'jobs'::regclass ORDER BY tgname"


@pytest.fixture
def run_command(run_here):
    return run_here


def test_silent_trigger_writes_the_debt_and_notifies_nothing(database, run_command):
    done = run_command(database, "install", "--no-notify")
    assert done.code == 0 and any("nothing is announced" in line for line in done.lines)
    with Subscription(database) as subscription:
        born, moved = database.add_job("overlay"), database.add_job("img_gen", "queued")
        database.move(moved, "img_gen", "done")
        database.move(born, "overlay", "running")
        assert subscription.messages() == []
    assert database.owed(moved).stage == "vlm_analyze" and database.owed(born) is None


def test_installing_again_keeps_the_silence_until_told_otherwise(database, run_command):
    run_command(database, "install", "--no-notify")
    before = database.rows(OBJECTS)
    run_command(database, "install")
    assert database.rows(OBJECTS) == before
    with connected(database) as conn:
        assert announced(conn) == "nothing"
        apply(conn, notify=True)
        assert announced(conn) == "all"


def test_listener_polls_and_still_hears_the_operator(
    database, api, listener, run_command, tmp_path
):
    run_command(database, "install", "--no-notify")
    process = listener(database, api=api, SWEEP_INTERVAL=600, POLL_INTERVAL=0.1)
    process.wait_for_line("(install --no-notify): LISTEN 대신 0.1초마다 확인")
    wait_until_idle(tmp_path)
    database.add_job("overlay")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    run_command(database, "pause", "planner")
    process.wait_for_line("): planner paused by")


def test_verify_says_that_nothing_is_announced(database, api, run_command):
    run_command(database, "install", "--no-notify")
    done = run_command(database, "verify", api=api)
    assert done.code == 0
    assert any("without NOTIFY: listeners look every POLL_INTERVAL" in line for line in done.lines)
