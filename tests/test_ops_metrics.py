"""`metrics`: every number in a real situation, and counters that never fall."""

import re
from contextlib import closing

import pytest
from claims import connected
from scraping import PREFIX, STAGES, scrape
from test_plans import rows_read
from waiting import LONGEST_WAITS, gate, wait_for_call, wait_until_idle

import db
import history
from demo.stage_server import Answer
from ops.metrics import COUNTERS, OUTCOMES


def only(stage: str, value: float = 1) -> dict[str, float]:
    return dict.fromkeys(STAGES, 0) | {stage: value}


# --- situations ----------------------------------------------------------------------------


def test_every_situation_of_a_call_is_counted_where_it_is(database, api, listener, run_command):
    api.on("yolo_detect", lambda _: Answer(500, b"no memory"))
    api.on("planner", lambda _: Answer(503, headers={"Retry-After": "1800"}))
    api.on("overlay", lambda _: Answer(422, b"no text"))
    run_command(database, "pause", "vlm_judge")
    with gate(api):
        process = listener(database, api=api, RETRY_DELAY=3600, program=LONGEST_WAITS)
        for step in STAGES[:-1]:
            database.add_job(step, "done")
        process.wait_for_line("파이프라인 단계 실행 실패", count=3)
        wait_for_call(api, database.add_job("img_gen", "done"))
        database.rows(
            "UPDATE stage_calls SET due_at = now() - interval '3 h' WHERE stage = 'vlm_judge'"
        )
        found = scrape(database)
    assert found.by_stage("owed_calls") == dict.fromkeys(STAGES, 1)
    assert found.by_stage("running_calls") == only("vlm_analyze")
    assert found.by_stage("retrying_calls") == only("yolo_detect") | {"planner": 1}
    assert found.by_stage("stage_held") == only("planner")
    assert found.by_stage("given_up_calls") == only("overlay")
    assert found.by_stage("stage_paused") == only("vlm_judge")
    assert found.of("due_calls", stage="vlm_judge") == 1
    age = found.by_stage("oldest_due_age_seconds")
    assert age["vlm_judge"] >= 3 * 3600 > 600 > age["yolo_detect"]
    for stage, outcome in [("yolo_detect", "retry"), ("planner", "held"), ("overlay", "failed")]:
        attempts = {
            name: found.of("attempts_total", stage=stage, outcome=name) for name in OUTCOMES
        }
        assert attempts == dict.fromkeys(OUTCOMES, 0) | {outcome: 1}
    assert found.by_stage("stalled_jobs") == dict.fromkeys(STAGES, 0)
    assert found.of("listeners_connected") == 1


def test_idle_database_has_every_series_at_zero(database):
    found = scrape(database)
    assert set(found.counters().values()) == {0}
    for name in ("owed", "due", "running", "retrying", "given_up"):
        assert set(found.by_stage(f"{name}_calls").values()) == {0}
    assert set(found.by_stage("oldest_due_age_seconds").values()) == {0}
    assert found.of("listeners_connected") == 0
    triggers = ("job_state_change_trigger", "job_state_insert_trigger")
    assert [found.of("database_trigger_enabled", trigger=name) for name in triggers] == [1, 1]
    assert (found.of("routes_in_sync"), found.of("notification_queue_usage_ratio")) == (1, 0)


def test_listeners_are_counted_and_not_their_workers(database, api, listener, tmp_path):
    for _ in range(2):
        listener(database, "run", "--workers", "8", api=api)
    wait_until_idle(tmp_path, listeners=2)
    with gate(api):
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        assert scrape(database).of("listeners_connected") == 2


def test_accepted_job_that_does_not_change_is_stalled(database, accepting, caller):
    for _ in range(2):
        database.add_job("planner", "done")
    worker = caller(accepting.url)
    worker.call(), worker.call()
    assert scrape(database).by_stage("stalled_jobs") == dict.fromkeys(STAGES, 0)
    database.rows(
        "UPDATE jobs SET updated_at = now() - interval '1 h';"
        "UPDATE stage_attempts SET finished_at = now() - interval '1 h'"
    )
    assert scrape(database).by_stage("stalled_jobs") == only("overlay", 2)


def test_limit_is_there_only_of_stages_that_have_one(database):
    database.rows("UPDATE pipeline_stages SET max_running = 3 WHERE stage = 'planner'")
    found = scrape(database)
    limits = {key: n for key, n in found.items() if key[0] == PREFIX + "max_running_calls"}
    assert list(limits.values()) == [3]
    assert found.of("max_running_calls", stage="planner") == 3


