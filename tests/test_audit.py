"""`audit`: finds nothing in a real run, and each broken promise in a forged history."""

import json
import threading
import uuid
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from claims import connected, result, settle
from commands import run_here
from test_joins import claim_join, joined
from test_ops_tables import lose_arrival
from waiting import PATIENCE, wait_for_call

import db
from demo.stage_server import Answer, Hangup
from ops.audit import RESTS, Audit
from ops.audit.attempts import ATTEMPTS
from ops.audit.joins import JOINED
from ops.rules import AFTER_LEAVING, EARLY, LIMIT, LOST, OVERLAP, REPEATED

HOURS_AGO = datetime.now(timezone.utc) - timedelta(hours=5)
FORGE = """
INSERT INTO stage_attempts (job_id, call_id, attempt, started_at, finished_at, outcome, stage,
                            spent, table_name, http_status, worker)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, 'w')
"""


def forge(database, *attempts: tuple, job: str | None = None, table: str = "jobs") -> str:
    """Add rows of the history: (call, attempt, seconds of its claim and its end, outcome), and
    optionally the stage, the attempts spent and the status. Returns the id of the row.
    """
    job = job or str(uuid.uuid4())
    for call, attempt, began, ended, outcome, *more in attempts:
        stage, spent, status = [*more, *("planner", attempt, 200)[len(more) :]]
        times = [HOURS_AGO + timedelta(seconds=seconds) for seconds in (began, ended)]
        database.rows(FORGE, job, call, attempt, *times, outcome, stage, spent, table, status)
    return job


def found(done) -> dict[str, int]:
    """How many findings of each kind `audit --json` has; checks that the exit code agrees."""
    kinds = {kind: n for kind, n in json.loads(done.out)["broken"].items() if n}
    assert done.code == bool(kinds), done
    return kinds


def audit(database) -> dict[str, int]:
    return found(run_here(database.environ, "audit", "--json"))


@pytest.fixture
def shared(shared_database):
    return shared_database.emptied()


# --- what is allowed -----------------------------------------------------------------------

FAST = {"STAGE_TIMEOUT": 5, "LEASE_MARGIN": 1, "SWEEP_INTERVAL": 1}
STAY = "SELECT count(*) = 0 FROM jobs WHERE (current_step, status) <> ('vlm_judge', 'done')"


def test_real_run_with_all_that_is_allowed_has_no_finding(database, api, listener, run_command):
    """No answer, a refusal, `retry` and `again` by a person, a job sent back, a killed listener."""
    names = ("unanswered", "refused", "given up", "cancelled", "sent back")
    jobs = {name: database.add_job("overlay") for name in names}
    answers = {"unanswered": Answer(504), "refused": Answer(500), "given up": Answer(422)}
    first = {jobs[name]: answer for name, answer in answers.items()}
    killed, over = str(uuid.uuid4()), threading.Event()

    def behave(request):
        if request.job_id == killed and len(api.calls(killed)) == 1:
            over.wait(PATIENCE)
            raise Hangup
        return first.pop(request.job_id, None)

    api.on("vlm_judge", behave)
    assert run_command(database, "cancel", jobs["cancelled"]).code == 0
    assert run_command(database, "again", jobs["cancelled"]).code == 0
    process = listener(database, api=api, **FAST)
    database.wait_for("SELECT count(*) = 1 FROM given_up_calls")
    at_end = "SELECT current_step = 'vlm_judge' FROM jobs WHERE job_id = %s"
    database.wait_for(at_end, jobs["sent back"])
    database.rows("INSERT INTO jobs VALUES (%s, 'tenant', 'overlay', 'done')", killed)
    wait_for_call(api, killed)
    process.kill()
    database.move(jobs["sent back"], "overlay", "done")
    assert run_command(database, "retry", jobs["given up"]).code == 0
    listener(database, api=api, **FAST)
    database.wait_for(STAY)
    over.set()
    outcomes = {row.outcome for row in database.rows("SELECT DISTINCT outcome FROM stage_attempts")}
    assert outcomes >= {"succeeded", "unknown", "retry", "failed", "cancelled", "lost"}
    done = run_command(database, "audit", **FAST)
    assert done.code == 0 and done.lines[0].endswith(": no promise was broken")


