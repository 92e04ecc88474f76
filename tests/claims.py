"""A worker's side of calls.py, short enough to write tests in."""

from contextlib import contextmanager

from settling import Settlement

import calls
import db

# As if every worker that has a call had been away for longer than its lease.
LEASE_OVER = "".join(
    f"UPDATE {table} SET {column} = now() - interval '1 second'"
    f" WHERE {column} BETWEEN now() AND '9999-01-01';"
    for table, column in (
        ("stage_calls", "due_at"),
        ("stage_leases", "leased_until"),
        ("stage_slots", "leased_until"),
    )
)
STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]


@contextmanager
def connected(database, **settings):
    """A connection as a worker has it."""
    conn = db.connect(database.settings(**settings), pinned=True)
    try:
        yield conn
    finally:
        conn.close()


def claim(conn, worker: str = "w", stages=STAGES, lease: float = 60, **given):
    """The next due call of any stage."""
    return calls.claim(conn, leases=dict.fromkeys(stages, lease), worker=worker, **given)


def result(row, outcome: str = "succeeded", worker: str = "w", **details) -> Settlement:
    """What came of the claimed `row`."""
    same = ("job_id", "call_id", "attempt", "stage", "limited")
    of_row = {name: getattr(row, name) for name in same}
    return Settlement(
        **of_row, worker=worker, started_at=row.started_at, outcome=outcome, **details
    )


def held(row, worker: str = "w", **details) -> Settlement:
    """The stage of `row` could not be reached, or asked for patience."""
    given = {"delay": 0.0, "free": True, "hold": True, "error": "refused"} | details
    return result(row, "held", worker, **given)
