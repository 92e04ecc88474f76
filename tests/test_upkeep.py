"""Upkeep: history is counted once and pruned when it is old, and nobody waits for that."""

import math
import threading
import time
from datetime import timedelta

import pytest
from claims import (
    LEASE_OVER,
    SHORT_WAIT,
    claim,
    claim_many,
    connected,
    held,
    let_pass,
    result,
    set_clock_back,
    settle,
    wanted,
)

import calls
import clock
import db
import history
import leftovers
import moves
import one_by_one
import troubles

NOBODY = "http://127.0.0.1:1"  # nothing is called here


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def add_history(database, count: int, days: float, seconds: float = 0, outcome="succeeded") -> None:
    """So many attempts that finished `days` ago, after so many seconds."""
    database.rows(
        "INSERT INTO stage_attempts SELECT gen_random_uuid(), 1, 1, 'planner', 'w',"
        " at - make_interval(secs => %s), at, 200, %s"
        " FROM generate_series(1, %s) AS n,"
        " LATERAL (SELECT now() - make_interval(secs => 86400 * %s + 0.000001 * n) AS at) AS t",
        seconds, outcome, count, days,
    )  # fmt: skip


def totals(database) -> list[tuple]:
    return database.rows(
        "SELECT outcome, within_seconds, attempts, microseconds FROM stage_totals ORDER BY 1, 2"
    )


# --- counting ------------------------------------------------------------------------------


def test_attempts_are_counted_in_batches_and_once(database, conn):
    add_history(database, 25, days=1, seconds=3)
    assert [history.count(conn, batch=10) for _ in range(4)] == [10, 10, 5, 0]
    assert totals(database) == [("succeeded", 5, 25, 75_000_000)]
    add_history(database, 5, days=0.5, seconds=3)
    assert history.count(conn) == 5
    assert totals(database) == [("succeeded", 5, 30, 90_000_000)]


def test_attempts_that_finished_at_the_same_moment_are_counted_together(database, conn):
    add_history(database, 12, days=1)
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '1 day'")
    assert [history.count(conn, batch=5) for _ in range(2)] == [12, 0]


@pytest.mark.parametrize(
    ("seconds", "within"),
    [(-60, 0.1), (0, 0.1), (0.1, 0.1), (0.100001, 0.25), (30, 30), (600, 600), (601, math.inf)],
)
def test_bound_of_a_bucket_belongs_to_it(database, conn, seconds, within):
    add_history(database, 1, days=1, seconds=seconds)
    history.count(conn)
    assert totals(database) == [("succeeded", within, 1, max(0, round(seconds * 1e6)))]


def test_attempts_of_the_last_minutes_are_left_for_later(database, conn):
    """One that finished earlier may be committed later."""
    add_history(database, 3, days=2 / 1440)
    assert history.count(conn) == 0
    database.rows("UPDATE stage_attempts SET finished_at = finished_at - interval '1 hour'")
    assert history.count(conn) == 3


def test_one_worker_counts_at_a_time_and_no_other_waits(database, conn, other):
    add_history(database, 20, days=1)
    db.execute(other, "BEGIN")
    assert history.count(other, batch=10) == 10
    assert history.count(conn, batch=10) == 0
    db.execute(other, "COMMIT")
    assert history.count(conn, batch=100) == 10


# Waits after its snapshot, as a busy machine would let it.
WAITS = "WITH wait AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(7)), mark AS ("
OF_MARK = "FROM stage_totals_mark, wait FOR UPDATE OF stage_totals_mark SKIP LOCKED"


