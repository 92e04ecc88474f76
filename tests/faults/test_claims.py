"""Claims and results whose connection is lost on the way, and due calls that are hard to find."""

import mmap
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from asynchronous import asynchronous
from claims import claim, connected
from tcp_proxy import TcpProxy
from variants import install, stage
from waiting import (
    CLAIM,
    LISTENING,
    RECONNECTING,
    backends,
    gate,
    terminate_backends,
    until,
    wait_for_call,
    wait_for_sweeps,
    wait_until_idle,
)

import calls
import moves
import trigger
from demo.stage_api import StageApi
from demo.stage_server import Answer
from faults.test_connection import frozen, processes
from listener import Listener
from pipeline import Pool, limits
from workers import Worker

SETTLE = "EXECUTE pay("
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
    settled = proxy.hold_answer(SETTLE)
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
    settings = {"SWEEP_INTERVAL": 0.1, **proxy.settings}
    process = listener(database, "run", "--workers", "1", api=api, **settings)
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
        database.wait_for(SUCCEEDED, job)
    assert len(api.calls(job)) == 1


# --- the database goes away during calls ---------------------------------------------------


@contextmanager
def stopped(database, process) -> Iterator[None]:
    database.server.embedded.stop("immediate")
    process.wait_for_line(RECONNECTING)
    yield
    database.server.embedded.start()
    database.conn = database.connect()


@contextmanager
def away_for_minutes(database, process) -> Iterator[None]:
    """With MINUTES, 31 waits of 2.5 to 5 s: longer than the leases of the calls."""
    with stopped(database, process):
        yield
        process.wait_for_line("(32번째)", timeout=240)


@contextmanager
def terminated(database, process) -> Iterator[None]:
    terminate_backends(database)
    process.wait_for_line(RECONNECTING)
    yield


@contextmanager
def backends_frozen(database, process) -> Iterator[None]:
    """Its next statement, a claim for one more job, is not answered."""
    with frozen(backends(database)):
        database.add_job("overlay")
        process.wait_for_line("did not answer within 10 s")
        process.wait_for_line(LISTENING, count=2)
    yield


@contextmanager
def server_frozen(database, process) -> Iterator[None]:
    """Nothing answers when the listener sends the results, nor when it connects again."""
    with frozen(processes(database.server)):
        yield
        process.wait_for_line("did not answer within 10 s")
        process.wait_for_line("timeout expired")


MINUTES = {"JOB_STATE_LISTENER_RECONNECT_DELAY": 5, "STAGE_TIMEOUT": 60, "LEASE_MARGIN": 10}
ALL_THROUGH = "SELECT bool_and((current_step, status) = ('vlm_judge', 'done')) FROM jobs"


SLOW = [pytest.param(lose, marks=pytest.mark.slow)
        for lose in (away_for_minutes, backends_frozen, server_frozen)]  # fmt: skip


@pytest.mark.parametrize("lose", [*SLOW, stopped, terminated])
def test_d1_calls_whose_answers_come_while_the_database_is_away_are_made_once(
    lose, own_server, make_database, listener
):
    database = make_database(own_server)
    settings = MINUTES if lose is away_for_minutes else {}
    with StageApi(database.dsn) as api, gate(api, "overlay", Answer(200)) as opened:
        # One more than the calls, as an idle one is needed for a claim. A frozen backend passes
        # no notification on: the sweep makes that claim.
        process = listener(database, "run", "--workers", "17", api=api,
                           SWEEP_INTERVAL=1, **settings)  # fmt: skip
        jobs = [database.add_job("planner") for _ in range(16)]
        api.wait_for(lambda api: len(api.calls()) == 16)
        if lose is away_for_minutes:  # whoever connects first after it leaves these calls alone
            other = listener(database, api=api)
            other.wait_for_line(LISTENING)
        with lose(database, process):
            opened.set()
            process.wait_for_line("파이프라인 단계 실행 성공", count=16)
        for job in jobs:
            database.wait_for(SUCCEEDED, job)
            assert database.owed(job) is None
        database.rows("UPDATE jobs SET current_step = 'overlay' WHERE current_step = 'planner'")
        database.wait_for(ALL_THROUGH)
        assert process.stop() == 0
    counts = Counter((call.job_id, call.stage) for call in api.calls())
    assert {(job, stage) for job in jobs for stage in ("overlay", "vlm_judge")} <= counts.keys()
    assert set(counts.values()) == {1}
    attempts = database.rows("SELECT job_id::text, stage, outcome FROM stage_attempts")
    assert Counter(map(tuple, attempts)) == {(*call, "succeeded"): 1 for call in counts}


