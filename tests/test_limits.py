"""max_running: exact over all workers, and no stage waits for another's slot."""

from contextlib import closing

import pytest
import settling
from claims import LEASE_OVER, claim, connected, result
from commands import ROOT
from waiting import until

import calls
import db
import notifications
import stages
import upkeep
from demo.stage_api import StageApi
from ops.install import apply

LEASES = "SELECT stage, attempt, worker FROM stage_leases"
FREE = "SELECT count(*) FROM stage_slots WHERE leased_until <= now()"


def limit(database, running: int | None, stage: str = "vlm_analyze") -> None:
    """Let `stage` have `running` slots, as install would."""
    database.rows("DELETE FROM stage_slots WHERE stage = %s", stage)
    insert = "INSERT INTO stage_slots SELECT %s, generate_series(1, %s)"
    database.rows(insert, stage, running or 0)


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


@pytest.fixture
def conn(database):
    with connected(database) as conn:
        yield conn


@pytest.fixture
def other(database):
    with connected(database) as conn:
        yield conn


# --- slots ---------------------------------------------------------------------------------


def test_full_stage_is_passed_by_and_the_others_go_on(database, conn):
    limit(database, 1)
    for step in ("img_gen", "img_gen", "overlay"):
        database.add_job(step)
    first = claim(conn)
    assert (first.stage, first.limited) == ("vlm_analyze", True)
    second = claim(conn)
    assert (second.stage, second.limited) == ("vlm_judge", False)
    assert claim(conn).call_id is None


@pytest.mark.parametrize("outcome", ["succeeded", "retry", "failed", "held", "skipped"])
def test_known_outcome_frees_the_slot(database, conn, outcome):
    limit(database, 1)
    database.add_job()
    row = claim(conn)
    assert database.value(FREE) == 0
    assert settling.settle(conn, result(row, outcome, delay=3600))
    assert database.value(FREE) == 1


def test_settling_and_claiming_in_one_takes_the_slot_that_it_frees(database, conn):
    limit(database, 1)
    first, second = database.add_job(), database.add_job()
    row = claim(conn)
    again = claim(conn, settled=result(row))
    assert {row.job_id, again.job_id} == {first, second}
    assert database.value(FREE) == 0


def test_slot_of_an_unknown_call_is_free_only_after_its_lease(database, conn):
    limit(database, 1)
    database.add_job(), database.add_job()
    row = claim(conn)
    assert claim(conn, settled=result(row, "unknown", delay=0, after_lease=True)).call_id is None
    database.rows(LEASE_OVER)
    assert claim(conn).call_id


def test_slot_of_a_lost_worker_is_free_after_its_lease(database, conn, other):
    limit(database, 1)
    database.add_job()
    claim(conn, "lost")
    assert claim(other).call_id is None
    database.rows(LEASE_OVER)
    assert claim(other).taken_over


def test_call_given_back_frees_its_slot(database, conn):
    limit(database, 1)
    database.add_job()
    claim(conn)
    calls.give_back(conn, "w", [])
    assert claim(conn).call_id


def test_late_result_frees_no_slot_of_another(database, conn, other):
    limit(database, 1)
    database.add_job()
    late = claim(conn, "late")
    database.rows(LEASE_OVER)
    claim(other, "second")
    settling.settle(conn, result(late, "succeeded", "late"))
    assert database.value(FREE) == 0


def test_call_by_hand_waits_for_a_slot_like_any_other(database, conn, run_command):
    limit(database, 1)
    database.add_job()
    claim(conn)
    job = database.add_job()
    refused = run_command(database, "call", job).refused(1)
    assert refused == f"job {job}: vlm_analyze is at its limit of 1 calls at once; try again"


# --- waking --------------------------------------------------------------------------------


def heard(conn) -> int:
    db.execute(conn, "SELECT 1")
    return sum(n.channel == db.WAKE_CHANNEL for n in notifications.hear(conn))


def test_slot_that_is_freed_and_not_taken_wakes_those_who_wait(database, conn, other):
    limit(database, 1)
    for step in ("img_gen", "img_gen", "overlay"):
        database.add_job(step)
    notifications.listen(other)
    row = claim(conn)
    assert claim(other).stage == "vlm_judge"
    assert claim(conn, stages=["vlm_judge"], settled=result(row)).call_id is None
    assert heard(other) == 1


def test_slot_that_is_taken_again_at_once_wakes_nobody(database, conn, other):
    limit(database, 1)
    for _ in range(3):
        database.add_job()
    notifications.listen(other)
    row = claim(conn)
    assert claim(conn, settled=result(row)).limited
    assert heard(other) == 0


def test_slot_nobody_waits_for_wakes_nobody(database, conn, other):
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
    settling.settle(conn, result(row))
    assert database.rows(LEASES) == []


def test_worker_lost_while_its_job_runs_leaves_a_lost_attempt(database, conn):
    job = database.add_job()
    claim(conn, "lost")
    database.move(job, "vlm_analyze", "running")
    assert upkeep.reap(conn) == 0
    database.rows(LEASE_OVER)
    assert upkeep.reap(conn) == 1
    assert [(a.outcome, a.worker) for a in database.attempts(job)] == [("lost", "lost")]
    assert upkeep.reap(conn) == 0


