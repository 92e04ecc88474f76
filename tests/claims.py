"""A worker's side of calls.py, short enough to write tests in."""

from contextlib import contextmanager

import calls
import db
from calls import Settlement

STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]


@contextmanager
def connected(database, **settings):
    """A connection as a worker has it."""
    conn = db.connect(database.settings(**settings))
    try:
        yield conn
    finally:
        conn.close()


def claim(conn, worker: str = "w", **given):
    """The next due call of any stage."""
    return calls.claim(conn, **{"stages": STAGES, "worker": worker, "lease": 60} | given)


def result(row, outcome: str = "succeeded", worker: str = "w", **details) -> Settlement:
    """What came of the claimed `row`."""
    of_row = {name: getattr(row, name) for name in ("job_id", "call_id", "attempt", "stage")}
    return Settlement(
        **of_row, worker=worker, started_at=row.started_at, outcome=outcome, **details
    )


def held(row, worker: str = "w", **details) -> Settlement:
    """The stage of `row` could not be reached, or asked for patience."""
    given = {"delay": 0.0, "free": True, "hold": True, "error": "refused"} | details
    return result(row, "held", worker, **given)
