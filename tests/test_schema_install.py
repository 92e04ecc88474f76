"""schema.sql over what is there already: itself, the guide's first version, any schema, a dump."""

import subprocess
from contextlib import closing
from pathlib import Path

import guide
import psycopg2.extensions
import pytest
from claims import claim, connected
from subscription import Subscription

import db
from demo import five_stages
from ops.install import apply, objects, remove
from ops.verify import check_routes

JOBS = """
CREATE TABLE jobs (job_id uuid PRIMARY KEY DEFAULT gen_random_uuid(), tenant_id varchar(80),
                   current_step varchar(80), status varchar(20), updated_at timestamptz);
INSERT INTO jobs (tenant_id, current_step, status) VALUES ('t', 'img_gen', 'queued');
"""

# Everything that another install might make anew, or forget.
OBJECTS = """
SELECT 'table', c.oid, c.relname::text, c.relfilenode::text, c.relacl::text, c.reloptions::text
FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace
UNION ALL
SELECT 'trigger', t.oid, t.tgname, t.tgenabled::text, pg_get_triggerdef(t.oid), t.tgfoid::text
FROM pg_trigger AS t WHERE t.tgrelid = 'jobs'::regclass
UNION ALL
SELECT 'function', p.oid, p.proname, pg_get_functiondef(p.oid), p.proacl::text, p.proowner::text
FROM pg_proc AS p WHERE p.pronamespace = 'public'::regnamespace
UNION ALL
SELECT 'constraint', k.oid, k.conname, pg_get_constraintdef(k.oid), NULL, NULL
FROM pg_constraint AS k WHERE k.connamespace = 'public'::regnamespace
ORDER BY 1, 2
"""

TRIGGERS = """
SELECT tgname FROM pg_trigger
WHERE tgrelid = 'jobs'::regclass AND NOT tgisinternal AND tgenabled = 'O' ORDER BY 1
"""


def install(database, **settings) -> None:
    with closing(db.connect(database.settings(**settings))) as conn:
        apply(conn)


def finish(database) -> list[dict]:
    """Move the one job to (img_gen, done); what is notified of it."""
    with Subscription(database) as subscription:
        database.rows("UPDATE jobs SET status = 'done'")
        return subscription.messages()


def test_installing_again_changes_nothing(each_database):
    each_database.add_job("img_gen", "done")
    each_database.rows("UPDATE pipeline_stages SET held_until = now(), held_by = 'me'")
    rows = "SELECT * FROM {} ORDER BY 1, 2"
    tables = ("jobs", "stage_calls", "pipeline_stages")
    before = [each_database.rows(rows.format(table)) for table in tables]
    objects = each_database.rows(OBJECTS)
    install(each_database)
    assert each_database.rows(OBJECTS) == objects
    assert [each_database.rows(rows.format(table)) for table in tables] == before


def test_tables_of_the_application_are_left_as_they_are(each_server, make_database):
    database = make_database(each_server, installed=False)
    database.rows(JOBS)
    columns = "SELECT attname, atttypid, attnum FROM pg_attribute WHERE attrelid = 'jobs'::regclass"
    before = database.rows(columns), database.rows("SELECT *, ctid, xmin FROM jobs")
    install(database)
    assert (database.rows(columns), database.rows("SELECT *, ctid, xmin FROM jobs")) == before


def test_first_version_is_upgraded_in_place(each_server, make_database):
    database = make_database(each_server, installed=False)
    database.rows(JOBS + guide.JOBS_TRIGGER)
    trigger = database.row("SELECT oid FROM pg_trigger WHERE tgname = 'job_state_change_trigger'")
    assert len(finish(database)) == 1
    install(database)
    assert trigger in database.rows("SELECT oid FROM pg_trigger")
    database.rows("UPDATE jobs SET status = 'queued'")
    assert len(finish(database)) == 1
    assert database.value("SELECT stage FROM stage_calls") == "vlm_analyze"


