"""What `install` finds in a database of somebody else: names, owners, grants, ids of any kind."""

import pytest
from claims import claim, connected, result, settle
from test_fairness import MODULE as FAIR
from test_plans import read_by
from test_schema_install import install
from variants import PIPELINE, stage

import history
import joins
import troubles
from ops import migrations
from ops.grants import others
from ops.install import SCHEMA, apply
from ops.problem import Problem
from pipeline import Table

JOBS = "CREATE TABLE jobs (job_id {} PRIMARY KEY, tenant_id text, current_step text, status text)"
EVERYTHING = """
SELECT oid, relname::text, relowner, relacl::text FROM pg_class
WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT oid, proname, proowner, prosrc FROM pg_proc
WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT oid, tgname, tgrelid, NULL FROM pg_trigger
ORDER BY 1
"""


def refused(database, **settings) -> str:
    """What install says, and that it changed nothing."""
    before = database.rows(EVERYTHING)
    with pytest.raises(Problem) as problem:
        install(database, **settings)
    assert database.rows(EVERYTHING) == before
    return str(problem.value).removesuffix("; nothing was changed")


# --- names ---------------------------------------------------------------------------------

NAMES = {
    "a table": ("CREATE TABLE stage_calls (id int)", "table stage_calls"),
    "a view": ("CREATE VIEW stage_latency AS SELECT 1 AS one", "view stage_latency"),
    "a table of a view's name": ("CREATE TABLE given_up_calls (id int)", "table given_up_calls"),
    "a table with the columns of a view": (
        "CREATE TABLE stage_latency (stage text, hour timestamptz)",
        "table stage_latency",
    ),
    "a sequence": ("CREATE SEQUENCE stage_leases", "relation stage_leases"),
    "a type": ("CREATE TYPE stage_limits AS (a int)", "relation stage_limits"),
    "a function": (
        "CREATE FUNCTION stalled_jobs() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "function stalled_jobs()",
    ),
    "a function with arguments": (
        "CREATE FUNCTION stage_due_calls(text, int, int, boolean) RETURNS int LANGUAGE sql"
        " AS 'SELECT 1'",
        "function stage_due_calls(text,integer,integer,boolean)",
    ),
    "a trigger function": (
        "CREATE FUNCTION notify_job_state_change() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN NEW.status := 1; RETURN NEW; END'",
        "function notify_job_state_change()",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_the_application_are_refused_and_never_replaced(empty_database, kind):
    sql, named = NAMES[kind]
    empty_database.rows(sql)
    assert refused(empty_database) == f"{named} is not ours, and we need its name: rename it"


def test_functions_of_our_names_with_other_arguments_are_left_alone(empty_database):
    empty_database.rows(
        "CREATE FUNCTION stalled_jobs(int) RETURNS int LANGUAGE sql AS 'SELECT 1';"
        "CREATE FUNCTION stage_due_calls() RETURNS int LANGUAGE sql AS 'SELECT 2'"
    )
    install(empty_database)
    found = empty_database.row("SELECT stalled_jobs(5), stage_due_calls()")
    assert found == (1, 2)


THEIRS = """
CREATE FUNCTION job_state_listener_{0}() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN RETURN NULL; END';
CREATE TABLE notes (id int);
CREATE TRIGGER noted AFTER INSERT ON notes EXECUTE FUNCTION job_state_listener_{0}()
"""


def test_trigger_of_the_application_with_our_prefix_stays(empty_database):
    empty_database.rows(THEIRS.format("audit"))
    install(empty_database)
    assert empty_database.value("SELECT count(*) FROM pg_trigger WHERE tgname = 'noted'") == 1


def test_trigger_function_with_the_name_of_ours_is_refused(variants, use_pipeline):
    database = variants.database
    database.rows("CREATE TABLE other (other_id uuid PRIMARY KEY, current_step text, status text);"
                  + THEIRS.format("other"))  # fmt: skip
    use_pipeline(PIPELINE | {Table("other", id="other_id")("x", "y"): stage("planner")})
    named = "function job_state_listener_other()"
    assert refused(database) == f"{named} is not ours, and we need its name: rename it"


# --- ids -----------------------------------------------------------------------------------

TYPES = """
CREATE TYPE pair AS (a int, b text);
CREATE TYPE letter AS ENUM ('a', 'b');
CREATE DOMAIN document AS json;
CREATE DOMAIN number AS int;
CREATE DOMAIN filled AS uuid NOT NULL;
CREATE DOMAIN checked AS uuid CHECK (VALUE IS NOT NULL)
"""
UNFIT = ["jsonb", "json", "point", "xml", "pair", "document", "bytea", "text[]"]
FIT = {"inet": "::1", "number": 7, "letter": "a", "date": "2020-02-29", "char(4)": "ab"}


@pytest.mark.parametrize("id_type", UNFIT)
def test_type_that_cannot_be_an_id_is_refused(each_server, make_database, id_type):
    database = make_database(each_server, installed=False)
    database.rows(TYPES + ";" + JOBS.format(id_type).replace(" PRIMARY KEY", ""))
    assert refused(database) == (
        f"jobs.job_id is of type {id_type}, which cannot be an id: give it a type such as uuid, "
        "bigint or text (ALTER TABLE)"
    )


@pytest.mark.parametrize("id_type", ["filled", "checked"])
def test_domain_that_refuses_null_cannot_be_an_id(each_server, make_database, id_type):
    database = make_database(each_server, installed=False)
    database.rows(TYPES + ";" + JOBS.format(id_type))
    assert refused(database) == (
        f"jobs.job_id is of type {id_type}, which refuses NULL: give it the type that this domain "
        "is made of (ALTER TABLE)"
    )


@pytest.mark.parametrize("id_type", FIT)
def test_ids_of_any_other_type_are_called(each_server, make_database, id_type):
    database = make_database(each_server, installed=False)
    database.rows(TYPES + ";" + JOBS.format(id_type))
    install(database)
    database.rows("INSERT INTO jobs VALUES (%s, 't', 'img_gen', 'done')", FIT[id_type])
    with connected(database) as conn:
        row = claim(conn)
        assert row.owed
        assert settle(conn, result(row, "retry", delay=60, error="HTTP 500"))
    assert database.value("SELECT last_error FROM stage_calls") == "HTTP 500"


NOT_UNIQUE = {
    "a key of the tenant's": "PRIMARY KEY (tenant_id, job_id)",
    "a key that begins with it": "PRIMARY KEY (job_id, tenant_id)",
    "a partial index": "",
    "an index on an expression": "",
}
INDEXES = {
    "a partial index": "CREATE UNIQUE INDEX ON jobs (job_id) WHERE status = 'done'",
    "an index on an expression": "CREATE UNIQUE INDEX ON jobs ((job_id + 0))",
}


@pytest.mark.parametrize("kind", NOT_UNIQUE)
def test_id_that_is_not_unique_by_itself_is_refused(each_server, make_database, kind):
    database = make_database(each_server, installed=False)
    key = ", " + NOT_UNIQUE[kind] if NOT_UNIQUE[kind] else ""
    database.rows("CREATE TABLE jobs (tenant_id int, job_id int, current_step text, status text"
                  f"{key}); {INDEXES.get(kind, '')}")  # fmt: skip
    assert "jobs.job_id is not unique by itself" in refused(database)
    database.rows("CREATE UNIQUE INDEX ON jobs (job_id)")
    install(database)


def test_scripts_are_known_in_every_encoding():
    for file in SCHEMA:
        assert file.read_text(encoding="utf-8").isascii()


# --- collations ----------------------------------------------------------------------------

SCANS = """
SELECT relname, seq_scan, idx_scan FROM pg_stat_xact_user_tables WHERE relname ^@ 'stage_calls'
"""


CHILDREN = """
CREATE TABLE jobs_variants (job_variants_id {0} PRIMARY KEY, job_id {0}, current_step text,
                            status text);
CREATE INDEX ON jobs_variants (job_id)
"""
MANY = """
INSERT INTO jobs SELECT n, 't', 'x', 'x' FROM generate_series(1, 5000) AS n;
INSERT INTO jobs_variants SELECT n, n, 'x', 'x' FROM generate_series(1, 5000) AS n;
INSERT INTO stage_joins SELECT job_id, 'x', false FROM jobs;
ANALYZE
"""


@pytest.mark.parametrize("id_type", ["text", 'varchar(20) COLLATE "POSIX"'])
def test_rows_with_ids_of_text_are_read_by_their_ids(
    each_server, make_database, use_pipeline, id_type
):
    use_pipeline(PIPELINE)
    database = make_database(each_server, installed=False)
    database.rows(f"{JOBS.format(id_type)}; {CHILDREN.format(id_type)}")
    install(database)
    database.rows(MANY)
    with connected(database) as conn:
        database.rows("UPDATE jobs_variants SET current_step = 'iou_eval', status = 'done'"
                      " WHERE job_id = '4000'")  # fmt: skip
        looked = read_by(conn, lambda: joins.look(conn))
        joins.look(conn)
        claimed = read_by(conn, lambda: claim(conn, stages=["ad_copy"]))
        assert claim(conn, stages=["ad_copy"]).key == "4000"
    for read in (looked, claimed):
        scans = {table: scans for table, (scans, _, _) in read.items()}
        assert (scans["jobs"], scans["jobs_variants"], scans["stage_joins"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "types", [('text COLLATE "C"', "text"), ('text COLLATE "POSIX"', 'text COLLATE "C"')]
)
def test_rows_of_a_table_with_another_collation_are_read_by_their_ids(
    each_server, make_database, use_pipeline, types
):
    use_pipeline(PIPELINE)
    database = make_database(each_server, installed=False)
    database.rows(f"{JOBS.format(types[0])}; {CHILDREN.format(types[1])}")
    install(database)
    database.rows(MANY)
    database.rows("INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker,"
                  "                            started_at, finished_at, outcome)"
                  " SELECT '4000', 'jobs_variants', 1, 1, 'yolo_detect', 'w', at, at, 'succeeded'"
                  " FROM (SELECT now() - interval '40 days' AS at) AS t")  # fmt: skip
    with connected(database) as conn:
        history.count(conn)
        pruned = read_by(conn, lambda: history.prune(conn, 30))
        troubles.newly_failed(conn)
    assert pruned["jobs_variants"][:2] == (0, 1)


@pytest.mark.parametrize("late", [False, True], ids=["at first", "when installed"])
@pytest.mark.parametrize("collation", ["ucs_basic", "POSIX"])
def test_copies_have_the_collation_of_the_id(each_server, make_database, collation, late):
    database = make_database(each_server, installed=False)
    given = f'COLLATE "{collation}"'
    database.rows(JOBS.format("text" if late else f"text {given}"))
    if late:
        install(database)
        database.rows("INSERT INTO jobs VALUES ('before', 't', 'planner', 'done')")
        database.rows(f"ALTER TABLE jobs ALTER job_id TYPE text {given}")
    install(database)
    database.rows("INSERT INTO jobs SELECT n, 't', 'img_gen', 'done' FROM generate_series(1, 3) n")
    database.rows("BEGIN; UPDATE jobs SET status = 'running'")
    assert [row.seq_scan for row in database.rows(SCANS)] == [0]
    database.rows("ROLLBACK")
    copies = (
        "SELECT DISTINCT collname FROM pg_attribute JOIN pg_collation AS c ON c.oid = attcollation"
        " WHERE attrelid IN ('stage_calls'::regclass, 'stage_leases'::regclass,"
        " 'stage_attempts'::regclass, 'stage_looks'::regclass, 'stage_joins'::regclass)"
        " AND attname IN ('job_id', 'parent_id')"
    )
    assert [row.collname for row in database.rows(copies)] == [collation]
    with connected(database) as conn:
        assert claim(conn).owed


# --- owners --------------------------------------------------------------------------------

OWNERS = """
SELECT relowner::regrole::text FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


@pytest.fixture
def app(each_server, make_database, make_role):
    """A database whose jobs belongs to a role of the application's, and that role."""
    database = make_database(each_server, installed=False)
    owner = make_role(database)
    # As PostgreSQL has it from 15 on.
    database.rows("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    database.rows(JOBS.format("int") + f"; ALTER TABLE jobs OWNER TO {owner}")
    return database, owner


def test_role_that_only_has_trigger_does_not_lend_its_rights(app, make_role):
    database, owner = app
    ops = make_role(database)
    database.rows(f"GRANT SELECT, TRIGGER ON jobs TO {ops}; GRANT CREATE ON SCHEMA public TO {ops}")
    said = refused(database, DB_USER=ops, DB_PASSWORD=ops)
    assert said == (
        f"jobs belongs to {owner}, whose code would run with the rights of {ops}: GRANT CREATE ON"
        f" SCHEMA public TO {owner}, and install as {owner}, or as a superuser"
    )
    database.rows(f"GRANT CREATE ON SCHEMA public TO {owner}")
    install(database, DB_USER=owner, DB_PASSWORD=owner)
    assert [tuple(row) for row in database.rows(OWNERS)] == [(owner,)]
    said = refused(database, DB_USER=ops, DB_PASSWORD=ops)
    assert said.endswith(f" with the rights of {ops}: install as {owner}, or as a superuser")


def test_owner_whose_name_needs_quotes_installs_and_verifies(app, make_role, run_command):
    database, _ = app
    owner, reader = make_role(database, "Jsl.Role"), make_role(database)
    database.rows(
        f'ALTER TABLE jobs OWNER TO "{owner}"; GRANT CREATE ON SCHEMA public TO "{owner}"'
    )
    login = {"DB_USER": owner, "DB_PASSWORD": owner}
    install(database, **login)
    database.rows(f"GRANT SELECT ON stage_calls TO {reader}")
    done = run_command(database, "verify", **login)
    assert f"{reader} may read" in done.out and "does not exist" not in done.out


def test_superuser_installs_a_fair_stage_where_the_owner_may_create_nothing(app, run_command):
    database, _ = app
    database.rows("ALTER TABLE jobs ADD priority integer, ADD run_after timestamptz;"
                  "CREATE TABLE jobs_variants (job_variants_id int PRIMARY KEY, job_id int,"
                  " current_step text, status text); ALTER TABLE jobs_variants OWNER TO "
                  + database.value("SELECT relowner::regrole::text FROM pg_class"
                                   " WHERE oid = 'jobs'::regclass"))  # fmt: skip
    done = run_command(database, "install", **FAIR)
    assert done.code == 0, done
    assert database.value("SELECT to_regclass('stage_calls_tenant_idx')")


def test_reader_whom_this_role_may_not_let_into_the_schema_is_refused(app, make_role, run_command):
    database, owner = app
    database.rows(f"REVOKE ALL ON SCHEMA public FROM PUBLIC; GRANT ALL ON SCHEMA public TO {owner}")
    reader, login = make_role(database), {"DB_USER": owner, "DB_PASSWORD": owner}
    done = run_command(database, "install", "--reader", reader, **login)
    assert f"GRANT USAGE ON SCHEMA public TO {reader}" in done.refused(1)
    assert database.value("SELECT to_regclass('stage_calls')") is None


def test_role_that_may_read_nothing_of_ours_is_told_who_may_install(app, make_role, run_command):
    database, owner = app
    reader = make_role(database)
    database.rows(f"GRANT CREATE ON SCHEMA public TO {owner}")
    install(database, DB_USER=owner, DB_PASSWORD=owner)
    said = run_command(database, "install", DB_USER=reader).refused(1)
    assert said.endswith(f"install as {owner}, or as a superuser; nothing was changed")


def test_what_another_role_installed_goes_to_the_owner_of_jobs(app, make_role):
    database, owner = app
    ops = make_role(database)
    install(database)
    for row in database.rows("SELECT oid::regclass AS name FROM pg_class WHERE relkind IN ('r','v')"
                             " AND relnamespace = 'public'::regnamespace"
                             " AND relname <> 'jobs'"):  # fmt: skip
        database.rows(f"ALTER TABLE {row.name} OWNER TO {ops}")
    database.rows(f"ALTER FUNCTION notify_job_state_change() OWNER TO {ops}")
    install(database)
    assert [tuple(row) for row in database.rows(OWNERS)] == [(owner,)]


# --- grants --------------------------------------------------------------------------------

DEFAULTS = """
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {0};
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO {0};
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO {0}
"""
NOT_OWNERS = """
SELECT DISTINCT c.relname::text AS name, coalesce(g.rolname, 'everybody') AS role
FROM pg_class AS c, aclexplode(c.relacl) AS a LEFT JOIN pg_roles AS g ON g.oid = a.grantee
WHERE c.relnamespace = 'public'::regnamespace AND c.relname <> 'jobs' AND a.grantee <> c.relowner
UNION
SELECT p.proname::text, coalesce(g.rolname, 'everybody')
FROM pg_proc AS p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
LEFT JOIN pg_roles AS g ON g.oid = a.grantee
WHERE p.pronamespace = 'public'::regnamespace AND a.grantee <> p.proowner
ORDER BY 1, 2
"""
# With the rights of whoever calls them.
FOR_EVERYBODY = [
    ("stage_call_row", "everybody"),
    ("stage_column_types", "everybody"),
    ("stage_due_calls", "everybody"),
    ("stage_join_is_complete", "everybody"),
]


@pytest.mark.parametrize("everybody", [False, True], ids=["a role", "PUBLIC"])
def test_default_privileges_give_nobody_a_right(each_server, make_database, make_role, everybody):
    database = make_database(each_server, installed=False)
    database.rows(DEFAULTS.format("PUBLIC" if everybody else make_role(database)))
    install(database)
    assert [tuple(row) for row in database.rows(NOT_OWNERS)] == FOR_EVERYBODY
    install(database)
    assert [tuple(row) for row in database.rows(NOT_OWNERS)] == FOR_EVERYBODY


def test_listener_works_where_functions_are_for_nobody(each_server, make_database, make_role):
    database = make_database(each_server, installed=False)
    database.rows("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
    install(database)
    assert [tuple(row) for row in database.rows(NOT_OWNERS)] == FOR_EVERYBODY


def test_grants_of_an_administrator_outlast_install_and_a_new_type(each_database, make_role):
    dashboard, listener = make_role(each_database), make_role(each_database)
    with connected(each_database) as conn:
        apply(conn, reader=dashboard)
    each_database.rows(f"GRANT SELECT, UPDATE ON stage_calls TO {listener}")
    before = each_database.rows(NOT_OWNERS)
    assert ("given_up_calls", dashboard) in [tuple(row) for row in before]
    each_database.rows("ALTER TABLE jobs ALTER job_id DROP DEFAULT, ALTER job_id TYPE text")
    install(each_database)
    assert each_database.rows(NOT_OWNERS) == before


def test_verify_lists_who_else_has_rights(each_database, make_role):
    reader, other = make_role(each_database), make_role(each_database)
    each_database.rows(f"GRANT SELECT ON given_up_calls TO {reader}")
    each_database.rows(f"GRANT SELECT, DELETE ON stage_calls TO {other}")
    each_database.rows(f"GRANT UPDATE ON pipeline_stages TO {other}")
    each_database.rows("GRANT INSERT ON stage_calls TO PUBLIC")
    with connected(each_database) as conn:
        found = others(conn, [*migrations.TABLES, *migrations.VIEWS])
    assert found == sorted([
        "everybody may add", f"{reader} may read", f"{other} may read, pause, delete"
    ])  # fmt: skip


def test_verify_lists_who_has_rights_on_all_tables(each_database, make_role):
    if each_database.server.version < 14:
        pytest.skip("PostgreSQL 14 has these roles")
    reader, writer = make_role(each_database), make_role(each_database)
    each_database.rows(f"GRANT pg_read_all_data TO {reader}; GRANT pg_write_all_data TO {writer}")
    with connected(each_database) as conn:
        found = others(conn, [*migrations.TABLES, *migrations.VIEWS])
    assert found == sorted([f"{reader} may read", f"{writer} may add, pause, change, delete"])


@pytest.mark.parametrize(
    ("granted", "may"),
    [
        ("INSERT ON stage_attempts", "add"),
        ("UPDATE (held_until) ON pipeline_stages", "pause"),
        ("SELECT (tenant_id) ON stage_calls", "read"),
        ("EXECUTE ON FUNCTION resting_rows()", "read"),
    ],
)
def test_verify_lists_rights_on_part_of_it(database, make_role, granted, may):
    role = make_role(database)
    database.rows(f"GRANT {granted} TO {role}")
    with connected(database) as conn:
        assert others(conn, [*migrations.TABLES, *migrations.VIEWS]) == [f"{role} may {may}"]
