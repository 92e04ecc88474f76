"""`install` and `uninstall`, as an operator runs them."""

import re
import subprocess
from contextlib import closing

import pytest
from test_schema_install import program

# Everything in a database that somebody made, but for rows.
OBJECTS = """
SELECT 'class', c.oid, relname::text FROM pg_class AS c
WHERE relnamespace = 'public'::regnamespace
UNION ALL
SELECT 'function', oid, proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL
SELECT 'trigger', oid, tgname FROM pg_trigger
ORDER BY 1, 2
"""

ROUTES = [
    "(img_gen, done) → vlm_analyze",
    "(vlm_analyze, done) → yolo_detect",
    "(yolo_detect, done) → planner",
    "(planner, done) → overlay",
    "(overlay, done) → vlm_judge",
]

MADE = [
    "table jobs",
    "table pipeline_tables",
    "table pipeline_stages",
    "table stage_limits",
    "table stage_calls",
    "table stage_leases",
    "table stage_looks",
    "table stage_joins",
    "table stage_moves",
    "table stage_attempts",
    "table stage_totals",
    "table stage_totals_mark",
    "table job_state_listener_schema",
    "view pipeline_overview",
    "view stage_latency",
    "view given_up_calls",
    "function notify_job_state_change()",
    "function stalled_jobs()",
    "function resting_rows()",
    "function stage_call_row(text,text,uuid)",
    "function stage_column_types(regclass,text[])",
    "function stage_join_is_complete(text,uuid)",
    "function stage_due_calls(text,integer,integer,boolean)",
    "trigger job_state_change_trigger on jobs",
    "trigger job_state_insert_trigger on jobs",
]


JOBS = """
CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text, current_step text, status text)
"""


@pytest.fixture
def run_command(run_here):
    return run_here


def words(done) -> dict[str, str]:
    """What install said it did with each thing."""
    said = [line.split(None, 1) for line in done.lines if line.startswith("  ")]
    return {thing: word for word, thing in said}


def test_install_makes_everything_in_an_empty_database(empty_database, run_command):
    done = run_command(empty_database, "install")
    assert done.code == 0
    assert words(done) == dict.fromkeys(MADE, "created") | dict.fromkeys(ROUTES, "routed")
    assert done.lines[0].startswith(f"database {empty_database.name} on ")
    assert done.lines[-1] == "Next: ./jsl verify, then ./jsl"
    job = empty_database.add_job("img_gen", "done")
    assert empty_database.owed(job).stage == "vlm_analyze"


def test_install_again_keeps_everything(database, run_command):
    before = database.rows(OBJECTS)
    done = run_command(database, "install")
    assert done.code == 0
    assert words(done) == dict.fromkeys([*MADE, *ROUTES], "kept")
    assert database.rows(OBJECTS) == before


@pytest.mark.parametrize(
    ("lost", "word"),
    [("ALTER TABLE jobs DISABLE TRIGGER job_state_insert_trigger", "enabled"),
     ("DROP TRIGGER job_state_insert_trigger ON jobs", "created")],
)  # fmt: skip
def test_install_says_that_it_enables_a_trigger_again(database, run_command, lost, word):
    database.rows(lost)
    done = run_command(database, "install")
    said = words(done)
    assert said["trigger job_state_insert_trigger on jobs"] == word
    assert said["trigger job_state_change_trigger on jobs"] == "kept"
    note = "while a trigger was missing, disabled or wrong owe no call: ./jsl backfill"
    assert note in done.out and note not in run_command(database, "install").out
    assert database.owed(database.add_job("img_gen", "done"))


