"""Stages that are held, and the next due call."""

from contextlib import closing

import pytest
from claims import STAGES, claim, claim_many, connected, held, result, settle

import calls
from demo import five_stages
from ops.install import apply

HOLD = (
    "SELECT held_until, hold_seconds, held_reason FROM pipeline_stages WHERE stage = 'vlm_analyze'"
)
# Ends the hold now, so that it began its length ago.
HOLD_OVER = "UPDATE pipeline_stages SET held_until = now() - interval '1 microsecond'"


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def hold(database):
    return database.row(HOLD)


# --- holding a stage -----------------------------------------------------------------------


def test_unreachable_stage_is_held_twice_as_long_each_time_up_to_a_minute(database, conn):
    job, lengths = database.add_job(), []
    for _ in range(8):
        assert settle(conn, held(claim(conn), error="connection refused"))
        lengths.append(hold(database).hold_seconds)
        database.rows(HOLD_OVER)
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]
    assert hold(database).held_reason == "connection refused"
    call = database.owed(job)
    assert (call.attempts, call.free_attempts) == (8, 8)


@pytest.mark.parametrize("seconds", [0.5, 17.0, 3600.0])
def test_stage_is_held_for_as_long_as_it_asks(database, conn, seconds):
    database.add_job()
    row = claim(conn)
    assert settle(conn, held(row, retry_after=seconds))
    assert hold(database).hold_seconds == seconds
    finished = database.value("SELECT finished_at FROM stage_attempts")
    assert (hold(database).held_until - finished).total_seconds() == seconds


def test_longer_wait_asked_for_counts_and_a_shorter_one_does_not(database, conn):
    for _ in range(3):
        database.add_job()
    rows = [claim(conn) for _ in range(3)]
    for row, seconds in zip(rows, (100.0, 500.0, 2.0), strict=True):
        settle(conn, held(row, retry_after=seconds))
    assert hold(database).hold_seconds == 500


def test_held_stage_is_claimed_by_nobody_and_does_not_stop_the_others(database, conn):
    waiting, planned = database.add_job("img_gen", "done"), database.add_job("planner", "done")
    settle(conn, held(claim(conn), retry_after=600))
    with connected(database) as other:
        assert claim(other, "other").job_id == planned
        assert claim(other, "other").call_id is None
    assert claim(conn, only=waiting).job_id == waiting  # a person may


def test_hold_covers_every_state_of_its_stage(server, make_database, monkeypatch):
    monkeypatch.setitem(five_stages.PIPELINE, ("img_gen", "again"), five_stages.vlm_analyze)
    database = make_database(server)
    with connected(database) as conn:
        apply(conn)
    database.add_job("img_gen", "done")
    database.add_job("img_gen", "again")
    with connected(database) as conn:
        settle(conn, held(claim(conn), retry_after=60))
        assert claim(conn).call_id is None
    assert len(database.rows(HOLD + " AND held_until > now()")) == 2


def test_calls_begun_before_a_hold_do_not_lengthen_it(database, conn):
    for _ in range(5):
        database.add_job()
    rows = [claim(conn) for _ in range(5)]
    settle(conn, held(rows[0], error="first"))
    begun = hold(database)
    settle(conn, held(rows[1]))
    settle(conn, held(rows[2]))
    assert hold(database) == begun
    database.rows("UPDATE pipeline_stages SET held_until = now(), hold_seconds = 0")
    over = hold(database)
    settle(conn, held(rows[3]))
    assert hold(database) == over


def test_holding_twice_with_one_result_is_as_good_as_once(database, conn):
    database.add_job()
    settled = held(claim(conn))
    settle(conn, settled)
    database.rows("UPDATE pipeline_stages SET held_until = now(), hold_seconds = 0")
    over = hold(database)
    settle(conn, settled)
    assert hold(database) == over


# --- lifting it ----------------------------------------------------------------------------


def test_success_of_a_call_begun_after_the_hold_lifts_it(database, conn):
    job = database.add_job()
    settle(conn, held(claim(conn), retry_after=600))
    row = claim(conn, only=job)
    assert settle(conn, result(row))
    assert tuple(hold(database)) == (None, None, None)
    database.add_job()
    settle(conn, held(claim(conn)))
    assert hold(database).hold_seconds == 1


def test_success_of_a_call_begun_before_the_hold_does_not_lift_it(database, conn):
    for _ in range(2):
        database.add_job()
    rows = [claim(conn), claim(conn)]
    settle(conn, held(rows[0]))
    begun = hold(database)
    settle(conn, result(rows[1]))
    assert hold(database) == begun


def test_success_of_another_stage_lifts_nothing(database, conn):
    database.add_job("img_gen", "done")
    settle(conn, held(claim(conn), retry_after=600))
    database.add_job("planner", "done")
    settle(conn, result(claim(conn)))
    assert hold(database).hold_seconds == 600


@pytest.mark.parametrize("outcome", ["retry", "failed", "skipped"])
def test_only_a_success_lifts_a_hold(database, conn, outcome):
    job = database.add_job()
    settle(conn, held(claim(conn)))
    settle(conn, result(claim(conn, only=job), outcome, delay=0))
    assert hold(database).hold_seconds == 1


# --- the next due call ---------------------------------------------------------------------


def next_due(conn, stages=STAGES):
    return claim(conn, stages=stages).next_due


def test_nothing_is_coming_where_nothing_is_owed(database, conn):
    database.add_job("img_gen", "queued")
    assert next_due(conn) is None


def test_retry_is_next_when_its_delay_is_over(database, conn):
    for delay in (900.0, 300.0):
        database.add_job()
        settle(conn, result(claim(conn), "retry", delay=delay))
    assert 0 < next_due(conn) <= 300
    assert next_due(conn, ["planner"]) is None


def test_lease_is_next_when_it_runs_out(database, conn):
    database.add_job()
    claim(conn, lease=500)
    assert 60 < next_due(conn) <= 500


def test_given_up_call_is_never_next(database, conn):
    database.add_job()
    settle(conn, result(claim(conn), "failed"))
    assert next_due(conn) is None


def test_due_call_that_was_passed_by_is_not_waited_for(database, conn):
    database.add_job()
    with closing(database.connect()) as stage:
        stage.cursor().execute("BEGIN; UPDATE jobs SET status = 'running'")
        assert next_due(conn) is None


def test_call_of_a_held_stage_is_next_when_the_hold_ends(database, conn):
    database.add_job()
    settle(conn, held(claim(conn), retry_after=700))
    assert 60 < next_due(conn) <= 700
    database.rows("UPDATE stage_calls SET due_at = now() + interval '2000 seconds'")
    assert 700 < next_due(conn) <= 2000


def test_end_of_a_hold_is_waited_for_as_a_call_may_come_meanwhile(database, conn):
    database.add_job()
    settle(conn, held(claim(conn), retry_after=700))
    database.rows("DELETE FROM stage_calls")
    assert 60 < next_due(conn) <= 700


def test_what_has_become_due_since_the_claim_is_due_now(database, conn):
    turn = claim_many(conn, 1)
    database.add_job()
    assert calls.next_due(conn, STAGES) is None
    assert calls.next_due(conn, STAGES, turn.asked_at) <= 0


def test_hold_that_never_ends_is_not_waited_for(database, conn):
    database.add_job()
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity'")
    assert next_due(conn) is None
