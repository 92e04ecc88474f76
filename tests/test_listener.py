"""The loop: its log, its notifications, and when it wakes up."""

import json
import re
from contextlib import closing
from pathlib import Path

from conftest import ROOT
from tcp_proxy import TcpProxy
from waiting import (
    AWAY,
    CLAIM,
    LISTENING,
    RECONNECTING,
    gate,
    terminate_backends,
    until,
    wait_for_call,
    wait_until_idle,
)

import db
import notifications
from demo.stage_server import Answer

ON_TIME = {"SWEEP_INTERVAL": 3600}  # nothing that a test waits for comes from the sweep
DONE = "SELECT count(*) = %s FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"


def events(process) -> list[str]:
    """The messages of the log, without time, level and pid."""
    return [line.split("] ", 1)[1] for line in process.lines]


# --- what it says --------------------------------------------------------------------------


def test_log_of_one_job_tells_its_story_in_order(database, api, listener, tmp_path):
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = listener(database, api=api, **ON_TIME, **locale)
    wait_until_idle(tmp_path)
    job = database.add_job("overlay", "done")
    database.wait_for("SELECT count(*) = 1 FROM stage_attempts")  # the stage may commit earlier
    assert process.stop() == 0
    beginnings = [
        "Job State Listener 시작",
        f"PostgreSQL 연결 성공: {database.environ['DB_HOST']}:{database.environ['DB_PORT']}/",
        "LISTEN 'job_state_changed' 시작",
        f"[LISTENER] Job 상태 변화 감지: job={job} current_step=overlay status=done",
        f"[TRIGGER] 파이프라인 단계 트리거: job={job} stage=vlm_judge attempt=1/5",
        f"파이프라인 단계 실행 성공: job={job} stage=vlm_judge status=200",
        "Job State Listener 중지됨",
    ]
    said = events(process)
    assert len(said) == len(beginnings), process.output
    for event, beginning in zip(said, beginnings, strict=True):
        assert event.startswith(beginning)


def test_failed_call_is_logged_with_its_job_and_what_happens_next(database, api, listener):
    answers = iter([Answer(500, b"out of memory\nforged line"), Answer(400, b"no such image")])
    api.on("vlm_judge", lambda _request: next(answers))
    process = listener(database, api=api)
    job = database.add_job("overlay", "done")
    first = process.wait_for_line("파이프라인 단계 실행 실패")
    last = process.wait_for_line("파이프라인 단계 실행 실패", count=2)
    assert f"job={job} stage=vlm_judge attempt=1/5 error=HTTP 500: out of memory\\nforged" in first
    assert "WARNING" in first and "재시도" in first
    assert "attempt=2/5 error=HTTP 400: no such image → 포기 (취소되지 않고 Job이" in last
    assert last.endswith(f": ./jsl retry {job}")
    assert "ERROR" in last


def test_job_that_moved_on_unseen_is_skipped_and_logged(database, api, listener):
    job = database.add_job("overlay", "done")
    database.rows("SET session_replication_role = replica")  # no trigger sees this
    database.move(job, "overlay", "failed")
    process = listener(database, api=api)
    assert job in process.wait_for_line("Job 상태가 변경되어 스킵")
    database.wait_for("SELECT outcome = 'skipped' FROM stage_attempts WHERE job_id = %s", job)
    assert database.owed(job) is None
    assert not api.calls()


def test_lost_connection_is_logged_with_the_delay_until_the_next_attempt(
    database, api, listener, tmp_path
):
    process = listener(database, api=api, **ON_TIME)
    wait_until_idle(tmp_path)
    terminate_backends(database)
    process.wait_for_line(LISTENING, count=2)
    error, again, connected, listening = events(process)[3:]
    assert error.startswith("리스너 오류 발생: ConnectionLost: ")
    assert again.startswith("재연결 시도: 0.")
    assert connected.startswith("PostgreSQL 연결 성공")
    assert listening == LISTENING


# --- what it hears -------------------------------------------------------------------------


def test_listens_before_the_first_look_for_due_calls(database, api, listener):
    with TcpProxy(database.environ) as proxy:
        looked = proxy.hold_answer(CLAIM)
        listener(database, api=api, **proxy.settings, **ON_TIME)
        looked.wait()
        database.add_job("overlay", "done")
        looked.release()
        database.wait_for(DONE, 1)
        order = b"".join(proxy.requests)
        assert order.index(b'LISTEN "job_state_changed"') < order.index(CLAIM.encode())


