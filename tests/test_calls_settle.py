"""Settling: what each outcome leaves behind, who may settle, and doing it twice."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import psycopg2
import pytest
from caller import logged
from claims import LEASE_OVER, claim, claim_many, held, make_due, result, settle, wanted

import calls
import db
import one_by_one
from ops import Problem
from settling import Unwritten


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def wait_of(database, job) -> float:
    """Seconds between the last claim of a job's call and when it is due again."""
    return database.value(
        "SELECT extract(epoch FROM c.due_at - a.finished_at)::float8"
        " FROM stage_calls AS c JOIN stage_attempts AS a USING (job_id) WHERE job_id = %s"
        " ORDER BY a.attempt DESC LIMIT 1",
        job,
    )


# --- what an outcome leaves ----------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["succeeded", "skipped"])
def test_paid_call_is_gone_and_remembered(database, conn, outcome):
    job = database.add_job()
    row = claim(conn)
    assert settle(conn, result(row, outcome, http_status=202))
    assert database.owed(job) is None
    (attempt,) = database.attempts(job)
    assert (attempt.outcome, attempt.http_status, attempt.error) == (outcome, 202, None)
    assert (attempt.call_id, attempt.attempt, attempt.stage) == (row.call_id, 1, "vlm_analyze")
    assert attempt.worker == "w"
    assert attempt.finished_at >= attempt.started_at


def test_retry_is_due_after_its_delay(database, conn):
    job = database.add_job()
    assert settle(conn, result(claim(conn), "retry", delay=7.5, error="HTTP 500"))
    call = database.owed(job)
    assert (call.worker, call.started_at, call.last_error) == (None, None, "HTTP 500")
    assert (call.attempts, call.free_attempts) == (1, 0)
    assert wait_of(database, job) == 7.5
    assert claim(conn).call_id is None
    assert database.attempts(job)[0].error == "HTTP 500"


@pytest.mark.parametrize(("delay", "wait"), [(5.0, 60.0), (100.0, 100.0)])
def test_unknown_result_is_not_repeated_before_the_lease_has_run_out(database, conn, delay, wait):
    job = database.add_job()
    row = claim(conn, lease=60)
    assert settle(conn, result(row, "unknown", delay=delay, after_lease=True))
    since = database.owed(job).due_at - database.attempts(job)[0].started_at
    assert wait <= since.total_seconds() < wait + 60
    assert database.owed(job).worker is None


def test_given_up_call_stays_for_ever(database, conn):
    job = database.add_job()
    assert settle(conn, result(claim(conn), "failed", http_status=400, error="HTTP 400"))
    call = database.owed(job)
    assert (call.given_up, call.last_error) == (True, "HTTP 400")
    assert claim(conn).call_id is None


def test_given_up_call_is_over_when_its_job_moves_on(database, conn):
    job = database.add_job()
    settle(conn, result(claim(conn), "failed"))
    database.move(job, "img_gen", "queued")
    assert database.owed(job) is None


def test_retry_by_a_person_starts_afresh(database, conn):
    job = database.add_job()
    for _ in range(3):
        database.rows("UPDATE stage_calls SET due_at = now()")
        settle(conn, result(claim(conn), "failed"))
    assert [row.job_id for row in make_due(conn, job)] == [job]
    row = claim(conn)
    assert (row.attempt, row.spent) == (4, 1)
    assert len(database.attempts(job)) == 3


def test_error_of_any_length_is_cut(database, conn):
    job = database.add_job()
    error = "한글'\\ %s\n" * 20_000
    assert settle(conn, result(claim(conn), "retry", delay=0, error=error))
    assert database.owed(job).last_error == error[:2000]
    assert database.attempts(job)[0].error == error[:2000]


# --- settle and claim in one ---------------------------------------------------------------


def test_result_is_written_although_nothing_is_due(database, conn):
    job = database.add_job()
    row = claim(conn, settled=result(claim(conn)))
    assert (row.call_id, row.locked) == (None, [])
    assert database.owed(job) is None


