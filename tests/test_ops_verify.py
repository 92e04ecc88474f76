"""`verify`: each single problem, produced for real, gets its line and the command that mends it."""

import re
from contextlib import closing

import pytest
from faults.test_pooler import PGBOUNCER, pooler  # noqa: F401
from test_readme import Readme

import db
from ops.check import LAG
from ops.install import apply, objects, remove
from ops.migrations import LATEST
from ops.problem import Problem
from ops.routes import require_installed
from ops.verify import check_stage_api, run_checks

INSTALL = "./jsl install"
INSTALL_NEWER = f"{INSTALL}, if this PIPELINE is the newer one"
AGAIN = "./jsl uninstall, then install"
SEE_GRANTS = "see 'Roles and grants' in docs/INSTALLING.md"
DROP_UPDATE = "DROP TRIGGER job_state_change_trigger ON jobs"


@pytest.fixture
def run_command(run_here):
    return run_here


def problems(done) -> list[tuple[str, str]]:
    """What verify found and what it tells to do, and that its last line and exit code agree."""
    found = [
        tuple(line[9:].rsplit(" → ", 1)) for line in done.lines if line.startswith("PROBLEM  ")
    ]
    assert all(line.startswith(("ok       ", "PROBLEM  ")) for line in done.lines[:-1])
    some = f"{len(found)} problem{'s' * (len(found) > 1)} found"
    assert (done.code, done.lines[-1]) == ((1, some) if found else (0, "everything is in place"))
    return found


def checked(database, **settings) -> list[tuple[str, str]]:
    """The same problems, found in this process."""
    given = database.settings(**settings)
    with closing(db.connect(given)) as conn:
        return [tuple(said.rsplit(" → ", 1)) for ok, said in run_checks(conn, given) if not ok]


def test_everything_in_place_is_one_line_each_and_exit_0(each_database, api, run_command):
    done = run_command(each_database, "verify", api=api)
    assert problems(done) == []
    whole = "\n".join(line.removeprefix("ok       ") for line in done.lines)
    assert re.fullmatch(
        rf"PostgreSQL \d+, {each_database.name} on .+ as .+\n"
        rf"tables and columns of version {LATEST}, job_id is uuid\n"
        r"table of PIPELINE: jobs \(job_id\)\n"
        r"the trigger knows the columns as they are\n"
        r"function notify_job_state_change\(\)\n"
        r"triggers job_state_change_trigger, job_state_insert_trigger, enabled on jobs\n"
        r"routes: PIPELINE of demo/five_stages.py \(5 states\) is in the database\n"
        r"privileges of role .+\n"
        r"other roles with rights on our tables: none\n"
        r"LISTEN 'job_state_changed' delivers; queue 0% full\n"
        rf"stage API {api.url} answers \(HTTP 200 on /healthz\)\n"
        r"requests are not signed: STAGE_API_SECRET is not set\n"
        r"\d+ more connections? left\n"
        r"no commit that this role can see waits for a synchronous standby\n"
        r"the listener is enabled\n"
        r"everything is in place",
        whole,
    )


@pytest.mark.parametrize("command, missing", [
    ("/no/such/program --now", "program /no/such/program"),
    ("no-such-program", "program no-such-program"),
    ("python3 /no/such.py --now", "file /no/such.py"),
    ("/bin/sh /no/such.sh", "file /no/such.sh"),
])  # fmt: skip
def test_alert_command_that_is_not_there_is_a_problem(database, api, run_command, command, missing):
    set_it = "set ALERT_COMMAND, then ./jsl alert-test"
    done = run_command(database, "verify", api=api, ALERT_COMMAND=command)
    what = f"ALERT_COMMAND cannot be started: there is no {missing}"
    assert problems(done) == [(what, set_it)]
    done = run_command(database, "verify", api=api, ALERT_COMMAND="sh -c true")
    assert "ok       ALERT_COMMAND runs sh; ./jsl alert-test sends one" in done.lines


