"""receiver/: a row is taken once, its effects are there once, its answer is repeated."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event

import psycopg2
import psycopg2.pool
import pytest
from conftest import Database
from receiving import ANALYZE, KEEPING, Site
from test_readme import Readme
from waiting import PATIENCE, until

from chaos.moments import Watched
from receiver import Failed, Stage
from receiver.rows import ABANDON


@pytest.fixture(scope="module")
def made(server):
    with closing(Database(server, server.create_installed())) as database:
        yield Site(database)


@pytest.fixture
def site(made) -> Site:
    made.database.rows("DELETE FROM jobs; DELETE FROM stage_requests; DELETE FROM effects")
    return Site(made.database)


BOTH = pytest.mark.parametrize("stage", [ANALYZE, KEEPING], ids=["running", "keeping"])


# --- one request ---------------------------------------------------------------------------


@BOTH
def test_row_is_set_done_with_what_the_work_wrote_and_a_repeat_gets_the_same_answer(site, stage):
    site.stage = stage
    job = site.database.add_job()
    request = site.request(job)
    first, second = site.run(request), site.run(request)
    assert first == second and first.status == 200
    assert json.loads(first.body) == {"seen": "강아지"}
    assert site.database.state(job) == ("vlm_analyze", "done")
    assert (site.effects(job), len(site.worked)) == (1, 1)


def test_answers_for_a_row_are_found_by_hand(site):
    job = site.database.add_job()
    request = site.request(job)

    def work(taken):
        raise Failed("no image", 422)

    site.run(request, work)
    sql = Readme("docs/RECEIVER.md").block("sql", "SELECT stage").replace("JOB_ID", job)
    found = site.database.row(sql)
    assert (found.key, found.state, found.http_status) == (
        (request[0]["Idempotency-Key"], "failed", 422)
    )
    assert json.loads(found.answer)["error"] == "no image"


@BOTH
def test_while_the_work_runs_no_transaction_is_open_and_a_repeat_is_told_so(site, stage):
    site.stage, job = stage, site.database.add_job()
    request = site.request(job)

    def work(taken):
        state = ("vlm_analyze", "running") if stage.running else ("img_gen", "done")
        assert site.database.state(job) == state
        assert site.run(request).status == 409
        assert site.receiver.begin(stage, *request)[0].status == 202
        assert site.sessions("state = 'idle in transaction'") == 0

    assert site.run(request, work).status == 200


def test_work_that_raises_sets_the_row_failed_and_writes_nothing(site):
    job = site.database.add_job()
    request = site.request(job)

    def work(taken):
        site.work(taken)
        raise RuntimeError("CUDA out of memory")

    first = site.run(request, work)
    assert (first.status, site.database.state(job)) == (500, ("vlm_analyze", "failed"))
    assert json.loads(first.body)["error"] == "RuntimeError: CUDA out of memory"
    assert site.run(request) == first and site.effects(job) == 0


def test_work_may_fail_on_purpose_with_a_status_of_its_own(site):
    def work(taken):
        raise Failed("no image at this path", 422)

    answer = site.run(site.request(site.database.add_job()), work)
    assert (answer.status, json.loads(answer.body)["error"]) == (422, "no image at this path")


@pytest.mark.parametrize("status", [200, 302, 399, 600])
def test_status_that_is_no_failure_is_refused(status):
    with pytest.raises(ValueError, match="allowed is 400 to 599"):
        Failed("no image", status)


def test_what_cannot_be_written_sets_the_row_failed(site):
    job = site.database.add_job()
    answer = site.run(
        site.request(job), lambda taken: taken.write("INSERT INTO nowhere VALUES (1)")
    )
    assert (answer.status, site.database.state(job)) == (500, ("vlm_analyze", "failed"))
    assert "UndefinedTable" in answer.body.decode()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_function_that_ends_the_transaction_it_is_to_write_in_is_told_so(site, end, caplog):
    job = site.database.add_job()

    def write(cursor):
        getattr(cursor.connection, end)()

    answer = site.run(site.request(job), lambda taken: taken.write(write))
    assert "write has ended the transaction" in caplog.text
    assert (answer.status, *site.database.state(job)) == {
        "commit": (200, "vlm_analyze", "done"), "rollback": (500, "vlm_analyze", "failed")
    }[end]  # fmt: skip


def test_202_is_answered_at_once_and_the_work_follows_elsewhere(site):
    job = site.database.add_job()
    request = site.request(job)
    answer, taken = site.receiver.begin(ANALYZE, *request)
    assert (answer.status, site.database.state(job)) == (202, ("vlm_analyze", "running"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(taken.run, site.work).result()
    assert site.database.state(job) == ("vlm_analyze", "done")
    assert site.receiver.begin(ANALYZE, *request)[0].status == 200 and site.effects(job) == 1


def test_job_that_cannot_be_finished_elsewhere_is_logged(site, caplog):
    job = site.database.add_job()
    _, taken = site.receiver.begin(ANALYZE, *site.request(job))
    site.database.rows(KEPT.format(job))
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(taken.run, site.work)
    finally:
        site.database.rows("ALTER TABLE jobs DROP CONSTRAINT kept")
    assert f"vlm_analyze {job} could not be finished\n" in caplog.text
    assert "CheckViolation" in caplog.text


def test_failed_row_is_taken_again_where_the_stage_says_so(site):
    site.stage = Stage("vlm_analyze", after=[("img_gen", "done"), ("vlm_analyze", "failed")])
    job = site.database.add_job("vlm_analyze", "failed")
    assert site.run(site.request(job)).status == 200


def test_what_failed_is_worked_on_again_under_its_key_once_the_row_is_where_it_can_be_taken(site):
    job = site.database.add_job()
    request = site.request(job)

    def fail(taken):
        raise Failed("no memory")

    assert [site.run(request, fail).status for _ in range(2)] == [500, 500]
    assert site.run(request).status == 500 and site.worked == []
    site.database.move(job, "img_gen", "done")
    assert (site.run(request).status, site.run(request, fail).status) == (200, 200)
    assert site.effects(job) == 1


def test_other_tables_ids_conditions_and_a_column_to_touch(site):
    site.database.rows(
        "DROP TABLE IF EXISTS variants;"
        "CREATE TABLE variants (variant_id bigint PRIMARY KEY, current_step text, status text,"
        " kind text, at timestamptz);"
        "INSERT INTO variants VALUES (7, 'img_gen', 'done', 'a'), (8, 'img_gen', 'done', 'b')"
    )
    site.stage = Stage("vlm_analyze", ("img_gen", "done"), table="public.variants", id="variant_id",
                       where="r.kind = %(kind)s", touch="at")  # fmt: skip
    answers = [site.run(({}, json.dumps({"variant_id": n, "kind": "a"}).encode())) for n in (7, 8)]
    assert [answer.status for answer in answers] == [200, 412]
    done = site.database.rows("SELECT status, at IS NOT NULL FROM variants ORDER BY 1")
    assert done == [("done", False), ("done", True)]


AFTERS = ["done", ["img_gen", "done"], [["img_gen", "done"]], (("img_gen", "done"),), (), [], None]


@pytest.mark.parametrize("after", AFTERS, ids=repr)
def test_state_that_no_row_can_be_in_is_refused(after):
    with pytest.raises(ValueError, match=r"Stage\('s'\): after=.* allowed is \(step, status\), or"):
        Stage("s", after)


# --- what is not taken ---------------------------------------------------------------------


@pytest.mark.parametrize(("body", "status", "error"), [
    (b"[]", 422, "a JSON object with job_id"),
    (b"{", 422, "a JSON object with job_id"),
    (b'{"tenant_id": "tenant"}', 422, "a JSON object with job_id"),
    (b"[" * 100_000, 422, "a JSON object with job_id"),
    (b'{"job_id": "a\\u0000b"}', 422, "NUL"),
    (b'{"job_id": "a\\ud800b"}', 422, "half of a surrogate pair"),
    (b'{"job_id": "x", "tenant_id": "a\\u0000b"}', 422, "NUL"),
    (b'{"job_id": "x", "tenant_id": "a\\ud800b"}', 422, "half of a surrogate pair"),
    (b'{"job_id": "no uuid", "tenant_id": "tenant"}', 422, "invalid input syntax"),
    (b'{"job_id": "2f8f3c51-5d0e-4c57-9d0c-6c6f1f0f3a52"}', 422, "no row of jobs has this job_id"),
])  # fmt: skip
def test_request_that_names_no_row_is_about_the_job(site, body, status, error):
    answer = site.run(({"idempotency-key": "k"}, body))
    assert answer.status == status and error in answer.body.decode()
    assert site.database.value("SELECT count(*) FROM stage_requests") == 0


@pytest.mark.parametrize(("step", "state", "status", "error"), [
    ("vlm_analyze", "running", 409, "another request works on this row"),
    ("vlm_analyze", "done", 412, "in (vlm_analyze, done); vlm_analyze needs (img_gen, done)"),
    ("img_gen", "queued", 412, "the row is in (img_gen, queued)"),
])  # fmt: skip
def test_row_in_another_state_is_not_taken_by_a_key_that_is_not_known(
    site, step, state, status, error
):
    answer = site.run(site.request(site.database.add_job(step, state)))
    assert (answer.status, error in answer.body.decode()) == (status, True)


def test_row_of_another_tenant_is_not_taken(site):
    answer = site.run(site.request(site.database.add_job(tenant="other")))
    assert answer.status == 412 and "tenant_id" in answer.body.decode()


def test_key_of_another_row_is_not_taken_for_its_repeat(site):
    site.run(site.request(site.database.add_job(), "k"))
    answer = site.run(site.request(site.database.add_job(), "k"))
    assert answer.status == 422 and b"another request" in answer.body


def test_install_needs_no_privilege_where_the_table_is_there(site):
    site.make(lambda: psycopg2.connect(site.database.dsn, options="-c role=pg_monitor")).install()


def test_without_the_table_the_error_names_it(site):
    site.database.rows("ALTER TABLE stage_requests RENAME TO elsewhere")
    try:
        with pytest.raises(psycopg2.errors.UndefinedTable, match="stage_requests"):
            site.run(site.request(site.database.add_job()))
    finally:
        site.database.rows("ALTER TABLE elsewhere RENAME TO stage_requests")


def test_state_that_the_column_cannot_hold_is_no_fault_of_the_job(site):
    site.database.rows(
        "DROP TABLE IF EXISTS typed; DROP TYPE IF EXISTS state; CREATE TYPE state AS ENUM ('done');"
        "CREATE TABLE typed (job_id int PRIMARY KEY, current_step text, status state);"
        "INSERT INTO typed VALUES (7, 'img_gen', 'done')"
    )
    site.stage = Stage("vlm_analyze", ("img_gen", "done"), table="typed", where="true")
    with pytest.raises(psycopg2.errors.InvalidTextRepresentation, match="running"):
        site.run(site.request("7"))
    assert site.run(site.request("no number")).status == 422


def test_database_that_is_away_is_asked_for_patience(site, monkeypatch):
    monkeypatch.setattr("receiver.receiver.PATIENCE_TO_TAKE", 0)
    away = site.make(lambda: psycopg2.connect("host=127.0.0.1 port=1"))
    assert site.run(site.request(site.database.add_job()), receiver=away).status == 503


def test_pool_that_has_no_connection_left_is_waited_for(site, monkeypatch):
    pool = psycopg2.pool.ThreadedConnectionPool(1, 1, site.database.dsn)
    taken, job = [], site.database.add_job()

    def connect():
        try:
            return pool.getconn()
        except psycopg2.pool.PoolError:
            pool.putconn(taken.pop())  # somebody gives one back: the next attempt gets it
            raise

    def work(job):
        taken.append(pool.getconn())
        return site.work(job)

    site.receiver = site.make(connect, release=pool.putconn, lost_after=900)
    assert site.run(site.request(job), work).status == 200 and site.effects(job) == 1
    monkeypatch.setattr("receiver.receiver.PATIENCE_TO_TAKE", 0)
    full = site.make(pool.getconn, release=pool.putconn)
    pool.getconn()
    answer = site.run(site.request(site.database.add_job()), receiver=full)
    assert answer.status == 503 and "exhausted" in answer.body.decode()
    pool.closeall()


# --- at the same time ----------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 8])
@BOTH
def test_of_many_requests_at_once_one_has_effects(site, stage, keys):
    site.stage, job = stage, site.database.add_job()
    requests = [site.request(job, f"k{n % keys}") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(site.run, requests))
    assert 200 in [answer.status for answer in answers]
    assert {answer.status for answer in answers} <= {200, 409, 412}
    assert (site.effects(job), site.database.state(job)) == (1, ("vlm_analyze", "done"))


class Stopped:
    """A request whose work waits in a thread until go() is called."""

    def __init__(self, site, request, receiver=None):
        self.works, self.released, self.site = Event(), Event(), site
        self.pool = ThreadPoolExecutor(1)
        self.answer = self.pool.submit(site.run, request, self.work, receiver)
        assert self.works.wait(PATIENCE)

    def work(self, job):
        self.works.set()
        self.released.wait(PATIENCE)
        return self.site.work(job)

    def go(self):
        self.released.set()
        self.pool.shutdown()
        return self.answer.result()


@BOTH
def test_repeat_takes_over_once_the_session_of_the_first_is_gone(site, stage):
    site.stage, job = stage, site.database.add_job()
    request = site.request(job)
    first = Stopped(site, request)
    assert site.run(request).status == 409
    site.cut()
    assert site.run(request).status == 200
    assert first.go().status == 200 and len(site.worked) == 2
    assert (site.effects(job), site.database.state(job)) == (1, ("vlm_analyze", "done"))


def test_no_timeout_of_the_database_ends_the_session_that_is_idle_while_the_work_runs(site):
    if site.database.server.version < 14:
        pytest.skip("PostgreSQL 14 has idle_session_timeout")
    made, job = [], site.database.add_job()

    def connect():
        made.append(psycopg2.connect(site.database.dsn, options="-c idle_session_timeout=1h"))
        return made[-1]

    def work(taken):
        with made[0].cursor() as cursor:
            cursor.execute("SHOW idle_session_timeout")
            assert cursor.fetchone() == ("0",)
        return site.work(taken)

    assert site.run(site.request(job), work, site.make(connect)).status == 200


def test_connection_that_keeps_no_lock_is_told_of(site, caplog):
    """As that of a pooler in transaction mode, which goes on with another session."""
    made, job = [], site.database.add_job()

    def connect():
        made.append(site.connect())
        return made[-1]

    def work(taken):
        with made[0].cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock_all()")
        return site.work(taken)

    assert site.run(site.request(job), work, site.make(connect)).status == 200
    assert "kept no lock: behind a pooler in transaction mode" in caplog.text


@BOTH
def test_without_sessions_a_repeat_takes_over_once_it_is_late(site, stage):
    site.stage, job = stage, site.database.add_job()
    site.receiver = site.make(lost_after=900)
    request = site.request(job)
    first = Stopped(site, request)
    assert site.run(request).status == 409
    until(lambda: site.sessions("true") == 0, "no session while it works")
    site.database.rows("UPDATE stage_requests SET started_at = now() - interval '901 s'")
    assert site.run(request).status == 200
    assert first.go().status == 200 and site.effects(job) == 1


def test_work_on_a_row_that_was_sent_back_is_void(site):
    job = site.database.add_job()
    first = Stopped(site, site.request(job))
    site.database.move(job, "img_gen", "done")
    second = Stopped(site, site.request(job))
    answer = first.go()
    assert (answer.status, site.effects(job)) == (409, 0)
    assert site.database.state(job) == ("vlm_analyze", "running")
    assert (second.go().status, site.effects(job)) == (200, 1)


@BOTH
def test_work_on_a_row_that_was_cancelled_writes_nothing(site, stage):
    site.stage, job = stage, site.database.add_job()
    request = site.request(job)
    stopped = Stopped(site, request)
    site.database.move(job, "img_gen", "cancelled")
    assert (stopped.go().status, site.effects(job)) == (412, 0)
    assert site.database.state(job) == ("img_gen", "cancelled")
    assert site.remembered(request).state == "abandoned"


# --- what was lost with its process -----------------------------------------------------------


def lose(site, job) -> None:
    """A request that takes the job, and whose process dies."""
    site.receiver.begin(site.stage, *site.request(job))
    site.cut()


@pytest.mark.parametrize("set_back", ["0", "1 day"])
def test_recover_sends_back_what_was_lost_and_leaves_alone_what_is_worked_on(set_back, site):
    """Also where the clock was set back since."""
    lost, alive = site.database.add_job(), site.database.add_job()
    lose(site, lost)
    stopped = Stopped(site, site.request(alive))
    site.database.rows("UPDATE stage_requests SET started_at = started_at + interval %s", set_back)
    assert site.receiver.recover(ANALYZE) == 1
    assert site.database.state(lost) == ("img_gen", "done")
    assert site.database.owed(lost).stage == "vlm_analyze"
    assert site.database.state(alive) == ("vlm_analyze", "running")
    assert stopped.go().status == 200


def test_recover_does_not_count_a_row_that_was_moved_meanwhile(site, caplog):
    job = site.database.add_job()
    lose(site, job)
    site.database.move(job, "img_gen", "cancelled")
    assert site.receiver.recover(ANALYZE) == 0 and "lost with its process" not in caplog.text
    assert site.database.state(job) == ("img_gen", "cancelled")
    assert site.database.value("SELECT state FROM stage_requests") == "abandoned"


KEPT = "ALTER TABLE jobs ADD CONSTRAINT kept CHECK (job_id <> '{}' OR status = 'running') NOT VALID"


def test_row_that_cannot_be_sent_back_keeps_no_other_from_it(site, caplog):
    kept, lost, old = (site.database.add_job() for _ in range(3))
    answered = site.request(old)
    site.run(answered)
    site.database.rows("UPDATE stage_requests SET finished_at = now() - interval '31 days'")
    lose(site, kept), lose(site, lost)
    site.database.rows(KEPT.format(kept))
    try:
        assert site.receiver.recover(ANALYZE) == 1
    finally:
        site.database.rows("ALTER TABLE jobs DROP CONSTRAINT kept")
    assert site.database.state(lost) == ("img_gen", "done")
    assert f"vlm_analyze {kept} cannot be sent back: CheckViolation" in caplog.text
    assert site.remembered(answered) is None
    assert site.receiver.recover(ANALYZE) == 1


def test_row_that_somebody_has_locked_is_tried_once_and_keeps_no_other_from_being_sent_back(
    site, caplog
):
    locked, lost = site.database.add_job(), site.database.add_job()
    lose(site, locked), lose(site, lost)
    executed = []

    class Listed(psycopg2.extensions.cursor):
        def execute(self, statement, values=None):
            executed.append(statement)
            super().execute(statement, values)

    receiver = site.make(lambda: psycopg2.connect(site.database.dsn, cursor_factory=Listed))
    with closing(psycopg2.connect(site.database.dsn)) as other, other.cursor() as cursor:
        cursor.execute("SELECT FROM jobs WHERE job_id = %s FOR UPDATE", [locked])
        assert receiver.recover(ANALYZE) == 1
    assert site.database.state(lost) == ("img_gen", "done")
    assert f"vlm_analyze {locked} cannot be sent back: LockNotAvailable" in caplog.text
    assert executed.count(ABANDON) == 2
    assert receiver.recover(ANALYZE) == 1


def test_row_whose_process_dies_again_and_again_is_set_failed_until_a_person_sends_it_back(site):
    job = site.database.add_job()
    site.receiver = site.make(most_deaths=2)
    for state in (("img_gen", "done"), ("img_gen", "done"), ("vlm_analyze", "failed")):
        lose(site, job)
        site.receiver.recover(ANALYZE)
        assert site.database.state(job) == state
    site.database.move(job, "img_gen", "done")
    lose(site, job)
    site.receiver.recover(ANALYZE)
    assert site.database.state(job) == ("img_gen", "done")


def test_deaths_before_a_row_was_done_do_not_count_when_it_comes_again(site):
    job = site.database.add_job()
    site.receiver = site.make(most_deaths=1)
    for _ in range(3):
        lose(site, job)
        site.receiver.recover(ANALYZE)
        assert site.database.state(job) == ("img_gen", "done")
        assert site.run(site.request(job)).status == 200
        site.database.move(job, "img_gen", "done")


def test_watch_recovers_by_itself_again_and_again(site):
    over = site.receiver.watch(ANALYZE, every=0.01)
    try:
        for _ in range(2):
            job = site.database.add_job()
            lose(site, job)
            back = "SELECT current_step = 'img_gen' FROM jobs WHERE job_id = %s"
            site.database.wait_for(back, job)
    finally:
        over.set()


def test_old_answers_are_forgotten(site):
    old, new = (site.request(site.database.add_job()) for _ in range(2))
    site.run(old), site.run(new)
    site.database.rows("UPDATE stage_requests SET finished_at = now() - interval '31 days'"
                       " WHERE key = %s", old[0]["Idempotency-Key"])  # fmt: skip
    site.receiver.recover()
    assert site.remembered(old) is None and site.remembered(new).state == "done"
    assert site.run(old).status == 412  # what is done is not done again


# --- at every moment -----------------------------------------------------------------------


def cut(site, request, moment, wire):
    wire.cut()


def repeat(site, request, moment, wire):
    site.run(request)


def cut_and_repeat(site, request, moment, wire):
    try:
        wire.cut()
    finally:
        site.run(request)


def cut_and_recover(site, request, moment, wire):
    try:
        wire.cut()
    finally:
        site.receiver.recover(site.stage)


def moments(site) -> int:
    """So many there are in a request that nothing happens to."""
    watched = Watched(site.connect, lambda moment, wire: None)
    assert (
        site.run(site.request(site.database.add_job()), receiver=site.make(watched)).status == 200
    )
    return watched.moment


@pytest.mark.parametrize(("stage", "what"), [
    (ANALYZE, cut), (ANALYZE, repeat), (ANALYZE, cut_and_repeat), (ANALYZE, cut_and_recover),
    (KEEPING, repeat), (KEEPING, cut_and_repeat),
])  # fmt: skip
def test_whatever_happens_at_whichever_moment_there_is_one_effect(site, stage, what):
    site.stage = stage
    for chosen in range(1, moments(site) + 1):
        job = site.database.add_job()
        request = site.request(job)

        def happens(moment, wire, chosen=chosen, request=request):
            if moment == chosen:
                what(site, request, moment, wire)

        answers = [site.run(request, receiver=site.make(Watched(site.connect, happens)))]
        # As the listener would: where the row owes a call still, or again.
        while site.database.state(job) == ("img_gen", "done"):
            answers.append(site.run(request if stage is KEEPING else site.request(job)))
        said = chosen, [answer.status for answer in answers]
        assert (site.effects(job), site.database.state(job)) == (1, ("vlm_analyze", "done")), said
        assert said[1][-1] == 200, said
