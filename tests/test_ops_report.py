"""`report`: the page shows what is in the database."""

import re
import uuid
from contextlib import closing
from datetime import datetime, timedelta

import pytest
from claims import STAGES, claim, connected, result, settle
from reports import attempt, give_up, read

import db
from ops import listeners
from ops.report.data import folded

NO_LISTENER = "no listener is connected, nothing is called"


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


# --- figures -------------------------------------------------------------------------------


def test_empty_database_is_said_in_words_not_in_empty_charts(database):
    shown = read(database)
    assert list(shown.figures.values()) == ["0", "0", "–", "–", "0", "0"]
    assert [card.text for card in shown.section("pipeline").all("h3")] == STAGES
    assert "No call was made in the last 24 h, and no job waits for one." in shown.root.text
    assert "(img_gen, done)" in shown.root.text
    assert not shown.root.all("svg", "plot") and not shown.root.all("table")
    assert [e.attributes["id"] for e in shown.root.all("section")] == ["pipeline"]


def test_headline_counts_what_the_views_count(database):
    for outcome in ["succeeded"] * 7 + ["retry", "unknown", "held", "skipped", "cancelled"]:
        attempt(database, outcome=outcome)
    attempt(database, ago=90_000)  # before the span
    database.add_job("img_gen", "done")
    give_up(database, database.add_job("planner", "done"), "HTTP 404")
    database.rows("UPDATE stage_calls SET due_at = now() - interval '2 h' WHERE stage <> 'overlay'")
    database.add_job("overlay", "running")
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 d' WHERE status = 'running'")
    figures = read(database).figures
    view = "SELECT sum(calls) AS calls, sum(failures) AS failures FROM stage_latency"
    assert database.row(f"{view} WHERE hour > now() - interval '2 h'") == (10, 3)
    assert figures == {
        "Jobs in flight": "1",
        "Calls": "10",
        "Failed": "30 %",
        "Oldest due": "2.0 h",
        "Given up": "1",
        "Stalled": "1",
    }


def test_call_whose_row_its_stage_set_failed_later_has_one_duration_and_one_error(database):
    attempt(database), attempt(database, outcome="unknown", error="no answer")
    database.rows("INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
                  " finished_at, outcome, error) SELECT job_id, call_id, attempt, stage, worker,"
                  " started_at, now(), 'failed', 'set failed by its stage'"
                  " || coalesce(': ' || error, '') FROM stage_attempts")  # fmt: skip
    shown = read(database)
    assert [row[2] for row in shown.table("slowest")] == ["1.0 s", "1.0 s"]
    assert {(row[0], row[2]) for row in shown.table("errors")} == {
        ("no answer", "1"),
        ("set failed by its stage", "1"),
    }


def test_call_whose_row_its_stage_set_failed_after_its_answer_counts_once(database):
    attempt(database, job := attempt(database))
    database.rows("INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
                  " finished_at, outcome, error) SELECT job_id, call_id, attempt, stage,"
                  " worker, started_at, now(), 'failed', 'set failed by its stage'"
                  " FROM stage_attempts WHERE attempt = 2")  # fmt: skip
    figures = read(database, job).figures
    assert (figures["Calls"], figures["Failed"]) == ("2", "50 %")


def test_flow_and_waits_show_where_jobs_are(database):
    with connected(database) as conn:
        for step in ["img_gen"] * 3 + ["overlay", "planner"]:
            database.add_job(step, "done")
        row = claim(conn, stages=["vlm_analyze"])
        settle(conn, result(row, "retry", delay=600.0))
        claim(conn, stages=["vlm_analyze"])
        row = claim(conn, stages=["vlm_judge"])
        database.move(row.job_id, "vlm_judge", "running")  # owes nothing, but is being called
        give_up(database, database.value("SELECT job_id FROM jobs WHERE current_step = 'planner'"),
                "HTTP 404")  # fmt: skip
        shown = read(database)
    cards = {card.one("h3").text: card for card in shown.section("pipeline").one("ol").all("li")}
    counts = {
        stage: [int(number.text) for number in card.all("dd")] for stage, card in cards.items()
    }
    nothing = [0, 0, 0, 0, 0]
    # owed, calling, waiting, retrying, given up
    assert counts == {
        "vlm_analyze": [3, 1, 1, 1, 0],
        "yolo_detect": nothing,
        "planner": nothing,
        "overlay": [1, 0, 0, 0, 1],
        "vlm_judge": [0, 1, 0, 0, 0],
    }
    assert [row[:4] for row in shown.table("waits")] == [
        ["(img_gen, done)", "vlm_analyze", "3", "1 calling, 1 waiting, 1 retrying"],
        ["(planner, done)", "overlay", "1", "1 given up"],
        ["(vlm_judge, running)", "vlm_judge", "1", "1 calling"],
    ]


