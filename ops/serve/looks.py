"""What the pages ask of the database: one question at a time, and none twice within a second,
however many people look.
"""

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psycopg2

import config
import db
import ops
from ops import rows
from ops.problem import Problem

# An answer is shown again for so many seconds, and for so many times as long as it took.
FRESH, TIMES = 1.0, 2
MOST_KEPT = 100
# What all questions get for a while, once one has found the database away.
AWAY = object()


class Unreadable(Exception):
    """Nothing can be shown.

    Args:
        title: what is the matter, in a few words.
        reason: one line, with what to run where that helps.
    """

    def __init__(self, title: str, reason: str):
        super().__init__(title, reason)
        self.title, self.reason = title, reason


@dataclass(frozen=True)
class Kept:
    answer: Any
    refusal: tuple[str, str] | None
    until: float  # time.monotonic()


class Looks:
    """A connection that only reads, made when somebody looks and again after it was lost."""

    def __init__(self, settings: SimpleNamespace):
        self.settings, self.redact = settings, config.redactor(settings)
        # Of everything that this process does in the database: connecting switches the deadline of
        # all connections off for a moment (see db.without_callback).
        self.lock = threading.Lock()
        self.conn: db.Connection | None = None
        self.kept: dict[Hashable, Kept] = {}

    def look(self, key: Hashable, ask: Callable[[db.Connection], Any]) -> Any:
        """The answer of `ask`, without secrets; that of another viewer who has just asked `key`.

        Raises:
            Unreadable: the database is away, or refused.
        """
        kept = self.fresh(key)
        if kept is None:
            with self.lock:
                kept = self.fresh(key)
                if kept is None:
                    kept = self.asked(key, ask)
        if kept.refusal:
            raise Unreadable(*kept.refusal)
        return kept.answer

    def fresh(self, key: Hashable) -> Kept | None:
        now = time.monotonic()
        found = (self.kept.get(AWAY), self.kept.get(key))
        return next((kept for kept in found if kept and now < kept.until), None)

    def make_room(self) -> None:
        if len(self.kept) >= MOST_KEPT:
            now = time.monotonic()
            self.kept = {key: kept for key, kept in self.kept.items() if kept.until > now}

    def asked(self, key: Hashable, ask: Callable[[db.Connection], Any]) -> Kept:
        self.make_room()
        began, answer, refusal = time.monotonic(), None, None
        try:
            answer = without_secrets(self.answer(ask), self.redact)
        except (psycopg2.Error, Problem) as error:
            title, reason = why_unreadable(error)
            refusal = title, " ".join(self.redact(reason).split())
            if isinstance(error, db.CONNECTION_LOST):
                self.close()
                self.forget()
                key = AWAY
        now = time.monotonic()
        kept = self.kept[key] = Kept(answer, refusal, now + max(FRESH, TIMES * (now - began)))
        return kept

    def answer(self, ask: Callable[[db.Connection], Any]) -> Any:
        """A connection that was lost while nobody looked is made anew, and nobody is told."""
        if self.conn is not None:
            try:
                return ask(self.connected())
            except db.ConnectionLost:
                self.close()
        return ask(self.connected())

    def connected(self) -> db.Connection:
        """Raises Problem where the database has not what this program reads."""
        if self.conn is None:
            conn = db.connect(self.settings, "job-state-listener serve")
            # In front of every statement: a pooler hands the next one to another session.
            conn.prefix = db.READ_ONLY + conn.prefix
            self.conn = conn
        rows.require_tables(self.conn)
        return self.conn

    def forget(self) -> None:
        """What was done shows at the next look."""
        self.kept = {}

    def close(self) -> None:
        if self.conn is not None:
            self.conn.close()
            self.conn = None


def why_unreadable(error: Exception) -> tuple[str, str]:
    """A title and a line."""
    if isinstance(error, db.CONNECTION_LOST):
        return "No database", ops.lost(error)
    if isinstance(error, (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedFunction)):
        return "Not installed", ops.missing(error)
    if isinstance(error, psycopg2.errors.InsufficientPrivilege):
        return "Not allowed", f"{ops.first_line(error)}: see docs/SERVE.md"
    if isinstance(error, psycopg2.errors.QueryCanceled):
        return "Too slow", "the database took too long to answer"
    if isinstance(error, psycopg2.Error):
        return "The database refused", ops.first_line(error)
    return "Not ready", str(error)


def without_secrets(value: Any, redact: Callable[[str], str]) -> Any:
    """`value`, and all that is in it, with *** for every secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: without_secrets(one, redact) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(without_secrets(one, redact) for one in value))
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(one, redact) for one in value)
    return value
