"""The outcome table, row by row: what an attempt is worth, and when the call is due again."""

from datetime import timedelta

import pytest
from raw_server import answering, in_turn

RETRY_DELAY = timedelta(seconds=5)


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def reply(status: int, *headers: str, body: str = "words of the stage") -> bytes:
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", body]).encode()


def hold_of(database, stage: str = "vlm_analyze"):
    return database.row(
        "SELECT hold_seconds, held_reason, extract(epoch FROM held_until - now()) AS left"
        " FROM pipeline_stages WHERE stage = %s",
        stage,
    )


def each(serve, statuses: list[int], *headers: str, body: str = "words of the stage"):
    """A server that answers its n-th request with the n-th status."""
    return serve(in_turn(*(reply(status, *headers, body=body) for status in statuses)))


def call_only(database, worker, job: str):
    """Call this job, whatever else is due."""
    database.rows("DELETE FROM stage_calls WHERE job_id <> %s", job)
    return worker.call()


def test_2xx_pays_the_debt(database, serve, caller):
    statuses = [200, 201, 202, 203, 206, 299]
    worker = caller(each(serve, statuses).url)
    for status in statuses:
        job = database.add_job()
        attempt = worker.call()
        assert (attempt.outcome, attempt.http_status, attempt.error) == ("succeeded", status, None)
        assert (attempt.attempt, attempt.stage, attempt.worker) == (1, "vlm_analyze", "caller")
        assert database.owed(job) is None


def test_204_pays_the_debt(database, serve, caller):
    job = database.add_job()
    caller(serve(answering(b"HTTP/1.1 204 No Content\r\n\r\n")).url).call()
    assert database.owed(job) is None


def test_refusal_for_now_is_retried_after_a_back_off(database, serve, caller):
    statuses = [408, 425, 500, 501, 505, 507, 529]
    server = each(serve, statuses)
    for number, status in enumerate(statuses):
        job = database.add_job()
        worker = caller(server.url, f"caller {number}")  # one alone knows of no other
        attempt = call_only(database, worker, job)
        owed = database.owed(job)
        assert (attempt.outcome, attempt.http_status) == ("retry", status)
        assert attempt.error == owed.last_error == f"HTTP {status}: words of the stage"
        assert timedelta(0) <= owed.due_at - attempt.finished_at <= RETRY_DELAY
        assert (owed.attempts, owed.free_attempts, owed.worker) == (1, 0, None)
    assert hold_of(database).hold_seconds is None


def test_other_refusal_is_given_up_at_once(database, serve, caller):
    statuses = [300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 410, 413, 422, 451]
    server = each(serve, statuses, "Location: /elsewhere", "Retry-After: 1", body="")
    for number, status in enumerate(statuses):
        job = database.add_job()
        attempt = caller(server.url, f"caller {number}").call()  # one alone knows of no other
        owed = database.owed(job)
        assert (attempt.outcome, attempt.http_status) == ("failed", status)
        assert owed.given_up and owed.worker is None
        assert owed.last_error == f"HTTP {status}"
    assert len(server.requests) == len(statuses)


@pytest.mark.parametrize("status", [429, 503, 521, 523, 525, 526, 530])
def test_throttling_holds_the_stage_and_costs_no_attempt(database, serve, caller, status):
    job = database.add_job()
    attempt = caller(serve(in_turn(reply(status))).url).call()
    owed = database.owed(job)
    assert (attempt.outcome, attempt.http_status) == ("held", status)
    assert (owed.attempts, owed.free_attempts) == (1, 1)
    assert owed.due_at - attempt.finished_at == timedelta(seconds=hold_of(database).hold_seconds)
    assert hold_of(database).hold_seconds == 1
    assert hold_of(database).held_reason == f"HTTP {status}: words of the stage"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("retry_after", "seconds"), [("7", 7), ("999999999", 3600), ("0", 1), ("soon", 1)]
)
def test_throttling_says_for_how_long(database, serve, caller, status, retry_after, seconds):
    database.add_job()
    caller(serve(in_turn(reply(status, f"Retry-After: {retry_after}"))).url).call()
    hold = hold_of(database)
    assert hold.hold_seconds == seconds
    assert seconds - 60 < hold.left <= seconds


