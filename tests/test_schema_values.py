"""The database trigger and values of any size, type and table layout."""

import json
import secrets
from contextlib import closing

import psycopg2
import pytest
from claims import claim, connected
from commands import run_here
from conftest import Database
from subscription import Subscription
from test_readme import Readme
from variants import PIPELINE, TABLE

from demo import five_stages
from ops.install import apply
from ops.problem import Problem

KEYS = {"job_id", "current_step", "status", "tenant_id"}
LONGEST = 7999  # bytes that NOTIFY takes

JOBS = "CREATE TABLE jobs (job_id {} PRIMARY KEY, tenant_id {}, current_step {}, status {})"


def install(database) -> None:
    with connected(database) as conn:
        apply(conn)


def claimed(database):
    with connected(database) as conn:
        return claim(conn)


# --- sizes ---------------------------------------------------------------------------------

LONG = {
    "ascii": "x" * 9000,
    "three bytes a letter": "한" * 3000,
    "six bytes a control character": "\x01" * 1400,
    "quotes and backslashes": '"\\' * 2300,
    "four bytes an emoji": "😀" * 2100,
    "a megabyte": "x" * 2**20,
}


@pytest.fixture
def each_database(each_shared_database):
    return each_shared_database.emptied()


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def test_payload_comes_without_what_made_it_long(each_database):
    with Subscription(each_database) as subscription:
        for what, tenant in LONG.items():
            job = each_database.add_job("img_gen", "done", tenant)
            (payload,) = subscription.payloads()
            state = {"job_id": job, "current_step": "img_gen", "status": "done"}
            assert json.loads(payload) == {**state, "tenant_id": None}, what
            assert each_database.owed(job).tenant_id == tenant[:500], what


def test_everything_long_at_once_does_not_abort(each_database):
    with Subscription(each_database) as subscription:
        for what, value in LONG.items():
            job = each_database.add_job("img_gen", "queued", value)
            each_database.move(job, value, value)
            (payload,) = subscription.payloads()
            assert json.loads(payload) == dict.fromkeys(KEYS) | {"job_id": job}, what
            assert each_database.state(job) == (value, value), what


