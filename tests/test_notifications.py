"""Notifications, which anybody who can connect may send: they are logged as such, or only counted,
and delay no call.
"""

import json
import threading
import time
from contextlib import closing, contextmanager

import psycopg2
import pytest
from caller import logged
from waiting import until, wait_until_idle

import db
import notifications
from notifications import (
    BURST,
    OTHERS_BURST,
    OTHERS_PER_SECOND,
    PER_SECOND,
    Allowance,
    Hearing,
)

NOTIFY = "SELECT count(pg_notify(%s, {})) FROM generate_series(1, %s) AS n"
WORDS = "'words ' || n"
CHANGES = "json_build_object('job_id', n, 'current_step', 'img_gen', 'status', 'done')::text"


@pytest.fixture
def lines_of(database):
    """lines_of(channel, payload, count): the log lines of `count` notifications."""
    settings = database.settings(LOG_LEVEL="DEBUG")
    with logged(settings) as output, closing(db.connect(settings)) as conn:
        state = Hearing(settings)
        state.listen(conn, silent=False)

        def notify(channel: str, payload: str, count: int) -> list[str]:
            said = output.tell()
            database.rows(NOTIFY.format(payload), channel, count)
            heard = []

            def all_heard() -> bool:
                state.hear(conn)
                heard.extend(state.heard)
                state.log()
                return len(heard) >= count

            until(all_heard, f"{count} notifications")
            output.seek(said)
            return output.read().splitlines()

        notify.hearing, notify.conn = state, conn
        yield notify


def test_words_are_shown_as_what_anybody_can_send(database, make_role, lines_of):
    name = make_role(database)
    database.rows(f"SET ROLE {name}")
    [line] = lines_of(db.WAKE_CHANNEL, "'planner paused by root@db'", 1)
    assert " INFO " in line and "누구나 보낼 수 있음" in line
    assert f"서버 프로세스 {database.conn.info.backend_pid}" in line
    database.rows("RESET ROLE")


@pytest.mark.parametrize(
    ("channel", "payload"),
    [(db.WAKE_CHANNEL, WORDS), (db.CHANNEL, WORDS), (db.CHANNEL, CHANGES)],
    ids=["words", "no job", "jobs"],
)
def test_more_than_an_allowance_are_counted_and_not_logged(lines_of, channel, payload):
    lines_of.hearing.changes, lines_of.hearing.others = Allowance(50, 0), Allowance(50, 0)
    *lines, last = lines_of(channel, payload, 500)
    assert len(lines) == 50
    assert "건은 로그에 남기지 않음: 너무 많음" in last


def test_flood_of_other_texts_hides_no_job(lines_of):
    lines_of(db.CHANNEL, WORDS, 5000)
    [line] = [x for x in lines_of(db.CHANNEL, CHANGES, 1) if "감지" in x]
    assert line.endswith("job=1 current_step=img_gen status=done")


def test_burst_of_changes_has_a_line_each(lines_of):
    lines = lines_of(db.CHANNEL, CHANGES, 5000)
    assert sum("Job 상태 변화 감지" in line for line in lines) == 5000


@pytest.mark.parametrize("name", ["job_id", "current_step", "status"])
def test_long_word_is_cut(lines_of, name):
    said = {"job_id": "1", "current_step": "x", "status": "y"} | {name: "z" * 7000}
    [line] = lines_of(db.CHANNEL, f"'{json.dumps(said)}'", 1)
    assert "감지" in line and len(line) < 500


def test_allowance_comes_back_with_time():
    allowance = Allowance(2, 10)
    assert [allowance.use() for _ in range(3)][2] is False
    allowance.looked_at -= 0.15
    assert allowance.use() and not allowance.use()
    allowance.looked_at -= 3600
    assert allowance.use(2) and not allowance.use()


def test_what_one_pass_takes_is_bounded(lines_of, database):
    database.rows(NOTIFY.format("repeat('x', 7900) || n"), db.CHANNEL, 2000)
    passes = []
    until(
        lambda: passes.append(len(notifications.hear(lines_of.conn))) or sum(passes) >= 2000, "all"
    )
    assert max(passes) * 7900 < notifications.ENOUGH_TEXT + 2**23


