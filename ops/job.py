"""`job`: where one job is, what it owes, and every attempt so far."""

import click

import config
import db
from ops.problem import Problem
from ops.table import JSON, clock, duration, echo_json, echo_lines, plain, table

JOB = """
SELECT j.current_step::text, j.status::text, j.tenant_id
FROM jobs AS j WHERE j.job_id = %(job_id)s
"""

OPEN = """
SELECT call_id, stage, attempts, attempts - free_attempts AS spent, worker, started_at, due_at,
       due_at = 'infinity' AS given_up, last_error,
       CASE WHEN due_at < 'infinity'
            THEN round(extract(epoch FROM due_at - now()))::bigint END AS due_in_seconds
FROM stage_calls WHERE job_id = %(job_id)s
"""

# A stage that has set its job running is still being called, though nothing is owed any more.
CALLING = """
SELECT stage, call_id, attempt, worker, started_at, leased_until
FROM stage_leases WHERE job_id = %(job_id)s AND leased_until > now()
"""

ATTEMPTS = """
SELECT started_at, stage, call_id, attempt, outcome, http_status, worker,
       extract(epoch FROM finished_at - started_at)::float8 AS seconds, error
FROM stage_attempts WHERE job_id = %(job_id)s
ORDER BY started_at, attempt, finished_at
"""


@click.command()
@click.argument("job_id")
@JSON
def job(job_id: str, as_json: bool) -> None:
    """Where JOB_ID is, what it owes, and every attempt so far."""
    conn = db.connect(config.settings(), "job-state-listener job")
    given = {"job_id": job_id}
    found, owed, calling = (db.execute(conn, sql, given).fetchone() for sql in (JOB, OPEN, CALLING))
    attempts = db.execute(conn, ATTEMPTS, given).fetchall()
    if not (found or owed or attempts or calling):
        raise Problem(f"there is no job {job_id}")
    if as_json:
        rows = {"job": found, "owes": owed, "calling": calling}
        whole = {name: row and row._asdict() for name, row in rows.items()}
        echo_json({"job_id": job_id, **whole, "attempts": [row._asdict() for row in attempts]})
        return
    where = "was deleted"
    if found:
        where = f"is at ({found.current_step}, {found.status}), tenant {found.tenant_id}"
    lines = [plain(f"job {job_id} {where}"), f"owes: {owes(owed)}"]
    if calling and not owed:
        lines.append(f"called: {calling.stage} (call {calling.call_id}), {on_it(calling)}")
    if attempts:
        rows = [
            [f"{a.started_at.astimezone():%F %T}", a.stage, a.attempt, a.outcome,
             a.http_status or "-", f"{a.seconds:.2f}", a.error or ""]
            for a in attempts
        ]  # fmt: skip
        header = ["started", "stage", "attempt", "outcome", "HTTP", "seconds", "error"]
        lines += table(header, rows, right=["HTTP", "seconds"]).split("\n")
    echo_lines((line, 0) for line in lines)


def owes(call) -> str:
    if call is None:
        return "nothing"
    text = f"{call.stage} (call {call.call_id}, {call.spent} attempts spent), {situation(call)}"
    return f"{text}; python listener.py retry JOB_ID" if call.given_up else text


def situation(call) -> str:
    """What becomes of a call that is owed."""
    if call.given_up:
        return f"given up: {plain(call.last_error)}"
    if call.worker and call.due_in_seconds > 0:
        return on_it(call)
    when = f"due in {duration(call.due_in_seconds)}" if call.due_in_seconds > 0 else "due now"
    return f"{when}; last error: {plain(call.last_error)}" if call.last_error else when


def on_it(call) -> str:
    return f"{call.worker} is on it since {clock(call.started_at)}"
