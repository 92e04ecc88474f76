"""Whose rights are used for what: the application's role, a hostile role, the listener's role."""

import itertools
import re
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from claims import LEASE_OVER, claim, claim_many, connected, held, result, settle
from subscription import Subscription

import calls
import db
import history
import leftovers
import notifications
import upkeep
from ops import migrations
from ops.install import apply
from ops.problem import Problem
from ops.routes import require_installed

ROOT = Path(__file__).parent.parent


@pytest.fixture
def application(each_database, make_role):
    """A role that may use jobs, and nothing of ours."""
    role = make_role(each_database)
    each_database.rows(f"GRANT SELECT, INSERT, UPDATE, DELETE ON jobs TO {role}")
    return role


# --- the application's role ----------------------------------------------------------------


def test_application_role_needs_no_grant_on_our_tables(each_database, application):
    with Subscription(each_database) as subscription:
        each_database.rows(f"SET ROLE {application}")
        born = each_database.add_job("overlay", "done")
        moved = each_database.add_job("img_gen", "queued")
        each_database.move(moved, "img_gen", "done")
        each_database.rows("RESET ROLE")
        assert [said["job_id"] for said in subscription.messages()] == [born, moved]
    assert each_database.owed(born).stage == "vlm_judge"
    assert each_database.owed(moved).stage == "vlm_analyze"


