"""End to end, with real processes: what the whole promises."""

import functools
import os
import signal
from collections import Counter
from datetime import timedelta

import pytest
from claims import LEASE_OVER
from variants import VARIANTS, stage
from waiting import (
    LISTENERS,
    LISTENING,
    PATIENCE,
    gate,
    until,
    wait_for_call,
    wait_for_sweeps,
    wait_until_idle,
)

import pipeline
from demo.database import free_port
from demo.five_stages import overlay, planner
from demo.stage_api import StageApi
from demo.stage_server import Answer

STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]
ALL_THROUGH = "SELECT count(*) = %s FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
SUCCEEDED = "SELECT count(*) = %s FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


def test_finished_job_passes_through_all_five_stages(database, api, listener):
    process = listener(database, api=api)
    process.wait_for_line(LISTENING)
    job = database.add_job("img_gen", "queued")
    database.move(job, "img_gen", "done")
    database.wait_for(ALL_THROUGH, 1)
    assert [call.stage for call in api.calls(job)] == STAGES
    assert process.stop() == 0


def test_row_inserted_already_done_is_called(database, api, listener, tmp_path):
    listener(database, api=api, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    job = database.add_job("overlay", "done")
    database.wait_for(ALL_THROUGH, 1)
    assert [call.stage for call in api.calls(job)] == ["vlm_judge"]


def test_jobs_that_finished_while_no_listener_ran_are_called(database, api, listener):
    inserted = database.add_job("overlay", "done")
    updated = database.add_job("overlay", "running")
    database.move(updated, "overlay", "done")
    listener(database, api=api)
    database.wait_for(ALL_THROUGH, 2)
    assert {call.job_id for call in api.calls()} == {inserted, updated}
    assert len(api.calls()) == 2


@pytest.mark.slow
def test_four_listeners_call_every_stage_of_200_jobs_exactly_once(
    database, api, listener, tmp_path
):
    processes = [listener(database, api=api) for _ in range(4)]
    wait_until_idle(tmp_path, listeners=4)
    database.rows(
        "INSERT INTO jobs (tenant_id, current_step, status)"
        " SELECT 'tenant', 'img_gen', 'done' FROM generate_series(1, 200)"
    )
    database.wait_for(ALL_THROUGH, 200)
    counts = Counter((call.job_id, call.stage) for call in api.calls())
    assert len(counts) == 1000
    assert set(counts.values()) == {1}
    assert [process.stop() for process in processes] == [0] * 4
    assert database.value("SELECT count(DISTINCT worker) FROM stage_attempts") == 4
    assert database.rows(
        "SELECT outcome, count(*) FROM stage_attempts WHERE outcome <> 'skipped' GROUP BY 1"
    ) == [("succeeded", 1000)]


def test_workers_are_calls_at_once(database, api, listener):
    process = listener(database, "run", "--workers", "3", api=api)
    with gate(api, answer=Answer(200)) as opened:
        jobs = [database.add_job() for _ in range(4)]
        api.wait_for(lambda api: len(api.calls()) == 3, PATIENCE)
        assert len(process.children()) == 3
        assert sum(database.owed(job).attempts for job in jobs) == 3  # nothing is claimed ahead
        opened.set()
        database.wait_for("SELECT count(*) = 4 FROM stage_attempts WHERE outcome = 'succeeded'")
    assert len(api.calls()) == 4


def test_rollback_and_update_without_change_call_nothing(database, api, listener, tmp_path):
    listener(database, api=api)
    wait_until_idle(tmp_path)
    job = database.add_job("overlay", "running")
    database.rows("BEGIN")
    database.move(job, "overlay", "done")
    database.rows("ROLLBACK")
    untouched = database.add_job("vlm_judge", "done")
    database.move(untouched, "vlm_judge", "done")
    last = database.add_job("overlay", "done")
    database.wait_for(SUCCEEDED, 1, last)
    assert [call.job_id for call in api.calls()] == [last]


def test_killed_host_is_followed_by_the_same_calls_after_their_leases(
    database, api, listener, tmp_path
):
    with gate(api, answer=Answer(200)) as opened:
        first = listener(database, "run", "--workers", "16", api=api,
                         STAGE_TIMEOUT=300, LEASE_MARGIN=20)  # fmt: skip
        jobs = [database.add_job() for _ in range(16)]
        api.wait_for(lambda api: len(api.calls()) == 16)
        for job in jobs:
            first_try = database.owed(job)
            assert first_try.due_at - first_try.started_at == timedelta(seconds=320)
        first.kill()  # with its workers
        listener(database, "run", "--workers", "16", api=api, SWEEP_INTERVAL=0.1)
        wait_for_sweeps(database)
        assert len(api.calls()) == 16
        database.rows(LEASE_OVER)
        api.wait_for(lambda api: len(api.calls()) == 32)
        opened.set()
        for job in jobs:
            database.wait_for(SUCCEEDED, 1, job)
    for job in jobs:
        before, again = api.calls(job)
        assert again.headers["Idempotency-Key"] == before.headers["Idempotency-Key"]
        assert (before.headers["X-Attempt"], again.headers["X-Attempt"]) == ("1", "2")
        lost, succeeded = database.attempts(job)
        assert (lost.attempt, lost.outcome) == (1, "lost")
        assert (succeeded.attempt, succeeded.outcome) == (2, "succeeded")
        assert lost.worker != succeeded.worker


def test_killed_workers_are_replaced_and_their_calls_alone_made_again(database, api, listener):
    with gate(api, answer=Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api, SWEEP_INTERVAL=0.1)
        jobs = [database.add_job() for _ in range(16)]
        api.wait_for(lambda api: len(api.calls()) == 16)
        owed = {job: database.owed(job).due_at for job in jobs}
        workers = process.children()
        for worker in workers[::2]:
            os.kill(worker, signal.SIGKILL)
        line = process.wait_for_line("실행 실패", count=8)
        assert "error=its worker was killed by SIGKILL → 리스 만료 후" in line
        database.wait_for("SELECT count(*) = 8 FROM stage_leases WHERE unanswered")
        assert {job: database.owed(job).due_at for job in jobs} == owed
        opened.set()
        database.wait_for("SELECT count(*) = 8 FROM stage_attempts WHERE outcome = 'succeeded'")
        database.rows(LEASE_OVER)
        for job in jobs:
            database.wait_for(SUCCEEDED, 1, job)
    assert len(process.children()) == 16
    assert set(process.children()) & set(workers) == set(workers[1::2])
    made = Counter(tuple(attempt.outcome for attempt in database.attempts(job)) for job in jobs)
    assert made == {("succeeded",): 8, ("unknown", "succeeded"): 8}
    assert all(len(api.calls(job)) == len(database.attempts(job)) for job in jobs)
    assert process.stop() == 0


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_database_restart_loses_nothing_and_repeats_nothing(
    mode, own_server, make_database, listener, tmp_path
):
    database = make_database(own_server)
    with StageApi(database.dsn) as api, gate(api, answer=Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api)
        wait_until_idle(tmp_path)
        own_server.embedded.restart(mode)
        process.wait_for_line(LISTENING, count=2)
        database.conn = database.connect()
        jobs = [database.add_job() for _ in range(16)]
        api.wait_for(lambda api: len(api.calls()) == 16)
        own_server.embedded.restart(mode)
        opened.set()
        database.conn = database.connect()
        for job in jobs:
            database.wait_for(SUCCEEDED, 1, job)
            assert database.owed(job) is None
        assert process.stop() == 0
        assert sorted(call.job_id for call in api.calls()) == sorted(jobs)


def test_once_drains_what_is_due_and_exits(database, api, listener):
    jobs = [database.add_job() for _ in range(20)]
    assert listener(database, "run", "--once", "--workers", "3", api=api).wait() == 0
    assert [database.state(job) for job in jobs] == [("vlm_judge", "done")] * 20
    assert len(api.calls()) == len(jobs) * len(STAGES)
    assert database.value("SELECT count(*) FROM stage_calls") == 0


def test_stage_option_limits_what_is_called(database, api, listener):
    job, other = database.add_job("yolo_detect", "done"), database.add_job("img_gen", "done")
    process = listener(
        database, "run", "--once", "--stage", "planner", "--stage", "overlay", api=api
    )
    assert process.wait() == 0
    assert [call.stage for call in api.calls()] == ["planner", "overlay"]
    assert database.state(job) == ("overlay", "done")
    assert database.owed(other).attempts == 0


def test_disabled_listener_idles_until_told_to_stop(database, api, listener):
    job = database.add_job()
    process = listener(database, api=api, ENABLE_JOB_STATE_LISTENER="false")
    process.wait_for_line("ENABLE_JOB_STATE_LISTENER=false")
    assert process.stop() == 0
    process.wait_for_line("Job State Listener 중지됨")
    assert database.owed(job).attempts == 0
    assert not api.calls()


def test_disabled_listener_that_runs_once_says_so_and_ends(database, listener):
    job = database.add_job()
    process = listener(database, "run", "--once", LISTENER_ENABLED="false")
    assert process.wait() == 0
    [line] = process.lines
    assert line.endswith("비활성화됨: LISTENER_ENABLED=false in the environment")
    assert database.owed(job).attempts == 0


def test_listener_that_is_enabled_by_name_runs_beside_a_shared_file(database, api, listener):
    shared = {"ENABLE_JOB_STATE_LISTENER": "false", "LISTENER_ENABLED": "true"}
    listener(database, api=api, **shared)
    database.add_job("overlay", "done")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")


def test_listener_that_is_off_by_name_idles_whatever_is_shared(database, listener):
    process = listener(database, LISTENER_ENABLED="false", ENABLE_JOB_STATE_LISTENER="true")
    process.wait_for_line("비활성화됨: LISTENER_ENABLED=false in the environment")
    assert process.stop() == 0


def test_last_connections_are_said_at_the_start(database, make_role, listener):
    name = make_role(database)
    database.rows(f"ALTER ROLE {name} SUPERUSER CONNECTION LIMIT 2")
    process = listener(database, DB_USER=name, DB_PASSWORD=name)
    process.wait_for_line("남은 데이터베이스 연결이 1개뿐")


def test_disabled_listener_needs_no_database(database, listener):
    process = listener(database, ENABLE_JOB_STATE_LISTENER="false", DB_HOST="")
    process.wait_for_line("ENABLE_JOB_STATE_LISTENER=false")
    assert process.stop() == 0


def test_application_is_not_blocked_during_a_call(database, api, listener):
    with gate(api, answer=Answer(200)) as opened:
        listener(database, api=api)
        job = database.add_job()
        wait_for_call(api, job)
        idle = "bool_and(state = 'idle' AND xact_start IS NULL)"
        database.wait_for(f"SELECT {idle} FROM pg_stat_activity WHERE {LISTENERS}")
        database.rows("SET lock_timeout = '10s'")
        database.move(job, "vlm_judge", "done")
        database.rows("DELETE FROM jobs WHERE job_id = %s", job)
        opened.set()
        database.wait_for(SUCCEEDED, 1, job)


def test_given_up_job_does_not_stop_the_others(database, api, listener, tmp_path):
    poisoned = database.add_job()
    api.on("vlm_analyze", lambda request: Answer(400) if request.job_id == poisoned else None)
    listener(database, api=api)
    jobs = [database.add_job() for _ in range(3)]
    database.wait_for(ALL_THROUGH, 3)
    until(lambda: database.owed(poisoned).given_up, "the end of its call")
    assert len(api.calls(poisoned)) == 1
    assert {call.job_id for call in api.calls()} == {poisoned, *jobs}


def test_throttled_stage_does_not_stop_the_other_stages(database, api, listener):
    api.on("yolo_detect", lambda _request: Answer(503, headers={"Retry-After": "3600"}))
    held = [database.add_job("vlm_analyze", "done") for _ in range(5)]
    listener(database, "run", "--workers", "1", api=api)
    database.wait_for("SELECT held_until > now() FROM pipeline_stages WHERE stage = 'yolo_detect'")
    job = database.add_job("yolo_detect", "done")
    database.wait_for(ALL_THROUGH, 1)
    assert [call.stage for call in api.calls(job)] == STAGES[2:]
    assert len(api.calls(stage="yolo_detect")) == 1
    assert all(database.owed(job).attempts == database.owed(job).free_attempts for job in held)


async def asynchronous(call):
    return call.post("/api/x")


def no_argument():
    pass


def second_argument(call, note):
    pass


def yielding(call):
    yield call.post("/api/x")


async def yielding_later(call):
    yield call.post("/api/x")


def with_more(function):
    """A decorator that gives the function a second argument."""

    @functools.wraps(function)
    def wrapper(call):
        return function(call, "note")

    return wrapper


TWICE = {pipeline.JOBS("img_gen", "done"): overlay, ("img_gen", "done"): planner}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (TWICE, r"^\(img_gen, done\) is there twice"),
        ({("img_gen", "done"): asynchronous}, "^asynchronous: allowed is `def`"),
        ({("img_gen", "done"): yielding_later}, "^yielding_later: allowed is `def`"),
        ({("img_gen", "done"): yielding}, "^yielding: .* does not `yield`"),
        (
            {VARIANTS("img_gen", "done"): functools.partial(overlay)},
            r"^Table\('jobs_variants'\)\('img_gen', 'done'\): allowed is a function \(`def`\), "
            "not a value of type partial$",
        ),
        ({("img_gen", "done"): "overlay"}, "^.*, not a value of type str$"),
        (
            {VARIANTS.every("img_gen", ""): overlay},
            r"^Table\('jobs_variants'\).every\('img_gen', ''\) is no state: allowed is \(STEP",
        ),
        ({}, "^it must be a dict of states and stage functions, and it is empty$"),
        ({VARIANTS: overlay}, r"^Table\('jobs_variants'\) is no state"),
        ({("img_gen", "done"): no_argument}, "^no_argument: .* takes one argument, the call"),
        ({("img_gen", "done"): second_argument}, "^second_argument: .* takes one argument"),
        ({("a", "b"): lambda call: 1, ("c", "d"): lambda call: 2}, "of jobs are called <lambda>:"),
        ({("a", "b"): stage("planner"), ("c", "d"): stage("planner")}, "are called planner: a"),
        (
            {("a", "b"): stage("planner"), VARIANTS("c", "d"): stage("Planner")},
            "^planner and Planner differ by case alone: STAGE_API_URL_PLANNER would be of both",
        ),
    ],
)
def test_pipeline_that_could_not_make_all_its_calls_is_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        pipeline.check(bad)


def test_function_of_several_states_or_tables_and_one_that_is_wrapped_are_none_of_these():
    states = {("a", "b"): planner, ("c", "d"): planner, VARIANTS("a", "b"): stage("planner")}
    states |= {("e", word): with_more(second_argument) for word in ("done", "failed")}
    assert pipeline.check(states) is None


def test_refused_connection_costs_no_attempt_and_is_called_once_it_is_back(database, listener):
    api = StageApi(database.dsn, port=free_port())
    process = listener(database, api=api, MAX_ATTEMPTS=1)
    job = database.add_job("overlay", "done")
    process.wait_for_line("파이프라인 단계 실행 실패")
    with api:
        database.wait_for(SUCCEEDED, 1, job)
    assert len(api.calls(job)) == 1
    assert {row.outcome for row in database.attempts(job)} == {"held", "succeeded"}