# name: (what went wrong, the line, the command that mends it)
DAMAGE = {
    "function of the first version": (
        "ALTER FUNCTION notify_job_state_change() SECURITY INVOKER",
        "function notify_job_state_change() is not the listener's",
        INSTALL,
    ),
    "update trigger missing": (
        DROP_UPDATE,
        "trigger job_state_change_trigger is missing on jobs",
        INSTALL,
    ),
    "insert trigger missing": (
        "DROP TRIGGER job_state_insert_trigger ON jobs",
        "trigger job_state_insert_trigger is missing on jobs",
        INSTALL,
    ),
    "trigger disabled": (
        "ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger",
        "trigger job_state_change_trigger on jobs is disabled",
        INSTALL,
    ),
    "trigger for replicas only": (
        "ALTER TABLE jobs ENABLE REPLICA TRIGGER job_state_insert_trigger",
        "trigger job_state_insert_trigger on jobs is disabled",
        INSTALL,
    ),
    "trigger of a column that was renamed": (
        "ALTER TABLE jobs ADD status_new text; ALTER TABLE jobs RENAME status TO status_old;"
        " ALTER TABLE jobs RENAME status_new TO status",
        "trigger job_state_change_trigger on jobs does not see every change of the state, or of"
        " the parent",
        INSTALL,
    ),
    "trigger of another function": (
        f"{DROP_UPDATE}; CREATE TRIGGER job_state_change_trigger BEFORE UPDATE ON jobs"
        " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "trigger job_state_change_trigger on jobs runs another function",
        INSTALL,
    ),
    "state without a route": (
        "DELETE FROM pipeline_stages WHERE current_step = 'planner'",
        "routes differ: (planner, done) → overlay in demo/five_stages.py, nothing in the database",
        INSTALL_NEWER,
    ),
    "route of another stage": (
        "UPDATE pipeline_stages SET stage = 'x' WHERE current_step = 'planner'",
        "routes differ: (planner, done) → overlay in demo/five_stages.py, x in the database",
        INSTALL_NEWER,
    ),
    "route that stages.py does not have": (
        "INSERT INTO pipeline_stages VALUES ('planner', 'failed', 'x')",
        "routes differ: (planner, failed) → nothing in demo/five_stages.py, x in the database",
        INSTALL_NEWER,
    ),
    "route that the function was not told": (
        "DO $$ BEGIN EXECUTE replace(pg_get_functiondef('notify_job_state_change()'::regprocedure),"
        " '\"overlay\"', '\"x\"'); END $$",
        "the function notify_job_state_change() does not know all routes",
        INSTALL,
    ),
    "history missing": (
        "DROP TABLE stage_attempts CASCADE",
        "table stage_attempts is missing",
        INSTALL,
    ),
    "column missing": (
        "ALTER TABLE stage_calls DROP COLUMN free_attempts CASCADE",
        "stage_calls has no column free_attempts",
        AGAIN,
    ),
    "job_id of another type": (
        "ALTER TABLE jobs ALTER job_id DROP DEFAULT, ALTER job_id TYPE text USING job_id::text",
        "job_id is text in jobs and uuid in stage_calls; "
        "columns of jobs have changed since install, or it was restored",
        INSTALL,
    ),
    "no index": (
        "ALTER TABLE jobs DROP CONSTRAINT jobs_pkey",
        "jobs.job_id is not unique by itself, so a call could go to another row",
        "CREATE UNIQUE INDEX ON jobs (job_id)",
    ),
}


def test_problem_is_named_and_the_command_given_mends_it(database, api):
    for damage, (sql, what, mend) in DAMAGE.items():
        database.rows(sql)
        assert checked(database, STAGE_API_URL=api.url) == [(what, mend)], damage
        if mend in (INSTALL, INSTALL_NEWER, AGAIN):
            with closing(db.connect(database.settings())) as conn:
                if mend == AGAIN:
                    remove(conn, objects(conn))
                apply(conn)
        else:
            database.rows(mend)
        assert checked(database, STAGE_API_URL=api.url) == [], damage