# The timeout is 600 s, the margin of a lease 30 s, MAX_ATTEMPTS 5. One row of planner, unless said.
ALLOWED = {
    "repeat once the lease is over": [(1, 1, 0, 5, "unknown"), (1, 2, 631, 640, "succeeded")],
    "repeat of a call that was lost, whose answer came later": [
        (1, 1, 0, 632, "lost"), (1, 2, 631, 640, "succeeded"), (1, 1, 0, 650, "succeeded")],
    "repeat while a late answer was being written": [
        (1, 1, 0, 700, "succeeded"), (1, 2, 701, 705, "succeeded")],
    "repeat under a shorter timeout than today's": [
        (1, 1, 0, 10, "unknown"), (1, 2, 41, 45, "succeeded")],
    "loss under a shorter timeout than today's": [
        (1, 1, 0, 45, "lost"), (1, 2, 41, 50, "succeeded")],
    "repeat of a call that was taken, under a shorter timeout than today's": [
        (1, 1, 0, 90.5, "unknown", "planner", 1, 202), (1, 2, 91, 95, "succeeded")],
    "the same, recorded after the next claim": [
        (1, 1, 0, 120, "unknown", "planner", 1, 202), (1, 2, 91, 95, "succeeded")],
    "one call more after the answer to the last": [
        (1, 1, 0, 15, "succeeded"), (2, 1, 10, 20, "succeeded")],
    "next stage before the answer of the last": [
        (1, 1, 0, 60, "succeeded"), (2, 1, 10, 20, "succeeded", "overlay")],
    "job that was sent back": [
        (1, 1, 0, 5, "succeeded"), (2, 1, 20, 25, "succeeded", "overlay"),
        (3, 1, 40, 45, "succeeded")],
    "retry by a person": [(1, 5, 0, 5, "failed"), (1, 6, 40, 45, "succeeded", "planner", 1)],
    "call by a person beyond the last": [(1, 6, 0, 5, "succeeded")],
    "holds, which cost no attempt": [(1, 9, 0, 5, "held", "planner", 1),
                                     (1, 10, 9, 20, "retry", "planner", 1)],
    "call that was dropped while it was made": [
        (1, 1, 0, 60, "succeeded"), (1, 1, 30, 30, "cancelled"), (2, 1, 70, 75, "succeeded")],
    "claim that found the call accepted": [
        (1, 1, 0, 5, "succeeded"), (1, 2, 700, 700, "skipped")],
    "clock that was set back": [(1, 2, 0, 5, "succeeded"), (1, 1, 900, 905, "retry")],
    "stage that PIPELINE no longer has": [
        (1, 1, 0, 5, "unknown", "old"), (1, 2, 9, 12, "succeeded", "old")],
}  # fmt: skip

