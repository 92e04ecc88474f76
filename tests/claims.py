"""Short ways to call calls.py in tests as a listener does: one claim, one result."""

from collections.abc import Iterable
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

import calls
import db
from calls import Result, Turn, Wanted
from ops.chosen import Chosen
from ops.steer import RETRY

# Moves the end of all leases into the past.
LEASE_OVER = "".join(
    f"UPDATE {table} SET {column} = now() - interval '1 second'"
    f" WHERE {column} BETWEEN now() AND '9999-01-01';"
    for table, column in (("stage_calls", "due_at"), ("stage_leases", "leased_until"))
)
# The columns with times that the database writes.
TIMES = {
    "stage_calls": ["due_at", "started_at"],
    "stage_leases": ["leased_until", "started_at"],
    "stage_limits": ["next_at", "stays_since"],
    "pipeline_stages": ["held_until", "waiting_since", "refusing_since"],
    "stage_attempts": ["started_at", "finished_at"],
}
# A tenth of what a listener's connection waits, for tests that meet many locks.
SHORT_WAIT = "SET lock_timeout = '50ms'"
STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]


def let_pass(database, seconds: float) -> None:
    """Move all times into the past, as if so many seconds had passed; infinity stays."""
    for table, columns in TIMES.items():
        moved = ", ".join(f"{c} = {c} - make_interval(secs => {seconds})" for c in columns)
        database.rows(f"UPDATE {table} SET {moved}")


def set_clock_back(database, seconds: float) -> None:
    """Leave all times as a server's clock leaves them that was set back by so many seconds."""
    let_pass(database, -seconds)


@contextmanager
def connected(database, **settings):
    """A connection as a listener has it."""
    conn = db.connect(database.settings(**settings), pinned=True)
    try:
        yield conn
    finally:
        conn.close()


@contextmanager
def all_connected(database, count: int):
    """Connections for as many threads, made before any runs: connecting changes psycopg2's wait
    callback, which all threads of a process share.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(connected(database)) for _ in range(count)]


def wanted(stages: Iterable[str] = STAGES, lease: float = 60, most: int = 1, **given) -> list:
    """A Wanted for each stage, for up to `most` calls; `limited`: the stages that have limits."""
    limited, share = given.pop("limited", set(stages)), given.pop("share", most)
    return [Wanted(stage, lease, most, share, stage in limited, **given) for stage in stages]


@pytest.fixture
def conn(database):
    """A listener's connection."""
    with connected(database) as conn:
        yield conn


@pytest.fixture
def other(database):
    """A second listener's connection."""
    with connected(database) as conn:
        yield conn


@pytest.fixture
def stage(database):
    """The stage's own connection, on which nothing is committed unless the test commits it."""
    with closing(database.connect()) as conn:
        conn.autocommit = False
        yield conn


CALL_OF = "SELECT call_id, attempts FROM stage_calls WHERE job_id = %(job_id)s AND join_of = ''"


def claim_many(
    conn, free: int, worker: str = "w", stages=STAGES, results=(), lease: float = 60,
    sweep: bool = False, only: Any = None, extend_by: float = 0.0, **given,
) -> Turn:  # fmt: skip
    """Settle `results` and claim up to `free` calls."""
    found = wanted(stages, lease, free, **given)
    if only is not None:  # the call of a job
        row = db.execute(conn, CALL_OF, {"job_id": only}).fetchone()
        only = (only, *(row or (-1, 0)))
    return calls.run_turn(
        conn, results, found, free, worker, sweep=sweep, only=only, extend_by=extend_by
    )


def claim(conn, worker: str = "w", stages=STAGES, settled: Result | None = None, **given):
    """The next due call of any stage; its call_id is None where there is none."""
    turn = claim_many(conn, 1, worker, stages, [settled] if settled else [], **given)
    if turn.claimed:
        return turn.claimed[0]
    due = calls.next_due(conn, stages)
    return SimpleNamespace(call_id=None, locked=turn.locked, next_due=due)


def settle(conn, *results: Result) -> bool:
    """Settle results; False where the stage's own transaction holds the row of one of them."""
    return not calls.run_turn(conn, results, [], 0, "w").locked


def make_due(conn, job: str | None = None) -> list:
    """Make given-up calls (of a job) due again, as `retry` does; a row for each."""
    return db.execute(conn, RETRY, Chosen(job_id=job).params).fetchall()


def result(row, outcome: str = "succeeded", worker: str = "w", **details) -> Result:
    """What came of the claimed `row`."""
    details = {"limited": True} | details
    return Result(
        job_id=row.key,
        call_id=row.call_id,
        attempt=row.attempt,
        stage=row.stage,
        worker=worker,
        started_at=row.started_at,
        after_hold=row.after_hold,
        outcome=outcome,
        **details,
    )


def held(row, worker: str = "w", **details) -> Result:
    """The result of a claimed `row` whose stage was unreachable, so that the stage is held."""
    given = {"delay": 0.0, "free": True, "hold": True, "error": "refused"} | details
    return result(row, "held", worker, **given)