# --- the fence -----------------------------------------------------------------------------

OUTCOMES = {
    "succeeded": {},
    "skipped": {},
    "retry": {"delay": 0.0},
    "unknown": {"delay": 0.0, "after_lease": True},
    "failed": {},
    "held": {"delay": 0.0, "free": True, "hold": True},
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_listener_that_comes_back_late_leaves_the_call_alone(database, conn, outcome):
    job = database.add_job()
    late = claim(conn, "late")
    database.rows(LEASE_OVER)
    claim(conn, "second")
    calls.reap(conn)
    call = database.owed(job)
    assert settle(conn, result(late, outcome, "late", **OUTCOMES[outcome]))
    assert database.owed(job) == call
    assert [attempt.outcome for attempt in database.attempts(job)] == ["lost", outcome]


def test_call_that_was_accepted_late_says_so_to_the_next_claim(database, conn):
    database.add_job()
    late = claim(conn, "late")
    database.rows(LEASE_OVER)
    second = claim(conn, "second")
    assert second.accepted is False
    settle(conn, result(late, "succeeded", "late"))
    settle(conn, result(second, "retry", "second", delay=0.0))
    assert claim(conn).accepted is True


def test_result_of_an_earlier_arrival_does_not_settle_the_next(database, conn):
    job = database.add_job()
    late = claim(conn)
    database.move(job, "img_gen", "queued")
    database.move(job, "img_gen", "done")
    call = database.owed(job)
    assert settle(conn, result(late, "failed"))
    assert database.owed(job) == call
    claim(conn)
    call = database.owed(job)
    assert settle(conn, result(late))
    assert database.owed(job) == call


def test_result_of_another_listener_does_not_settle(database, conn):
    job = database.add_job()
    row = claim(conn, "one")
    call = database.owed(job)
    assert settle(conn, result(row, worker="another"))
    assert database.owed(job) == call


# --- twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_settling_twice_is_as_good_as_once(database, conn, outcome):
    job = database.add_job()
    settled = result(claim(conn), outcome, **OUTCOMES[outcome])
    assert settle(conn, settled)
    once = database.owed(job), database.attempts(job)
    assert settle(conn, settled)
    assert claim(conn, stages=["planner"], settled=settled).locked == []
    assert (database.owed(job), database.attempts(job)) == once


def test_settling_again_leaves_the_next_attempt_alone(database, conn):
    job = database.add_job()
    settled = result(claim(conn), "retry", delay=0.0)
    settle(conn, settled)
    claim(conn)
    call = database.owed(job)
    assert settle(conn, settled)
    assert database.owed(job) == call


# --- while the stage still holds the row ---------------------------------------------------


def test_answer_before_the_commit_is_settled_after_it(database, conn, stage):
    job = database.add_job()
    settled = result(claim(conn))
    stage.cursor().execute("UPDATE jobs SET current_step = 'vlm_analyze' WHERE job_id = %s", [job])
    assert settle(conn, settled) is False
    assert [attempt.outcome for attempt in database.attempts(job)] == ["succeeded"]
    assert settle(conn, settled) is False
    stage.commit()
    assert settle(conn, settled) is True
    assert database.owed(job).stage == "yolo_detect"
    assert len(database.attempts(job)) == 1


def test_answer_before_a_rollback_is_settled_after_it(database, conn, stage):
    job = database.add_job()
    settled = result(claim(conn), "retry", delay=0.0, error="HTTP 500")
    stage.cursor().execute("UPDATE jobs SET status = 'running' WHERE job_id = %s", [job])
    assert claim(conn, settled=settled).locked == [settled.call_id]
    stage.rollback()
    assert settle(conn, settled) is True
    assert claim(conn).attempt == 2


# --- what the database refuses -------------------------------------------------------------

REFUSED = {
    "an outcome that the history does not know": {"outcome": "never heard of"},
    "a delay that ends after the end of time": {"outcome": "retry", "delay": 1e13},
}


@pytest.mark.parametrize("why", REFUSED)
def test_result_that_the_database_refuses_costs_only_itself(database, conn, why):
    for _ in range(12):
        database.add_job()
    rows = claim_many(conn, 10).claimed
    results = [result(row) for row in rows]
    results[4] = replace(results[4], **REFUSED[why])
    with pytest.raises(psycopg2.DatabaseError):
        settle(conn, *results)
    assert database.rows("SELECT 1 FROM stage_attempts") == []
    turn = one_by_one.run_turn_in_parts(conn, results, wanted(), 10, "w")
    assert turn.locked == [] and len(turn.claimed) == 1
    assert len(claim_many(conn, 10).claimed) == 1
    for number, row in enumerate(rows):
        if number != 4:
            assert database.owed(row.job_id) is None
            assert [a.outcome for a in database.attempts(row.job_id)] == ["succeeded"]
    assert database.value("SELECT count(*) FROM stage_leases") == 2


def test_result_that_cannot_be_recorded_gives_its_call_up_and_says_why(database, conn):
    job = database.add_job()
    settled = result(claim(conn), "never heard of", error="HTTP 418")
    [given_up] = one_by_one.run_turn_in_parts(conn, [settled], wanted(), 1, "w").given_up
    call = database.owed(job)
    assert call.given_up and call.worker is None
    assert call.last_error.startswith("its result (never heard of) cannot be recorded:")
    assert (given_up.outcome, given_up.job_id) == ("failed", job)


def test_listener_that_must_end_tells_of_a_result_that_cannot_be_recorded(database, conn):
    job, sent = database.add_job(), []
    alerts = SimpleNamespace(send=lambda event, _text, **about: sent.append((event, about["job"])))
    last = Unwritten(alerts)
    last.results.append(result(claim(conn), "never heard of", error="HTTP 418"))
    last.settle_last(conn, "w", Problem("the routes differ"), True)
    assert last.results == [] and sent == [("given_up", job)]


def test_result_that_cannot_be_recorded_of_a_call_that_is_owed_no_more_is_no_failure(
    database, conn
):
    job = database.add_job()
    settled = result(claim(conn), "never heard of")
    database.move(job, "vlm_analyze", "running")
    assert one_by_one.run_turn_in_parts(conn, [settled], wanted(), 1, "w").given_up == []


@pytest.mark.parametrize(("outcome", "owes"), [("succeeded", False), ("failed", True)])
def test_call_that_the_history_does_not_take_is_settled_all_the_same(database, conn, outcome, owes):
    poisoned, other = database.add_job(), database.add_job()
    database.rows(f"ALTER TABLE stage_attempts ADD CHECK (job_id <> '{poisoned}')")
    rows = claim_many(conn, 2).claimed
    results = [result(row, outcome) for row in rows]
    with pytest.raises(psycopg2.errors.CheckViolation):
        settle(conn, *results)
    assert one_by_one.run_turn_in_parts(conn, results, wanted(), 2, "w").locked == []
    assert (database.owed(poisoned) is not None) == owes
    assert [a.outcome for a in database.attempts(other)] == [outcome]
    assert database.rows("SELECT 1 FROM stage_leases") == []


def test_call_without_an_answer_keeps_its_lease_though_the_history_does_not_take_it(database, conn):
    job = database.add_job()
    database.rows(f"ALTER TABLE stage_attempts ADD CHECK (job_id <> '{job}')")
    unanswered = result(claim(conn), "unknown", http_status=None, error="no answer within 600 s")
    [told] = one_by_one.run_turn_in_parts(conn, [unanswered], wanted(), 1, "w").given_up
    assert (told.job_id, database.owed(job).given_up) == (job, True)
    assert database.value("SELECT unanswered FROM stage_leases")
    database.move(job, "img_gen", "running")
    database.move(job, "img_gen", "done")  # owes the call anew
    assert claim(conn).call_id is None


def test_stage_that_somebody_has_locked_keeps_no_result_from_being_written(database, conn):
    jobs = [database.add_job() for _ in range(2)]
    database.rows("UPDATE pipeline_stages SET held_until = now(), hold_seconds = 1")
    accepted = replace(result(claim(conn)), after_hold=True)
    with closing(database.connect()) as elsewhere:
        elsewhere.cursor().execute("BEGIN; SELECT FROM pipeline_stages FOR UPDATE")
        assert settle(conn, held(claim(conn)), accepted)
    assert [len(database.attempts(job)) for job in jobs] == [1, 1]


@pytest.mark.parametrize("table", ["stage_attempts", "pipeline_stages"])
def test_accepted_call_is_not_made_again_while_one_of_our_tables_is_locked(
    database, conn, run_command, table
):
    job = database.add_job()
    row = claim(conn)
    accepted = replace(result(row), after_hold=True)
    database.add_job("overlay")  # due, but its result might be lost as well
    with closing(database.connect()) as elsewhere:  # as CREATE INDEX does
        elsewhere.cursor().execute(f"BEGIN; LOCK TABLE {table} IN SHARE MODE")
        turn = one_by_one.run_turn_in_parts(conn, [accepted], wanted(), 1, "w")
        assert (turn.refused, turn.claimed) == ([accepted], [])
    owed = database.owed(job)  # people see what it is
    assert owed.given_up and owed.last_error.startswith("its stage has accepted it, do not retry")
    assert "; ./jsl retry" not in run_command(database, "job", job).out
    said = run_command(database, "status").out
    assert "given up: its stage has accepted it" in said and "then retry" not in said
    for more in ([], ["--now"]):
        assert "due again" not in run_command(database, "retry", "--all", *more, "--yes").out
    assert database.owed(job).given_up
    assert database.rows("SELECT FROM stage_leases") == []
    settle(conn, accepted)
    assert database.owed(job) is None
    assert [one.attempt for one in database.attempts(row.key)] == [1]


def test_accepted_call_that_cannot_be_kept_from_being_made_again_is_logged_once(database, conn):
    job = database.add_job()
    accepted = result(claim(conn))
    with closing(database.connect()) as elsewhere, logged(database.settings()) as output:
        elsewhere.cursor().execute("BEGIN; LOCK TABLE stage_attempts, stage_calls IN SHARE MODE")
        for _ in range(2):
            turn = one_by_one.run_turn_in_parts(conn, [accepted], [], 0, "w")
            assert turn.refused == [accepted]
    [line] = output.getvalue().splitlines()
    assert " ERROR " in line and f"job={job} stage=vlm_analyze its stage has accepted it: " in line
    assert not database.owed(job).given_up


def test_leases_that_ran_out_during_a_failure_are_extended_once(database, conn):
    for _ in range(2):
        database.add_job()
    answered, unanswered = claim_many(conn, 2).claimed
    again = result(unanswered, "unknown", error="no answer", delay=0.0, after_lease=True)
    settle(conn, again)
    database.rows(LEASE_OVER)
    assert calls.reap(conn, extend_by=60.0) == []
    assert [row.key for row in claim_many(conn, 2).claimed] == [unanswered.key]
    for column, table in (("leased_until", "stage_leases"), ("due_at", "stage_calls")):
        ago = "interval '2 minutes'" if table == "stage_calls" else "interval '1 second'"
        database.rows(
            f"UPDATE {table} SET {column} = now() - {ago} WHERE job_id = %s", answered.key
        )
    [row] = claim_many(conn, 2, extend_by=60.0).claimed
    assert (row.key, row.taken_over) == (answered.key, True)


def test_result_is_written_while_its_lease_is_extended_after_a_failure(database, conn):
    database.add_job()
    row = claim(conn)
    database.rows(LEASE_OVER)
    assert claim_many(conn, 1, extend_by=60.0).claimed == []
    assert settle(conn, result(row))
    assert [one.outcome for one in database.attempts(row.key)] == ["succeeded"]


@pytest.mark.parametrize("ordered", [False, True])
def test_call_whose_lease_another_turn_is_extending_is_not_taken_over(database, conn, ordered):
    database.add_job()
    row = claim(conn)
    database.rows(LEASE_OVER)
    for seconds in (0.0, 60.0):
        with closing(database.connect()) as elsewhere:
            elsewhere.autocommit = False  # its commit waits, as for a standby
            elsewhere.cursor().execute("UPDATE stage_leases SET leased_until = now() + '1 minute'")
            assert claim_many(conn, 1, extend_by=seconds, ordered=ordered).claimed == []
            assert claim_many(conn, 1, extend_by=seconds, only=row.key).claimed == []
            [one] = wanted([row.stage], 60, 1, ordered=ordered)
            assert one_by_one.first_due(conn, one) is None
            elsewhere.rollback()
    [again] = claim_many(conn, 1, ordered=ordered).claimed
    assert (again.key, again.taken_over) == (row.key, True)


@pytest.mark.parametrize("ordered", [False, True])
def test_only_a_call_that_a_claim_would_take_is_given_up(database, conn, ordered):
    planned, held_up = database.add_job(), database.add_job("overlay")
    database.rows("UPDATE stage_calls SET run_after = now() + '1 day' WHERE job_id = %s", planned)
    assert claim_many(conn, 1, only=planned).claimed  # by a person, and lost
    database.rows(LEASE_OVER)
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'vlm_judge'")
    for one in wanted(["vlm_analyze", "vlm_judge"], ordered=ordered):
        assert one_by_one.first_due(conn, one) is None
    database.rows("UPDATE stage_calls SET run_after = NULL")
    [one] = wanted(["vlm_analyze"], ordered=ordered)
    first = one_by_one.first_due(conn, one)
    [given_up] = one_by_one.give_up(conn, one, first, "w", "cannot be claimed")
    assert one_by_one.give_up(conn, one, first, "w", "cannot be claimed") == []
    assert (given_up.job_id, given_up.attempt) == (planned, 1)
    assert database.owed(planned).given_up and not database.owed(held_up).given_up


def test_ending_leases_waits_for_none_that_another_listener_is_extending(database, conn):
    for _ in range(2):
        database.add_job()
    extended, lost = claim_many(conn, 2).claimed
    database.rows(LEASE_OVER)
    with closing(database.connect()) as elsewhere:
        elsewhere.autocommit = False
        lock = "SELECT FROM stage_leases WHERE call_id = %s FOR UPDATE"
        elsewhere.cursor().execute(lock, [extended.call_id])
        assert [row.job_id for row in calls.reap(conn)] == [lost.key]
        elsewhere.rollback()
    assert [row.job_id for row in calls.reap(conn)] == [extended.key]


@pytest.mark.parametrize("ordered", [False, True])
def test_call_whose_lease_was_extended_under_its_old_stage_waits(database, conn, ordered):
    database.add_job()
    row = claim(conn)
    database.rows(LEASE_OVER + "UPDATE stage_leases SET stage = 'before'")
    for _ in range(2):
        assert claim_many(conn, 1, extend_by=60.0, ordered=ordered).claimed == []
    assert settle(conn, result(row))
    assert database.owed(row.key) is None


def test_fault_of_more_than_one_row_gives_nothing_up(database, conn):
    job = database.add_job()
    settled = result(claim(conn), "retry", error="no", delay=0.0)
    database.add_job()
    with closing(database.connect()) as elsewhere:
        elsewhere.cursor().execute("BEGIN; LOCK TABLE stage_attempts")
        turn = one_by_one.run_turn_in_parts(conn, [settled], wanted(), 1, "w")
    assert isinstance(turn.refusal, psycopg2.errors.LockNotAvailable)
    assert turn.refused == [settled] and turn.claimed == []
    assert (database.owed(job).worker, database.owed(job).attempts) == ("w", 1)
    assert database.rows("SELECT 1 FROM stage_calls WHERE due_at = 'infinity'") == []


FULL = """
CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE program_limit_exceeded USING MESSAGE = 'too many notifications in the NOTIFY queue'; END
$$;
CREATE TRIGGER is_full BEFORE INSERT ON stage_attempts EXECUTE FUNCTION is_full()
"""


def test_full_queue_of_notifications_gives_nothing_up(database, conn):
    job = database.add_job()
    settled = result(claim(conn), "retry", delay=5.0)
    database.rows(FULL)
    try:
        turn = one_by_one.run_turn_in_parts(conn, [settled], wanted(), 1, "w")
        assert isinstance(turn.refusal, psycopg2.errors.ProgramLimitExceeded)
    finally:
        database.rows("DROP TRIGGER is_full ON stage_attempts; DROP FUNCTION is_full()")
    assert not database.owed(job).given_up


POISON = "UPDATE stage_calls SET attempts = 2147483647 WHERE job_id = %s"


def test_call_that_cannot_be_claimed_is_given_up_and_the_next_one_is_claimed(database, conn):
    steps = ("img_gen", "img_gen", "img_gen", "overlay")
    first, poisoned, next_job, other = map(database.add_job, steps)
    database.rows(POISON, poisoned)
    with pytest.raises(psycopg2.errors.NumericValueOutOfRange):
        claim_many(conn, 4)
    turn = one_by_one.run_turn_in_parts(conn, [], wanted(most=4), 4, "w")
    assert ([row.job_id for row in turn.claimed], turn.given_up) == ([first], [])
    turn = one_by_one.run_turn_in_parts(conn, [], wanted(most=4), 4, "w")
    assert [row.job_id for row in turn.claimed] == [other]
    assert [(one.outcome, one.job_id) for one in turn.given_up] == [("failed", poisoned)]
    call = database.owed(poisoned)
    assert call.given_up and "integer out of range" in call.last_error
    assert [row.job_id for row in claim_many(conn, 4).claimed] == [next_job]


def test_call_that_cannot_be_claimed_does_not_give_up_one_that_is_passed_by(database, conn):
    """The first due call by the clock may be one whose last request is still under way."""
    waiting, poisoned = database.add_job(), database.add_job()
    assert claim(conn).job_id == waiting
    database.move(waiting, "img_gen", "queued")
    database.move(waiting, "img_gen", "done")
    database.rows("UPDATE stage_calls SET due_at = now() WHERE job_id = %s", poisoned)
    database.rows(POISON, poisoned)
    one_by_one.run_turn_in_parts(conn, [], wanted(), 4, "w")
    assert database.owed(poisoned).given_up
    assert not database.owed(waiting).given_up


# Fails the claim of one job's call, once another session waits for the row.
FAIL_WHILE_WAITED_FOR = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT EXISTS (SELECT FROM pg_locks WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid)))
    LOOP
        PERFORM pg_sleep(0.01);
    END LOOP;
    RAISE program_limit_exceeded USING TABLE = 'stage_calls';
