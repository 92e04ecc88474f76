"""What each role can do in the database, and that it can do nothing else."""

import itertools
import json
import re
from contextlib import suppress

import asynchronous
import commands
import psycopg2
import pytest
from claims import connected
from subscription import Subscription
from test_schema_security import GRANTS
from waiting import wait_until_idle

import db
from ops import migrations
from ops.install import apply
from ops.routes import broken_triggers, triggers

OURS = [table for table in GRANTS if table != "jobs"]
ROLES = {
    "application": {"jobs": ["SELECT", "INSERT", "UPDATE", "DELETE"]},
    "listener": GRANTS,
    "monitor": {table: ["SELECT"] for table in ["jobs", *OURS]},
    "stranger": {},
}


@pytest.fixture
def grant(make_role):
    """grant("listener", database): the name of a role that has exactly these privileges there."""

    def make(kind: str, database) -> str:
        name = make_role(database)
        for table, privileges in ROLES[kind].items():
            database.rows(f"GRANT {', '.join(privileges)} ON {table} TO {name}")
        if kind == "monitor":
            with connected(database) as conn:
                apply(conn, reader=name)
        return name

    return make


# --- privileges ----------------------------------------------------------------------------

PRIVILEGES = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"]


@pytest.mark.parametrize("kind", ROLES)
def test_role_has_its_privileges_and_no_other(each_database, grant, kind):
    name = grant(kind, each_database)
    held = {
        (table, privilege)
        for table, privilege in itertools.product(["jobs", *OURS], PRIVILEGES)
        if each_database.value("SELECT has_table_privilege(%s, %s, %s)", name, table, privilege)
    }
    assert held == {(table, given) for table, all_ in ROLES[kind].items() for given in all_}
    for privilege in ("USAGE", "SELECT", "UPDATE"):
        sequence = "SELECT has_sequence_privilege(%s, 'stage_calls_call_id_seq', %s)"
        assert not each_database.value(sequence, name, privilege)
    function = "SELECT has_function_privilege(%s, 'notify_job_state_change()', 'EXECUTE')"
    assert not each_database.value(function, name)


FOR_NOBODY = [
    "SELECT notify_job_state_change()",
    "DROP FUNCTION notify_job_state_change() CASCADE",
    "ALTER FUNCTION notify_job_state_change() RESET search_path",
    "ALTER FUNCTION notify_job_state_change() SECURITY INVOKER",
    "ALTER FUNCTION notify_job_state_change() OWNER TO CURRENT_USER",
    "CREATE OR REPLACE FUNCTION notify_job_state_change() RETURNS trigger LANGUAGE plpgsql"
    " SECURITY DEFINER AS $$ BEGIN RETURN NULL; END $$",
    "GRANT EXECUTE ON FUNCTION notify_job_state_change() TO CURRENT_USER",
    "ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger",
    "DROP TRIGGER job_state_change_trigger ON jobs",
    "ALTER TRIGGER job_state_change_trigger ON jobs RENAME TO mine",
    "CREATE TRIGGER mine AFTER UPDATE ON jobs FOR EACH ROW"
    " EXECUTE FUNCTION notify_job_state_change()",
    "SET session_replication_role = replica",
    "TRUNCATE jobs",
    *[f"DROP TABLE {table}" for table in OURS],
    *[f"ALTER TABLE {table} DISABLE TRIGGER ALL" for table in OURS],
]  # fmt: skip
ON_JOBS = ["INSERT INTO jobs DEFAULT VALUES", "UPDATE jobs SET status = 'x'", "DELETE FROM jobs",
           "SELECT FROM jobs FOR UPDATE", "SELECT FROM jobs FOR KEY SHARE",
           "LOCK TABLE jobs IN SHARE MODE"]  # fmt: skip
