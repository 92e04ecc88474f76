"""Where settings come from: the environment, `.env` in the working directory, `.env` beside the
program; and what a person sees without them.
"""

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import commands
import pytest

import config
import db

ROOT = Path(__file__).parent.parent

GUIDE = """
# Job State Listener 설정
ENABLE_JOB_STATE_LISTENER=true
JOB_STATE_LISTENER_RECONNECT_DELAY=7

# 데이터베이스 연결 설정
DB_HOST=host.docker.internal  # 또는 실제 DB 호스트
DB_PORT=5433
DB_NAME=feedlyai
DB_USER=feedlyai
DB_PASSWORD=your_password
"""
SHOW = "import config; s = config.settings(); print(s.DB_HOST, s.DB_PORT, s.DB_PASSWORD)"


def python(*args: str | Path, cwd: Path, path: Path = ROOT, **environ: str):
    """Run Python without any setting but these; the finished process."""
    clean = {k: v for k, v in os.environ.items() if k not in config.SETTINGS}
    clean |= {"PYTHONPATH": str(path), "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=clean | environ, capture_output=True, text=True, encoding="utf-8"
    )


def shown_after(code: str, cwd: Path, path: Path = ROOT, **environ: str) -> str:
    return python("-c", code + SHOW, cwd=cwd, path=path, **environ).stdout.strip()


def shown(cwd: Path, path: Path = ROOT, **environ: str) -> str:
    if path != ROOT:
        return shown_after("", cwd, path, **environ)
    found = settings_of(cwd, **environ)
    return f"{found.DB_HOST} {found.DB_PORT} {found.DB_PASSWORD}"