END $$;
CREATE TRIGGER fail BEFORE UPDATE ON stage_calls FOR EACH ROW
WHEN (OLD.job_id = '{}' AND NEW.worker IS NOT NULL) EXECUTE FUNCTION fail()
"""


def test_no_healthy_call_is_given_up_while_another_listener_holds_the_poisoned_one(database, conn):
    poisoned, healthy = database.add_job(), database.add_job()
    database.rows(FAIL_WHILE_WAITED_FOR.format(poisoned))
    with closing(database.connect()) as elsewhere, ThreadPoolExecutor() as threads:
        elsewhere.autocommit = False
        turn = threads.submit(one_by_one.run_turn_in_parts, conn, [], wanted(), 4, "w")
        database.wait_for("SELECT true FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
                          " AND datname = current_database()")  # fmt: skip
        lock = "SELECT FROM stage_calls WHERE job_id = %s FOR UPDATE"
        elsewhere.cursor().execute(lock, [poisoned])
        turn.result()
        elsewhere.rollback()
    database.rows("DROP TRIGGER fail ON stage_calls; DROP FUNCTION fail()")
    assert not database.owed(healthy).given_up


# --- claims nobody knows about -------------------------------------------------------------


def test_claim_whose_answer_was_lost_is_given_back(database, conn):
    job = database.add_job()
    claim(conn)
    assert calls.give_back(conn, "w", []).given_back == 1
    call = database.owed(job)
    assert (call.worker, call.started_at, call.attempts, call.free_attempts) == (None, None, 1, 1)
    row = claim(conn)
    assert (row.attempt, row.spent) == (2, 1)
    assert database.attempts(job) == []


def test_only_own_claims_without_a_result_are_given_back(database, conn):
    for _ in range(3):
        database.add_job()
    kept, lost, others = claim(conn), claim(conn), claim(conn, "another")
    assert calls.give_back(conn, "w", {(kept.call_id, kept.attempt)}).given_back == 1
    assert database.owed(lost.job_id).worker is None
    assert database.owed(kept.job_id).worker == "w"
    assert database.owed(others.job_id).worker == "another"
    assert settle(conn, result(kept))


def test_giving_back_that_runs_late_leaves_what_was_claimed_meanwhile(database, conn, monkeypatch):
    lost = database.add_job()
    claim(conn)
    begun = database.add_job()

    def execute(conn, sql, given):
        if sql is calls.GIVE_BACK:  # another connection of this listener went on meanwhile
            assert claim(conn).job_id == begun
        return db.execute(conn, sql, given)

    monkeypatch.setattr(calls, "execute", execute)
    assert calls.give_back(conn, "w", set()).given_back == 1
    assert database.owed(lost).worker is None
    assert database.owed(begun).worker == "w"


def test_lease_of_a_call_without_an_answer_is_not_given_back(database, conn):
    job = database.add_job()
    settle(conn, result(claim(conn), "unknown", delay=0, after_lease=True))
    assert calls.give_back(conn, "w", []).given_back == 0
    [lease] = database.rows("SELECT unanswered FROM stage_leases")
    assert lease.unanswered
    call = database.owed(job)
    assert (call.attempts, call.free_attempts) == (1, 0)
    assert claim(conn).call_id is None


def test_lease_of_a_call_without_an_answer_ends_without_a_lost_row(database, conn):
    job = database.add_job()
    settle(conn, result(claim(conn), "unknown", delay=0, after_lease=True))
    assert calls.reap(conn) == []
    assert len(database.rows("SELECT 1 FROM stage_leases")) == 1
    database.rows(LEASE_OVER)
    calls.reap(conn)
    assert database.rows("SELECT 1 FROM stage_leases") == []
    assert [attempt.outcome for attempt in database.attempts(job)] == ["unknown"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_giving_back_waits_for_no_row_that_a_stage_holds(database, conn, stage, end):
    job = database.add_job()
    claim(conn)
    stage.cursor().execute("UPDATE jobs SET status = 'running'")
    found = calls.give_back(conn, "w", [])
    assert (found.given_back, found.locked) == (0, 1)
    assert len(database.rows("SELECT * FROM stage_leases")) == 1
    getattr(stage, end)()
    found = calls.give_back(conn, "w", [])
    assert (found.given_back, found.locked) == (1, 0)
    assert database.rows("SELECT 1 FROM stage_leases") == []
    owed = database.owed(job)
    assert owed is None if end == "commit" else (owed.worker, owed.free_attempts) == (None, 1)


def test_result_of_a_call_given_back_changes_nothing(database, conn):
    job = database.add_job()
    settled = held(claim(conn))
    calls.give_back(conn, "w", [])
    call = database.owed(job)
    assert settle(conn, settled)
    assert database.owed(job) == call
