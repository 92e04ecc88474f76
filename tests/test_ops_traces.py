"""`traces`: what a collector reads of finished attempts, by the classes of OpenTelemetry itself."""

import base64
import itertools
import json
import os
import subprocess
import sys
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from commands import run_here
from conftest import ROOT
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from raw_server import OK, in_turn
from test_ops_mistakes import NOWHERE
from test_tracing import GIVEN, crops  # noqa: F401 (a fixture)

import db
from ops import traces

MOVED = b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n"
REFUSED = b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\nno memory"
SINCE = datetime(2026, 1, 1, tzinfo=timezone.utc)
SENDER = str(ROOT / "demo/monitoring/send_traces.py")
IDS = ("traceId", "spanId", "parentSpanId")


def parsed(text: str) -> ExportTraceServiceRequest:
    """A request in OTLP's JSON, whose ids are hexadecimal, which those of protobuf's are not."""

    def as_protobuf(value):
        if isinstance(value, list):
            return [as_protobuf(one) for one in value]
        if not isinstance(value, dict):
            return value
        return {
            name: base64.b64encode(bytes.fromhex(one)).decode() if name in IDS else as_protobuf(one)
            for name, one in value.items()
        }

    return ParseDict(as_protobuf(json.loads(text)), ExportTraceServiceRequest())


def spans_in(text: str) -> list[Span]:
    return [
        span
        for line in text.splitlines()
        for resource in parsed(line).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def exported(database, **given) -> list[Span]:
    """The spans of the whole history, read in this process."""
    with closing(db.connect(database.settings())) as conn:
        pages = traces.pages(conn, **({"since": SINCE} | given))
        return [span for page in pages for span in spans_in(json.dumps(traces.request(conn, page)))]


def said(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def ids(span: Span) -> str:
    return f"{span.trace_id.hex()}-{span.span_id.hex()}"


def add_attempts(database, count: int, outcome: str = "succeeded", call_id: int = 1) -> str:
    """Attempts of a job that all finished at the same time, and that job."""
    job = database.add_job("x", "y")
    database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
        " finished_at, outcome) SELECT %s, %s, n, 'planner', 'w', now() - interval '3 s', now(), %s"
        " FROM generate_series(1, %s) AS n",
        job, call_id, outcome, count,
    )  # fmt: skip
    return job


def test_spans_are_those_of_the_requests_that_were_sent(database, serve, caller, run_command):
    server, job = serve(in_turn(REFUSED, OK)), database.add_job()
    worker = caller(server.url)
    worker.call(), worker.call_again()
    text = run_command(database, "traces", "--since", "1h").out
    refused, accepted = spans_in(text)
    sent = [request.headers["traceparent"] for request in server.requests]
    assert [f"00-{ids(span)}-01" for span in (refused, accepted)] == sent
    for span, attempt in zip((refused, accepted), database.attempts(job), strict=True):
        assert (span.name, span.kind) == ("vlm_analyze", Span.SPAN_KIND_CLIENT)
        times = span.start_time_unix_nano, span.end_time_unix_nano
        assert [datetime.fromtimestamp(at / 1e9, timezone.utc) for at in times] == [
            attempt.started_at, attempt.finished_at,
        ]  # fmt: skip
    assert refused.status == Status(code=Status.STATUS_CODE_ERROR, message="HTTP 500: no memory")
    assert accepted.status == Status()
    assert said(refused)["error.type"] == "500"
    assert said(accepted) == {
        "http.request.method": "POST",
        "http.request.resend_count": 1,
        "http.response.status_code": 200,
        "job_state_listener.stage": "vlm_analyze",
        "job_state_listener.table": "jobs",
        "job_state_listener.id": job,
        "job_state_listener.tenant_id": "tenant",
        "job_state_listener.call_id": database.attempts(job)[0].call_id,
        "job_state_listener.attempt": 2,
        "job_state_listener.outcome": "succeeded",
    }
    [resource] = parsed(text).resource_spans
    names = [a.value.string_value for a in resource.resource.attributes]
    assert names == ["job-state-listener", "caller"]


def test_declared_trace_and_that_of_rows_below_are_exported_as_sent(
    crops,  # noqa: F811
    database,
    accepting,
    caller,
):
    crops(GIVEN), crops(None), crops(GIVEN[:-1] + "0")
    worker = caller(accepting.url)
    for _ in range(9):
        worker.call()
    sent = [request.headers["traceparent"] for request in accepting.requests]
    found = exported(database)
    assert sorted(f"00-{ids(span)}-01" for span in found) == sorted(s for s in sent if s[-1] == "1")
    assert len(found) == 6  # the application asked not to record the third
    parents = {span.parent_span_id.hex() for span in found if span.trace_id.hex() == GIVEN[3:35]}
    assert parents == {GIVEN[36:52]}


def test_attempts_without_a_request_are_left_out_and_a_lost_one_that_came_back_is_told_once(
    shared_database,
):
    database = shared_database.emptied()
    add_attempts(database, 1, "skipped"), add_attempts(database, 1, "cancelled")
    add_attempts(database, 2, "lost")
    database.rows("INSERT INTO stage_attempts SELECT job_id, call_id, attempt, stage, worker,"
                  " started_at, finished_at + interval '1 s', 200, 'succeeded' FROM stage_attempts"
                  " WHERE outcome = 'lost' AND attempt = 1")  # fmt: skip
    found = [(said(s)["job_state_listener.outcome"], s.status.message) for s in exported(database)]
    assert sorted(found) == [("lost", "lost"), ("succeeded", "")]


def test_attempt_after_which_its_stage_set_failed_is_told_once(shared_database):
    database = shared_database.emptied()
    add_attempts(database, 1, "succeeded")
    database.rows("INSERT INTO stage_attempts SELECT job_id, call_id, attempt, stage, worker,"
                  " started_at, finished_at + interval '1 s', NULL, 'failed' FROM stage_attempts"
                  )  # fmt: skip
    assert [said(s)["job_state_listener.outcome"] for s in exported(database)] == ["succeeded"]


def test_attempt_whose_call_was_cancelled_afterwards_is_told(shared_database):
    database = shared_database.emptied()
    add_attempts(database, 1, "failed")
    database.rows("INSERT INTO stage_attempts SELECT job_id, call_id, attempt, stage, worker,"
                  " now(), now(), NULL, 'cancelled' FROM stage_attempts")  # fmt: skip
    assert [said(s)["job_state_listener.outcome"] for s in exported(database)] == ["failed"]


def test_each_attempt_is_in_one_page_and_in_one_of_the_spans_of_time(shared_database, monkeypatch):
    monkeypatch.setattr(traces, "MOST", 2)
    database = shared_database.emptied()
    for call_id in (1, 2):
        add_attempts(database, 3, call_id=call_id)
    found = database.rows("SELECT DISTINCT finished_at FROM stage_attempts ORDER BY 1")
    first, second = (row.finished_at for row in found)
    assert len({ids(span) for span in exported(database)}) == len(exported(database)) == 6
    times = [SINCE, first, second, second + timedelta(seconds=1)]
    spans = [exported(database, since=a, until=b) for a, b in itertools.pairwise(times)]
    assert [len(found) for found in spans] == [0, 3, 3]
    assert exported(database, since=times[-1]) == []


def test_attempts_of_rows_and_tables_that_are_gone_are_exported(shared_database):
    database = shared_database.emptied()
    job = add_attempts(database, 1)
    database.rows("DELETE FROM jobs")
    database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
        " finished_at, outcome, table_name) SELECT job_id, 2, 1, E'\\x1b\"단계', worker,"
        " started_at, started_at - interval '1 h', 'succeeded', 'gone' FROM stage_attempts"
    )
    found = exported(database)
    assert {span.trace_id.hex() for span in found} == {job.replace("-", "")}
    assert {span.name for span in found} == {"planner", '\x1b"단계'}
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in found)