BROKEN = {
    "accepted call that was repeated": (REPEATED, [
        (1, 1, 0, 5, "succeeded"), (1, 2, 6, 9, "succeeded")]),
    "repeat after a late answer": (REPEATED, [
        (1, 1, 0, 632, "lost"), (1, 2, 631, 640, "retry"), (1, 1, 0, 650, "succeeded"),
        (1, 3, 700, 710, "succeeded")]),
    "repeat before the lease of a call without an answer was over": (EARLY, [
        (1, 1, 0, 5, "unknown"), (1, 2, 9, 12, "succeeded")]),
    "job sent back while its call without an answer might run": (EARLY, [
        (1, 1, 0, 5, "unknown"), (2, 1, 20, 25, "succeeded")]),
    "two attempts of a call at once": (OVERLAP, [
        (1, 1, 0, 20, "retry"), (1, 2, 15, 30, "succeeded")]),
    "two calls of a stage at once": (OVERLAP, [
        (1, 1, 0, 60, "succeeded"), (2, 1, 10, 20, "succeeded")]),
    "claim beside one that was lost": (OVERLAP, [
        (1, 1, 0, 632, "lost"), (1, 2, 60, 70, "succeeded")]),
    "claim beside one that was taken and not finished": (OVERLAP, [
        (1, 1, 0, 632, "unknown", "planner", 1, 202), (1, 2, 60, 70, "succeeded")]),
    "attempt after another call had followed": (AFTER_LEAVING, [
        (1, 1, 0, 5, "retry"), (2, 1, 20, 25, "succeeded", "overlay"), (1, 2, 40, 45, "retry")]),
    "attempt after it was given up": (ATTEMPTS, [
        (1, 3, 0, 5, "failed"), (1, 4, 40, 45, "succeeded")]),
    "attempts without end": (ATTEMPTS, [(1, 6, 0, 5, "retry"), (1, 7, 40, 45, "retry")]),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_is_no_finding(shared, name):
    forge(shared, *ALLOWED[name])
    assert audit(shared) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_allowed_is_found_once(shared, name):
    kind, attempts = BROKEN[name]
    forge(shared, *attempts)
    with closing(db.connect(shared.settings())) as conn:
        done = Audit(conn, shared.settings(), HOURS_AGO, batch=1)
    assert done.findings.counts == {kind: 1}


# --- limits --------------------------------------------------------------------------------

CROWD = [(1, 1, 0, 60, "succeeded"), (2, 1, 5, 70, "succeeded"), (3, 1, 8, 50, "retry")]


def test_more_calls_at_once_than_max_running_are_found_once_the_limit_holds(database):
    for call in CROWD:  # of three rows, before there was a limit
        forge(database, call)
    database.rows("INSERT INTO stage_limits VALUES ('planner', '{planner}', 2)")
    assert audit(database) == {}
    limit = "held against the limit of planner, which"
    done = run_here(database.environ, "audit")
    assert f"- No call is {limit} was installed after the last one." in done.lines
    for number, began, ended in ((4, 1000, 1015), (5, 1006, 1020), (6, 1014, 1030)):
        forge(database, (number, 1, began, ended, "succeeded"))
    assert audit(database) == {}  # as a claim takes seconds, they need not have overlapped
    jobs = [forge(database, (call + 10, n, began + 2000, ended + 2000, outcome))
            for call, n, began, ended, outcome in CROWD]  # fmt: skip
    done = run_here(database.environ, "audit", "--json")
    assert found(done) == {LIMIT: 1}
    said = json.loads(done.out)
    since = f"{HOURS_AGO.astimezone() + timedelta(seconds=1015):%F %T}"
    told = f"Calls before {since} are not {limit} is known to hold since then."
    assert told in said["not_known"]
    later = run_here(database.environ, "audit", "--since", since)
    assert limit not in later.out
    [finding] = said["findings"]
    assert finding["id"] == jobs[2] and finding["stage"] == "planner"
    assert f"number 3 of 2, beside {jobs[0]}, {jobs[1]}" in finding["text"]


def test_lost_and_taken_calls_count_for_a_limit_until_their_leases_may_have_been_over(database):
    database.rows("INSERT INTO stage_limits VALUES ('planner', '{planner}', 1)")
    forge(database, (1, 1, 0, 1, "succeeded"))  # since then the limit is known to hold
    for number, began, ended, outcome, status in (
        (2, 1000, 1140, "lost", None), (3, 1025, 1080, "succeeded", 200),
        (4, 2000, 2140, "unknown", 202), (5, 2025, 2080, "succeeded", 200),
    ):  # fmt: skip
        forge(database, (number, 1, began, ended, outcome, "planner", 1, status))
    assert audit(database) == {}  # as the leases may have been of 20 s
    for number, began, outcome, status in ((6, 3000, "lost", None), (7, 5000, "unknown", 202)):
        forge(database, (number, 1, began, began + 632, outcome, "planner", 1, status))
        forge(database, (number + 10, 1, began + 500, began + 540, "succeeded"))
    assert audit(database) == {LIMIT: 2}


def test_more_calls_at_once_than_a_pool_has_places_are_found_over_its_stages(database):
    database.rows("INSERT INTO stage_limits VALUES ('gpu', '{planner,overlay}', 1)")
    forge(database, (1, 1, 0, 1, "succeeded"))  # since then the limit is known to hold
    one = forge(database, (2, 1, 1000, 1060, "succeeded"))
    other = forge(database, (3, 1, 1005, 1070, "succeeded", "overlay"))
    done = run_here(database.environ, "audit", "--json")
    assert found(done) == {LIMIT: 1}
    [finding] = json.loads(done.out)["findings"]
    assert (finding["id"], finding["stage"]) == (other, "overlay")
    assert f"number 2 of 1 of pool gpu, beside {one}" in finding["text"]


def test_more_calls_in_a_minute_than_the_rate_are_found(database):
    database.rows("INSERT INTO stage_limits (name, stages, seconds)"
                  " VALUES ('planner', '{planner}', 20)")  # fmt: skip
    for number, began in enumerate([0, 20, 40, 45, 60, 120]):  # one of them by a person
        forge(database, (number, 1, began, began + 1, "succeeded"))
    assert audit(database) == {}
    forge(database, (10, 1, 59, 61, "retry"))
    done = run_here(database.environ, "audit", "--json")
    assert found(done) == {LIMIT: 1}
    [finding] = json.loads(done.out)["findings"]
    assert "number 6 of 3 within a minute" in finding["text"]


# --- joins ---------------------------------------------------------------------------------


def test_join_called_while_a_row_was_missing_is_found_where_a_call_of_that_row_shows_it(variants):
    database = variants.database
    job, (there, missing) = joined(variants)
    with connected(database) as conn:
        settle(conn, result(claim_join(conn)))
    forge(database, (9, 1, 500, 520, "succeeded", "ad_copy"), job=job)
    for variant in (there, missing):
        forge(database, (2, 1, 0, 30, "retry", "iou_eval"), job=variant, table="jobs_variants")
    assert audit(database) == {}
    again = (2, 2, 600, 630, "succeeded", "iou_eval")
    forge(database, again, job=missing, table="jobs_variants")
    done = run_here(database.environ, "audit", "--json")
    assert found(done) == {JOINED: 1}
    assert f"jobs_variants {missing} still owed call 2 to iou_eval" in done.out


def test_join_that_nobody_recorded_is_found(variants):
    joined(variants)
    with connected(variants.database) as conn:
        assert audit(variants.database) == {}  # a listener will look
        settle(conn, result(claim_join(conn)))
    variants.database.rows("SET session_replication_role = replica")
    job, _ = joined(variants)
    done = run_here(variants.database.environ, "audit", "--json")
    assert found(done) == {LOST: 1} and job in done.out
    assert "counts as a lost arrival, unless its parent" in done.out


def test_join_whose_last_row_came_unseen_is_found_once(variants):
    lose_arrival(variants, "TRUNCATE")
    done = run_here(variants.database.environ, "audit", "--json")
    assert found(done) == {LOST: 1}


# --- rows that rest ------------------------------------------------------------------------


def test_rows_that_rest_are_found_but_not_those_that_wait_for_a_person(shared):
    shared.add_job("planner", "failed"), shared.add_job("planner", "done")
    unheard, stalled = shared.add_job("yolo_detect", "new"), shared.add_job("overlay", "running")
    shared.rows("UPDATE stage_calls SET due_at = 'infinity'")
    assert audit(shared) == {}
    shared.rows("SET session_replication_role = replica")
    shared.move(unheard, "yolo_detect", "done")
    shared.rows("SET session_replication_role = DEFAULT")
    shared.rows("UPDATE jobs SET updated_at = now() - interval '1 h'")
    done = run_here(shared.environ, "audit", "--json")
    assert found(done) == {LOST: 1, RESTS: 1}
    said = json.loads(done.out)
    assert [finding["id"] for finding in said["findings"]] == [unheard, stalled]
    assert (said["failed"], said["given_up"]) == (1, 1)
    assert found(run_here(shared.environ, "audit", "--json", "--since", "30m")) == {}


def test_call_that_is_due_is_told_and_no_finding(shared):
    shared.add_job("planner", "done")
    due_at = "now() - interval '3 days'"
    [row] = shared.rows(f"UPDATE stage_calls SET due_at = {due_at} RETURNING due_at AS since")
    done = run_here(shared.environ, "audit")
    assert done.code == 0
    assert f"1 due, the oldest since {row.since.astimezone():%F %T}: ./jsl status" in done.lines


def test_rows_that_owe_no_call_by_wish_are_no_finding(database):
    assert run_here(database.environ, "install", "--no-insert").code == 0
    database.add_job()
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 h'")
    done = run_here(database.environ, "audit", "--json")
    assert found(done) == {} and "(--no-insert)" in done.out
    database.rows("DROP TRIGGER job_state_change_trigger ON jobs")
    assert audit(database) == {LOST: 1}


# --- as a person types it ------------------------------------------------------------------


def test_findings_are_listed_with_the_command_that_shows_one(shared):
    job = forge(shared, (1, 1, 0, 5, "succeeded"), (1, 2, 6, 9, "succeeded"))
    for _ in range(24):
        forge(shared, (1, 6, 0, 5, "retry"), (1, 7, 40, 45, "retry"))
    done = run_here(shared.environ, "audit")
    assert done.lines[0].endswith(": 25 findings") and done.code == 1
    assert done.lines[2] == f"1 × {REPEATED}"
    assert done.lines[4].startswith(f"{job}  planner  ")
    assert ": the call was accepted " in done.lines[4]
    assert done.lines[5] == f"look at one: ./jsl job {job}"
    assert "… and 4 more (--json has the first 24)" in done.lines


def test_what_the_history_cannot_tell_is_said(shared):
    lines = run_here(shared.environ, "audit").lines
    assert "- The history is empty; what was before is not known (HISTORY_DAYS)." in lines
    forge(shared, (1, 1, 0, 5, "succeeded"))
    lines = run_here(shared.environ, "audit", "--since", "3d").lines
    assert any(line.startswith("- The history begins 20") for line in lines)
    lines = run_here(shared.environ, "audit", "--since", "3h").lines
    assert not any("history begins" in line for line in lines)
    assert any("leaves no trace" in line for line in lines)
    assert not any("join whose rows" in line for line in lines)  # there is none
    assert any("up to 120 s before that was recorded" in line for line in lines)
    assert any("nor two calls of one stage for a row" in line for line in lines)


def test_span_that_is_still_to_come_is_refused(shared):
    refused = run_here(shared.environ, "audit", "--since", "2999-01-01").refused(2)
    assert "is still to come: now it is" in refused
