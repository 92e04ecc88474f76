"""The turns of a listener with its workers: fair, prompt, cheap, and without losses."""

import contextlib
import math
import signal
import time
from collections import Counter
from itertools import pairwise

import psycopg2
import pytest
from asynchronous import PIPELINE
from claims import (
    LEASE_OVER,
    SHORT_WAIT,
    STAGES,
    claim,
    claim_many,
    result,
    set_clock_back,
    settle,
    wanted,
)
from conftest import ROOT
from faults.test_claims import with_idle_worker, with_idle_workers
from raw_server import OK, in_turn
from stage_functions import COMPUTE, POST, program
from variants import PIPELINE as OF_TWO_TABLES
from variants import TABLE, VARIANTS, install, stage
from waiting import PATIENCE, gate, until, wait_for_call

import calls
import db
import joins
import looks
import moves
import one_by_one
import trigger
from claiming import LATELY
from demo.stage_server import Answer
from listener import LONGEST_SLEEP
from looks import APART_MOST_FOUND, FAILED, Look
from ops.table import clock
from pipeline import Pool, Table, limits

STAGE = "vlm_judge"
SUCCEEDED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND outcome = 'succeeded'"


def test_idle_workers_take_all_that_is_due_of_one_stage_in_one_turn(database, api, listener):
    jobs = [database.add_job("overlay") for _ in range(3)]
    with gate(api, STAGE, Answer(200)):
        listener(database, "run", "--workers", "3", api=api, SWEEP_INTERVAL=3600)
        api.wait_for(lambda api: len(api.calls()) == 3)
        assert database.value("SELECT count(DISTINCT started_at) FROM stage_leases") == 1
    assert sorted(call.job_id for call in api.calls()) == sorted(jobs)


def test_stage_with_a_long_queue_leaves_an_idle_worker_to_another(database, caller):
    for step in ("img_gen",) * 8 + ("overlay",):
        database.add_job(step)
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_workers(claiming.listener, 4)
    claimed = Counter(call.stage for call in listener.settle_and_claim(claiming.conn))
    assert claimed == {"vlm_analyze": 3, STAGE: 1}


def test_accepted_call_is_on_record_while_the_next_stage_function_computes(
    database, api, listener, tmp_path
):
    body = f"if call.tenant_id == 'endless':\n    os.write(1, b'computing\\n'); {COMPUTE}\n{POST}"
    process = listener(database, "run", "--workers", "1", api=api,
                       program=program(tmp_path, body, 600))  # fmt: skip
    first = database.add_job("overlay")
    wait_for_call(api, first)
    database.add_job("overlay", tenant="endless")
    process.wait_for_line("computing")
    database.wait_for(SUCCEEDED, first)
    assert database.owed(first) is None


UNDER_WAY = "SELECT count(*) FROM stage_leases WHERE stage = 'vlm_analyze' AND NOT unanswered"


def test_stage_that_does_not_answer_has_one_worker_until_it_answers(database, api, listener):
    with gate(api):
        process = listener(database, "run", "--workers", "3", api=api, STAGE_TIMEOUT=2)
        for _ in range(8):
            database.add_job()
        process.wait_for_line("파이프라인 단계 실행 실패", count=3)
        for _ in range(3):
            job = database.add_job("overlay")
            database.wait_for(SUCCEEDED, job)
            assert database.value(UNDER_WAY) <= 1
    database.wait_for("SELECT count(*) = 0 FROM stage_calls WHERE stage = 'vlm_analyze'")


FORGOTTEN = """
DELETE FROM stage_attempts;
INSERT INTO stage_calls (job_id, tenant_id, call_id, created_at, current_step, status, stage)
OVERRIDING SYSTEM VALUE VALUES (%s, 'tenant', %s, {}, 'overlay', 'done', 'vlm_judge');
"""


def test_call_that_a_new_primary_forgot_is_not_repeated(database, api, listener, tmp_path):
    with gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, api=api, SWEEP_INTERVAL=3600)
        job = database.add_job("overlay")
        wait_for_call(api, job)
        owed = database.owed(job)
        opened.set()
        database.wait_for(SUCCEEDED, job)
        database.wait_for(SUCCEEDED, database.add_job("overlay"))  # one more to remember
    database.rows(FORGOTTEN.format("%s") + db.WAKE, job, owed.call_id, owed.created_at)
    assert job in process.wait_for_line("이미 수락된 호출이라 스킵")
    database.wait_for("SELECT outcome = 'skipped' FROM stage_attempts WHERE job_id = %s", job)
    assert database.owed(job) is None
    assert len(api.calls(job)) == 1

    # A new call that has got the number of one that is gone.
    database.rows(FORGOTTEN.format("DEFAULT") + db.WAKE, job, owed.call_id)
    database.wait_for(SUCCEEDED, job)
    assert len(api.calls(job)) == 2


