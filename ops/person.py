"""The person who runs a command, and the line that the listeners log about it."""

import contextlib
import getpass
import os
import socket
from collections.abc import Iterator
from contextvars import ContextVar

import db

# The person for whom `serve` runs a command; None in a command that was typed.
ACTING: ContextVar[str | None] = ContextVar("ACTING", default=None)


@contextlib.contextmanager
def acting(name: str) -> Iterator[None]:
    """Commands that this thread runs within the `with` are recorded under this name."""
    before = ACTING.set(name)
    try:
        yield
    finally:
        ACTING.reset(before)


def operator() -> str:
    """The name of the person who runs the command, for the log and the history."""
    if name := ACTING.get():
        return name
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"uid {os.getuid()}@{socket.gethostname()}"


WAKE_WITH = f"SELECT pg_notify('{db.WAKE_CHANNEL}', left(%(words)s, 1000))"


def wake_listeners(conn, words: str) -> None:
    """Wake all listeners; each logs `words`."""
    db.execute(conn, WAKE_WITH, {"words": words})
