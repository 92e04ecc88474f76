"""Settings that ALTER ROLE and ALTER DATABASE may have made for our sessions have no effect."""

import json
from contextlib import closing

import commands
import pytest
from claims import connected
from waiting import backends, wait_for_sweeps, wait_until_idle

import db
from ops.install import apply

# Each may come from a company's template for its roles.
HOSTILE = {
    "statement_timeout": "3s", "lock_timeout": "1h", "idle_in_transaction_session_timeout": "3s",
    "idle_session_timeout": "3s", "transaction_timeout": "3s",
    "default_transaction_isolation": "serializable", "default_transaction_deferrable": "on",
    "client_encoding": "LATIN1", "DateStyle": "German, DMY", "IntervalStyle": "iso_8601",
    "TimeZone": "<odd>+05:30", "extra_float_digits": "-15", "row_security": "on",
    "session_replication_role": "replica", "standard_conforming_strings": "off",
    "backslash_quote": "off", "bytea_output": "escape", "array_nulls": "off",
    "transform_null_equals": "on", "quote_all_identifiers": "on", "xmloption": "document",
    "enable_indexscan": "off", "enable_indexonlyscan": "off", "enable_nestloop": "off",
    "plan_cache_mode": "force_custom_plan", "jit": "on", "work_mem": "64kB",
    "client_min_messages": "debug5", "synchronous_commit": "off", "lc_messages": "C",
    "check_function_bodies": "on", "default_with_oids": "off",
}  # fmt: skip
EVERYWHERE = ["database", "role"]


def bend(database, kind: str, settings: dict[str, str]) -> dict[str, str]:
    """Set all of it, as far as this server knows it; the environ of a role that it applies to."""
    known = {row.name.lower() for row in database.rows("SELECT name FROM pg_settings")}
    target = {"database": f"DATABASE {database.name}", "role": f"ROLE {database.role}"}[kind]
    for name, value in settings.items():
        if name.lower() in known:
            database.rows(f"ALTER {target} SET {name} = '{value}'")
    return {"DB_USER": database.role, "DB_PASSWORD": database.role}


@pytest.fixture
def each_bendable(each_database, make_role):
    """An installed database on every major version, and a superuser to connect as."""
    each_database.role = make_role(each_database)
    each_database.rows(f"ALTER ROLE {each_database.role} SUPERUSER")
    return each_database


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_session_has_our_limits_whatever_was_set_for_it(each_bendable, kind):
    as_role = bend(each_bendable, kind, HOSTILE)
    with connected(each_bendable, **as_role) as conn:
        wanted = db.SESSION | db.PEER | db.PINNED
        for version, more in db.SINCE.items():
            wanted |= more if conn.info.server_version >= version else {}
        for name, value in wanted.items():
            both = "SELECT current_setting(%(name)s), set_config(%(name)s, %(value)s, true)"
            now, then = db.execute(conn, both, {"name": name, "value": value}).fetchone()
            assert now == then, name


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("given", "ours"),
    [("off", "on"), ("local", "local"), ("remote_write", "remote_write"), ("on", "on"),
     ("remote_apply", "remote_apply")],
)  # fmt: skip
def test_our_commits_wait_for_the_disk_and_for_what_else_was_set(
    bendable, monkeypatch, given, ours, pooled
):
    as_role = bend(bendable, "database", {"synchronous_commit": given})
    monkeypatch.setattr(db, "is_pooled", lambda _: pooled)
    with connected(bendable, **as_role) as conn:
        assert db.execute(conn, "SHOW synchronous_commit").fetchone() == (ours,)
        with conn.cursor() as cursor:  # as another client of a pooler
            cursor.execute("SHOW synchronous_commit")
            assert cursor.fetchone() == (given if pooled else ours,)


# Those that only look, and those that change something.
LOOKING = [
    "status",
    "status --json",
    "jobs",
    "jobs --json",
    "metrics",
    "backfill",
    "report --out -",
]


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_commands_work_in_a_bent_session(each_bendable, kind):
    odd = each_bendable.add_job("planner", "done", tenant="a\\b'c 한 ${x}")
    before = {line: said_by(each_bendable.environ, line) for line in LOOKING}
    environ = each_bendable.environ | bend(each_bendable, kind, HOSTILE)
    for line in LOOKING:
        assert set(said_by(environ, line)) == set(before[line]), line
    job = json.loads(commands.run_here(environ, "job", odd, "--json").out)
    assert job["job"]["tenant_id"] == "a\\b'c 한 ${x}"
    for line in ("install", "pause planner", "resume planner", "retry --all", f"cancel {odd}"):
        done = commands.run_here(environ, *line.split())
        assert (done.code, done.err) == (0, ""), (line, done)
    assert each_bendable.owed(odd) is None


