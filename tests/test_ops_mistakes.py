"""Every mistake gets one line on stderr and an exit code, and shows no secret."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import click
import commands
import pytest
from claims import claim, connected, result, settle
from click.testing import CliRunner

import listener as program
from ops.install import apply

ROOT = Path(__file__).parent.parent
COMMANDS = program.cli.list_commands(None)
# Where no database answers.
NOWHERE = SimpleNamespace(environ={"DB_HOST": "127.0.0.1", "DB_PORT": "1"})
ASKING = ["install", "verify", "retry --all", "job 7", "call 7"]
NO_DATABASE = (
    "no database is set: give DB_HOST or DATABASE_URL (see .env.example), "
    "or try `make demo`, which brings its own"
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_the_command_and_each_option(command):
    done = CliRunner().invoke(program.cli, [*command.split(), "--help"], prog_name="jsl",
                              env={"COLUMNS": "80"})  # fmt: skip
    assert done.exit_code == 0
    usage, _, begins = done.output.split("\n")[:3]
    assert max(map(len, done.output.split("\n"))) <= 80
    assert usage.startswith(f"Usage: jsl {command}".rstrip())
    assert begins[2].isupper()
    options = (program.cli.get_command(None, command) if command else program.cli).params
    for option in options:
        if option.param_type_name == "option":
            assert option.help.endswith((".", "?"))
            assert option.opts[0] in done.output


def test_help_of_all_names_every_command_with_a_whole_sentence(run_command):
    lines = run_command(NOWHERE, "--help").lines
    lines = [line for line in lines[lines.index("Run:") :] if line.startswith("  ")]
    listed = dict(line.split(None, 1) for line in lines)
    assert sorted(listed) == COMMANDS
    for sentence in listed.values():
        assert sentence.endswith(".")
        assert not sentence.endswith("...")


# what is typed: (how the answer begins, the command whose help it names)
MISTAKES = {
    "strat": ("'strat' is no command: did you mean status?", ""),
    "JOBS": ("'JOBS' is no command: did you mean jobs?", ""),
    "--since 2h jobs": ("No such option '--since': options come after the command.", ""),
    "run --workers 0": ("Invalid value for '--workers': 0 is not in the range 1<=x<=256.", "run"),
    "run --workers many": ("Invalid value for '--workers': 'many' is not a valid integer", "run"),
    "run --stage paint": (
        "Invalid value for '--stage': 'paint' is no stage: PIPELINE has vlm_analyze, yolo_detect",
        "run",
    ),
    "check --max-lag -1": ("Invalid value for '--max-lag': -1.0 is not in the range 0<=x", "check"),
    "check --max-lag inf": ("Invalid value for '--max-lag': inf is not in the range 0<=x", "check"),
    "check --max-lag nan": ("Invalid value for '--max-lag': nan is not a valid number", "check"),
    "check --max-lag 5m": ("Invalid value for '--max-lag': '5m' is not a valid number of", "check"),
    "check --max-lag": ("Option '--max-lag' requires an argument.", "check"),
    "status --watch=1": ("Option '--watch' does not take a value.", "status"),
    "job": ("Missing argument 'JOB_ID'.", "job"),
    "call": ("Missing argument 'JOB_ID'.", "call"),
    "job 7 8": ("Got unexpected extra argument (8).", "job"),
    "status --interval 5": ("--interval needs --watch.", "status"),
    "status --watch --interval 0": ("Invalid value for '--interval': 0.0 is not in", "status"),
    "status --watch --interval nan": ("Invalid value for '--interval': nan is not a", "status"),
    "status --watch --interval inf": ("Invalid value for '--interval': inf is not in", "status"),
    "status --watch --interval 1e20": ("Invalid value for '--interval': 1e+20 is not", "status"),
    "pause planner --wait --timeout nan": ("Invalid value for '--timeout': nan is not", "pause"),
    "test-job --timeout inf": ("Invalid value for '--timeout': inf is not in", "test-job"),
    "jobs --given-up --stalled": ("Give one of --given-up, --stalled and --failed.", "jobs"),
    "jobs --stalled --failed": ("Give one of --given-up, --stalled and --failed.", "jobs"),
    "job --jsno 7": ("No such option '--jsno'.", "job"),
    "retry --al": ("No such option '--al'.", "retry"),
    "cancel 7 --reason": ("Option '--reason' requires an argument.", "cancel"),
    "jobs --table variants": ("Invalid value for '--table': 'variants' is no table", "jobs"),
    "call 7 --stage paint": ("Invalid value for '--stage': 'paint' is no", "call"),
    "jobs --limit 0": ("Invalid value for '--limit': 0 is not in the range 1<=x<=10000.", "jobs"),
    "jobs --since 2x": (
        "Invalid value for '--since': '2x' is neither a span such as 30m, 2h or 3d nor a time",
        "jobs",
    ),
    "jobs --since 800000d": (
        "Invalid value for '--since': '800000d' is too long ago: there was no year 0.",
        "jobs",
    ),
    "pause PLANNER": (
        "Invalid value for '[STAGE]...': 'PLANNER' is no stage: did you mean planner?",
        "pause",
    ),
    "pause paint": (
        "Invalid value for '[STAGE]...': 'paint' is no stage: PIPELINE has vlm_analyze",
        "pause",
    ),
    "resume paint": (
        "Invalid value for '[STAGE]...': 'paint' is no stage: PIPELINE has vlm_analyze",
        "resume",
    ),
    "pause": ("name a STAGE, or a --pool", "pause"),
    "cancel": ("Give job ids, or some of --stage, --tenant", "cancel"),
    "cancel 7 --error x": ("Job ids go with --stage and --table only.", "cancel"),
    "retry --table jobs": ("Give job ids, or some of --stage, --tenant", "retry"),
    "retry --since 2x": ("Invalid value for '--since': '2x' is neither a span such as", "retry"),
    "again": ("Missing argument 'JOB_ID'.", "again"),
    "again 7 --stage paint": ("Invalid value for '--stage': 'paint' is no stage", "again"),
    "cancel --yes --error=": ("Invalid value for '--error': it is blank.", "cancel"),
    "retry --all --stage=": ("Invalid value for '--stage': '' is no stage: PIPELINE has", "retry"),
    "pause planner --timeout 5": ("--timeout needs --wait.", "pause"),
    "status now": ("Got unexpected extra argument (now).", "status"),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistyped_command_gets_one_line_and_exit_2(run_command, typed):
    done = run_command(NOWHERE, *typed.split())
    begins, command = MISTAKES[typed]
    refused = done.refused(2)
    assert refused.startswith(begins)
    assert refused.endswith(f" See: {f'./jsl {command}'.strip()} --help")
    assert done.out == ""


PARAMETERS = [
    (command, parameter)
    for command in COMMANDS
    for parameter in program.cli.get_command(None, command).params
    if not getattr(parameter, "is_flag", False)
]


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize(
    ("command", "parameter"), PARAMETERS, ids=[f"{c} {p.name}" for c, p in PARAMETERS]
)
def test_blank_value_of_any_option_or_argument_is_refused(command, parameter, value):
    """What `--stage "$STAGE"` is where STAGE is not set."""
    is_option = parameter.param_type_name == "option"
    typed = f"{parameter.opts[0]}={value}" if is_option else value
    with pytest.raises(click.BadParameter) as refused:
        program.cli.get_command(None, command).make_context(command, [typed])
    name = parameter.opts[0] if is_option else parameter.make_metavar(refused.value.ctx)
    assert refused.value.format_message().startswith(f"Invalid value for '{name}': ")


def test_mistake_in_an_argument_of_any_length_is_told_whole(run_command):
    refused = run_command(NOWHERE, "again", "7", "--stage", "x" * 9000).refused(2)
    assert refused.startswith("Invalid value for '--stage': 'xxx") and len(refused) < 4100
    assert "x' is no stage: PIPELINE has vlm_analyze, " in refused
    assert refused.endswith(" See: ./jsl again --help")


@pytest.mark.parametrize("typed", ["status", "call 7", "run"])
def test_bad_setting_gets_one_line_and_exit_2(run_command, typed):
    done = run_command(NOWHERE, *typed.split(), STAGE_TIMEOUT="10m")
    assert done.refused(2) == (
        "STAGE_TIMEOUT='10m' cannot be used: allowed is a number of seconds from 0.1 to 86400"
    )


@pytest.mark.parametrize("typed", ["", "run --once", "install", "status", "call 7"])
def test_missing_database_setting_gets_one_line_and_exit_2(run_command, typed):
    assert run_command(NOWHERE, *typed.split(), DB_HOST="").refused(2) == NO_DATABASE


@pytest.mark.parametrize("typed", ASKING)
def test_unreachable_database_gets_one_line_and_exit_3(run_command, typed):
    done = run_command(NOWHERE, *typed.split(), DB_PASSWORD="s3cr3t-w0rd")
    refused = done.refused(3)
    assert refused.startswith("the database cannot be reached: ")
    assert "onnection refused" in refused
    assert "s3cr3t" not in done.out + done.err


def test_once_without_its_database_exits_3(run_command):
    done = run_command(NOWHERE, "run", "--once", DB_PASSWORD="s3cr3t-w0rd")
    assert done.code == 3
    assert "리스너 오류 발생: " in done.lines[-1]
    assert "s3cr3t" not in done.out


@pytest.fixture
def demanding(server, database, make_role) -> str:
    """A role that the server does not let in without its password."""
    role = make_role(database)
    if not server.embedded:
        yield role
        return
    # The embedded server asks nobody on this machine for a password, except this role from now on.
    path = database.value("SHOW hba_file")
    kept = database.value("SELECT pg_read_file(%s)", path)
    write = "COPY (SELECT regexp_split_to_table(%s, E'\\n')) TO %s; SELECT pg_reload_conf()"
    with closing(database.connect()) as conn:
        conn.cursor().execute(write, (f"host all {role} all scram-sha-256\n{kept}", path))
        yield role
        conn.cursor().execute(write, (kept, path))


@pytest.mark.parametrize("url", [False, True], ids=["DB_PASSWORD", "DATABASE_URL"])
def test_wrong_password_exits_3_and_is_not_shown(database, run_command, demanding, url):
    given = {"DB_USER": demanding, "DB_PASSWORD": "wr0ng-w0rd"}
    if url:
        where = "{DB_HOST}:{DB_PORT}/{DB_NAME}".format(**database.environ)
        given = {"DATABASE_URL": f"postgresql://{demanding}:wr0ng-w0rd@{where}"}
    done = run_command(database, "status", **given)
    refused, look_at = done.refused(3).split(" (look at ")
    assert "password authentication failed for user" in refused
    assert look_at == ("DATABASE_URL)" if url else "DB_USER and DB_PASSWORD)")
    assert "wr0ng" not in done.out + done.err


def test_database_that_does_not_exist_exits_3(database, run_command):
    refused = run_command(database, "status", DB_NAME="no_such_database").refused(3)
    assert refused.endswith('database "no_such_database" does not exist (look at DB_NAME)')


def test_role_that_does_not_exist_is_advised(server, database, run_command):
    if not server.embedded:
        pytest.skip("a server that asks for a password does not tell")
    refused = run_command(database, "status", DB_USER="no one").refused(3)
    assert refused.endswith('role "no one" does not exist (look at DB_USER and DB_PASSWORD)')


@pytest.mark.parametrize("typed", ["status", "retry --all", "job 7"])
def test_database_without_our_tables_gets_told_what_to_run(empty_database, run_command, typed):
    done = run_command(empty_database, *typed.split())
    assert "run `make trigger` (./jsl install)" in done.refused(1)


@pytest.mark.parametrize("typed", ["status", "retry --all", "run --once", "call 7"])
def test_role_without_grants_gets_one_line_that_says_where_they_are(
    database, run_command, make_role, typed
):
    role = make_role(database)
    done = run_command(database, *typed.split(), DB_USER=role, DB_PASSWORD=role)
    if typed == "run --once":
        assert done.code == 2
        assert "permission denied for table pipeline_stages" in done.lines[-1]
    else:
        assert re.match("permission denied for (table|view) ", done.refused(1))
    assert "see 'Roles and grants' in docs/INSTALLING.md" in done.out + done.err


BROKEN = {
    "PIPELINE = {('img_gen', 'done'): splitt}": "NameError: name 'splitt' is not defined",
    "from pipeline import limits\n\n\n@limits(per_minut=3)\ndef split(call): ...": "TypeError: ",
    "import string\nstring.lower": "AttributeError: module 'string' has no attribute 'lower'",
    "import string\nimport nowhere": "ModuleNotFoundError: No module named 'nowhere'",
}


@pytest.mark.parametrize("text", BROKEN)
def test_error_in_the_pipeline_module_names_its_line(database, run_command, tmp_path, text):
    (tmp_path / "own.py").write_text(text)
    line = next(n for n, one in enumerate(text.split("\n"), 1)
                if re.search("splitt|minut|lower|nowhere", one))  # fmt: skip
    done = run_command(database, "verify", PIPELINE_MODULE="own", PYTHONPATH=tmp_path)
    refused = done.err.rstrip("\n")
    assert refused.startswith(f"error: own cannot be imported: {BROKEN[text]}"), refused
    assert refused.endswith(f" (own.py, line {line})") and done.code == 2


def test_once_with_half_the_grants_ends_and_says_why(database, run_command, make_role):
    role = make_role(database)
    some = "pipeline_stages, pipeline_tables, stage_limits, jobs, job_state_listener_schema"
    database.rows(f"GRANT SELECT ON {some} TO {role}")
    done = run_command(database, "run", "--once", DB_USER=role, DB_PASSWORD=role)
    assert done.code == 1
    assert "permission denied for table pipeline_stages" in (done.out + done.err).splitlines()[-1]


@pytest.mark.parametrize("command", ["jobs", "backfill", "verify"])
def test_locked_table_and_who_locked_it_are_named(database, run_command, command):
    table = "pipeline_stages" if command == "verify" else "jobs"
    with closing(database.connect()) as other:
        other.cursor().execute(f"SET application_name = 'psql'; BEGIN; LOCK TABLE {table}")
        done = run_command(database, command)
        locked = f"{table} is locked by server process {other.info.backend_pid} (psql)"
    if command == "verify":
        assert f"PROBLEM  {locked} → ./jsl verify, once more" in done.lines
    else:
        assert done.refused(1).endswith(f"{locked}: try again")


def test_transaction_that_a_change_of_the_table_waits_for_is_named(database, run_command):
    with ThreadPoolExecutor() as pool, closing(database.connect()) as reader:
        reader.cursor().execute("SET application_name = 'psql'; BEGIN; SELECT FROM jobs")
        with closing(database.connect()) as other:
            pool.submit(other.cursor().execute, "ALTER TABLE jobs ADD number integer")
            database.wait_for("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")
            done = run_command(database, "jobs")
            locked = f"jobs is locked by server process {reader.info.backend_pid} (psql)"
            reader.cursor().execute("ROLLBACK")
    assert done.refused(1) == f"jobs cannot be read: {locked}: try again"


# --- text that somebody else wrote ---------------------------------------------------------

HOSTILE = "a\x1b[2Jb\nok: forged\r\x07\x9b31mc\u2028d"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]")


@pytest.fixture
def hostile(database) -> str:
    """A job with hostile text wherever text can be."""
    job = database.add_job("planner", "done", HOSTILE)
    database.rows(
        "UPDATE stage_calls SET due_at = 'infinity', last_error = %s, attempts = 1;"
        "INSERT INTO stage_attempts SELECT job_id, call_id, 1, stage, 'w', now(), now(), 500,"
        " 'failed', %s FROM stage_calls;"
        "UPDATE pipeline_stages SET held_until = now() + interval '1 h', held_reason = %s"
        " WHERE stage = 'planner'",
        *[HOSTILE] * 3,
    )
    return job


@pytest.mark.parametrize("command", ["status", "job JOB", "status --json", "job JOB --json"])
def test_hostile_text_is_printed_escaped(database, run_command, hostile, command):
    done = run_command(database, *command.replace("JOB", hostile).split())
    assert done.code == 0
    assert "forged" in done.out
    assert not CONTROL.search(done.out), done.out
    assert not any(line.startswith("ok: forged") for line in done.out.splitlines())


def test_hostile_step_in_a_refusal_stays_one_line(database, run_command):
    job = database.add_job(HOSTILE, "done")
    done = run_command(database, "retry", job)
    assert "forged" in done.refused(1)
    assert not CONTROL.search(done.err), done.err


@pytest.mark.parametrize(
    "typed", [HOSTILE.replace("\n", ""), "\udcff"], ids=["control", "no UTF-8"]
)
@pytest.mark.parametrize("command", ["job", "call", "retry"])
def test_hostile_argument_is_refused_in_one_line(database, run_command, command, typed):
    done = run_command(database, command, typed)
    assert done.refused(2)
    assert not CONTROL.search(done.err), done.err


@pytest.fixture
def latin1(server, make_database):
    """A database that lacks most letters, with a job whose call was given up."""
    database = make_database(server, installed=False)
    with closing(server.connect()) as conn:
        conn.cursor().execute(f"DROP DATABASE {database.name} WITH (FORCE); ")
        conn.cursor().execute(f"CREATE DATABASE {database.name} ENCODING 'LATIN1' LOCALE 'C'"
                              " TEMPLATE template0")  # fmt: skip
    database.conn = database.connect()
    database.rows("CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text, current_step text,"
                  " status text)")  # fmt: skip
    with connected(database) as conn:
        apply(conn)
    database.rows("INSERT INTO jobs VALUES ('7', 't', 'planner', 'done')")
    return database


@pytest.mark.parametrize(
    "typed", ["pause overlay --reason 점검", "cancel 7 --reason 점검", "jobs --tenant 회사"]
)
def test_letter_that_the_database_lacks_is_no_fault_of_an_id(latin1, typed):
    refused = commands.run_here(latin1.environ, *typed.split()).refused(1)
    assert refused.startswith("the database refused: character with byte sequence ")


def test_error_with_a_letter_that_the_database_lacks_is_shown_and_found(latin1):
    with connected(latin1) as conn:
        settle(conn, result(claim(conn), "failed", error="caf\u00e9 \U0001f600: 메모리"))
    assert "given up: café 😀: 메모리" in commands.run_here(latin1.environ, "job", "7").out
    assert "7 " in commands.run_here(latin1.environ, "retry", "--error", "café").out


def test_id_with_a_letter_that_the_database_lacks_is_no_id(latin1):
    refused = commands.run_here(latin1.environ, "job", "작업").refused(2)
    assert refused.startswith("not a job id of this database: character with byte sequence ")


@pytest.mark.parametrize("id_type", ["date", "inet", "varchar(9)"])
def test_id_that_no_job_can_have_is_refused(empty_database, id_type):
    columns = f"job_id {id_type} PRIMARY KEY, tenant_id text, current_step text, status text"
    empty_database.rows(f"CREATE TABLE jobs ({columns})")
    with connected(empty_database) as conn:
        apply(conn)
    for command in ("job", "call", "retry"):
        done = commands.run_here(empty_database.environ, command, "x")
        refused = done.refused(1 if "char" in id_type else 2)
        assert "there is no job" in refused or "not a job id of this database" in refused


@pytest.mark.parametrize("closed", [False, True], ids=["full", "closed"])
@pytest.mark.parametrize(
    ("typed", "code"), [("--help", 1), ("check", 1), ("job 7", 3), ("run --once", 3)]
)
def test_output_that_cannot_be_written_is_no_traceback(tmp_path, typed, code, closed):
    (tmp_path / ".env").touch()
    environ = os.environ | NOWHERE.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    command = [sys.executable, ROOT / "listener.py", *typed.split()]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=environ, cwd=tmp_path, stdout=full, text=True,
                              stderr=subprocess.PIPE,
                              preexec_fn=(lambda: os.close(1)) if closed else None)  # fmt: skip
    assert done.returncode == (0 if closed and typed == "--help" else code)
    assert "Traceback" not in done.stderr and "Arguments:" not in done.stderr


@pytest.mark.parametrize("typed", ["status", "jobs", "jobs --failed"])
def test_command_whose_output_is_closed_succeeds(database, tmp_path, typed):
    (tmp_path / ".env").touch()
    environ = os.environ | database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    command = [sys.executable, ROOT / "listener.py", *typed.split()]
    done = subprocess.run(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: os.close(1))  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_hostile_id_is_printed_escaped(empty_database, run_command):
    columns = "job_id text PRIMARY KEY, tenant_id text, current_step text, status text"
    empty_database.rows(f"CREATE TABLE jobs ({columns})")
    run_command(empty_database, "install")
    empty_database.rows("INSERT INTO jobs VALUES (%s, 't', 'planner', 'done')", HOSTILE)
    empty_database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    done = run_command(empty_database, "retry", "--all", "--yes")
    assert "forged" in done.lines[0]
    assert not CONTROL.search(done.out), done.out


def test_terminal_that_knows_no_arrow_is_no_error(database, run_command):
    done = run_command(database, "install", PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert "(planner, done)" in done.out