# name: (what went wrong, the triggers that are not enabled)
TRIGGERS = {
    "disabled": ("ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger", ["change"]),
    "only for replicas": (
        "ALTER TABLE jobs ENABLE REPLICA TRIGGER job_state_insert_trigger",
        ["insert"],
    ),
    "dropped": ("DROP FUNCTION notify_job_state_change() CASCADE", ["change", "insert"]),
}


@pytest.mark.parametrize("damage", TRIGGERS)
def test_trigger_that_does_not_fire_is_not_enabled(database, damage):
    sql, damaged = TRIGGERS[damage]
    database.rows(sql)
    found = scrape(database)
    for name in ("change", "insert"):
        value = found.of("database_trigger_enabled", trigger=f"job_state_{name}_trigger")
        assert value == (name not in damaged)


def test_route_that_differs_from_stages_py_is_out_of_sync(database):
    database.rows("DELETE FROM pipeline_stages WHERE stage = 'planner'")
    assert scrape(database).of("routes_in_sync") == 0


# --- counters ------------------------------------------------------------------------------


def add_history(database) -> None:
    """A thousand attempts of every kind, over forty days."""
    database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
        " finished_at, outcome)"
        " SELECT gen_random_uuid(), n, 1, (%s::text[])[1 + n %% 5], 'w',"
        " at - make_interval(secs => 0.01 * n), at, (%s::text[])[1 + n %% 8]"
        " FROM generate_series(1, 1000) AS n,"
        " LATERAL (SELECT now() - make_interval(mins => 60 * n - 58) AS at) AS t",
        STAGES, list(OUTCOMES),
    )  # fmt: skip


def test_counters_stay_what_they_are_while_history_is_counted_and_pruned(database):
    add_history(database)
    first = scrape(database).counters()
    assert sum(n for key, n in first.items() if key[0] == PREFIX + "attempts_total") == 1000
    with connected(database) as conn:
        counted = history.count(conn, batch=400), history.prune(conn, 30, batch=100).pruned
        assert counted == (400, 100)
        assert scrape(database).counters() == first
        history.count(conn)
        history.prune(conn, 0.01)
    assert database.value("SELECT count(*) FROM stage_attempts") == 1
    assert scrape(database).counters() == first


def test_durations_are_those_of_accepted_calls(database):
    database.rows(
        "INSERT INTO stage_attempts SELECT gen_random_uuid(), 1, 1, 'planner', 'w',"
        " now() - make_interval(secs => seconds), now(), NULL, outcome FROM (VALUES"
        " (0.25, 'succeeded'), (2, 'succeeded'), (1000, 'succeeded'), (3, 'retry'), (0, 'skipped'))"
        " AS t (seconds, outcome)"
    )
    found = scrape(database)
    name, stage = "call_duration_seconds", "planner"
    below = {
        le: found.of(f"{name}_bucket", stage=stage, le=le)
        for le in ("0.1", "0.25", "1", "2.5", "600", "+Inf")
    }
    assert below == {"0.1": 0, "0.25": 1, "1": 1, "2.5": 2, "600": 2, "+Inf": 3}
    assert found.of(f"{name}_count", stage=stage) == 3
    assert found.of(f"{name}_sum", stage=stage) == pytest.approx(1002.25, abs=1e-6)
    assert found.of("attempts_total", stage=stage, outcome="retry") == 1


def test_history_of_a_stage_that_is_no_more_is_still_counted(database):
    add_history(database)
    before = scrape(database).counters()
    database.rows("DELETE FROM pipeline_stages WHERE stage = 'planner'")
    assert scrape(database).counters() == before


def test_history_that_was_counted_is_not_read_again(each_database):
    database = each_database
    add_history(database)
    with closing(db.connect(database.settings())) as conn:

        def attempts_read() -> int:
            return rows_read(conn, lambda: db.execute(conn, COUNTERS, history.BOUNDS))[
                "stage_attempts"
            ]

        assert attempts_read() == 1000
        history.count(conn)
        assert attempts_read() == 1


def test_outcomes_are_those_that_the_history_may_have(database):
    check = database.value(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid = 'stage_attempts'::regclass AND contype = 'c'"
    )
    assert set(re.findall(r"'(\w+)'::text", check)) == set(OUTCOMES)