CHANGE = """
DROP TRIGGER job_state_change_trigger ON jobs;
CREATE TRIGGER job_state_change_trigger {} ON jobs FOR EACH ROW WHEN ({})
EXECUTE FUNCTION notify_job_state_change()
"""
DISTINCT = (
    "OLD.current_step IS DISTINCT FROM NEW.current_step {} OLD.status IS DISTINCT FROM NEW.status"
)
WRONG = {
    "narrower": ("AFTER UPDATE", DISTINCT.format("AND")),
    "other state": ("AFTER UPDATE", DISTINCT.format("OR") + " AND NEW.tenant_id <> 'x'"),
    "one state": ("AFTER UPDATE", "OLD.current_step <> '' OR NEW.status = 'done'"),
    "earlier": ("BEFORE UPDATE", DISTINCT.format("OR")),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_trigger_that_somebody_made_otherwise_is_told_and_renewed(
    each_database, run_command, wrong
):
    trigger = "trigger job_state_change_trigger on jobs"
    each_database.rows(CHANGE.format(*wrong))
    verified = run_command(each_database, "verify").out
    assert f"PROBLEM  {trigger} does not see every change of the state" in verified
    done = run_command(each_database, "install")
    assert words(done)[trigger] == "renewed" and "wrong owe no call: ./jsl backfill" in done.out
    assert f"PROBLEM  {trigger}" not in run_command(each_database, "verify").out
    assert words(run_command(each_database, "install"))[trigger] == "kept"


def test_install_that_makes_the_table_of_calls_anew_says_what_records_them(database, run_command):
    job = database.add_job("img_gen", "done")
    database.rows("DROP TABLE stage_calls CASCADE")
    done = run_command(database, "install")
    assert words(done)["table stage_calls"] == "created"
    note = "  note: table stage_calls was missing, so no call is owed that was owed before: "
    assert note + "./jsl backfill" in done.lines
    assert run_command(database, "backfill", "--apply").code == 0
    assert database.owed(job).stage == "vlm_analyze"
    assert "backfill" not in run_command(database, "install").out


def test_trigger_made_anew_for_an_option_is_told_without_advice(database, run_command):
    done = run_command(database, "install", "--no-notify")
    assert words(done)["trigger job_state_change_trigger on jobs"] == "renewed"
    assert "backfill" not in done.out


def test_install_without_inserted_rows_says_that_a_disabled_trigger_missed_changes(
    database, run_command
):
    assert run_command(database, "install", "--no-insert").code == 0
    database.rows("ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger")
    assert "owe no call: ./jsl backfill" in run_command(database, "install").out


def test_install_that_takes_inserted_rows_again_sends_nobody_to_those_before(database, run_command):
    assert run_command(database, "install", "--no-insert").code == 0
    done = run_command(database, "install", "--insert")
    assert words(done)["trigger job_state_insert_trigger on jobs"] == "created"
    assert "backfill" not in done.out


@pytest.mark.parametrize("id_type", ["bigint", "text"])
def test_install_beside_existing_jobs_leaves_their_rows(empty_database, run_command, id_type):
    empty_database.rows(
        f"CREATE TABLE jobs (job_id {id_type} PRIMARY KEY, tenant_id varchar(9),"
        " current_step varchar(20), status varchar(20));"
        "INSERT INTO jobs VALUES (7, 't', 'img_gen', 'done'), (8, 't', 'img_gen', 'queued')"
    )
    rows = "SELECT *, xmin, ctid FROM jobs"
    before = empty_database.rows(rows)
    done = run_command(empty_database, "install")
    assert words(done)["table jobs"] == "kept" and "owe no call: ./jsl backfill" in done.out
    assert empty_database.rows(rows) == before
    assert "backfill" not in run_command(empty_database, "install").out
    assert empty_database.rows("SELECT 1 FROM stage_calls") == []
    empty_database.move("8", "img_gen", "done")
    done = run_command(empty_database, "job", "8")
    assert done.lines[0] == "job 8 is at (img_gen, done), tenant t"
    call_id = empty_database.value("SELECT call_id FROM stage_calls")
    owes = f"owes: vlm_analyze (call {call_id}, 0 attempts spent), due now"
    assert done.lines[1].startswith(owes)


def test_install_names_what_left_the_pipeline(database, run_command):
    database.rows(
        "INSERT INTO pipeline_stages VALUES ('retired', 'done', 'old_stage');"
        "INSERT INTO stage_calls (job_id, current_step, status, stage)"
        " VALUES (gen_random_uuid(), 'retired', 'done', 'old_stage');"
        "UPDATE pipeline_stages SET stage = 'other' WHERE current_step = 'planner';"
        "INSERT INTO stage_limits (name, stages, max_running) VALUES ('planner', '{planner}', 9)"
    )
    done = run_command(database, "install")
    said = words(done)
    assert said["(retired, done) → old_stage"] == "removed"
    assert said["(planner, done) → overlay"] == "routed"
    assert said["(overlay, done) → vlm_judge"] == "kept"
    assert said["the limits of planner"] == "changed"
    assert "1 open call of states or stages that PIPELINE no longer has" in done.out
    assert run_command(database, "verify").out.count("ok       routes") == 1


def test_locked_jobs_stop_an_install_with_one_line_and_nothing_changed(empty_database, run_command):
    empty_database.rows(JOBS)
    before = empty_database.rows(OBJECTS)
    with closing(empty_database.connect()) as application:
        application.cursor().execute("BEGIN; INSERT INTO jobs VALUES ('a')")
        refused = run_command(empty_database, "install").refused(1)
        assert refused == (
            "another transaction holds a lock on jobs or on our tables, or another install is "
            "under way; nothing was changed: try again"
        )
    assert empty_database.rows(OBJECTS) == before


def test_install_that_has_nothing_to_change_needs_no_lock_on_jobs(database, run_command):
    with closing(database.connect()) as application:
        application.cursor().execute("BEGIN; LOCK TABLE jobs IN ROW EXCLUSIVE MODE")
        assert run_command(database, "install").code == 0


def test_install_without_the_privilege_gets_one_line(empty_database, run_command, make_role):
    role = make_role(empty_database)
    # As PostgreSQL has it from 15 on.
    empty_database.rows("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    before = empty_database.rows(OBJECTS)
    done = run_command(empty_database, "install", DB_USER=role, DB_PASSWORD=role)
    assert done.refused(1) == (
        "permission denied for schema public: see 'Roles and grants' in docs/INSTALLING.md"
    )
    assert empty_database.rows(OBJECTS) == before


def test_owner_of_jobs_may_install_and_uninstall(empty_database, run_command, make_role):
    role = make_role(empty_database)
    empty_database.rows(
        f"GRANT CREATE ON SCHEMA public TO {role}; {JOBS}; ALTER TABLE jobs OWNER TO {role}"
    )
    login = {"DB_USER": role, "DB_PASSWORD": role}
    assert run_command(empty_database, "install", **login).code == 0
    job = empty_database.add_job("img_gen", "done")
    assert empty_database.owed(job).stage == "vlm_analyze"
    assert run_command(empty_database, "uninstall", "--yes", **login).code == 0


def test_jobs_that_the_search_path_does_not_find_get_no_second_beside_them(
    empty_database, run_command, make_role
):
    role = make_role(empty_database)
    empty_database.rows(
        f"GRANT CREATE ON SCHEMA public TO {role}; CREATE SCHEMA app;"
        f" SET search_path = app; {JOBS}; ALTER TABLE jobs OWNER TO {role}; RESET search_path"
    )
    login = {"DB_USER": role, "DB_PASSWORD": role}
    before = empty_database.rows(OBJECTS)
    for what, mend in [
        (f"jobs is in schema app, which role {role} may not use",
         f"GRANT USAGE, CREATE ON SCHEMA app TO {role}"),
        (f"jobs is in schema app, which is not on {role}'s search path",
         f'ALTER ROLE {role} SET search_path = app, "$user", public'),
    ]:  # fmt: skip
        for command in ("install", "test-job"):
            assert run_command(empty_database, command, **login).refused(1).startswith(what)
        verified = run_command(empty_database, "verify", **login).out
        assert f"PROBLEM  {what} → if another" in verified
        assert "is missing" not in verified
        empty_database.rows(mend)
    assert empty_database.rows(OBJECTS) == before
    assert "kept     table jobs" in run_command(empty_database, "install", **login).out


def dumped(database, role: str) -> str:
    """What pg_dump says as `role`; "" where it works."""
    command = [program(database, "pg_dump"), f"{database.dsn} user={role} password={role}"]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_install_says_what_a_role_that_dumps_the_database_needs(
    each_server, make_database, run_command, make_role
):
    database = make_database(each_server, installed=False)
    role = make_role(database)
    database.rows(f"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {role}")
    said = run_command(database, "install").out
    assert "permission denied" in dumped(database, role)
    database.rows(re.search(f"dump the database: (GRANT SELECT ON .* TO {role})\n", said)[1])
    assert dumped(database, role) == ""
    assert "GRANT" not in run_command(database, "install").out
    database.rows("DROP TABLE stage_moves")  # as before the version that brought it
    said = run_command(database, "install").out
    assert f"GRANT SELECT ON stage_moves, stage_moves_move_id_seq TO {role}\n" in said


@pytest.mark.parametrize("published", ["ALL TABLES", "TABLES IN SCHEMA public"])
def test_install_says_that_subscribers_need_our_tables(empty_database, run_command, published):
    if published != "ALL TABLES" and empty_database.server.version < 15:
        pytest.skip("PostgreSQL 15 has publications of a schema")
    empty_database.rows(f"{JOBS}; CREATE PUBLICATION to_reports FOR {published}")
    note = "note: publication to_reports publishes our tables: make them at its subscribers"
    assert note in run_command(empty_database, "install").out
    assert "publication" not in run_command(empty_database, "install").out


# --- uninstall -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ("n\n", 1, "nothing was removed"),
        ("\n", 1, "nothing was removed"),
        ("", 2, "nobody answered, and nothing was removed: give --yes."),
    ],
    ids=["no", "enter", "no terminal"],
)
def test_uninstall_removes_nothing_unless_told_to(database, run_command, answer, code, said):
    before = database.rows(OBJECTS)
    done = run_command(database, "uninstall", stdin=answer)
    assert done.refused(code).startswith(said)
    assert "Remove? [y/N]: " in done.out
    assert database.rows(OBJECTS) == before