def test_first_version_of_another_role_is_taken_over(empty_database, make_role):
    owner = make_role(empty_database)
    empty_database.rows(f"GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner}")
    empty_database.rows(JOBS + guide.JOBS_TRIGGER)
    empty_database.rows("RESET ROLE")
    install(empty_database)
    empty_database.rows(f"SET ROLE {owner}")
    assert len(finish(empty_database)) == 1
    empty_database.rows("RESET ROLE")
    assert empty_database.value("SELECT stage FROM stage_calls") == "vlm_analyze"


def test_function_runs_as_the_owner_of_the_tables_whoever_installs_again(empty_database, make_role):
    owner = make_role(empty_database)
    empty_database.rows(f"GRANT CREATE ON SCHEMA public TO {owner}")
    install(empty_database, DB_USER=owner, DB_PASSWORD=owner)
    install(empty_database)
    assert empty_database.value("SELECT proowner::regrole::text FROM pg_proc"
                                " WHERE proname = 'notify_job_state_change'") == owner  # fmt: skip
    install(empty_database, DB_USER=owner, DB_PASSWORD=owner)


DAMAGE = {
    "all triggers disabled": "ALTER TABLE jobs DISABLE TRIGGER ALL",
    "trigger disabled": "ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger",
    "trigger for replicas": "ALTER TABLE jobs ENABLE REPLICA TRIGGER job_state_change_trigger",
    "trigger dropped": "DROP TRIGGER job_state_insert_trigger ON jobs",
    "function dropped": "DROP FUNCTION notify_job_state_change() CASCADE",
    "trigger of one column": """
        DROP TRIGGER job_state_change_trigger ON jobs;
        CREATE TRIGGER job_state_change_trigger AFTER UPDATE OF tenant_id ON jobs
            FOR EACH ROW EXECUTE FUNCTION notify_job_state_change()""",
    "trigger of a column that was renamed": """
        ALTER TABLE jobs ADD status_new text;
        ALTER TABLE jobs RENAME status TO status_old;
        ALTER TABLE jobs RENAME status_new TO status""",
    "trigger of another function": """
        DROP TRIGGER job_state_change_trigger ON jobs;
        CREATE TRIGGER job_state_change_trigger BEFORE UPDATE ON jobs
            FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()""",
    "another function of that name": """
        CREATE FUNCTION notify_job_state_change(text) RETURNS text LANGUAGE sql AS 'SELECT $1'""",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_install_mends(database, damage):
    job = database.add_job("img_gen", "queued")
    database.rows(DAMAGE[damage])
    install(database)
    assert [row.tgname for row in database.rows(TRIGGERS)] == [
        "job_state_change_trigger",
        "job_state_insert_trigger",
    ]
    assert len(finish(database)) == 1
    assert database.owed(job).stage == "vlm_analyze"


def test_open_calls_survive_the_loss_of_the_triggers(database):
    job = database.add_job("img_gen", "done")
    call = database.owed(job)
    database.rows("DROP FUNCTION notify_job_state_change() CASCADE")
    install(database)
    assert database.owed(job) == call


AWKWARD = [("it's", 'a \\ "b"'), ("%s %1$I %", "$body$"), ("", "한글\n"), ("planner", " done")]


def test_trigger_follows_the_routes_at_once(each_database, monkeypatch):
    job = each_database.add_job("img_gen", "queued")
    with closing(each_database.connect()) as application:  # keeps its plans

        def stage_owed(step: str, status: str) -> str | None:
            move = "UPDATE jobs SET current_step = 'x'; UPDATE jobs SET (current_step, status) ="
            application.cursor().execute(f"{move} (%s, %s)", [step, status])
            return call.stage if (call := each_database.owed(job)) else None

        assert stage_owed("img_gen", "done") == "vlm_analyze"
        added = dict.fromkeys(AWKWARD, five_stages.planner)
        added |= {("img_gen", "done"): five_stages.overlay}
        monkeypatch.setattr(five_stages, "PIPELINE", five_stages.PIPELINE | added)
        with closing(db.connect(each_database.settings())) as conn:
            apply(conn)
            assert {stage_owed(*state) for state in AWKWARD} == {"planner"}
            check_routes(conn, None)
            assert stage_owed("img_gen", "done") == "overlay"
            monkeypatch.setattr(five_stages, "PIPELINE", {("img_gen", "done"): five_stages.overlay})
            apply(conn)
        assert stage_owed(*AWKWARD[0]) is None
        assert stage_owed("img_gen", "done") == "overlay"


def owed_in_schema(database, schema: str, **settings) -> bool:
    """Install beside the jobs of `schema`; whether the one job's call is owed and claimed there."""
    install(database, **settings)
    assert len(finish(database)) == 1
    elsewhere = "SELECT count(*) FROM pg_class WHERE relname LIKE %s AND relnamespace::regnamespace"
    assert database.value(elsewhere + " <> %s::regnamespace", "%stage%", schema) == 0
    with connected(database, **settings) as conn:
        return claim(conn).owed


def test_jobs_are_found_by_the_search_path_of_the_role(empty_database, make_role):
    role = make_role(empty_database)
    empty_database.rows(f"CREATE SCHEMA app AUTHORIZATION {role}; SET search_path = app")
    empty_database.rows(JOBS + f"ALTER TABLE jobs OWNER TO {role}")
    empty_database.rows(f"ALTER ROLE {role} SET search_path = app")
    assert owed_in_schema(empty_database, "app", DB_USER=role, DB_PASSWORD=role)


def test_jobs_are_found_by_the_search_path_in_the_url(empty_database):
    schema = '"My ""Schema"""'
    empty_database.rows(f"CREATE SCHEMA {schema}; SET search_path = {schema}; {JOBS}")
    options = "-c search_path=" + schema.replace(" ", "\\ ")
    url = psycopg2.extensions.make_dsn(empty_database.dsn, options=options)
    assert owed_in_schema(empty_database, schema, DATABASE_URL=url)


def program(database, name: str) -> Path:
    """A program of the server's own version, where the server is on this machine."""
    path = Path(database.value("SELECT setting FROM pg_config WHERE name = 'BINDIR'")) / name
    if not path.exists():
        pytest.skip(f"this server's {name} is not on this machine")
    return path


def test_dumped_and_restored_database_goes_on(each_database, each_server, make_database):
    owing, waiting = each_database.add_job("planner", "done"), each_database.add_job("x", "y")
    pg_dump, psql = program(each_database, "pg_dump"), program(each_database, "psql")
    dump = subprocess.run([pg_dump, each_database.dsn], capture_output=True, check=True).stdout
    copy = make_database(each_server, installed=False)
    restore = [psql, "-qX", "-v", "ON_ERROR_STOP=1", copy.dsn]
    subprocess.run(restore, input=dump, capture_output=True, check=True)
    assert copy.owed(owing) == each_database.owed(owing)
    with Subscription(copy) as subscription:
        copy.move(waiting, "img_gen", "done")
        assert [said["job_id"] for said in subscription.messages()] == [waiting]
    assert copy.owed(waiting).call_id > copy.owed(owing).call_id
    install(copy)
    assert copy.value("SELECT count(*) FROM stage_calls") == 2


def test_uninstalled_leaves_jobs_and_its_rows(each_database):
    job = each_database.add_job("img_gen", "done")
    before = each_database.rows("SELECT *, xmin FROM jobs")
    with connected(each_database) as conn:
        remove(conn, objects(conn))
    assert each_database.rows("SELECT *, xmin FROM jobs") == before
    assert each_database.rows("SELECT 1 FROM pg_trigger WHERE tgrelid = 'jobs'::regclass") == []
    each_database.move(job, "img_gen", "queued")
    install(each_database)
    each_database.move(job, "img_gen", "done")
    assert each_database.owed(job).stage == "vlm_analyze"