def test_values_of_medium_length_fit_together(database):
    with Subscription(database) as subscription:
        for length in range(1890, 1912):
            job = database.add_job("img_gen", "done", "t" * length)
            database.move(job, "s" * length, "한" * (length // 3))
        for payload in subscription.payloads():
            assert len(payload.encode()) <= LONGEST
            assert json.loads(payload).keys() == KEYS


def test_longest_payload_that_fits_arrives_whole(database):
    with Subscription(database) as subscription:
        database.add_job("img_gen", "done", "")
        room = LONGEST - len(subscription.payloads()[0].encode())
        database.add_job("img_gen", "done", "x" * room)
        database.add_job("img_gen", "done", "x" * (room + 1))
        whole, cut = subscription.payloads()
    assert len(whole) == LONGEST
    assert json.loads(whole)["tenant_id"] == "x" * room
    assert json.loads(cut)["tenant_id"] is None


# --- types ---------------------------------------------------------------------------------

# type of job_id: (a value, the type of our copy, which is as wide as that goes)
JOB_IDS = {
    "uuid": ("8a1f7a50-3df4-4e0a-9f6e-0e8a1d2c3b4a", "uuid"),
    "bigint": (2**62, "bigint"),
    "integer": (7, "bigint"),
    "text": ('../it\'s "one" \\ 100% 한글\n', "text"),
    "varchar(40)": ("job-1", "character varying"),
    "numeric(20,0)": (12345678901234567890, "numeric"),
}


@pytest.mark.parametrize("id_type", JOB_IDS)
def test_job_id_of_any_type_is_owed_and_claimed(empty_database, id_type):
    database = empty_database
    database.rows(JOBS.format(id_type, "text", "text", "text"))
    install(database)
    job, our_type = JOB_IDS[id_type]
    with Subscription(database) as subscription:
        database.rows("INSERT INTO jobs VALUES (%s, 't', 'img_gen', 'done')", job)
        assert [said["job_id"] for said in subscription.messages()] == [job]
    types = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'job_id'"
    for table in ("stage_calls", "stage_attempts"):
        assert database.value(types + " AND attrelid = %s::regclass", table) == our_type
    row = claimed(database)
    assert (row.job_id, row.owed) == (job, True)
    database.rows("UPDATE jobs SET status = 'running' WHERE job_id = %s", job)
    assert database.rows("SELECT 1 FROM stage_calls") == []


def test_text_id_of_2400_bytes_is_owed(empty_database):
    database = empty_database
    database.rows(JOBS.format("text", "text", "text", "text"))
    install(database)
    job = secrets.token_hex(1200)
    with Subscription(database) as subscription:
        database.rows("INSERT INTO jobs VALUES (%s, 't', 'img_gen', 'done')", job)
        database.rows("UPDATE jobs SET current_step = %s", "s" * 7000)
        assert [said["job_id"] for said in subscription.messages()] == [job, None]


def test_id_that_is_too_long_for_an_index_of_ours_is_let_through_with_a_warning(
    empty_database, use_pipeline
):
    use_pipeline(PIPELINE)
    database = empty_database
    database.rows(JOBS.format("text", "text", "text", "text"))
    database.rows(TABLE.replace(" uuid", " text"))
    install(database)
    parent, child = secrets.token_hex(1325), secrets.token_hex(1325)
    database.rows("INSERT INTO jobs VALUES (%s, 't', 'img_gen', 'done')", parent)
    database.rows("UPDATE jobs SET status = 'running'")
    database.rows("UPDATE jobs SET status = 'done'")
    database.rows("INSERT INTO jobs_variants VALUES (%s, %s, 'iou_eval', 'running')", child, parent)
    database.rows("UPDATE jobs_variants SET status = 'done'")
    database.rows("INSERT INTO jobs VALUES ('other', 't', 'img_gen', 'queued')")
    database.rows("UPDATE jobs_variants SET job_id = 'other'")
    assert database.rows("SELECT parent_id FROM stage_looks") == [("other",)]
    assert database.rows("SELECT FROM stage_calls") == []
    warning = "an id of more than 2,600 bytes, no call is recorded"
    assert sum(warning in notice for notice in database.conn.notices) == 2


def test_job_id_that_grew_wider_after_the_install_is_owed(empty_database):
    database = empty_database
    database.rows(JOBS.format("integer", "varchar(10)", "varchar(20)", "varchar(20)"))
    install(database)
    database.rows("ALTER TABLE jobs ALTER job_id TYPE bigint, ALTER tenant_id TYPE text")
    database.rows("INSERT INTO jobs VALUES (%s, %s, 'img_gen', 'done')", 2**40, "t" * 100)
    assert claimed(database).job_id == 2**40


def test_integer_tenant_stays_a_number(empty_database):
    database = empty_database
    database.rows(JOBS.format("bigint", "integer", "varchar(20)", "varchar(20)"))
    install(database)
    with Subscription(database) as subscription:
        database.rows("INSERT INTO jobs VALUES (1, 42, 'planner', 'queued')")
        database.rows("UPDATE jobs SET status = 'done'")
        state = {"job_id": 1, "current_step": "planner", "status": "done"}
        assert subscription.messages() == [{**state, "tenant_id": 42}]
    row = claimed(database)
    assert (row.job_id, row.tenant_id) == (1, 42)


def test_states_of_an_enum_type_are_routed_and_checked(each_server, make_database):
    database = make_database(each_server, installed=False)
    database.rows("CREATE TYPE state AS ENUM ('queued', 'running', 'done')")
    database.rows("CREATE TYPE step AS ENUM ('img_gen', 'vlm_analyze')")
    database.rows(JOBS.format("bigint", "text", "step", "state"))
    install(database)
    with Subscription(database) as subscription:
        database.rows("INSERT INTO jobs VALUES (1, 't', 'img_gen', 'queued')")
        database.rows("UPDATE jobs SET status = 'done'")
        assert [said["status"] for said in subscription.messages()] == ["done"]
    assert claimed(database).owed
    database.rows("UPDATE jobs SET current_step = NULL")
    assert database.owed(1) is None


def test_state_that_an_enum_type_does_not_have_is_told(empty_database, use_pipeline):
    use_pipeline(PIPELINE)
    database = empty_database
    database.rows("CREATE TYPE status AS ENUM ('queued', 'running', 'Done')")
    database.rows("""CREATE TYPE "Step" AS ENUM ('img_gen', 'yolo_detect')""")
    database.rows(JOBS.format("uuid", "text", "text", "status"))
    database.rows(TABLE.replace("current_step    text", 'current_step    "Step"'))
    wrong = [
        ("no row can come to (img_gen, done), (ad_copy, done), as type status has no 'done'",
         "ALTER TYPE status ADD VALUE 'done'"),
        ("no row can come to every jobs_variants (iou_eval, done), as type \"Step\" has no"
         " 'iou_eval'", "ALTER TYPE \"Step\" ADD VALUE 'iou_eval'"),
    ]  # fmt: skip
    environ = database.environ | {"STAGE_API_URL": "http://127.0.0.1:9"}
    said = [run_here(environ, command).out for command in ("install", "verify")]
    for what, mend in wrong:
        assert f"  note: {what}: {mend}, or correct PIPELINE\n" in said[0]
        assert f"PROBLEM  {what} → {mend}, or correct PIPELINE\n" in said[1]
        database.rows(mend)
    assert all("no row can" not in run_here(environ, word).out for word in ("install", "verify"))


def test_states_of_a_type_without_equality_are_refused(each_server, make_database):
    database = make_database(each_server, installed=False)
    database.rows("CREATE TYPE state AS ENUM ('queued', 'done')")
    database.rows("CREATE DOMAIN checked AS state NOT NULL; CREATE DOMAIN filled AS text NOT NULL")
    database.rows(JOBS.format("uuid", "text", "filled", "checked"))
    with pytest.raises(Problem) as refused:
        install(database)
    assert str(refused.value) == (
        "jobs.status is of type checked, whose values PostgreSQL cannot compare: give it another"
        " type, such as text or an enum (ALTER TABLE); nothing was changed"
    )
    database.rows("ALTER TABLE jobs ALTER status TYPE state")
    install(database)


def test_generated_columns_give_those_with_other_names_ours(each_server, make_database):
    database = make_database(each_server, installed=False)
    database.rows("CREATE TABLE jobs (id bigint PRIMARY KEY, customer text, step text, state text)")
    database.rows("SELECT 1;" + Readme("docs/INSTALLING.md").block("sql", "ALTER TABLE jobs"))
    install(database)
    with Subscription(database) as subscription:
        database.rows("INSERT INTO jobs VALUES (1, 'acme', 'img_gen', 'queued')")
        database.rows("UPDATE jobs SET state = 'done'")
        state = {"job_id": 1, "current_step": "img_gen", "status": "done", "tenant_id": "acme"}
        assert subscription.messages() == [state]
    row = claimed(database)
    assert (row.job_id, row.tenant_id, row.stage) == (1, "acme", "vlm_analyze")
    with pytest.raises(psycopg2.ProgrammingError, match="can only be updated to DEFAULT"):
        database.rows("UPDATE jobs SET status = 'running'")
    database.rows("UPDATE jobs SET state = 'running'")
    assert database.owed(1) is None


# --- partitions ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partitioned_database(each_server):
    """Finished jobs and those of tenant 'far' are kept apart."""
    with closing(Database(each_server, each_server.create())) as database:
        database.rows("""
            CREATE TABLE jobs (job_id bigint, tenant_id text, current_step text, status text)
                PARTITION BY LIST (status);
            CREATE INDEX ON jobs (job_id);
            CREATE TABLE finished PARTITION OF jobs FOR VALUES IN ('done');
            CREATE TABLE others PARTITION OF jobs DEFAULT PARTITION BY LIST (tenant_id);
            CREATE TABLE far PARTITION OF others FOR VALUES IN ('far');
            CREATE TABLE near PARTITION OF others DEFAULT""")
        install(database)
        yield database


@pytest.fixture
def partitioned(partitioned_database):
    partitioned_database.rows("DELETE FROM jobs; DELETE FROM stage_calls; DELETE FROM stage_leases")
    return partitioned_database


def test_job_that_moves_between_partitions_owes_its_call(partitioned):
    partitioned.rows("INSERT INTO jobs VALUES (1, 't', 'img_gen', 'running')")
    with Subscription(partitioned) as subscription:
        partitioned.rows("UPDATE jobs SET status = 'done'")
        assert partitioned.value("SELECT count(*) FROM finished") == 1
        state = {"job_id": 1, "current_step": "img_gen", "status": "done"}
        assert subscription.messages() == [{**state, "tenant_id": "t"}]
    assert claimed(partitioned).owed


def test_job_that_moves_on_to_another_partition_owes_nothing(partitioned):
    partitioned.rows("INSERT INTO jobs VALUES (1, 't', 'img_gen', 'done')")
    partitioned.rows("UPDATE jobs SET status = 'running'")
    assert partitioned.owed(1) is None


def test_state_change_within_a_partition_is_seen(partitioned):
    partitioned.rows("INSERT INTO jobs VALUES (1, 't', 'img_gen', 'done')")
    partitioned.rows("UPDATE jobs SET current_step = 'planner'")
    assert partitioned.owed(1).stage == "overlay"


def test_partition_added_later_is_covered(partitioned):
    partitioned.rows("CREATE TABLE failed PARTITION OF jobs FOR VALUES IN ('failed')")
    partitioned.rows("INSERT INTO jobs VALUES (1, 't', 'img_gen', 'failed')")
    partitioned.rows("UPDATE jobs SET status = 'done'")
    assert partitioned.owed(1).stage == "vlm_analyze"


def test_move_between_partitions_in_the_same_state_keeps_the_call_in_hand(partitioned, monkeypatch):
    monkeypatch.setitem(five_stages.PIPELINE, ("img_gen", "ready"), five_stages.vlm_analyze)
    with connected(partitioned) as conn:
        apply(conn)
    partitioned.rows("INSERT INTO jobs VALUES (1, 'near', 'img_gen', 'ready')")
    call_id = claimed(partitioned).call_id
    partitioned.rows("UPDATE jobs SET tenant_id = 'far'")
    assert partitioned.value("SELECT count(*) FROM far") == 1
    assert partitioned.owed(1).call_id == call_id
    assert claimed(partitioned).call_id is None