def settings_of(cwd: Path, **environ: str):
    """The settings of a program in `cwd`, as this process reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for name in config.SETTINGS:
            patch.delenv(name, raising=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        config.settings.cache_clear()
        try:
            return config.settings()
        finally:
            config.settings.cache_clear()


@pytest.fixture
def program(tmp_path):
    """A copy of config.py, and of what it imports, in a directory of its own."""
    (tmp_path / "program").mkdir()
    for name in ("redaction.py", "signing.py"):
        shutil.copy(ROOT / name, tmp_path / "program")
    return Path(shutil.copy(ROOT / "config.py", tmp_path / "program")).parent


def test_env_file_of_the_guide_is_read_inline_comments_and_all(tmp_path):
    (tmp_path / ".env").write_text(GUIDE, encoding="utf-8")
    assert shown(tmp_path) == "host.docker.internal 5433 your_password"


def test_environment_wins_over_the_file(tmp_path):
    (tmp_path / ".env").write_text(GUIDE, encoding="utf-8")
    assert shown(tmp_path, DB_HOST="other", DB_PORT="1") == "other 1 your_password"


def test_empty_variable_is_the_default_whatever_the_file_says(tmp_path):
    (tmp_path / ".env").write_text(GUIDE, encoding="utf-8")
    assert shown(tmp_path, DB_PORT="") == "host.docker.internal 5432 your_password"


def test_empty_line_in_the_file_is_the_default(tmp_path):
    (tmp_path / ".env").write_text("DB_HOST=db\nDB_PORT=\nDB_PASSWORD")
    assert shown(tmp_path) == "db 5432 None"


def test_file_beside_the_program_is_found(tmp_path, program):
    (program / ".env").write_text("DB_HOST=beside")
    assert shown(tmp_path, path=program) == "beside 5432 None"


def test_file_of_the_working_directory_comes_first_and_alone(tmp_path, program):
    (program / ".env").write_text("DB_HOST=beside\nDB_PORT=1")
    (tmp_path / ".env").write_text("DB_HOST=here")
    assert shown(tmp_path, path=program) == "here 5432 None"


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("DB_PASSWORD='a #b'", "a #b"),
        ("DB_PASSWORD=' a #b '", " a #b "),
        ('DB_PASSWORD="a #b"  # 비밀번호', "a #b"),
        ("DB_PASSWORD=a#b", "a#b"),
        ("export DB_PASSWORD=x", "x"),
        ("DB_PASSWORD = x", "x"),
        ("DB_PASSWORD=a=b$c", "a=b$c"),
    ],
)
def test_passwords_in_the_file_are_quoted_as_usual(tmp_path, line, password):
    (tmp_path / ".env").write_text(f"DB_HOST=db\n{line}\n", encoding="utf-8")
    assert shown(tmp_path) == f"db 5432 {password}"


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ('DB_PASSWORD="a${no_such_name}b"', "a${no_such_name}b"),
        ("DB_PASSWORD=a${no_such_name}b", "a${no_such_name}b"),
        ("DB_PASSWORD='a${HOME}b'", "a${HOME}b"),
        ("export DB_PASSWORD='a${HOME}b'", "a${HOME}b"),
        ('DB_PASSWORD="a$HOME$1$$b"', "a$HOME$1$$b"),
        ("DB_PASSWORD='${'", "${"),
        ("POSTGRES=x$y\nDB_PASSWORD=${POSTGRES}", "x$y"),
        ("DB_PASSWORD=${FROM_OUTSIDE}", "outside"),
    ],
)
def test_dollar_in_a_password_is_what_the_file_says(tmp_path, line, password):
    (tmp_path / ".env").write_text(f"DB_HOST=db\n{line}\n")
    assert shown(tmp_path, FROM_OUTSIDE="outside") == f"db 5432 {password}"


def test_url_can_be_put_together_of_other_names(tmp_path):
    (tmp_path / ".env").write_text(
        "DB_USER=app\nDB_PASSWORD=x\nDATABASE_URL=postgresql://${DB_USER}:${DB_PASSWORD}@db/y\n"
    )
    assert settings_of(tmp_path).DATABASE_URL == "postgresql://app:x@db/y"


@pytest.mark.parametrize(
    "line", ["DB_PASSWORD='it's'", 'export DB_PASSWORD="a" b"', "DB_PASSWORD='a"]
)
def test_line_whose_quotes_cannot_be_read_is_one_line(tmp_path, line):
    (tmp_path / ".env").write_text(f"DB_HOST=db\n{line}\n")
    said = refused(tmp_path, "status")
    assert said.endswith("line 2 cannot be read: DB_PASSWORD has a quote that ends too early")


def test_line_of_another_program_that_cannot_be_read_is_passed_over(tmp_path):
    (tmp_path / ".env").write_text("OTHER='it's'\nDB_HOST=db\n")
    assert shown(tmp_path) == "db 5432 None"


def test_file_that_an_editor_marked_as_utf8_is_read_from_its_first_line(tmp_path):
    (tmp_path / ".env").write_text("DB_HOST=db\r\nDB_PORT=7\r\n", encoding="utf-8-sig")
    assert shown(tmp_path) == "db 7 None"


def test_directory_that_was_removed_has_no_file(tmp_path, program):
    (program / ".env").write_text("DB_HOST=beside")
    gone = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
    (program / "show.py").write_text(gone + SHOW)
    assert python(program / "show.py", cwd=tmp_path, path=program).stdout == "beside 5432 None\n"


def test_directory_that_is_closed_to_us_has_no_file(tmp_path):
    closed = "import config, os; os.mkdir('closed'); os.chdir('closed'); os.chmod('.', 0); "
    closed += "os.geteuid() or os.setuid(65534); "  # no mode keeps root out
    assert shown_after(closed, tmp_path) == "None 5432 None"


def test_single_setting_can_be_imported_as_the_guide_shows(tmp_path):
    show = "from config import ENABLE_JOB_STATE_LISTENER; print(ENABLE_JOB_STATE_LISTENER)"
    assert python("-c", show, cwd=tmp_path).stdout == "True\n"
    off = python("-c", show, cwd=tmp_path, ENABLE_JOB_STATE_LISTENER="false")
    assert off.stdout == "False\n"


def test_unknown_setting_cannot_be_imported():
    with pytest.raises(ImportError):
        exec("from config import ENABLE_EVERYTHING")


def why_off(cwd: Path, **environ: str) -> str | None:
    return config.why_off(settings_of(cwd, **environ))


@pytest.mark.parametrize("name", ["LISTENER_ENABLED", "ENABLE_JOB_STATE_LISTENER"])
def test_what_keeps_the_listener_off_is_named_with_its_place(tmp_path, name):
    (tmp_path / ".env").write_text(f"{name}=false\n")
    assert why_off(tmp_path) == f"{name}=false in {tmp_path / '.env'}"
    assert why_off(tmp_path, **{name: "0"}) == f"{name}=false in the environment"
    assert why_off(tmp_path, LISTENER_ENABLED="1") is None


@pytest.mark.parametrize("blank", ["", " "])
def test_setting_without_a_value_keeps_nothing_off(tmp_path, blank):
    (tmp_path / ".env").write_text("LISTENER_ENABLED=false\nENABLE_JOB_STATE_LISTENER=false\n")
    told = why_off(tmp_path, LISTENER_ENABLED=blank)
    assert told == f"ENABLE_JOB_STATE_LISTENER=false in {tmp_path / '.env'}"


def test_environment_is_named_where_it_turns_off_what_the_file_turns_on(tmp_path):
    (tmp_path / ".env").write_text("LISTENER_ENABLED=true\nENABLE_JOB_STATE_LISTENER=true\n")
    told = why_off(tmp_path, LISTENER_ENABLED="false")
    assert told == "LISTENER_ENABLED=false in the environment"


# --- a root that cannot be written ---------------------------------------------------------

DIRECTORY = "import config; print(config.settings().HEARTBEAT_DIR)"
# As on a read-only root: os.access says what the file system allows, also to root.
CLOSED = "import os; os.access = lambda path, mode: path.startswith({!r}); "


@pytest.mark.parametrize(
    ("writable", "chosen"),
    [("/tmp", "/tmp"), ("/var", "/var/tmp"), ("/dev", "/dev/shm"), ("/nowhere", "/tmp")],
)
def test_heartbeats_are_kept_where_something_can_be_written(tmp_path, writable, chosen):
    (tmp_path / ".env").touch()
    told = python("-c", CLOSED.format(writable) + DIRECTORY, cwd=tmp_path, TMPDIR="")
    assert told.stdout == f"{chosen}/job-state-listener\n", told.stderr


def test_temporary_directory_of_the_environment_comes_first(tmp_path):
    (tmp_path / ".env").touch()
    told = python("-c", DIRECTORY, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert told.stdout == f"{tmp_path}/job-state-listener\n"
    told = python("-c", DIRECTORY, cwd=tmp_path, TMPDIR="/no/such/directory")
    assert told.stdout == "/tmp/job-state-listener\n"


# --- through the command -------------------------------------------------------------------


def refused(tmp_path: Path, *args: str, **environ: str) -> str:
    """The one line of a command that ends with exit code 2."""
    ended = commands.run(environ, tmp_path, *args)
    assert (ended.code, ended.out) == (2, ""), ended
    [line] = ended.err.splitlines()
    return line


def test_command_with_a_bad_setting_is_one_line(tmp_path):
    (tmp_path / ".env").write_text("STAGE_TIMEOUT=ten minutes")
    line = refused(tmp_path, DB_HOST="db")
    assert line == (
        "error: STAGE_TIMEOUT='ten minutes' cannot be used:"
        " allowed is a number of seconds from 0.1 to 86400"
    )


@pytest.mark.parametrize(
    "environ",
    [
        {"DATABASE_URL": "postgresql://app:hunter2@db:x/y"},
        {"DATABASE_URL": "mysql://app:hunter2@db/y"},
        {"DB_HOST": "db", "STAGE_API_URL": "http://user:hunter2@api:99999"},
        {"DB_HOST": "app:hunter2@db"},
    ],
)
def test_refusal_of_a_command_shows_no_password(tmp_path, environ):
    (tmp_path / ".env").touch()
    assert "hunter2" not in refused(tmp_path, "status", **environ)


def test_file_in_another_encoding_is_one_line(tmp_path):
    (tmp_path / ".env").write_bytes("DB_HOST=db  # 또는 실제 DB 호스트".encode("cp949"))
    line = refused(tmp_path, "status")
    assert str(tmp_path / ".env") in line and "UTF-8" in line


def test_database_url_wins_over_host_and_name(database):
    where = database.environ
    login = f"{where['DB_USER']}:{quote(where['DB_PASSWORD'], safe='')}"
    url = f"postgresql+asyncpg://{login}@{where['DB_HOST']}:{where['DB_PORT']}"
    settings = database.settings(
        DATABASE_URL=f"{url}/{database.name}", DB_HOST="nowhere.invalid", DB_NAME="nothing"
    )
    with closing(db.connect(settings)) as conn:
        assert conn.info.dbname == database.name


def test_wrong_password_is_not_in_the_error_of_a_connection(database):
    settings = database.settings(
        DATABASE_URL="postgresql://app:hunter2%2Fx@127.0.0.1:9/x", DB_PASSWORD="hunter2/x"
    )
    with pytest.raises(db.ConnectionLost) as lost:
        db.connect(settings)
    assert "hunter2" not in config.redactor(settings)(str(lost.value))