def test_application_role_cannot_touch_our_tables(each_database, application):
    each_database.rows(f"SET ROLE {application}")
    for table in ("pipeline_stages", "stage_calls", "stage_attempts"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            each_database.rows(f"DELETE FROM {table}")


def test_function_cannot_be_hung_on_another_table(each_database, application):
    each_database.rows(f"GRANT CREATE ON SCHEMA public TO {application}; SET ROLE {application}")
    each_database.rows("CREATE TABLE mine (LIKE jobs)")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        each_database.rows(
            "CREATE TRIGGER mine AFTER INSERT ON mine FOR EACH ROW"
            " EXECUTE FUNCTION notify_job_state_change()"
        )


# --- a hostile role ------------------------------------------------------------------------

# A trigger on the attacker's own table would run with the rights of our function.
SHADOWS = """
SET search_path = pg_temp, public;
CREATE TEMP TABLE stage_calls (LIKE public.stage_calls INCLUDING ALL);
CREATE TEMP TABLE pipeline_stages (LIKE public.pipeline_stages INCLUDING ALL);
INSERT INTO pipeline_stages VALUES ('img_gen', 'done', 'stolen');
CREATE TEMP TABLE stolen (rights text);
GRANT INSERT ON stolen TO PUBLIC;
CREATE FUNCTION pg_temp.steal() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO pg_temp.stolen VALUES (current_user); RETURN NEW; END $$;
CREATE TRIGGER steal BEFORE INSERT ON stage_calls FOR EACH ROW EXECUTE FUNCTION pg_temp.steal();
"""


@pytest.fixture
def shadowed(each_database, application):
    """The session of a role that has temporary tables with our names."""
    for table in ("stage_calls", "pipeline_stages"):
        each_database.rows(f"GRANT SELECT ON {table} TO {application}")  # only for LIKE
    each_database.rows(f"SET ROLE {application}; {SHADOWS}")
    return each_database


def test_temporary_tables_of_the_caller_are_not_used(shadowed):
    job = shadowed.add_job("img_gen", "done")
    assert shadowed.rows("SELECT 1 FROM pg_temp.stage_calls") == []
    assert shadowed.rows("SELECT 1 FROM stolen") == []
    shadowed.rows("RESET ROLE; RESET search_path")
    assert shadowed.value("SELECT stage FROM public.stage_calls WHERE job_id = %s", job) == (
        "vlm_analyze"
    )


def test_temporary_tables_do_not_stand_in_for_missing_ones(shadowed):
    with closing(shadowed.connect()) as other:
        other.cursor().execute("DROP TABLE stage_calls, pipeline_stages CASCADE")
    shadowed.add_job("img_gen", "done")
    assert shadowed.rows("SELECT * FROM stolen") == []
    assert shadowed.rows("SELECT 1 FROM pg_temp.stage_calls") == []


@pytest.mark.parametrize("tables", ["stage_calls, pipeline_stages", "stage_calls"])
def test_missing_tables_let_the_application_through_with_a_warning(
    each_database, application, tables
):
    each_database.rows(f"DROP TABLE {tables} CASCADE; SET ROLE {application}")
    with Subscription(each_database) as subscription:
        job = each_database.add_job("img_gen", "queued")
        each_database.move(job, "img_gen", "done")
        assert each_database.state(job) == ("img_gen", "done")
        assert [said["status"] for said in subscription.messages()] == ["done"]
    assert "WARNING:  Job State Listener: its tables are missing" in each_database.conn.notices[-1]
    assert "./jsl verify" in each_database.conn.notices[-1]


TYPES = [
    *("oid", "regclass", "regproc", "regprocedure", "text", "varchar", "name", '"char"', "text[]"),
    *("smallint", "integer", "bigint", "float8", "numeric", "bigint[]", "timestamptz", "interval"),
    *("uuid", "json", "boolean"),
]
OPERATORS = ["=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "||"]
NAMES = "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace"
TRAP = "LANGUAGE plpgsql AS $$ BEGIN RAISE 'shadowed: {}'; END $$;"


def traps(names: list[str]) -> str:
    """Operators and functions of public that fit some use of ours better than pg_catalog's."""
    made = []
    for number, (left, right) in enumerate(itertools.product(TYPES, TYPES)):
        trap = TRAP.format(f"{left} ? {right}")
        made.append(f"CREATE FUNCTION public.trap_{number}({left}, {right}) RETURNS boolean {trap}")
        made += [
            f"CREATE OPERATOR public.{operator} (FUNCTION = public.trap_{number},"
            f" LEFTARG = {left}, RIGHTARG = {right});"
            for operator in OPERATORS
        ]
    pairs = itertools.product(["oid", "integer", "numeric", "text", "timestamptz"], repeat=2)
    signatures = [(name, given) for name in names for given in [*((t,) for t in TYPES), *pairs]]
    signatures += [
        ("format", ["text"] * 3),
        ("json_build_object", ["text", "varchar", *["text"] * 6]),
    ]
    for name, given in signatures:
        types = ", ".join(given)
        trap = TRAP.format(f"{name}({types})")
        made.append(f"CREATE FUNCTION public.{name}({types}) RETURNS text {trap}")
    for secs in ("bigint", "integer", "numeric"):
        made.append(f"DROP FUNCTION IF EXISTS public.make_interval({secs});")
        trap = TRAP.format("make_interval")
        made.append(f"CREATE FUNCTION public.make_interval(secs {secs}) RETURNS interval {trap}")
    return "".join(made)


def set_traps(database, role: str) -> None:
    """Let a role that may create in public shadow all that our SQL uses."""
    files = [*ROOT.glob("*.sql"), ROOT / "db.py", ROOT / "calls.py", *ROOT.glob("ops/*.py")]
    used = re.findall(r"\b([a-z_]+)\(", "".join(file.read_text() for file in files))
    names = [row.proname for row in database.rows(NAMES + " AND proname = ANY (%s)", used)]
    database.rows(f"GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role}")
    database.rows("BEGIN;" + traps(names) + "COMMIT; RESET ROLE")
    with pytest.raises(psycopg2.errors.RaiseException, match="shadowed"):
        database.rows("SELECT 1 FROM pg_class WHERE oid = 'jobs'::regclass")


def test_shadowing_functions_do_not_run_in_the_trigger(empty_database, make_role):
    database = empty_database
    database.rows("CREATE TABLE jobs (job_id varchar(40) PRIMARY KEY, tenant_id varchar(9000),"
                  " current_step varchar(40), status varchar(40))")  # fmt: skip
    with connected(database) as conn:
        apply(conn)
    set_traps(database, make_role(database))
    database.rows("INSERT INTO jobs VALUES ('job', %s, 'img_gen', 'queued')", "x" * 9000)
    database.rows("UPDATE jobs SET status = 'done'")
    assert database.rows("SELECT stage FROM stage_calls") == [("vlm_analyze",)]
    database.rows("UPDATE jobs SET status = 'running'")
    assert database.rows("SELECT stage FROM stage_calls") == []


SHADOWED_TYPES = ["text", "json", "boolean", "integer", "uuid", "timestamptz", "trigger", "record"]


def test_shadowing_types_and_relations_are_not_used(each_database, application):
    """In public, and among the temporary ones of whoever changes a job."""
    each_database.rows(f"GRANT CREATE ON SCHEMA public TO {application}; SET ROLE {application}")
    for schema, name in itertools.product(["public", "pg_temp"], SHADOWED_TYPES):
        each_database.rows(f'CREATE DOMAIN {schema}."{name}" AS pg_catalog.int4 CHECK (false)')
    for schema, name in itertools.product(["public", "pg_temp"], ["pg_class", "pg_proc"]):
        each_database.rows(f"CREATE TABLE {schema}.{name} (oid pg_catalog.oid)")
    job = each_database.add_job("img_gen", "queued")
    each_database.move(job, "img_gen", "done")
    each_database.rows("RESET ROLE")
    assert each_database.owed(job).stage == "vlm_analyze"
    with connected(each_database) as conn:
        apply(conn)
        assert claim(conn).owed


# --- the listener's role -------------------------------------------------------------------

GRANTS = {
    "jobs": ["SELECT"],
    "pipeline_tables": ["SELECT"],
    "pipeline_stages": ["SELECT", "UPDATE"],
    "stage_calls": ["SELECT", "UPDATE", "DELETE"],
    "stage_limits": ["SELECT", "UPDATE"],
    "stage_leases": ["SELECT", "INSERT", "UPDATE", "DELETE"],
    "stage_attempts": ["SELECT", "INSERT", "DELETE"],
    "stage_totals": ["SELECT", "INSERT", "UPDATE"],
    "stage_totals_mark": ["SELECT", "UPDATE"],
    "job_state_listener_schema": ["SELECT"],
}


EMPTY = "TRUNCATE jobs, stage_calls, stage_attempts, stage_leases, stage_limits"


def one_of_everything(database, conn) -> None:
    """Every statement of a listener's life, each with a row that it concerns."""
    job = database.add_job()
    assert settle(conn, held(claim(conn), retry_after=2.5))
    assert claim(conn).next_due > 0
    database.rows("UPDATE pipeline_stages SET held_until = now()")
    row = claim(conn, lease=30.5)
    assert settle(conn, held(row))
    database.rows("UPDATE pipeline_stages SET held_until = now()")
    assert settle(conn, result(claim(conn), "retry", delay=0.5, error="HTTP 500"))
    database.rows("INSERT INTO stage_limits VALUES ('vlm_analyze', '{vlm_analyze}', 1)")
    assert claim(conn, only=job).call_id
    database.rows(LEASE_OVER)
    row = claim(conn)  # the one before is lost
    assert row.taken_over and len(calls.reap(conn)) == 1
    assert claim(conn, settled=result(row)).call_id is None
    assert [attempt.outcome for attempt in database.attempts(job)] == (
        ["held", "held", "retry", "lost", "succeeded"]
    )
    database.add_job("planner", "done")
    claim(conn)
    assert calls.give_back(conn, "w", keep=()).given_back == 1
    assert settle(conn, result(claim(conn), "unknown", delay=0, after_lease=True))
    database.rows("DELETE FROM jobs; UPDATE stage_calls SET due_at = 'infinity'")
    assert leftovers.forget_deleted(conn, "w") is None
    database.rows("UPDATE stage_attempts SET finished_at = finished_at - interval '2 days'")
    assert history.count(conn) == 7
    assert history.prune(conn, days=1).pruned + history.prune(conn, days=0.5).pruned == 7
    database.rows("DELETE FROM stage_limits")  # which PIPELINE does not declare
    migrations.require_not_newer(conn)
    require_installed(conn)
    upkeep.store_timeouts(conn, {"planner": 1.0})


@pytest.fixture
def listener_role(each_database, make_role):
    role = make_role(each_database)
    for table, privileges in GRANTS.items():
        each_database.rows(f"GRANT {', '.join(privileges)} ON {table} TO {role}")
    return role


def test_listener_role_needs_these_grants_and_no_more(each_database, listener_role):
    with connected(each_database, DB_USER=listener_role, DB_PASSWORD=listener_role) as conn:
        one_of_everything(each_database, conn)
        notifications.listen(conn)


def test_listener_role_needs_each_of_its_grants(database, make_role):
    role = make_role(database)
    given = [(privilege, table) for table in GRANTS for privilege in GRANTS[table]]
    for privilege, table in given:
        database.rows(f"GRANT {privilege} ON {table} TO {role}")
    with connected(database, DB_USER=role, DB_PASSWORD=role) as conn:
        for privilege, table in given:
            database.rows(EMPTY)
            database.rows("UPDATE pipeline_stages SET held_until = NULL")
            database.rows(f"REVOKE {privilege} ON {table} FROM {role}")
            with pytest.raises((psycopg2.errors.InsufficientPrivilege, Problem), match=table):
                one_of_everything(database, conn)
            database.rows(f"GRANT {privilege} ON {table} TO {role}")
        database.rows(EMPTY)
        one_of_everything(database, conn)


def test_listener_role_may_claim_in_order_also_where_an_earlier_install_forbade_it(
    each_database, listener_role
):
    each_database.rows("REVOKE ALL ON FUNCTION stage_due_calls FROM PUBLIC")
    with connected(each_database) as conn:
        apply(conn)
    job = each_database.add_job()
    with connected(each_database, DB_USER=listener_role, DB_PASSWORD=listener_role) as conn:
        [row] = claim_many(conn, 1, ordered=True).claimed
    assert row.job_id == job


def test_listener_role_cannot_lead_jobs_elsewhere(each_database, listener_role):
    with connected(each_database, DB_USER=listener_role, DB_PASSWORD=listener_role) as conn:
        db.execute(conn, "UPDATE pipeline_stages SET stage = 'x', status = 'y'")
    assert each_database.owed(each_database.add_job("img_gen", "done")).stage == "vlm_analyze"


def test_hidden_jobs_are_an_error_and_not_deleted_ones(each_database, listener_role):
    job = each_database.add_job()
    each_database.rows("ALTER TABLE jobs ENABLE ROW LEVEL SECURITY")
    with connected(each_database, DB_USER=listener_role, DB_PASSWORD=listener_role) as conn:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="row-level security"):
            claim(conn)
        each_database.rows("UPDATE stage_calls SET due_at = 'infinity'")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="row-level security"):
            leftovers.forget_deleted(conn, "w")
    assert each_database.owed(job).attempts == 0
    assert each_database.attempts(job) == []


def test_role_that_bypasses_row_security_works_as_usual(each_database, listener_role):
    each_database.rows(f"ALTER ROLE {listener_role} BYPASSRLS")
    each_database.rows("ALTER TABLE jobs ENABLE ROW LEVEL SECURITY")
    job = each_database.add_job()
    with connected(each_database, DB_USER=listener_role, DB_PASSWORD=listener_role) as conn:
        row = claim(conn)
    assert (row.job_id, row.owed) == (job, True)
