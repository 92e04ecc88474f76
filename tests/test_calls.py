"""Claiming: who gets which call, when, and what the claim knows about its job."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import settling
from claims import LEASE_OVER, claim, connected, held, result

import calls
import db
import upkeep
from trigger import Trigger


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


@pytest.fixture
def conn(database):
    with connected(database) as conn:
        yield conn


@pytest.fixture
def other(database):
    """A second worker's connection."""
    with connected(database) as conn:
        yield conn


@pytest.fixture
def stage(database):
    """The stage's own connection: what it does is not committed until it says so."""
    with closing(database.connect()) as conn:
        conn.autocommit = False
        yield conn


# --- who gets it ---------------------------------------------------------------------------


def test_claim_says_what_to_call_and_for_whom(database, conn):
    job = database.add_job("img_gen", "done", "tenant-1")
    row = claim(conn)
    assert (row.job_id, row.tenant_id, row.stage) == (job, "tenant-1", "vlm_analyze")
    assert (row.current_step, row.status) == ("img_gen", "done")
    assert (row.attempt, row.spent, row.owed, row.accepted) == (1, 1, True, False)
    call = database.owed(job)
    assert (call.worker, call.started_at, call.attempts) == ("w", row.started_at, 1)
    assert (call.due_at - call.started_at).total_seconds() == 60


def test_nothing_due_gives_an_empty_row(database, conn):
    database.add_job("img_gen", "queued")
    row = claim(conn)
    assert (row.call_id, row.job_id, row.unsettled) == (None, None, False)
    assert row.next_due is None


def test_second_worker_gets_nothing(database, conn, other):
    database.add_job()
    assert claim(conn, "first").call_id
    assert claim(other, "second").call_id is None
    assert claim(conn, "first").call_id is None


def shared_among_workers(database) -> list:
    """The job ids that four workers claim at the same time, until nothing is due."""

    def work(name: str) -> list:
        jobs = []
        with connected(database) as conn:
            while (row := claim(conn, name)).call_id:
                jobs.append(row.job_id)
        return jobs

    with ThreadPoolExecutor(4) as pool:
        return [job for jobs in pool.map(work, ["a", "b", "c", "d"]) for job in jobs]


def test_many_workers_share_the_calls_without_doing_one_twice(database):
    jobs = {database.add_job() for _ in range(60)}
    claimed = shared_among_workers(database)
    assert len(claimed) == 60
    assert set(claimed) == jobs


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_workers_read_what_is_committed_whatever_the_database_prefers(server, make_database, level):
    database = make_database(server)
    database.rows(f"ALTER DATABASE {database.name} SET default_transaction_isolation = '{level}'")
    with connected(database) as conn:
        assert db.execute(conn, "SHOW transaction_isolation").fetchone()[0] == "read committed"
    for _ in range(60):
        database.add_job()
    assert len(shared_among_workers(database)) == 60


def test_first_due_is_first_claimed(database, conn):
    jobs = [database.add_job() for _ in range(3)]
    for job, minutes in zip(jobs, (2, 3, 1), strict=True):
        sql = "UPDATE stage_calls SET due_at = now() - make_interval(mins => %s) WHERE job_id = %s"
        database.rows(sql, minutes, job)
    assert [claim(conn).job_id for _ in range(3)] == [jobs[1], jobs[0], jobs[2]]


def test_stages_are_tried_in_the_order_given_and_no_others(database, conn):
    jobs = {stage: database.add_job(stage, "done") for stage in ("img_gen", "planner", "overlay")}
    wanted = ["vlm_judge", "vlm_analyze"]
    assert claim(conn, stages=wanted).job_id == jobs["overlay"]
    assert claim(conn, stages=wanted).job_id == jobs["img_gen"]
    assert claim(conn, stages=wanted).call_id is None
    assert claim(conn, stages=["overlay"]).job_id == jobs["planner"]


def test_stages_take_turns_however_long_one_queue_is(database, conn):
    for _ in range(3):
        database.add_job("img_gen", "done")
    database.add_job("planner", "done")
    database.add_job("overlay", "done")
    trigger = Trigger(database.settings(), "w")
    stages = [trigger.next(conn).stage for _ in range(5)]
    assert stages == ["vlm_analyze", "overlay", "vlm_judge", "vlm_analyze", "vlm_analyze"]


def test_call_that_is_not_due_or_given_up_is_left(database, conn):
    later, never = database.add_job(), database.add_job()
    sql = "UPDATE stage_calls SET due_at = %s WHERE job_id = %s"
    database.rows(sql, "infinity", never)
    database.rows(sql.replace("%s", "now() + interval '1 hour'", 1), later)
    assert claim(conn).call_id is None


def test_person_may_claim_what_is_not_due_but_not_what_a_worker_is_on(database, conn, other):
    job = database.add_job()
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    assert claim(conn, "person", only=job).job_id == job
    assert claim(other, "another", only=job).call_id is None
    database.rows(LEASE_OVER)
    assert claim(other, "another", only=job).attempt == 2


# --- while the stage works -----------------------------------------------------------------


def test_call_whose_row_the_stage_holds_is_passed_by(database, conn, stage):
    job, next_job = database.add_job(), database.add_job()
    stage.cursor().execute("UPDATE jobs SET status = 'running' WHERE job_id = %s", [job])
    assert claim(conn).job_id == next_job
    assert claim(conn).call_id is None
    stage.rollback()
    assert claim(conn).job_id == job


