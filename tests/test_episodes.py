"""Alerts about lasting problems: sent once when they begin, and once when they are over."""

import json
import math
import time

import pytest
from claims import claim, connected, held, let_pass, result, settle

import alerts as alerts_module
import db
import troubles
from alerts import Alerts, Episode
from ops.check import LAG


@pytest.fixture
def sent(database):
    """An Alerts that keeps alerts in `.events` instead of sending them."""
    kept = Alerts(database.settings(ALERT_COMMAND="/bin/true"))
    kept.events = []
    kept.put = kept.events.append
    return kept


def look(database, sent, after: float = 600) -> list[tuple[str, str]]:
    """The alerts of one upkeep now: (event, stage)."""
    sent.events.clear()
    with connected(database) as conn:
        for row in troubles.episodes(conn, after):
            troubles.tell_episode(sent, row)
    return [(said["event"], said["stage"]) for said in sent.events]


OLD = "UPDATE stage_calls SET due_at = now() - interval '11 minutes'"


def test_stage_whose_calls_wait_is_told_once_and_when_it_is_over(database, sent):
    database.add_job("img_gen", "done")
    assert look(database, sent) == []
    database.rows(OLD)
    assert look(database, sent) == [("waiting", "vlm_analyze")]
    assert "has been due for 11 min: 1 call due, 0 under way" in sent.events[0]["text"]
    assert look(database, sent) == []
    database.rows("DELETE FROM stage_calls")
    assert look(database, sent) == [("recovered", "vlm_analyze")]
    assert look(database, sent) == []