def test_sender_goes_on_where_the_collector_took_all(database, serve, tmp_path):
    job = add_attempts(database, 2)
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '2 min'")
    add_attempts(database, 1, call_id=2)  # is for the next run: others may be committed late
    collector = serve(in_turn(REFUSED, MOVED, OK))

    def send() -> tuple[int, str, list[int]]:
        """The exit code, what was said, and how many spans each request had."""
        before = len(collector.requests)
        done = subprocess.run(
            [sys.executable, SENDER, f"{collector.url}/v1/traces", str(tmp_path / "sent")],
            env=os.environ | database.environ, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        bodies = [request.body.decode() for request in collector.requests[before:]]
        return done.returncode, done.stderr, [len(spans_in(body)) for body in bodies]

    said = f"{collector.url}/v1/traces did not take the spans: HTTP"
    assert send() == (1, f"{said} 500\n", [2])
    assert send() == (1, f"{said} 302\n", [2])
    assert send() == (0, "", [2])
    assert datetime.fromisoformat((tmp_path / "sent").read_text()) < datetime.now(timezone.utc)
    assert collector.requests[1].headers["content-type"] == "application/json"
    assert job in collector.requests[1].body.decode()


def test_nothing_finished_is_an_empty_request_also_in_a_file(database, run_command, tmp_path):
    assert parsed(run_command(database, "traces").out) == ExportTraceServiceRequest()
    file = tmp_path / "traces.json"
    assert run_command(database, "traces", "--out", str(file)).lines == [""]
    assert parsed(file.read_text()) == ExportTraceServiceRequest()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--since 1h --until 2h",
            "--until is not later than --since. See: ",
        ),
        ("--since soon", "Invalid value for '--since': 'soon' is neither a span"),
    ],
)
def test_span_of_time_that_is_none_is_one_line(options, said):
    assert run_here(NOWHERE.environ, "traces", *options.split()).refused(2).startswith(said)