# --- calls that others make hard to find ---------------------------------------------------


def test_d6_call_that_the_application_hides_is_found_without_a_notification(
    database, api, listener, tmp_path
):
    listener(database, "run", "--workers", "1", api=api, SWEEP_INTERVAL=0.1)
    wait_until_idle(tmp_path)
    with closing(database.connect()) as application:
        application.autocommit = False
        cursor = application.cursor()
        with gate(api, answer=Answer(200)) as opened:
            busy = database.add_job()
            wait_for_call(api, busy)
            job = database.add_job("overlay", "done")
            cursor.execute("UPDATE jobs SET status = 'running' WHERE job_id = %s", [job])
            opened.set()
            database.wait_for(SUCCEEDED, busy)
        wait_for_sweeps(database)
        assert api.calls(job) == []
        application.rollback()
        database.wait_for(SUCCEEDED, job)
    assert len(api.calls(job)) == 1


def test_d7_call_that_was_committed_late_is_not_passed_over(database):
    with closing(database.connect()) as slow, connected(database) as conn:
        slow.autocommit = False
        cursor = slow.cursor()
        cursor.execute("INSERT INTO jobs (current_step, status) VALUES ('img_gen', 'done')")
        early = [database.add_job() for _ in range(3)]
        assert [str(claim(conn).job_id) for _ in early] == early
        slow.commit()
        row = claim(conn)
        assert row.owed and str(row.job_id) not in early
        assert claim(conn).call_id is None


LEFT_BEHIND = """
INSERT INTO jobs (current_step, status) SELECT 'img_gen', 'done' FROM generate_series(1, 10000);
UPDATE stage_calls SET due_at = now() + interval '10 minutes';
DELETE FROM stage_calls;
INSERT INTO jobs (current_step, status) SELECT 'img_gen', 'done' FROM generate_series(1, 100)
"""


@contextmanager
def old_snapshot(database) -> Iterator[None]:
    """A long transaction elsewhere, during which deleted rows cannot be vacuumed."""
    with closing(database.connect()) as report:
        report.set_session(isolation_level="REPEATABLE READ", autocommit=False)
        report.cursor().execute("SELECT count(*) FROM jobs")
        yield


PAGES = """
SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read
FROM pg_statio_user_tables WHERE relname = 'stage_calls'
"""


DEAD_LEASES = """
INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at, leased_until)
SELECT gen_random_uuid(), -n, 1, 'vlm_analyze', 'gone', now(),
       now() + interval %s - n / 4 * interval '1 ms'
FROM generate_series(1, 50000) AS n;
DELETE FROM stage_leases
"""
# Of indexes, and rows of the table read without one.
ENTRIES = """
SELECT (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'stage_leases')
       + (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'stage_leases')
"""


def reported(database, session) -> None:
    """Wait until the server's statistics have all that `session` has done so far."""
    if database.server.version >= 15:
        session.cursor().execute("SELECT pg_stat_force_next_flush()")
        return
    # Before, a session reports every 500 ms at most, but all tables at once: with a read of this
    # new table all that it did earlier.
    database.rows("DROP TABLE IF EXISTS mark; CREATE TABLE mark ()")

    def seen() -> bool:
        session.cursor().execute("TABLE mark")
        return database.value("SELECT pg_stat_get_numscans('mark'::regclass) > 0")

    until(seen, "the statistics of a session")


def counted(what: str, database, conn) -> int:
    """A statistic, with all that the test's own session and `conn` have done so far."""
    for session in (database.conn, conn):
        reported(database, session)
    return database.value(what)


def with_idle_worker(listener: Listener) -> Listener:
    """Give the listener an idle worker, so that it claims in each turn; the calls are not made."""
    return with_idle_workers(listener, 1)


def with_idle_workers(listener: Listener, number: int) -> Listener:
    listener.workers.all = [
        Worker(os.getpid(), socket.socketpair()[0], mmap.mmap(-1, 2)) for _ in range(number)
    ]
    return listener


def pages_read(database, claiming, claims: int = 20) -> int:
    """Pages of stage_calls that so many claims look at."""
    listener = with_idle_worker(claiming.listener)
    assert listener.settle_and_claim(claiming.conn)  # the first one is a sweep
    assert listener.settle_and_claim(claiming.conn)  # and the next knows nothing yet
    before = counted(PAGES, database, claiming.conn)
    for _ in range(claims):
        assert listener.settle_and_claim(claiming.conn)
    return counted(PAGES, database, claiming.conn) - before


