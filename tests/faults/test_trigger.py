"""Changes that the database trigger cannot see or record, and how their calls are found again."""

import subprocess

import pytest
from claims import connected
from test_schema_install import program
from test_schema_security import GRANTS
from waiting import (
    LISTENING,
    RECONNECTING,
    gate,
    terminate_backends,
    wait_for_call,
    wait_until_idle,
)

from ops.install import apply

SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"
OURS = "pipeline_stages, stage_limits, stage_calls, stage_leases, stage_attempts CASCADE"


def install(database) -> None:
    with connected(database) as conn:
        apply(conn)


def owed(database) -> set[tuple]:
    return set(database.rows("SELECT job_id, stage FROM stage_calls"))


# --- our tables are gone -------------------------------------------------------------------


def test_c4_update_of_many_jobs_without_our_tables_starts_no_subtransactions(
    own_server, make_database
):
    database = make_database(own_server)
    database.rows("INSERT INTO jobs (current_step) SELECT 'img_gen' FROM generate_series(1, 500)")
    database.rows(f"DROP TABLE {OURS}")
    next_id = "SELECT txid_snapshot_xmax(txid_current_snapshot())"
    before = database.value(next_id)
    database.rows("UPDATE jobs SET status = 'done'")
    assert database.value(next_id) - before < 50


def test_c4_listener_outlasts_the_loss_of_our_tables(
    database, api, listener, run_command, tmp_path
):
    process = listener(database, api=api, SWEEP_INTERVAL=0.1)
    wait_until_idle(tmp_path)
    database.rows(f"DROP TABLE {OURS}")
    job = database.add_job("overlay", "done")
    assert database.state(job) == ("overlay", "done")
    process.wait_for_line(RECONNECTING)
    done = run_command(database, "verify", api=api)
    assert done.code == 1
    assert "table pipeline_stages is missing → ./jsl install" in done.out
    install(database)
    run_command(database, "backfill", "--apply")
    database.wait_for(SUCCEEDED, job)
    assert len(api.calls(job)) == 1


@pytest.mark.parametrize(
    "busy",
    [pytest.param(False, id="idle"),
     pytest.param(True, id="with a call under way", marks=pytest.mark.slow)],
)  # fmt: skip
def test_c4_listener_of_a_database_made_anew_says_what_to_run_and_ends(
    database, api, listener, tmp_path, busy
):
    """The result of a call under way has no table that it could be written to."""
    process = listener(database, api=api, JOB_STATE_LISTENER_RECONNECT_DELAY=0.1)
    wait_until_idle(tmp_path)
    with gate(api) as opened:
        if busy:
            wait_for_call(api, database.add_job())
        database.become("template1")
        process.wait_for_line("tables are missing: run `make trigger` (./jsl install)")
        opened.set()
        assert process.wait() == 2
    assert "시작할 수 없음: the listener's tables are missing" in process.lines[-1]
    assert "Traceback" not in process.output
    assert ("리스 만료 후 다시 확인됨" in process.output) == busy


def test_c4_result_is_written_though_the_trigger_is_gone(database, api, listener):
    process = listener(database, api=api, JOB_STATE_LISTENER_RECONNECT_DELAY=0.1)
    with gate(api) as opened:
        job = database.add_job()
        wait_for_call(api, job)
        database.rows("DROP TRIGGER job_state_change_trigger ON jobs")
        terminate_backends(database)
        process.wait_for_line("Problem: ")
        opened.set()
        assert process.wait() == 2
    assert [attempt.outcome for attempt in database.attempts(job)] == ["succeeded"]
    assert "리스 만료 후 다시 확인됨" not in process.output


# --- what no trigger sees ------------------------------------------------------------------

UNSEEN = {
    "replica": "SET session_replication_role = replica; {}; RESET session_replication_role",
    "disabled": "ALTER TABLE jobs DISABLE TRIGGER USER; {}; ALTER TABLE jobs ENABLE TRIGGER USER",
}


@pytest.mark.parametrize("how", UNSEEN)
def test_c5_changes_behind_the_triggers_back_are_found_again(how, database, run_command):
    came, left = database.add_job("img_gen", "queued"), database.add_job("planner", "done")
    stayed = database.add_job("overlay", "done")
    call_id = database.owed(stayed).call_id
    moves = (
        f"UPDATE jobs SET status = 'done' WHERE job_id = '{came}';"
        f"UPDATE jobs SET status = 'running' WHERE job_id = '{left}'"
    )
    database.rows(UNSEEN[how].format(moves))
    assert {str(job) for job, _ in owed(database)} == {left, stayed}
    run_command(database, "backfill", "--apply")
    assert {str(job) for job, _ in owed(database)} == {came, stayed}
    assert database.owed(stayed).call_id == call_id


