"""The rows that rest, as no call and no stage moves them on, and how many each stage has."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import psycopg2

import db
import pipeline
from ops.problem import first_line
from ops.rows import locked

# Has resting_rows() ask for one of parts() alone.
PART = "SELECT set_config('job_state_listener.part', coalesce(%(part)s, ''), true); "
# A query apart from pipeline_overview, which answers within milliseconds: this one reads the
# application's tables.
RESTING = """
SELECT stage, kind, count(*) AS jobs,
       CASE WHEN count(DISTINCT reason) > 1 THEN 'several reasons, the last: ' ELSE '' END
           || (array_agg(left(reason, 2000) ORDER BY since DESC NULLS LAST))[1] AS reason
FROM resting_rows()
GROUP BY stage, kind
"""

# Two reasons begin with these words. Either may be about the call that the row's own state owes, or
# about that of a join.
NEVER_RECORDED, ACCEPTED = "its call was never recorded", "accepted by the stage"


def parts(only: str | None = None) -> tuple[Collection[str], Collection[str]]:
    """What resting_rows() can be asked for by itself: the rows of a table; a join, which cannot be
    read either where one of its two tables cannot. With `only`, those that have rows of that table.
    """
    joins = pipeline.joins().items()
    return (
        [name for name in pipeline.tables() if only in (None, name)],
        [name for name, state in joins if only in (None, pipeline.owner(state).name)],
    )


def tables_of(part: str) -> set[str]:
    """The tables that are read for one of parts()."""
    join = pipeline.joins().get(part)
    return {join.table.name, pipeline.owner(join).name} if join else {part}


class Listed(NamedTuple):
    """Rows of resting_rows(), by part where not all parts() could be asked at once; of which parts
    they are not known, and why.
    """

    by_part: list[list]
    unknown: dict[str, str]

    @property
    def rows(self) -> list:
        return [row for rows in self.by_part for row in rows]

    def problem(self, unread: Collection[str] = ()) -> str | None:
        """Why it is not known, and of what; None where all is known. Without the parts that need a
        table of `unread`, which the caller reports. Screens cut the end, so the reasons come first.
        """
        unknown = {part: why for part, why in self.unknown.items()
                   if tables_of(part).isdisjoint(unread)}  # fmt: skip
        if not unknown:
            return None
        reasons = "; ".join(dict.fromkeys(unknown.values()))
        of = ", ".join(unknown)
        return f"{reasons}: which rows are failed or stalled is not known of {of}"


def why_unknown(conn, error: psycopg2.Error) -> str:
    if isinstance(error, psycopg2.errors.QueryCanceled):
        return "reading rows took too long"
    if isinstance(error, psycopg2.errors.LockNotAvailable):
        return locked(conn)
    return first_line(error)


def listed(
    conn, sql: str, given: Mapping[str, Any], only: str | None = None, prefix: str = ""
) -> Listed:
    """What `sql` selects from resting_rows(); where that cannot be asked at once, part by part.

    Args:
        only: the one table whose rows are wanted.
        prefix: statements that come before it in its transaction.

    Raises:
        psycopg2.Error: resting_rows() is missing, or this role may not execute it.
    """

    def ask(conn, part: str | None = None) -> list:
        return db.execute(conn, prefix + PART + sql, {**given, "part": part}).fetchall()

    groups = parts(only)
    answers, failed = db.in_parts(conn, ask, *groups, all_parts=True)
    error = next(iter(failed.values()), None)
    if error and "function resting_rows" in (error.diag.message_primary or ""):
        raise error
    parts_failed = [part for group in groups for part in group if part in failed]
    return Listed(answers, {part: why_unknown(conn, failed[part]) for part in parts_failed})


class Resting(NamedTuple):
    """How many rows rest, and the reason of the last one."""

    jobs: int | None  # None: not known
    reason: str | None


NONE, UNKNOWN = Resting(0, None), Resting(None, None)


class Rests(NamedTuple):
    """The rows that rest, by stage and kind ("failed": set so by their stage; "stalled"); of which
    parts() that is not known, and why.
    """

    found: dict[tuple[str, str], Resting]
    unknown: Collection[str]
    problem: str | None

    def of(self, stage: str, kind: str) -> Resting:
        """Those of a stage, which may be called for rows of several parts."""
        for route, (name, _) in pipeline.stages_of_routes().items():
            if name == stage and not {route.table, route.join}.isdisjoint(self.unknown):
                return UNKNOWN
        return self.found.get((stage, kind), NONE)

    @property
    def unknown_tables(self) -> set[str]:
        """The tables in `unknown`, and those whose rows a join in it waits for."""
        joins = pipeline.joins()
        return {joins[part].table.name if part in joins else part for part in self.unknown}


def resting(conn) -> Rests:
    """How many rows rest. Raises psycopg2.Error as listed() does."""
    answer = listed(conn, RESTING, {})
    found: dict[tuple[str, str], Any] = {}
    for row in answer.rows:
        jobs = found.get((row.stage, row.kind), NONE).jobs
        found[row.stage, row.kind] = Resting(jobs + row.jobs, row.reason)
    return Rests(found, answer.unknown, answer.problem())
