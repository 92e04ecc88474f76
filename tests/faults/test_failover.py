"""A primary that is frozen, one that is an old one, and a synchronous standby that is away."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from claims import connected
from conftest import PROGRAM, Database, Server
from waiting import LISTENING, backends, terminate_backends, until, wait_until_idle

from demo.database import EmbeddedDatabase
from demo.stage_api import StageApi
from demo.stage_server import Answer
from demo.standby import Standby
from faults.test_connection import frozen, processes
from ops import verify

pytestmark = pytest.mark.slow

ACCEPTED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"
OLD = "is an old primary: it is on timeline 1, and another host has been primary on 2"
AWAITED = "커밋이 응답 없는 동기 스탠바이를 기다림"


@pytest.fixture
def pair() -> Iterator[tuple[Database, Database]]:
    """A primary and its standby; `both` of the primary are settings with the two hosts."""
    with EmbeddedDatabase(options={"fsync": "off"}) as embedded:
        server = Server(embedded.settings(), embedded)
        primary = Database(server, server.create_installed())
        with Standby(embedded) as following:
            standby = Database(Server(following.settings(), following), primary.name)
            primary.both = {"DB_HOST": f"{primary.environ['DB_HOST']},{standby.environ['DB_HOST']}"}
            yield primary, standby
            standby.conn.close()
        primary.conn.close()


@pytest.fixture
def api() -> Iterator[StageApi]:
    """Accepts every call, and leaves the job where it is."""
    with StageApi("") as served:
        served.on("vlm_analyze", lambda _request: Answer(200))
        yield served


@pytest.mark.slow
def test_a25_a26_frozen_primary_is_left_and_never_worked_on_again(pair, api, listener, tmp_path):
    primary, standby = pair
    told = tmp_path / "told"
    command = {"ALERT_COMMAND": f"sh -c 'cat >> {told}'"}
    process = listener(primary, api=api, **primary.both, **command)
    wait_until_idle(tmp_path)
    with frozen(processes(primary.server)):
        standby.rows("SELECT pg_promote()")
        job = standby.add_job()
        standby.wait_for(ACCEPTED, job)

    # It is back, believes to be primary still, and is the first in the list.
    left_behind = primary.add_job()
    terminate_backends(standby)
    process.wait_for_line(OLD)
    job = standby.add_job()
    standby.wait_for(ACCEPTED, job)

    # A listener that starts only now has seen nothing yet: it asks all hosts.
    assert process.stop() == 0
    assert '"event": "split_brain"' in told.read_text() and OLD in told.read_text()
    process = listener(primary, api=api, **primary.both)
    process.wait_for_line(OLD)
    job = standby.add_job()
    standby.wait_for(ACCEPTED, job)
    assert api.calls(left_behind) == [] and not primary.owed(left_behind).worker


# Two rounds of the deadline, in less time.
IMPATIENT = f"""
import runpy, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import db
db.Connection.deadline = db.DEADLINE = 2.0
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
"""


def verified(database) -> str:
    """What `verify` says of commits."""
    with connected(database) as conn:
        try:
            return verify.check_commits(conn, None)
        except verify.Bad as bad:
            return str(bad)


def test_a9_sessions_do_not_pile_up_while_a_synchronous_standby_is_away(
    own_server, make_database, api, listener, tmp_path, monkeypatch
):
    database = make_database(own_server)
    program = tmp_path / "impatient.py"
    program.write_text(IMPATIENT)
    process = listener(database, api=api, program=program)
    wait_until_idle(tmp_path)
    database.rows("SET synchronous_commit = local")
    database.rows("ALTER SYSTEM SET synchronous_standby_names = 'away'")
    try:
        database.rows("SELECT pg_reload_conf()")
        database.wait_for("SHOW synchronous_standby_names")
        job = database.add_job()
        process.wait_for_line(AWAITED)
        process.wait_for_line(LISTENING, count=4)
        until(lambda: len(backends(database)) <= 2, "the end of the sessions before")
        with closing(database.connect()) as holding:  # a turn that claims nothing also succeeds
            holding.autocommit = False
            holding.cursor().execute("SELECT FROM stage_calls FOR UPDATE")
            wait_until_idle(tmp_path)
            connected_before = process.output.count(LISTENING)
        process.wait_for_line(LISTENING, count=connected_before + 2)
        assert process.output.count(AWAITED) == 1
        assert api.calls(job) == []  # nothing is called whose claim a new primary might not know
        monkeypatch.setattr(verify, "COMMIT_WAITS", 0.0)
        until(lambda: verified(database).startswith("commits that have waited"), "verify says so")
    finally:
        database.rows("ALTER SYSTEM RESET synchronous_standby_names")
        database.rows("SELECT pg_reload_conf()")
    database.wait_for(ACCEPTED, job)
    assert len(api.calls(job)) == 1
    assert verified(database).startswith("no commit")
