"""Changes that a team makes to the table jobs, and their effect on writes, listener and commands.

CHANGES is the table "Changing jobs" of docs/OPERATING.md. After each change the application's next
write succeeds, in a session that has written before and in a new one, and neither `install` nor
following its advice loses a call, a pause or a row of the history.
"""

import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass

import psycopg2
import pytest
from claims import claim, connected, result, settle
from commands import run_here
from conftest import install
from test_readme import Readme
from test_schema_install import program
from variants import PIPELINE, TABLE, Variants

from ops.install import apply
from ops.problem import Problem
from ops.routes import require_installed

JOBS = """
CREATE TABLE jobs (job_id {} PRIMARY KEY, tenant_id varchar(80), current_step varchar(80),
                   status varchar(20), updated_at timestamptz DEFAULT now(), note text)
"""
NUMBERS = [str(number) for number in range(1, 9)]

RECIPE = """
BEGIN;
DROP TRIGGER job_state_change_trigger ON jobs;
ALTER TABLE jobs ALTER status TYPE text;
CREATE TRIGGER job_state_change_trigger AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step
          OR OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION notify_job_state_change();
COMMIT
"""

# The application keeps the mapping from numbers to new ids.
NUMBER_TO_UUID = """
ALTER TABLE jobs ADD number bigint;
UPDATE jobs SET number = job_id;
ALTER TABLE jobs ALTER job_id TYPE uuid USING md5(job_id::text)::uuid
"""
OUR_COPIES = """
BEGIN;
CREATE FUNCTION pg_temp.now_called(bigint) RETURNS uuid LANGUAGE sql STABLE AS
    'SELECT coalesce((SELECT job_id FROM public.jobs WHERE number = $1), gen_random_uuid())';
DROP VIEW given_up_calls;
ALTER TABLE stage_calls ALTER job_id TYPE uuid USING pg_temp.now_called(job_id);
ALTER TABLE stage_leases ALTER job_id TYPE uuid USING pg_temp.now_called(job_id);
ALTER TABLE stage_attempts ALTER job_id TYPE uuid USING pg_temp.now_called(job_id);
ALTER TABLE stage_moves ALTER job_id TYPE uuid USING pg_temp.now_called(job_id);
ALTER TABLE stage_looks ALTER parent_id TYPE uuid USING pg_temp.now_called(parent_id);
ALTER TABLE stage_joins ALTER parent_id TYPE uuid USING pg_temp.now_called(parent_id);
COMMIT
"""

PARTITION = """
ALTER TABLE jobs RENAME TO jobs_1;
CREATE TABLE jobs (LIKE jobs_1 INCLUDING DEFAULTS) PARTITION BY LIST (job_id);
CREATE INDEX ON jobs (job_id);
ALTER TABLE jobs ATTACH PARTITION jobs_1 DEFAULT
"""
PARTITIONED = JOBS.replace("note text)", "note text) PARTITION BY HASH (job_id)") + (
    "; CREATE TABLE jobs_0 PARTITION OF jobs FOR VALUES WITH (MODULUS 2, REMAINDER 0)"
    "; CREATE TABLE jobs_1 PARTITION OF jobs FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
)
CHANGED = "columns of jobs have changed since install, or it was restored"


@dataclass(frozen=True)
class Change:
    """sql: what the team runs.

    write: the effect of the next write: its call is "recorded", the trigger "warns" that it is not,
        or it is "unseen" by our triggers.
    listener, install: "" where it works, else its error.
    verify: some words of each problem that it reports.
    mend: the SQL that makes install work again, where it has an error.
    table: the definition of jobs before. names: columns that the application writes under another
        name; None: no longer. place: the table that it writes to. ids: of its jobs.
    """

    sql: str
    write: str = "recorded"
    listener: str = ""
    install: str = ""
    verify: tuple[str, ...] = ()
    mend: str = ""
    table: str = JOBS.format("uuid")
    names: tuple[tuple[str, str | None], ...] = ()
    place: str = "jobs"
    ids: tuple[str, ...] = ()


