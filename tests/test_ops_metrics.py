"""`metrics`: every number with the real thing behind it, in a form that Prometheus reads."""

import os
import re
import resource
import shutil
import subprocess
import time
from contextlib import closing

import pytest
from claims import connected
from prometheus_client.parser import text_string_to_metric_families
from test_ops_mistakes import CONTROL, HOSTILE, NOWHERE
from test_plans import rows_read
from waiting import AWAY, gate, wait_for_call, wait_until_idle

import db
import upkeep
from demo.stage_server import Answer
from ops.metrics import COUNTERS, FAMILIES, OUTCOMES, Page
from ops.metrics import scrape as read_metrics
from ops.problem import Problem
from ops.whole import write_whole

PROMTOOL = shutil.which("promtool")
PREFIX = "job_state_listener_"
STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]


class Scraped(dict):
    """The samples of a text, as Prometheus' own parser reads them."""

    def __init__(self, text: str):
        assert text.endswith("\n") and not CONTROL.search(text), text
        self.families = list(text_string_to_metric_families(text))
        for sample in (sample for family in self.families for sample in family.samples):
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in self, f"{key} is there twice"
            self[key] = sample.value

    def of(self, name: str, **labels: str) -> float:
        return self[(PREFIX + name, *sorted(labels.items()))]

    def by_stage(self, name: str) -> dict[str, float]:
        return {stage: self.of(name, stage=stage) for stage in STAGES}

    def counters(self) -> dict[tuple, float]:
        found = {key: n for key, n in self.items() if re.search("_total|_duration_", key[0])}
        found.pop((PREFIX + "scrape_duration_seconds",))
        assert len(found) == len(STAGES) * (len(OUTCOMES) + len(upkeep.BUCKETS) + 3)
        return found


def scrape(database) -> Scraped:
    """What the command would print, parsed."""
    page, failure = read_metrics(database.settings())
    assert failure is None
    return Scraped(page.text())


def only(stage: str, value: float = 1) -> dict[str, float]:
    return dict.fromkeys(STAGES, 0) | {stage: value}


# --- situations ----------------------------------------------------------------------------


def test_every_situation_of_a_call_is_counted_where_it_is(database, api, listener, run_command):
    api.on("yolo_detect", lambda _: Answer(500, b"no memory"))
    api.on("planner", lambda _: Answer(503, headers={"Retry-After": "1800"}))
    api.on("overlay", lambda _: Answer(422, b"no text"))
    run_command(database, "pause", "vlm_judge")
    with gate(api):
        process = listener(database, api=api, RETRY_DELAY=3600)
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
    assert found.of("workers_connected") == 1


def test_idle_database_has_every_series_at_zero(database):
    found = scrape(database)
    assert set(found.counters().values()) == {0}
    for name in ("owed", "due", "running", "retrying", "given_up"):
        assert set(found.by_stage(f"{name}_calls").values()) == {0}
    assert set(found.by_stage("oldest_due_age_seconds").values()) == {0}
    assert found.of("workers_connected") == 0
    triggers = ("job_state_change_trigger", "job_state_insert_trigger")
    assert [found.of("database_trigger_enabled", trigger=name) for name in triggers] == [1, 1]
    assert (found.of("routes_in_sync"), found.of("notification_queue_usage_ratio")) == (1, 0)


def test_workers_are_counted_once_each_while_they_work(database, api, listener, tmp_path):
    listener(database, "run", "--workers", "2", api=api)
    wait_until_idle(tmp_path, workers=2)
    with gate(api):
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        assert scrape(database).of("workers_connected") == 2


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
        counted = upkeep.count(conn, batch=400), upkeep.prune(conn, 30, batch=100)
        assert counted == (400, 100)
        assert scrape(database).counters() == first
        assert upkeep.keep_history(conn, 0.01) is False
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
            return rows_read(conn, lambda: db.execute(conn, COUNTERS, upkeep.BOUNDS))[
                "stage_attempts"
            ]

        assert attempts_read() == 1000
        upkeep.count(conn)
        assert attempts_read() == 1


def test_outcomes_are_those_that_the_history_may_have(database):
    check = database.value(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid = 'stage_attempts'::regclass AND contype = 'c'"
    )
    assert set(re.findall(r"'(\w+)'::text", check)) == set(OUTCOMES)


# --- what is written -----------------------------------------------------------------------


@pytest.fixture
def everything(database, run_command) -> str:
    """A text in which no family is missing."""
    database.rows("UPDATE pipeline_stages SET max_running = 3 WHERE stage = 'planner'")
    return run_command(database, "metrics").out