def test_uninstall_asks_and_then_removes(database, run_command):
    database.add_job("img_gen", "done")
    done = run_command(database, "uninstall", stdin="y\n")
    assert done.code == 0
    assert sorted(line.strip() for line in done.lines[1 : len(MADE)]) == sorted(MADE[1:])
    assert "and with them 1 open call and the history. jobs is not touched." in done.lines
    assert done.lines[-1].endswith("removed")
    assert not database.value("SELECT to_regclass('stage_calls')")


def test_uninstall_names_jobs_where_our_tables_were_emptied(database, run_command):
    database.rows("DELETE FROM pipeline_tables")
    done = run_command(database, "uninstall", "--yes")
    assert "and with them 0 open calls and the history. jobs is not touched." in done.lines


def test_uninstall_takes_only_what_is_ours(empty_database, run_command):
    empty_database.rows(
        f"{JOBS}; CREATE TABLE stage_notes (n int);"
        "CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        "CREATE TRIGGER theirs AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION theirs();"
        "INSERT INTO jobs VALUES ('a', 't', 'img_gen', 'done')"
    )
    before = empty_database.rows(OBJECTS), empty_database.rows("SELECT *, xmin, ctid FROM jobs")
    assert run_command(empty_database, "install").code == 0
    assert run_command(empty_database, "uninstall", "--yes").code == 0
    assert empty_database.rows(OBJECTS) == before[0]
    assert empty_database.rows("SELECT *, xmin, ctid FROM jobs") == before[1]
    empty_database.move("a", "img_gen", "queued")