def not_tls(connection) -> None:
    connection.sock.recv(1)
    connection.send(reply(400))


@pytest.mark.parametrize(
    "url",
    [
        lambda serve: "http://127.0.0.1:9",
        lambda serve: "http://stage-api.invalid",
        lambda serve: serve(not_tls).url.replace("http:", "https:"),
    ],
    ids=["refused", "DNS", "TLS"],
)
def test_unreachable_stage_is_held_and_costs_no_attempt(database, serve, caller, url):
    job = database.add_job()
    attempt = caller(url(serve)).call()
    owed = database.owed(job)
    assert (attempt.outcome, attempt.http_status) == ("held", None)
    assert attempt.error.startswith("stage API unreachable: ")
    assert (owed.attempts, owed.free_attempts, owed.given_up) == (1, 1, False)
    assert hold_of(database).hold_seconds == 1


def reset(connection) -> None:
    connection.receive()
    connection.reset()


def silent(connection) -> None:
    connection.receive()
    connection.closing.wait(30)


ENVOY = "upstream connect error or disconnect/reset before headers. "
PASSED_ON = [
    ENVOY + "reset reason: connection termination",
    ENVOY + "reset reason: remote reset",
    ENVOY + "retried and the latest reset reason: connection failure",
    "<html>\n<title>503 Backend fetch failed</title>",
    "<html><head><title>Timeout</title></head><body><h1>Timeout</h1></body></html>",
    '<iframe src="//www.herokucdn.com/error-pages/application-error.html"></iframe>',
]
NOT_PASSED_ON = [
    ENVOY + "reset reason: connection failure",
    ENVOY + "reset reason: remote connection failure, transport failure reason: refused",
    ENVOY + "reset reason: connection timeout",
    ENVOY + "reset reason: overflow",
    "no healthy upstream",
    "Service Unavailable",
]
MAY_RUN = (409, 460, 499, 502, 504, 520, 522, 524, 598, 599)
UNKNOWN = {
    "timeout": silent,
    "cut headers": answering(b"HTTP/1.1 200 OK\r\nContent-"),
    "cut body": answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok"),
    "cut chunks": answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"),
    "unframed": answering(b"HTTP/1.1 200 OK\r\n\r\nok"),
    **{str(status): answering(reply(status)) for status in MAY_RUN},
    **{text[-40:]: answering(reply(503, "Retry-After: 5", body=text)) for text in PASSED_ON},
}


@pytest.mark.parametrize("behaviour", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_outcome_is_due_again_only_after_the_lease(database, serve, caller, behaviour):
    job = database.add_job()
    worker = caller(serve(behaviour).url, STAGE_TIMEOUT=1)
    call = worker.claim()
    claimed = database.owed(job)
    assert claimed.due_at - claimed.started_at == timedelta(seconds=31)
    worker.run(call)
    assert worker.claim() is None  # settles
    owed = database.owed(job)
    assert [attempt.outcome for attempt in database.attempts(job)] == ["unknown"]
    assert (owed.due_at, owed.worker) == (claimed.due_at, None)
    assert (owed.attempts, owed.free_attempts) == (1, 0)
    assert database.rows("SELECT leased_until, unanswered FROM stage_leases") == [
        (claimed.due_at, True)
    ]
    assert hold_of(database).hold_seconds is None


@pytest.mark.parametrize("text", NOT_PASSED_ON)
def test_gateway_that_passed_nothing_on_holds_the_stage(database, serve, caller, text):
    job = database.add_job()
    attempt = caller(serve(answering(reply(503, body=text))).url).call()
    assert (attempt.outcome, attempt.http_status) == ("held", 503)
    assert database.owed(job).free_attempts == 1


def test_back_off_longer_than_the_lease_counts_for_an_unknown_outcome(database, serve, caller):
    job = database.add_job()
    worker = caller(serve(UNKNOWN["unframed"]).url, STAGE_TIMEOUT=9, RETRY_DELAY=300)
    call = worker.claim()
    lease = database.owed(job).due_at
    wait = worker.run(call).delay
    worker.claim()
    owed, [attempt] = database.owed(job), database.attempts(job)
    assert owed.due_at == max(lease, attempt.finished_at + timedelta(seconds=wait))
