"""The actions of the pages: they run the operator's commands under the person's name."""

import contextlib
import io
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import click
import psycopg2

import db
import ops
from ops.again import again
from ops.pause import pause, resume
from ops.person import acting
from ops.problem import Problem
from ops.rows import NoId
from ops.serve.access import Session
from ops.serve.looks import Looks, Unreadable
from ops.steer import cancel, retry

log = logging.getLogger("listener.serve")

LONGEST_REASON = 500


@dataclass(frozen=True)
class Action:
    """A command that a form may run.

    Args:
        command: what runs.
        label: what the link and the button say.
        about: what it does, for a person.
        asks_reason: whether the command takes one.
    """

    command: click.Command
    label: str
    about: str
    asks_reason: bool
    words: Callable[[Mapping[str, str]], list[str]]


def of_stage(given: Mapping[str, str]) -> list[str]:
    return ["--", given["stage"]]


def of_row(given: Mapping[str, str]) -> list[str]:
    options = [f"--{name}={given[name]}" for name in ("table", "stage") if given.get(name)]
    return [*options, "--", given["id"]]


def retry_words(given: Mapping[str, str]) -> list[str]:
    """Not --now for a stage: all of its calls that were planned for next week would be made."""
    if given.get("id") or given.get("table"):  # of a row, even where its id is empty
        return ["--now", *of_row(given)]
    return [f"--stage={given['stage']}", "--yes"]


ACTIONS = {
    "pause": Action(
        pause, "Pause the stage",
        "No listener calls it until it is resumed; its calls wait, those under way are finished.",
        True, of_stage,
    ),
    "resume": Action(
        resume, "Resume the stage",
        "It is called again at once: a pause or a hold ends.",
        False, of_stage,
    ),
    "retry": Action(
        retry, "Retry now",
        "What was given up is due again, with all its attempts. A call that waits, for its next "
        "attempt or its time, is due now where it is chosen by its row, not by its stage.",
        False, retry_words,
    ),
    "again": Action(
        again, "Call again",
        "The call of its present state is recorded afresh, though it was accepted, cancelled or "
        "given up.",
        False, of_row,
    ),
    "cancel": Action(
        cancel, "Cancel the call",
        "The call that it owes is dropped; the row itself is not touched.",
        True, of_row,
    ),
}  # fmt: skip


def typed(action: Action, given: Mapping[str, str]) -> list[str]:
    """The command's arguments. Raises KeyError where something is missing."""
    reason = " ".join(given.get("reason", "").split())[:LONGEST_REASON]
    options = [f"--reason={reason}"] if action.asks_reason and reason else []
    return [*options, *action.words(given)]


@dataclass(frozen=True)
class Done:
    """The result of an action: the output of the command, and an HTTP status."""

    status: int
    said: str


def perform(looks: Looks, session: Session, name: str, given: Mapping[str, str]) -> Done:
    """Run a command as the person of this session."""
    action = ACTIONS[name]
    words = typed(action, given)
    try:
        with looks.turn():
            done = run(action.command, words, session.person)
            looks.forget()
    except Unreadable as busy:
        done = Done(503, f"{busy.reason}; nothing was changed: try again")
    done = Done(done.status, looks.redact(done.said))
    log.info("조작: %s: %s %s → %s", session.person, name, shlex.join(words),
             " | ".join(done.said.splitlines()))  # fmt: skip
    return done


def run(command: click.Command, words: list[str], person: str) -> Done:
    """One at a time (Looks.lock), as what a command prints goes to the one sys.stdout; what is
    logged goes on to where it went.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), acting(person):
            command.main(words, prog_name="serve", standalone_mode=False)
    except (Problem, NoId) as refusal:
        return Done(409, f"{said.getvalue()}{refusal}")
    except click.ClickException as mistake:
        return Done(400, mistake.format_message())
    except db.ConnectionLost as lost:
        known = "it is not known whether it was done" if lost.was_made else "nothing was changed"
        return Done(503, f"{ops.lost(lost)}; {known}")
    except psycopg2.errors.LockNotAvailable:
        return Done(409, f"{said.getvalue()}{ops.locked()}: try again")
    except psycopg2.Error as error:
        return Done(409, f"the database refused: {ops.first_line(error)}")
    return Done(200, said.getvalue())
