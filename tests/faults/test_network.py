"""Packets that are lost: each side believes that the other one is connected and silent."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from conftest import ROOT, Database, Server, embedded_server
from waiting import LISTENING, PATIENCE, backends, until, wait_until_idle

from demo.stage_api import StageApi
from demo.stage_server import Answer
from faults.network import Network

pytestmark = pytest.mark.slow

LOST = "리스너 오류 발생"
DONE = "SELECT count(*) = 1 FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
LET_IN = "COPY (SELECT 'host all all all trust') TO '{}'; SELECT pg_reload_conf()"


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as joined:
        yield joined


@pytest.fixture
def remote(network) -> Iterator[Database]:
    """A database that the namespace reaches over its cable only."""
    with embedded_server(listen_addresses=f"127.0.0.1,{network.here}") as embedded:
        server = Server(embedded.settings(), embedded)
        with closing(Database(server, server.create_installed())) as database:
            database.rows(LET_IN.format(database.value("SHOW hba_file")))
            yield database


@pytest.mark.parametrize("sweep", [3600, 0.5], ids=["idle", "query in flight"])
def test_a6_half_open_connection_is_noticed_and_replaced(
    sweep, network, remote, listener, tmp_path
):
    with StageApi(remote.dsn, host=network.here) as api:
        settings = {"DB_HOST": network.here, "SWEEP_INTERVAL": sweep}
        process = listener(remote, api=api, within=network.within, **settings)
        wait_until_idle(tmp_path)
        network.lose_everything()
        process.wait_for_line(LOST)  # without our settings, not within PATIENCE
        remote.add_job("overlay", "done")
        network.mend()
        process.wait_for_line(LISTENING, count=2)
        remote.wait_for(DONE)
        assert len(api.calls()) == 1


def test_a6_connect_that_nobody_answers_is_given_up_and_tried_again(network, remote, listener):
    network.lose_everything()
    process = listener(remote, within=network.within, DB_HOST=network.here)
    process.wait_for_line("Job State Listener 시작")
    process.wait_for_line("timeout expired")
    network.mend()
    process.wait_for_line(LISTENING)


def test_a9_server_forgets_a_listener_that_vanished_with_its_host(
    network, remote, listener, tmp_path
):
    process = listener(remote, within=network.within, DB_HOST=network.here, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    network.lose_everything()
    process.kill()
    assert backends(remote)
    until(lambda: not backends(remote), "the end of its backend")


POST = """
import time
import config, stage_http
api = stage_http.StageApi(config.settings())

def post(path):
    return api.post(path, {"job_id": 1}, {}, time.monotonic() + 600)

print(post("/good").status, flush=True)
path = input()
api.used_at = time.monotonic()
try:
    post(path)
except Exception as error:
    print(type(error).__name__)
"""


def test_h6_connection_into_a_black_hole_does_not_wait_for_the_stage_timeout(network, tmp_path):
    (tmp_path / ".env").touch()
    lost, arrived = threading.Event(), threading.Event()

    def swallow(_request) -> Answer:
        arrived.set()
        lost.wait(PATIENCE)
        return Answer(200)

    with StageApi("", host=network.here) as api:
        api.on("/good", lambda _request: Answer(200))
        api.on("/swallowed", swallow)
        started = [
            subprocess.Popen(
                [*network.within, sys.executable, "-c", POST],
                env={"STAGE_API_URL": api.url, "PYTHONPATH": str(ROOT)},
                cwd=tmp_path,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        assert [process.stdout.readline() for process in started] == ["200\n"] * 2
        waiting, pooled = started
        waiting.stdin.write("/swallowed\n")
        waiting.stdin.flush()
        assert arrived.wait(PATIENCE)
        network.lose_everything()
        lost.set()
        assert pooled.communicate("/good\n", 2 * PATIENCE)[0] == "NoAnswer\n"
        assert waiting.communicate(timeout=2 * PATIENCE)[0] == "NoAnswer\n"
