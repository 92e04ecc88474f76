"""One database connection for one request, its advisory lock, and transactions with retries."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .answers import one_line

log = logging.getLogger("receiver")

TRY_AGAIN_AFTER = 0.2  # seconds between two attempts to reach the database

# The advisory lock of a key, held by the session that works on it. The keepalives let the server
# notice soon that the host of a session is gone; by default that takes two hours. The session is
# idle while the work runs, so idle_session_timeout (since PostgreSQL 14) must not end it.
LOCK = """
SELECT pg_try_advisory_lock(hashtextextended('stage_requests ' || %(key)s, 0)),
       set_config('tcp_keepalives_idle', '15', false) AS idle,
       set_config('tcp_keepalives_interval', '5', false) AS interval,
       set_config('tcp_keepalives_count', '3', false) AS count,
       (SELECT set_config(name, '0', false) FROM pg_settings
        WHERE name = 'idle_session_timeout') AS timeout"""
UNLOCK = "SELECT pg_advisory_unlock(hashtextextended('stage_requests ' || %(key)s, 0))"
# The same lock for one transaction.
LOCK_BRIEFLY = "SELECT pg_try_advisory_xact_lock(hashtextextended('stage_requests ' || %(key)s, 0))"

# Retried.
CONFLICT = ("40",)  # serialization failure, deadlock
TRANSIENT = (*CONFLICT, "55P03")  # and lock not available
# Connection lost: connection errors, read-only (a standby), too many clients, server shutdown.
LOST = ("08", "25006", "53300", "57P0")


class NoConnection(Exception):
    """`connect` made none, for a reason that is not the server's: a pool has none left."""


class Session:
    """A connection for one request, made again where it is lost.

    Args:
        connect, release: of the Receiver.
        key: whose lock it tries to take, and then holds; None: no lock.
        patience: seconds for which a transaction is tried.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        release: Callable[[Any], Any],
        key: str | None,
        patience: float,
    ):
        self.connect, self.release = connect, release
        self.key, self.patience = key, patience
        self.connection: Any = None
        self.has_lock = False
        self.was_autocommit = False  # it is given back as it came

    def transaction(self, do: Callable[[Any], Any], retried: tuple[str, ...] = TRANSIENT) -> Any:
        """What do(cursor) returns, once it is committed.

        Where the database was lost, `do` is run again on a new connection, and has to find out
        whether its first commit came through.

        Args:
            retried: how the SQLSTATEs begin after which `do` is run again as well.
        """
        until, pause = time.monotonic() + self.patience, 0.0
        while True:
            try:
                done = do(self.cursor())
                self.connection.commit()
                return done
            except Exception as error:
                if not self.clean_up(error, retried) or time.monotonic() > until:
                    raise
            time.sleep(pause)
            pause = TRY_AGAIN_AFTER

    def cursor(self) -> Any:
        if self.connection is None:
            try:
                self.connection = self.connect()
            except Exception as error:
                if sqlstate(error) is None and not is_lost(error):
                    raise NoConnection(one_line(error)) from error
                raise
            driver = driver_of(self.connection)
            self.was_autocommit = driver.autocommit
            if self.was_autocommit:
                driver.autocommit = False
            if self.key is not None:
                self.lock()
        return self.connection.cursor()

    def lock(self) -> None:
        [(self.has_lock, *_)] = rows(self.connection.cursor(), LOCK, {"key": self.key})
        # The next statement needs a new snapshot, with what the last holder of the lock committed.
        self.connection.commit()

    def unlock(self) -> None:
        [(had_lock,)] = rows(self.connection.cursor(), UNLOCK, {"key": self.key})
        self.connection.commit()
        if not had_lock:
            log.error("this connection kept no lock: behind a pooler in transaction mode give"
                      " Receiver(…, lost_after=…)")  # fmt: skip

    def clean_up(self, error: Exception, retried: tuple[str, ...]) -> bool:
        """End the transaction that `error` broke; whether it is worth another try."""
        if is_lost(error):
            self.drop()
            return True
        try:
            if self.connection is not None:
                self.connection.rollback()
        except Exception:
            self.drop()
        return (sqlstate(error) or "").startswith(retried)

    def drop(self) -> None:
        """Close a connection that is lost."""
        connection, self.connection, self.has_lock = self.connection, None, False
        if connection is not None:
            with suppress(Exception):
                driver_of(connection).close()
            with suppress(Exception):
                self.release(connection)

    def rest(self) -> None:
        """Before the work begins: give the connection back, unless it holds the lock."""
        if self.key is None:
            self.close()

    def close(self) -> None:
        """Give the lock and the connection back."""
        if self.connection is None:
            return
        try:
            if self.has_lock:
                self.unlock()
            if self.was_autocommit:
                driver_of(self.connection).autocommit = True
        except Exception:
            self.drop()
            return
        connection, self.connection, self.has_lock = self.connection, None, False
        self.release(connection)


def driver_of(connection: Any) -> Any:
    """The driver's connection, which SQLAlchemy's has inside."""
    return getattr(connection, "driver_connection", connection)


def sqlstate(error: Exception) -> str | None:
    """PostgreSQL's code, under the name that psycopg 3 or psycopg2 gives it."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def is_lost(error: Exception) -> bool:
    """Whether `error` of a driver means that the database cannot be reached, or is lost.

    An error without an SQLSTATE does not come from the server; psycopg2 raises a bare DatabaseError
    for some of them.
    """
    if (code := sqlstate(error)) is not None:
        return code.startswith(LOST)
    names = {kind.__name__ for kind in type(error).__mro__}
    is_bare = type(error).__name__ == "DatabaseError"
    is_ours = isinstance(error, NoConnection)
    return is_ours or is_bare or bool(names & {"OperationalError", "InterfaceError"})


def rows(cursor: Any, statement: str, values: dict[str, Any]) -> list[tuple]:
    cursor.execute(statement, values)
    # A connection may be made with rows that are dicts: RealDictCursor, dict_row.
    return [tuple(row.values() if isinstance(row, dict) else row) for row in cursor.fetchall()]