def test_d8_claims_under_an_old_snapshot_read_little_more_than_without(
    database, caller, monkeypatch
):
    monkeypatch.setattr("claiming.MARKED_FOR", 600.0)  # on a slow machine, too
    monkeypatch.setattr("listener.AGAIN_EVERY", 600.0)
    claiming = caller("http://127.0.0.1:1", SWEEP_INTERVAL=3600)
    # Its pages count, too.
    database.rows("ALTER TABLE stage_calls SET (autovacuum_enabled = off)")
    database.rows(LEFT_BEHIND)
    claiming.conn.cursor().execute("VACUUM stage_calls")
    clean = pages_read(database, claiming)
    with old_snapshot(database):
        database.rows("DELETE FROM stage_calls; " + LEFT_BEHIND)
        claiming.listener.claiming.marks.clear()
        assert pages_read(database, claiming) <= 1.25 * clean


# Leases that are over are not counted under a limit; dead ones that are not may be among them.
@pytest.mark.parametrize(
    ("given", "other", "dead"),
    [
        ({}, {}, "1 hour"),
        ({}, {"fair": True}, "1 hour"),  # then the claim uses stage_due_calls()
        ({"fair": True}, {}, "1 hour"),
        ({"fair": True, "per_tenant": 9}, {}, "-1 second"),
        ({"max_running": 9}, {}, "-1 second"),
        ({"pool": Pool("gpu1", 9)}, {}, "-1 second"),
    ],
)
def test_d8_settling_and_claiming_under_an_old_snapshot_read_few_leases(
    given, other, dead, database, use_pipeline, caller
):
    """Also once the table of leases was analyzed: few rows that are alive, and many dead ones."""
    routes = {("img_gen", "done"): limits(**given)(stage("vlm_analyze"))}
    use_pipeline(routes | {("overlay", "done"): limits(**other)(stage("vlm_judge"))})
    install(database, "SELECT 1;")
    claiming = caller("http://127.0.0.1:1", SWEEP_INTERVAL=3600)
    database.rows("INSERT INTO jobs (current_step, status)"
                  " SELECT 'img_gen', 'done' FROM generate_series(1, 80)")  # fmt: skip
    with old_snapshot(database):
        database.rows(DEAD_LEASES, dead)
        for workers in (1, 2):
            listener = with_idle_workers(claiming.listener, workers)
            claimed = listener.settle_and_claim(claiming.conn)
            database.rows("ANALYZE stage_leases")
            before = counted(ENTRIES, database, claiming.conn)
            for _ in range(20):
                for call in claimed:
                    listener.keep(call, trigger.result(call, "succeeded"))
                claimed = listener.settle_and_claim(claiming.conn)
                assert len(claimed) == workers
            read = counted(ENTRIES, database, claiming.conn) - before
            assert read < 20 * workers * 200


@pytest.mark.parametrize("moved", [1, 5])
def test_d8_ending_moved_calls_under_an_old_snapshot_reads_little(
    database, use_pipeline, caller, moved
):
    use_pipeline({("img_gen", "done"): asynchronous("vlm_analyze")})
    install(database, "SELECT 1;")
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_worker(claiming.listener)
    jobs = [database.add_job("img_gen", "done") for _ in range(moved)]
    with old_snapshot(database):
        database.rows(DEAD_LEASES, "1 hour")
        for _ in jobs:
            [call] = listener.settle_and_claim(claiming.conn)
            listener.keep(call, trigger.result(call, calls.TAKEN))
        listener.settle_and_claim(claiming.conn)
        database.rows("ANALYZE stage_leases")
        for job in jobs:
            database.move(job, "vlm_analyze", "done")
        before = counted(ENTRIES, database, claiming.conn)
        ended, _ = moves.look(claiming.conn)
        read = counted(ENTRIES, database, claiming.conn) - before
        assert len(ended) == moved and read < 1000


def test_d9_idle_workers_ask_little_for_one_event(database, proxy, api, listener, tmp_path):
    api.on("vlm_judge", lambda _request: Answer(200))
    quiet = {"SWEEP_INTERVAL": 3600, **proxy.settings}
    listener(database, "run", "--workers", "32", api=api, **quiet)
    wait_until_idle(tmp_path)
    before = len(proxy.requests)
    for _ in range(10):
        database.wait_for(SUCCEEDED, database.add_job("overlay", "done"))
        wait_until_idle(tmp_path)
    assert len(backends(database)) == len(proxy.links) == 1
    # A claim, the settling, and one more look where the notification arrives only after the claim.
    assert len(proxy.requests) - before <= 3 * 10 + 2
