"""The operator's commands, one module a topic: `listener.py` adds them to its own."""

import contextlib
import difflib
import importlib
import io
import os
import platform
import re
import sys

import click
import psycopg2

import config
import db
from logs import CONTROL, LONGEST_LINE
from ops import rows
from ops.problem import INSTALL, Problem, first_line, mend_of
from ops.routes import announced, require_installed
from pipeline import JSL

__all__ = [
    "EXIT_CANNOT_START",
    "EXIT_DATABASE_AWAY",
    "EXIT_PROBLEM",
    "VERSION",
    "VERSIONS",
    "Commands",
    "Problem",
    "announced",
    "first_line",
    "main",
    "require_installed",
]

# The version of this program; CHANGELOG.md says what each contains.
VERSION = "2.0.0.dev0"
PSYCOPG2: str = psycopg2.__version__  # type: ignore[attr-defined]  # its stubs leave it out
VERSIONS = (
    f"Job State Listener %(version)s"
    f" (Python {platform.python_version()}, psycopg2 {PSYCOPG2.split()[0]})"
)

# Each command and the module that it is in.
COMMANDS = {
    "install": "install", "uninstall": "install", "verify": "verify", "check": "check",
    "status": "status", "job": "job", "jobs": "jobs", "retry": "steer", "cancel": "steer",
    "again": "again", "pause": "pause", "resume": "pause", "backfill": "backfill",
    "test-job": "trial",
    "metrics": "metrics", "traces": "traces", "report": "report", "audit": "audit",
    "serve": "serve", "alert-test": "alert",
}  # fmt: skip

# The headings of --help and the modules of the commands below each. A command whose module is not
# listed here is shown below "Look".
GROUPS: dict[str, list[str | None]] = {
    "Run": [None],  # those of listener.py itself
    "Look": [],
    "Steer": ["steer", "again", "pause"],
    "Set up": ["install", "verify", "trial", "alert", "backfill"],
}

EXIT_PROBLEM, EXIT_BAD_INPUT, EXIT_DATABASE_AWAY = 1, 2, 3
EXIT_CANNOT_START = EXIT_BAD_INPUT


class Commands(click.Group):
    """A click group that imports an operator's command only when it is used: `run` needs none of
    them, and together they take 2 MB of memory.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *COMMANDS])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return super().get_command(context, name)
        module = importlib.import_module(f"ops.{COMMANDS[name]}")
        return getattr(module, name.replace("-", "_"))

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """An option that stands before the command is most likely one of the command's own."""
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            context.fail(f"No such option {error.option_name!r}: options come after the command")

    def resolve_command(self, context: click.Context, args: list[str]) -> tuple:
        """Suggest the command that a mistyped name is nearest to. `-h` means help here, although a
        job id may begin with a dash.
        """
        name, rest = args[0], args[1:]
        names = self.list_commands(context)
        if name not in names and not name.startswith("-") and not context.resilient_parsing:
            near = difflib.get_close_matches(name.lower(), names, 1)
            meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(names)}"
            context.fail(f"{name!r} is no command: {meant}")
        return super().resolve_command(context, [name, "--help"] if rest == ["-h"] else args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        declared = [*super().list_commands(context), *COMMANDS]
        longest = max(map(len, declared))
        for title in GROUPS:
            rows = [
                (name.ljust(longest), command.get_short_help_str(200))
                for name in declared
                if group(name) == title and (command := self.get_command(context, name))
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def group(name: str) -> str:
    """The heading that a command stands below."""
    module = COMMANDS.get(name)
    return next((title for title, modules in GROUPS.items() if module in modules), "Look")


def main(cli: click.Group) -> None:
    """Run the command line; every mistake becomes one line and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no arrow
    try:
        sys.exit(cli.main(prog_name="jsl", standalone_mode=False) or 0)
    except SystemExit as ending:
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:  # Python would fail once more, and end with 120
            os._exit((isinstance(ending.code, int) and ending.code) or EXIT_PROBLEM)
        raise
    except BrokenPipeError:
        os._exit(EXIT_PROBLEM)
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        os._exit(EXIT_PROBLEM)  # a full disk would fail once more when Python flushes its output
    except (click.Abort, KeyboardInterrupt):
        fail("stopped", 130)
    except click.ClickException as error:
        text = error.format_message()
        text += "" if text.endswith((".", "?")) else "."
        fail(f"{text} See: {help_for(error)}", EXIT_BAD_INPUT)
    except config.SettingsError as error:
        fail(str(error), EXIT_BAD_INPUT)
    except Problem as problem:
        fail(str(problem), EXIT_PROBLEM)
    except rows.NoId as error:
        fail(str(error), EXIT_BAD_INPUT)
    except db.ConnectionLost as error:
        fail(lost(error), EXIT_DATABASE_AWAY)
    except UnicodeEncodeError as error:
        fail(not_utf8(error), EXIT_BAD_INPUT)
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedFunction) as error:
        fail(missing(error), EXIT_PROBLEM)
    except psycopg2.errors.InsufficientPrivilege as error:
        fail(f"{first_line(error)}: {mend_of(error)}", EXIT_PROBLEM)
    except psycopg2.errors.UndefinedColumn as error:
        fail(f"the database refused: {first_line(error)}: {JSL} verify", EXIT_PROBLEM)
    except psycopg2.errors.LockNotAvailable:
        fail(f"{locked()}: try again", EXIT_PROBLEM)
    except psycopg2.Error as error:
        fail(f"the database refused: {first_line(error)}", EXIT_PROBLEM)


def locked() -> str:
    try:
        return rows.locked(db.connect(config.settings(), "job-state-listener"))
    except db.ConnectionLost as error:
        return lost(error)


def lost(error: db.ConnectionLost) -> str:
    """One line for a lost connection, or for a server that answered and refused the command."""
    answered = getattr(error.__cause__, "pgcode", None)
    return f"the database {'refused' if answered else 'cannot be reached'}: {error}"


# Finds names of our tables and functions in an error of the server, in whatever language it is.
OURS = re.compile(
    r"\b(stage_|pipeline_|given_up_calls|resting_rows|stalled_jobs|job_state_listener)"
)


def missing(error: psycopg2.Error) -> str:
    """A table or function that is not there: ours, or one of the application's."""
    line = first_line(error)
    if OURS.search(line):
        return f"{line}: {INSTALL}"
    return f"the database refused: {line}: {JSL} verify"


def not_utf8(error: UnicodeEncodeError) -> str:
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            return "an argument is not valid UTF-8"
    return f"a setting or a text is not valid UTF-8: {error}"


def help_for(error: click.ClickException) -> str:
    """The help of the command that was typed; click does not always say which one it was."""
    context = getattr(error, "ctx", None)
    typed = " ".join(["jsl", *sys.argv[1:2]])
    return f"./{context.command_path if context else typed} --help"


def fail(message: str, code: int) -> None:
    with contextlib.suppress(config.SettingsError):  # which shows no secret itself
        message = config.redactor(config.settings())(message)
    line = " ".join(message.split()).translate(CONTROL)
    if len(line) > LONGEST_LINE:  # a long argument stands in the middle
        line = f"{line[: LONGEST_LINE // 2]}…{line[-LONGEST_LINE // 2 :]}"
    click.echo(f"error: {line}", err=True)
    sys.exit(code)