CHANGES = {
    "add a column": Change("ALTER TABLE jobs ADD priority integer NOT NULL DEFAULT 0"),
    "drop another column": Change("ALTER TABLE jobs DROP updated_at"),
    "rename another column": Change("ALTER TABLE jobs RENAME note TO remark"),
    "retype another column": Change("ALTER TABLE jobs ALTER note TYPE jsonb USING NULL"),
    "drop tenant_id": Change(
        "ALTER TABLE jobs DROP tenant_id",
        write="warns", listener="tenant_id does not exist",
        install="table jobs has no column tenant_id",
        verify=("jobs has no column tenant_id", CHANGED),
        mend="ALTER TABLE jobs ADD tenant_id text", names=(("tenant_id", None),),
    ),
    "rename tenant_id": Change(
        "ALTER TABLE jobs RENAME tenant_id TO customer",
        write="warns", listener="tenant_id does not exist",
        install="table jobs has no column tenant_id",
        verify=("jobs has no column tenant_id", CHANGED),
        mend="ALTER TABLE jobs RENAME customer TO tenant_id", names=(("tenant_id", "customer"),),
    ),
    "rename job_id": Change(
        "ALTER TABLE jobs RENAME job_id TO id",
        write="warns", listener="job_id does not exist",
        install="table jobs has no column job_id",
        verify=("jobs has no column job_id", CHANGED),
        mend="ALTER TABLE jobs RENAME id TO job_id", names=(("job_id", "id"),),
    ),
    "rename status": Change(
        "ALTER TABLE jobs RENAME status TO state",
        write="warns", listener="status does not exist",
        install="table jobs has no column status",
        verify=("jobs has no column status", CHANGED),
        mend="ALTER TABLE jobs RENAME state TO status", names=(("status", "state"),),
    ),
    "rename current_step": Change(
        "ALTER TABLE jobs RENAME current_step TO step",
        write="warns", listener="current_step does not exist",
        install="table jobs has no column current_step",
        verify=("jobs has no column current_step", CHANGED),
        mend="ALTER TABLE jobs RENAME step TO current_step", names=(("current_step", "step"),),
    ),
    "drop status, CASCADE": Change(
        "ALTER TABLE jobs DROP status CASCADE",
        write="warns", listener="has no triggers of ours",
        install="table jobs has no column status",
        verify=("jobs has no column status", CHANGED, "job_state_change_trigger is missing"),
        mend="ALTER TABLE jobs ADD status text", names=(("status", None),),
    ),
    "widen tenant_id": Change("ALTER TABLE jobs ALTER tenant_id TYPE text", verify=(CHANGED,)),
    "tenant_id to a number": Change(
        "ALTER TABLE jobs ALTER tenant_id TYPE bigint USING 7", verify=(CHANGED,)
    ),
    "integer to bigint": Change(
        "ALTER TABLE jobs ALTER job_id TYPE bigint", verify=(CHANGED,),
        table=JOBS.format("integer"), ids=(*NUMBERS[:2], str(2**40), str(2**40 + 1)),
    ),
    "varchar to text": Change(
        "ALTER TABLE jobs ALTER job_id TYPE text", verify=(CHANGED,),
        table=JOBS.format("varchar(40)"),
    ),
    "uuid to text": Change(
        "ALTER TABLE jobs ALTER job_id TYPE text",
        listener="operator does not exist: text = uuid",
        verify=("job_id is text in jobs and uuid",),
    ),
    "uuid to text, and other ids": Change(
        "ALTER TABLE jobs ALTER job_id TYPE text",
        write="warns", listener="operator does not exist: text = uuid",
        verify=("job_id is text in jobs and uuid",),
        ids=(str(uuid.uuid4()), str(uuid.uuid4()), "job-3", "job-4"),
    ),
    "bigint to text": Change(
        "ALTER TABLE jobs ALTER job_id TYPE text",
        listener="operator does not exist: text = bigint",
        verify=("job_id is text in jobs and bigint",),
        table=JOBS.format("bigint"), ids=tuple(NUMBERS),
    ),
    "bigint to uuid": Change(
        NUMBER_TO_UUID,
        write="warns", listener="operator does not exist: uuid = bigint",
        install="is no uuid", verify=("job_id is uuid in jobs and bigint",), mend=OUR_COPIES,
        table=JOBS.format("bigint"), ids=(*NUMBERS[:2], str(uuid.uuid4()), str(uuid.uuid4())),
    ),
    "another collation": Change(
        'ALTER TABLE jobs ALTER job_id TYPE text COLLATE "ucs_basic"',
        verify=("with another collation in stage_",), table=JOBS.format("text"),
    ),
    "retype status by the recipe": Change(RECIPE, verify=(CHANGED,)),
    "rename the table": Change(
        "ALTER TABLE jobs RENAME TO jobs_old", place="jobs_old",
        listener="there is no table jobs",
        verify=("there is no table jobs, but public.jobs_old has our triggers",),
        install="there is no table jobs, but public.jobs_old has our triggers",
        mend="ALTER TABLE jobs_old RENAME TO jobs",
    ),
    "move it to another schema": Change(
        "CREATE SCHEMA app; ALTER TABLE jobs SET SCHEMA app", place="app.jobs",
        listener="has no triggers of ours", verify=("notify_job_state_change() is not",),
    ),
    "rename its schema": Change(
        "ALTER SCHEMA public RENAME TO app", place="app.jobs",
        write="warns", listener="notify_job_state_change() is not the listener's",
        verify=("notify_job_state_change() is not", "runs another function"),
    ),
    "partition it by attaching it": Change(
        PARTITION, listener="has no triggers of ours", verify=(CHANGED, "is missing on jobs"),
    ),
    "detach a partition": Change(
        "ALTER TABLE jobs DETACH PARTITION jobs_1;"
        "CREATE TABLE jobs_2 PARTITION OF jobs FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        table=PARTITIONED.format("uuid"),
    ),
    "attach a partition": Change(
        "ALTER TABLE jobs DETACH PARTITION jobs_1;"
        "ALTER TABLE jobs ATTACH PARTITION jobs_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        table=PARTITIONED.format("uuid"),
    ),
    "rename a column of a partitioned table": Change(
        "ALTER TABLE jobs RENAME tenant_id TO customer",
        write="warns", listener="tenant_id does not exist",
        install="table jobs has no column tenant_id",
        verify=("jobs has no column tenant_id", CHANGED),
        mend="ALTER TABLE jobs RENAME customer TO tenant_id", names=(("tenant_id", "customer"),),
        table=PARTITIONED.format("uuid"),
    ),
    "a view in its place": Change(
        "ALTER TABLE jobs RENAME TO jobs_v2; CREATE VIEW jobs AS SELECT * FROM jobs_v2",
        listener="jobs is no table, and a view can have no trigger",
        verify=("jobs is no table, and a view can have no trigger of ours; public.jobs_v2 has",),
        install="jobs is no table, and a view can have no trigger of ours; public.jobs_v2 has them",
        mend="ALTER VIEW jobs RENAME TO jobs_v1; ALTER TABLE jobs_v2 RENAME TO jobs",
    ),
    "another table in its place": Change(
        "CREATE TABLE jobs_new (LIKE jobs INCLUDING ALL); INSERT INTO jobs_new SELECT * FROM jobs;"
        "ALTER TABLE jobs RENAME TO jobs_old; ALTER TABLE jobs_new RENAME TO jobs",
        write="unseen", listener="has no triggers of ours",
        verify=(CHANGED, "trigger job_state_change_trigger is missing"),
    ),
    "VACUUM FULL": Change("VACUUM FULL jobs"),
    "CLUSTER": Change("CLUSTER jobs USING jobs_pkey"),
    "REINDEX": Change("REINDEX TABLE jobs"),
}  # fmt: skip