# --- declared beside the stage -------------------------------------------------------------


@pytest.fixture
def declare():
    """declare(stage function, **limits), for one test."""
    changed = []

    def declared(function, **given) -> None:
        stages.limits(**given)(function)
        changed.append(function)

    yield declared
    for function in changed:
        vars(function).pop("limits", None)


def test_install_makes_as_many_slots_as_are_declared(server, make_database, declare):
    database = make_database(server)
    with closing(db.connect(database.settings())) as conn:
        for running, slots in ((2, [1, 2]), (3, [1, 2, 3]), (1, [1]), (None, [])):
            declare(stages.planner, max_running=running)
            apply(conn)
            found = database.rows("SELECT slot FROM stage_slots WHERE stage = 'planner' ORDER BY 1")
            assert [row.slot for row in found] == slots


def test_calls_under_way_count_as_soon_as_there_is_a_limit(server, make_database, declare):
    database = make_database(server)
    jobs = [database.add_job("yolo_detect") for _ in range(3)]
    with connected(database) as conn:
        row = claim(conn)
        declare(stages.planner, max_running=2)
        apply(conn)
        assert claim(conn).limited and claim(conn).call_id is None
        assert row.job_id in jobs and database.value(FREE) == 0


def test_worker_does_not_start_with_another_limit_than_the_database(database, run_command):
    with closing(database.connect()) as conn:
        conn.cursor().execute("UPDATE pipeline_stages SET max_running = 2 WHERE stage = 'planner'")
    done = run_command(database, "run", "--once")
    database.rows("UPDATE pipeline_stages SET max_running = NULL")
    assert done.code == 2
    differ = "yolo_detect, done → planner in stages.py, planner (max_running 2) in the database"
    assert differ in done.out


@pytest.mark.parametrize("given", [{"max_running": 0}, {"timeout": -1}, {"max_attempts": 0}])
def test_impossible_limit_is_refused_where_it_is_declared(given):
    [name] = given
    with pytest.raises(ValueError, match=name):
        stages.limits(**given)(lambda call: None)


def test_timeout_and_attempts_of_a_stage_win_over_the_settings(database, caller, serve, declare):
    declare(stages.vlm_analyze, timeout=7, max_attempts=1)
    database.add_job(), database.add_job("overlay")
    worker = caller("http://127.0.0.1:1", STAGE_TIMEOUT=50, LEASE_MARGIN=3, MAX_ATTEMPTS=4)
    first, second = worker.claim(), worker.claim()
    assert (first.limits.timeout, first.limits.max_attempts) == (7, 1)
    assert (second.limits.timeout, second.limits.max_attempts) == (50, 4)
    assert first.until - first.began == pytest.approx(7)
    leases = database.rows("SELECT extract(epoch FROM leased_until - started_at)::int AS s,"
                           " stage FROM stage_leases")  # fmt: skip
    assert {row.stage: row.s for row in leases} == {"vlm_analyze": 10, "vlm_judge": 53}


# --- eight workers -------------------------------------------------------------------------

LIMITED = """
import sys
sys.path.insert(0, {root!r})
import stages
stages.limits(max_running=2)(stages.vlm_analyze)
import listener, ops
ops.main(listener.cli)
"""


def most_at_once(requests: list) -> int:
    """How many of the requests were under way at the same time, at the most."""
    edges = [(r.time, 1) for r in requests] + [(r.finished, -1) for r in requests]
    now = most = 0
    for _, step in sorted(edges):
        now += step
        most = max(most, now)
    return most


def test_eight_workers_never_exceed_the_limit_and_starve_no_other_stage(
    server, make_database, declare, listener, tmp_path
):
    database = make_database(server)
    declare(stages.vlm_analyze, max_running=2)
    with closing(db.connect(database.settings())) as conn:
        apply(conn)
    add = "INSERT INTO jobs (current_step, status) SELECT %s, 'done' FROM generate_series(1, %s)"
    database.rows(add, "img_gen", 300)
    program = tmp_path / "limited.py"
    program.write_text(LIMITED.format(root=str(ROOT)))
    stage = "vlm_analyze"
    with StageApi(database.dsn, delay=lambda _: 0.005) as api:
        listener(database, "run", "--workers", "8", f"--stage={stage}", "--stage=vlm_judge",
                 api=api, program=program, SWEEP_INTERVAL=600)  # fmt: skip
        api.wait_for(lambda api: len(api.calls(stage=stage)) >= 20)
        database.rows(add, "overlay", 40)
        done = "SELECT count(*) = 300 FROM jobs WHERE current_step = %s AND status = 'done'"
        database.wait_for(done, stage)
        limited, others = api.calls(stage=stage), api.calls(stage="vlm_judge")
        until(lambda: all(r.finished for r in [*limited, *others]), "every call to end")
    assert (len(limited), len(others)) == (300, 40)
    assert most_at_once(limited) == 2
    # Their turn came while the long queue of the other stage was still there.
    last = max(r.finished for r in limited)
    assert max(r.time for r in others) < last
