"""Following a job and its rows in other tables through PIPELINE, for `test-job`."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import click
from psycopg2.extensions import quote_ident

import db
import pipeline
from ops import waits
from ops.problem import Problem
from ops.table import counted, is_terminal, plain
from pipeline import Route, State

JOBS = pipeline.JOBS.name
LOOK_EVERY = 0.2  # seconds
WIDTH = 30

# --- where the rows are --------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A job, or a row that belongs to it."""

    table: str
    key: str
    step: str | None = field(compare=False)
    status: str | None = field(compare=False)
    parent: str | None = None  # its parent's key

    @property
    def state(self) -> tuple[str | None, str | None]:
        return self.step, self.status


ROWS = """
SELECT {id}::text AS key, current_step::text AS step, status::text AS status
FROM {table} WHERE {column} = %(key)s ORDER BY 1
"""


def rows_of(conn, job_id: str) -> list[Row]:
    """The job and all rows that belong to it, parents first; none where there is no such job."""
    found: list[Row] = []
    for table in pipeline.tables().values():
        if table.name == JOBS:
            found += select(conn, table, table.id, job_id, None)
        elif table.parent:
            parents = [row for row in found if row.table == pipeline.parent_name(table)]
            for parent in parents:
                found += select(conn, table, table.parent[1], parent.key, parent.key)
    return found


def select(conn, table: pipeline.Table, column: str, key: str, parent: str | None) -> list[Row]:
    names = {"table": table.name, "id": table.id, "column": column}
    sql = ROWS.format(**{name: quote_ident(value, conn) for name, value in names.items()})
    return [
        Row(table.name, row.key, row.step, row.status, parent)
        for row in db.execute(conn, sql, {"key": key})
    ]


# The first and the last attempt of every stage so far. Rows of two tables may have the same id.
HOPS = """
SELECT table_name, job_id::text AS key, stage, count(*) AS attempts,
       extract(epoch FROM min(started_at))::float8 AS called,
       extract(epoch FROM max(finished_at))::float8 AS finished,
       bool_or(outcome = 'succeeded') AS accepted
FROM stage_attempts WHERE job_id IN %(keys)s AND (table_name, job_id) IN %(rows)s
GROUP BY table_name, job_id, stage ORDER BY called
"""

OWED = """
SELECT table_name, job_id::text AS key, stage, due_at = 'infinity' AS given_up, last_error
FROM stage_calls WHERE job_id IN %(keys)s AND (table_name, job_id) IN %(rows)s
"""

# Leases: a call may still be under way after its stage has set the row running or done.
CALLING = """
SELECT table_name, job_id::text AS key, stage
FROM stage_leases WHERE job_id IN %(keys)s AND (table_name, job_id) IN %(rows)s
  AND leased_until > now() AND NOT unanswered
"""

NOW = "SELECT extract(epoch FROM clock_timestamp())::float8"


class Look:
    """A snapshot of the job and its rows: hops, calls owed and under way, by (row, stage)."""

    def __init__(self, conn, job_id: str):
        [[self.now]] = db.execute(conn, NOW).fetchall()
        self.rows = rows_of(conn, job_id)
        given = named(self.rows) if self.rows else None
        by_row = {(row.table, row.key): row for row in self.rows}

        def ask(sql: str) -> list[tuple[Row, Any]]:
            found = db.execute(conn, sql, given) if given else []
            return [(by_row[one.table_name, one.key], one) for one in found]

        # Leases are read before attempts: an attempt is recorded in the transaction that ends its
        # lease, so in the other order it could be missing in both.
        self.calling = {(row, call.stage) for row, call in ask(CALLING)}
        self.hops = {(row, hop.stage): hop for row, hop in ask(HOPS)}
        self.owed = {(row, call.stage): call for row, call in ask(OWED)}

    @cached_property
    def ahead(self) -> list[tuple[Row, str]]:
        """The stages that the rows have not passed yet, judged by their states."""
        found, ends = [], {}
        for row in self.rows:
            names, ends[row] = chain(row.table, row.state)
            found += [(row, name) for name in names]
        order = list(pipeline.tables())
        joins = sorted(pipeline.joins().values(), key=lambda key: -order.index(key.table.name))
        for key in joins:
            table = pipeline.owner(key).name
            stage = pipeline.pipeline()[key].__name__
            after, end = chain(table, (stage, "done"))
            for parent in [row for row in self.rows if row.table == table]:
                states = {ends[child] for child in self.children(parent, key.table.name)}
                if states == {(key.step, key.status)} and parent.step not in (stage, *after):
                    found += [(parent, name) for name in (stage, *after)]
                    ends[parent] = end
        return found

    def children(self, parent: Row, table: str) -> list[Row]:
        return [row for row in self.rows if (row.table, row.parent) == (table, parent.key)]