REFUSED = {
    "application": [
        *[f"SELECT FROM {table}" for table in OURS],
        *[f"LOCK TABLE {table} IN ACCESS SHARE MODE" for table in OURS],
    ],
    "listener": [
        *ON_JOBS,
        "INSERT INTO stage_calls (current_step, status, stage) VALUES ('x', 'y', 'z')",
        "INSERT INTO pipeline_stages (current_step, status, stage) VALUES ('x', 'y', 'z')",
        "DELETE FROM pipeline_stages",
        "UPDATE stage_attempts SET outcome = 'succeeded'",
    ],
    "monitor": [
        *ON_JOBS,
        "UPDATE stage_calls SET due_at = now()",
        "UPDATE pipeline_stages SET held_until = 'infinity'",
        "DELETE FROM stage_attempts",
    ],
    "stranger": [*ON_JOBS, *[f"SELECT FROM {table}" for table in ["jobs", *OURS]]],
}


@pytest.mark.parametrize("kind", ROLES)
def test_role_is_refused_what_is_not_its_business(each_database, grant, kind):
    job = each_database.add_job()
    each_database.rows(f"SET ROLE {grant(kind, each_database)}")
    allowed = []
    for statement in [*FOR_NOBODY, *REFUSED[kind]]:
        with suppress(psycopg2.errors.InsufficientPrivilege):
            each_database.rows(f"BEGIN; {statement}")
            allowed.append(statement)
        each_database.rows("ROLLBACK")
    each_database.rows("RESET ROLE")
    assert allowed == [] and each_database.owed(job).attempts == 0


def test_monitor_may_look_and_no_more(database, grant):
    name, job = grant("monitor", database), database.add_job()
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    environ = database.environ | {"DB_USER": name, "DB_PASSWORD": name}

    for looking in ("status", "status --json", f"job {job}", "jobs", "metrics"):
        assert commands.run_here(environ, *looking.split()).code == 0
    for doing in ("retry --all --yes", f"call {job}", "install", "uninstall --yes"):
        refused = commands.run_here(environ, *doing.split()).refused(1)
        assert re.search("permission denied|must be owner", refused)
    assert database.owed(job).given_up
    database.rows(f"REVOKE SELECT ON stage_limits FROM {name}")
    assert commands.run_here(environ, "status").refused(1) == (
        "permission denied for table stage_limits: see 'Roles and grants' in docs/INSTALLING.md"
    )


# --- the owner of jobs ---------------------------------------------------------------------

# Their own type for a column, whose cast to what the function needs is a function of theirs.
OWN_TABLE = """
CREATE TABLE seen (rights text);
GRANT INSERT ON seen TO PUBLIC;  -- for whoever it runs as
"""
OWN_TYPE = (
    OWN_TABLE
    + """
CREATE TYPE own AS ENUM ('img_gen', 'done', '7');
CREATE FUNCTION as_{into}(own) RETURNS {into} LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN $1::varchar; END $$;
CREATE CAST (own AS {into}) WITH FUNCTION as_{into}(own);
ALTER TABLE jobs ALTER {column} TYPE own USING {column}::varchar::own;
"""
)
OWN_CASTS = [("tenant_id", "text"), ("current_step", "text"), ("status", "text"),
             ("tenant_id", "json")]  # fmt: skip


def ordinary_owner(database, make_role) -> str:
    """An ordinary role, to which jobs belongs from now on."""
    owner = make_role(database)
    database.rows(f"GRANT CREATE ON SCHEMA public TO {owner}")
    database.rows("CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id text, current_step text,"
                  f" status text); ALTER TABLE jobs OWNER TO {owner}")  # fmt: skip
    return owner


@pytest.mark.parametrize(("column", "into"), OWN_CASTS)
def test_owner_of_jobs_gets_no_rights_but_their_own(
    each_server, make_database, make_role, column, into
):
    database = make_database(each_server, installed=False)
    owner = ordinary_owner(database, make_role)
    database.rows(f"SET ROLE {owner};" + OWN_TYPE.format(column=column, into=into))
    with connected(database) as conn:  # a superuser
        apply(conn)
    database.rows("INSERT INTO jobs VALUES ('7', '7', 'img_gen', 'done')")
    database.rows("RESET ROLE")
    assert database.value("DELETE FROM stage_calls RETURNING 1") == 1
    assert len(database.rows("SELECT * FROM stalled_jobs()")) == 1
    assert {row.rights for row in database.rows("SELECT rights FROM seen")} == {owner}