def test_every_family_is_written_with_its_type_and_help(everything):
    families = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            family.documentation,
        )
        for family in Scraped(everything).families
    }
    assert families == FAMILIES


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_names_and_units_are_as_prometheus_wants_them(everything):
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=everything, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_hostile_stage_stays_in_its_label(database):
    name = HOSTILE + '"} 1\nforged{le="\\'
    database.add_job("planner", "done", HOSTILE)
    database.rows("UPDATE stage_calls SET stage = %s, last_error = %s", name, HOSTILE)
    database.rows(
        "INSERT INTO stage_attempts SELECT job_id, call_id, 1, stage, 'w', now(), now(), 500,"
        " 'failed', %s FROM stage_calls",
        HOSTILE,
    )
    found = scrape(database)
    stages = {dict(key[1:])["stage"] for key in found if key[0] == PREFIX + "owed_calls"}
    [hostile] = stages - set(STAGES)
    assert hostile.count("\n") == 2
    assert hostile.replace("\\x1b", "\x1b").endswith('"} 1\nforged{le="\\')
    assert found.of("attempts_total", stage=hostile, outcome="failed") == 1


def test_no_secret_and_no_data_of_a_job_is_written(database, run_command):
    job = database.add_job("planner", "done", "acme-tenant")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', last_error = 'token s3cr3t-w0rd'")
    done = run_command(database, "metrics", DB_PASSWORD="s3cr3t-w0rd", STAGE_API_TOKEN="t0ken-w0rd")
    for text in ("s3cr3t", "t0ken", "acme", job):
        assert text not in done.out + done.err


def test_time_of_the_scrape_and_how_long_it_took_are_told(database):
    before = time.time()
    found = scrape(database)
    longest = time.time() - before + 0.001  # they are rounded
    assert 0 <= found.of("scrape_timestamp_seconds") - before + 0.001 <= longest + 0.001
    assert 0 < found.of("scrape_duration_seconds") <= longest
    assert found.of("up") == 1


# --- the database is away ------------------------------------------------------------------

SCRAPE = {"up", "scrape_timestamp_seconds", "scrape_duration_seconds"}


def says_down(text: str) -> bool:
    found = Scraped(text)
    assert {key[0].removeprefix(PREFIX) for key in found} == SCRAPE
    return found.of("up") == 0


def test_database_that_is_away_is_not_up_and_the_exit_code_says_so(run_command):
    done = run_command(NOWHERE, "metrics", DB_PASSWORD="s3cr3t-w0rd")
    assert says_down(done.out)
    assert done.refused(3).startswith("the database cannot be reached: ")
    assert "s3cr3t" not in done.err


def test_file_says_that_the_database_is_away(database, run_command, tmp_path):
    file = tmp_path / "listener.prom"
    assert run_command(database, "metrics", "--out", str(file)).lines == [""]
    assert Scraped(file.read_text()).of("up") == 1
    done = run_command(database, "metrics", "--out", str(file), **AWAY)
    assert done.refused(3).startswith("the database cannot be reached: ")
    assert done.out == "" and says_down(file.read_text())


def test_database_without_our_tables_is_not_up(empty_database, run_command):
    done = run_command(empty_database, "metrics")
    assert says_down(done.out)
    assert "run `make trigger` (python listener.py install)" in done.refused(1)


def test_nothing_half_read_is_written(database, run_command):
    """The stages could be read, what comes after them could not."""
    database.rows("DROP TABLE stage_totals")
    done = run_command(database, "metrics")
    assert done.code == 1 and says_down(done.out)


def test_missing_setting_leaves_the_file_as_it_is(run_command, tmp_path):
    file = tmp_path / "listener.prom"
    file.write_text("old")
    done = run_command(NOWHERE, "metrics", "--out", str(file), DB_HOST="")
    assert done.refused(2).startswith("no database is set")
    assert file.read_text() == "old"


# --- --out ---------------------------------------------------------------------------------


def test_file_is_replaced_as_a_whole_and_everyone_may_read_it(database, run_command, tmp_path):
    file = tmp_path / "out" / "listener.prom"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o600)
    with open(file) as reader:  # a collector that has it open sees all of the old one
        assert run_command(database, "metrics", "--out", str(file)).lines == [""]
        assert reader.read() == "old"
    assert Scraped(file.read_text()).of("up") == 1
    assert file.stat().st_mode & 0o777 == 0o644
    assert os.listdir(file.parent) == ["listener.prom"]


def test_directory_that_is_not_there_is_one_line(database, run_command, tmp_path):
    file = tmp_path / "nowhere" / "listener.prom"
    done = run_command(database, "metrics", "--out", str(file))
    assert done.refused(1) == f"{file} cannot be written: No such file or directory"


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "listener.prom"
    file.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(Problem, match=r"listener.prom cannot be written: .*; it is as it was"):
            write_whole(file, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["listener.prom"]


def test_what_is_no_file_is_not_replaced(database, run_command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused = run_command(database, "metrics", "--out", str(pipe)).refused(1)
    assert refused == f"{pipe} is not a file that could be replaced; nothing was written"
    assert pipe.is_fifo()
    assert "is a directory" in run_command(database, "metrics", "--out", str(tmp_path)).refused(2)


def test_page_refuses_a_metric_that_is_not_documented():
    with pytest.raises(KeyError):
        Page().add("made_up", 1)


def test_role_that_may_only_read_the_views_is_told_where_the_grants_are(
    database, run_command, make_role
):
    role = make_role(database)
    run_command(database, "install", "--reader", role)
    done = run_command(database, "metrics", DB_USER=role, DB_PASSWORD=role)
    assert "see 'Roles and grants' in README.md" in done.refused(1)