def named(rows: list[Row]) -> dict[str, tuple]:
    """`rows` as parameters."""
    return {"keys": tuple(row.key for row in rows), "rows": tuple((r.table, r.key) for r in rows)}


def stages_of(table: str) -> set[str]:
    return {function.__name__ for route, function in pipeline.routes().items()
            if route.table == table}  # fmt: skip


def chain(table: str, state: tuple) -> tuple[list[str], tuple]:
    """The stages that a row goes through by itself from `state`, and the state it ends in."""
    names: list[str] = []
    while True:
        function = pipeline.routes().get(Route(table, "", *state))
        name = function.__name__ if function else None
        if state[1] == "running" and state[0] in stages_of(table):
            name = state[0]
        if name is None or name in names:
            return names, state
        names.append(name)
        state = (name, "done")


def is_end(row: Row) -> bool:
    """Whether the row may have reached its end. Some stages end with another status than `done`."""
    if row.step not in stages_of(row.table) or row.status == "failed":
        return False
    return row.status == "done" or (row.table, row.step, "done") not in wanted()


def wanted() -> set[tuple]:
    """The states that a stage or a join waits for, as (table, step, status)."""
    return {
        (key.table.name, key.step, key.status) if isinstance(key, State) else (JOBS, *key)
        for key in pipeline.pipeline()
    }


# --- following them ------------------------------------------------------------------------


