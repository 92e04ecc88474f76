"""Who types a command, and what the listeners log of it."""

import contextlib
import getpass
import os
import socket
from collections.abc import Iterator
from contextvars import ContextVar

import db

# Who acts by way of a program that is not theirs: the page of `serve`.
ACTING: ContextVar[str | None] = ContextVar("ACTING", default=None)


@contextlib.contextmanager
def acting(name: str) -> Iterator[None]:
    """What this thread does meanwhile is done by the person of this name."""
    before = ACTING.set(name)
    try:
        yield
    finally:
        ACTING.reset(before)


def operator() -> str:
    """Who types this, for the log and the history."""
    if name := ACTING.get():
        return name
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"uid {os.getuid()}@{socket.gethostname()}"


WAKE_WITH = f"SELECT pg_notify('{db.WAKE_CHANNEL}', left(%(words)s, 1000))"


def wake_listeners(conn, words: str) -> None:
    """Wake the listeners, who log the words."""
    db.execute(conn, WAKE_WITH, {"words": words})