def test_new_call_with_the_number_of_one_under_way_is_made(database, api, listener):
    with gate(api, STAGE, Answer(200)):
        listener(database, "run", "--workers", "2", api=api, SWEEP_INTERVAL=3600)
        job = database.add_job("overlay")
        wait_for_call(api, job)
        call_id = database.owed(job).call_id
        database.rows("DELETE FROM stage_calls; DELETE FROM stage_leases")
        database.rows(FORGOTTEN.format("DEFAULT") + db.WAKE, job, call_id)
        api.wait_for(lambda api: len(api.calls()) == 2)


REFUSE_ONE = """
CREATE FUNCTION refuse_one() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.job_id = '{}' THEN RAISE 'not this one'; END IF; RETURN NEW; END $$;
CREATE TRIGGER refuse_one BEFORE INSERT ON stage_attempts
    FOR EACH ROW EXECUTE FUNCTION refuse_one()
"""


def test_result_that_the_database_refuses_keeps_no_other_from_being_written(
    database, api, listener
):
    refused, *jobs = [database.add_job("overlay") for _ in range(16)]
    database.rows(REFUSE_ONE.format(refused))
    with gate(api, STAGE, Answer(200)) as opened:
        process = listener(database, "run", "--workers", "16", api=api)
        api.wait_for(lambda api: len(api.calls()) == 16)
        process.signal(signal.SIGSTOP)  # so that it takes all answers in one turn
        opened.set()
        api.wait_for(lambda api: all(call.finished for call in api.calls()))
        process.signal(signal.SIGCONT)
    for job in jobs:
        database.wait_for(SUCCEEDED, job)
    process.wait_for_line("not this one")
    # Nobody makes it again meanwhile, however long that lasts; people see what it is.
    database.wait_for("SELECT count(*) = 1 FROM stage_calls")
    assert "do not retry it: not this one" in database.owed(refused).last_error
    assert database.attempts(refused) == []
    database.rows("DROP FUNCTION refuse_one CASCADE")
    database.wait_for(SUCCEEDED, refused)
    assert process.stop() == 0
    assert sorted(call.job_id for call in api.calls()) == sorted([refused, *jobs])
    assert database.value("SELECT count(*) FROM stage_attempts") == 16


TAKE_BACK = (
    "DELETE FROM stage_leases; UPDATE stage_calls SET attempts = 0, worker = NULL,"
    " started_at = NULL, due_at = now()"
)


def test_taken_call_that_a_new_primary_forgot_is_not_repeated_before_its_timeout(
    database, use_pipeline, caller, serve
):
    use_pipeline(PIPELINE)
    install(database, TABLE)
    stage = serve(in_turn(OK.replace(b"200", b"202")))
    calling, job = caller(stage.url), database.add_job()
    calling.run(calling.claim())
    calling.settle()
    database.rows(TAKE_BACK)
    assert calling.claim() is None
    calling.settle()
    assert database.value("SELECT working FROM stage_leases WHERE job_id = %s", job)
    assert len(stage.requests) == 1


REMEMBER = "CREATE TABLE calls AS TABLE stage_calls; CREATE TABLE leases AS TABLE stage_leases"
FORGET = """
DELETE FROM stage_attempts; DELETE FROM stage_calls; DELETE FROM stage_leases;
INSERT INTO stage_calls OVERRIDING SYSTEM VALUE TABLE calls;
INSERT INTO stage_leases TABLE leases
"""


BAD_CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"


@pytest.mark.parametrize("answer", [BAD_CHUNK, OK.replace(b"200", b"202")])
def test_call_whose_end_a_new_primary_forgot_keeps_its_lease(
    database, use_pipeline, caller, serve, answer
):
    use_pipeline(PIPELINE)
    install(database, TABLE)
    calling, job = caller(serve(in_turn(answer)).url), database.add_job()
    calling.run(calling.claim())
    database.rows(REMEMBER)
    calling.settle()
    database.rows(FORGET)
    calling.listener.give_back(calling.conn)
    assert database.value("SELECT leased_until > now() FROM stage_leases WHERE job_id = %s", job)
    database.rows(LEASE_OVER)
    calling.listener.give_back(calling.conn)
    assert [ended.outcome for ended in calls.reap(calling.conn)] == ["lost"]


