"""Jobs that no call and no stage moves on: stalled_jobs(), as `jobs --stalled` shows it."""

import json
import re

import pytest
from claims import LEASE_OVER, STAGES, claim, connected, result, settle

import calls

LONG_AGO = "now() - interval '11 minutes'"  # STAGE_TIMEOUT is 10


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def stalled(run_command, database, *args: str) -> list[tuple[str, str]]:
    """Job and reason of each."""
    lines = run_command(database, "jobs", "--stalled", *args).lines
    if lines == ["no job matches"]:
        return []
    assert re.fullmatch("job +state +since +stalled +tenant", lines[0])
    assert lines[-1] == "since: when anything last happened to the job"
    return [(re.split(r" {2,}", line)[0], re.split(r" {2,}", line)[3]) for line in lines[1:-1]]


def test_job_accepted_but_not_moved_on_is_stalled_after_the_timeout(database, run_command):
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        assert settle(conn, result(claim(conn)))
    assert stalled(run_command, database) == []
    database.rows(f"UPDATE jobs SET updated_at = {LONG_AGO}")
    assert stalled(run_command, database) == []
    database.rows(f"UPDATE stage_attempts SET finished_at = {LONG_AGO}")
    reason = "accepted by the stage, but the job has not changed"
    assert stalled(run_command, database) == [(job, reason)]
    [row] = json.loads(run_command(database, "jobs", "--stalled", "--json").out)["jobs"]
    assert (row["stage"], row["reason"], row["tenant_id"]) == ("overlay", reason, "tenant")
    assert row["since"]


def test_accepted_call_is_known_though_an_attempt_before_has_ended_later(database, run_command):
    """Its listener was lost, or came back late."""
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        claim(conn)
        database.rows(LEASE_OVER)
        assert settle(conn, result(claim(conn)))
        calls.reap(conn)
    assert [attempt.outcome for attempt in database.attempts(job)] == ["lost", "succeeded"]
    database.rows(f"UPDATE jobs SET updated_at = {LONG_AGO}")
    database.rows("UPDATE stage_attempts SET finished_at = finished_at - interval '11 minutes'")
    assert stalled(run_command, database) == [
        (job, "accepted by the stage, but the job has not changed")
    ]
    done = run_command(database, "backfill", "--apply")
    assert "made before: 1 accepted" in done.out and "0 calls recorded" in done.out


def test_accepted_call_is_known_though_the_stage_before_has_answered_later(database, run_command):
    """A stage commits `done` before it answers."""
    job = database.add_job("yolo_detect", "done")
    with connected(database) as conn:
        before = claim(conn)
        database.move(job, "planner", "done")
        assert settle(conn, result(claim(conn)))
        settle(conn, result(before))
    database.rows(f"UPDATE jobs SET updated_at = {LONG_AGO}")
    database.rows("UPDATE stage_attempts SET finished_at = finished_at - interval '11 minutes'")
    assert stalled(run_command, database) == [
        (job, "accepted by the stage, but the job has not changed")
    ]
    assert "0 calls recorded" in run_command(database, "backfill", "--apply").out


def test_job_left_running_is_stalled_once_nobody_calls_it(database, run_command):
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        claim(conn)
        database.move(job, "overlay", "running")
        database.rows(f"UPDATE jobs SET updated_at = {LONG_AGO}")
        assert stalled(run_command, database) == []
        database.rows(LEASE_OVER)
        calls.reap(conn)
    database.rows(f"UPDATE stage_attempts SET finished_at = {LONG_AGO}")
    assert stalled(run_command, database) == [(job, "running for longer than the timeout")]


def test_job_whose_call_was_never_recorded_is_stalled(database, run_command):
    database.rows("SET session_replication_role = replica")
    job = database.add_job("planner", "done")
    database.rows(f"UPDATE jobs SET updated_at = {LONG_AGO}; RESET session_replication_role")
    reason = "its call was never recorded: ./jsl backfill"
    assert stalled(run_command, database) == [(job, reason)]


def test_job_that_owes_or_whose_call_was_cancelled_is_not_stalled(database, run_command):
    database.add_job("planner", "done")
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    cancelled = database.add_job("planner", "done")
    assert run_command(database, "cancel", cancelled).code == 0
    database.rows(f"UPDATE jobs SET updated_at = {LONG_AGO}")
    database.rows(f"UPDATE stage_attempts SET finished_at = {LONG_AGO}")
    assert stalled(run_command, database) == []


@pytest.mark.parametrize("outcome", ["retry", "failed", "unknown", "lost"])
def test_job_whose_call_was_cancelled_under_way_is_not_stalled(database, run_command, outcome):
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        row = claim(conn)
        assert run_command(database, "cancel", job).code == 0
        if outcome == "lost":
            database.rows(LEASE_OVER)
            calls.reap(conn)
        else:
            settle(conn, result(row, outcome))
    database.rows(f"DELETE FROM stage_leases; UPDATE jobs SET updated_at = {LONG_AGO}")
    later = "CASE outcome WHEN 'cancelled' THEN '1' ELSE '0' END::interval"
    database.rows(f"UPDATE stage_attempts SET finished_at = {LONG_AGO} - {later}")
    assert stalled(run_command, database) == []
    left, last = run_command(database, "backfill", "--apply").lines
    assert left.startswith("left alone, as their call was cancelled: 1; by whom: SELECT ")
    assert last == "0 calls recorded"


def test_stalled_jobs_are_filtered_and_the_oldest_comes_first(database, run_command):
    running = {stage: database.add_job(stage, "running") for stage in STAGES[:3]}
    for hours, job in enumerate(running.values(), 1):
        ago = "UPDATE jobs SET updated_at = now() - %s::interval WHERE job_id = %s"
        database.rows(ago, f"{hours} hours", job)
    found = [job for job, _ in stalled(run_command, database)]
    assert found == list(running.values())[::-1]
    assert stalled(run_command, database, "--stage", "planner")[0][0] == running["planner"]
    assert len(stalled(run_command, database, "--since", "150m")) == 2
    assert stalled(run_command, database, "--tenant", "zoo") == []
