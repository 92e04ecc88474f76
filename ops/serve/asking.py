"""The queries behind each page: those of `status`, `job`, `jobs`, `metrics` and `report`, run by
way of Looks.
"""

import dataclasses
import time
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg2

import db
import pipeline
from ops import job, jobs, rows, status
from ops import metrics as of_metrics
from ops.alarms import alarms
from ops.problem import Problem
from ops.report.data import WAITING, Report, Span, collect, redacted
from ops.report.jobs import with_rows_below
from ops.report.page import page
from ops.report.svg import WAITS
from ops.rows import NoId
from ops.serve.looks import Looks, Unreadable

SINCE = timedelta(hours=24)  # of charts
MOST_ROWS = 50
# Limit for a search by tenant, which may read a whole table while other viewers wait. What ends
# sooner than after db.TRY_AGAIN_WITHIN would be repeated.
SHORT = "SET LOCAL statement_timeout = '5s'; "


def metrics(looks: Looks) -> str:
    """The output of `metrics`, also where the database cannot be read."""
    began = time.monotonic()

    def read(conn) -> str:
        found = of_metrics.Page()
        of_metrics.read_all(conn, found)
        of_metrics.add_own(found, began, True)
        return found.text()

    try:
        return looks.look("metrics", read, redacts=False)
    except Unreadable:
        away = of_metrics.Page()
        of_metrics.add_own(away, began, False)
        return away.text()


class Board(NamedTuple):
    """The result of `status`, and for each stage how many jobs are in each kind of WAITS."""

    status: dict[str, Any]
    waiting: dict[str, dict[str, int]]


def board(looks: Looks) -> Board:
    def read(conn) -> Board:
        state = status.look(conn, looks.settings)
        waiting: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(WAITS, 0))
        for row in db.execute(conn, WAITING, {"until": state["at"]}):
            for kind in WAITS:
                waiting[row.stage][kind] += getattr(row, kind)
        return Board(state, dict(waiting))

    return looks.look("board", read)


# --- the report, and a stage ---------------------------------------------------------------


def whole_report(looks: Looks) -> Report:
    """The report of the last 24 hours."""

    def read(conn) -> Report:
        since = datetime.now(timezone.utc) - SINCE
        return collect(conn, since, [], looks.redact, rows.unread(conn))

    return looks.look("report", read)


def report(looks: Looks) -> str:
    """The page of the report, which begins with what needs a person now."""
    now = redacted(alarms(board(looks).status), looks.redact)
    return page(dataclasses.replace(whole_report(looks), alarms=now))


def of_stage(whole: Report, name: str) -> Report:
    """The rows of one stage."""

    def only(found: Any) -> Any:
        if not isinstance(found, list):
            return found
        return [row for row in found if getattr(row, "stage", name) == name]

    fields = [field.name for field in dataclasses.fields(whole)]
    return dataclasses.replace(whole, **{f: only(getattr(whole, f)) for f in fields})


class Stage(NamedTuple):
    """A stage: its row of `status`, its part of the report (None: it took too long), the rows that
    need a person, by kind, and why it is not known which rest (None: it is).
    """

    row: dict[str, Any]
    at: datetime
    report: Report | None
    rest: dict[str, list]
    unknown: str | None


def stage(looks: Looks, name: str) -> Stage | None:
    """The data of a stage's page; None where there is no such stage."""
    found = board(looks)
    [row] = [one for one in found.status["stages"] if one["stage"] == name] or [None]
    if row is None:
        return None

    def read(conn) -> tuple[dict[str, list], str | None]:
        given = {"stage": name, "since": None, "tenant": None, "table": None, "limit": MOST_ROWS}
        unread = [*rows.unread(conn)]
        found = {"given_up": db.execute(conn, jobs.GIVEN_UP, given | {"unread": unread}).fetchall()}
        problem = None
        for kind in ("failed", "stalled"):
            if row[kind]:
                found[kind], why = jobs.resting_rows(conn, given | {"kind": kind})
                problem = problem or why
        return found, problem

    rest, unknown = looks.look(("stage", name), read)
    try:
        charts = of_stage(whole_report(looks), name)
    except Unreadable:
        charts = None
    if row["failed"] is None:
        unknown = found.status["resting_problem"]
    return Stage(row, found.status["at"], charts, rest, unknown)


# --- rows ----------------------------------------------------------------------------------


def places(looks: Looks, id_: str, table: str | None = None, needs_all: bool = False) -> list:
    """The rows with this id (see rows.PLACES), of `table` or of whichever, with any secrets.

    Args:
        needs_all: raise Unreadable where there is none, but may be in a table that cannot be read.
    """

    def read(conn) -> list:
        try:
            key = rows.key_of(conn, id_)
        except NoId:
            return []
        unread = rows.unread(conn)
        found = [row for row in rows.places(conn, key, unread) if table in (None, row.table_name)]
        unread = {name: why for name, why in unread.items() if table in (None, name)}
        if needs_all and unread and not found:
            raise Problem(f"{key} is in no table that can be read; {rows.told(unread)}")
        return found

    if not is_text(id_):
        return []
    return looks.look(("places", table, id_, needs_all), read, redacts=False)


def is_text(given: str) -> bool:
    """Whether the database could have this text: it has no NUL, and no half of a surrogate pair."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in given)


class Row(NamedTuple):
    """What `job` says of a row, and the report's timelines of it and of those that belong to it."""

    found: job.Found
    at: datetime
    report: Report


def row(looks: Looks, place: Any) -> Row:
    def read(conn) -> Row:
        now = datetime.now(timezone.utc)

        def ask(sql: str, **more: Any) -> list:
            return redacted(db.execute(conn, sql, {"until": now} | more).fetchall(), looks.redact)

        found = job.look(conn, place, rows.unread(conn))
        drawn = with_rows_below(ask, looks.redact, found)
        shown = Report("", Span(now - SINCE, now), asked=True, timelines=[drawn])
        return Row(found, now, shown)

    return looks.look(("row", place.table_name, place.key), read)


class Found(NamedTuple):
    """The results of a search."""

    by_id: list
    by_tenant: list
    more: bool
    problem: str | None


def search(looks: Looks, settings: SimpleNamespace, asked: str) -> Found:
    """Search by id in every table, and by tenant."""
    if not is_text(asked):
        return Found([], [], False, None)
    by_id = places(looks, asked)

    def read(conn) -> Found:
        given = {"stage": None, "since": None, "tenant": asked, "limit": MOST_ROWS}
        unread = rows.unread(conn)
        problem = rows.told(unread) or None
        tables = [table for table in pipeline.tables().values() if table.name not in unread]
        if not tables:
            return Found(by_id, [], False, problem)
        listing = jobs.any_row(conn, settings, tables, None)
        try:
            of_tenant = db.execute(conn, SHORT + listing.sql, given).fetchall()
        except psycopg2.errors.QueryCanceled:
            slow = "Looking for a tenant took too long: give an id."
            return Found(by_id, [], False, "; ".join(filter(None, [problem, slow])))
        return Found(by_id, of_tenant[:MOST_ROWS], len(of_tenant) > MOST_ROWS, problem)

    return looks.look(("search", asked), read)