def test_call_under_way_that_a_new_primary_forgot_is_not_made_beside_itself(
    database, api, listener
):
    with gate(api, STAGE, Answer(200)) as opened:
        listener(database, api=api, SWEEP_INTERVAL=3600)
        job = database.add_job("overlay")
        wait_for_call(api, job)
        database.rows(TAKE_BACK)
        database.rows(db.WAKE)
        database.wait_for("SELECT count(*) = 1 FROM stage_leases")
        opened.set()
        database.wait_for(SUCCEEDED, job)
    assert database.owed(job) is None and len(api.calls(job)) == 1
    assert database.value("SELECT count(*) FROM stage_leases") == 0


def test_turn_in_parts_is_soon_followed_by_another(database, caller, monkeypatch):
    """It claims one call at the most, so that others may be due."""
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_worker(claiming.listener)
    listener.settle_and_claim(claiming.conn)

    def locked(*_args, **_given):
        raise psycopg2.errors.LockNotAvailable("somebody holds the row of a limit")

    monkeypatch.setattr(calls, "run_turn", locked)
    database.add_job()
    listener.claiming.claim_at = 0.0
    assert listener.settle_and_claim(claiming.conn) == []
    assert listener.next_turn < time.monotonic() + 2 and not listener.nothing_due
    monkeypatch.undo()
    listener.claiming.claim_at = 0.0
    assert len(listener.settle_and_claim(claiming.conn)) == 1


RENAME = "ALTER TABLE jobs_variants RENAME status TO state"
MEND = "ALTER TABLE jobs_variants RENAME state TO status"


@pytest.fixture
def two_tables(database, use_pipeline, caller):
    """A Caller with an idle worker; calls of jobs are due, and calls of jobs_variants before."""
    use_pipeline(OF_TWO_TABLES)
    rows = install(database, TABLE)
    jobs = [database.add_job() for _ in range(3)]
    rows.add(jobs[0], status="done", count=2)
    database.rows("UPDATE stage_calls SET due_at = now() - interval '1 hour'"
                  " WHERE table_name = 'jobs_variants'")  # fmt: skip
    claiming = caller("http://127.0.0.1:1")
    with_idle_worker(claiming.listener)
    return claiming


def stages_of_turns(claiming, turns: int) -> list[str]:
    """The stages of which calls are claimed; each turn looks for some."""
    stages = []
    for _ in range(turns):
        claiming.listener.claiming.claim_at = 0.0
        stages += [call.stage for call in claiming.listener.settle_and_claim(claiming.conn)]
    return stages


def test_table_that_cannot_be_read_keeps_no_call_of_another_waiting(database, two_tables):
    database.rows(RENAME)
    assert stages_of_turns(two_tables, 3) == ["vlm_analyze"] * 3
    assert two_tables.listener.next_turn <= time.monotonic() + LONGEST_SLEEP
    for _ in range(2):
        two_tables.listener.claiming.sweep_at = 0.0
        assert stages_of_turns(two_tables, 1) == []
    assert "stage=yolo_detect column r.status" in two_tables.line("단계의 호출을 가져올 수 없음")
    two_tables.line("한 건씩 다시 시도")
    database.rows(MEND)
    two_tables.listener.claiming.sweep_at = 0.0
    assert stages_of_turns(two_tables, 2) == ["yolo_detect"] * 2


def test_sweep_in_parts_finds_calls_that_a_clock_set_back_delays(database, two_tables):
    database.rows(RENAME)
    set_clock_back(database, 7200)
    two_tables.listener.claiming.put_last("vlm_analyze")
    assert stages_of_turns(two_tables, 1) == ["vlm_analyze"]