def test_notification_read_with_the_answer_to_a_statement_is_not_slept_over(
    database, api, listener
):
    with TcpProxy(database.environ) as proxy:
        asked = proxy.hold_answer(CLAIM)
        listener(database, api=api, **proxy.settings, **ON_TIME)
        asked.wait()
        database.add_job("overlay", "done")
        asked.wait_for("job_state_changed")
        asked.release()
        database.wait_for(DONE, 1)


# The job becomes due during a statement that comes after the claim and says nothing of it.
DUE_MEANWHILE = """
import sys
sys.path.insert(0, {root!r})
import claiming, db, listener, ops
listener.LONGEST_SLEEP = 3600
ask_when = claiming.Claiming.ask_when
def ask(self, conn):
    ask_when(self, conn)
    db.execute(conn, "UPDATE jobs SET status = 'done' WHERE status = 'waiting'")
claiming.Claiming.ask_when = ask
ops.main(listener.cli)
"""


def test_notification_read_by_any_other_statement_is_not_slept_over(
    database, api, listener, tmp_path
):
    job = database.add_job("img_gen", "waiting")
    program = tmp_path / "due_meanwhile.py"
    program.write_text(DUE_MEANWHILE.format(root=str(ROOT)))
    listener(database, api=api, program=program, **ON_TIME)
    api.wait_for(lambda api: api.calls(job_id=job))


def test_burst_of_notifications_is_heard_to_its_end(database, api, listener, tmp_path):
    process = listener(database, api=api, LOG_LEVEL="DEBUG", **ON_TIME)
    wait_until_idle(tmp_path)
    database.rows(
        "SELECT pg_notify('job_state_changed', json_build_object('job_id', n, 'tenant_id', 't',"
        " 'current_step', 'elsewhere', 'status', 'done')::text) FROM generate_series(1, 5000) AS n"
    )
    process.wait_for_line("Job 상태 변화 감지", count=5000)
    database.add_job("overlay", "done")
    database.wait_for(DONE, 1)


def test_hear_takes_every_notification_and_keeps_none(database):
    with closing(db.connect(database.settings())) as conn:
        notifications.listen(conn)
        heard = []
        for _ in range(4):
            database.rows(
                "SELECT pg_notify(%s, n || repeat('x', 1000)) FROM generate_series(1, 5000) AS n",
                db.CHANNEL,
            )
            # A statement of ours reads what has arrived: it must not be lost on the way.
            db.execute(conn, "SELECT 1")
            heard += notifications.hear(conn)
            assert not conn.notifies
        until(
            lambda: heard.extend(notifications.hear(conn)) or len(heard) >= 20_000,
            "all notifications",
        )
        assert len(heard) == 20_000


HUGE = json.dumps({"job_id": "x" * 7900})
MALFORMED = [
    "",
    "not JSON",
    "null",
    "17",
    '"a string"',
    "[1, 2]",
    "{}",
    '{"job_id": 1}',
    '{"job_id": 1, "current_step": ["img_gen"], "status": {"done": 1}}',
    "[" * 7900,
    "1" * 7900,
    HUGE,
    "\x01\x1b[31m\r\n2025-01-01 00:00:00 INFO [1] forged",
]


def test_malformed_notifications_are_logged_and_skipped(database, api, listener, tmp_path):
    process = listener(database, api=api, **ON_TIME)
    wait_until_idle(tmp_path)
    for payload in MALFORMED:
        database.rows("SELECT pg_notify('job_state_changed', %s)", payload)
    process.wait_for_line("알 수 없는 NOTIFY 무시", count=len(MALFORMED))
    database.add_job("overlay", "done")
    database.wait_for(DONE, 1)
    assert RECONNECTING not in process.output
    assert "\\x01\\x1b[31m\\r\\n2025-01-01 00:00:00 INFO [1] forged" in process.output
    assert max(map(len, process.lines)) < 500


def test_notification_with_strange_values_is_one_line(database, api, listener, tmp_path):
    process = listener(database, api=api, **ON_TIME)
    wait_until_idle(tmp_path)
    said = {"job_id": "a\nb\ud800", "current_step": "img_gen", "status": "done"}
    database.rows("SELECT pg_notify('job_state_changed', %s)", json.dumps(said))
    assert "job=a\\nb" in process.wait_for_line("[LISTENER] Job 상태 변화 감지")
    assert process.stop() == 0
    assert not api.calls()


# --- when it wakes up ----------------------------------------------------------------------


def test_retry_wakes_an_idle_worker(database, api, listener, tmp_path):
    api.on("vlm_judge", lambda _request: Answer(400))
    process = listener(database, api=api, **ON_TIME)
    job = database.add_job("overlay", "done")
    process.wait_for_line("포기")
    wait_until_idle(tmp_path)
    api.on("vlm_judge", None)
    assert listener(database, "retry", job).wait() == 0
    database.wait_for(DONE, 1)
    assert process.output.count("Job 상태 변화 감지") <= 1  # nobody pretended that the job changed


