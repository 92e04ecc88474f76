"""`jobs`: how many are in which state, and which ones they are."""

import json
import re

import pytest
from busy import BEFORE, TIME
from claims import connected
from waiting import gate, wait_for_call

import troubles

HEADER = r"job +state +since +{} +tenant"
UPDATED = "since: jobs.updated_at"
AGO = "UPDATE jobs SET updated_at = now() - %s::interval WHERE job_id = %s"


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


@pytest.fixture
def own_database(server, make_database):
    """One whose tables a test may alter."""
    return make_database(server)


def listed(run_command, database, *args: str, **settings) -> list[str]:
    """The lines below the heading, without the one that says what the times are."""
    done = run_command(database, "jobs", *args, **settings)
    assert done.code == 0
    assert re.match(r"job +state +since +(owes|given up|stalled|failed) +tenant$", done.lines[0])
    return [
        line for line in done.lines[1:]
        if not line.startswith("since: ") and "; ./jsl resume " not in line
    ]  # fmt: skip


def ids(run_command, database, *args: str) -> list[str]:
    said = json.loads(run_command(database, "jobs", *args, "--json").out)
    return [job["job_id"] for job in said["jobs"]]


# --- how many ------------------------------------------------------------------------------


def test_states_are_counted_in_the_order_of_the_pipeline(database, run_command):
    for step, status in [
        ("vlm_judge", "done"), ("vlm_judge", "running"), ("planner", "failed"), ("zoo", "x"),
        ("img_gen", "done"), ("img_gen", "queued"), ("yolo_detect", "done"),
        ("yolo_detect", "done"), ("vlm_analyze", "running"),
    ]:  # fmt: skip
        database.add_job(step, status)
    database.rows("INSERT INTO jobs (current_step, status) VALUES (NULL, NULL)")
    database.rows("UPDATE stage_calls SET due_at = 'infinity' WHERE stage = 'vlm_analyze'")
    done = run_command(database, "jobs")
    assert [re.split(r" {2,}", line) for line in done.lines] == [
        ["step", "status", "jobs", "leads to", "owed", "given up"],
        ["img_gen", "queued", "1", "-", "0", "0"],
        ["img_gen", "done", "1", "vlm_analyze", "1", "1"],
        ["vlm_analyze", "running", "1", "-", "0", "0"],
        ["yolo_detect", "done", "2", "planner", "2", "0"],
        ["planner", "failed", "1", "-", "0", "0"],
        ["vlm_judge", "running", "1", "-", "0", "0"],
        ["vlm_judge", "done", "1", "-", "0", "0"],
        ["zoo", "x", "1", "-", "0", "0"],
        ["-", "-", "1", "-", "0", "0"],
    ]
    said = json.loads(run_command(database, "jobs", "--json").out)
    assert said["joins"] == []
    assert said["states"][1] == {
        "table_name": "jobs", "current_step": "img_gen", "status": "done", "jobs": 1,
        "stage": "vlm_analyze", "owed": 1, "given_up": 1,
    }  # fmt: skip


def test_no_jobs_at_all(database, run_command):
    assert run_command(database, "jobs").lines[-1] == "there are no jobs"
    assert run_command(database, "jobs", "--given-up").lines == ["no job matches"]


# --- which ---------------------------------------------------------------------------------


def test_jobs_of_a_stage_tell_what_they_owe(database, run_command, busy):
    def only(stage: str) -> str:
        [line] = listed(run_command, database, "--stage", stage)
        job, rest = line.split("  ", 1)
        assert job == busy[stage]
        assert rest.startswith(f"{BEFORE[stage]}, done") and rest.endswith("  tenant")
        return re.split(r" {2,}", rest)[2]

    assert re.fullmatch(rf"vlm_analyze: \S+ is on it since {TIME}", only("vlm_analyze"))
    waits = r"yolo_detect: due in \d+ (min|s); last error: HTTP 500: no memory"
    assert re.fullmatch(waits, only("yolo_detect"))
    assert only("planner") == "planner: due now; last error: HTTP 503"
    assert only("overlay") == "overlay: given up: HTTP 422: no text"
    assert only("vlm_judge") == "vlm_judge: due now"


def test_jobs_of_a_stage_are_also_those_that_rest_in_it(database, run_command):
    database.add_job("planner", "done"), database.add_job("overlay", "running")
    rest = {database.add_job("planner", status) for status in ("running", "failed")}
    assert set(ids(run_command, database, "--stage", "planner")) == rest


def test_job_that_its_stage_has_set_running_is_being_called(database, api, listener, run_command):
    with gate(api):
        listener(database, api=api)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        database.move(job, "vlm_analyze", "running")
        [line] = listed(run_command, database, "--stage", "vlm_analyze")
    assert re.search(rf"  vlm_analyze: \S+ is on it since {TIME}  ", line)


