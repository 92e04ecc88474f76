"""Stages that set their row to (stage, 'failed'), whatever they answer."""

import shlex
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import psycopg2
import pytest
from claims import LEASE_OVER, connected
from conftest import ROOT
from failing import PIPELINE as ROUTED
from test_alerts import told  # noqa: F401 (a fixture)
from variants import PIPELINE, TABLE, Variants, install
from waiting import LONGEST_WAITS, PATIENCE, until

import troubles
from demo.stage_server import Answer, Hangup

SET_FAILED = "단계가 failed로 설정함"
MOVE = {
    "jobs": "UPDATE jobs SET current_step = %s, status = %s WHERE job_id = %s",
    "jobs_variants": "UPDATE jobs_variants SET current_step = %s, status = %s"
    " WHERE job_variants_id = %s",
}


@dataclass
class Site:
    """A database with a pipeline, its stage API, and its listeners."""

    variants: Variants
    api: object
    listener: Callable
    told: Callable
    module: str

    @property
    def database(self):
        return self.variants.database

    def start(self, *args: str, **settings):
        given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": self.module,
                 "ALERT_COMMAND": self.told.command} | settings  # fmt: skip
        return self.listener(self.database, *args, api=self.api, **given)

    def add(self, table: str) -> str:
        """Add a row that owes a call: a job of vlm_analyze, or a variant of yolo_detect; its id."""
        job = self.database.add_job("img_gen", "done" if table == "jobs" else "queued")
        return job if table == "jobs" else self.variants.add(job, "img_gen", "done")[0]

    def set(self, table: str, row: str, step: str, status: str) -> None:
        """Move a row, as a stage or a person does, in a transaction of its own."""
        with closing(self.database.connect()) as conn:
            conn.cursor().execute(MOVE[table], [step, status, row])

    def fails(self, table: str, then: Callable) -> None:
        """The stage of `table` sets its row to failed, and ends as `then(request)` does."""
        stage, column = STAGES[table]

        def behave(request):
            self.set(table, request.body[column], stage, "running")
            self.set(table, request.body[column], stage, "failed")
            return then(request)

        self.api.on(f"/{stage}", behave)

    def calls(self, stage: str) -> list:
        return [request for request in self.api.calls() if request.path == f"/{stage}"]

    def wait_for_calls(self, stage: str, count: int) -> None:
        self.api.wait_for(lambda _: len(self.calls(stage)) >= count, PATIENCE)

    def resting(self) -> list[tuple]:
        sql = "SELECT kind, table_name, job_id, stage FROM resting_rows()"
        return [tuple(row) for row in self.database.rows(sql)]

    def wait_until_settled(self) -> None:
        """Block until nothing is due or under way."""
        self.database.wait_for(
            "SELECT NOT EXISTS (SELECT FROM stage_leases WHERE NOT unanswered)"
            " AND NOT EXISTS (SELECT FROM stage_calls WHERE due_at < 'infinity')"
        )


STAGES = {"jobs": ("vlm_analyze", "job_id"), "jobs_variants": ("yolo_detect", "job_variants_id")}


@pytest.fixture
def site(database, use_pipeline, api, listener, told) -> Site:  # noqa: F811
    """With a pipeline in which no stage follows from (stage, 'failed')."""
    use_pipeline(PIPELINE)
    return Site(install(database, TABLE), api, listener, told, "variants")


@pytest.fixture
def routed(database, use_pipeline, api, listener, told) -> Site:  # noqa: F811
    """With a pipeline in which (stage, 'failed') leads to the stage again."""
    use_pipeline(ROUTED)
    return Site(install(database, TABLE), api, listener, told, "failing")


def hang_up(_request):
    raise Hangup


ENDS = {
    "500": (lambda _: Answer(500, b"no GPU"), "HTTP 500: no GPU"),
    "422": (lambda _: Answer(422, b"no text"), "HTTP 422: no text"),
    "503": (lambda _: Answer(503, b"busy"), "HTTP 503: busy"),
    "no answer": (hang_up, ""),
}


