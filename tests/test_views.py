"""The views, and stalled_jobs(): what dashboards read, and who may."""

import psycopg2
import pytest
from claims import STAGES, claim, connected, held, result, set_clock_back, settle

import troubles
import upkeep
from ops.install import apply

OLD = "UPDATE {} SET {} = now() - interval '2 hours'"


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def overview(database, stage: str = "vlm_analyze"):
    return database.row("SELECT * FROM pipeline_overview WHERE stage = %s", stage)


def age(database) -> None:
    """All that happened was two hours ago."""
    database.rows(OLD.format("stage_attempts", "finished_at"))
    database.rows(OLD.format("jobs", "updated_at"))


def stalled(database) -> list:
    return database.rows("SELECT * FROM stalled_jobs() ORDER BY job_id")


# --- pipeline_overview, stage_latency, given_up_calls --------------------------------------


def test_overview_has_a_row_for_each_stage_in_order(database):
    rows = database.rows("SELECT stage FROM pipeline_overview ORDER BY position")
    assert [row.stage for row in rows] == STAGES


def test_overview_counts_every_situation(database, conn):
    for _ in range(5):
        database.add_job()
    settle(conn, result(claim(conn), "failed", error="HTTP 404"))
    settle(conn, result(claim(conn), "retry", delay=100, error="HTTP 500"))
    settle(conn, result(claim(conn)))
    running = claim(conn)
    database.move(running.job_id, "vlm_analyze", "running")
    row = overview(database)
    assert (row.owed, row.due, row.calling, row.retrying, row.given_up) == (3, 1, 1, 1, 1)
    assert (row.calls_last_hour, row.failures_last_hour) == (3, 2)
    assert row.last_error == "HTTP 404"
    assert row.next_retry_at > row.oldest_due_at and row.p50_seconds <= row.p95_seconds
    assert overview(database, "planner").owed == 0


def test_call_whose_row_its_stage_set_failed_after_its_answer_counts_once(database, conn):
    for _ in range(2):
        job = database.add_job()
        row = claim(conn)
        settle(conn, result(row))
        database.move(job, "vlm_analyze", "failed")
    troubles.newly_failed(conn)
    database.add_job()
    settle(conn, result(claim(conn)))
    row = overview(database)
    assert (row.calls_last_hour, row.failures_last_hour) == (3, 2)
    [row] = database.rows(
        "SELECT sum(calls) AS calls, sum(failures) AS failures FROM stage_latency"
    )
    assert tuple(row) == (3, 2)


def test_taken_call_whose_stage_set_the_row_failed_counts(database, conn):
    """It has one row in the history, with the same words."""
    database.add_job()
    row = claim(conn)
    settle(conn, result(row, "failed", http_status=202, error="set failed by its stage"))
    row = overview(database)
    assert (row.calls_last_hour, row.failures_last_hour) == (1, 1)
    assert tuple(database.row("SELECT calls, failures FROM stage_latency")) == (1, 1)


def test_overview_shows_holds_and_pauses_while_they_last(database, conn):
    database.rows("UPDATE pipeline_stages SET held_until = now() + interval '1 min', held_by = 'w',"
                  " held_reason = 'HTTP 503' WHERE stage = 'vlm_analyze'")  # fmt: skip
    row = overview(database)
    assert (row.paused, row.held_by, row.held_reason) == (False, "w", "HTTP 503")
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity'")
    assert overview(database).paused
    database.rows("UPDATE pipeline_stages SET held_until = now()")
    row = overview(database)
    assert (row.held_until, row.held_by) == (None, None)


def test_call_that_waits_for_a_stage_that_is_down_is_due_since_it_first_was(database, conn):
    database.add_job()
    database.rows("UPDATE stage_calls SET created_at = now() - interval '1 hour'")
    settle(conn, held(claim(conn)))
    row = overview(database)
    waited = "SELECT now() - oldest_due_at >= '1 hour' FROM pipeline_overview WHERE due > 0"
    assert row.due == 1 and database.value(waited)
    database.rows("UPDATE pipeline_stages SET hold_seconds = NULL, held_until = NULL")
    assert not database.value(waited)


def test_call_never_tried_is_due_although_the_clock_was_set_back(database, conn):
    for delay in (None, 1000):
        database.add_job()
        settle(conn, result(claim(conn), "retry", delay=delay))
    database.add_job()
    planned = database.add_job()
    database.rows("UPDATE stage_calls SET run_after = now() + interval '1 hour',"
                  " due_at = now() + interval '1 hour' WHERE job_id = %s", planned)  # fmt: skip
    set_clock_back(database, 7200)
    row = overview(database)
    assert (row.owed, row.due, row.retrying, row.given_up) == (4, 1, 1, 1)
    assert database.value("SELECT oldest_due_at <= now() FROM pipeline_overview WHERE due > 0")


def test_stage_without_a_route_shows_what_it_still_owes(database):
    database.add_job()
    database.rows("UPDATE stage_calls SET stage = 'gone'")
    assert overview(database, "gone").owed == 1


