"""A connection that dies while a claim or a result is on its way."""

from collections.abc import Iterator

import pytest
from tcp_proxy import TcpProxy
from waiting import LISTENING, gate, wait_for_call, wait_until_idle

import calls
from demo.stage_server import Answer

CLAIM = calls.CLAIM[: calls.CLAIM.index("\n")]
PAY = calls.PAY.split("(")[0].strip()
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


@pytest.fixture
def proxy(database) -> Iterator[TcpProxy]:
    with TcpProxy(database.environ) as running:
        yield running


def test_d5_claim_whose_answer_was_lost_is_given_back_and_called_once(
    database, proxy, api, listener, tmp_path
):
    process = listener(database, api=api, **proxy.settings)
    wait_until_idle(tmp_path)
    claimed = proxy.hold_answer(CLAIM)
    job = database.add_job("overlay", "done")
    claimed.wait()
    assert database.owed(job).attempts == 1  # committed, and nobody knows
    claimed.cut()
    process.wait_for_line("시작하지 않은 호출 1건을 되돌림")
    database.wait_for(SUCCEEDED, job)
    assert [call.headers["X-Attempt"] for call in api.calls(job)] == ["2"]
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]


def test_d5_claim_that_never_arrived_is_made_again(database, proxy, api, listener, tmp_path):
    process = listener(database, api=api, **proxy.settings)
    wait_until_idle(tmp_path)
    claim = proxy.hold_request(CLAIM)
    job = database.add_job("overlay", "done")
    claim.wait()
    claim.cut()
    process.wait_for_line(LISTENING, count=2)
    database.wait_for(SUCCEEDED, job)
    assert [call.headers["X-Attempt"] for call in api.calls(job)] == ["1"]


def test_d5_settling_whose_answer_was_lost_is_repeated_without_harm(
    database, proxy, api, listener, tmp_path
):
    process = listener(database, api=api, **proxy.settings)
    wait_until_idle(tmp_path)
    api.on("overlay", lambda _request: Answer(200))
    settled = proxy.hold_answer(PAY)
    job = database.add_job("planner", "done")
    settled.wait()
    next_job = database.add_job("overlay", "done")
    settled.cut()
    process.wait_for_line(LISTENING, count=2)
    database.wait_for(SUCCEEDED, next_job)
    assert database.owed(job) is None
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert len(api.calls(job)) == 1 and len(api.calls(next_job)) == 1


def test_d5_claim_that_commits_after_the_reconnect_is_found_again(
    database, proxy, api, listener, tmp_path
):
    process = listener(database, api=api, **proxy.settings, SWEEP_INTERVAL=0.1)
    wait_until_idle(tmp_path)
    late = proxy.hold_request(CLAIM)
    late.wait()
    late.lose_client()
    process.wait_for_line(LISTENING, count=2)
    with gate(api) as opened:
        first = database.add_job()
        wait_for_call(api, first)
        job = database.add_job("overlay", "done")
        late.release()
        database.wait_for("SELECT worker IS NOT NULL FROM stage_calls WHERE job_id = %s", job)
        opened.set()
        database.wait_for(SUCCEEDED, job, timeout=20)
    assert len(api.calls(job)) == 1