class Follower:
    """Prints every hop as it ends."""

    def __init__(self, conn, job_id: str, limits: dict[str, float], stays: bool):
        self.conn, self.job_id, self.limits, self.stays = conn, job_id, limits, stays
        self.first: dict[Row, tuple] = {}  # the state in which each row was first seen
        # When it was through with its last stage, or first seen in a state that has one.
        self.through: dict[Row, float] = {}
        self.printed: set[tuple[Row, str]] = set()
        self.width = max(15, *map(len, pipeline.stage_names()))

    def follow(self) -> str:
        """Follow the job until it has passed every stage; returns the closing line.

        Raises:
            Problem: it stalls.
        """
        look, bar = Look(self.conn, self.job_id), Bar()
        began = self.since = look.now
        while look.rows:
            bar.clear()
            self.show(look)
            if found := self.stalls(look):
                row, stage, why = found
                what = "job" if row.table == JOBS else row.table
                look_at = f"look with {pipeline.typed('job', row.table, row.key)}"
                if not self.stays:
                    look_at = "to look at it, run test-job without --clean"
                raise Problem(f"{what} {row.key} stalls at {stage}: {why}; {look_at}")
            if not (look.ahead or look.owed or look.calling or self.lost(look)):
                stages = len({stage for _, stage in self.printed})
                rows = f" with {len(self.first)} rows" if len(self.first) > 1 else ""
                return f"passed: {counted(stages, 'stage')}{rows} in {self.since - began:.1f} s"
            stage = look.ahead[0][1] if look.ahead else ""
            bar.show(len(self.printed), len(look.ahead), f"{stage} {look.now - self.since:.0f} s")
            time.sleep(LOOK_EVERY)
            look = Look(self.conn, self.job_id)
        bar.clear()
        raise Problem(f"job {self.job_id} stalls: it was deleted")

    def show(self, look: Look) -> None:
        """Print the rows and the hops that are new."""
        for row in look.rows:
            if row not in self.through and (row.table, *row.state) in wanted():
                self.through[row] = look.now
            if row not in self.first:
                self.first[row] = row.state
                if row.table != JOBS:
                    click.echo(plain(f"  with {row.table} {row.key}: ({row.step}, {row.status})"))
        for (row, stage), hop in look.hops.items():
            # The state of the row decides: some stages answer before they commit, others after.
            if (row, stage) in self.printed | look.calling | set(look.ahead):
                continue
            waited = max(0.0, hop.called - self.due_since(look, row, stage))
            self.since = self.through[row] = hop.finished
            self.printed.add((row, stage))
            tries = f", {hop.attempts} attempts" if hop.attempts > 1 else ""
            tries += "" if hop.accepted else ", none accepted"
            of = "" if row.table == JOBS else f"  {short(row.key)}"
            click.echo(plain(f"  {stage:{self.width}} waited {waited:6.2f} s, "
                             f"took {hop.finished - hop.called:6.2f} s{tries}{of}"))  # fmt: skip

    def due_since(self, look: Look, row: Row, stage: str) -> float:
        """When the call became due: when its row was through with the stage before, or, for a join,
        the last of its children. One that was never seen before its call did not wait.
        """
        rows = [row]
        for route, function in pipeline.routes().items():
            if route.join and (route.table, function.__name__) == (row.table, stage):
                child = pipeline.joins()[route.join].table.name
                rows += look.children(row, child)
        return max((self.through[one] for one in rows if one in self.through), default=look.now)

    def lost(self, look: Look) -> list[Row]:
        """The rows in a state that PIPELINE does not lead to."""
        return [
            row for row in look.rows
            if row.state != self.first[row] and not chain(row.table, row.state)[0]
            and not is_end(row)
        ]  # fmt: skip

    def stalls(self, look: Look) -> tuple[Row, str, str] | None:
        """The row and stage that get no further, and why, as far as one can tell."""
        working = {row for row, _ in look.calling}
        for (row, stage), call in look.owed.items():
            # Print all hops before this stall. A stage may move its row before it answers, so the
            # hop to here is printed only when no call of the row is under way.
            next_stage = next((name for one, name in look.ahead if one == row), stage)
            if call.given_up and row not in working and stage == next_stage:
                return row, stage, f"given up: {plain(call.last_error)}"
        lost = self.lost(look)
        for row in lost:
            if row.status == "failed" and row.step in stages_of(row.table):
                return row, row.step, "the stage set it to failed"
        waited = look.now - self.since
        if look.ahead:
            row, stage = look.ahead[0]
            is_late = waited > self.limits[stage]
            return (row, stage, self.why_late(look, row, stage)) if is_late else None
        if lost and waited > max(self.limits.values()):
            at = f"({lost[0].step}, {lost[0].status})"
            return lost[0], at, "no stage of PIPELINE leads to that state"
        return None

    def why_late(self, look: Look, row: Row, stage: str) -> str:
        for hold in waits.held_of(self.conn, {stage}):
            return f"{hold.why}; {hold.mend}"
        if row.state == (stage, "running") or (row, stage) in look.calling:
            return "it is still running"
        call = look.owed.get((row, stage))
        if call and call.last_error:
            return plain(call.last_error)
        hop = look.hops.get((row, stage))
        if hop is None:
            return "it was not called"
        return "accepted, but the job has not changed" if hop.accepted else "no call was accepted"


def short(key: str) -> str:
    """An id that a line has room for."""
    return key if len(key) <= 12 else f"{key[:8]}…"


class Bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self):
        self.terminal = is_terminal()

    def show(self, done: int, ahead: int, text: str) -> None:
        filled = WIDTH * done // max(1, done + ahead)
        bar = "#" * filled + "-" * (WIDTH - filled)
        self.write(f"\r\033[K[{bar}] {done}/{done + ahead} {text}")

    def clear(self) -> None:
        self.write("\r\033[K")

    def write(self, text: str) -> None:
        if self.terminal:
            click.echo(text, nl=False)
