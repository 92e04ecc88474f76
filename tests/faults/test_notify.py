"""Notifications that are lost, stuck or too many: calls that are owed are made all the same."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from conftest import MAJORS, Database, Server, embedded_server
from subscription import Subscription
from waiting import (
    LISTENING,
    gate,
    terminate_backends,
    until,
    wait_for_call,
    wait_until_idle,
)

from demo.stage_server import Answer

SMALL = {"max_notify_queue_pages": 8192} if MAJORS[0] >= 17 else {}
OWN = SMALL | {"max_prepared_transactions": 2}
DONE = "SELECT count(*) = %s FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"
OWED = (
    "INSERT INTO stage_calls (job_id, tenant_id, current_step, status, stage)"
    " VALUES (%s, 'tenant', 'overlay', 'done', 'vlm_judge')"
)
NOTIFY = """
SELECT count(pg_notify(%s, json_build_object('job_id', n, 'current_step', 'elsewhere',
                                             'status', repeat('x', %s))::text))
FROM generate_series(1, %s) AS n
"""
USED = "SELECT pg_notification_queue_usage()"


@pytest.fixture(scope="module")
def notify_server() -> Iterator[Server]:
    """A server with a notification queue that no other test uses; of 64 MiB, where it can be."""
    with embedded_server(**OWN) as embedded:
        yield Server(embedded.settings(), embedded)


@pytest.fixture
def database(notify_server, make_database) -> Database:
    return make_database(notify_server)


def notify(database, count: int, size: int = 1000, channel: str = "job_state_changed") -> None:
    database.rows(NOTIFY, channel, size, count)


def memory(pid: int) -> float:
    """The most that a process had in memory so far, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def wait_for_empty_queue(database) -> None:
    def empty() -> bool:
        database.rows("NOTIFY nobody")  # whoever notifies next throws away what all have read
        return database.value(USED) < 0.001

    until(empty, "an empty queue")


@contextmanager
def pinned_queue(server, database) -> Iterator[None]:
    """A session that listens, in another database, and never leaves its transaction."""
    with closing(server.connect()) as stuck:
        stuck.cursor().execute("LISTEN anything")
        stuck.autocommit = False
        stuck.cursor().execute("SELECT 1")
        yield
    wait_for_empty_queue(database)


# --- a queue that fills --------------------------------------------------------------------


@pytest.mark.skipif(not SMALL, reason="PostgreSQL 17 has notification queues below 8 GiB")
def test_b2_queue_that_fills_is_a_problem_that_verify_names(
    notify_server, database, api, run_command
):
    with pinned_queue(notify_server, database):
        notify(database, 4500, 7800)
        assert 0.5 < database.value(USED) < 1
        done = run_command(database, "verify", api=api)
        assert done.code == 1
        (problem,) = [line for line in done.lines if line.startswith("PROBLEM")]
        assert "queue is 5" in problem and "% full" in problem
    assert run_command(database, "verify", api=api).code == 0


def test_b2_idle_listener_pins_nothing(database, listener, tmp_path):
    listener(database, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    notify(database, 2000, 7000)
    wait_for_empty_queue(database)


def test_b3_listener_with_a_long_call_under_way_hears_a_flood(database, api, listener):
    with gate(api, "vlm_judge", Answer(200)) as opened:
        process = listener(database, "run", "--workers", "1", api=api, SWEEP_INTERVAL=3600)
        job = database.add_job("overlay", "done")
        wait_for_call(api, job)  # no worker is idle
        before = memory(process.pid)
        for _ in range(20):
            notify(database, 10_000, 10)
        wait_for_empty_queue(database)
        assert not api.calls(job)[0].finished
        opened.set()
    process.wait_for_line(f"트리거: job={database.add_job('overlay', 'done')}")
    assert memory(process.pid) - before < 16
    assert len(api.calls(job)) == 1


def test_p10_notifications_are_drained_and_dropped(database, listener, tmp_path):
    process = listener(database, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    before = memory(process.pid)
    for _ in range(10):
        notify(database, 10_000, 10)
    process.wait_for_line(f"트리거: job={database.add_job()}")
    assert memory(process.pid) - before < 16


# --- notifications that cannot be heard ----------------------------------------------------


def test_b6_channel_has_this_name_and_no_other(database):
    with Subscription(database) as subscription:
        database.rows("NOTIFY Job_State_Changed, 'folded'")
        database.rows("NOTIFY \"Job_State_Changed\", 'another'")
        assert subscription.payloads() == ["folded"]


def test_b6_other_databases_hear_nothing(notify_server, database, make_database):
    with Subscription(make_database(notify_server)) as subscription:
        database.add_job()
        assert subscription.payloads() == []


def test_b6_two_phase_commit_of_a_state_change_is_refused_and_leaves_nothing(database):
    job = database.add_job("img_gen", "queued")
    database.rows("BEGIN")
    database.move(job, "img_gen", "done")
    with pytest.raises(psycopg2.errors.FeatureNotSupported):
        database.rows("PREPARE TRANSACTION 'job'")
    assert database.state(job) == ("img_gen", "queued")
    assert database.owed(job) is None


@contextmanager
def unreadable_queue(server, database) -> Iterator[None]:
    """The file that LISTEN reads first is deleted from the disk."""
    with pinned_queue(server, database):
        notify(database, 600, 7800, "elsewhere")  # more than the server keeps in memory
        min(Path(database.value("SHOW data_directory"), "pg_notify").iterdir()).unlink()
        yield


def test_b7_listener_whose_listen_fails_looks_every_second(notify_server, database, api, listener):
    process = listener(database, api=api, SWEEP_INTERVAL=3600)
    process.wait_for_line(LISTENING)
    with unreadable_queue(notify_server, database):
        terminate_backends(database)
        process.wait_for_line("LISTEN 대신 1초마다 확인")
        database.rows("SET session_replication_role = replica")  # no notification: it would be read
        job = database.add_job("overlay", "done")
        database.rows(OWED, job)
        database.wait_for(DONE, 1)
    terminate_backends(database)
    process.wait_for_line(LISTENING, count=2)
    assert process.output.count("LISTEN 대신") == 1