@pytest.mark.parametrize("table", ["pipeline_stages", "pipeline_tables", "stage_limits"])
def test_table_of_the_routes_that_is_missing_is_named_once(database, run_command, table):
    database.rows(f"DROP TABLE {table} CASCADE")
    said = run_command(database, "verify").out
    assert [line for line in said.splitlines() if line.startswith("PROBLEM  table ")] == [
        f"PROBLEM  table {table} is missing → {INSTALL}"
    ]


def test_each_trigger_that_is_disabled_is_named(database, api):
    database.rows("ALTER TABLE jobs DISABLE TRIGGER USER")
    names = ["job_state_change_trigger", "job_state_insert_trigger"]
    assert checked(database, STAGE_API_URL=api.url) == [
        (f"trigger {name} on jobs is disabled", INSTALL) for name in names
    ]


def test_table_without_a_time_to_trust_is_named(database, api, run_command):
    database.rows("ALTER TABLE jobs ALTER updated_at TYPE timestamp,"
                  " ALTER created_at TYPE timestamp")  # fmt: skip
    lines = run_command(database, "verify", api=api).lines
    [line] = [line for line in lines if "of PIPELINE: " in line]
    assert line.endswith("; no updated_at or created_at of type timestamptz in jobs")


def test_column_missing_from_jobs_is_for_the_application_to_add(database, api, run_command):
    database.rows("ALTER TABLE jobs DROP COLUMN tenant_id")
    missing = ("table jobs has no column tenant_id", "add it (ALTER TABLE)")
    assert missing in checked(database, STAGE_API_URL=api.url)
    assert "table jobs has no column tenant_id" in run_command(database, "install").refused(1)


def test_database_with_nothing_in_it_has_every_problem(empty_database, run_command):
    done = run_command(empty_database, "verify", STAGE_API_URL="http://127.0.0.1:9")
    found = dict(problems(done))
    assert set(list(found.values())[:4]) == {INSTALL}
    assert "function notify_job_state_change() is missing" in found
    assert "table jobs is missing" in found
    good = [line for line in done.lines if line.startswith("ok ")]
    assert not any(re.search("trigger|privileges|rights", line) for line in good), good


# Each after the one before: what becomes of jobs, what verify says of it, and what to do.
PLACES = [
    (
        "ALTER TABLE jobs RENAME TO old_jobs",
        "there is no table jobs, but public.old_jobs has our triggers and goes on recording calls",
        "ALTER TABLE public.old_jobs RENAME TO jobs",
    ),
    (
        "CREATE VIEW jobs AS SELECT * FROM old_jobs",
        "jobs is no table, and a view can have no trigger of ours; public.old_jobs has them and"
        " goes on recording calls",
        "give the view another name, then ALTER TABLE public.old_jobs RENAME TO jobs",
    ),
    (
        "DROP VIEW jobs; ALTER TABLE old_jobs RENAME TO jobs;"
        " CREATE SCHEMA app; ALTER TABLE jobs SET SCHEMA app",
        "jobs is now in schema app, which is not on the search path",
        "ALTER ROLE {} SET search_path = app, public",
    ),
    (
        "DROP TABLE app.jobs",
        "there is no table jobs, but our tables are in schema public",
        "restore or create public.jobs, then install",
    ),
]


def test_jobs_that_is_elsewhere_is_the_only_problem_and_all_tell_the_same(
    database, api, run_command
):
    for sql, what, mend in PLACES:
        database.rows(sql)
        mend = mend.format(database.environ["DB_USER"])
        assert checked(database, STAGE_API_URL=api.url) == [(what, mend)]
        said = run_command(database, "status").lines
        assert said[1].endswith(", jobs MISPLACED")
        assert f"PROBLEM  {what}" in said and f"       → {mend}" in said
        with closing(db.connect(database.settings())) as conn:
            for does, suffix in ((apply, "; nothing was changed"), (require_installed, "")):
                with pytest.raises(Problem) as refused:
                    does(conn)
                assert str(refused.value) == f"{what}: {mend}{suffix}"