class Team:
    """The application before and after a change, and calls that were owed before it."""

    def __init__(self, database, change: Change):
        self.database, self.change = database, change
        given = iter(change.ids or [str(uuid.uuid4()) for _ in range(8)])
        self.ids = [next(given) for _ in range(4)]
        self.old_session = database.connect()
        self.write(self.old_session, self.ids[0])
        self.write(self.old_session, self.ids[1])
        # Calls that were tried, were given up, or are of a stage that is paused.
        database.rows(
            "UPDATE stage_calls SET attempts = 3, due_at = 'infinity', last_error = 'HTTP 500';"
            "UPDATE pipeline_stages SET held_until = 'infinity', held_by = 'kim';"
            "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
            " finished_at, outcome) SELECT job_id, call_id, 3, stage, 'w', now(), now(), 'failed'"
            " FROM stage_calls"
        )

    def write(self, conn, job: str, place: str = "jobs", names: dict | None = None) -> str:
        """Insert a job, then set it done: "recorded", "warns" or "unseen"."""
        values = {"job_id": job, "tenant_id": "7", "current_step": "img_gen", "status": "queued"}
        names = dict(names or {})
        values = {names.get(name, name): value for name, value in values.items()}
        missing = values.pop(None, None)
        status, key = names.get("status", "status"), names.get("job_id", "job_id")
        del conn.notices[:]
        with conn.cursor() as cursor:
            marks = ", ".join(["%s"] * len(values))
            cursor.execute(f"INSERT INTO {place} ({', '.join(values)}) VALUES ({marks})",
                           list(values.values()))  # fmt: skip
            if missing is None or status is not None:
                cursor.execute(f"UPDATE {place} SET {status} = 'done' WHERE {key} = %s", [job])
        if any("no call is recorded" in notice for notice in conn.notices):
            return "warns"
        owed = "SELECT count(*) FROM stage_calls WHERE job_id::text = %s AND stage = 'vlm_analyze'"
        return "recorded" if self.database.value(owed, job) else "unseen"

    def change_it(self) -> None:
        with closing(self.database.connect()) as conn:
            for statement in self.change.sql.split(";\n" if "BEGIN" in self.change.sql else "\0"):
                conn.cursor().execute(statement)
        if self.change.place == "app.jobs":
            name = self.database.name
            self.database.rows(f"ALTER DATABASE {name} SET search_path = app, public")
            self.database.rows("SET search_path = app, public")

    def write_in_both_sessions(self) -> list[str]:
        names, place = dict(self.change.names), self.change.place
        with closing(self.database.connect()) as new_session:
            said = [
                self.write(conn, job, place, names)
                for conn, job in zip((self.old_session, new_session), self.ids[2:], strict=True)
            ]
        return said

    def kept(self) -> list:
        """The data that must not be lost: the first two calls, the pauses and the history."""
        return [
            self.database.rows("SELECT attempts, due_at, last_error, call_id FROM stage_calls"
                               " WHERE attempts = 3 ORDER BY call_id"),
            self.database.rows("SELECT stage, held_until, held_by FROM pipeline_stages ORDER BY 1"),
            self.database.rows("SELECT call_id, outcome FROM stage_attempts ORDER BY 1"),
        ]  # fmt: skip


