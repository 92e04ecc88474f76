"""Database connections that call a function after each statement and commit, so that a test can
make something happen at each moment.
"""

from collections.abc import Callable
from contextlib import closing, suppress

import psycopg2


class Watched:
    """The `connect` of a Receiver. Calls `happens(moment, wire)` after each statement and commit;
    moments are numbered from 1."""

    def __init__(self, connect: Callable, happens: Callable):
        self.connect, self.happens, self.moment = connect, happens, 0

    def __call__(self) -> "Wire":
        return Wire(self, self.connect())

    def passed(self, wire: "Wire") -> None:
        self.moment += 1
        self.happens(self.moment, wire)


class Wire:
    """A connection."""

    autocommit = False

    def __init__(self, watched: Watched, real):
        self.watched, self.real = watched, real

    def cursor(self) -> "Cursor":
        return Cursor(self, self.real.cursor())

    def commit(self) -> None:
        self.real.commit()
        self.watched.passed(self)

    def rollback(self) -> None:
        self.real.rollback()

    def close(self) -> None:
        self.real.close()

    def cut(self) -> None:
        """End the session on the server, and wait until this side notices."""
        with closing(self.watched.connect()) as other:
            other.autocommit = True
            kill = "SELECT pg_terminate_backend(%s)"
            other.cursor().execute(kill, [self.real.info.backend_pid])
        with suppress(psycopg2.Error):
            self.real.cursor().execute("SELECT")
        raise psycopg2.OperationalError("cut")


class Cursor:
    def __init__(self, wire: Wire, real):
        self.wire, self.real = wire, real

    def execute(self, *args) -> None:
        self.real.execute(*args)
        self.wire.watched.passed(self.wire)

    def __getattr__(self, name: str):
        return getattr(self.real, name)