def test_held_stage_says_why_it_waits(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    database.rows("UPDATE pipeline_stages SET held_until = now() + interval '1 minute',"
                  " hold_seconds = 60, held_reason = 'HTTP 503'")  # fmt: skip
    assert look(database, sent) == [("waiting", "vlm_analyze")]
    assert sent.events[0]["reason"] == "HTTP 503"


def test_stage_that_is_tried_in_vain_goes_on_waiting(database, sent):
    database.add_job("img_gen", "done")
    database.rows("UPDATE stage_calls SET created_at = now() - interval '11 minutes'")
    with connected(database) as conn:
        settle(conn, held(claim(conn)))
        assert look(database, sent) == [("waiting", "vlm_analyze")]
        database.rows("UPDATE pipeline_stages SET held_until = now()")
        row = claim(conn)
        assert look(database, sent) == []
        settle(conn, held(row))
        assert look(database, sent) == []
        let_pass(database, 5)
        settle(conn, result(claim(conn)))
    assert look(database, sent) == [("recovered", "vlm_analyze")]


def test_call_that_is_put_off_time_and_again_waits(database, sent):
    """By a listener whose PIPELINE does not lead to it."""
    database.add_job("img_gen", "done")
    database.rows("UPDATE stage_calls SET attempts = 1, free_attempts = 1,"
                  " due_at = now() + interval '10 s'")  # fmt: skip
    assert look(database, sent) == []
    database.rows("UPDATE stage_calls SET created_at = now() - interval '11 minutes'")
    assert look(database, sent) == [("waiting", "vlm_analyze")]
    assert sent.events[0]["reason"].startswith("it is put off by listeners whose PIPELINE")
    database.rows("UPDATE stage_calls SET run_after = now() + interval '5 s'")
    assert look(database, sent) == [("recovered", "vlm_analyze")]


def test_retry_of_a_stage_that_accepts_others_is_not_late(database, sent):
    first, second = (database.add_job("img_gen", "done") for _ in range(2))
    with connected(database) as conn:
        settle(conn, held(claim(conn, only=first)))
        settle(conn, result(claim(conn, only=second)))
        settle(conn, result(claim(conn, only=first), "retry", delay=100.0, error="HTTP 500"))
    database.rows("UPDATE stage_calls SET created_at = now() - interval '11 minutes'")
    assert look(database, sent) == []


def test_back_off_that_outlasts_a_hold_of_its_stage_is_not_late(database, sent):
    first, second = (database.add_job("img_gen", "done") for _ in range(2))
    with connected(database) as conn:
        settle(conn, held(claim(conn, only=first)))
        settle(conn, result(claim(conn, only=second)))
        settle(conn, result(claim(conn, only=first), "retry", delay=300.0, error="HTTP 500"))
        database.rows("UPDATE stage_calls SET created_at = now() - interval '11 minutes'")
        third = database.add_job("img_gen", "done")
        settle(conn, held(claim(conn, only=third)))
    assert look(database, sent) == []
    assert database.value("SELECT sum(due) FROM pipeline_overview") <= 1
    assert database.value(LAG) < 600


def test_stage_at_its_rate_says_so(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    database.rows("INSERT INTO stage_limits (name, stages, seconds, next_at) VALUES"
                  " ('vlm_analyze', '{vlm_analyze}', 8, now() + interval '1 min')")  # fmt: skip
    assert look(database, sent) == [("waiting", "vlm_analyze")]
    assert sent.events[0]["reason"] == "the stage is at its rate of 7.5 calls a minute"


def test_stage_at_its_limit_says_so(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    database.rows("UPDATE pipeline_stages SET max_running = 1 WHERE stage = 'vlm_analyze'")
    database.rows("INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
                  " leased_until) SELECT job_id, 0, 1, stage, 'w', now(), now() + '1 minute'"
                  " FROM stage_calls")  # fmt: skip
    assert look(database, sent) == [("waiting", "vlm_analyze")]
    assert sent.events[0]["reason"] == "the stage is at its limit of 1 call at once"


def test_paused_stage_wakes_nobody(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity'")
    assert look(database, sent) == []


def test_pause_of_a_stage_that_waits_is_no_recovery(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    assert look(database, sent) == [("waiting", "vlm_analyze")]
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity'")
    assert look(database, sent) == []
    database.rows("UPDATE pipeline_stages SET held_until = NULL")
    assert look(database, sent) == []
    database.rows("DELETE FROM stage_calls")
    assert look(database, sent) == [("recovered", "vlm_analyze")]


TRIED = """
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            outcome, error)
SELECT job_id, call_id, 1, stage, 'w', now(), now(), %s, 'HTTP 500' FROM stage_calls
WHERE job_id = %s
"""


def test_stage_that_accepts_nothing_is_told_once_and_when_it_is_over(database, sent):
    jobs = [database.add_job("img_gen", "done") for _ in range(4)]
    for job in jobs[:2]:
        database.rows(TRIED, "retry", job)
        let_pass(database, 150)
    assert look(database, sent) == []
    database.rows(TRIED, "retry", jobs[2])
    assert look(database, sent) == [("refusing", "vlm_analyze")]
    assert sent.events[0]["text"] == "vlm_analyze accepts no call: HTTP 500"
    assert look(database, sent) == []
    database.rows(TRIED, "succeeded", jobs[3])
    assert look(database, sent) == [("recovered", "vlm_analyze")]


def test_stage_that_is_restarted_is_no_alert(database, sent):
    jobs = [database.add_job("img_gen", "done") for _ in range(5)]
    for job in jobs[:4]:
        database.rows(TRIED, "held", job)
        let_pass(database, 18)
    assert look(database, sent) == []
    let_pass(database, 300)
    assert look(database, sent) == []
    database.rows(TRIED, "held", jobs[4])
    assert look(database, sent) == [("refusing", "vlm_analyze")]


def test_stage_that_is_hardly_called_any_more_has_not_recovered(database, sent):
    jobs = [database.add_job("img_gen", "done") for _ in range(5)]
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    for job in jobs[:3]:
        let_pass(database, 150)
        database.rows(TRIED, "unknown", job)
    assert look(database, sent) == [("refusing", "vlm_analyze")]
    for job in (None, jobs[3]):
        let_pass(database, 700)
        database.rows(TRIED, "unknown", job)
        assert look(database, sent) == []
    database.rows(TRIED, "succeeded", jobs[4])
    assert look(database, sent) == [("recovered", "vlm_analyze")]


def test_stage_that_works_on_a_call_it_has_taken_accepts_calls(database, sent):
    jobs = [database.add_job("img_gen", "done") for _ in range(4)]
    for job in jobs[:3]:
        let_pass(database, 150)
        database.rows(TRIED, "held", job)
    database.rows("INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
                  " leased_until, working) SELECT job_id, call_id, 1, stage, 'w',"
                  " now() - interval '20 minutes', now() + interval '1 hour', true"
                  " FROM stage_calls WHERE job_id = %s", jobs[3])  # fmt: skip
    assert look(database, sent) == []


def test_stage_that_left_pipeline_and_still_owes_is_told_once_and_when_it_is_over(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD + ", stage = 'painter'")
    told: set[str] = set()
    with connected(database) as first, connected(database) as second:
        for conn in (first, second):
            db.name_session(conn, "w")
        troubles.tell_gone_stages(second, 600, sent, set())
        for _ in range(2):
            troubles.tell_gone_stages(first, 600, sent, told)
        [said] = sent.events
        assert (said["event"], said["stage"]) == ("waiting", "painter")
        assert said["text"].endswith("due for 11 min: PIPELINE has no stage painter")
        database.rows("DELETE FROM stage_calls")
        for _ in range(2):
            troubles.tell_gone_stages(first, 600, sent, told)
    assert [said["event"] for said in sent.events] == ["waiting", "recovered"]


def test_two_listeners_tell_it_once(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    with connected(database) as one, connected(database) as other:
        rows = [*troubles.episodes(one, 600), *troubles.episodes(other, 600)]
    assert len(rows) == 1


def test_listener_that_was_away_says_what_had_waited(database, sent):
    for _ in range(3):
        database.add_job("img_gen", "done")
    with connected(database) as conn:
        troubles.tell_absence(conn, 600, sent)
        assert sent.events == []
        database.rows(OLD)
        troubles.tell_absence(conn, 600, sent)
    assert sent.events[0]["text"] == (
        "a listener has started: 3 calls had been waiting, the oldest for 11 min"
    )


def test_listener_that_joins_another_says_nothing_of_absence(database, sent):
    database.add_job("img_gen", "done")
    database.rows(OLD)
    with connected(database) as first, connected(database) as second:
        for conn in (first, second):
            db.name_session(conn, "w")
        troubles.tell_absence(second, 600, sent)
        assert sent.events == []
        troubles.tell_absence(first, 600, sent)
        assert len(sent.events) == 1


def test_many_of_the_same_are_told_as_one_and_counted(sent):
    for number in range(1000):
        sent.send("given_up", f"job {number}", stage="overlay")
    sent.send("given_up", "job x", stage="planner")
    assert [said["text"] for said in sent.events] == ["job 0", "job x"]
    sent.end_episodes(time.monotonic() + alerts_module.EPISODE + 1)
    assert sent.events[2]["count"] == 999
    assert sent.events[2]["text"] == "999 more of the same, the last: job 999"
    assert sent.episodes.keys() == {("given_up", "overlay")}


def test_what_comes_and_goes_quickly_is_told_once(sent):
    for _ in range(3):
        sent.send("stage_refuses", "401", stage="overlay")
        sent.send_recovered("stage_refuses", "overlay", "it accepts calls again", at_once=False)
    assert len(sent.events) == 1 and sent.next_run < math.inf
    sent.end_episodes(time.monotonic() + alerts_module.EPISODE + 1)
    assert [said.get("count", said["event"]) for said in sent.events[1:]] == [2, "recovered"]
    sent.send("stage_refuses", "401", stage="overlay")
    assert sent.events.pop()["event"] == "stage_refuses"  # at once, as people were told it is over
    sent.send("stage_refuses", "401", stage="planner")
    sent.send_recovered("stage_refuses", "planner", "it accepts calls again", at_once=False)
    sent.send("stage_refuses", "401", stage="planner")
    sent.end_episodes(math.inf)
    assert [said["event"] for said in sent.events[3:]] == ["stage_refuses"] * 2


def test_what_was_counted_is_told_before_the_listener_ends(sent):
    sent.episodes["given_up", "overlay"] = Episode(time.monotonic() + 99, {"text": "job 7"}, 3)
    sent.close()
    assert [said["count"] for said in sent.events] == [3]


# --- alert-test ----------------------------------------------------------------------------


def test_alert_test_sends_one(database, run_command, tmp_path):
    script = tmp_path / "alert.sh"
    script.write_text(f"#!/bin/sh\ncat >> {tmp_path}/told\n")
    script.chmod(0o755)
    done = run_command(database, "alert-test", ALERT_COMMAND=script)
    assert (done.code, done.lines) == (0, [f"sent: {script} took it"])
    assert json.loads((tmp_path / "told").read_text())["event"] == "test"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "ALERT_COMMAND is not set"),
        ("/no/such/program", "cannot be started: /no/such/program: No such file or directory"),
        ("/", "cannot be started: /: Permission denied"),
        ("sh -c 'echo broken; exit 3'", "ended with exit code 3: broken"),
    ],
)
def test_alert_test_says_what_is_wrong(database, run_command, command, says):
    done = run_command(database, "alert-test", ALERT_COMMAND=command)
    assert done.code != 0 and says in done.err and done.err.count("\n") == 1