def test_stage_that_works_longer_than_its_lease_is_not_called_again(database, conn, other, stage):
    job = database.add_job()
    claim(conn)
    database.rows(LEASE_OVER)
    stage.cursor().execute("UPDATE jobs SET status = 'running' WHERE job_id = %s", [job])
    assert claim(other, "second").call_id is None
    assert claim(other, "second", only=job).call_id is None
    stage.commit()
    assert claim(other, "second").call_id is None
    assert database.attempts(job) == []


def test_claim_waits_for_no_lock_on_jobs(database, conn, stage):
    job = database.add_job()
    stage.cursor().execute("SELECT FROM jobs FOR UPDATE")
    row = claim(conn)
    assert (row.job_id, row.owed) == (job, True)


def test_claim_leaves_no_transaction_open(database, conn):
    database.add_job()
    claim(conn)
    pid = conn.info.backend_pid
    assert database.value("SELECT state FROM pg_stat_activity WHERE pid = %s", pid) == "idle"
    assert database.value("SELECT count(*) FROM pg_locks WHERE pid = %s", pid) == 0


# --- the lease -----------------------------------------------------------------------------


def test_call_is_taken_over_once_its_lease_has_run_out(database, conn, other):
    job = database.add_job()
    first = claim(conn, "first")
    database.rows(LEASE_OVER)
    second = claim(other, "second")
    assert (second.job_id, second.call_id) == (job, first.call_id)
    assert (second.attempt, second.spent, second.accepted) == (2, 2, False)
    assert second.taken_over and upkeep.reap(other) == 1
    (lost,) = database.attempts(job)
    assert (lost.outcome, lost.worker, lost.attempt) == ("lost", "first", 1)
    assert lost.started_at == first.started_at


def test_call_that_was_given_back_is_not_recorded_as_lost(database, conn):
    job = database.add_job()
    settling.settle(conn, result(claim(conn), "retry", delay=0))
    assert claim(conn).attempt == 2
    assert [attempt.outcome for attempt in database.attempts(job)] == ["retry"]


def test_call_that_was_accepted_before_says_so(database, conn, stage):
    database.add_job()
    row = claim(conn)
    stage.cursor().execute("SELECT FROM stage_calls FOR UPDATE")
    assert not settling.settle(conn, result(row))  # the worker that would try again dies here
    stage.rollback()
    database.rows(LEASE_OVER)
    again = claim(conn, "second")
    assert (again.attempt, again.accepted) == (2, True)


def test_attempts_that_cost_nothing_are_not_spent(database, conn):
    database.add_job()
    settling.settle(conn, held(claim(conn)))
    settling.settle(conn, result(claim(conn, only=database.value("SELECT job_id FROM jobs")),
                              "retry", delay=0))  # fmt: skip
    database.rows("UPDATE pipeline_stages SET held_until = now()")
    row = claim(conn)
    assert (row.attempt, row.spent) == (3, 2)


# --- the state of the job, looked up in the claim itself -----------------------------------


def test_claim_sees_that_the_job_has_moved_on_unnoticed(database, conn):
    job = database.add_job()
    database.rows("SET session_replication_role = replica")
    database.move(job, "vlm_analyze", "running")
    row = claim(conn)
    assert (row.job_id, row.owed, row.job_found) == (job, False, True)
    assert (row.job_step, row.job_status) == ("vlm_analyze", "running")


@pytest.mark.parametrize(("step", "status"), [(None, "done"), ("img_gen", None), (None, None)])
def test_claim_of_a_job_without_a_state_owes_nothing(database, conn, step, status):
    job = database.add_job()
    database.rows("SET session_replication_role = replica")
    database.move(job, step, status)
    assert claim(conn).owed is False


def test_claim_sees_that_the_job_was_deleted(database, conn):
    job = database.add_job()
    database.rows("DELETE FROM jobs")
    row = claim(conn)
    assert (row.job_id, row.owed, row.job_found, row.tenant_id) == (job, False, False, None)


def test_claim_hands_on_the_tenant_of_now(database, conn):
    database.add_job(tenant="before")
    database.rows("UPDATE jobs SET tenant_id = 'after'")
    assert claim(conn).tenant_id == "after"


def test_job_that_moves_between_two_states_of_one_stage_during_the_claim_is_called(
    database, conn, caller
):
    database.rows("UPDATE pipeline_stages SET stage = 'vlm_analyze' WHERE current_step = 'planner'")
    job, worker = database.add_job(), caller("http://127.0.0.1:1", name="w")
    row = claim(conn)
    # As the claim's snapshot saw it: the job in one state, its newest call of the other.
    database.move(job, "planner", "done")
    database.rows("UPDATE stage_calls SET worker = 'w', attempts = 1")
    moved = database.owed(job)
    seen = row._replace(call_id=moved.call_id, current_step="planner", owed=False)
    assert calls.is_owed(conn, seen, worker.trigger.worker)
    database.move(job, "planner", "running")
    assert not calls.is_owed(conn, seen, worker.trigger.worker)
    database.rows("UPDATE pipeline_stages SET stage = 'overlay' WHERE current_step = 'planner'")