def test_table_that_is_locked_keeps_no_call_of_another_waiting(database, two_tables, monkeypatch):
    with contextlib.closing(database.connect()) as change:
        change.autocommit = False
        change.cursor().execute("LOCK TABLE jobs_variants IN ACCESS EXCLUSIVE MODE")
        assert stages_of_turns(two_tables, 3) == ["vlm_analyze"] * 3
        pid = change.info.backend_pid
        why = f"jobs_variants is locked by server process {pid}"
        for _ in range(2):
            two_tables.listener.claiming.sweep_at = 0.0
            assert stages_of_turns(two_tables, 1) == []
            assert two_tables.listener.claiming.unclaimable == {"yolo_detect": why}
        two_tables.line("단계의 호출을 가져올 수 없음")
        assert two_tables.listener.next_turn <= time.monotonic() + LONGEST_SLEEP
        said = f"no call can be claimed of yolo_detect: {why}"
        assert two_tables.listener.doing(two_tables.conn) == said
        with monkeypatch.context() as busy:  # until a worker is idle, nobody asks again
            busy.setattr(two_tables.listener.workers, "all", [])
            seen_at = clock(two_tables.listener.claiming.undone_at)
            assert two_tables.listener.doing(two_tables.conn) == f"{said}, as of {seen_at}"
    two_tables.line("한 건씩 다시 시도")  # the second turn did not wait
    two_tables.listener.claiming.sweep_at = 0.0
    assert stages_of_turns(two_tables, 1) == ["yolo_detect"]


def test_call_is_made_though_it_cannot_be_asked_who_locks_a_table(
    database, two_tables, monkeypatch
):
    def refuse(*_):
        raise psycopg2.errors.QueryCanceled("there are too many locks")

    monkeypatch.setattr("claiming.locked", refuse)
    with contextlib.closing(database.connect()) as change:
        change.cursor().execute("BEGIN; LOCK TABLE jobs_variants IN ACCESS EXCLUSIVE MODE")
        assert stages_of_turns(two_tables, 4) == ["vlm_analyze"] * 3
    assert "lock timeout" in two_tables.listener.claiming.unclaimable["yolo_detect"]


def test_limited_stages_of_a_locked_table_are_known_before_others_have_calls(
    database, use_pipeline, caller
):
    pool = Pool("gpu", 3)
    use_pipeline({
        VARIANTS("img_gen", "done"): limits(max_running=3)(stage("yolo_detect")),
        VARIANTS("yolo_detect", "done"): limits(pool=pool)(stage("iou_eval")),
        ("img_gen", "done"): stage("vlm_analyze"),
    })  # fmt: skip
    rows, parent = install(database, TABLE), database.add_job("x")
    rows.add(parent, "img_gen", "done")
    rows.add(parent, "yolo_detect", "done")
    claiming = caller("http://127.0.0.1:1")
    with_idle_worker(claiming.listener)
    with contextlib.closing(database.connect()) as change:
        change.cursor().execute("BEGIN; LOCK TABLE jobs_variants IN ACCESS EXCLUSIVE MODE")
        assert stages_of_turns(claiming, 1) == []
        assert claiming.listener.claiming.unclaimable.keys() == {"yolo_detect", "iou_eval"}
        claiming.listener.claiming.order.reverse()  # it depends on what each listener has claimed
        claiming.listener.claiming.sweep_at = 0.0
        assert stages_of_turns(claiming, 1) == []
        said = claiming.listener.claiming.undone
        assert said.startswith("claimed of yolo_detect, iou_eval: jobs_variants")
        database.add_job()
        assert stages_of_turns(claiming, 1) == ["vlm_analyze"]
    claiming.line("한 건씩 다시 시도")  # the second turn did not wait