@pytest.mark.parametrize(
    ("table", "end"), [*(("jobs", end) for end in ENDS), ("jobs_variants", "500")]
)
def test_row_set_failed_is_recorded_told_once_and_shown(site, table, end):
    then, said = ENDS[end]
    site.fails(table, then)
    process = site.start()
    row = site.add(table)
    stage, _ = STAGES[table]
    process.wait_for_line(SET_FAILED)
    site.database.wait_for("SELECT count(*) = 0 FROM stage_leases")
    [attempt] = site.database.attempts(row)
    assert (attempt.outcome, attempt.table_name) == ("failed", table)
    assert said in attempt.error and "set failed by its stage" in attempt.error
    until(site.told, "an alert")
    process.stop()
    assert site.resting() == [("failed", table, row, stage)]
    assert [line for line in process.lines if SET_FAILED in line] == [
        line for line in process.lines if SET_FAILED in line and said in line and "UPDATE" in line
    ]
    # Where the log says `retry`, it says when: this row owes no call any more.
    assert not [line for line in process.lines if "retry" in line and "Job이 그대로면" not in line]
    # A listener that starts later sends no second alert.
    again = site.start("run", "--once")
    assert again.wait() == 0
    assert SET_FAILED not in again.output and len(site.calls(stage)) == 1
    [alert] = site.told()
    assert (alert["event"], alert["job"], alert["table"]) == ("failed_by_stage", row, table)
    # The SQL in the alert sends the row back.
    site.api.on(f"/{stage}", lambda _: Answer(200))
    site.database.rows(alert["sql"])
    assert site.start("run", "--once").wait() == 0
    assert len(site.calls(stage)) == 2 and site.resting() == []


@pytest.mark.parametrize("table", STAGES)
def test_row_set_failed_by_a_stage_that_answers_200_is_told_by_the_next_look(site, table):
    site.fails(table, lambda _: Answer(200))
    first = site.start()
    row = site.add(table)
    site.database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'succeeded'")
    first.stop()
    process = site.start()
    line = process.wait_for_line(SET_FAILED)
    assert row in line and "ERROR" in line
    until(site.told, "an alert")
    with connected(site.database) as conn:
        assert troubles.newly_failed(conn) == ([], None)
    assert {attempt.outcome for attempt in site.database.attempts(row)} == {"succeeded", "failed"}
    assert site.resting() == [("failed", table, row, STAGES[table][0])]


def test_row_set_failed_after_the_answer_is_told_by_the_next_look(site):
    stage, _ = STAGES["jobs"]
    site.api.on(f"/{stage}", lambda _: Answer(500, b"no GPU"))
    process = site.start(RETRY_DELAY=1000, program=LONGEST_WAITS)
    row = site.add("jobs")
    site.database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'retry'")
    site.set("jobs", row, stage, "failed")
    process.stop()
    again = site.start()
    assert "no GPU" in again.wait_for_line(SET_FAILED)
    until(site.told, "an alert")
    assert site.resting() == [("failed", "jobs", row, stage)]


def test_row_whose_failed_is_committed_after_the_answer_is_told_at_once(site):
    """The stage's transaction holds the row of the call when the answer comes."""
    stage, column = STAGES["jobs"]
    with closing(psycopg2.connect(site.database.dsn)) as held:

        def behave(request):
            held.cursor().execute(MOVE["jobs"], [stage, "failed", request.body[column]])
            return Answer(500, b"no GPU")

        site.api.on(f"/{stage}", behave)
        process = site.start()
        row = site.add("jobs")
        process.wait_for_line("파이프라인 단계 실행 실패")
        site.database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'retry'")
        held.commit()
        process.wait_for_line(SET_FAILED)
    until(site.told, "an alert")
    recorded = "SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'failed' AND job_id = %s"
    site.database.wait_for(recorded, row)
    assert len(site.calls(stage)) == 1


def test_running_that_is_flushed_and_rolled_back_is_called_again(site):
    stage, column = STAGES["jobs"]

    def behave(request):
        if len(site.calls(stage)) > 1:
            return Answer(200)
        with closing(psycopg2.connect(site.database.dsn)) as conn:
            conn.cursor().execute(MOVE["jobs"], [stage, "running", request.body[column]])
            raise Hangup  # killed: nothing of it is committed

    site.api.on(f"/{stage}", behave)
    process = site.start(STAGE_TIMEOUT=2, LEASE_MARGIN=1)
    site.add("jobs")
    site.wait_for_calls(stage, 2)
    site.wait_until_settled()
    assert SET_FAILED not in process.output and site.told() == []


def test_row_set_failed_whose_listener_is_killed_is_told_by_another(site):
    stage, _ = STAGES["jobs"]
    process = site.start()

    def kill(_request):
        process.kill()
        raise Hangup

    site.fails("jobs", kill)
    row = site.add("jobs")
    process.process.wait(PATIENCE)
    site.database.rows(LEASE_OVER)
    assert SET_FAILED in site.start().wait_for_line(SET_FAILED)
    until(site.told, "an alert")
    outcomes = [attempt.outcome for attempt in site.database.attempts(row)]
    assert sorted(outcomes) == ["failed", "lost"] and len(site.calls(stage)) == 1


# --- sent back -----------------------------------------------------------------------------


