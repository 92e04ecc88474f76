"""Whatever a person types or a program notifies: it works, or one clear line says why not."""

import re
import time
from contextlib import closing
from urllib.parse import urlsplit

import commands
import pytest
from fuzzing import fuzzed, joined
from hypothesis import given
from hypothesis import strategies as st
from raw_server import OK, RawServer, in_turn

import config
import db
import listener as program
from ops.install import apply
from stage_http import Answer, StageApi

pytestmark = pytest.mark.slow

# --- settings ------------------------------------------------------------------------------

ANY = st.text(st.characters(), max_size=3)
PIECES = (
    "http://", "https://", "postgresql://", "postgresql+asyncpg://", "host=", "password=", "user",
    " ", ":", "@", "/", "?", "#", "%", "%40", "[::1]", "127.0.0.1", "localhost", ":8011", ":99999",
    "..", "sslmode=verify-full", "options=-c%20x", "&", "'", "\\", "\0", "\n", "\udcff", "true",
    "1e9", "-1", "5", ".5", "١", "INFO", "/tmp/x", "*", "é",
)  # fmt: skip
TEXTS = joined(*PIECES, other=ANY)


def read(**given: str):
    """The settings, or None where they are refused in one line that shows no more than it may."""
    try:
        return config.read(given)
    except config.SettingsError as refused:
        [name] = [name for name in given if str(refused).startswith(f"{name}=")]
        assert str(refused).isprintable() and len(str(refused)) < 300
        assert name not in config.SECRET or str(refused).startswith(f"{name}=***")
        return None


@fuzzed(300)
@given(name=st.sampled_from(list(config.SETTINGS)), value=TEXTS)
def test_any_setting_works_or_is_refused_in_one_line(name, value):
    values = read(**{name: value})
    if values:
        said = config.redactor(values)(f"no {value} here")
        assert name != "DB_PASSWORD" or len(value.strip()) < 4 or value.strip() not in said


NOWHERE = {"DB_HOST": "127.0.0.1", "DB_PORT": "1"}


@fuzzed(150)
@given(user=TEXTS, password=TEXTS, name=TEXTS)
def test_any_name_and_password_of_a_database_can_be_tried(user, password, name):
    values = read(**NOWHERE, DB_USER=user, DB_PASSWORD=password, DB_NAME=name)
    if values:
        with pytest.raises(db.ConnectionLost):
            db.connect(values)


@fuzzed(150)
@given(before=TEXTS, after=TEXTS)
def test_any_url_of_a_database_can_be_tried_or_is_refused(before, after):
    values = read(DATABASE_URL=f"postgresql://{before}@127.0.0.1:1/{after}")
    if values:
        with pytest.raises(db.ConnectionLost):
            db.connect(values)


@fuzzed(150)
@given(before=TEXTS, after=TEXTS)
def test_any_url_of_a_stage_api_can_be_called_or_is_refused(before, after):
    with RawServer(in_turn(OK)) as server:
        values = read(STAGE_API_URL=server.url.replace("//", f"//{before}@") + f"/{after}")
        if values:
            with closing(StageApi(values)) as api:
                answer = api.post("/x", {}, {}, time.monotonic() + 20)
            assert answer == Answer(200, "ok")
            [request] = server.requests
            assert request.head.count("\n") == len(request.headers)
            assert request.headers["host"] == server.url.removeprefix("http://")


@fuzzed(150)
@given(url=TEXTS.map("http://".__add__))
def test_url_of_a_stage_api_that_is_taken_has_a_host_to_look_for(url):
    values = read(STAGE_API_URL=url)
    if values:
        assert urlsplit(StageApi(values).request("POST", "/x", {}).url).hostname


SECRET = "hunter2hunter2"
URLS = {
    "DATABASE_URL": f"postgresql://user:{SECRET}@db.example:5432/name",
    "STAGE_API_URL": f"http://user:{SECRET}@api.example:8011/base",
    "DB_HOST": f"postgresql://user:{SECRET}@db.example:5432/name",
}


@fuzzed(300)
@given(name=st.sampled_from(list(URLS)), at=st.integers(0, 50), missing=st.integers(0, 2), junk=ANY)
def test_refusal_of_a_damaged_url_shows_no_password(name, at, missing, junk):
    url = URLS[name][:at] + junk + URLS[name][at + missing :]
    try:
        config.read({name: url})
    except config.SettingsError as refused:
        assert SECRET not in str(refused)


# --- what is typed -------------------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
# What argv can hold: no NUL, and bytes that are no UTF-8 as surrogates.
TYPED = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=5)
WORDS = (
    "--help", "--json", "--all", "--yes", "--once", "--stage", "planner", "--stage=paint",
    "--workers", "--workers=2", "0", "-1", "nan", "inf", "1e999", "--max-lag", "--max-lag=5", "--",
    "-", "-x", "=", "", "\udcff", "\x1b[2J", "a\nb", "%s", "x" * 10_000,
    "7f1c6f4e-8f3c-4d53-9b1c-0c2b6b1f2a3d",
)  # fmt: skip
ARGUMENTS = st.lists(st.sampled_from(WORDS) | TYPED, max_size=5)


def assert_clear(done: commands.Done) -> None:
    """One line for a mistake, no trick in it, and a documented exit code."""
    assert done.code in (0, 1, 2, 3)
    if done.err:
        said = done.refused(done.code)
        assert done.code and len(said) < 5000 and not CONTROL.search(said)
    assert not CONTROL.search(done.out)


@fuzzed(300)
@given(command=st.sampled_from(program.cli.list_commands(None)), arguments=ARGUMENTS)
def test_any_arguments_get_one_clear_line(tmp_path, command, arguments):
    environ = NOWHERE | {"HEARTBEAT_DIR": str(tmp_path)}
    if command in ("run", "serve"):  # which would wait for their database
        arguments = ["--help", *arguments]
    done = commands.run_here(environ, command, *arguments)
    assert_clear(done)
    assert done.err or done.out
    if done.code == 0:
        assert done.out.startswith("Usage: jsl ")


@fuzzed(50)
@given(typed=TYPED.filter(lambda typed: typed not in ("", "--")), arguments=ARGUMENTS)
def test_any_mistyped_command_gets_one_clear_line(typed, arguments):
    done = commands.run_here(NOWHERE, typed, *arguments)
    assert_clear(done)
    assert done.code == 2 or "--help" in arguments


ID_TYPES = ["uuid", "bigint", "text", "varchar(5)", "date", "inet"]


@pytest.mark.parametrize("id_type", ID_TYPES)
def test_any_job_id_gets_one_clear_line(empty_database, id_type):
    columns = f"job_id {id_type} PRIMARY KEY, tenant_id text, current_step text, status text"
    empty_database.rows(f"CREATE TABLE jobs ({columns})")
    with closing(db.connect(empty_database.settings())) as conn:
        apply(conn)

    @fuzzed(15)
    @given(command=st.sampled_from(["job", "retry", "call"]), job=st.sampled_from(WORDS) | TYPED)
    def type_it(command: str, job: str) -> None:
        done = commands.run_here(empty_database.environ, command, "--", job)
        assert_clear(done)
        assert done.refused(done.code) and done.code in (1, 2)

    type_it()