def said_by(action) -> str:
    """The error that `action` raises; "" where it works."""
    try:
        action()
    except (Problem, psycopg2.Error) as refused:
        return str(refused)
    return ""


def run_turn(database) -> None:
    """The statements of a listener: its checks at the start, and a turn."""
    with connected(database) as conn:
        require_installed(conn)
        database.rows("UPDATE stage_calls SET due_at = now() WHERE attempts = 3;"
                      "UPDATE pipeline_stages SET held_until = NULL")  # fmt: skip
        claim(conn)


def problems(database) -> list[str]:
    lines = run_here(database.environ | {"STAGE_API_URL": "http://127.0.0.1:9"}, "verify").lines
    found = [line.removeprefix("PROBLEM  ") for line in lines if line.startswith("PROBLEM")]
    return [line for line in found if "stage API" not in line]


@pytest.fixture
def team(each_server, make_database, request):
    change = CHANGES[request.param]

    def prepare(database) -> None:
        database.rows(change.table)
        install(database)

    template = each_server.template(change.table, prepare)
    made = Team(make_database(each_server, template=template), change)
    yield made
    made.old_session.close()


every_change = pytest.mark.parametrize("team", CHANGES, indirect=True)


@every_change
def test_next_write_goes_through_and_the_change_is_named(team):
    team.change_it()
    found = problems(team.database)
    assert len(found) >= len(team.change.verify) and (found == []) == (team.change.verify == ())
    for words in team.change.verify:
        assert any(words in line for line in found), found
    assert team.write_in_both_sessions() == [team.change.write] * 2
    said = said_by(lambda: run_turn(team.database))
    assert team.change.listener in said and bool(said) == bool(team.change.listener)