def said_by(environ: dict[str, str], line: str) -> list[str]:
    """The words of a command's answer that are no numbers and no times."""
    done = commands.run_here(environ, *line.split())
    assert (done.code, done.err) == (0, ""), (line, done)
    return [word for word in done.out.split() if word.isalpha()]


def test_call_is_made_in_a_bent_session(bendable, api, listener, tmp_path):
    as_role = bend(bendable, "role", HOSTILE)
    process = listener(bendable, api=api, **as_role)
    wait_until_idle(tmp_path)
    job = bendable.add_job("planner", "done", tenant="a\\b'c 한")
    bendable.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    assert api.calls(job)[0].body["tenant_id"] == "a\\b'c 한"
    assert process.stop() == 0 and "오류" not in process.output


@pytest.fixture
def bendable(database, make_role):
    database.role = make_role(database)
    database.rows(f"ALTER ROLE {database.role} SUPERUSER")
    yield database
    database.rows(f"ALTER DATABASE {database.name} RESET ALL")


@pytest.mark.slow
def test_listener_that_rests_keeps_its_session(bendable, listener, tmp_path):
    bend(bendable, "database", {"idle_session_timeout": "1s"})
    as_role = bend(bendable, "role", {"transaction_timeout": "1s"})
    process = listener(bendable, SWEEP_INTERVAL=1.5, **as_role)
    wait_until_idle(tmp_path)
    before = backends(bendable)
    wait_for_sweeps(bendable, times=2)  # each after a rest that is longer
    assert backends(bendable) == before and len(before) == 1
    assert "오류" not in process.output


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_database_that_is_closed_to_writes_stays_so_and_is_named(bendable, kind):
    environ = bendable.environ | bend(bendable, kind, {"default_transaction_read_only": "on"})
    for line in ("verify", "status", "install", "retry --all", "metrics"):
        said = commands.run_here(environ, *line.split()).refused(3)
        assert "session is read-only (a standby, or default_transaction_read_only is set" in said


def test_listener_waits_while_its_database_is_closed_to_writes(bendable, api, listener):
    job = bendable.add_job("overlay")
    name = bendable.name
    bendable.rows(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    process = listener(bendable, api=api)
    process.wait_for_line("default_transaction_read_only is set")
    assert not api.calls(job)
    bendable.rows("SET default_transaction_read_only = off")
    bendable.rows(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    bendable.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_search_path_that_hides_our_tables_is_one_line(bendable, run_command, kind):
    as_role = bend(bendable, kind, {"search_path": "pg_catalog"})
    said = dict.fromkeys(("verify", "run --once"), "which is not on")
    said |= dict.fromkeys(("status", "jobs"), "install")
    for line, part in said.items():
        done = run_command(bendable, *line.split(), **as_role)
        assert done.code != 0 and part in done.out + done.err, line


def test_role_that_is_set_at_login_is_the_one_that_counts(bendable, make_role):
    """ALTER ROLE … SET role, as where everybody works as the owner of the tables."""
    bendable.rows(f"ALTER ROLE {bendable.role} SET role = '{make_role(bendable)}'")
    environ = bendable.environ | {"DB_USER": bendable.role, "DB_PASSWORD": bendable.role}
    assert "permission denied" in commands.run_here(environ, "status").refused(1)


@pytest.mark.parametrize(
    ("password", "reason", "named"),
    [("'x'", 'password authentication failed for user "a"', True), ("'x'", "timeout", False),
     ("x", 'password authentication failed for user "a"', False)],
)  # fmt: skip
def test_quotes_around_a_password_are_named_where_it_was_refused(database, password, reason, named):
    said = db.hint(database.settings(DB_PASSWORD=password), reason)
    assert ("quotes" in said) is named


def test_install_into_a_bent_database_is_the_same(server, make_database, make_role):
    plain, bent = make_database(server, installed=False), make_database(server, installed=False)
    bent.role = make_role(bent)
    bent.rows(f"ALTER ROLE {bent.role} SUPERUSER")
    as_role = bend(bent, "role", HOSTILE)
    for database, given in ((plain, {}), (bent, as_role)):
        with closing(db.connect(database.settings(**given))) as conn:
            apply(conn)
    # But for the number that each database has given the table.
    functions = (
        "SELECT proname, replace(prosrc, 'jobs'::regclass::oid::text, '0') FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace ORDER BY 1"
    )
    assert bent.rows(functions) == plain.rows(functions)
    job = bent.add_job()
    assert bent.owed(job).stage == "vlm_analyze"