def test_listener_whose_listen_is_refused_says_so_and_polls(database):
    settings = database.settings()
    with logged(settings) as output, closing(db.connect(settings)) as conn:
        with pytest.raises(psycopg2.errors.DivisionByZero):
            conn.cursor().execute("BEGIN; SELECT 1/0")  # what follows is refused
        hearing = Hearing(settings)
        hearing.listen(conn, silent=False)
    [line] = output.getvalue().splitlines()
    assert "NOTIFY가 전달되지 않음 (current transaction is aborted" in line
    assert not hearing.is_notified


# --- a flood -------------------------------------------------------------------------------


def test_flood_makes_a_listener_poll_and_later_listen_again(lines_of, monkeypatch):
    monkeypatch.setattr(lines_of.hearing, "pace", Allowance(100, 0))
    lines = lines_of(db.CHANNEL, WORDS, 500)
    assert any("NOTIFY가 너무 많음: 60초 동안 LISTEN 대신 1초마다 확인" in line for line in lines)
    channels = "SELECT count(*) FROM pg_listening_channels()"
    assert (
        not lines_of.hearing.is_notified and db.execute(lines_of.conn, channels).fetchone()[0] == 0
    )
    lines_of.hearing.deaf_until, lines_of.hearing.pace.burst = 0.0, 1e9
    assert lines_of.hearing.hear(lines_of.conn)  # there may be something that it was not told
    assert lines_of.hearing.is_notified and db.execute(lines_of.conn, channels).fetchone()[0] == 2


def test_flood_leaves_a_listener_without_notify_polling(lines_of, database):
    with closing(db.connect(database.settings())) as conn:
        hearing = lines_of.hearing
        hearing.listen(conn, silent=True)
        hearing.deaf_until, hearing.pace.burst = 0.0, 1e9
        hearing.hear(conn)
        assert hearing.deaf_until is None and not hearing.is_notified


def test_connection_that_a_flood_ended_is_followed_by_one_that_does_not_listen(lines_of, database):
    lines_of.conn.dropped = db.FLOOD + 1
    with closing(db.connect(database.settings())) as conn:
        lines_of.hearing.listen(conn, silent=False)
        assert not lines_of.hearing.is_notified and lines_of.hearing.deaf_until is not None
    with closing(db.connect(database.settings())) as conn:
        lines_of.hearing.listen(conn, silent=False)
        assert lines_of.hearing.is_notified and lines_of.hearing.deaf_until is None


def test_notifications_that_were_dropped_may_have_been_of_any_channel(lines_of):
    assert lines_of.hearing.hear(lines_of.conn) == set()
    lines_of.conn.dropped = 1
    channels = {db.CHANNEL, db.WAKE_CHANNEL, db.JOIN_CHANNEL}
    assert lines_of.hearing.hear(lines_of.conn) == channels
    assert lines_of.hearing.hear(lines_of.conn) == set()


@contextmanager
def flood(database, payload: str):
    """NOTIFY as fast as one session can."""
    stop = threading.Event()

    def notify() -> None:
        with closing(database.connect()) as conn:
            cursor = conn.cursor()
            while not stop.is_set():
                cursor.execute(NOTIFY.format(payload), (db.CHANNEL, 2000))

    thread = threading.Thread(target=notify)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("payload", "burst", "per_second"),
    [
        (WORDS, OTHERS_BURST, OTHERS_PER_SECOND),
        (CHANGES, BURST, PER_SECOND),
        ("repeat('x', 7900) || n", OTHERS_BURST, OTHERS_PER_SECOND),
    ],
    ids=["words", "jobs", "long words"],
)
def test_calls_are_made_during_a_flood_and_the_log_stays_small(
    database, api, listener, tmp_path, payload, burst, per_second
):
    process = listener(database, api=api, JOB_STATE_LISTENER_RECONNECT_DELAY=0.5)
    wait_until_idle(tmp_path)
    began = time.monotonic()
    with flood(database, payload):
        for number in range(1, 6):
            database.add_job("overlay", "done")
            database.wait_for("SELECT count(*) = %s FROM jobs WHERE status = 'done'"
                              " AND current_step = 'vlm_judge'", number)  # fmt: skip
    assert process.stop() == 0
    assert len(process.lines) < burst + per_second * (time.monotonic() - began) + 1000