def test_row_sent_back_during_its_first_call_is_called_after_it(site):
    stage, column = STAGES["jobs"]

    def behave(request):
        if len(site.calls(stage)) > 1:
            return Answer(200)
        site.set("jobs", request.body[column], stage, "failed")
        site.set("jobs", request.body[column], "img_gen", "done")
        return Answer(500, b"no GPU")

    site.api.on(f"/{stage}", behave)
    process = site.start()
    row = site.add("jobs")
    site.wait_for_calls(stage, 2)
    site.wait_until_settled()
    first, second = site.database.attempts(row)
    assert (first.outcome, second.outcome, second.attempt) == ("retry", "succeeded", 1)
    assert first.finished_at <= second.started_at
    assert SET_FAILED not in process.output and site.told() == []


# --- routed --------------------------------------------------------------------------------

FAST = {"MAX_ATTEMPTS": 3, "RETRY_DELAY": 0.05}


def spent(site: Site, row: str) -> list[int]:
    called = [a for a in site.database.attempts(row) if a.outcome not in ("lost", "skipped")]
    return [a.spent for a in sorted(called, key=lambda a: (a.started_at, a.finished_at))]


@pytest.mark.parametrize(
    ("table", "status"), [("jobs", 500), ("jobs", 422), ("jobs", 200), ("jobs_variants", 500)]
)
def test_routed_failed_carries_attempts_on_and_ends(routed, table, status):
    stage, _ = STAGES[table]
    routed.fails(table, lambda _: Answer(status, b"no GPU"))
    process = routed.start(**FAST)
    row = routed.add(table)
    until(routed.told, "an alert")
    routed.wait_until_settled()
    assert len(routed.calls(stage)) == 3
    assert spent(routed, row)[:3] == [1, 2, 3]
    [owed] = routed.database.rows("SELECT due_at = 'infinity' AS given_up FROM stage_calls"
                                  " WHERE job_id = %s", row)  # fmt: skip
    assert owed.given_up
    process.stop()
    [alert] = routed.told()
    assert (alert["event"], alert["job"], alert["table"]) == ("given_up", row, table)
    assert alert["text"].startswith(f"{'job' if table == 'jobs' else 'job_variants_id'} {row}: ")
    assert "(attempt 3, the last one)" in alert["error"]


def test_routed_failed_waits_longer_from_time_to_time(routed):
    routed.fails("jobs", lambda _: Answer(500))
    given = {"MAX_ATTEMPTS": 3, "RETRY_DELAY": 60, "program": LONGEST_WAITS}
    waits = (
        "SELECT extract(epoch FROM due_at - now())::float8 FROM stage_calls"
        " WHERE current_step = 'vlm_analyze' AND worker IS NULL AND last_error IS NOT NULL"
    )
    process = routed.start(**given)
    row = routed.add("jobs")
    [wait] = routed.database.wait_for(waits)
    assert 30 < wait <= 60
    process.stop()
    routed.database.rows("UPDATE stage_calls SET due_at = now()")
    routed.start("run", "--once", **given).wait()
    assert 60 < routed.database.value(waits) <= 120
    assert len(routed.calls("vlm_analyze")) == 2
    assert spent(routed, row) == [1, 2]


def test_routed_failed_ends_though_each_listener_is_killed(routed):
    stage, _ = STAGES["jobs"]
    process, is_started = None, threading.Event()

    def kill(_request):
        is_started.wait(PATIENCE)
        process.kill()
        raise Hangup

    routed.fails("jobs", kill)
    row = routed.add("jobs")
    for number in range(1, 4):
        is_started.clear()
        process = routed.start(**FAST)
        is_started.set()
        routed.wait_for_calls(stage, number)
        process.process.wait(PATIENCE)
        routed.database.rows(LEASE_OVER)
    routed.start(**FAST)
    until(routed.told, "an alert")
    assert len(routed.calls(stage)) == 3
    routed.wait_until_settled()
    assert routed.database.value(
        "SELECT due_at = 'infinity' FROM stage_calls WHERE job_id = %s", row
    )


def test_row_sent_back_by_hand_has_all_attempts_again(routed):
    stage, _ = STAGES["jobs"]
    routed.fails("jobs", lambda _: Answer(500))
    routed.start(**FAST)
    row = routed.add("jobs")
    until(routed.told, "an alert")
    routed.wait_until_settled()
    routed.database.rows(
        "UPDATE stage_attempts SET started_at = started_at - interval '1 hour',"
        " finished_at = finished_at - interval '1 hour'"
    )
    routed.set("jobs", row, "img_gen", "done")
    # More of the same is counted, and told later.
    until(lambda: len(routed.calls(stage)) == 6, "all attempts again")
    routed.database.wait_for("SELECT count(*) = 1 FROM stage_calls WHERE due_at = 'infinity'")
    assert len(routed.calls(stage)) == 6