def test_given_up_jobs_tell_their_error_and_since_when(database, run_command, busy):
    database.add_job("planner", "done")
    done = run_command(database, "jobs", "--given-up")
    heading, line, times = done.lines
    assert re.fullmatch(HEADER.format("given up"), heading)
    job, state, since, told, tenant = re.split(r" {2,}", line)
    assert (job, state, tenant) == (busy["overlay"], "planner, done", "tenant")
    assert told == "overlay: HTTP 422: no text"
    assert re.fullmatch(r"\d+ s", since)
    assert times == "since: when the call was given up"
    assert ids(run_command, database, "--given-up", "--since", "1h") == [busy["overlay"]]
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '2 h'")
    assert ids(run_command, database, "--given-up", "--since", "1h") == []


def test_letters_that_json_escaped_can_be_read(database, run_command, busy):
    error = r'HTTP 422: {"detail": "\ud14d\uc2a4\ud2b8 \ud83d\ude00 \u0022"}'
    database.rows("UPDATE stage_calls SET last_error = %s WHERE stage = 'overlay'", error)
    said = 'HTTP 422: {"detail": "텍스트 😀 \\u0022"}'
    assert said in listed(run_command, database, "--given-up")[0]
    assert said in run_command(database, "job", busy["overlay"]).out
    owes = json.loads(run_command(database, "job", busy["overlay"], "--json").out)["owes"]
    assert owes["last_error"] == said


def test_long_error_is_cut_in_the_list_and_whole_in_json(database, run_command, busy):
    database.rows("UPDATE stage_calls SET last_error = repeat('x', 1000) WHERE stage = 'overlay'")
    assert "x" * 40 + "…" in listed(run_command, database, "--given-up")[0].replace("overlay: ", "")
    [job] = json.loads(run_command(database, "jobs", "--given-up", "--json").out)["jobs"]
    assert job["last_error"] == "x" * 1000


def test_options_narrow_the_list_down_together(database, run_command):
    jobs = {
        (stage, tenant): database.add_job(BEFORE[stage], "done", tenant)
        for stage in ("planner", "overlay")
        for tenant in ("acme", "zoo")
    }
    assert ids(run_command, database, "--tenant", "zoo", "--stage", "planner") == [
        jobs["planner", "zoo"]
    ]
    assert ids(run_command, database, "--tenant", "zoo", "--given-up") == []
    assert len(ids(run_command, database, "--tenant", "acme")) == 2
    database.rows(AGO, "3 h", jobs["planner", "acme"])
    assert ids(run_command, database, "--tenant", "acme", "--since", "2h") == [
        jobs["overlay", "acme"]
    ]
    assert ids(run_command, database, "--tenant", "nobody") == []


def test_newest_come_first_and_what_is_left_out_is_said(database, run_command):
    jobs = [database.add_job("planner", "done") for _ in range(4)]
    for hours, job in enumerate(jobs):
        database.rows(AGO, f"{hours} h", job)
    done = run_command(database, "jobs", "--stage", "overlay", "--limit", "3")
    assert [line.split()[0] for line in done.lines[1:4]] == jobs[:3]
    assert done.lines[4:] == [UPDATED, "more than 3: --limit 30, or narrow it down"]
    said = json.loads(run_command(database, "jobs", "--limit", "3", "--since", "9h", "--json").out)
    assert (len(said["jobs"]), said["more"], said["since"]) == (3, True, "jobs.updated_at")
    assert run_command(database, "jobs", "--since", "9h", "--limit", "4").lines[5:] == [UPDATED]


# --- since when ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "since", ["90m", "1.5h", "0.1d", "2026-01-01", "2026-01-01 05:12", "2026-01-01T05:12:33Z"]
)
def test_span_or_time(database, run_command, since):
    new, old = database.add_job("planner"), database.add_job("planner")
    database.rows("UPDATE jobs SET updated_at = '2025-12-31' WHERE job_id = %s", old)
    assert ids(run_command, database, "--since", since) == [new]


def test_time_without_a_zone_is_that_of_this_machine(database, run_command):
    job = database.add_job()
    database.rows("UPDATE jobs SET updated_at = '2026-01-01 00:30+09'")
    for zone, found in (("KST-9", [job]), ("UTC", [])):
        done = run_command(database, "jobs", "--since", "2026-01-01", "--json", TZ=zone)
        assert [row["job_id"] for row in json.loads(done.out)["jobs"]] == found


@pytest.mark.parametrize("updated", ["DROP updated_at", "ALTER updated_at TYPE timestamp"])
def test_created_at_counts_where_no_updated_at_can_be_trusted(own_database, run_command, updated):
    own_database.rows(f"ALTER TABLE jobs {updated}")
    new, old = own_database.add_job("planner"), own_database.add_job("planner")
    own_database.rows("UPDATE jobs SET created_at = now() - interval '3 h' WHERE job_id = %s", old)
    done = run_command(own_database, "jobs", "--since", "2h")
    assert [done.lines[1].split()[0], *done.lines[2:]] == [new, "since: jobs.created_at"]


@pytest.fixture
def timeless(own_database):
    """A table jobs that has no time of its own."""
    own_database.rows(
        "ALTER TABLE jobs DROP created_at, DROP updated_at;"
        "ALTER TABLE jobs ADD updated_at text DEFAULT 'never'"
    )
    return own_database