@every_change
def test_install_keeps_all_that_is_owed(team):
    kept = team.kept()
    team.change_it()
    said = said_by(lambda: install(team.database))
    assert team.change.install in said and bool(said) == bool(team.change.install)
    if team.change.mend:
        team.database.rows(team.change.mend)
        install(team.database)
    assert team.kept() == kept
    assert problems(team.database) == []
    place = "app.jobs" if team.change.place == "app.jobs" else "jobs"
    assert team.write(team.old_session, team.ids[2], place) == "recorded"
    run_turn(team.database)
    assert team.database.value("SELECT count(*) FROM stage_leases") == 1


@every_change
def test_uninstall_leaves_nothing_of_ours(team):
    team.change_it()
    done = run_here(team.database.environ, "uninstall", "--yes")
    assert (done.code, done.err) == (0, ""), done
    names, place = dict(team.change.names), team.change.place
    left = "SELECT count(*) FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid"
    assert team.database.value(f"{left} WHERE p.proname = 'notify_job_state_change'") == 0
    assert team.database.value("SELECT count(*) FROM pg_class WHERE relname ^@ 'stage_'") == 0
    with suppress(psycopg2.errors.UndefinedTable):  # asked for what is owed
        team.write(team.old_session, team.ids[2], place, names)
    assert not team.old_session.notices


# --- what is no DDL ------------------------------------------------------------------------


def test_restored_database_records_at_once_and_install_makes_it_fast(
    each_database, each_server, make_database
):
    each_database.add_job("planner", "done")
    pg_dump, psql = program(each_database, "pg_dump"), program(each_database, "psql")
    dump = subprocess.run([pg_dump, each_database.dsn], capture_output=True, check=True).stdout
    copy = make_database(each_server, installed=False)
    copy.rows("CREATE TABLE before (); CREATE TABLE that ()")  # jobs gets another oid
    restore = [psql, "-qX", "-v", "ON_ERROR_STOP=1", copy.dsn]
    subprocess.run(restore, input=dump, capture_output=True, check=True)
    assert copy.owed(copy.add_job("img_gen", "done")).stage == "vlm_analyze"
    assert [line.split(" →")[0] for line in problems(copy)] == [CHANGED]
    install(copy)
    assert problems(copy) == []
    assert copy.value("SELECT count(*) FROM stage_calls") == 2


def test_data_alone_is_restored_where_our_tables_are_empty_and_no_trigger_fires(
    database, make_database
):
    database.add_job()
    database.add_job()
    with connected(database) as conn:
        assert settle(conn, result(claim(conn)))  # this row rests and owes nothing
    command = [program(database, "pg_dump"), "--data-only", "--disable-triggers", database.dsn]
    dump = subprocess.run(command, capture_output=True, check=True).stdout
    copy = make_database(database.server)
    copy.rows(Readme("docs/OPERATING.md").block("sql", "TRUNCATE pipeline_tables"))
    restore = [program(copy, "psql"), "-qX", "-v", "ON_ERROR_STOP=1", copy.dsn]
    subprocess.run(restore, input=dump, capture_output=True, check=True)
    calls = "SELECT job_id, call_id FROM stage_calls"
    assert copy.rows(calls) == database.rows(calls) != []
    assert problems(copy) == []


def test_rows_that_replication_applies_are_found_by_backfill(database):
    """A subscription's worker fires no trigger that is not ENABLE ALWAYS."""
    database.rows("SET session_replication_role = replica")
    job = database.add_job("img_gen", "done")
    database.rows("RESET session_replication_role")
    assert database.owed(job) is None
    done = run_here(database.environ, "backfill", "--apply")
    assert "1 call recorded" in done.out
    assert database.owed(job).stage == "vlm_analyze"