LEFT = """
SELECT relname AS name FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT tgname FROM pg_trigger WHERE NOT tgisinternal
"""


def test_uninstall_leaves_what_only_has_a_name_like_ours(database, run_command):
    database.rows(
        "CREATE FUNCTION stalled_jobs(int) RETURNS int LANGUAGE sql AS 'SELECT 1';"
        "CREATE FUNCTION job_state_listener_audit() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN RETURN NEW; END';"
        "CREATE TRIGGER audit AFTER UPDATE ON jobs"
        " FOR EACH ROW EXECUTE FUNCTION job_state_listener_audit();"
        "DROP TABLE stage_limits; CREATE TABLE stage_limits (plan text, calls int);"
        "INSERT INTO stage_limits VALUES ('free', 10)"
    )
    done = run_command(database, "uninstall", "--yes")
    assert (done.code, done.lines[:2], done.lines[-1]) == (0, [
        "note: table stage_limits is not ours and stays",
        "note: function job_state_listener_audit() is not ours and stays",
    ], "removed")  # fmt: skip
    assert database.rows("SELECT * FROM stage_limits") == [("free", 10)]
    assert {row.name for row in database.rows(LEFT)} == {
        "jobs", "stage_limits", "stalled_jobs", "job_state_listener_audit", "audit",
    }  # fmt: skip


def test_no_call_has_the_number_of_one_before_uninstall(database, run_command):
    """Stages remember calls by keys that are made of these numbers."""
    numbers = "SELECT call_id FROM stage_calls WHERE job_id = %s"
    before = database.value(numbers, database.add_job())
    run_command(database, "uninstall", "--yes"), run_command(database, "install")
    assert database.value(numbers, database.add_job()) > before


def test_uninstall_twice_has_nothing_left_to_remove(database, run_command):
    run_command(database, "uninstall", "--yes")
    done = run_command(database, "uninstall")
    assert (done.code, done.lines) == (0, ["nothing to remove"])
    job = database.add_job("img_gen", "done")
    assert database.state(job) == ("img_gen", "done")


def test_locked_jobs_stop_an_uninstall_with_one_line_and_nothing_changed(database, run_command):
    before = database.rows(OBJECTS)
    with closing(database.connect()) as application:
        application.cursor().execute("BEGIN; LOCK TABLE jobs IN ROW EXCLUSIVE MODE")
        refused = run_command(database, "uninstall", "--yes").refused(1)
        assert refused == "a table is locked by another transaction; nothing was removed: try again"
    assert database.rows(OBJECTS) == before


def test_uninstall_without_the_privilege_gets_one_line(database, run_command, make_role):
    role = make_role(database)
    database.rows(f"GRANT SELECT ON stage_calls, pipeline_tables TO {role}")
    before = database.rows(OBJECTS)
    done = run_command(database, "uninstall", "--yes", DB_USER=role, DB_PASSWORD=role)
    assert "must be owner of" in done.refused(1)
    assert database.rows(OBJECTS) == before