def test_column_that_an_earlier_version_lacks_is_for_install(database, run_command):
    database.rows("ALTER TABLE pipeline_stages DROP asynchronous CASCADE")
    assert AGAIN in dict(problems(run_command(database, "verify"))).values()
    # Making all anew would drop the calls that are owed.
    database.rows("UPDATE job_state_listener_schema SET version = version - 1")
    found = dict(problems(run_command(database, "verify")))
    assert any("is of version" in what for what in found) and AGAIN not in found.values()


PASSWORD = "not-their-name"
GRANTS = re.findall(
    r"GRANT (.+) ON (.+) TO listener;",
    Readme("docs/INSTALLING.md").block("sql", "GRANT SELECT ON jobs"),
)
EACH = [
    (privilege, table)
    for privileges, tables in GRANTS
    for table in tables.split(", ")
    for privilege in privileges.split(", ")
]


@pytest.fixture
def role(database, make_role) -> str:
    """A role that has what a listener needs, and nothing more."""
    name = make_role(database)
    # A password that is not the name, which would be blotted out wherever it is shown.
    database.rows(f"ALTER ROLE {name} PASSWORD '{PASSWORD}'")
    for privilege, table in EACH:
        database.rows(f"GRANT {privilege} ON {table} TO {name}")
    with closing(db.connect(database.settings())) as conn:
        apply(conn, reader=name)
    return name


def test_role_with_its_privileges_is_enough(database, api, run_command, role):
    done = run_command(database, "verify", api=api, DB_USER=role, DB_PASSWORD=PASSWORD)
    assert problems(done) == []
    assert f"ok       privileges of role {role}" in done.lines


def test_role_with_its_privileges_may_ask_for_the_lag(database, role):
    database.rows(f"REVOKE SELECT ON pipeline_overview FROM {role}")  # of `install --reader`
    with closing(db.connect(database.settings(DB_USER=role, DB_PASSWORD=PASSWORD))) as conn:
        assert db.execute(conn, LAG).fetchone()[0] == 0


def test_each_missing_privilege_is_named(database, api, role):
    # Without SELECT there is no way to compare the routes, or the version, either.
    compared = ("pipeline_stages", "pipeline_tables", "stage_limits", "job_state_listener_schema")
    for privilege, table in EACH:
        database.rows(f"REVOKE {privilege} ON {table} FROM {role}")
        told = checked(database, STAGE_API_URL=api.url, DB_USER=role, DB_PASSWORD=PASSWORD)
        database.rows(f"GRANT {privilege} ON {table} TO {role}")
        assert told[-1] == (f"role {role} lacks {privilege} on {table}", SEE_GRANTS)
        denied = [(f"permission denied for table {table}", SEE_GRANTS)]
        assert told[:-1] == (denied if privilege == "SELECT" and table in compared else [])


def test_role_without_any_privilege_is_told_all_of_them(database, api, run_command, role):
    database.rows(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}")
    done = run_command(database, "verify", api=api, DB_USER=role, DB_PASSWORD=PASSWORD)
    [told] = [what for what, _ in problems(done) if what.startswith(f"role {role} lacks ")]
    every = {f"{privilege} on {table}" for privilege, table in EACH}
    assert set(told.removeprefix(f"role {role} lacks ").split(", ")) == every


def test_owner_of_the_views_is_who_may_grant_them(database, api, role):
    database.rows(f"REVOKE SELECT ON pipeline_overview FROM {role}")
    [(what, mend)] = checked(database, STAGE_API_URL=api.url, DB_USER=role, DB_PASSWORD=PASSWORD)
    assert what == f"role {role} may not read pipeline_overview"
    owner = database.environ["DB_USER"]
    typed = f"DB_USER={owner} DB_PASSWORD=*** ./jsl install --reader {role}"
    assert mend == f"as {owner}, who owns them: {typed}"