# Casting one uuid to this takes a minute.
SLOW = "00000000-0000-0000-0000-000000000000"
SLOW_IDS = f"""
CREATE DOMAIN slow_id AS text CHECK (CASE value WHEN '{SLOW}' THEN pg_sleep(60) IS NOT NULL END);
ALTER TABLE jobs ALTER job_id DROP DEFAULT, ALTER job_id TYPE slow_id
"""


def test_history_that_takes_too_long_to_follow_new_ids_can_be_shortened(database):
    jobs = database.add_job("img_gen", "done"), database.add_job("img_gen", "running"), SLOW
    for job in jobs:
        database.rows(
            "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
            " finished_at, outcome) SELECT %s, 1, 1, 'vlm_analyze', 'w', t, t, 'succeeded'"
            " FROM (SELECT now() - interval '2 days') AS x (t)",
            job,
        )
    database.rows(SLOW_IDS)
    with connected(database) as conn:
        conn.cursor().execute("SET statement_timeout = '1s'")
        with pytest.raises(psycopg2.errors.QueryCanceled, match="shorten the history"):
            apply(conn)
        database.rows(Readme("docs/OPERATING.md").block("sql", "DELETE FROM stage_attempts"))
        apply(conn)
    assert [row.job_id for row in database.rows("SELECT job_id FROM stage_attempts")] == [jobs[0]]
    assert problems(database) == []


# Rows that are in a state that owes a call, and came to it without a write.
COME = {
    "attached": (PARTITIONED.format("uuid"), """
CREATE TABLE loaded (LIKE jobs);
INSERT INTO loaded SELECT gen_random_uuid(), '7', 'img_gen', 'done' FROM generate_series(1, 20);
ALTER TABLE jobs DETACH PARTITION jobs_1;
DELETE FROM loaded WHERE NOT satisfies_hash_partition('jobs'::regclass, 2, 1, job_id);
ALTER TABLE jobs ATTACH PARTITION loaded FOR VALUES WITH (MODULUS 2, REMAINDER 1)"""),
    "renamed": ("CREATE TYPE state AS ENUM ('queued', 'finished');"
                + JOBS.format("uuid").replace("varchar(20)", "state"), """
INSERT INTO jobs VALUES (gen_random_uuid(), '7', 'img_gen', 'finished');
ALTER TYPE state RENAME VALUE 'finished' TO 'done'"""),
}  # fmt: skip


@pytest.mark.parametrize("how", COME)
def test_rows_that_came_to_a_state_without_a_write_are_found_by_backfill(each_database, how):
    table, sql = COME[how]
    each_database.rows(f"DROP TABLE jobs CASCADE; {table}")
    install(each_database)
    each_database.rows(sql)
    assert problems(each_database) == []
    assert each_database.value("SELECT count(*) FROM stage_calls") == 0
    assert run_here(each_database.environ, "backfill", "--apply").code == 0
    rows = each_database.value("SELECT count(*) FROM jobs")
    assert each_database.value("SELECT count(*) FROM stage_calls") == rows > 0