def test_own_record_counts_where_jobs_has_no_time(timeless, run_command):
    owing, old, tried, idle = (timeless.add_job("planner", s) for s in ("done", "done", "x", "y"))
    timeless.rows(
        "UPDATE stage_calls SET created_at = now() - '3 h'::interval WHERE job_id = %s", old
    )
    timeless.rows(
        "INSERT INTO stage_attempts SELECT %s, 1, 1, 'planner', 'w', now(), now(), 0, 'succeeded'",
        tried,
    )
    done = run_command(timeless, "jobs", "--since", "2h")
    assert {line.split()[0] for line in done.lines[1:3]} == {owing, tried}
    assert done.lines[3:] == [
        "since: when a call was last recorded or tried (jobs has no updated_at)"
    ]
    everything = run_command(timeless, "jobs", "--tenant", "tenant").lines
    assert everything[3].split()[0] == old
    assert everything[4].startswith(f"{idle}  planner, y")


def test_time_before_the_history_begins_cannot_be_compared(timeless, run_command):
    refused = run_command(timeless, "jobs", "--since", "31d").refused(1)
    assert refused == (
        "jobs has neither updated_at nor created_at of type timestamptz, and the history that is "
        "asked instead begins 30 days ago (HISTORY_DAYS): give a later --since"
    )


def test_time_in_the_future_is_unknown(database, run_command):
    wrong, owing = database.add_job("planner", "x"), database.add_job("planner", "done")
    database.rows("UPDATE jobs SET updated_at = now() + interval '9 h'")
    assert ids(run_command, database, "--since", "1h") == [owing]
    [_, line] = listed(run_command, database, "--tenant", "tenant")
    assert re.split(r" {2,}", line)[:3] == [wrong, "planner, x", "-"]


# Go's zero time, which is before the year 1 in the time zones of the Americas.
ZERO_TIME = "UPDATE jobs SET updated_at = '0001-01-01 00:00:00+00'"


def test_zero_time_is_unknown(own_database, run_command):
    own_database.rows(f"ALTER DATABASE {own_database.name} SET timezone = 'America/New_York'")
    failed = own_database.add_job("planner", "failed")
    own_database.rows(ZERO_TIME)
    for option in (["--failed"], ["--tenant", "tenant"]):
        [line] = listed(run_command, own_database, *option)
        assert re.split(r" {2,}", line)[:3] == [failed, "planner, failed", "-"]
    assert "rests: set failed by its stage" in run_command(own_database, "job", failed).out
    owing, missed = own_database.add_job("overlay"), own_database.add_job()
    own_database.rows(ZERO_TIME)
    own_database.rows("UPDATE stage_calls SET run_after = '0001-01-01 00:00:00+00'")
    assert "owes: vlm_judge" in run_command(own_database, "job", owing).out
    own_database.rows("DELETE FROM stage_calls WHERE job_id = %s", missed)
    said = run_command(own_database, "backfill", "--since", "2h").out
    assert "left out: 1 whose time is not known" in said


@pytest.mark.parametrize("value", ['{"a": "\\u0000"}', "1e400000"])
def test_columns_that_are_not_needed_are_not_read(own_database, run_command, value):
    own_database.rows("ALTER TABLE jobs ADD payload json")
    own_database.rows("INSERT INTO jobs (tenant_id, current_step, status, payload)"
                      " VALUES ('tenant', 'planner', 'running', %s)", value)  # fmt: skip
    assert len(ids(run_command, own_database, "--tenant", "tenant")) == 1
    assert ids(run_command, own_database, "--stalled") == []
    assert run_command(own_database, "jobs").code == 0
    own_database.rows("UPDATE jobs SET updated_at = now() - interval '2 hours'")
    assert len(ids(run_command, own_database, "--stalled")) == 1
    assert "planner      1 row is stalled" in run_command(own_database, "status").out
    counted = 'job_state_listener_stalled_jobs{stage="planner"} 1\n'
    assert counted in run_command(own_database, "metrics").out
    assert "Stalled jobs" in run_command(own_database, "report", "--out", "-").out
    with connected(own_database) as conn:  # as a listener's upkeep does
        assert [row.stage for row in troubles.newly_stalled(conn)] == ["planner"]


@pytest.mark.parametrize("type_", ["integer", "text"])
def test_ids_of_any_type_are_listed(empty_database, run_command, type_):
    empty_database.rows(
        f"CREATE TABLE jobs (job_id {type_} PRIMARY KEY, tenant_id integer,"
        " current_step varchar(20), status varchar(20));"
    )
    run_command(empty_database, "install")
    values = "INSERT INTO jobs VALUES ('7', 3, 'planner', %s)"
    empty_database.rows(values, "done")
    assert ids(run_command, empty_database, "--stage", "overlay", "--tenant", "3") == ["7"]
    empty_database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    assert ids(run_command, empty_database, "--given-up", "--tenant", "3") == ["7"]
    empty_database.rows("DELETE FROM stage_calls")
    assert ids(run_command, empty_database, "--stalled", "--since", "9d") == []
    assert ids(run_command, empty_database, "--stalled", "--tenant", "3") == ["7"]
