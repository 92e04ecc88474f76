"""Claiming: who gets which call, when, and what the claim knows about its job."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from claims import (
    LEASE_OVER,
    STAGES,
    all_connected,
    claim,
    claim_many,
    connected,
    held,
    result,
    settle,
    wanted,
)
from tcp_proxy import TcpProxy

import calls
import checks
import db
from calls import Wanted


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


@pytest.fixture
def each_database(each_shared_database):
    return each_shared_database.emptied()


# --- who gets it ---------------------------------------------------------------------------


def test_claim_says_what_to_call_and_for_whom(database, conn):
    job = database.add_job("img_gen", "done", "tenant-1")
    row = claim(conn)
    assert (row.job_id, row.tenant_id, row.stage) == (job, "tenant-1", "vlm_analyze")
    assert (row.current_step, row.status) == ("img_gen", "done")
    assert (row.attempt, row.spent, row.owed, row.accepted) == (1, 1, True, False)
    assert row.key == str(job)
    call = database.owed(job)
    assert (call.worker, call.attempts) == ("w", 1)
    assert (call.due_at - call.started_at).total_seconds() == 60
    assert database.value("SELECT %s::timestamptz = %s", row.started_at, call.started_at)


def test_nothing_due_claims_nothing(database, conn):
    database.add_job("img_gen", "queued")
    turn = claim_many(conn, 4)
    assert (turn.claimed, turn.locked) == ([], [])
    assert calls.next_due(conn, STAGES) is None


def test_second_listener_gets_nothing(database, conn, other):
    database.add_job()
    assert claim(conn, "first").call_id
    assert claim(other, "second").call_id is None
    assert claim(conn, "first").call_id is None


def shared_among_listeners(database) -> list:
    """The job ids that four listeners claim at the same time, until nothing is due."""

    def work(name: str, conn) -> list:
        jobs = []
        while rows := claim_many(conn, 3, name).claimed:
            jobs += [row.job_id for row in rows]
        return jobs

    names = ["a", "b", "c", "d"]
    with all_connected(database, len(names)) as conns, ThreadPoolExecutor(4) as pool:
        return [job for jobs in pool.map(work, names, conns) for job in jobs]


def test_listeners_share_the_calls_without_claiming_one_twice(database):
    jobs = {database.add_job() for _ in range(60)}
    claimed = shared_among_listeners(database)
    assert len(claimed) == 60
    assert set(claimed) == jobs


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_listeners_read_what_is_committed_whatever_the_database_prefers(
    server, make_database, level
):
    database = make_database(server)
    database.rows(f"ALTER DATABASE {database.name} SET default_transaction_isolation = '{level}'")
    with connected(database) as conn:
        assert db.execute(conn, "SHOW transaction_isolation").fetchone()[0] == "read committed"
    for _ in range(60):
        database.add_job()
    assert len(shared_among_listeners(database)) == 60


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


def test_stages_take_turns_however_long_one_queue_is(database, caller):
    for _ in range(3):
        database.add_job("img_gen", "done")
    database.add_job("planner", "done")
    database.add_job("overlay", "done")
    listener = caller("http://127.0.0.1:1")
    stages = [listener.claim().stage for _ in range(5)]
    assert stages == ["vlm_analyze", "overlay", "vlm_judge", "vlm_analyze", "vlm_analyze"]


def test_idle_workers_are_shared_by_the_stages_that_have_calls(database, conn):
    for step, count in {"img_gen": 50, "planner": 3, "overlay": 1}.items():
        for _ in range(count):
            database.add_job(step)
    taken = Counter(row.stage for row in claim_many(conn, 9, share=2).claimed)
    assert taken["vlm_judge"] == 1 and taken["overlay"] >= 2 and sum(taken.values()) == 9
    taken = Counter(row.stage for row in claim_many(conn, 9, share=2).claimed)
    assert taken["vlm_analyze"] >= 8 and sum(taken.values()) == 9


def test_stage_that_alone_has_calls_gets_all_idle_workers(database, conn):
    for _ in range(12):
        database.add_job("planner")
    assert len(claim_many(conn, 10, share=2).claimed) == 10
    assert len(claim_many(conn, 10, share=2).claimed) == 2


def test_stage_gets_no_more_than_are_wanted_of_it(database, conn):
    for step in ("img_gen", "img_gen", "planner"):
        database.add_job(step)
    one = [Wanted("vlm_analyze", 60, most=1, share=1), Wanted("overlay", 60, most=4, share=1)]
    turn = calls.run_turn(conn, [], one, 4, "w")
    assert Counter(row.stage for row in turn.claimed) == {"vlm_analyze": 1, "overlay": 1}


WRITTEN = " UNION ALL ".join(
    f"SELECT xmin FROM {table}" for table in ("stage_attempts", "stage_leases", "stage_calls")
)


def test_many_calls_are_settled_and_claimed_in_one_transaction(database, conn):
    jobs = {database.add_job() for _ in range(40)}
    first = claim_many(conn, 20).claimed
    turn = claim_many(conn, 20, results=[result(row) for row in first])
    assert database.value(f"SELECT count(DISTINCT xmin::text) FROM ({WRITTEN}) AS rows") == 1
    assert {row.job_id for row in first + turn.claimed} == jobs
    assert len({(row.started_at, row.call_id) for row in turn.claimed}) == 20
    owed = database.rows("SELECT worker, attempts FROM stage_calls")
    assert owed == [("w", 1)] * 20
    assert database.value("SELECT count(*) FROM stage_leases") == 20


def test_turn_is_one_round_trip(database):
    with TcpProxy(database.environ) as proxy, connected(database, **proxy.settings) as conn:
        for _ in range(8):
            database.add_job()
        rows = claim_many(conn, 4).claimed
        assert settle(conn, *(result(row, "retry", delay=0) for row in rows))
        rows = claim_many(conn, 4).claimed  # the statements are prepared now
        before = len(proxy.requests)
        claim_many(conn, 4, results=[result(row, "retry", delay=0) for row in rows])
        assert len(proxy.requests) == before + 1


def test_call_that_is_not_due_or_given_up_is_left(database, conn):
    later, never = database.add_job(), database.add_job()
    sql = "UPDATE stage_calls SET due_at = %s WHERE job_id = %s"
    database.rows(sql, "infinity", never)
    database.rows(sql.replace("%s", "now() + interval '1 hour'", 1), later)
    assert claim(conn).call_id is None


def test_call_never_tried_is_found_by_a_sweep_although_the_clock_was_set_back(database, conn):
    jobs = [database.add_job() for _ in range(3)]
    settle(conn, result(claim(conn), "retry", delay=7200))
    sql = "UPDATE stage_calls SET due_at = %s WHERE job_id = %s"
    database.rows(sql.replace("%s", "now() + interval '2 hours'", 1), jobs[1])
    database.rows(sql, "infinity", jobs[2])
    assert claim_many(conn, 4).claimed == []
    assert [row.job_id for row in claim_many(conn, 4, sweep=True).claimed] == [jobs[1]]
    assert claim_many(conn, 4, sweep=True).claimed == []


def test_person_may_claim_what_is_not_due_but_not_what_is_under_way(database, conn, other):
    job = database.add_job()
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    assert claim(conn, "person", only=job).job_id == job
    assert claim(other, "another", only=job).call_id is None
    database.rows(LEASE_OVER)
    assert claim(other, "another", only=job).attempt == 2


def test_person_does_not_claim_what_has_a_lease_that_their_claim_cannot_see(database, conn, other):
    """As where the other claim was committed while theirs was under way."""
    job = database.add_job()
    only = (job, database.owed(job).call_id, 0)
    assert claim(conn, "listener").job_id == job
    database.rows("DELETE FROM stage_leases")
    assert calls.run_turn(other, [], wanted(), 1, "person", only=only).claimed == []
    assert claim(other, "person", only=job).attempt == 2  # who knows of it, may


def test_person_does_not_claim_what_is_under_way_under_the_name_of_another_stage(
    database, conn, other
):
    job = database.add_job()
    claim(conn)
    database.rows("UPDATE stage_calls SET stage = 'planner'")  # as an install may do
    assert claim(other, "person", only=job).call_id is None


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


# --- a request of the same job and stage is under way --------------------------------------


def take_by_any_means(conn, job) -> list:
    """The calls that a claim, a sweep and a claim by hand get."""
    found = claim_many(conn, 4, "second").claimed
    found += claim_many(conn, 4, "second", sweep=True).claimed
    return found + claim_many(conn, 4, "second", only=job).claimed


WAYS_BACK = {
    "sent back by hand": [("img_gen", "queued"), ("img_gen", "done")],
    "sent back after running": [("vlm_analyze", "running"), ("img_gen", "done")],
    "sent back through another stage": [("planner", "done"), ("img_gen", "done")],
}


@pytest.mark.parametrize("way", WAYS_BACK)
def test_no_claim_while_a_call_of_the_job_and_stage_is_under_way(each_database, way):
    job = each_database.add_job()
    with connected(each_database) as conn:
        row = claim(conn)
        for state in WAYS_BACK[way]:
            each_database.move(job, *state)
        assert each_database.owed(job).call_id != row.call_id
        assert take_by_any_means(conn, job) == []
        assert settle(conn, result(row))
        assert claim(conn, "second").job_id == job


@pytest.mark.parametrize("way", WAYS_BACK)
def test_no_claim_while_a_call_without_an_answer_may_be_under_way(each_database, way):
    job = each_database.add_job()
    with connected(each_database) as conn:
        settle(conn, result(claim(conn), "unknown", delay=0, after_lease=True))
        assert take_by_any_means(conn, job) == []
        for state in WAYS_BACK[way]:
            each_database.move(job, *state)
        assert take_by_any_means(conn, job) == []
        each_database.rows(LEASE_OVER)
        assert claim(conn, "second").job_id == job


def test_call_without_an_answer_is_not_made_due_by_a_retry_before_its_lease_is_over(
    database, conn, run_command
):
    job = database.add_job()
    settle(conn, result(claim(conn), "unknown", after_lease=True))
    assert database.owed(job).given_up
    assert run_command(database, "retry", job).code == 0
    assert take_by_any_means(conn, job) == []
    database.rows(LEASE_OVER)
    assert claim(conn).job_id == job


def test_other_stage_of_the_same_job_is_called_meanwhile(database, conn):
    """A stage that answers after its commit: the next one need not wait for the answer."""
    job = database.add_job()
    claim(conn)
    database.move(job, "vlm_analyze", "done")
    assert claim(conn).stage == "yolo_detect"


# --- the lease -----------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [calls.CLAIM, calls.CLAIM_IN_ORDER, calls.CLAIM_BY_HAND])
def test_rows_of_a_claim_are_what_claimed_says(conn, claim):
    params = calls.as_arrays(wanted()) | {"free": 1, "worker": "w", "sweep": False}
    params |= {"only": None, "only_call": None, "only_after": None}
    found = db.execute(conn, claim.sql, params)
    names = [column.name for column in found.description]
    assert names == ["locked", "asked_at", *calls.Claimed._fields]


def test_call_is_taken_over_once_its_lease_has_run_out(database, conn, other):
    job = database.add_job()
    first = claim(conn, "first")
    database.rows(LEASE_OVER)
    second = claim(other, "second")
    assert (second.job_id, second.call_id) == (job, first.call_id)
    assert (second.attempt, second.spent, second.accepted) == (2, 2, False)
    assert second.taken_over and len(calls.reap(other)) == 1
    (lost,) = database.attempts(job)
    assert (lost.outcome, lost.worker, lost.attempt) == ("lost", "first", 1)


def test_call_that_was_given_back_is_not_recorded_as_lost(database, conn):
    job = database.add_job()
    settle(conn, result(claim(conn), "retry", delay=0))
    assert claim(conn).attempt == 2
    assert [attempt.outcome for attempt in database.attempts(job)] == ["retry"]


def test_call_that_was_accepted_before_says_so(database, conn, stage):
    database.add_job()
    row = claim(conn)
    stage.cursor().execute("SELECT FROM stage_calls FOR UPDATE")
    assert not settle(conn, result(row))  # the worker that would try again dies here
    stage.rollback()
    database.rows(LEASE_OVER)
    again = claim(conn, "second")
    assert (again.attempt, again.accepted) == (2, True)


def test_attempts_that_cost_nothing_are_not_spent(database, conn):
    database.add_job()
    settle(conn, held(claim(conn)))
    settle(conn, result(claim(conn, only=database.value("SELECT job_id FROM jobs")),
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


def test_job_that_moves_between_two_states_of_one_stage_during_the_claim_is_called(database, conn):
    database.rows("UPDATE pipeline_stages SET stage = 'vlm_analyze' WHERE current_step = 'planner'")
    job = database.add_job()
    row = claim(conn)
    # What the claim sees: its snapshot has the job in one state, its newest call is of the other.
    database.move(job, "planner", "done")
    database.rows("UPDATE stage_calls SET worker = 'w', attempts = 1")
    moved = database.owed(job)
    seen = row._replace(call_id=moved.call_id, current_step="planner", owed=False)
    assert checks.is_owed(conn, seen, "w")
    database.move(job, "planner", "running")
    assert not checks.is_owed(conn, seen, "w")
    database.rows("UPDATE pipeline_stages SET stage = 'overlay' WHERE current_step = 'planner'")