def test_routed_failed_of_a_call_that_was_given_back_still_carries_on(routed):
    """A claim whose answer was lost is no attempt, and not the beginning of a new count."""
    routed.fails("jobs", lambda _: Answer(500))
    process = routed.start(MAX_ATTEMPTS=3, RETRY_DELAY=1000, program=LONGEST_WAITS)
    row = routed.add("jobs")
    routed.database.wait_for("SELECT count(*) = 1 FROM stage_calls WHERE last_error IS NOT NULL")
    process.stop()
    routed.database.rows(
        "UPDATE stage_calls SET attempts = 1, free_attempts = 1, due_at = now(), last_error = NULL"
    )
    routed.start(**FAST)
    until(routed.told, "an alert")
    routed.wait_until_settled()
    assert spent(routed, row)[:3] == [1, 2, 3] and len(routed.calls("vlm_analyze")) == 3


# --- joins ---------------------------------------------------------------------------------


def joined(site: Site) -> str:
    job = site.database.add_job("img_gen", "queued")
    site.variants.finish(*site.variants.add(job, count=2))
    return job


def fail_join(site: Site, then: Callable) -> None:
    def behave(request):
        site.set("jobs", request.job_id, "ad_copy", "running")
        site.set("jobs", request.job_id, "ad_copy", "failed")
        return then(request)

    site.api.on("/ad_copy", behave)


def test_join_without_an_answer_keeps_its_lease_though_the_parent_is_failed(site):
    """It was set so by the attempt before; the stage may be at work on this one."""
    fail_join(site, lambda _: Answer(504))
    site.start()
    joined(site)
    site.database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'unknown'")
    assert site.database.value("SELECT unanswered AND leased_until > now() FROM stage_leases")
    site.database.rows(LEASE_OVER + 'NOTIFY "job_state_listener_wake"')
    until(site.told, "an alert")
    assert len(site.calls("ad_copy")) == 1


@pytest.mark.parametrize("end", ENDS)
def test_join_whose_stage_set_the_parent_failed_is_given_up_and_told_once(site, end, run_command):
    then, said = ENDS[end]
    fail_join(site, then)
    process = site.start()
    job = joined(site)
    assert said in process.wait_for_line(SET_FAILED)
    until(site.told, "an alert")
    site.wait_until_settled()
    assert site.database.owed(job).given_up and len(site.calls("ad_copy")) == 1
    [attempt] = site.database.attempts(job)
    assert attempt.outcome == "failed" and "set failed by its stage" in attempt.error
    site.api.on("/ad_copy", lambda _: Answer(200))
    [alert] = site.told()
    assert alert["sql"] == f"./jsl again --table jobs --stage ad_copy {job}"
    # The command that is shown calls the stage again.
    given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "variants"}
    assert run_command(site.database, *shlex.split(alert["sql"])[1:], **given).code == 0
    site.wait_for_calls("ad_copy", 2)
    site.wait_until_settled()
    assert site.database.owed(job) is None


@pytest.mark.parametrize("killed", [True, False])
def test_join_whose_parent_was_set_failed_unheard_is_kept_for_a_person(site, killed, run_command):
    """The listener was killed, or the stage set the parent to failed after its answer."""
    process = site.start(RETRY_DELAY=1000, program=LONGEST_WAITS)

    def end(_request):
        if killed:
            process.kill()
            raise Hangup
        return Answer(500, b"no GPU")

    if killed:
        fail_join(site, end)
    else:
        site.api.on("/ad_copy", end)
    job = joined(site)
    site.wait_for_calls("ad_copy", 1)
    if not killed:
        site.database.wait_for("SELECT count(*) = 1 FROM stage_attempts WHERE outcome = 'retry'")
        process.stop()
        site.set("jobs", job, "ad_copy", "failed")
    process.process.wait(PATIENCE)
    site.database.rows("UPDATE stage_calls SET due_at = now()" if not killed else LEASE_OVER)
    again = site.start()
    again.wait_for_line(SET_FAILED)
    site.wait_until_settled()
    assert site.database.owed(job).given_up
    until(site.told, "an alert")
    site.api.on("/ad_copy", lambda _: Answer(200))
    given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "variants"}
    assert run_command(site.database, "retry", job, **given).code == 0
    site.wait_for_calls("ad_copy", 2)
    site.wait_until_settled()
    assert site.database.owed(job) is None and len(site.told()) == 1


def test_routed_failed_of_a_join_carries_attempts_on_and_ends(routed):
    """The parent itself owes the call now, and the join no more."""
    fail_join(routed, lambda _: Answer(500, b"no GPU"))
    routed.start(**FAST)
    job = joined(routed)
    until(routed.told, "an alert")
    routed.wait_until_settled()
    assert len(routed.calls("ad_copy")) == 3
    [owed] = routed.database.rows(
        "SELECT join_of, due_at = 'infinity' AS given_up FROM stage_calls"
    )
    assert (owed.join_of, owed.given_up) == ("", True)
    [alert] = routed.told()
    assert (alert["event"], alert["job"]) == ("given_up", job)
