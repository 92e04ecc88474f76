"""max_running: exact over all listeners, and a full stage does not keep another one waiting."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psycopg2
import pytest
import variants
from claims import (
    LEASE_OVER,
    STAGES,
    all_connected,
    claim,
    claim_many,
    connected,
    result,
    settle,
    wanted,
)
from commands import ROOT
from waiting import PATIENCE, until

import calls
import db
import notifications
import one_by_one
import pipeline
from demo import five_stages
from demo.stage_api import StageApi
from ops.install import apply

LEASES = "SELECT stage, attempt, worker FROM stage_leases"
UNDER_WAY = "SELECT count(*) FROM stage_leases WHERE stage = %s AND leased_until > now()"


def limit(database, running: int, stage: str = "vlm_analyze") -> None:
    """Let `stage` have `running` calls at once, as install would."""
    database.rows("INSERT INTO stage_limits VALUES (%s, ARRAY[%s], %s)", stage, stage, running)


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


# --- waking the others ---------------------------------------------------------------------


def test_calls_are_claimed_though_the_others_cannot_be_woken(database, conn, monkeypatch):
    """It is asked after the commit: an error then must not hide what was claimed."""
    monkeypatch.setattr(calls, "WAKE_WAITING", "SELECT 1 / 0, %(stages)s")
    limit(database, 1)
    database.add_job()
    first = claim(conn)
    database.add_job("overlay")
    turn = claim_many(conn, 1, results=[result(first, limited=True)])
    assert [row.stage for row in turn.claimed] == ["vlm_judge"]


# --- places --------------------------------------------------------------------------------


def test_full_stage_is_passed_by_and_the_others_go_on(database, conn):
    limit(database, 1)
    for step in ("img_gen", "img_gen", "overlay"):
        database.add_job(step)
    assert claim(conn).stage == "vlm_analyze"
    assert claim(conn).stage == "vlm_judge"
    assert claim(conn).call_id is None


@pytest.mark.parametrize("share", [1, 8])
def test_claim_of_many_takes_no_more_than_there_are_places(database, conn, share):
    limit(database, 3)
    for step in ["img_gen"] * 5 + ["overlay"] * 2:
        database.add_job(step)
    claimed = [row.stage for row in claim_many(conn, 8, share=share).claimed]
    assert Counter(claimed) == {"vlm_analyze": 3, "vlm_judge": 2}
    assert claim_many(conn, 8).claimed == []


@pytest.mark.parametrize("outcome", ["succeeded", "retry", "failed", "held", "skipped"])
def test_known_outcome_frees_the_place(database, conn, outcome):
    limit(database, 1)
    database.add_job(), database.add_job()
    row = claim(conn)
    assert claim(conn).call_id is None
    assert settle(conn, result(row, outcome, delay=3600))
    assert claim(conn).call_id


def test_settling_and_claiming_in_one_takes_the_place_that_it_frees(database, conn):
    limit(database, 1)
    jobs = {database.add_job() for _ in range(3)}
    row = claim(conn)
    again = claim_many(conn, 4, results=[result(row)]).claimed
    assert len(again) == 1 and {row.job_id, again[0].job_id} < jobs


def test_place_of_an_unknown_call_is_free_only_after_its_lease(database, conn):
    limit(database, 1)
    database.add_job(), database.add_job()
    row = claim(conn)
    assert claim(conn, settled=result(row, "unknown", delay=0, after_lease=True)).call_id is None
    database.rows(LEASE_OVER)
    assert claim(conn).call_id


def test_place_of_a_lost_listener_is_free_after_its_lease(database, conn, other):
    limit(database, 1)
    database.add_job()
    claim(conn, "lost")
    assert claim(other).call_id is None
    database.rows(LEASE_OVER)
    assert claim(other).taken_over


def test_call_given_back_frees_its_place(database, conn):
    limit(database, 1)
    database.add_job()
    claim(conn)
    calls.give_back(conn, "w", [])
    assert claim(conn).call_id


def test_late_result_frees_no_place_of_another(database, conn, other):
    limit(database, 1)
    database.add_job()
    late = claim(conn, "late")
    database.rows(LEASE_OVER)
    assert claim(other, "second").call_id
    settle(conn, result(late, "succeeded", "late"))
    database.add_job()
    assert claim(conn).call_id is None


# --- at the same time ----------------------------------------------------------------------


def wait_for_locks(conn):
    """Make the connection wait for locks without a limit."""
    db.execute(conn, "SET lock_timeout = 0")
    return conn


def is_waiting(database, conn) -> bool:
    waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
    return database.value(waits, conn.info.backend_pid)


@contextmanager
def holding_limit(database, stage: str):
    """Another transaction holds the row of this limit meanwhile."""
    with closing(database.connect()) as holder:
        holder.autocommit = False
        holder.cursor().execute("SELECT FROM stage_limits WHERE name = %s FOR UPDATE", [stage])
        yield


TWO_JOBS = """
INSERT INTO jobs (current_step, status) VALUES ('yolo_detect', 'done'), ('yolo_detect', 'done')
"""
LATER = "UPDATE stage_calls SET due_at = now() + interval '1 hour'"


@pytest.mark.parametrize(("arrive", "sweep"), [("SELECT", False), (LATER, True)])
def test_limit_is_exact_although_calls_arrive_between_lock_and_claim(
    database, conn, other, arrive, sweep
):
    limit(database, 1), limit(database, 1, "planner")
    database.add_job("img_gen")
    wait_for_locks(conn), wait_for_locks(other)
    with ThreadPoolExecutor(2) as pool, closing(database.connect()) as application:
        application.cursor().execute(f"BEGIN; {TWO_JOBS}")
        with holding_limit(database, "vlm_analyze"):
            first = pool.submit(claim_many, conn, 8, "first", sweep=sweep)
            until(lambda: is_waiting(database, conn), "the first to wait for the limit")
            application.cursor().execute(f"COMMIT; {arrive}")
            db.execute(other, "BEGIN")
            second = pool.submit(claim_many, other, 8, "second", ["planner"], sweep=sweep)
            until(lambda: second.done() or is_waiting(database, other), "the second to claim")
        first.result()
        second.result()
        db.execute(other, "COMMIT")
    assert database.value(UNDER_WAY, "planner") == 1


def test_limit_is_exact_for_two_people_at_once(database, conn, other):
    limit(database, 1)
    jobs = [database.add_job(), database.add_job()]
    database.rows("UPDATE stage_calls SET due_at = now() + interval '1 hour', attempts = 1")
    wait_for_locks(other)
    db.execute(conn, "BEGIN")
    assert claim(conn, only=jobs[0]).call_id
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(claim, other, only=jobs[1])
        until(lambda: second.done() or is_waiting(database, other), "the second to claim")
        db.execute(conn, "COMMIT")
        assert second.result().call_id is None


class Stages:
    """Counts the calls under way of each stage, as the stages themselves would."""

    def __init__(self):
        self.now, self.most, self.lock = Counter(), Counter(), threading.Lock()

    def begin(self, rows) -> None:
        with self.lock:
            self.now.update(row.stage for row in rows)
            self.most |= self.now

    def end(self, rows) -> None:
        with self.lock:
            self.now.subtract(row.stage for row in rows)


def test_limits_are_exact_over_listeners_that_claim_many_at_once(database):
    limit(database, 1), limit(database, 2, "planner")
    steps, counted, done = ("img_gen", "yolo_detect", "overlay"), Stages(), Counter()
    jobs, end = 360, time.monotonic() + PATIENCE
    for number in range(90):
        database.add_job(steps[number % 3])

    def listen(name: str, conn) -> None:
        rows = []
        wait_for_locks(conn)
        while sum(done.values()) < jobs:
            assert time.monotonic() < end, done
            counted.end(rows)  # before another listener can know
            results = [result(row, worker=name) for row in rows]
            rows = claim_many(conn, 4, name, results=results, share=1).claimed
            counted.begin(rows)
            done.update(row.stage for row in rows)
        counted.end(rows)

    with all_connected(database, 4) as conns, ThreadPoolExecutor(4) as pool:
        running = [pool.submit(listen, *each) for each in zip("abcd", conns, strict=True)]
        for number in range(90, jobs):  # they arrive meanwhile
            database.add_job(steps[number % 3])
        for one in running:
            one.result()
    assert done == {"vlm_analyze": 120, "planner": 120, "vlm_judge": 120}
    assert (counted.most["vlm_analyze"], counted.most["planner"]) == (1, 2)
    assert counted.most["vlm_judge"] > 2


def test_limit_whose_row_is_locked_stops_no_other_stage(database, conn):
    limit(database, 1)
    limited, free = database.add_job("img_gen"), database.add_job("overlay")
    with holding_limit(database, "vlm_analyze"):
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            claim_many(conn, 4)
        turn = one_by_one.run_turn_in_parts(conn, [], wanted(STAGES), 4, "w")
        assert [row.job_id for row in turn.claimed] == [free]
    assert claim(conn).job_id == limited


# --- waking --------------------------------------------------------------------------------


def heard(conn) -> int:
    db.execute(conn, "SELECT 1")
    return sum(n.channel == db.WAKE_CHANNEL for n in notifications.hear(conn))


def test_place_that_is_freed_and_not_taken_wakes_those_who_wait(database, conn, other):
    limit(database, 1)
    for step in ("img_gen", "img_gen", "overlay"):
        database.add_job(step)
    notifications.listen(other)
    row = claim(conn)
    assert claim(other).stage == "vlm_judge"
    assert claim(conn, stages=["vlm_judge"], settled=result(row)).call_id is None
    assert heard(other) == 1


def test_place_that_is_freed_by_a_listener_that_claims_nothing_wakes_those_who_wait(
    database, conn, other
):
    limit(database, 1)
    database.add_job(), database.add_job()
    notifications.listen(other)
    assert settle(conn, result(claim(conn)))
    assert heard(other) == 1


def test_place_that_is_taken_again_at_once_wakes_nobody(database, conn, other):
    limit(database, 1)
    for _ in range(3):
        database.add_job()
    notifications.listen(other)
    row = claim(conn)
    assert claim(conn, settled=result(row)).call_id
    assert heard(other) == 0


def test_place_nobody_waits_for_wakes_nobody(database, conn, other):
    limit(database, 1)
    database.add_job()
    notifications.listen(other)
    assert claim(conn, settled=result(claim(conn))).call_id is None
    assert heard(other) == 0


# --- leases --------------------------------------------------------------------------------


def test_lease_outlives_the_debt_until_the_call_is_settled(database, conn):
    job = database.add_job()
    row = claim(conn)
    database.move(job, "vlm_analyze", "running")
    assert database.owed(job) is None
    assert database.rows(LEASES) == [("vlm_analyze", 1, "w")]
    settle(conn, result(row))
    assert database.rows(LEASES) == []


def test_listener_lost_while_its_job_runs_leaves_a_lost_attempt(database, conn):
    job = database.add_job()
    claim(conn, "lost")
    database.move(job, "vlm_analyze", "running")
    assert calls.reap(conn) == []
    database.rows(LEASE_OVER)
    assert len(calls.reap(conn)) == 1
    assert [(a.outcome, a.worker) for a in database.attempts(job)] == [("lost", "lost")]
    assert calls.reap(conn) == []


# --- declared beside the stage -------------------------------------------------------------


@pytest.fixture
def declare():
    """declare(stage function, **limits), for one test."""
    changed = []

    def declared(function, **given) -> None:
        vars(function).pop("limits", None)
        pipeline.limits(**given)(function)
        changed.append(function)

    yield declared
    for function in changed:
        vars(function).pop("limits", None)


LIMITS = "SELECT name, max_running FROM stage_limits"


def test_install_knows_the_limits_that_are_declared(server, make_database, declare):
    database = make_database(server)
    with closing(db.connect(database.settings())) as conn:
        for running in (2, 3, 1, None):
            declare(five_stages.planner, max_running=running)
            apply(conn)
            expected = [] if running is None else [("planner", running)]
            assert database.rows(LIMITS) == expected


def test_calls_under_way_count_as_soon_as_there_is_a_limit(server, make_database, declare):
    database = make_database(server)
    for _ in range(3):
        database.add_job("yolo_detect")
    with connected(database) as conn:
        assert claim(conn).call_id
        declare(five_stages.planner, max_running=2)
        apply(conn)
        assert claim(conn).call_id and claim(conn).call_id is None


def test_listener_does_not_start_with_another_limit_than_the_database(database, run_command):
    with closing(database.connect()) as conn:
        conn.cursor().execute("UPDATE pipeline_stages SET max_running = 2 WHERE stage = 'planner'")
    done = run_command(database, "run", "--once")
    database.rows("UPDATE pipeline_stages SET max_running = NULL")
    assert done.code == 2
    differ = "planner in demo/five_stages.py, planner (max_running 2) in the database"
    assert f"(yolo_detect, done) → {differ}" in done.out


def test_two_declarations_of_limits_are_refused():
    with pytest.raises(ValueError, match="planner has two @limits"):
        pipeline.limits(timeout=60)(pipeline.limits(max_running=1)(variants.stage("planner")))


def test_timeout_and_attempts_of_a_stage_win_over_the_settings(database, caller, serve, declare):
    declare(five_stages.vlm_analyze, timeout=7, max_attempts=1)
    database.add_job(), database.add_job("overlay")
    listener = caller("http://127.0.0.1:1", STAGE_TIMEOUT=50, LEASE_MARGIN=3, MAX_ATTEMPTS=4)
    first, second = listener.claim(), listener.claim()
    assert (first.timeout, first.max_attempts) == (7, 1)
    assert (second.timeout, second.max_attempts) == (50, 4)
    leases = database.rows("SELECT extract(epoch FROM leased_until - started_at)::int AS s,"
                           " stage FROM stage_leases")  # fmt: skip
    assert {row.stage: row.s for row in leases} == {"vlm_analyze": 10, "vlm_judge": 53}


# --- eight workers -------------------------------------------------------------------------

LIMITED = """
import sys
sys.path.insert(0, {root!r})
import pipeline
from demo import five_stages
pipeline.limits(max_running=2)(five_stages.vlm_analyze)
import listener, ops
ops.main(listener.cli)
"""


class AtOnce:
    """Behaviour of a stage: works, and counts how many requests it has under way at the most.

    A request no longer counts when its answer is sent: the next may arrive right then.
    """

    def __init__(self, api):
        self.api, self.lock = api, threading.Lock()
        self.now = self.most = 0

    def __call__(self, request):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        answer = self.api.work(request)
        with self.lock:
            self.now -= 1
        return answer


def test_eight_workers_never_exceed_the_limit_and_starve_no_other_stage(
    server, make_database, declare, listener, tmp_path
):
    database = make_database(server)
    declare(five_stages.vlm_analyze, max_running=2)
    with closing(db.connect(database.settings())) as conn:
        apply(conn)
    add = "INSERT INTO jobs (current_step, status) SELECT %s, 'done' FROM generate_series(1, %s)"
    database.rows(add, "img_gen", 150)
    program = tmp_path / "limited.py"
    program.write_text(LIMITED.format(root=str(ROOT)))
    stage = "vlm_analyze"
    added = threading.Event()
    with StageApi(database.dsn, delay=lambda _: 0.005) as api:
        at_once = AtOnce(api)

        def behave(request):
            if len(api.calls(stage=stage)) > 20:
                added.wait(PATIENCE)
            return at_once(request)

        api.on(stage, behave)
        listener(database, "run", "--workers", "8", f"--stage={stage}", "--stage=vlm_judge",
                 api=api, program=program, SWEEP_INTERVAL=600)  # fmt: skip
        api.wait_for(lambda api: len(api.calls(stage=stage)) >= 20)
        database.rows(add, "overlay", 40)
        added.set()
        done = "SELECT count(*) = 150 FROM jobs WHERE current_step = %s AND status = 'done'"
        database.wait_for(done, stage)
        limited, others = api.calls(stage=stage), api.calls(stage="vlm_judge")
        until(lambda: all(r.finished for r in [*limited, *others]), "every call to end")
    assert (len(limited), len(others)) == (150, 40)
    assert at_once.most == 2
    # Their turn came while the long queue of the other stage was still there.
    last = max(r.finished for r in limited)
    assert max(r.time for r in others) < last
