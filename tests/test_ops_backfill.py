"""`backfill`: what was missed is found and called once; what was accepted is not repeated."""

import pytest
from claims import claim, connected, result, settle

REPLICA = "SET session_replication_role = {}"


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def unseen(database):
    """unseen(sql, *params): what the application does while the trigger is off."""

    def act(sql: str, *params: object) -> None:
        database.rows("SET session_replication_role = replica")
        database.rows(sql, *params)
        database.rows("RESET session_replication_role")

    return act


BORN = "INSERT INTO jobs (current_step, status) SELECT %s, %s FROM generate_series(1, %s)"
STAGES = "SELECT stage, count(*) AS calls FROM stage_calls GROUP BY 1 ORDER BY 1"


def test_dry_run_counts_by_state_and_changes_nothing(database, unseen, run_command):
    unseen(BORN, "img_gen", "done", 3)
    unseen(BORN, "overlay", "done", 2)
    unseen(BORN, "overlay", "running", 4)
    done = run_command(database, "backfill")
    assert (done.code, done.lines) == (0, [
        "state          stage        jobs",
        "img_gen, done  vlm_analyze     3",
        "overlay, done  vlm_judge       2",
        "5 calls missing; to record: ./jsl backfill --apply",
    ])  # fmt: skip
    assert database.rows(STAGES) == []


def test_rows_with_numbers_for_ids_are_counted_once(empty_database, run_command):
    empty_database.rows(
        "CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id text, current_step text,"
        " status text); INSERT INTO jobs SELECT n, 't', 'img_gen', 'done'"
        " FROM generate_series(1, 12) AS n"
    )
    run_command(empty_database, "install")
    assert run_command(empty_database, "backfill").lines[-1].startswith("12 calls missing")


def test_apply_records_what_is_missing_once(database, unseen, run_command):
    unseen(BORN, "img_gen", "done", 3)
    database.add_job("planner")
    assert run_command(database, "backfill", "--apply").lines[-1] == "3 calls recorded"
    before = database.rows("SELECT * FROM stage_calls ORDER BY job_id")
    assert [row.stage for row in before].count("vlm_analyze") == 3 and len(before) == 4
    assert run_command(database, "backfill", "--apply").lines == ["0 calls recorded"]
    assert database.rows("SELECT * FROM stage_calls ORDER BY job_id") == before


def test_recorded_calls_wake_a_waiting_listener(database, unseen, api, listener, run_command):
    process = listener(database, api=api, SWEEP_INTERVAL=600)
    process.wait_for_line("LISTEN 'job_state_changed' 시작")
    unseen(BORN, "overlay", "done", 1)
    run_command(database, "backfill", "--apply")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")


def test_jobs_of_every_batch_are_found(database, unseen, run_command):
    unseen(BORN, "img_gen", "done", 20_001)
    assert run_command(database, "backfill", "--apply").lines[-1] == "20,001 calls recorded"


def test_call_that_was_made_before_is_left_alone(database, run_command):
    job = database.add_job()
    with connected(database) as conn:
        settle(conn, result(claim(conn)))
    said, last = run_command(database, "backfill", "--apply").lines
    assert last == "0 calls recorded" and database.owed(job) is None
    assert said == (
        "left alone, as their call was made before: 1 accepted; those that stay: "
        "./jsl jobs --stalled, once the timeout of their stage is over"
    )
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 day'")
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '1 day'")
    assert job in run_command(database, "jobs", "--stalled").out


def test_call_that_was_cancelled_is_left_alone(database, run_command):
    job = database.add_job()
    run_command(database, "cancel", job, "--reason", "twice")
    said, last = run_command(database, "backfill", "--apply").lines
    assert last == "0 calls recorded" and database.owed(job) is None
    told, sql = said.split("; by whom: ")
    assert told == "left alone, as their call was cancelled: 1"
    [(job_id, *_, why)] = database.rows(sql)
    assert (str(job_id), why) == (job, "twice")


def test_job_that_came_back_to_an_earlier_state_unseen_is_called(database, unseen, run_command):
    job = database.add_job("planner")
    with connected(database) as conn:
        settle(conn, result(claim(conn)))
    unseen("UPDATE jobs SET current_step = 'yolo_detect'")
    run_command(database, "backfill", "--apply")
    assert database.owed(job).stage == "planner"


def test_call_under_way_is_not_doubled(database, run_command):
    job = database.add_job()
    with connected(database) as conn:
        claim(conn)
        before = database.owed(job)
        assert run_command(database, "backfill", "--apply").lines == ["0 calls recorded"]
        database.rows("DELETE FROM stage_calls")  # as its stage would, set running and back
        assert run_command(database, "backfill", "--apply").lines == ["0 calls recorded"]
    assert before.worker == "w"


def test_recorded_call_of_a_job_that_moved_on_unseen_is_replaced(database, unseen, run_command):
    moved, gone = database.add_job("planner"), database.add_job("planner")
    unseen("UPDATE jobs SET current_step = 'overlay' WHERE job_id = %s", moved)
    unseen("UPDATE jobs SET status = 'running' WHERE job_id = %s", gone)
    assert "2 recorded calls of jobs that have moved on" in run_command(database, "backfill").out
    assert run_command(database, "backfill", "--apply").lines[-1] == "1 call recorded"
    assert database.owed(moved).stage == "vlm_judge"
    assert database.owed(gone) is None
    assert [a.outcome for a in database.attempts(gone)] == ["skipped"]