def test_pipeline_whose_only_table_is_locked_keeps_its_connection(database, use_pipeline, caller):
    use_pipeline({("img_gen", "done"): stage("vlm_analyze")})
    install(database)
    database.add_job()
    claiming = caller("http://127.0.0.1:1")
    with_idle_worker(claiming.listener)
    with contextlib.closing(database.connect()) as change:
        change.cursor().execute("BEGIN; LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        assert stages_of_turns(claiming, 2) == []
    assert claiming.listener.next_turn <= time.monotonic() + LONGEST_SLEEP
    claiming.listener.claiming.sweep_at = 0.0
    assert stages_of_turns(claiming, 1) == ["vlm_analyze"]


def test_parts_that_are_locked_take_no_longer_than_their_limit(database, monkeypatch):
    monkeypatch.setattr(db, "PARTS_LIMIT", -1.0)
    asked = []

    def ask(_, part=None):
        asked.append(part)
        raise psycopg2.errors.LockNotAvailable("a table is locked")

    answers, failed = db.in_parts(None, ask, ["a", "b"])
    assert (asked, answers, [*failed]) == ([None], [], [""])


@pytest.mark.parametrize(("parts", "limit"), [(["a"], 10.0), (["a", "b"], -1.0)])
def test_person_does_not_wait_again_for_each_part_that_is_slow(monkeypatch, parts, limit):
    monkeypatch.setattr(db, "SLOW_PARTS_LIMIT", limit)
    asked = []

    def ask(_, part=None):
        asked.append(part)
        raise psycopg2.errors.QueryCanceled("statement timeout")

    answers, failed = db.in_parts(None, ask, parts, all_parts=True)
    assert (asked, answers, {*failed}) == ([None], [], {*parts})


def test_result_is_settled_though_no_call_can_be_claimed(database, two_tables):
    listener = two_tables.listener
    call = two_tables.claim()
    database.rows(RENAME + "; DELETE FROM stage_calls WHERE table_name = 'jobs' AND worker IS NULL")
    two_tables.run(call)
    assert stages_of_turns(two_tables, 1) == [] and not listener.unwritten.results
    assert len(database.attempts(call.job_id)) == 1


BESIDE = """
from pipeline import Pool, limits
from variants import VARIANTS, stage

limited = limits({})
PIPELINE = {{
    VARIANTS("img_gen", "done"): limited(stage("yolo_detect")),
    ("img_gen", "done"): limited(stage("vlm_analyze")),
}}
"""
POOL, LOCK = 'pool=Pool("gpu", 1)', "BEGIN; LOCK TABLE jobs_variants"


@pytest.fixture
def beside(variants, api, run_command, tmp_path):
    """beside(limits): the settings of a pipeline with a stage of each table, which answer 200."""

    def install(limits: str) -> dict[str, str]:
        (tmp_path / "beside.py").write_text(BESIDE.format(limits))
        settings = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}", "PIPELINE_MODULE": "beside"}
        assert run_command(variants.database, "install", **settings).code == 0
        for path in ("/vlm_analyze", "/yolo_detect"):
            api.on(path, lambda _: Answer(200))
        return settings

    return install


@pytest.mark.parametrize(
    ("change", "why", "limits"),
    [(RENAME, "column r.status does not exist", "timeout=9"),
     (LOCK, "jobs_variants is locked by server process", POOL)],
)  # fmt: skip
def test_once_fails_where_a_table_cannot_be_read_after_all_other_calls(
    variants, api, run_command, beside, change, why, limits
):
    settings = beside(limits)
    jobs = {variants.database.add_job() for _ in range(3)}
    variants.add(min(jobs), status="done")
    with contextlib.closing(variants.database.connect()) as session:
        session.cursor().execute(change)
        done = run_command(variants.database, "run", "--once", api=api, **settings)
    assert done.code == 1 and {call.job_id for call in api.calls()} == jobs
    last = done.out.splitlines()[-1]
    assert f"no call can be claimed of yolo_detect: {why}" in last and last.endswith("jsl verify")


LOCK_LIMITS = "BEGIN; SELECT FROM stage_limits FOR UPDATE"


def test_limit_that_stays_locked_keeps_no_call_of_a_stage_without_one_waiting(
    database, use_pipeline, caller
):
    one_at_once = limits(max_running=1)
    use_pipeline({("img_gen", "done"): one_at_once(stage("vlm_analyze")),
                  ("overlay", "done"): stage("vlm_judge")})  # fmt: skip
    install(database)
    database.add_job()
    for _ in range(4):
        database.add_job("overlay")
    claiming = caller("http://127.0.0.1:1")
    with_idle_worker(claiming.listener)
    with contextlib.closing(database.connect()) as session:
        session.cursor().execute(LOCK_LIMITS)
        claiming.listener.claiming.sweep_at = 0.0
        assert stages_of_turns(claiming, 2) == ["vlm_judge"] * 2
        assert claiming.listener.claiming.unclaimable == {
            "vlm_analyze": "the row of its limit in stage_limits is locked by server process "
            f"{session.info.backend_pid}"
        }
        assert stages_of_turns(claiming, 2) == ["vlm_judge"] * 2
        assert len([line for line in claiming.lines if "한 건씩 다시 시도" in line]) == 2
        claiming.listener.claiming.sweep_at = 0.0
        assert stages_of_turns(claiming, 1) == []
    claiming.line("단계의 호출을 가져올 수 없음")
    claiming.listener.claiming.sweep_at = 0.0
    assert stages_of_turns(claiming, 1) == ["vlm_analyze"]