# Triggers of theirs on what install writes to, which run as whoever writes.
SPYING = """
CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NULL; END $$;
"""
SPY = "CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON {} EXECUTE FUNCTION spy()"


def test_install_of_a_superuser_runs_no_code_with_their_rights(
    each_server, make_database, make_role
):
    database = make_database(each_server, installed=False)
    owner = ordinary_owner(database, make_role)
    with connected(database) as conn:  # a superuser
        apply(conn)
        database.rows(f"SET ROLE {owner}; {OWN_TABLE} {SPYING}")
        for table in OURS:
            database.rows(SPY.format(table))
        apply(conn)
        assert db.execute(conn, "SELECT current_user = session_user").fetchone()[0]
    assert {row.rights for row in database.rows("SELECT rights FROM seen")} == {owner}


LENDING = ["FUNCTION notify_job_state_change()", "FUNCTION stalled_jobs()"]
# Of all that is in the schema, so also of what install will come to make.
OWNERS = """
SELECT relowner::regrole::text AS owner FROM pg_class
WHERE relnamespace = 'public'::regnamespace
UNION ALL
SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


def test_rights_that_a_superuser_lent_are_taken_back(empty_database, make_role):
    database, owner = empty_database, ordinary_owner(empty_database, make_role)
    with connected(database) as conn:
        apply(conn)
    for made in [*[f"TABLE {table}" for table in OURS], *LENDING]:
        database.rows(f"ALTER {made} OWNER TO CURRENT_USER")
    problem = "PROBLEM  our functions lend the rights of another role to the owner of jobs"
    assert problem in commands.run_here(database.environ, "verify").out
    assert commands.run_here(database.environ, "install").code == 0
    assert problem not in commands.run_here(database.environ, "verify").out
    assert {row.owner for row in database.rows(OWNERS)} == {owner}


def test_owner_who_may_not_use_the_schema_lets_writes_through(
    each_server, make_database, make_role
):
    database = make_database(each_server, installed=False)
    owner, application = ordinary_owner(database, make_role), make_role(database, "jsl_app")
    with connected(database) as conn:
        apply(conn)
    database.rows(
        f"REVOKE ALL ON SCHEMA public FROM PUBLIC, {owner};"
        f"GRANT USAGE ON SCHEMA public TO {application};"
        f"GRANT SELECT, INSERT, UPDATE ON jobs TO {application}; SET ROLE {application}"
    )
    database.rows("INSERT INTO jobs VALUES (7, 'a', 'img_gen', 'done')")
    database.rows("UPDATE jobs SET status = 'running'; UPDATE jobs SET status = 'done'; RESET ROLE")
    warning = database.conn.notices[-1]
    assert f"or not for role {owner} to use" in warning and "HINT:  Run: ./jsl verify" in warning
    assert database.value("SELECT count(*) FROM stage_calls") == 0
    grant = f"GRANT USAGE ON SCHEMA public TO {owner}"
    problem = "trigger job_state_change_trigger on jobs may not use our tables"
    for command, said in {
        "verify": f"{problem} → {grant}; then ./jsl backfill",
        "status": f"       → {grant}; then ./jsl backfill",
        "metrics": 'database_trigger_enabled{trigger="job_state_change_trigger"} 0',
    }.items():
        assert said in commands.run_here(database.environ, command).out
    assert f": {grant}; nothing was changed" in (
        commands.run_here(database.environ, "install").refused(1)
    )
    database.rows(grant)
    assert commands.run_here(database.environ, "backfill", "--apply").code == 0
    assert database.rows("SELECT job_id, stage FROM stage_calls") == [(7, "vlm_analyze")]


OWNERSHIP = "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'notify_job_state_change'"


def test_tables_that_got_another_owner_let_writes_through(each_server, make_database, make_role):
    """A loop of ALTER TABLE, also over the views: the functions keep their owner."""
    database = make_database(each_server, installed=False)
    ordinary_owner(database, make_role)
    other, application = make_role(database), make_role(database, "jsl_app")
    with connected(database) as conn:
        apply(conn)
    for table in ["jobs", *OURS, *migrations.VIEWS]:
        database.rows(f"ALTER TABLE {table} OWNER TO {other}")
    database.rows(f"GRANT SELECT, INSERT, UPDATE ON jobs TO {application}; SET ROLE {application}")
    database.rows("INSERT INTO jobs VALUES (7, 'a', 'img_gen', 'done')")
    database.rows("UPDATE jobs SET status = 'running'; UPDATE jobs SET status = 'done'; RESET ROLE")
    problem = "trigger job_state_change_trigger on jobs may not use our tables"
    for command, said in {
        "verify": f"{problem} → ./jsl install",
        "status": "       → ./jsl install",
        "metrics": 'database_trigger_enabled{trigger="job_state_change_trigger"} 0',
    }.items():
        assert said in commands.run_here(database.environ, command).out
    done = commands.run_here(database.environ, "install")
    assert "mended   trigger job_state_change_trigger on jobs" in done.out
    assert "or wrong owe no call: ./jsl backfill" in done.out
    assert database.value(OWNERSHIP) == other
    assert commands.run_here(database.environ, "backfill", "--apply").code == 0
    assert database.rows("SELECT job_id, stage FROM stage_calls") == [(7, "vlm_analyze")]


CHILDREN = """
CREATE TABLE jobs_variants (job_variants_id bigint PRIMARY KEY, job_id bigint, current_step text,
                            status text);
