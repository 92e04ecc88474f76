"""What a worker does while a quick stage works: it settles the result before, and claims the next
call; and gives it back where that call would have to wait.
"""

import threading
import time

import pytest
from raw_server import OK, in_turn
from waiting import PATIENCE, until

import db
import stages
import trigger

BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n"
LEASES = "SELECT job_id FROM stage_leases WHERE worker = 'caller' ORDER BY started_at"
# Until the claim that a worker makes meanwhile waits for a lock.
WAITING = """
SELECT count(*) = 1 FROM pg_stat_activity
WHERE pid = %s AND wait_event_type = 'Lock'
"""


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """On however slow a machine: every stage is a quick one, and its answer is waited for."""
    monkeypatch.setattr(trigger, "QUICK", PATIENCE)
    monkeypatch.setattr(trigger, "PATIENCE", PATIENCE)


def then(*behaviours):
    """A server's behaviour: OK twice, then what each of `behaviours` returns; kept alive."""
    left = [lambda: OK, lambda: OK, *behaviours]

    def answer(connection) -> None:
        while connection.receive():
            connection.send(left.pop(0)() if left else OK)

    return answer


def make(worker, count: int) -> list[str]:
    """Claim and run so many calls; the job of each."""
    made = []
    for _ in range(count):
        call = worker.claim()
        worker.trigger.run(call, worker.conn)
        made.append(call.job_id)
    return made


def outcomes(database, jobs: list[str]) -> list[list[str]]:
    return [[attempt.outcome for attempt in database.attempts(job)] for job in jobs]


def test_next_call_is_claimed_and_last_result_written_while_the_stage_works(
    database, serve, caller
):
    jobs = [database.add_job() for _ in range(4)]
    seen = []

    def look() -> bytes:
        until(lambda: (jobs[3],) in database.rows(LEASES), "a claim ahead")
        seen.extend(outcomes(database, jobs[:2]))
        return OK

    worker = caller(serve(then(look)).url)
    assert make(worker, 3) == jobs[:3]
    assert seen == [["succeeded"], ["succeeded"]]
    assert make(worker, 1) == jobs[3:] and worker.claim() is None
    assert outcomes(database, jobs) == [["succeeded"]] * 4
    assert database.rows(LEASES) == [] and database.value("SELECT count(*) FROM stage_calls") == 0


def test_nothing_is_claimed_ahead_after_a_slow_call(database, accepting, caller, monkeypatch):
    monkeypatch.setattr(trigger, "QUICK", 0)
    for _ in range(4):
        database.add_job()
    worker = caller(accepting.url)
    make(worker, 3)
    assert worker.trigger.ahead is None and len(database.rows(LEASES)) == 1


def test_call_claimed_ahead_is_another_workers_where_the_stage_turns_slow(
    database, serve, caller, monkeypatch
):
    monkeypatch.setattr(trigger, "PATIENCE", 0.01)
    jobs = [database.add_job() for _ in range(4)]
    other = []

    def wait() -> bytes:
        until(lambda: database.owed(jobs[3]).free_attempts, "the call to be given back")
        other.append(second.claim().job_id)
        return OK

    server = serve(then(wait))
    worker, second = caller(server.url), caller(server.url, name="second")
    make(worker, 3)
    assert other == [jobs[3]] and worker.claim() is None
    assert outcomes(database, jobs) == [["succeeded"]] * 3 + [[]]
    assert database.owed(jobs[3]).worker == "second"


def test_call_claimed_ahead_is_not_sent_to_a_stage_that_fails(database, serve, caller):
    jobs = [database.add_job() for _ in range(4)]
    server = serve(then(lambda: BUSY))
    worker = caller(server.url)
    make(worker, 3)
    assert worker.trigger.ahead.job_id == jobs[3]
    assert worker.claim() is None and len(server.requests) == 3
    owed = database.owed(jobs[3])
    assert (owed.worker, owed.attempts - owed.free_attempts) == (None, 0)
    assert database.rows(LEASES) == []


def test_call_claimed_ahead_is_given_back_on_leaving(database, accepting, caller):
    jobs = [database.add_job() for _ in range(4)]
    worker = caller(accepting.url)
    make(worker, 3)
    worker.trigger.leave(worker.conn)
    assert outcomes(database, jobs) == [["succeeded"]] * 3 + [[]]
    assert caller(accepting.url, name="second").claim().job_id == jobs[3]
    assert len(accepting.requests) == 3


def test_answer_outlives_a_connection_lost_while_looking_ahead(database, serve, caller):
    jobs = [database.add_job() for _ in range(4)]
    lock = database.connect()
    lock.autocommit = False

    def cut() -> bytes:
        pid = worker.conn.info.backend_pid
        database.wait_for(WAITING, pid)
        database.rows("SELECT pg_terminate_backend(%s)", pid)
        return OK

    worker = caller(serve(then(cut)).url)
    make(worker, 2)
    call = worker.claim()
    lock.cursor().execute("LOCK TABLE stage_attempts")
    with pytest.raises(db.ConnectionLost):
        worker.trigger.run(call, worker.conn)
    lock.close()
    assert [result.job_id for result in worker.trigger.results.unwritten] == jobs[1:3]
    worker.conn = db.connect(worker.settings, pinned=True)
    worker.trigger.resume(worker.conn)
    assert make(worker, 1) == jobs[3:] and worker.claim() is None
    assert outcomes(database, jobs) == [["succeeded"]] * 4