def test_paused_stage_is_named_so_where_its_jobs_wait(database):
    database.add_job("yolo_detect", "done")
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'planner'")
    shown = read(database)
    assert [row[1] for row in shown.table("waits")] == ["planner (paused)"]
    assert [e.text for e in shown.section("pipeline").all("p", "hold")] == ["paused"]


def test_stage_that_lost_its_route_is_shown_as_well(database):
    job = attempt(database, stage="old_stage")
    database.rows("INSERT INTO stage_leases VALUES (%s, 1, 2, 'old_stage', 'w', now(),"
                  " now() + interval '1 h')", job)  # fmt: skip
    shown = read(database)
    assert shown.table("waits")[0][:2] == ["(old_stage, running)", "old_stage"]
    assert shown.table("calls") == [["old_stage", "1"]]
    assert [e.text for e in shown.section("durations").all("h3")] == ["old_stage"]


def test_waiting_time_is_that_since_the_job_arrived(database):
    for minutes in (10, 30, 90):
        job = database.add_job("img_gen", "done")
        database.rows("UPDATE stage_calls SET created_at = now() - make_interval(mins => %s)"
                      " WHERE job_id = %s", minutes, job)  # fmt: skip
    [row] = read(database).table("waits")
    assert row[4:] == ["30 min", "90 min"]


def test_durations_are_those_of_accepted_calls(database):
    for seconds in range(1, 10):
        attempt(database, seconds=seconds)
    attempt(database, outcome="unknown", seconds=500)
    attempt(database, stage="overlay", outcome="held", seconds=0)
    shown = read(database).section("durations")
    planner, overlay = shown.all("div", "spread")
    said = planner.all("svg", "plot")[0].attributes["aria-label"]
    assert said == "planner; 10 calls, 10 % failed; p50 5.0 s; p95 8.6 s; longest 9.0 s"
    assert [dd.text for dd in planner.all("dd")] == ["5.0 s", "8.6 s", "9.0 s", "10 min"]
    titles = [title.text for title in planner.all("title")]
    count = re.compile(r"(\d+) accepted|(\d+) not accepted")
    found = [match for title in titles for match in count.findall(title)]
    assert sum(int(accepted or 0) for accepted, _ in found) == 9
    assert sum(int(refused or 0) for _, refused in found) == 1
    assert overlay.one("p").text == "1 call, 100 % failed"
    assert [dd.text for dd in overlay.all("dd")] == ["10 min"]


def test_bars_over_time_add_up_by_outcome(database):
    for hours in range(12):
        attempt(database, ago=3600 * hours + 60)
        attempt(database, ago=3600 * hours + 60, outcome="retry" if hours % 3 else "failed")
    shown = read(database)
    assert shown.table("calls") == [["planner", "12", "8", "4"]]
    everything, failures = (chart.all("g") for chart in shown.section("calls").all("svg", "plot"))
    assert len(everything) == len(failures) == 12
    assert [len(bar.all("rect")) for bar in everything] == [2] * 12
    assert [bar.one("rect").attributes["class"] for bar in failures].count("failed") == 4


def test_slowest_calls_come_first_but_no_lost_one(database):
    jobs = [attempt(database, seconds=seconds) for seconds in (3, 40, 5)]
    attempt(database, outcome="lost", seconds=600)
    rows = read(database).table("slowest")
    assert [row[0] for row in rows] == [jobs[1], jobs[2], jobs[0]]
    assert rows[0][1:4] == ["planner", "40 s", "succeeded"]


def test_given_up_calls_are_grouped_by_their_error(database):
    for error in ["HTTP 404"] * 4 + ["HTTP 422"]:
        give_up(database, database.add_job("planner", "done", "acme"), error)
    first, second = read(database).table("given-up")
    assert first[:3] == ["HTTP 404", "overlay", "4"] and first[3].count("acme") == 3
    assert second[:3] == ["HTTP 422", "overlay", "1"]


def test_stalled_jobs_are_shown_with_the_reason(database):
    job = database.add_job("overlay", "running", "acme")
    database.rows("UPDATE jobs SET updated_at = now() - interval '3 h' WHERE job_id = %s", job)
    [row] = read(database).table("stalled")
    reason = "running for longer than the timeout"
    assert row == [reason, "(overlay, running) stage overlay", "1", f"{job} acme", "3.0 h"]