def test_c5_calls_of_truncated_jobs_are_given_up_by_the_claim(database, api, listener):
    job = database.add_job()
    database.rows("TRUNCATE jobs")
    assert database.owed(job)
    assert listener(database, "run", "--once", api=api).wait() == 0
    assert [row.outcome for row in database.attempts(job)] == ["skipped"]
    assert database.owed(job) is None and not api.calls()


def test_c5_attached_partition_is_found_and_its_later_changes_are_seen(empty_database, run_command):
    database = empty_database
    columns = "(job_id bigint, tenant_id text, current_step text, status text)"
    database.rows(f"CREATE TABLE jobs {columns} PARTITION BY LIST (tenant_id)")
    database.rows("CREATE INDEX ON jobs (job_id)")
    install(database)
    database.rows(f"CREATE TABLE late {columns}")
    database.rows("INSERT INTO late VALUES (1, 'a', 'img_gen', 'done'), (2, 'a', 'x', 'y')")
    database.rows("ALTER TABLE jobs ATTACH PARTITION late FOR VALUES IN ('a')")
    assert owed(database) == set()
    run_command(database, "backfill", "--apply")
    database.rows("UPDATE jobs SET current_step = 'overlay', status = 'done' WHERE job_id = 2")
    assert owed(database) == {(1, "vlm_analyze"), (2, "vlm_judge")}


def test_c5_copied_rows_owe_their_calls(database):
    copy = "COPY jobs (current_step, status) FROM PROGRAM 'echo {},done' (FORMAT csv)"
    database.rows("; ".join(copy.format(step) for step in ("img_gen", "overlay", "elsewhere")))
    assert {stage for _, stage in owed(database)} == {"vlm_analyze", "vlm_judge"}


# --- copies --------------------------------------------------------------------------------


def test_c6_clone_calls_nothing_once_its_pending_calls_are_cleared(
    server, database, api, listener, make_database
):
    job = database.add_job()
    database.conn.close()
    clone = make_database(server, installed=False)
    clone.conn.close()
    with server.connect().cursor() as cursor:
        cursor.execute(f"DROP DATABASE {clone.name}")
        cursor.execute(f"CREATE DATABASE {clone.name} TEMPLATE {database.name}")
    for copy in (clone, database):
        copy.conn = copy.connect()
    assert clone.owed(job)
    clone.rows("TRUNCATE stage_calls")
    assert listener(clone, "run", "--once", api=api).wait() == 0
    assert not api.calls()
    assert database.owed(job)


def test_c6_data_only_restore_owes_a_call_for_every_job_that_waits(server, database, make_database):
    waiting = {(database.add_job(), "vlm_analyze") for _ in range(3)}
    database.add_job("img_gen", "running")
    database.rows("DELETE FROM stage_calls")  # accepted, and the stage has not begun yet
    dump = [program(database, "pg_dump"), "--data-only", "--table=jobs", database.dsn]
    data = subprocess.run(dump, capture_output=True, check=True).stdout
    copy = make_database(server)
    restore = [program(database, "psql"), "-qX", "-v", "ON_ERROR_STOP=1", copy.dsn]
    subprocess.run(restore, input=data, capture_output=True, check=True)
    assert owed(copy) == waiting


# --- jobs that are hidden ------------------------------------------------------------------


def test_c9_listener_that_may_not_see_a_job_drops_nothing(database, api, listener, make_role):
    role = make_role(database)
    for table, privileges in GRANTS.items():
        database.rows(f"GRANT {', '.join(privileges)} ON {table} TO {role}")
    database.rows("ALTER TABLE jobs ENABLE ROW LEVEL SECURITY")
    job = database.add_job("overlay", "done")
    process = listener(database, api=api, DB_USER=role, DB_PASSWORD=role)
    process.wait_for_line(LISTENING)
    assert "row-level security" in process.wait_for_line("단계의 호출을 가져올 수 없음")
    assert (database.owed(job).attempts, database.attempts(job)) == (0, [])
    database.rows(f"ALTER ROLE {role} BYPASSRLS")
    database.wait_for(SUCCEEDED, job)
    assert len(api.calls(job)) == 1