def test_job_that_moved_on_since_is_left_alone(database, accepting, caller, monkeypatch):
    monkeypatch.setattr(trigger, "LONGEST_AHEAD", 0)
    jobs = [database.add_job() for _ in range(4)]
    worker = caller(accepting.url)
    make(worker, 1)
    call = worker.claim()
    worker.trigger.run(call, worker.conn)
    database.move(jobs[2], "img_gen", "failed")
    assert make(worker, 1) == jobs[3:] and len(accepting.requests) == 3
    assert outcomes(database, jobs) == [["succeeded"], ["succeeded"], [], []]


def test_result_is_written_before_a_stage_that_is_not_known_as_quick(database, accepting, caller):
    jobs = [database.add_job(), database.add_job(), database.add_job("planner")]
    database.rows(
        "UPDATE stage_calls SET due_at = due_at - interval '1 s' WHERE stage <> 'overlay'"
    )
    worker = caller(accepting.url)
    worker.trigger.leases = {s: worker.trigger.leases[s] for s in ("vlm_analyze", "overlay")}
    worker.trigger.take_turns = lambda stage: None
    make(worker, 2)
    assert worker.trigger.ahead.stage == "overlay"
    worker.claim()
    assert outcomes(database, jobs) == [["succeeded"], ["succeeded"], []]


@pytest.fixture
def third(database, accepting, caller, monkeypatch):
    """third(before): call three jobs, the third after its stage function has done `before`; the
    worker, and the jobs."""

    def third(before):
        def vlm_analyze(call):
            before(call, worker, jobs)
            return call.post("/")

        jobs = [database.add_job() for _ in range(3)]
        worker = caller(accepting.url)
        make(worker, 2)
        monkeypatch.setattr(trigger, "PATIENCE", 0.01)
        monkeypatch.setitem(stages.PIPELINE, ("img_gen", "done"), vlm_analyze)
        worker.trigger.run(worker.claim(), worker.conn)
        return worker, jobs

    return third


def test_result_is_written_where_the_next_stage_function_hangs(database, third):
    def hang(_call, _worker, jobs):
        until(lambda: outcomes(database, jobs[1:2]) == [["succeeded"]], "the result before")

    worker, jobs = third(hang)
    assert worker.claim() is None
    assert outcomes(database, jobs) == [["succeeded"]] * 3


def test_result_is_written_before_a_stage_function_asks_the_database(database, third):
    seen = []

    def ask(call, worker, _jobs):
        lock = database.connect()
        lock.autocommit = False
        lock.cursor().execute("LOCK TABLE stage_attempts")
        unlocking = threading.Thread(target=unlock, args=(lock, worker.conn.info.backend_pid))
        unlocking.start()
        seen.append(call.query("SELECT count(*) FROM stage_attempts")[0].count)
        unlocking.join()

    def unlock(lock, pid):
        database.wait_for(WAITING, pid)
        time.sleep(2 * trigger.PATIENCE)  # an alarm would find the connection in use
        lock.close()

    worker, jobs = third(ask)
    assert seen == [2] and worker.claim() is None
    assert outcomes(database, jobs) == [["succeeded"]] * 3


def test_hanging_stage_function_still_makes_its_call_when_the_database_is_lost(
    database, accepting, third
):
    workers = []

    def lose(_call, worker, _jobs):
        workers.append(worker)
        database.rows("SELECT pg_terminate_backend(%s)", worker.conn.info.backend_pid)
        until(lambda: worker.trigger.failed_meanwhile, "the connection to be missed")

    with pytest.raises(db.ConnectionLost):
        third(lose)
    (worker,) = workers
    assert len(accepting.requests) == 3
    assert [result.outcome for result in worker.trigger.results.unwritten] == ["succeeded"] * 2
    worker.conn = db.connect(worker.settings, pinned=True)
    worker.trigger.resume(worker.conn)
    assert worker.claim() is None and database.rows(LEASES) == []


def test_result_is_written_while_a_stage_works_that_is_not_quick(
    database, serve, caller, monkeypatch
):
    jobs = [database.add_job() for _ in range(4)]

    def look() -> bytes:
        until(lambda: outcomes(database, jobs[1:2]) == [["succeeded"]], "the result before")
        return OK

    worker = caller(serve(then(look)).url)
    make(worker, 2)
    call = worker.claim()
    worker.trigger.quick.clear()
    worker.trigger.run(call, worker.conn)
    assert worker.trigger.ahead is None


def test_single_job_is_not_asked_for_twice(database, accepting, caller):
    worker = caller(accepting.url)
    for _ in range(3):
        database.add_job()
        make(worker, 1)
        assert worker.trigger.ahead is None and len(database.rows(LEASES)) == 1
        assert worker.claim() is None


def test_answers_in_turn_are_each_their_own_jobs(database, serve, caller):
    statuses = [b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % n for n in (200, 200, 200, 400)]
    jobs = [database.add_job() for _ in range(4)]
    worker = caller(serve(in_turn(*statuses)).url)
    make(worker, 4)
    assert worker.claim() is None
    assert outcomes(database, jobs) == [["succeeded"]] * 3 + [["failed"]]
