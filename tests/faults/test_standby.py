"""A standby and a failover: a listener belongs on the server that takes its writes."""

from collections.abc import Iterator

import pytest
from conftest import Database, Server, embedded_server
from waiting import LISTENING, RECONNECTING, gate, wait_for_call

from demo.stage_api import StageApi
from demo.stage_server import Answer
from demo.standby import Standby

pytestmark = pytest.mark.slow

DONE = "SELECT count(*) = %s FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
CLAIMED = "SELECT worker IS NOT NULL FROM stage_calls WHERE job_id = %s"
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


@pytest.fixture
def primary() -> Iterator[Database]:
    with embedded_server() as embedded:
        server = Server(embedded.settings(), embedded)
        database = Database(server, server.create_installed())
        yield database
        database.conn.close()


@pytest.fixture
def standby(primary) -> Iterator[Database]:
    with Standby(primary.server.embedded) as embedded:
        database = Database(Server(embedded.settings(), embedded), primary.name)
        yield database
        database.conn.close()


@pytest.fixture
def api(standby) -> Iterator[StageApi]:
    """A stage API that uses the standby, once that has been promoted."""
    with StageApi(standby.dsn) as served:
        yield served


def fail_over(primary: Database, standby: Database) -> None:
    primary.server.embedded.stop("immediate")
    standby.rows("SELECT pg_promote()")


def test_a12_standby_is_refused_until_it_is_promoted(primary, standby, api, listener):
    job = primary.add_job("overlay", "done")
    standby.wait_for("SELECT count(*) = 1 FROM stage_calls")
    process = listener(standby, api=api)
    assert "read-only" in process.wait_for_line("리스너 오류 발생")
    process.wait_for_line(RECONNECTING, count=2)
    assert LISTENING not in process.output
    fail_over(primary, standby)
    process.wait_for_line(LISTENING)
    standby.wait_for(DONE, 1)
    assert len(api.calls(job)) == 1


def test_a12_listener_follows_a_failover_and_keeps_its_result(primary, standby, api, listener):
    hosts = f"{standby.environ['DB_HOST']},{primary.environ['DB_HOST']}"
    with gate(api, answer=Answer(200)) as opened:
        process = listener(primary, api=api, DB_HOST=hosts)
        assert f"연결 성공: {primary.environ['DB_HOST']}:" in process.wait_for_line("연결 성공")
        process.wait_for_line(LISTENING)
        job = primary.add_job()
        wait_for_call(api, job)
        standby.wait_for(CLAIMED, job)
        fail_over(primary, standby)
        opened.set()
        process.wait_for_line(LISTENING, count=2)
        standby.wait_for(SUCCEEDED, job)
    standby.add_job("overlay", "done")
    standby.wait_for(DONE, 1)
    assert len(api.calls(job)) == 1
