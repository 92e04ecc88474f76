"""`status` and `job`: where everything stands."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import click

import config
import db
import stages
from heartbeat import Beat, heartbeats
from logs import CONTROL, IN_JSON
from ops.problem import Problem

STAGES = """
SELECT p.stage, c.owed, c.calling, c.retrying, c.given_up, p.held_until, p.held_reason,
       round(extract(epoch FROM now() - c.oldest_due))::bigint AS oldest_due_seconds
FROM (SELECT stage, min(position) AS position,
             max(held_until) FILTER (WHERE held_until > now()) AS held_until,
             max(held_reason) FILTER (WHERE held_until > now()) AS held_reason
      FROM (SELECT stage, held_until, held_reason,
                   array_position(%(stages)s::text[], stage) AS position
            FROM pipeline_stages
            UNION ALL  -- a stage that lost its route shows what it still owes
            SELECT DISTINCT stage, NULL::timestamptz, NULL, 1000 FROM stage_calls
            WHERE stage <> ALL (%(stages)s::text[])) AS edge
      GROUP BY stage) AS p
CROSS JOIN LATERAL (
    SELECT count(*) AS owed,
           count(*) FILTER (WHERE worker IS NOT NULL) AS calling,
           count(*) FILTER (WHERE worker IS NULL AND attempts > 0
                              AND due_at < 'infinity') AS retrying,
           count(*) FILTER (WHERE due_at = 'infinity') AS given_up,
           min(due_at) FILTER (WHERE due_at <= now()) AS oldest_due
    FROM stage_calls WHERE stage_calls.stage = p.stage) AS c
ORDER BY p.position
"""

WORKERS = """
SELECT a.worker, a.connected, c.job_id, c.stage, c.started_at
FROM (SELECT substr(application_name, length(%(prefix)s) + 1) AS worker,
             backend_start AS connected
      FROM pg_stat_activity
      WHERE datname = current_database() AND starts_with(application_name, %(prefix)s)) AS a
LEFT JOIN stage_calls AS c ON c.worker IS NOT NULL AND starts_with(c.worker, a.worker)
ORDER BY a.worker
"""


JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")


@click.command()
@JSON
def status(as_json: bool) -> None:
    """What every stage owes, and what the workers are doing."""
    conn = db.connect(config.settings(), "job-state-listener status")
    given = {"stages": stages.stage_names(), "prefix": db.WORKER_APPLICATION}
    found = [row._asdict() for row in db.execute(conn, STAGES, given)]
    workers = [row._asdict() for row in db.execute(conn, WORKERS, given)]
    beats = []
    with contextlib.suppress(OSError):  # they may be another user's
        beats = heartbeats(config.settings().HEARTBEAT_DIR)
    for row in workers:
        row["doing"] = doing(row, beats)
    if as_json:
        echo_json({"stages": found, "workers": workers})
        return
    click.echo(
        table(
            ["stage", "owed", "calling", "retrying", "given up", "oldest due"],
            [
                [row["stage"], row["owed"], row["calling"], row["retrying"], row["given_up"],
                 duration(row["oldest_due_seconds"])]
                for row in found
            ],
        )
    )  # fmt: skip
    for row in found:
        if row["held_until"]:
            reason = plain(row["held_reason"])
            click.echo(f"held: {row['stage']} until {row['held_until']:%T}: {reason}")
    for row in workers:
        click.echo(plain(f"worker {row['worker']}: {row['doing']}"))
    if not workers:
        click.echo("no worker is connected: start python listener.py")
    if any(row["given_up"] for row in found):
        click.echo("given up: look with python listener.py job JOB_ID, then retry JOB_ID")


def doing(row: dict, beats: Sequence[Beat]) -> str:
    """What a worker is doing. A stage that has moved its job on owes no call any more, so the
    database alone does not know; on this host the worker's heartbeat does.
    """
    if beat := next((beat for beat in beats if beat.worker.startswith(row["worker"])), None):
        return beat.doing
    return f"calling {row['stage']} for job {row['job_id']}" if row["stage"] else "connected"


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
    found, owed = (db.execute(conn, sql, given).fetchone() for sql in (JOB, OPEN))
    attempts = db.execute(conn, ATTEMPTS, given).fetchall()
    if not (found or owed or attempts):
        raise Problem(f"there is no job {job_id}")
    if as_json:
        rows = {"job": found, "owes": owed}
        whole = {name: row and row._asdict() for name, row in rows.items()}
        echo_json({"job_id": job_id, **whole, "attempts": [row._asdict() for row in attempts]})
        return
    where = "was deleted"
    if found:
        where = f"is at ({found.current_step}, {found.status}), tenant {found.tenant_id}"
    click.echo(plain(f"job {job_id} {where}"))
    click.echo(f"owes: {owes(owed)}")
    if attempts:
        rows = [
            [f"{a.started_at:%F %T}", a.stage, a.attempt, a.outcome, a.http_status or "-",
             f"{a.seconds:.2f}", a.error or ""]
            for a in attempts
        ]  # fmt: skip
        header = ["started", "stage", "attempt", "outcome", "HTTP", "seconds", "error"]
        click.echo(table(header, rows))


def owes(call) -> str:
    if call is None:
        return "nothing"
    text = f"{call.stage} (call {call.call_id}, {call.spent} attempts spent)"
    if call.given_up:
        return f"{text}, given up: {plain(call.last_error)}; python listener.py retry JOB_ID"
    if call.worker and call.due_in_seconds > 0:
        return f"{text}, {call.worker} is on it since {call.started_at:%T}"
    when = f"due in {duration(call.due_in_seconds)}" if call.due_in_seconds > 0 else "due now"
    text = f"{text}, {when}"
    return f"{text}; last error: {plain(call.last_error)}" if call.last_error else text


def duration(seconds: int | None) -> str:
    """A span as a person reads it: 12 s, 3 min, 5 h, 2 d."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def table(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need; numbers to the right. Control characters are escaped."""
    cells = [[plain(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """Data on one line, and not longer than a screen can hold."""
    return str(value).translate(CONTROL)[:200]


def echo_json(value: Any) -> None:
    text = json.dumps(value, default=str, ensure_ascii=False, indent=2)
    click.echo(text.translate(IN_JSON))