REFUSED = [
    "ALTER TABLE jobs ALTER status TYPE varchar(40)",
    "ALTER TABLE jobs ALTER current_step TYPE varchar(40)",
    "ALTER TABLE jobs DROP status",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_postgresql_refuses_what_the_condition_of_the_trigger_needs(each_database, sql):
    with pytest.raises(psycopg2.Error, match="trigger job_state_change_trigger"):
        each_database.rows(sql)


# --- children ------------------------------------------------------------------------------

ON_CHILDREN = {
    "rename the parent's column": "ALTER TABLE jobs_variants RENAME job_id TO parent",
    "drop the parent's column": "ALTER TABLE jobs_variants DROP job_id CASCADE",
    "rename its id": "ALTER TABLE jobs_variants RENAME job_variants_id TO id",
    "retype its id": "ALTER TABLE jobs_variants ALTER job_variants_id DROP DEFAULT,"
    " ALTER job_variants_id TYPE int USING 7",
}


@pytest.mark.parametrize("change", ON_CHILDREN)
def test_writes_to_a_child_go_through_whatever_became_of_its_columns(
    each_database, use_pipeline, change
):
    use_pipeline(PIPELINE)
    each_database.rows(TABLE)
    install(each_database)
    variants = Variants(each_database)
    [kept] = variants.add(each_database.add_job("img_gen", "running"))
    variants.move(kept, "img_gen", "done")
    before = variants.owed()
    with closing(each_database.connect()) as other:
        other.cursor().execute(ON_CHILDREN[change])
    each_database.rows("UPDATE jobs_variants SET current_step = 'x', status = 'y'")
    each_database.rows("DELETE FROM jobs_variants")
    assert "no call is recorded" in each_database.conn.notices[-1]
    assert variants.owed() == before
    assert "jobs_variants" in said_by(lambda: install(each_database))


def test_child_whose_columns_are_widened_is_recorded(each_database, use_pipeline):
    use_pipeline(PIPELINE)
    each_database.rows(TABLE + "ALTER TABLE jobs_variants ALTER status TYPE varchar(20)")
    install(each_database)
    job, variants = each_database.add_job("img_gen", "running"), Variants(each_database)
    [first, second] = variants.add(job, "iou_eval", "queued", 2)
    variants.move(first, "iou_eval", "done")
    each_database.rows(
        "BEGIN; DROP TRIGGER job_state_listener_change ON jobs_variants;"
        "ALTER TABLE jobs_variants ALTER status TYPE text;"
        "CREATE TRIGGER job_state_listener_change AFTER UPDATE ON jobs_variants FOR EACH ROW"
        " EXECUTE FUNCTION job_state_listener_jobs_variants(); COMMIT"
    )
    variants.move(second, "iou_eval", "done")
    assert each_database.value("SELECT count(*) FROM stage_looks") == 2


# --- a change that a claim has waited for --------------------------------------------------


def test_session_that_first_wrote_while_a_column_was_another_writes_on(each_database):
    """PL/pgSQL keeps the types of NEW for as long as the session lasts."""
    job = each_database.add_job("img_gen", "queued")
    each_database.rows("ALTER TABLE jobs ALTER tenant_id TYPE varchar(99)")
    with closing(each_database.connect()) as application:
        application.autocommit = True
        move = "UPDATE jobs SET status = %s WHERE job_id = %s"
        for status in ("done", "paused"):
            application.cursor().execute(move, [status, job])
        each_database.rows("ALTER TABLE jobs ALTER tenant_id TYPE text")
        for status in ("done", "paused", "done"):
            application.cursor().execute(move, [status, job])
    assert each_database.owed(job)


def test_claim_that_waits_for_a_rewrite_does_not_take_the_job_for_deleted(database):
    """Its snapshot is older than the rewrite, and sees an empty table."""
    job = database.add_job()
    with database.connect() as change, connected(database) as conn, ThreadPoolExecutor() as pool:
        change.autocommit = False
        change.cursor().execute("ALTER TABLE jobs ADD number serial")
        claiming = pool.submit(claim, conn)
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database())"
        )
        change.commit()
        call = claiming.result()
    assert (call.key, call.owed, call.attempt) == (job, True, 1)


def test_trigger_that_is_disabled_on_one_partition_is_seen_and_mended(
    server, make_database, run_command
):
    database = make_database(server, installed=False)
    database.rows(PARTITIONED.format("uuid"))
    assert run_command(database, "install").code == 0
    database.rows("ALTER TABLE jobs_1 DISABLE TRIGGER job_state_change_trigger")
    said = "trigger job_state_change_trigger on jobs is disabled, there or on a partition"
    with closing(database.connect()) as change:  # which keeps nobody waiting
        change.cursor().execute("BEGIN; LOCK TABLE jobs_1")
        assert said in run_command(database, "verify").out
    done = run_command(database, "install")
    assert "enabled  trigger job_state_change_trigger on jobs" in done.out
    assert "disabled or wrong owe no call" in done.out
    assert said not in run_command(database, "verify").out