def alarms(page) -> list[list[str]]:
    """The parts of each: what (with its stage), the reason, what to type."""
    found = page.root.one("ol", "attention").all("li")
    return [[part.text for part in alarm.children] for alarm in found]


def test_alarms_come_by_urgency_each_with_its_reason_and_the_command(database):
    assert alarms(read(database)) == [[NO_LISTENER, "./jsl"]]
    job = database.add_job("img_gen", "done")
    give_up(database, database.add_job("vlm_analyze", "done"), "HTTP 404")
    database.rows("UPDATE stage_calls SET due_at = now() - interval '1 h' WHERE job_id = %s", job)
    hold = "UPDATE pipeline_stages SET held_until = %s, held_by = 'kim', held_reason = %s"
    in_100_days = datetime.now().astimezone() + timedelta(days=100, hours=1)
    database.rows(f"{hold} WHERE stage = 'planner'", "infinity", "GPU")
    database.rows(f"{hold} WHERE stage = 'overlay'", in_100_days, "HTTP 503")
    database.add_job("overlay", "failed")
    database.rows("ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger")
    shown = read(database)
    database.rows("ALTER TABLE jobs ENABLE TRIGGER job_state_change_trigger")
    assert alarms(shown) == [
        ["new calls may not be recorded", "trigger job_state_change_trigger on jobs is disabled",
         "./jsl install"],
        [NO_LISTENER, "./jsl"],
        ["vlm_analyze a call has been due for 60 min", "1 call due, 0 under way",
         "./jsl jobs --stage vlm_analyze"],
        ["overlay held for 100 d more by kim", "HTTP 503; 0 calls owed",
         "./jsl resume overlay"],
        ["yolo_detect 1 call given up", "HTTP 404", "./jsl retry --stage yolo_detect"],
        ["overlay 1 job set failed by the stage", "set failed by its stage",
         "./jsl jobs --failed --stage overlay"],
        ["planner paused by kim", "GPU; 0 calls owed", "./jsl resume planner"],
    ]  # fmt: skip
    links = {link.attributes["href"] for link in shown.root.one("ol", "attention").all("a")}
    assert links == {"#given-up", "#set-failed", "#waits"}


def test_commands_of_alarms_can_be_typed(database, run_command):
    give_up(database, database.add_job("vlm_analyze", "done"), "HTTP 404")
    database.add_job("overlay", "failed")
    job = database.add_job("planner", "running")
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 d' WHERE job_id = %s", job)
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'planner'")
    database.add_job("img_gen", "done")
    database.rows("UPDATE stage_calls SET due_at = now() - interval '1 h', stage = 'painter'"
                  " WHERE stage = 'vlm_analyze'")  # fmt: skip
    typed = [alarm[-1].split()[1:] for alarm in alarms(read(database))[1:]]
    assert len(typed) == 5
    for command in typed:
        assert run_command(database, *command).code in (0, 1)


# --- errors --------------------------------------------------------------------------------


def test_errors_of_all_outcomes_are_grouped_whatever_varies_in_them(database):
    for number, outcome in enumerate(["retry"] * 3 + ["held", "unknown", "lost", "failed"]):
        job = str(uuid.uuid4())
        error = f"HTTP 500: job {job} at gpu-1:{40000 + number} after {number}.5 s"
        error += " (attempt 5, the last one)" * (outcome == "failed")
        attempt(database, job, outcome=outcome, error=error, ago=100 - number)
    for _ in range(2):
        attempt(database, outcome="retry", error="HTTP 404: 7 no overlay")
    attempt(database, outcome="failed", error="HTTP 500: job 7", ago=99_999)
    attempt(database, outcome="skipped", error="moved on")
    rows = read(database).table("errors")
    error = "HTTP 500: job … at gpu-…:… after … s"
    assert rows[0][:-1] == [error, "planner", "7", "3", "1", "1", "1", "1"]
    assert rows[0][-1].endswith(job)
    assert rows[1][:4] == ["HTTP 404: 7 no overlay", "planner", "2", "2"]  # as it is: it is one
    assert len(rows) == 2


def test_ids_addresses_and_numbers_are_what_varies_in_an_error():
    assert folded("stage API unreachable: 10.0.0.7:8001 refused [Errno 111]") == (
        "stage API unreachable: …:… refused [Errno …]"
    )
    job = "0F8fad5b-d9cb-469f-a165-70867728950e"
    assert folded(f"HTTP 503: id {job}, trace 4bf92f3577b34da6, 0x7fcAB") == (
        "HTTP 503: id …, trace …, …"
    )
    assert folded("HTTP 500 deadbeef cafebabe1 stage2 12 frames (attempt 12, the last one)") == (
        "HTTP 500 deadbeef … stage2 … frames"
    )


