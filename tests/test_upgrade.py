"""From a released version of the database's part to this one: nothing is lost, nothing repeated."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg2.extras
import pytest
from claims import (
    LEASE_OVER,
    STAGES,
    all_connected,
    claim,
    claim_many,
    connected,
    result,
    settle,
)
from variants import stage
from waiting import until

import db
import pipeline
from demo import five_stages
from ops import migrations
from ops.install import apply

pytestmark = pytest.mark.slow

RELEASED = Path(__file__).parent / "released"
OURS = ("pipeline_stages", "stage_calls", "stage_leases", "stage_attempts", "stage_totals",
        "stage_totals_mark")  # fmt: skip


@pytest.fixture
def run_command(run_here):
    return run_here


def read(name: str) -> str:
    return (RELEASED / name).read_text(encoding="utf-8")


def install_released(database, version: int) -> None:
    """As `install` of that version did, in one transaction."""
    database.conn.cursor().execute(read(f"version_{version}.sql"))


# Columns that are new since, and what an earlier version's rows have there.
NEW = {"table_name": "jobs", "join_of": "", "child_table": None, "spent": None,
       "waiting_since": None, "refusing_since": None, "asynchronous": False, "pool": None,
       "working": False, "priority": 0, "run_after": None}  # fmt: skip


def rows_of(database, table: str, columns: str = "*") -> list[dict]:
    """All rows of a table, whatever order its columns are in, but for those that are NEW."""
    found = database.rows(f"SELECT {columns} FROM {table} AS t ORDER BY t::text")
    rows = [row._asdict() for row in found]
    new = NEW | ({"tenant_id": None} if table == "stage_leases" else {})
    assert all(row.pop(name, value) == value for row in rows for name, value in new.items())
    return rows


class OldWorker:
    """A worker of version 1: its statements, on a connection of its own."""

    def __init__(self, database, name: str = "old"):
        self.name, self.conn = name, database.connect()

    def execute(self, file: str, given: dict):
        with self.conn.cursor(cursor_factory=psycopg2.extras.NamedTupleCursor) as cursor:
            cursor.execute(read(file), given)
            return cursor.fetchone() if cursor.description else None

    def claim(self, *stages: str):
        """The row of the call that it claims; call_id is None where it finds none."""
        given = {"stages": list(stages), "leases": [600.0] * len(stages), "worker": self.name}
        given |= {"since": ["-infinity"] * len(stages)}
        given |= dict.fromkeys(("job_id", "call_id", "attempt", "freed"))
        return self.execute("version_1_claim.sql", given)

    def settle(self, row, outcome: str, **details):
        given = row._asdict() | {"worker": self.name, "outcome": outcome, "http_status": None}
        given |= {"error": None, "freed": row.stage if row.limited else None, "free": 0}
        file = "pay" if outcome == "succeeded" else "postpone"
        return self.execute(f"version_1_{file}.sql", given | details)


@pytest.fixture
def limit():
    """max_running of planner, as the installed version 1 has it."""
    pipeline.limits(max_running=2)(five_stages.planner)
    yield
    del five_stages.planner.limits


@pytest.fixture
def database(each_server, make_database, limit):
    """An installation of version 1."""
    database = make_database(each_server, installed=False)
    install_released(database, 1)
    return database


@pytest.fixture
def old(database):
    worker = OldWorker(database)
    with closing(worker.conn):
        yield worker


WRITE = "UPDATE jobs SET current_step = 'overlay', status = 'done' WHERE job_id = %s"
BLOCKED = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_write_that_waits_for_the_upgrade_succeeds(each_server, make_database, version):
    database = make_database(each_server, installed=False)
    install_released(database, version)
    job = database.add_job("img_gen", "running")
    with connected(database) as conn, ThreadPoolExecutor() as pool:
        db.execute(conn, "BEGIN")
        apply(conn)
        with closing(database.connect()) as application:
            written = pool.submit(application.cursor().execute, WRITE, (job,))
            database.wait_for(BLOCKED)
            db.execute(conn, "COMMIT")
            written.result()
    assert database.owed(job).stage == "vlm_judge"


def upgrade(database) -> None:
    with connected(database) as conn:
        apply(conn)


def every_situation(database, old) -> dict[str, str]:
    """A job in each situation that version 1 knows."""
    jobs = {"under way": database.add_job("planner")}
    old.claim("overlay")
    jobs["running"] = database.add_job("overlay")
    old.claim("vlm_judge")
    database.move(jobs["running"], "vlm_judge", "running")
    jobs["unanswered"] = database.add_job("yolo_detect")
    old.settle(old.claim("planner"), "unknown", delay=0.0, after_lease=True, error="no answer")
    jobs["limited"] = database.add_job("yolo_detect")
    old.claim("planner")
    jobs["accepted"] = database.add_job("vlm_analyze")
    old.settle(old.claim("yolo_detect"), "succeeded", http_status=200)
    jobs["given up"] = database.add_job("vlm_analyze")
    old.settle(old.claim("yolo_detect"), "failed", delay=None, after_lease=False, error="HTTP 400")
    jobs["retried"] = database.add_job("vlm_analyze")
    old.settle(old.claim("yolo_detect"), "retry", delay=300.0, after_lease=False, error="HTTP 500")
    jobs["owed"] = database.add_job("img_gen")
    jobs["waiting for a slot"] = database.add_job("yolo_detect")
    database.rows("UPDATE pipeline_stages SET held_until = now() + interval '5 minutes',"
                  " hold_seconds = 300, held_by = 'old', held_reason = 'HTTP 503'"
                  " WHERE stage = 'vlm_judge'")  # fmt: skip
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity', held_by = 'me',"
                  " held_reason = 'a deploy' WHERE stage = 'overlay'")  # fmt: skip
    return jobs


COME_LAST = "UPDATE stage_calls SET due_at = now() WHERE job_id = %s"


# --- nothing is lost -----------------------------------------------------------------------


def test_upgrade_keeps_what_is_owed_leased_given_up_and_held(database, old):
    every_situation(database, old)
    before = {table: rows_of(database, table) for table in OURS}
    jobs = database.rows("SELECT *, xmin FROM jobs ORDER BY job_id")
    upgrade(database)
    assert database.rows("SELECT *, xmin FROM jobs ORDER BY job_id") == jobs
    for table in OURS:
        if table != "stage_leases":
            assert rows_of(database, table) == before[table]
    leases = [lease for lease in rows_of(database, "stage_leases") if not lease["unanswered"]]
    kept = sorted(leases, key=lambda lease: lease["call_id"])
    expected = sorted(before["stage_leases"], key=lambda lease: lease["call_id"])
    assert [lease | {"unanswered": False} for lease in expected] == kept
    assert database.rows("SELECT name, max_running FROM stage_limits") == [("planner", 2)]


def test_second_install_changes_nothing(database, old):
    every_situation(database, old)
    upgrade(database)
    tables = [*OURS, "stage_limits", "stage_slots", "job_state_listener_schema"]
    before = {table: rows_of(database, table) for table in tables}
    made = "SELECT oid, relname, relfilenode, relowner FROM pg_class ORDER BY oid"
    objects = database.rows(made)
    upgrade(database)
    assert {table: rows_of(database, table) for table in tables} == before
    assert database.rows(made) == objects


# stage_slots stays, as a listener of version 1 may still run.
@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_upgraded_database_has_the_columns_and_indexes_of_a_new_one(
    each_server, make_database, version
):
    database = make_database(each_server, installed=False)
    install_released(database, version)
    upgrade(database)
    new = make_database(each_server, installed=False)
    upgrade(new)
    columns = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default"
        " FROM information_schema.columns"
        " WHERE table_schema = 'public' AND table_name <> 'stage_slots' ORDER BY 1, 2"
    )
    indexes = "SELECT indexdef FROM pg_indexes WHERE tablename <> 'stage_slots' ORDER BY 1"
    functions = (  # the oid of jobs aside
        "SELECT proname, regexp_replace(prosrc, '[0-9]{4,}', '', 'g') FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace"
    )
    for described in (columns, indexes, f"{functions} ORDER BY 1"):
        assert database.rows(described) == new.rows(described)


def test_every_call_is_made_once_after_the_upgrade(database, old):
    jobs = every_situation(database, old)
    upgrade(database)
    database.rows("UPDATE pipeline_stages SET held_until = NULL")
    with connected(database) as conn:
        assert [row.key for row in claim_many(conn, 8).claimed] == [jobs["owed"]]
        assert settle(conn, result(claim(conn, only=jobs["retried"])))
        database.rows(LEASE_OVER)
        database.rows(COME_LAST, jobs["waiting for a slot"])
        found = claim_many(conn, 8).claimed
    overdue = {"under way", "unanswered", "limited", "owed"}
    assert {row.key for row in found} == {jobs[name] for name in overdue}
    assert all(row.attempt == 2 for row in found)


def test_call_without_an_answer_keeps_its_place_and_its_lease(database, old):
    jobs = every_situation(database, old)
    upgrade(database)
    with connected(database) as conn:
        assert claim_many(conn, 8, stages=["planner"]).claimed == []
        database.move(jobs["unanswered"], "yolo_detect", "queued")
        database.move(jobs["unanswered"], "yolo_detect", "done")
        assert claim_many(conn, 8, stages=["planner"], only=jobs["unanswered"]).claimed == []


# --- an old worker that still runs ---------------------------------------------------------


def test_old_worker_settles_its_call_after_the_upgrade(database, old):
    jobs = {database.add_job("yolo_detect"): old.claim("planner") for _ in range(2)}
    job = database.add_job("yolo_detect")
    upgrade(database)
    for row in jobs.values():
        assert not old.settle(row, "succeeded", http_status=200).unsettled
    assert database.rows("SELECT 1 FROM stage_leases") == []
    for done in jobs:
        assert database.owed(done) is None
        assert [a.outcome for a in database.attempts(done)] == ["succeeded"]
    with connected(database) as conn:
        assert claim(conn).job_id == job


def test_old_worker_claims_nothing_after_the_upgrade(database, old):
    under_way = database.add_job("yolo_detect")
    row = old.claim("planner")
    for step in ("img_gen", "vlm_analyze", "yolo_detect", "planner", "overlay"):
        database.add_job(step)
    upgrade(database)
    assert old.claim(*STAGES).call_id is None
    old.settle(row, "succeeded")
    upgrade(database)  # a second time
    assert old.claim(*STAGES).call_id is None
    with connected(database) as conn:
        assert len(claim_many(conn, 8).claimed) == 5
    assert database.owed(under_way) is None


def test_result_of_an_old_worker_that_comes_late_changes_nothing(database, old):
    job = database.add_job()
    row = old.claim("vlm_analyze")
    upgrade(database)
    database.rows(LEASE_OVER)
    with connected(database) as conn:
        second = claim(conn, "new")
        assert second.taken_over
        call = database.owed(job)
        old.settle(row, "succeeded", http_status=200)
        assert database.owed(job) == call
        assert claim(conn, settled=result(second, "retry", "new", delay=0)).accepted


# --- 1.0.0, before versions were counted ---------------------------------------------------


def test_upgrade_from_the_first_release_keeps_everything(each_server, make_database, limit):
    database = make_database(each_server, installed=False)
    install_released(database, 0)
    owed, in_hand, given_up = (database.add_job() for _ in range(3))
    database.rows("UPDATE stage_calls SET worker = 'old', attempts = 1, started_at = now(),"
                  " due_at = now() + interval '10 minutes' WHERE job_id = %s", in_hand)  # fmt: skip
    database.rows("UPDATE stage_calls SET due_at = 'infinity', attempts = 5 WHERE job_id = %s",
                  given_up)  # fmt: skip
    database.rows("INSERT INTO stage_attempts SELECT job_id, call_id, 5, stage, 'old', now(),"
                  " now(), 400, 'failed' FROM stage_calls WHERE job_id = %s", given_up)  # fmt: skip
    before = rows_of(database, "stage_calls"), rows_of(database, "stage_attempts")
    upgrade(database)
    assert (rows_of(database, "stage_calls"), rows_of(database, "stage_attempts")) == before
    with connected(database) as conn:
        assert migrations.version(conn) == migrations.LATEST
        assert [row.key for row in claim_many(conn, 8).claimed] == [owed]
        database.rows(LEASE_OVER)
        assert claim(conn, only=in_hand).taken_over


# --- from versions 2 and 3 -----------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_upgrade_keeps_what_is_owed_and_under_way(each_server, make_database, version):
    database = make_database(each_server, installed=False)
    install_released(database, version)
    owed, in_hand, running, given_up, unanswered = (database.add_job() for _ in range(5))
    calling = "UPDATE stage_calls SET worker = 'old', attempts = 1, due_at = now() + interval '1 h'"
    leased = ("INSERT INTO stage_leases SELECT job_id, call_id, 1, stage, 'old', now(), now()"
              " + interval '1 h', %s FROM stage_calls WHERE job_id = %s")  # fmt: skip
    for job in (in_hand, running):
        database.rows(f"{calling} WHERE job_id = %s", job)
        database.rows(leased, False, job)
    database.rows("UPDATE stage_calls SET attempts = 1, due_at = now() + interval '1 h'"
                  " WHERE job_id = %s", unanswered)  # fmt: skip
    database.rows(leased, True, unanswered)
    database.move(running, "vlm_analyze", "running")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', attempts = 5 WHERE job_id = %s",
                  given_up)  # fmt: skip
    database.rows("INSERT INTO stage_attempts SELECT job_id, call_id, 5, stage, 'old', now(),"
                  " now(), 400, 'failed' FROM stage_calls WHERE job_id = %s", given_up)  # fmt: skip
    tables = ("pipeline_stages", "stage_calls", "stage_leases", "stage_attempts")
    before = [rows_of(database, table) for table in tables]
    upgrade(database)
    assert [rows_of(database, table) for table in tables] == before
    with connected(database) as conn:
        assert migrations.version(conn) == migrations.LATEST
        # What may be under way is not claimed, and what the old listener has is settled by it.
        [row] = claim_many(conn, 8).claimed
        assert row.key == owed
        settle(conn, result(row))
        database.rows(LEASE_OVER)
        taken = claim_many(conn, 8).claimed
        assert {row.key for row in taken} == {in_hand, unanswered}
        settle(conn, *map(result, taken))
    assert [row.job_id for row in database.rows("SELECT job_id FROM stage_calls")] == [given_up]


def test_call_of_a_long_tenant_is_in_the_index_of_a_fair_stage(server, make_database, monkeypatch):
    database = make_database(server, installed=False)
    install_released(database, 3)
    long = "SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n"
    job = database.add_job(tenant=database.value(long))
    fair = pipeline.limits(fair=True)(stage("vlm_analyze"))
    monkeypatch.setitem(five_stages.PIPELINE, ("img_gen", "done"), fair)
    upgrade(database)
    assert len(database.owed(job).tenant_id) == 500


# The application's writes wait behind a lock that an install waits for.
WATCHED = """
CREATE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    ASSERT current_setting('lock_timeout') = '800ms', current_setting('lock_timeout');
END $$;
CREATE EVENT TRIGGER watch ON ddl_command_start EXECUTE FUNCTION watch();
"""


@pytest.mark.parametrize("version", [0, 3])
def test_upgrade_waits_less_than_a_second_for_each_lock(server, make_database, version):
    database = make_database(server, installed=False)
    install_released(database, version)
    database.rows(WATCHED)
    upgrade(database)
    assert database.value(migrations.VERSION) == migrations.LATEST


@pytest.mark.parametrize("version", [2, 3])
def test_second_upgrade_changes_nothing_more(each_server, make_database, version):
    database = make_database(each_server, installed=False)
    install_released(database, version)
    upgrade(database)
    before = database.rows("SELECT oid, relname, relfilenode FROM pg_class WHERE relname ~ 'stage'")
    upgrade(database)
    assert before == database.rows(
        "SELECT oid, relname, relfilenode FROM pg_class WHERE relname ~ 'stage'"
    )


# --- versions ------------------------------------------------------------------------------


def test_install_says_which_version_it_came_from(database, run_command):
    said = run_command(database, "install").lines
    assert f"  migrated from version 1 to {migrations.LATEST}" in said
    assert not any("migrated" in line for line in run_command(database, "install").lines)
    assert database.value(migrations.VERSION) == migrations.LATEST


def test_install_over_the_first_release_says_to_stop_its_listeners(
    each_server, make_database, run_command
):
    database = make_database(each_server, installed=False)
    install_released(database, 0)
    said = run_command(database, "install").lines
    assert f"  migrated from version 0 to {migrations.LATEST}" in said
    assert (
        "  note: stop every listener of that version now: it goes on calling, and ignores leases"
        in said
    )


def test_listener_refuses_an_older_database_in_one_line(database, run_command):
    done = run_command(database, "run", "--once")
    assert done.code == 2
    assert f"the database's part is of version 1, this program needs {migrations.LATEST}" in (
        done.out
    )
    assert "run `make trigger`" in done.out and "Traceback" not in done.out


@pytest.fixture
def newer(server, make_database):
    database = make_database(server)
    database.rows("UPDATE job_state_listener_schema SET version = 99")
    return database


def test_listener_refuses_a_newer_database_in_one_line(newer, run_command):
    job = newer.add_job()
    done = run_command(newer, "run", "--once")
    assert done.code == 2
    assert "the database's part is of version 99, newer than this program" in done.out
    assert "Traceback" not in done.out and newer.owed(job).attempts == 0


def test_install_refuses_a_newer_database_in_one_line(newer, run_command):
    before = newer.rows("SELECT oid, xmin FROM pg_class ORDER BY oid")
    refused = run_command(newer, "install").refused(1)
    assert "version 99, newer than this program" in refused
    assert newer.rows("SELECT oid, xmin FROM pg_class ORDER BY oid") == before


@pytest.mark.parametrize("version", [2, 3])
def test_data_of_an_older_version_that_was_restored_into_a_newer_schema_is_installed(
    server, make_database, run_command, version
):
    database = make_database(server)
    job = database.add_job()
    database.rows(f"UPDATE job_state_listener_schema SET version = {version}")
    assert run_command(database, "install").code == 0
    assert database.owed(job).stage == "vlm_analyze"


def test_schema_without_a_version_is_named_in_one_line(server, make_database, run_command):
    database = make_database(server)
    database.rows("DELETE FROM job_state_listener_schema")
    for command in ("install", "status", "verify"):
        done = run_command(database, command)
        assert done.code == 1 and "is empty, as after a restore without data" in done.out + done.err
    assert run_command(database, "uninstall", "--yes").code == 0
    assert run_command(database, "install").code == 0


def is_waiting(database, application: str) -> bool:
    waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = %s"
    return database.value(waits + " AND wait_event = 'advisory'", application)


def test_second_install_waits_for_the_first(database):
    lock = "SELECT pg_advisory_xact_lock(hashtext('job_state_listener.install'))"
    with (
        connected(database) as conn,
        closing(database.connect()) as first,
        ThreadPoolExecutor(1) as pool,
    ):
        first.cursor().execute(f"BEGIN; {lock}")
        second = pool.submit(apply, conn)
        until(lambda: is_waiting(database, "job-state-listener"), "the second install to wait")
        assert database.value("SELECT to_regclass('stage_limits')") is None
        first.cursor().execute("COMMIT")
        second.result()
    assert database.value(migrations.VERSION) == migrations.LATEST


def test_installs_at_once_migrate_once(database, old):
    every_situation(database, old)
    with all_connected(database, 3) as conns, ThreadPoolExecutor(3) as pool:
        list(pool.map(apply, conns))
    assert database.rows(migrations.VERSION) == [(migrations.LATEST,)]
    assert len(database.rows("SELECT 1 FROM stage_leases WHERE unanswered")) == 1


# --- whose rights --------------------------------------------------------------------------

SPYING = """
CREATE TABLE seen (rights text);
GRANT INSERT ON seen TO PUBLIC;
CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NULL; END $$;
"""
SPY = "CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON {} EXECUTE FUNCTION spy();"


def test_upgrade_by_a_superuser_runs_no_code_with_their_rights(
    each_server, make_database, make_role, limit
):
    database = make_database(each_server, installed=False)
    owner = make_role(database)
    database.rows(f"GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner};"
                  "CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id text,"
                  " current_step text, status text); RESET ROLE")  # fmt: skip
    install_released(database, 1)
    spies = "".join(SPY.format(table) for table in (*OURS, "stage_slots"))
    database.rows(f"SET ROLE {owner}; {SPYING} {spies} RESET ROLE")
    upgrade(database)
    assert {row.rights for row in database.rows("SELECT rights FROM seen")} == {owner}
    owners = (
        "SELECT DISTINCT relowner::regrole::text FROM pg_class"
        " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    assert database.rows(owners) == [(owner,)]