@pytest.mark.parametrize("table", ["jobs", "stage_leases"])
def test_row_level_security_is_a_problem_even_with_a_policy(
    database, api, run_command, role, table
):
    database.rows(
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY all_rows ON {table} FOR SELECT TO {role} USING (true)"
    )
    login = {"DB_USER": role, "DB_PASSWORD": PASSWORD}
    [(found, mend)] = problems(run_command(database, "verify", api=api, **login))
    assert (found, mend) == (f"row-level security hides rows of {table} from {role}", SEE_GRANTS)
    database.rows(f"ALTER ROLE {role} BYPASSRLS")
    assert problems(run_command(database, "verify", api=api, **login)) == []


def test_stage_api_that_is_down_is_a_problem(database, run_command):
    [(found, mend)] = problems(run_command(database, "verify", STAGE_API_URL="http://127.0.0.1:9"))
    assert found.startswith("stage API http://127.0.0.1:9 does not answer (ConnectionRefusedError")
    assert mend == "start it, or set STAGE_API_URL"


def test_stage_with_a_url_of_its_own_is_mended_by_that(database, api, serve):
    server = serve(lambda c: c.answer(b"HTTP/1.1 301 X\r\nContent-Length: 0\r\n\r\n"))
    given = {"STAGE_API_URL": api.url, "STAGE_API_URL_PLANNER": "http://127.0.0.1:9"}
    [(_, down)] = checked(database, **given)
    [(_, moved)] = checked(database, **given | {"STAGE_API_URL_PLANNER": server.url})
    assert down == "start it, or set STAGE_API_URL_PLANNER"
    assert moved == "set STAGE_API_URL_PLANNER to where it leads"


def test_every_stage_api_that_is_down_is_named(database, api, serve):
    server = serve(lambda c: c.answer(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"))
    found = checked(database, STAGE_API_URL=api.url, STAGE_API_URL_PLANNER="http://127.0.0.1:9",
                    STAGE_API_URL_OVERLAY=server.url)  # fmt: skip
    assert sorted(mend for _, mend in found) == [
        "start it, or set STAGE_API_URL_OVERLAY", "start it, or set STAGE_API_URL_PLANNER"
    ]  # fmt: skip


@pytest.mark.parametrize("status", [200, 204, 400, 403, 404, 405])
def test_stage_api_without_a_health_page_is_no_problem(database, serve, status):
    """Its health page may be elsewhere: nothing follows from that for a POST."""
    server = serve(lambda c: c.answer(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status))
    with closing(db.connect(database.settings())) as conn:
        said = check_stage_api(conn, database.settings(STAGE_API_URL=server.url))
    assert said == f"stage API {server.url} answers (HTTP {status} on /healthz)"


@pytest.mark.parametrize(
    ("status", "what", "mend"),
    [
        (301, "redirects, which no POST follows", "set STAGE_API_URL to where it leads"),
        (308, "redirects, which no POST follows", "set STAGE_API_URL to where it leads"),
        (401, "asks for credentials", "set STAGE_API_TOKEN"),
        (502, "is not ready, or a proxy in front of it cannot reach it",
         "start it, or set STAGE_API_URL"),
        (503, "is not ready, or a proxy in front of it cannot reach it",
         "start it, or set STAGE_API_URL"),
    ],
)  # fmt: skip
def test_answer_that_no_post_would_survive_is_a_problem(database, serve, status, what, mend):
    head = b"HTTP/1.1 %d X\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n"
    server = serve(lambda c: c.answer(head % status))
    assert checked(database, STAGE_API_URL=server.url) == [
        (f"stage API {server.url} {what} (HTTP {status} on /healthz)", mend)
    ]


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
def test_transaction_pooler_is_a_problem(database, api, run_command, pooler):  # noqa: F811
    done = run_command(database, "verify", api=api, DB_PORT=pooler("transaction", 2).port)
    [(found, mend)] = problems(done)
    assert found == "notifications do not arrive: a transaction pooler sits in between"
    assert mend.startswith("connect past the pooler (DB_HOST, DB_PORT)")


def test_password_in_the_stage_api_url_is_not_shown(database, api, run_command):
    url = api.url.replace("//", "//user:s3cr3t-w0rd@")
    done = run_command(database, "verify", STAGE_API_URL=url)
    assert done.code == 0
    assert "s3cr3t" not in done.out