def test_worker_with_an_older_view_of_the_history_counts_nothing_twice(database, conn, other):
    late = history.COUNT.replace("WITH mark AS (", WAITS)
    late = late.replace("FROM stage_totals_mark FOR UPDATE SKIP LOCKED", OF_MARK)
    assert late.count("wait") == 2
    add_history(database, 15, days=1)
    database.rows("SELECT pg_advisory_lock(7)")
    counted = []
    thread = threading.Thread(
        target=lambda: counted.append(
            db.execute(
                other, f"SET LOCAL lock_timeout = 0; {late}", {"batch": 10} | history.BOUNDS
            ).fetchone()[0]
        )
    )
    thread.start()
    database.wait_for("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    assert history.count(conn, batch=10) == 10
    database.rows("SELECT pg_advisory_unlock(7)")
    thread.join()
    assert counted == [5]
    assert totals(database) == [("succeeded", 0.1, 15, 0)]
    assert history.count(conn) == 0


@pytest.mark.parametrize(("mark", "counted"), [(10, 1), (90, 0)])
def test_call_that_ends_behind_the_mark_is_counted_at_once(database, conn, mark, counted):
    """Its stage moved the row an hour ago, and has committed now."""
    database.rows(
        "UPDATE stage_totals_mark SET counted_until = now() - make_interval(mins => %s);"
        "INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
        "                          leased_until, working)"
        " SELECT gen_random_uuid(), 1, 1, 'planner', 'w', now() - interval '2 hours',"
        "        now() + interval '1 hour', true;"
        "INSERT INTO stage_moves (job_id, table_name, stage, is_failed, moved_at)"
        " SELECT job_id, 'gone', stage, false, now() - interval '1 hour' FROM stage_leases;"
        "UPDATE stage_leases SET table_name = 'gone'",
        mark,
    )
    [ended], _ = moves.look(conn)
    assert ended.outcome == "succeeded"
    assert [row[2] for row in totals(database)] == [1] * counted
    history.count(conn)
    assert [row[2] for row in totals(database)] == [1]


# --- pruning -------------------------------------------------------------------------------


def test_old_history_is_pruned_in_batches(database, conn):
    add_history(database, 15, days=40)
    add_history(database, 10, days=31)
    add_history(database, 5, days=29.9)
    history.count(conn)
    assert [history.prune(conn, 30, batch=10).pruned for _ in range(4)] == [10, 10, 5, 0]
    assert database.value("SELECT count(*) FROM stage_attempts") == 5


def test_pruning_takes_the_oldest_first(database, conn):
    add_history(database, 5, days=31)
    add_history(database, 5, days=40)
    history.count(conn)
    assert history.prune(conn, 30, batch=5).pruned == 5
    sql = "SELECT count(*) FROM stage_attempts WHERE finished_at > now() - interval '35 days'"
    assert database.value(sql) == 5


def test_what_is_not_counted_yet_is_not_pruned(database, conn):
    add_history(database, 10, days=40)
    assert history.prune(conn, 30).pruned == 0
    history.count(conn, batch=4)
    assert history.prune(conn, 30).pruned == 4


LONG_AGO = "UPDATE stage_attempts SET finished_at = finished_at - interval '40 days'"


@pytest.mark.parametrize("outcome", ["succeeded", "cancelled"])
def test_what_keeps_a_row_from_being_called_again_is_not_pruned(
    database, conn, run_command, outcome
):
    rests, moved, gone = (database.add_job() for _ in range(3))
    if outcome == "cancelled":
        run_command(database, "cancel", rests, moved, gone)
    else:
        settle(conn, *(result(row) for row in claim_many(conn, 3).claimed))
    database.move(moved, "vlm_analyze", "done")
    database.rows("DELETE FROM jobs WHERE job_id = %s", gone)
    database.rows(LONG_AGO)
    history.count(conn)
    done = history.prune(conn, 30)
    assert (done.attempts, done.pruned) == (3, 2)
    assert history.prune(conn, 30, done.until).attempts == 0
    assert database.value("SELECT job_id::text FROM stage_attempts") == rests
    done = run_command(database, "backfill", "--apply")
    assert done.lines[-1] == "0 calls recorded"


@pytest.mark.parametrize("outcome", ["succeeded", "lost"])
def test_what_says_that_a_running_row_is_stalled_is_not_pruned(database, conn, outcome):
    job = database.add_job()
    row = claim(conn)
    database.move(job, "vlm_analyze", "running")
    if outcome == "lost":
        database.rows(LEASE_OVER)
        calls.reap(conn)
    else:
        settle(conn, result(row))
    database.rows(LONG_AGO + "; UPDATE jobs SET updated_at = 'infinity'")
    [found] = troubles.newly_stalled(conn)
    history.count(conn)
    assert history.prune(conn, 30).pruned == 0
    assert troubles.newly_stalled(conn) == []
    assert found.jobs == database.value("SELECT count(*) FROM stalled_jobs()") == 1
    database.move(job, "vlm_analyze", "done")
    assert history.prune(conn, 30).pruned == 1


def test_one_worker_prunes_at_a_time_and_no_other_waits(database, conn, other):
    add_history(database, 20, days=40)
    history.count(conn)
    db.execute(other, "BEGIN")
    assert history.prune(other, 30, batch=10).pruned == 10
    assert history.prune(conn, 30, batch=10).pruned == 0
    db.execute(other, "COMMIT")
    assert history.prune(conn, 30, batch=10).pruned == 10


def test_there_is_more_to_do_only_where_a_batch_was_not_enough(database, conn, caller):
    """A few attempts grow old all the time: they are no reason to look after every call."""
    add_history(database, 1001, days=40)
    task = caller(NOBODY).listener.upkeep
    for more in (True, False):
        task.run(conn)
        assert (task.next_run <= time.monotonic()) == more
    assert database.value("SELECT count(*) FROM stage_attempts") == 0
    assert totals(database) == [("succeeded", 0.1, 1001, 0)]


# --- deleted jobs --------------------------------------------------------------------------


def test_upkeep_needs_no_right_to_joins_where_there_are_none(database, conn, caller):
    calling = caller(NOBODY)
    database.rows("ALTER TABLE stage_joins RENAME TO out_of_reach")
    try:
        calling.listener.upkeep.run(conn)
    finally:
        database.rows("ALTER TABLE out_of_reach RENAME TO stage_joins")
    assert calling.lines == []


def test_upkeep_goes_on_where_the_version_of_the_schema_cannot_be_read(
    database, conn, other, caller
):
    add_history(database, 10, days=1)
    db.execute(other, "BEGIN; LOCK TABLE job_state_listener_schema")
    caller(NOBODY).listener.upkeep.run(conn)
    db.execute(other, "COMMIT")
    assert sum(row[2] for row in totals(database)) == 10


def test_upkeep_that_meets_a_lock_says_in_one_line_who_holds_it(database, conn, other, caller):
    db.execute(conn, SHORT_WAIT)
    db.execute(other, "BEGIN; LOCK TABLE jobs")
    calling = caller(NOBODY)
    calling.listener.upkeep.run(conn)
    said = [line.partition("): ")[2] for line in calling.lines if "정리 작업 실패" in line]
    locked = f"jobs is locked by server process {other.info.backend_pid}"
    assert f"prune: {locked}" in [line.partition(" (")[0] for line in said]
    assert not any("LINE" in line or "SELECT" in line for line in said)


def test_look_for_stalled_rows_that_fails_is_repeated_less_and_less_often(database, conn, caller):
    task = caller(NOBODY, ALERT_COMMAND="true").listener.upkeep

    def minutes_until_the_next() -> int:
        task.stalled.at, before = 0.0, time.monotonic()
        task.run(conn)
        return int(task.stalled.at - before) // 60

    database.rows("ALTER FUNCTION stalled_jobs RENAME TO taken_away")
    assert [minutes_until_the_next() for _ in range(5)] == [10, 20, 40, 60, 60]
    database.rows("ALTER FUNCTION taken_away RENAME TO stalled_jobs")
    assert [minutes_until_the_next() for _ in range(2)] == [5, 5]


def test_given_up_calls_of_deleted_jobs_are_forgotten_batch_by_batch(database, conn):
    jobs = [database.add_job() for _ in range(5)]
    for _ in jobs:
        settle(conn, result(claim(conn), "failed"))
    database.rows("DELETE FROM jobs WHERE job_id <> %s", jobs[2])
    after = leftovers.forget_deleted(conn, "w", batch=2)
    assert database.value("SELECT count(*) FROM stage_calls") >= 3
    while after is not None:
        after = leftovers.forget_deleted(conn, "w", after, batch=2)
    assert database.value("SELECT array_agg(job_id::text) FROM stage_calls") == [jobs[2]]


def test_rows_set_failed_are_found_batch_by_batch_and_once(database, conn):
    jobs = [database.add_job() for _ in range(7)]
    for _ in jobs:
        settle(conn, result(claim(conn)))
    for job in jobs[1:]:
        database.move(job, "vlm_analyze", "failed")
    found, batches = [], 0
    after = None
    while batches == 0 or after is not None:
        rows, after = troubles.newly_failed(conn, after, batch=2)
        found += [(row.table_name, row.job_id, row.stage) for row in rows]
        batches += 1
    assert batches >= 4
    assert sorted(found) == sorted(("jobs", job, "vlm_analyze") for job in jobs[1:])
    assert troubles.newly_failed(conn) == ([], None)


def test_row_that_was_sent_back_and_accepted_since_is_not_told_as_failed(database, conn):
    """The last attempt counts: a person has seen to the one before it."""
    job = database.add_job()
    settle(conn, result(claim(conn)))
    database.move(job, "vlm_analyze", "failed")
    assert len(troubles.newly_failed(conn)[0]) == 1
    database.move(job, "img_gen", "done")
    settle(conn, result(claim(conn)))
    assert troubles.newly_failed(conn) == ([], None)
    database.move(job, "vlm_analyze", "failed")
    assert [row.job_id for row in troubles.newly_failed(conn)[0]] == [job]


def test_given_up_call_of_a_table_that_left_pipeline_waits_for_a_person(database, conn):
    """Nobody knows whether its row is still there."""
    database.add_job()
    settle(conn, result(claim(conn), "failed"))
    database.rows("UPDATE stage_calls SET table_name = 'left'")
    leftovers.forget_deleted(conn, "w")
    assert database.value("SELECT count(*) FROM stage_calls") == 1


def test_taken_call_of_a_table_that_left_pipeline_keeps_its_lease(database, conn):
    database.add_job()
    claim(conn)
    database.rows("UPDATE stage_leases SET table_name = 'left', working = true")
    moves.record_missed(conn)
    assert moves.look(conn) == ([], 0)
    assert database.value("SELECT count(*) FROM stage_leases WHERE working") == 1


def test_given_up_calls_of_deleted_jobs_are_forgotten_and_recorded(database, conn):
    deleted, kept, unsettled = (database.add_job() for _ in range(3))
    for _ in range(2):
        settle(conn, result(claim(conn), "failed"))
    database.rows("DELETE FROM jobs WHERE job_id IN (%s, %s)", deleted, unsettled)
    leftovers.forget_deleted(conn, "w")
    assert database.owed(deleted) is None
    assert [a.outcome for a in database.attempts(deleted)] == ["failed", "skipped"]
    assert database.owed(kept).given_up
    assert not database.owed(unsettled).given_up


# --- a clock that was set back -------------------------------------------------------------


def waits(database) -> list[float]:
    """Seconds until the calls are due, and until their leases end."""
    return database.rows(
        "SELECT extract(epoch FROM c.due_at - now())::float8 AS due,"
        " extract(epoch FROM l.leased_until - now())::float8 AS leased"
        " FROM stage_calls AS c LEFT JOIN stage_leases AS l USING (call_id)"
    )[0]


def test_call_under_way_is_due_after_its_lease_although_the_clock_was_set_back(database, conn):
    """Its listener may be gone."""
    database.add_job()
    claim(conn, lease=60)
    set_clock_back(database, 7200)
    assert min(waits(database)) > 7000
    assert clock.shorten_waits(conn) == 2
    assert max(waits(database)) <= 60
    assert clock.shorten_waits(conn) == 0
    database.rows(LEASE_OVER)
    assert claim(conn).attempt == 2


RETRIED = {"outcome": "retry", "delay": 100.0}
UNANSWERED = {"outcome": "unknown", "delay": 0.0, "after_lease": True}


@pytest.mark.parametrize("seconds", [100, 7200])
def test_retry_waits_no_longer_than_a_back_off_although_the_clock_was_set_back(
    database, conn, seconds
):
    database.add_job()
    settle(conn, result(claim(conn), **RETRIED))
    set_clock_back(database, seconds)
    for _ in range(3):  # the last attempt is still to come, by the clock
        clock.shorten_waits(conn)
    assert (waits(database)[0] <= 0) == (seconds > 300)


def test_call_without_an_answer_waits_for_its_lease_although_the_clock_was_set_back(database, conn):
    database.add_job()
    settle(conn, result(claim(conn, lease=400), **UNANSWERED))
    set_clock_back(database, 7200)
    clock.shorten_waits(conn)
    assert 390 < waits(database)[1] <= 400
    assert claim_many(conn, 1, sweep=True).claimed == []
    let_pass(database, 401)
    clock.shorten_waits(conn)
    assert claim(conn).attempt == 2


def test_calls_never_tried_keep_their_order_although_the_clock_was_set_back(database, conn):
    jobs = [database.add_job() for _ in range(5)]
    set_clock_back(database, 7200)
    assert clock.shorten_waits(conn) == 0  # as nothing shows it
    assert [clock.shorten_waits(conn, True, batch=2) for _ in range(4)] == [2, 2, 1, 0]
    assert [row.job_id for row in claim_many(conn, 5).claimed] == jobs


def test_call_that_was_given_back_waits_no_longer_although_the_clock_was_set_back(database, conn):
    given_back, under_way = database.add_job(), database.add_job()
    claim(conn, only=given_back)
    calls.give_back(conn, "w", [])
    claim(conn, only=under_way)
    set_clock_back(database, 7200)
    assert clock.shorten_waits(conn) == 3
    row = claim(conn)
    assert (row.job_id, row.attempt) == (given_back, 2)


def test_tried_call_with_a_run_after_waits_for_that_although_the_clock_was_set_back(database, conn):
    database.add_job()
    settle(conn, result(claim(conn), **RETRIED))
    later = (
        "UPDATE stage_calls SET run_after = at, due_at = at + %s FROM (SELECT now() + '9 h' AS at)"
    )
    database.rows(later + " AS t", timedelta())
    assert clock.shorten_waits(conn, is_back=True) == 0
    database.rows(later + " AS t", timedelta(hours=2))
    assert clock.shorten_waits(conn, is_back=True) == 1
    assert database.value("SELECT due_at = run_after FROM stage_calls")


def test_waits_that_are_meant_to_be_long_are_kept(database, conn):
    """A lease longer than any back-off, and a time before which a call is not to be made."""
    database.add_job()
    settle(conn, result(claim(conn, lease=7200), **UNANSWERED))
    planned = database.add_job()
    database.rows(
        "UPDATE stage_calls SET run_after = now() + interval '1 day',"
        " due_at = now() + interval '1 day' WHERE job_id = %s", planned
    )  # fmt: skip
    assert clock.shorten_waits(conn, is_back=True) == 0
    set_clock_back(database, 3600)
    clock.shorten_waits(conn)
    due = "SELECT run_after <= due_at FROM stage_calls WHERE job_id = %s"
    assert database.value(due, planned)
    answer_by = "SELECT extract(epoch FROM max(leased_until) - now())::float8 FROM stage_leases"
    assert 7000 < database.value(answer_by) <= 7200
    assert clock.shorten_waits(conn) == 0


def test_call_without_an_answer_is_due_after_a_lease_that_is_longer_than_the_step(database, conn):
    database.add_job()
    settle(conn, result(claim(conn, lease=7200), **UNANSWERED))
    set_clock_back(database, 3600)
    clock.shorten_waits(conn)
    let_pass(database, 7201)
    assert claim(conn).attempt == 2


def test_call_that_was_given_up_and_retried_waits_no_longer_than_a_back_off(database, conn):
    database.add_job()
    claim(conn)
    database.rows(LEASE_OVER)
    [first] = wanted(["vlm_analyze"])
    assert one_by_one.give_up(conn, first, one_by_one.first_due(conn, first), "w", "error")
    database.rows("UPDATE stage_calls SET due_at = now() + interval '2 hours'")  # as `retry` did
    assert clock.shorten_waits(conn, is_back=True) == 1
    assert claim(conn).attempt == 2
    assert clock.shorten_waits(conn, is_back=True) == 0


def test_hold_and_rate_last_no_longer_although_the_clock_was_set_back(database, conn):
    database.rows(
        "INSERT INTO stage_limits (name, stages, seconds, next_at)"
        " VALUES ('vlm_analyze', '{vlm_analyze}', 5, now() + interval '5 s')"
    )
    database.add_job("planner", "done")
    settle(conn, held(claim(conn), retry_after=30.0))
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'planner'")
    set_clock_back(database, 7200)
    assert clock.shorten_waits(conn) == 3  # the waiting call, too
    until = "SELECT extract(epoch FROM {} - now())::float8 FROM {} WHERE {} = '{}'"
    assert database.value(until.format("next_at", "stage_limits", "name", "vlm_analyze")) <= 5
    assert database.value(until.format("held_until", "pipeline_stages", "stage", "overlay")) <= 30
    paused = "SELECT held_until = 'infinity' FROM pipeline_stages WHERE stage = 'planner'"
    assert database.value(paused)


def test_clock_that_was_not_set_back_changes_nothing(database, conn, other):
    """Also where another transaction has begun later than this one."""
    for _ in range(3):
        database.add_job()
    db.execute(conn, "BEGIN")
    db.execute(conn, "SELECT")
    rows = claim_many(other, 3).claimed
    settle(other, result(rows[0], "retry", delay=290.0), result(rows[1], "failed"))
    assert clock.shorten_waits(conn) == 0
    db.execute(conn, "COMMIT")


def test_listener_shortens_what_a_clock_that_was_set_back_delays(database, api, listener):
    job = database.add_job("overlay")
    with connected(database) as conn:
        settle(conn, result(claim(conn), "retry", delay=0.5))
    set_clock_back(database, 7200)
    process = listener(database, api=api)
    process.wait_for_line("데이터베이스 시계가 되돌아감")
    api.wait_for(lambda api: [call.job_id for call in api.calls()] == [job])


def test_sweep_that_finds_a_call_before_its_time_has_all_of_them_found(database, api, listener):
    """Nothing else shows that the clock was set back, as none was tried."""
    jobs = [database.add_job("overlay", "done") for _ in range(5)]
    set_clock_back(database, 7200)
    listener(database, "run", "--workers", "1", api=api, SWEEP_INTERVAL=3600)
    api.wait_for(lambda api: [call.job_id for call in api.calls()] == jobs)