CREATE INDEX ON jobs_variants (job_id)
"""
LOST = {
    "stage_calls": "SELECT, INSERT, UPDATE, DELETE",
    "stage_looks": "INSERT",  # of joins
    "stage_moves": "INSERT",  # of asynchronous stages
}


@pytest.mark.parametrize(
    ("losing", "mending"),
    [
        ("DROP TABLE {table} CASCADE", None),
        ("REVOKE ALL ON {table} FROM {owner}", "GRANT {rights} ON {table} TO {owner}"),
        ("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
         "ALTER TABLE {table} DISABLE ROW LEVEL SECURITY"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", LOST)
def test_one_table_that_is_lost_lets_writes_through(
    empty_database, make_role, use_pipeline, table, losing, mending
):
    """Each table that a trigger function writes to."""
    use_pipeline(asynchronous.PIPELINE)
    owner = ordinary_owner(empty_database, make_role)
    empty_database.rows(f"SET ROLE {owner}; {CHILDREN}; RESET ROLE")
    with connected(empty_database) as conn:
        apply(conn)
    empty_database.rows(losing.format(table=table, owner=owner))
    empty_database.rows("INSERT INTO jobs VALUES (7, 'a', 'img_gen', 'queued')")
    empty_database.rows("UPDATE jobs SET status = 'done'; UPDATE jobs SET status = 'x'")
    empty_database.rows("INSERT INTO jobs_variants VALUES (1, 7, 'yolo_detect', 'running')")
    empty_database.rows("UPDATE jobs_variants SET status = 'done'; DELETE FROM jobs_variants")
    assert f"or not for role {owner} to use" in empty_database.conn.notices[-1]
    mend = (mending or "./jsl install").format(table=table, rights=LOST[table], owner=owner)
    with connected(empty_database) as conn:
        told = "trigger job_state_listener_change on jobs_variants may not use our tables"
        assert (told, mend) in broken_triggers(triggers(conn))
    if mending:
        refused = commands.run_here(empty_database.environ, "install").refused(1)
        assert refused.endswith(f"may not write to our tables: {mend}; nothing was changed")
        empty_database.rows(mend)
    assert commands.run_here(empty_database.environ, "install").code == 0
    with connected(empty_database) as conn:
        assert broken_triggers(triggers(conn)) == []


def test_verify_names_a_table_that_the_views_cannot_read(empty_database, make_role):
    """A superuser can, whose listener works; status, which asks the views, does not."""
    owner = ordinary_owner(empty_database, make_role)
    with connected(empty_database) as conn:
        apply(conn)
    forced = "ALTER TABLE stage_attempts ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
    empty_database.rows(f"{forced}; CREATE POLICY everything ON stage_attempts USING (true)")
    mend = "ALTER TABLE stage_attempts DISABLE ROW LEVEL SECURITY"
    assert commands.run_here(empty_database.environ, "status").refused(1).endswith(f": {mend}")
    hidden = f"row-level security hides rows of stage_attempts from {owner}, with whose rights"
    problem = f"PROBLEM  {hidden} the views read → {mend}\n"
    assert problem in commands.run_here(empty_database.environ, "verify").out
    empty_database.rows(mend)
    assert problem not in commands.run_here(empty_database.environ, "verify").out
    assert commands.run_here(empty_database.environ, "status").code == 0


def test_install_says_that_the_owner_of_jobs_may_not_use_the_schema(empty_database, make_role):
    owner = ordinary_owner(empty_database, make_role)
    empty_database.rows(f"REVOKE ALL ON SCHEMA public FROM PUBLIC, {owner}")
    assert f"may not use schema public: GRANT USAGE ON SCHEMA public TO {owner}; nothing" in (
        commands.run_here(empty_database.environ, "install").refused(1)
    )
    assert not empty_database.value("SELECT to_regclass('stage_calls')")


# --- a session that its user has bent ------------------------------------------------------

BENT = {
    "search_path": "''", "row_security": "off", "DateStyle": "'SQL, DMY'",
    "TimeZone": "'Asia/Seoul'",
    "transform_null_equals": "on", "standard_conforming_strings": "off", "array_nulls": "off",
    "extra_float_digits": "-15", "bytea_output": "escape", "enable_indexscan": "off",
    "enable_nestloop": "off", "plan_cache_mode": "force_generic_plan", "default_tablespace": "''",
    "quote_all_identifiers": "on", "check_function_bodies": "off", "client_min_messages": "error",
    "default_transaction_isolation": "'read committed'", "synchronous_commit": "off",
}  # fmt: skip


def test_settings_of_a_session_do_not_bend_the_trigger(each_database, grant):
    each_database.rows(f"SET ROLE {grant('application', each_database)}")
    for name, value in BENT.items():
        each_database.rows(f"SET {name} = {value}")
    job = "7f1c6f4e-8f3c-4d53-9b1c-0c2b6b1f2a3d"
    with Subscription(each_database) as subscription:
        each_database.rows(
            "INSERT INTO public.jobs (job_id, tenant_id, current_step, status)"
            " VALUES (%s, 'a\"b\\\\c', 'overlay', 'done')", job,
        )  # fmt: skip
        [said] = subscription.messages()
    assert said == {
        "job_id": job,
        "current_step": "overlay",
        "status": "done",
        "tenant_id": 'a"b\\c',
    }
    each_database.rows("RESET ROLE; RESET ALL")
    assert each_database.owed(job).stage == "vlm_judge"


# --- anybody who can connect ---------------------------------------------------------------


def test_notification_that_anybody_sends_calls_nothing(
    database, make_role, api, listener, tmp_path
):
    """It makes listeners look, and they find what is owed, whatever was said."""
    process = listener(database, api=api, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    queued, given_up = database.add_job("img_gen", "queued"), database.add_job("x", "y")
    database.rows("INSERT INTO stage_calls (job_id, current_step, status, stage, due_at)"
                  " VALUES (%s, 'x', 'y', 'planner', 'infinity')", given_up)  # fmt: skip
    database.rows(f"SET ROLE {make_role(database)}")
    for job in (queued, given_up, "no job"):
        said = {"job_id": job, "current_step": "img_gen", "status": "done", "tenant_id": "t"}
        database.rows("SELECT pg_notify(%s, %s)", db.CHANNEL, json.dumps(said))
        process.wait_for_line(f"Job 상태 변화 감지: job={job}")
    database.rows(f'NOTIFY "{db.WAKE_CHANNEL}"; RESET ROLE')
    owing = database.add_job("overlay", "done")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    assert [call.job_id for call in api.calls()] == [owing]