def test_once_ends_though_a_limit_stays_locked(variants, api, run_command, beside):
    settings = beside("max_running=9")
    with contextlib.closing(variants.database.connect()) as session:
        session.cursor().execute(LOCK_LIMITS)
        done = run_command(variants.database, "run", "--once", api=api, **settings)
    assert done.code == 1 and "in stage_limits is locked by server process" in done.lines[-1]


REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '{}'; END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON stage_calls FOR EACH ROW EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize(("code", "refused", "remembered"), [("42501", 2, 2), ("57014", 1, 5)])
def test_turn_in_parts_goes_on_after_a_stage_that_is_refused_unless_it_took_long(
    database, caller, code, refused, remembered
):
    """Of a stage that it has not asked, it is remembered that no call can be claimed."""
    database.add_job()
    database.add_job("overlay")
    database.rows(REFUSE.format(code))
    caller = caller("http://127.0.0.1:1")
    turn = one_by_one.run_turn_in_parts(caller.conn, [], wanted(), 4, "w")
    assert [error.pgcode for error in turn.unclaimable.values()] == [code] * refused
    caller.listener.claiming.unclaimable = dict.fromkeys(STAGES, "its table is locked")
    caller.listener.claiming.note_unclaimable(caller.conn, turn)
    assert len(caller.listener.claiming.unclaimable) == remembered


SAY_WAIT = "BEGIN RAISE SQLSTATE '55P03' USING MESSAGE = current_setting('lock_timeout');"


def test_turn_in_parts_waits_once_for_a_locked_table(database, caller):
    read = database.value("SELECT pg_get_functiondef('stage_call_row'::regproc)")
    database.rows(read.replace("BEGIN", SAY_WAIT, 1))
    turn = one_by_one.run_turn_in_parts(caller("http://127.0.0.1:1").conn, [], wanted(), 4, "w")
    waits = [error.diag.message_primary for error in turn.unclaimable.values()]
    assert waits == ["500ms", *["20ms"] * 4]


@pytest.mark.parametrize(
    ("table", "mode"),
    [("stage_calls", "SHARE"), ("stage_calls", "ACCESS EXCLUSIVE"), ("stage_leases", "SHARE")],
)
def test_call_whose_lease_ran_out_while_our_tables_were_locked_is_not_taken_over(
    database, conn, caller, table, mode
):
    """Its result could not be written either."""
    calling, job = caller("http://127.0.0.1:1"), database.add_job()
    listener = with_idle_worker(calling.listener)
    db.execute(calling.conn, SHORT_WAIT)
    accepted = result(claim(conn))

    def turn() -> list:
        listener.claiming.sweep_at = 0.0
        claimed = listener.settle_and_claim(calling.conn)
        listener.upkeep.tasks[0].do(calling.conn)
        return claimed

    with contextlib.closing(database.connect()) as other:
        other.cursor().execute(f"BEGIN; LOCK TABLE {table} IN {mode} MODE")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            settle(conn, accepted)
        other.cursor().execute(LEASE_OVER)
        assert turn() == []
        other.cursor().execute("COMMIT")
    assert turn() == []
    assert settle(conn, accepted)
    assert [(one.attempt, one.outcome) for one in database.attempts(job)] == [(1, "succeeded")]


def test_listener_that_has_not_claimed_lately_extends_a_lease_that_ran_out_once(
    database, conn, caller
):
    """Whatever kept it from that, such as calls of all workers, it has not seen what others met."""
    calling = caller("http://127.0.0.1:1")
    listener = with_idle_workers(calling.listener, 2)

    def claimed_after_a_lost_lease() -> list[str]:
        database.rows(LEASE_OVER)
        listener.claiming.sweep_at = 0.0
        return [call.key for call in listener.settle_and_claim(calling.conn)]

    job = database.add_job()
    claim(conn)
    listener.claiming.claimed_at = time.monotonic() - LATELY
    assert claimed_after_a_lost_lease() == []
    assert claimed_after_a_lost_lease() == [job]
    job = database.add_job()
    claim(conn)
    assert job in claimed_after_a_lost_lease()  # it has just claimed