def test_latency_is_by_stage_and_hour(database, conn):
    for outcome in ("succeeded", "succeeded", "retry", "skipped"):
        database.add_job()
        settle(conn, result(claim(conn), outcome, delay=1000))
    took = "UPDATE stage_attempts SET started_at = finished_at - interval '4 s'"
    database.rows(took)
    [row] = database.rows("SELECT * FROM stage_latency")
    assert (row.stage, row.calls, row.failures) == ("vlm_analyze", 3, 1)
    assert (row.p50_seconds, row.p95_seconds) == (4, 4)
    assert (row.hour.minute, row.hour.second) == (0, 0)


def test_given_up_calls_say_since_when_and_why(database, conn):
    job = database.add_job()
    assert database.rows("SELECT * FROM given_up_calls") == []
    settle(conn, result(claim(conn), "failed", error="HTTP 404"))
    [row] = database.rows("SELECT * FROM given_up_calls")
    assert (row.job_id, row.stage, row.attempts) == (job, "vlm_analyze", 1)
    assert row.last_error == "HTTP 404" and row.given_up_at >= row.owed_since


def test_every_view_is_commented(database):
    comments = database.rows(
        "SELECT obj_description(c.oid) AS text FROM pg_class AS c WHERE relkind = 'v'"
        " AND relnamespace = 'public'::regnamespace"
    )
    assert len(comments) == 3 and all("Job State Listener" in row.text for row in comments)


# --- stalled_jobs() ------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["img_gen", "planner"])
def test_waiting_retrying_and_given_up_jobs_are_not_stalled(database, conn, step):
    for outcome in ("retry", "failed"):
        database.add_job(step)
        settle(conn, result(claim(conn), outcome, delay=1000))
    database.add_job(step)
    age(database)
    assert stalled(database) == []


def test_stalled_needs_no_column_that_jobs_may_lack(server, make_database):
    database = make_database(server, installed=False)
    database.rows("CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id int,"
                  " current_step varchar(20), status varchar(20))")  # fmt: skip
    with connected(database) as conn:
        apply(conn)
        database.rows("INSERT INTO jobs VALUES (1, 1, 'img_gen', 'done')")
        settle(conn, result(claim(conn)))
        database.rows(OLD.format("stage_attempts", "finished_at"))
        assert [row.job_id for row in stalled(database)] == ["1"]


def test_timeout_of_the_stage_decides(database, conn):
    upkeep.store_timeouts(conn, {"vlm_analyze": 3 * 3600.0})
    database.add_job()
    settle(conn, result(claim(conn)))
    age(database)
    assert stalled(database) == []
    upkeep.store_timeouts(conn, {"vlm_analyze": 3600.0})
    assert len(stalled(database)) == 1


def test_application_may_still_alter_its_table(server, make_database):
    database = make_database(server)
    database.rows("ALTER TABLE jobs ALTER tenant_id TYPE varchar(50), DROP COLUMN updated_at")
    database.add_job()
    assert stalled(database) == []


# --- resting_rows() ------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", ["HTTP 500: boom (set failed by its stage)", "HTTP 500: boom"])
def test_failed_row_says_once_that_its_stage_set_it_so(database, conn, recorded):
    job = database.add_job()
    row = claim(conn)
    database.move(job, "vlm_analyze", "failed")
    settle(conn, result(row, "failed", error=recorded))
    troubles.newly_failed(conn)
    [row] = database.rows("SELECT kind, id::text, reason FROM resting_rows()")
    assert (row.kind, row.id) == ("failed", job)
    assert row.reason.count("set failed by its stage") == 1 and "HTTP 500: boom" in row.reason


def test_overview_says_why_a_stage_retries_and_whose_rows_they_are(database, conn):
    database.add_job(), database.add_job()
    settle(conn, result(claim(conn), "retry", delay=100, error="HTTP 500: no memory"))
    assert overview(database).tables == ["jobs"]
    assert (overview(database).retry_error, overview(database).last_error) == (
        "HTTP 500: no memory", None
    )  # fmt: skip
    assert overview(database, "planner").retry_error is None


# --- who may read --------------------------------------------------------------------------

READS = ["SELECT * FROM pipeline_overview", "SELECT * FROM stage_latency",
         "SELECT * FROM given_up_calls", "SELECT * FROM stalled_jobs()",
         "SELECT * FROM resting_rows()"]  # fmt: skip


def test_reader_reads_the_views_and_nothing_else(server, make_database, make_role, run_command):
    database = make_database(server)
    role = make_role(database)
    database.rows(f"SET ROLE {role}")
    for sql in READS:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            database.rows(sql)
    assert f"  granted  the views to {role}" in (
        run_command(database, "install", "--reader", role).lines
    )
    for sql in READS:
        database.rows(sql)
    for table in ("jobs", "stage_calls", "stage_attempts", "pipeline_stages", "stage_leases"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            database.rows(f"SELECT FROM {table}")
    database.rows("RESET ROLE")


def test_reader_of_an_earlier_version_may_read_newer_views(server, make_database, make_role):
    database = make_database(server)
    role = make_role(database)
    database.rows(f"GRANT EXECUTE ON FUNCTION stalled_jobs() TO {role}")
    with connected(database) as conn:
        apply(conn)
    database.rows(f"SET ROLE {role}; SELECT * FROM resting_rows(); RESET ROLE")


def test_reader_that_does_not_exist_is_one_line(database, run_command):
    refused = run_command(database, "install", "--reader", "no such; role").refused(1)
    assert refused == "there is no role no such; role; nothing was changed"
