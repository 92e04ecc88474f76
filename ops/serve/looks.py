"""The queries of the pages, one at a time. Answers are cached for a second or more, so many viewers
cost the database no more than one.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psycopg2

import config
import db
import ops
from ops import rows
from ops.problem import Problem
from ops.report.data import redacted

# An answer is cached for FRESH seconds, or for TIMES as long as the query took if that is more.
FRESH, TIMES = 1.0, 2
MOST_KEPT = 100
# Seconds that a query or an action waits for those of others: longer than a search takes, less
# than probes wait.
PATIENCE = 6.0
# The cache key of "the database is away", which then answers every query for a while.
AWAY = object()


class Unreadable(Exception):
    """The database could not be read.

    Args:
        title: what is the matter, in a few words.
        reason: one line, with what to run where that helps.
    """

    def __init__(self, title: str, reason: str):
        super().__init__(title, reason)
        self.title, self.reason = title, reason


@dataclass(frozen=True)
class Kept:
    """A cached answer."""

    answer: Any
    refusal: tuple[str, str] | None
    until: float  # time.monotonic()


class Looks:
    """Runs queries on one read-only connection, which is made when needed and again when lost."""

    def __init__(self, settings: SimpleNamespace):
        self.settings, self.redact = settings, config.redactor(settings)
        # Held for everything that this process does in the database: while one thread connects, no
        # connection has its deadline (see db.without_callback).
        self.lock = threading.Lock()
        self.conn: db.Connection | None = None
        self.kept: dict[Hashable, Kept] = {}

    def look(self, key: Hashable, ask: Callable[[db.Connection], Any], redacts: bool = True) -> Any:
        """The answer of `ask`, or the one that is cached under `key`.

        Args:
            redacts: replace secrets; not in what programs read, such as the names of metrics and
                the ids that rows are found by.

        Raises:
            Unreadable: the database is away, or refused, or is busy with other queries.
        """
        kept = self.fresh(key)
        if kept is None:
            with self.turn():
                kept = self.fresh(key)
                if kept is None:
                    kept = self.ask_and_keep(key, ask, redacts)
        if kept.refusal:
            raise Unreadable(*kept.refusal)
        return kept.answer

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock. Raises Unreadable where others hold it for too long."""
        if not self.lock.acquire(timeout=PATIENCE):
            raise Unreadable("Busy", "the database is still busy with other pages")
        try:
            yield
        finally:
            self.lock.release()

    def fresh(self, key: Hashable) -> Kept | None:
        now = time.monotonic()
        found = (self.kept.get(AWAY), self.kept.get(key))
        return next((kept for kept in found if kept and now < kept.until), None)

    def make_room(self) -> None:
        if len(self.kept) >= MOST_KEPT:
            now = time.monotonic()
            self.kept = {key: kept for key, kept in self.kept.items() if kept.until > now}

    def ask_and_keep(
        self, key: Hashable, ask: Callable[[db.Connection], Any], redacts: bool
    ) -> Kept:
        self.make_room()
        began, answer, refusal = time.monotonic(), None, None
        try:
            answer = self.answer(ask)
            if redacts:
                answer = redacted(answer, self.redact)
        except (psycopg2.Error, Problem) as error:
            title, reason = why_unreadable(error)
            refusal = title, " ".join(self.redact(reason).split())
            if isinstance(error, db.ConnectionLost):
                self.close()
                self.forget()
                key = AWAY
        now = time.monotonic()
        kept = self.kept[key] = Kept(answer, refusal, now + max(FRESH, TIMES * (now - began)))
        return kept

    def answer(self, ask: Callable[[db.Connection], Any]) -> Any:
        """Run the query; once more on a new connection where the old one was lost meanwhile."""
        if self.conn is not None:
            try:
                return ask(self.connected())
            except db.ConnectionLost:
                self.close()
        return ask(self.connected())

    def connected(self) -> db.Connection:
        """The connection. Raises Problem where our tables are missing or of another version."""
        if self.conn is None:
            conn = db.connect(self.settings, "job-state-listener serve")
            # Sent with every statement, as a pooler may give the next one to another session.
            conn.prefix = db.READ_ONLY + conn.prefix
            self.conn = conn
        rows.require_tables(self.conn)
        return self.conn

    def forget(self) -> None:
        """Empty the cache, so that the next page shows what an action has changed."""
        self.kept = {}

    def close(self) -> None:
        if self.conn is not None:
            self.conn.close()
            self.conn = None


def why_unreadable(error: Exception) -> tuple[str, str]:
    """Title and reason of Unreadable for an error."""
    if isinstance(error, db.ConnectionLost):
        return "No database", ops.lost(error)
    if isinstance(error, (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedFunction)):
        return "Not installed", ops.missing(error)
    if isinstance(error, psycopg2.errors.InsufficientPrivilege):
        return "Not allowed", f"{ops.first_line(error)}: see docs/SERVE.md"
    if isinstance(error, psycopg2.errors.QueryCanceled):
        return "Too slow", "the database took too long to answer"
    if isinstance(error, psycopg2.errors.LockNotAvailable):
        return "Locked", ops.locked()
    if isinstance(error, psycopg2.Error):
        return "The database refused", ops.first_line(error)
    return "Not ready", str(error)