OTHERS = Table("others", id="job_variants_id", parent=("jobs", "job_id"))
OF_THREE_TABLES = {
    ("img_gen", "done"): limits(asynchronous=True)(stage("vlm_analyze")),
    VARIANTS("img_gen", "done"): limits(asynchronous=True)(stage("yolo_detect")),
    VARIANTS.every("iou_eval", "done"): stage("ad_copy"),
    OTHERS.every("iou_eval", "done"): stage("notify"),
}
WORKED_ON = "SELECT stage FROM stage_leases WHERE working"


def test_once_looks_at_the_joins_of_a_table_until_it_finds_none(database, use_pipeline, caller):
    use_pipeline(OF_THREE_TABLES)
    rows = install(database, TABLE, TABLE.replace("jobs_variants", "others"))
    rows.finish(*rows.add(database.add_job("x")))
    others = "INSERT INTO others SELECT gen_random_uuid(), job_id, 'iou_eval', 'done' FROM jobs;"
    database.rows(others + RENAME)
    calling = caller("http://127.0.0.1:1")
    conn, look = calling.conn, looks.JoinLook(calling.listener.failing, once=True)
    look.run(conn)
    assert look.failure and look.at < math.inf
    assert database.value("SELECT stage FROM stage_calls WHERE join_of <> ''") == "notify"
    look.run(conn)
    assert look.failure and look.at == math.inf


@pytest.mark.parametrize("change", [RENAME, "BEGIN; LOCK TABLE jobs_variants"])
def test_table_that_is_locked_or_unreadable_keeps_no_join_or_end_of_another_waiting(
    database, use_pipeline, caller, change, monkeypatch
):
    monkeypatch.setattr(db, "PARTS_LIMIT", PATIENCE)  # a locked table takes a second of it
    use_pipeline(OF_THREE_TABLES)
    rows = install(database, TABLE, TABLE.replace("jobs_variants", "others"))
    (moved, deleted), parent = [database.add_job() for _ in range(2)], database.add_job("x")
    [row] = rows.add(moved, "img_gen", "done")
    claiming = caller("http://127.0.0.1:1")
    for claimed in claim_many(claiming.conn, 3).claimed:
        settle(claiming.conn, result(claimed, "taken"))
    rows.move(row, "yolo_detect", "done")
    database.rows("DELETE FROM jobs WHERE job_id = %s", deleted)
    rows.finish(*rows.add(parent))
    database.rows("INSERT INTO others (job_id, current_step, status)"
                  " VALUES (%s, 'iou_eval', 'done')", parent)  # fmt: skip
    listener = with_idle_worker(claiming.listener)
    db.execute(claiming.conn, SHORT_WAIT)
    with contextlib.closing(database.connect()) as other:
        other.cursor().execute(change)
        database.move(moved, "vlm_analyze", "done")
        assert stages_of_turns(claiming, 1) == ["notify"]
        assert [found.stage for found in database.rows(WORKED_ON)] == ["yolo_detect"]
    assert "jobs_variants (iou_eval, done): " in claiming.line("조인 확인 실패 (5초 후 다시 시도)")
    assert "jobs_variants: " in claiming.line("작업 완료 확인 실패 (5초 후 다시 시도)")
    if change == RENAME:
        database.rows(MEND)
    listener.join_look.at = listener.move_look.at = 0.0
    assert "ad_copy" in stages_of_turns(claiming, 1)
    assert not database.rows(WORKED_ON)


@pytest.mark.parametrize("change", [RENAME, "BEGIN; LOCK TABLE jobs_variants"])
def test_row_set_failed_is_told_though_a_result_is_of_a_locked_or_unreadable_table(
    database, two_tables, change
):
    under_way = {call.table: call for call in (two_tables.claim() for _ in range(2))}
    job = under_way["jobs"].job_id
    database.move(job, "vlm_analyze", "failed")
    for call in under_way.values():
        refused = trigger.failure(call, "retry", "HTTP 500", 1.0, http_status=500)
        two_tables.listener.keep(call, refused)
    db.execute(two_tables.conn, SHORT_WAIT)
    with contextlib.closing(database.connect()) as other:
        other.cursor().execute(change)
        two_tables.settle()
    assert str(job) in two_tables.line("단계가 failed로 설정함")
    assert "jobs_variants: " in two_tables.line("failed 상태 확인 실패")
    ended = database.rows("SELECT table_name, outcome FROM stage_attempts ORDER BY 1")
    assert [tuple(row) for row in ended] == [("jobs", "failed"), ("jobs_variants", "retry")]