def test_since_leaves_older_jobs(database, unseen, run_command):
    unseen(BORN, "img_gen", "done", 1)
    unseen("UPDATE jobs SET updated_at = now() - interval '3 hours'")
    unseen(BORN, "overlay", "done", 1)
    run_command(database, "backfill", "--since", "2h", "--apply")
    assert [row.stage for row in database.rows(STAGES)] == ["vlm_judge"]
    run_command(database, "backfill", "--since", "2020-01-01", "--apply")
    assert len(database.rows(STAGES)) == 2


def test_since_without_a_time_in_jobs_is_one_line(database, run_command):
    database.rows("ALTER TABLE jobs DROP COLUMN updated_at, DROP COLUMN created_at")
    refused = run_command(database, "backfill", "--since", "2h").refused(1)
    assert refused == (
        "--since needs a column updated_at or created_at of type timestamptz in jobs: leave it out"
    )
    assert run_command(database, "backfill").lines == ["no call is missing"]


def test_only_a_time_with_its_zone_in_the_past_is_trusted(database, unseen, run_command):
    database.rows("ALTER TABLE jobs ALTER created_at TYPE timestamp")
    unseen(BORN, "img_gen", "done", 1)
    unseen("UPDATE jobs SET updated_at = now() + interval '9 hours'")
    assert run_command(database, "backfill", "--since", "2h").lines == [
        "left out: 1 whose time is not known, as it is empty, in the future or before 1970; "
        "backfill without --since takes them",
        "no call is missing",
    ]
    database.rows("ALTER TABLE jobs DROP updated_at")
    assert run_command(database, "backfill", "--since", "2h").refused(1).endswith("leave it out")
    assert run_command(database, "backfill", "--apply").lines == [
        "state          stage        jobs",
        "img_gen, done  vlm_analyze     1",
        "1 call recorded",
    ]


@pytest.mark.parametrize("value", ['{"a": "\\u0000"}', "1e400000"])
def test_columns_that_are_not_needed_are_not_read(database, unseen, run_command, value):
    database.rows("ALTER TABLE jobs ADD payload json")
    unseen("INSERT INTO jobs (current_step, status, payload) VALUES ('img_gen', 'done', %s)", value)
    assert run_command(database, "backfill", "--apply").lines[-1] == "1 call recorded"


# PostgreSQL keeps a long value apart from its row, and counts what is read there.
APART = """
SELECT sum(toast_blks_hit + toast_blks_read) FROM pg_statio_user_tables WHERE relname = 'jobs'
"""
ALONE = """
SELECT count(*) = 0 FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


def test_rows_of_a_megabyte_are_not_read(database, unseen, run_command):
    if database.server.version < 15:
        pytest.skip("before PostgreSQL 15 statistics are late")
    database.rows("ALTER TABLE jobs ADD payload text;"
                  " ALTER TABLE jobs ALTER payload SET STORAGE EXTERNAL,"
                  " SET (autovacuum_enabled = off, toast.autovacuum_enabled = off)")  # fmt: skip
    unseen("INSERT INTO jobs (current_step, status, payload, updated_at)"
           " SELECT 'img_gen', step, repeat('x', 1000000), now() - interval '2 hours'"
           " FROM unnest(ARRAY['done', 'running']) AS step")  # fmt: skip
    database.rows("SELECT pg_stat_force_next_flush()")
    before = database.value(APART)
    assert before > 0
    assert "1 call recorded" in run_command(database, "backfill", "--apply").lines
    for shows in ("status", "metrics", "jobs --stalled"):
        assert run_command(database, *shows.split()).code == 0
    database.wait_for(ALONE)
    assert database.value(APART) == before


def test_since_that_is_no_time_is_one_line(database, run_command):
    """Nor one that is still to come, since which no call is missing."""
    refused = run_command(database, "backfill", "--since", "2999-01-01").refused(2)
    assert "2999-01-01 00:00:00" in refused
    assert "is still to come: now it is " in refused and "./jsl backfill --help" in refused
    refused = run_command(database, "backfill", "--since", "yesterday").refused(2)
    assert "'yesterday' is neither a span such as 30m, 2h or 3d nor a time" in refused


@pytest.mark.parametrize("id_type", ["bigint", "text", "varchar(40)", "integer"])
def test_ids_of_any_type(empty_database, run_command, id_type):
    empty_database.rows(
        f"CREATE TABLE jobs (job_id {id_type} PRIMARY KEY, tenant_id int, current_step text,"
        " status text); INSERT INTO jobs SELECT n::text::" + id_type + ", n, 'img_gen', 'done'"
        " FROM generate_series(1, 11000) AS n"
    )
    run_command(empty_database, "install")
    assert run_command(empty_database, "backfill", "--apply").lines[-1] == "11,000 calls recorded"
