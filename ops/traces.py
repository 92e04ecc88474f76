"""`traces`: finished attempts as spans for a collector, in the JSON of OpenTelemetry (OTLP)."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click

import db
import ops
import pipeline
import tracing
from ops import rows
from ops.since import Since, Time
from ops.table import readable
from ops.text import OutFile
from ops.whole import write_whole

# Spans in one request. Collectors refuse requests larger than a few megabytes.
MOST = 1000
SPAN_KIND_CLIENT, STATUS_CODE_ERROR = 3, 2
JSON = json.JSONEncoder(separators=(",", ":"))
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# Attempts for which a request was made, or tried, a page at a time, as there may be millions. An
# attempt that was recorded as lost and later got a result, or whose stage accepted it and then set
# the row to failed, is exported once. (OFFSET 0 keeps the planner from reading the whole history
# for that.)
ATTEMPTS = """
WITH page AS (
    SELECT a.* FROM stage_attempts AS a
    WHERE a.finished_at >= %(since)s AND a.finished_at < %(until)s
      AND (a.finished_at, a.call_id, a.attempt, a.outcome)
          > (%(since)s::timestamptz, %(call_id)s::bigint, %(attempt)s::integer, %(outcome)s::text)
      AND a.outcome NOT IN ('skipped', 'cancelled')
      AND NOT (a.outcome IN ('lost', 'failed') AND EXISTS (
          SELECT FROM stage_attempts AS b
          WHERE b.job_id = a.job_id AND b.call_id = a.call_id AND b.attempt = a.attempt
            AND b.outcome NOT IN ('lost', 'cancelled', a.outcome) OFFSET 0))
    ORDER BY a.finished_at, a.call_id, a.attempt, a.outcome
    LIMIT %(most)s
)
SELECT page.job_id::text AS key, page.table_name, page.call_id, page.attempt, page.stage,
       page.worker, page.started_at, page.finished_at, page.http_status, page.outcome, page.error,
       at.parent_id::text AS parent_key, at.tenant_id
FROM page LEFT JOIN LATERAL stage_call_row(page.table_name, '', page.job_id) AS at ON true
ORDER BY page.finished_at, page.call_id, page.attempt, page.outcome
"""


def pages(conn, since: datetime, until: datetime | None = None) -> Iterator[list]:
    """The attempts that finished at `since` or later, and before `until`, MOST at a time."""
    after: dict[str, Any] = {"since": since, "call_id": -1, "attempt": -1, "outcome": ""}
    given = {"until": until or "infinity", "most": MOST}
    while True:
        page = db.execute(conn, ATTEMPTS, after | given).fetchall()
        yield page
        if len(page) < MOST:
            return
        last = page[-1]
        after = {"since": last.finished_at, "call_id": last.call_id, "attempt": last.attempt,
                 "outcome": last.outcome}  # fmt: skip


# --- as OTLP -------------------------------------------------------------------------------


def request(conn, attempts: Iterable[Any]) -> dict[str, Any]:
    """An ExportTraceServiceRequest; each listener is a resource."""

    def ask(sql: str, params: dict[str, Any]) -> list:
        return db.execute(conn, sql, params).fetchall()

    spans: dict[str, list] = defaultdict(list)
    for row in attempts:
        trace = pipeline.trace_of(row.table_name, row.key, row.parent_key, ask)
        if trace.flags & tracing.SAMPLED:
            spans[row.worker].append(span(row, trace))
    scope = {"name": "job-state-listener", "version": ops.VERSION}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes(resource(listener))},
                "scopeSpans": [{"scope": scope, "spans": found}],
            }
            for listener, found in spans.items()
        ]
    }


def resource(listener: str) -> dict[str, Any]:
    return {"service.name": "job-state-listener", "service.instance.id": listener}


def span(row: Any, trace: tracing.Trace) -> dict[str, Any]:
    """An attempt as the client's span of its request."""
    is_good = row.outcome == "succeeded"
    found = {
        "traceId": trace.trace_id,
        "spanId": tracing.span_id(row.key, row.call_id, row.attempt),
        "parentSpanId": trace.parent_id or "",
        "name": row.stage,
        "kind": SPAN_KIND_CLIENT,
        "startTimeUnixNano": nanoseconds(row.started_at),
        "endTimeUnixNano": nanoseconds(max(row.started_at, row.finished_at)),
        "attributes": attributes(said_of(row, is_good)),
    }
    if not is_good:
        message = readable(row.error) or row.outcome
        found["status"] = {"code": STATUS_CODE_ERROR, "message": message}
    return found


def said_of(row: Any, is_good: bool) -> dict[str, Any]:
    """The attributes of a span: those of OpenTelemetry's conventions for HTTP, and our own."""
    return {
        "http.request.method": "POST",
        "http.request.resend_count": row.attempt - 1 or None,
        "http.response.status_code": row.http_status,
        "error.type": None if is_good else str(row.http_status or row.outcome),
        "job_state_listener.stage": row.stage,
        "job_state_listener.table": row.table_name,
        "job_state_listener.id": row.key,
        "job_state_listener.parent_id": row.parent_key,
        "job_state_listener.tenant_id": None if row.tenant_id is None else str(row.tenant_id),
        "job_state_listener.call_id": row.call_id,
        "job_state_listener.attempt": row.attempt,
        "job_state_listener.outcome": row.outcome,
    }


def attributes(said: dict[str, Any]) -> list[dict[str, Any]]:
    """Attributes in OTLP's form, without those that are None. 64-bit numbers are text in JSON."""
    return [
        {"key": name, "value": {"intValue": str(v)} if isinstance(v, int) else {"stringValue": v}}
        for name, v in said.items()
        if v is not None
    ]


def nanoseconds(time: datetime) -> str:
    return str((time - EPOCH) // timedelta(microseconds=1) * 1000)


# --- the command ---------------------------------------------------------------------------


@click.command(short_help="Print finished attempts as OpenTelemetry traces.")
@click.option("--since", type=Since(), default="1h", show_default=True,
              help="Those that finished since then: a span such as 30m, or a time.")  # fmt: skip
@click.option("--until", type=Time(), help="Those that finished before then; default: all.")
@click.option("--out", type=OutFile(), metavar="FILE",
              help="Replace FILE by them, whole or not at all.")  # fmt: skip
def traces(since: datetime, until: datetime | None, out: Path | None) -> None:
    """Print finished attempts as OpenTelemetry traces, in OTLP's JSON.

    Each line is one request for a collector, of 1,000 spans at most: POST it to /v1/traces.
    Trace and span are those of the `traceparent` that was sent.
    """
    if until is not None and until <= since:
        raise click.UsageError("--until is not later than --since")
    conn = rows.connected("traces")
    lines = (JSON.encode(request(conn, page)) + "\n" for page in pages(conn, since, until))
    if out:
        write_whole(out, "".join(lines))
    else:
        for line in lines:
            click.echo(line, nl=False)