def test_next_attempt_is_made_at_its_time_and_not_at_the_sweep(database, api, listener):
    answers = iter([Answer(500), Answer(500)])
    api.on("vlm_judge", lambda _request: next(answers, None))
    listener(database, api=api, **ON_TIME)
    job = database.add_job("overlay", "done")
    database.wait_for(DONE, 1)
    assert [call.headers["X-Attempt"] for call in api.calls(job)] == ["1", "2", "3"]


def test_end_of_a_hold_wakes_an_idle_worker(database, api, listener):
    answers = iter([Answer(503)])
    api.on("vlm_judge", lambda _request: next(answers, None))
    listener(database, api=api, **ON_TIME)
    job = database.add_job("overlay", "done")
    settled = "SELECT array_agg(outcome ORDER BY attempt) FROM stage_attempts WHERE job_id = %s"
    database.wait_for(f"SELECT ({settled}) = ARRAY['held', 'succeeded']", job)


def test_sweep_finds_a_call_whose_notification_was_lost(database, api, listener, tmp_path):
    process = listener(database, api=api, SWEEP_INTERVAL=0.1)
    wait_until_idle(tmp_path)
    database.rows("SET session_replication_role = replica")  # no trigger, so no notification
    job = database.add_job("overlay", "done")
    database.rows(
        "INSERT INTO stage_calls (job_id, tenant_id, current_step, status, stage)"
        " VALUES (%s, 'tenant', 'overlay', 'done', 'vlm_judge')",
        job,
    )
    database.wait_for(DONE, 1)
    assert "Job 상태 변화 감지" not in process.output


# --- refusing to start ---------------------------------------------------------------------


def test_missing_tables_refuse_the_start(empty_database, listener):
    process = listener(empty_database)
    assert process.wait() == 2
    assert "make trigger" in process.lines[-1]
    assert "Traceback" not in process.output


def test_different_routes_refuse_the_start(database, api, listener):
    database.rows("UPDATE pipeline_stages SET stage = 'renamed' WHERE stage = 'planner'")
    database.rows("DELETE FROM pipeline_stages WHERE stage = 'overlay'")
    process = listener(database, api=api)
    assert process.wait() == 2
    line = process.lines[-1]
    assert "(./jsl install)" in line and "make trigger" in line
    assert "planner in demo/five_stages.py, renamed in the database" in line
    assert "overlay in demo/five_stages.py, nothing in the database" in line


# --- a database that is not there yet ------------------------------------------------------


def test_database_down_at_start_is_waited_for_and_logged_once(own_server, make_database, listener):
    database = make_database(own_server)
    job = database.add_job()
    own_server.embedded.stop()
    process = listener(database, JOB_STATE_LISTENER_RECONNECT_DELAY=0.1)
    process.wait_for_line("(8번째)")
    assert process.output.count("리스너 오류 발생") == 1
    assert re.findall(r"\((\d+)번째\)", process.output)[:4] == ["1", "2", "4", "8"]
    own_server.embedded.start()
    process.wait_for_line(f"[TRIGGER] 파이프라인 단계 트리거: job={job}")
    database.conn = database.connect()


def test_job_that_finished_while_the_connection_was_lost_is_called(
    database, api, listener, tmp_path
):
    process = listener(database, api=api, SWEEP_INTERVAL=3600)
    wait_until_idle(tmp_path)
    allow = "UPDATE pg_database SET datallowconn = %s WHERE datname = current_database()"
    database.rows(allow, False)
    terminate_backends(database)
    process.wait_for_line(RECONNECTING)
    job = database.add_job("overlay")
    database.rows(allow, True)
    process.wait_for_line(f"[TRIGGER] 파이프라인 단계 트리거: job={job}")


def test_stop_does_not_wait_for_the_reconnect_delay(database, listener):
    process = listener(database, JOB_STATE_LISTENER_RECONNECT_DELAY=3600, **AWAY)
    process.wait_for_line(RECONNECTING)
    assert process.stop() == 0
    assert "중지 요청" not in process.output  # no call is under way


def test_listener_ends_soon_after_a_newer_program_has_installed(database, api, listener):
    job = database.add_job()
    with gate(api):
        process = listener(database, "run", "--workers", "1", api=api,
                           program=Path(__file__).with_name("short_rounds.py"))  # fmt: skip
        wait_for_call(api, job)  # no worker is idle
        database.rows("UPDATE job_state_listener_schema SET version = 99")
        process.wait_for_line("version 99, newer than this program")
    assert process.wait() == 2
    assert [one.outcome for one in database.attempts(job)] == ["succeeded"]
