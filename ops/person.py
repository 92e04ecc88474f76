"""Who types a command, and what the listeners log of it."""

import contextlib
import getpass
import os
import socket

import db


def operator() -> str:
    """Who types this, for the log and the history."""
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"uid {os.getuid()}@{socket.gethostname()}"


WAKE_WITH = f"SELECT pg_notify('{db.WAKE_CHANNEL}', left(%(words)s, 1000))"


def wake_listeners(conn, words: str) -> None:
    """Wake the listeners, who log the words."""
    db.execute(conn, WAKE_WITH, {"words": words})