@pytest.fixture
def asked(database, use_pipeline, caller, monkeypatch):
    """A Caller whose listener is asked all the time to look at joins and moves."""
    use_pipeline(PIPELINE)
    install(database, TABLE)
    claiming = caller("http://127.0.0.1:1")
    with_idle_worker(claiming.listener)
    monkeypatch.setattr(claiming.listener.hearing, "hear", lambda _: {db.CHANNEL, db.JOIN_CHANNEL})
    return claiming


@pytest.mark.parametrize("slow", [joins, moves])
def test_slow_looks_leave_most_of_the_time_to_calls(slow, asked, monkeypatch):
    """Sweeps included."""
    look, began, listener = slow.look, [], asked.listener

    def slowly(conn, *_part):
        began.append(time.monotonic())
        db.execute(conn, "SELECT pg_sleep(0.05)")
        return look(conn)

    def turn() -> bool:
        listener.claiming.sweep_at = 0.0
        listener.settle_and_claim(asked.conn)
        listener.hear(asked.conn)
        return len(began) == 3

    monkeypatch.setattr(slow, "look", slowly)
    until(turn, "three looks")
    assert min(later - earlier for earlier, later in pairwise(began)) >= 10 * 0.05


@pytest.mark.parametrize("slow", [joins, moves])
def test_slow_look_that_finds_much_is_soon_followed_by_another(slow, asked, monkeypatch):
    def slowly(conn, *_part):
        db.execute(conn, "SELECT pg_sleep(0.05)")
        return {joins: 500, moves: ([], 500)}[slow]

    monkeypatch.setattr(slow, "look", slowly)
    asked.listener.settle_and_claim(asked.conn)
    look = {joins: asked.listener.join_look, moves: asked.listener.move_look}[slow]
    assert look.at <= time.monotonic()


@pytest.mark.parametrize(("found", "seconds"), [(0, 30.0), (5, APART_MOST_FOUND), (500, 0.05)])
def test_look_that_took_long_rests_the_less_the_more_it_found(found, seconds):
    look, began = Look(True), time.monotonic() - 3.0
    look.rest(began, found)
    assert look.rests_until == began + seconds


def test_look_that_failed_rests_no_longer_than_it_says_however_long_it_took():
    look = Look(True)
    assert look.fail(time.monotonic() - 3.0, 0) <= FAILED


@pytest.mark.parametrize("failing", [joins, moves])
def test_look_that_fails_is_not_made_again_at_once(failing, asked, monkeypatch):
    listener, ended = asked.listener, []

    def fail(conn, _part=None):
        try:
            db.execute(conn, "SELECT pg_sleep(0.05), 1 / 0")
        finally:
            ended.append(time.monotonic())

    monkeypatch.setattr(failing, "look", fail)
    listener.settle_and_claim(asked.conn)
    listener.hear(asked.conn)
    look = {joins: listener.join_look, moves: listener.move_look}[failing]
    assert look.at >= ended[0] + FAILED
    asked.line("5초 후 다시 시도")


def test_look_at_joins_that_fails_as_a_whole_alone_has_not_failed(asked, monkeypatch):
    def fail(_, join=None):
        if join is None:
            raise psycopg2.errors.LockNotAvailable("for a moment")
        return 1

    monkeypatch.setattr(looks.pipeline, "joins", lambda: {"one": None, "two": None})
    monkeypatch.setattr(joins, "look", fail)
    look = asked.listener.join_look
    look.run(asked.conn)
    assert look.at == look.rests_until  # it has found something


@pytest.mark.parametrize("failing", [joins, moves])
def test_once_settles_though_a_look_fails_which_it_says_at_its_end(failing, asked, monkeypatch):
    def fail(conn, _part=None):
        db.execute(conn, "SELECT 1 / 0")

    listener, job = asked.listener, asked.database.add_job()
    listener.keep(call := asked.claim(), trigger.accepted(call, 200))
    listener.join_look.once = listener.move_look.once = True
    monkeypatch.setattr(failing, "look", fail)
    listener.settle_and_claim(asked.conn)
    assert [row.outcome for row in asked.database.attempts(job)] == ["succeeded"]
    look = {joins: listener.join_look, moves: listener.move_look}[failing]
    assert isinstance(look.failure, psycopg2.errors.DivisionByZero) and look.at == math.inf