def test_given_up_and_failed_jobs_are_grouped_likewise(database):
    for number in range(5):
        give_up(database, database.add_job("planner", "done"), f"HTTP 422: frame {number}")
        attempt(database, database.add_job("overlay", "failed"), "overlay", "failed",
                error=f"HTTP 500: {number} MiB (set failed by its stage)")  # fmt: skip
    shown = read(database)
    [given_up], [failed] = shown.table("given-up"), shown.table("set-failed")
    assert given_up[:3] == ["HTTP 422: frame …", "overlay", "5"]
    assert failed[:3] == ["HTTP 500: … MiB (set failed by its stage)",
                          "(overlay, failed) stage overlay", "5"]  # fmt: skip
    assert len(given_up[3].split()) == len(failed[3].split()) == 6  # three, with their tenants


def test_healthy_pipeline_with_a_listener_is_said(database):
    with closing(db.connect(database.settings(), db.LISTENER_APPLICATION + "w")):
        shown = read(database)
    assert not shown.root.all("ol", "attention")
    assert "Nothing is held, late, given up, failed or stalled." in shown.root.text


# --- one job -------------------------------------------------------------------------------


def test_timeline_shows_attempts_by_outcome_and_the_wait(database):
    job = database.add_job("yolo_detect", "done")
    attempt(database, job, "yolo_detect", seconds=5, ago=300)
    attempt(database, job, outcome="retry", error="HTTP 500: \\uba54\\ubaa8\\ub9ac", ago=200)
    other = attempt(database, seconds=50)
    shown = read(database, job).section("jobs")
    assert [e.text for e in shown.all("article")[0].all("h3")] == [job]
    assert other not in shown.text
    detect, planner, _axis = shown.all("svg", "lane")
    assert detect.attributes["aria-label"] == "yolo_detect; attempt 1 succeeded, 5.0 s"
    assert planner.attributes["aria-label"] == (
        "planner; attempt 2 retry, 1.0 s; waits to be called"
    )
    assert [rect.attributes["class"] for rect in planner.all("rect")] == ["retry"]
    assert planner.one("title").text.endswith("attempt 2 retry, 1.0 s: HTTP 500: 메모리")
    assert len(planner.all("line", "wait")) == 2


def test_attempts_are_numbered_as_max_attempts_counts(database):
    """A call that was held has none."""
    job = database.add_job("img_gen", "done")
    with connected(database) as conn:
        settle(conn, result(claim(conn), "held", free=True, spent=0, delay=0.0))
        settle(conn, result(claim(conn), "retry", spent=1, delay=0.0))
        claim(conn)
        shown = read(database, job)
        [row] = db.execute(conn, listeners.CALLS)
    [lane, _axis] = shown.section("jobs").all("svg", "lane")
    bars = [title.text.split(" ", 2)[2].split(",")[0] for title in lane.all("title")]
    assert bars == ["held", "attempt 1 retry", "attempt 2 calling"]
    assert sorted(row[5] for row in shown.table("slowest")) == ["-", "1"]
    assert row.attempt == 2


def test_timeline_shows_the_call_under_way(database):
    job = database.add_job("img_gen", "done")
    with connected(database) as conn:
        assert claim(conn).job_id == job
        [lane, _axis] = read(database, job).section("jobs").all("svg", "lane")
    assert [rect.attributes["class"] for rect in lane.all("rect")] == ["calling"]
    assert "waits" not in lane.attributes["aria-label"]


def test_slowest_jobs_are_shown_where_none_is_asked_for(database):
    quick, slow = attempt(database, seconds=1), attempt(database, seconds=9, ago=500)
    attempt(database, slow, outcome="retry", ago=10)
    shown = read(database).section("jobs")
    assert [e.one("h3").text for e in shown.all("article")] == [slow, quick]


def test_long_history_is_cut_and_says_so(database):
    job = attempt(database)
    database.rows("INSERT INTO stage_attempts SELECT job_id, 2, n, stage, worker, started_at,"
                  " finished_at, NULL, 'held', NULL FROM stage_attempts,"
                  " generate_series(1, 500) AS n")  # fmt: skip
    article = read(database, job).section("jobs").one("article")
    assert "Its earlier attempts are not shown." in article.text
    assert len(article.all("rect")) == 60
