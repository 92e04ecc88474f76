"""A way out of every state: for each way in which a row can rest, what `status`, `job` and `jobs`
say, and that what `job` tells to type does it.
"""

import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import commands
import pytest
from claims import LEASE_OVER, claim, connected, held, result, settle
from commands import Done
from test_failed import FAST, routed, site, told  # noqa: F401 (fixtures)
from test_ops_tables import call, joined, look, run  # noqa: F401 (fixtures)
from waiting import until

import calls
from demo.stage_server import Answer

LONG_AGO = (
    "UPDATE jobs SET updated_at = now() - interval '1 hour';"
    " UPDATE stage_attempts SET finished_at = now() - interval '1 hour'"
)
ERROR = "HTTP 500: no memory"


@dataclass
class Rested:
    """A job of (planner, done), which leads to overlay, and what a person types."""

    database: object
    typed: Callable[..., Done]
    job: str | None = None

    def add(self) -> "Rested":
        self.job = self.database.add_job("planner", "done")
        return self

    def claimed(self):
        """The call of the job, as a listener takes it; None where none takes it."""
        with connected(self.database) as conn:
            row = claim(conn)
            return row if row.call_id is not None else None

    def settled(self, outcome: str, **details) -> None:
        with connected(self.database) as conn:
            assert settle(conn, result(claim(conn), outcome, **details))

    def line_of_job(self, begins: str) -> str:
        [line] = [one for one in self.typed("job", self.job).lines if one.startswith(begins)]
        return line

    def follow(self, line: str) -> None:
        """Do what a line of `job` tells a person to type."""
        if "UPDATE " in line:
            self.database.rows("UPDATE " + line.split("UPDATE ", 1)[1])
            return
        typed = f"printf '%s\\0' {line.split('./jsl ', 1)[1]}"
        words = subprocess.check_output(["bash", "-c", typed], encoding="utf-8").split("\0")
        assert self.typed(*words[:-1]).code == 0


@pytest.fixture
def rested(shared_database, tmp_path) -> Rested:
    environ = shared_database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    return Rested(shared_database.emptied(), lambda *args: commands.run_here(environ, *args)).add()


# --- what puts a job to rest ---------------------------------------------------------------


def give_up(rested):
    rested.settled("failed", error=ERROR)


def back_off(rested):
    rested.settled("retry", delay=3600.0, error=ERROR)


def hold(rested):
    with connected(rested.database) as conn:
        settle(conn, held(claim(conn), retry_after=3000, error="HTTP 503: busy"))


def pause(rested):
    rested.typed("pause", "overlay", "--reason", "new fonts")


def set_failed(rested):
    with connected(rested.database) as conn:
        row = claim(conn)
        rested.database.move(rested.job, "overlay", "failed")
        settle(conn, result(row, "failed", error=ERROR))


def leave_running(rested):
    with connected(rested.database) as conn:
        claim(conn)
        rested.database.move(rested.job, "overlay", "running")
        rested.database.rows(LEASE_OVER)
        calls.reap(conn)
    rested.database.rows(LONG_AGO)


def accept(rested):
    rested.settled("succeeded", http_status=200)
    rested.database.rows(LONG_AGO)


def lose_the_call(rested):
    rested.database.rows("TRUNCATE stage_calls")
    rested.database.rows(LONG_AGO)


def cancel(rested):
    rested.typed("cancel", rested.job, "--reason", "twice")


def lose_the_route(rested):
    rested.database.rows("UPDATE stage_calls SET stage = 'painter'")


@dataclass(frozen=True)
class Way:
    """How a job came to rest, and what is said of it: patterns."""

    arrange: Callable[[Rested], None]
    status: str
    job: str  # of the line with what is to be typed
    jobs: list[str]  # the options of `jobs`
    listed: str


STATES = r"planner +done +1 +overlay +{owed} +0"
WAYS = {
    "given up": Way(
        give_up, f"overlay +given up: {ERROR}", f"owes: overlay .*given up: {ERROR}; .*retry",
        ["--given-up"], f"overlay: {ERROR}",
    ),
    "in its back-off": Way(
        back_off, rf"overlay +next retry in \d+ min; last error: {ERROR}",
        "overlay waits: its last attempt failed; .*retry --now",
        ["--stage", "overlay"], rf"overlay: due in \d+ min; last error: {ERROR}",
    ),
    "stage held": Way(
        hold, "overlay .*held until .*: HTTP 503: busy",
        "overlay waits: overlay is held until .*: HTTP 503: busy; .*resume overlay",
        ["--stage", "overlay"], "overlay is held until .*; ./jsl resume overlay",
    ),
    "stage paused": Way(
        pause, "overlay +paused by .*: new fonts",
        "overlay waits: overlay is paused by .*: new fonts; .*resume overlay",
        ["--stage", "overlay"], "overlay is paused by .*; ./jsl resume overlay",
    ),
    "set failed by its stage": Way(
        set_failed, f"overlay +1 row is failed: set failed by its stage: {ERROR}",
        f"rests since .*: set failed by its stage: {ERROR}; to call overlay again: UPDATE jobs",
        ["--failed"], "set failed by its stage",
    ),
    "running too long": Way(
        leave_running, "overlay +1 row is stalled: running for longer than the timeout",
        "rests since .*: running for longer than the timeout; to call overlay again: UPDATE jobs",
        ["--stalled"], "running for longer than the timeout",
    ),
    "accepted but not moved": Way(
        accept, "overlay +1 row is stalled: accepted by the stage",
        "rests since .*accepted by the stage, .*; to call overlay again: .* again",
        ["--stalled"], "accepted by the stage, but the job has not changed",
    ),
    "never recorded": Way(
        lose_the_call, "overlay +1 row is stalled: its call was never recorded",
        "rests since .*never recorded.*; to call overlay again: .* again",
        ["--stalled"], "its call was never recorded",
    ),
    "cancelled": Way(
        cancel, "^nothing is due", "rests since .*cancelled by .*: twice; to call overlay again: ",
        [], STATES.format(owed=0),
    ),
    "without a stage of that name": Way(
        lose_the_route, "painter +not in PIPELINE; .*: ./jsl cancel --stage painter",
        "painter waits: PIPELINE has no stage painter; .* again",
        ["--tenant", "tenant"], "painter: due now",
    ),
}  # fmt: skip


def says(done: Done, pattern: str) -> bool:
    assert done.code == 0, done
    return any(re.search(pattern, line) for line in done.lines)


@pytest.mark.parametrize("name", WAYS)
def test_what_job_tells_to_type_lets_a_resting_job_be_called(rested, name):
    way = WAYS[name]
    way.arrange(rested)
    assert rested.claimed() is None or name == "without a stage of that name"
    assert says(rested.typed("status"), way.status)
    assert says(rested.typed("jobs", *way.jobs), way.listed)
    [line] = [one for one in rested.typed("job", rested.job).lines if re.match(way.job, one)]
    rested.follow(line)
    row = rested.claimed()
    assert (row.key, row.stage, row.owed, row.accepted) == (rested.job, "overlay", True, False)


def test_call_without_an_answer_is_left_alone_until_its_lease_is_over(rested):
    rested.settled("unknown", after_lease=True, delay=0.0, error="no answer in time")
    waits = rested.line_of_job("overlay waits: ")
    assert "its last call got no answer, and the stage may be at it until " in waits
    assert "./jsl" not in waits
    assert says(rested.typed("status"), "last error: no answer in time")
    assert says(rested.typed("jobs", "--stage", "overlay"), "last error: no answer in time")
    for command in (["retry", "--now"], ["again"]):
        assert "got no answer" in rested.typed(*command, rested.job).refused(1)
    assert rested.claimed() is None
    rested.database.rows(LEASE_OVER)
    assert rested.claimed().key == rested.job


def test_call_that_was_put_off_beyond_its_lease_can_be_hurried(rested):
    rested.settled("unknown", after_lease=True, delay=0.0, error="no answer in time")
    rested.database.rows("UPDATE stage_leases SET leased_until = now()")
    rested.follow(rested.line_of_job("overlay waits: "))
    assert rested.claimed().spent == 2


def test_call_beyond_the_limit_of_its_stage_says_so(database, tmp_path):
    environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    database.rows("INSERT INTO stage_limits VALUES ('overlay', '{overlay}', 1)")
    database.rows("UPDATE pipeline_stages SET max_running = 1 WHERE stage = 'overlay'")
    rested = Rested(database, lambda *args: commands.run_here(environ, *args)).add()
    first = rested.claimed()
    rested.job = database.add_job("planner", "done")
    assert rested.claimed() is None
    assert says(rested.typed("status"), r"overlay +2 +1/1")
    waits = rested.line_of_job("overlay waits: ")
    assert waits == "overlay waits: overlay is at its limit of 1 call at once"
    assert says(rested.typed("jobs", "--stage", "overlay"), "overlay: due now")
    with connected(database) as conn:
        settle(conn, result(first))
    assert rested.claimed().key == rested.job


@pytest.mark.parametrize("how", ["UPDATE jobs SET status = 'running'", "DELETE FROM jobs"])
def test_call_that_the_application_holds_names_its_session(rested, how):
    with closing(rested.database.connect()) as conn:
        conn.autocommit = False
        cursor = conn.cursor()
        cursor.execute("SET application_name = 'the application'")
        cursor.execute(how if "DELETE" in how else f"{how} WHERE job_id = %s", [rested.job])
        if "DELETE" in how:  # of the application's jobs alone: the call stays
            cursor.execute("SELECT FROM stage_calls FOR UPDATE")
        waits = rested.line_of_job("overlay waits: another transaction holds it since ")
        assert waits.endswith(f"(server process {conn.info.backend_pid} the application)")
        assert says(rested.typed("status"), "oldest due")
        for command in (["retry", "--now"], ["again"], ["cancel"]):
            assert "another transaction holds" in rested.typed(*command, rested.job).refused(1)
        assert rested.claimed() is None
        conn.rollback()
    assert rested.claimed().key == rested.job


def test_lost_call_whose_run_after_a_clock_set_back_has_made_far_away_is_retried(rested):
    assert rested.claimed()
    rested.database.rows(LEASE_OVER + "; DELETE FROM stage_leases")
    rested.database.rows("UPDATE stage_calls SET run_after = now() + interval '1 day'")
    assert rested.claimed() is None
    rested.follow(rested.line_of_job("overlay waits: its row has run_after "))
    assert rested.claimed().key == rested.job


def test_row_at_no_stage_with_a_call_of_a_lost_stage_is_cancelled(rested):
    lose_the_route(rested)
    rested.database.rows("SET session_replication_role = replica")
    rested.database.move(rested.job, "zoo", "done")
    rested.database.rows("RESET session_replication_role")
    rested.follow(rested.line_of_job("painter waits: "))
    assert rested.database.owed(rested.job) is None


@pytest.mark.parametrize("due_at", ["now()", "'infinity'"])
def test_call_of_a_lost_state_of_a_stage_is_cancelled_not_retried(rested, due_at):
    rested.database.rows("SET session_replication_role = replica")
    rested.database.move(rested.job, "zoo", "done")
    rested.database.rows("RESET session_replication_role")
    rested.database.rows(f"UPDATE stage_calls SET current_step = 'zoo', due_at = {due_at}")
    assert "./jsl retry" not in rested.line_of_job("owes: overlay")
    no_state = f"job {rested.job}: PIPELINE has no (zoo, done): ./jsl cancel {rested.job}"
    for options in ([], ["--dry-run"]):
        assert rested.typed("call", rested.job, *options).refused(1) == no_state
    if due_at == "'infinity'":
        nobody = f"PIPELINE has no (zoo, done), so nobody calls it: ./jsl job {rested.job}"
        assert nobody in rested.typed("retry", rested.job).lines
    rested.follow(rested.line_of_job("overlay waits: PIPELINE has no (zoo, done) any more; "))
    assert rested.database.owed(rested.job) is None


def test_calls_of_a_lost_stage_are_cancelled_by_its_name(rested):
    lose_the_route(rested)
    shown = rested.typed("cancel", "--stage", "painter").lines[-1]
    assert rested.database.owed(rested.job)
    rested.follow(shown)
    assert rested.database.owed(rested.job) is None
    refused = rested.typed("cancel", "--stage", "painter").refused(2)
    assert refused.startswith("Invalid value for '--stage': 'painter' is no stage: ")


def test_without_a_listener_a_due_call_says_so(database, listener, api, tmp_path):
    environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    rested = Rested(database, lambda *args: commands.run_here(environ, *args)).add()
    assert says(rested.typed("status"), "no listener is connected: start ./jsl")
    waits = "overlay waits: no listener is connected; ./jsl"
    assert rested.line_of_job("overlay waits: ") == waits
    assert says(rested.typed("jobs", "--stage", "overlay"), "overlay: due now")
    assert listener(rested.database, "run", "--once", api=api).wait() == 0
    assert rested.database.state(rested.job) == ("vlm_judge", "done")


def test_job_as_json_has_what_to_type(rested):
    back_off(rested)
    said = json.loads(rested.typed("job", "--json", rested.job).out)["waits"]
    assert said == {"why": "its last attempt failed",
                    "mend": f"./jsl retry --now {rested.job}"}  # fmt: skip
    rested.typed("cancel", rested.job)
    rests = json.loads(rested.typed("job", "--json", rested.job).out)["rests"]
    assert (rests["kind"], rests["stage"]) == ("cancelled", "overlay")
    assert rests["mend"] == f"./jsl again {rested.job}"


# --- again ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrange", "before"),
    [
        (give_up, ", in place of call {}, which was given up"),
        (accept, r" (call {} was accepted "),
        (cancel, r" (call {} was cancelled by "),
        (lambda rested: None, ", in place of call {}, which was not made yet"),
    ],
    ids=["given up", "accepted", "cancelled", "due"],
)
def test_again_records_a_call_of_its_own_and_says_of_the_one_before(rested, arrange, before):
    first = rested.database.owed(rested.job).call_id
    arrange(rested)
    [line] = rested.typed("again", rested.job).lines
    owed = rested.database.owed(rested.job)
    assert owed.call_id != first and owed.attempts == 0
    said = f"recorded: job {rested.job}, stage overlay, call {owed.call_id}"
    assert line.startswith(said + before.format(first))


def test_again_does_not_repeat_a_call_under_way(rested):
    worker = rested.claimed().call_id and rested.database.owed(rested.job).worker
    before = rested.database.owed(rested.job)
    refused = rested.typed("again", rested.job).refused(1)
    assert refused.startswith(f"job {rested.job}: {worker} is calling overlay, until ")
    assert rested.database.owed(rested.job) == before


@pytest.mark.parametrize("more", [[], ["--stage", "planner"]], ids=["", "another stage"])
def test_again_sends_no_row_back_whose_stage_has_set_it_running(rested, more):
    rested.claimed()
    rested.database.move(rested.job, "overlay", "running")
    refused = rested.typed("again", rested.job, *more).refused(1)
    assert refused.endswith(" at the latest; nothing was changed") and "UPDATE" not in refused


def test_again_leaves_the_call_of_the_state_that_the_job_comes_to_meanwhile(rested):
    with rested.database.connect() as change, ThreadPoolExecutor() as pool:
        change.autocommit = False
        change.cursor().execute("UPDATE jobs SET current_step = 'overlay', status = 'done'")
        typing = pool.submit(rested.typed, "again", rested.job)
        rested.database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database())"
        )
        change.commit()
        typing.result().refused(1)
    assert rested.database.owed(rested.job).stage == "vlm_judge"


OTHER_STAGE = "UPDATE pipeline_stages SET stage = 'other' WHERE stage = %s"
NOT_OURS = (
    "or the database has another PIPELINE; nothing was changed: run `make trigger` (./jsl install),"
    " if this PIPELINE is the newer one"
)


def test_again_records_no_call_of_another_stage_than_it_names(database, run_command):
    rested = Rested(database, lambda *args: run_command(database, *args)).add()
    accept(rested)
    rested.database.rows(OTHER_STAGE, "overlay")
    assert rested.typed("again", rested.job).refused(1).endswith(NOT_OURS)
    assert rested.database.owed(rested.job) is None


def test_again_of_a_paused_stage_says_what_keeps_it(rested):
    pause(rested)
    _, hold = rested.typed("again", rested.job).lines
    assert hold.endswith("new fonts; ./jsl resume overlay")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            ("overlay", "failed"),
            "from which no stage follows; to call overlay again: UPDATE jobs SET ",
        ),
        (
            ("overlay", "running"),
            "from which no stage follows; to call overlay again: once this has lasted longer than "
            "the timeout of overlay, UPDATE jobs SET ",
        ),
        (("vlm_judge", "done"), "from which no stage follows"),
        (("zoo", "done"), "from which no stage follows"),
        (
            ("overlay", "Done"),
            "from which no stage follows; PIPELINE has no such state: is (overlay, done) meant?",
        ),
    ],
)
def test_again_where_nothing_follows_says_where_the_job_is(rested, state, said):
    rested.database.move(rested.job, *state)
    refused = rested.typed("again", rested.job).refused(1)
    assert refused.startswith(f"job {rested.job} is at ({', '.join(state)}), {said}")
    assert rested.database.owed(rested.job) is None


def test_again_of_another_stage_says_how_the_job_gets_there(rested):
    refused = rested.typed("again", rested.job, "--stage", "planner").refused(1)
    assert "does not follow from that; to call planner again: UPDATE jobs SET " in refused
    rested.follow(refused)
    assert rested.database.owed(rested.job).stage == "planner"


def test_sql_that_sends_a_job_back_leaves_one_alone_that_has_moved_on(rested):
    """As where two people do what one alert says, or the stage has ended its work after all."""
    leave_running(rested)
    line = rested.line_of_job("rests since")
    rested.database.move(rested.job, "overlay", "done")
    rested.follow(line)
    assert rested.database.value("SELECT current_step FROM jobs") == "overlay"


def test_again_of_a_deleted_job(rested):
    rested.claimed()
    rested.database.rows("DELETE FROM jobs")
    assert rested.typed("again", rested.job).refused(1) == f"job {rested.job} was deleted"


@pytest.mark.parametrize("command", ["again", "retry"])
def test_call_of_a_routed_failed_that_a_person_wants_is_made(routed, run_command, command):  # noqa: F811
    """It does not go on counting from the call before, whose attempts are spent."""
    routed.fails("jobs", lambda _: Answer(500, b"no GPU"))
    process = routed.start(**FAST)
    row = routed.add("jobs")
    until(routed.told, "an alert")
    routed.wait_until_settled()
    process.stop()
    routed.api.on("/vlm_analyze", lambda _: Answer(200))
    given = {"PYTHONPATH": str(commands.ROOT / "tests"), "PIPELINE_MODULE": routed.module}
    assert run_command(routed.database, command, row, **given).code == 0
    assert routed.start("run", "--once", **FAST).wait() == 0
    assert len(routed.calls("vlm_analyze")) == 4
    assert routed.database.attempts(row)[-1].outcome == "succeeded"


# --- joins ---------------------------------------------------------------------------------


def test_join_that_waits_for_rows_names_them_and_goes_on_with_the_last(variants, run):  # noqa: F811
    job = variants.database.add_job("x", "y")
    [there] = variants.add(job, "iou_eval", "done")
    [missing] = variants.add(job, "img_gen", "queued")
    look(variants.database)
    lines = run("job", job).lines
    assert lines[2].endswith("waiting for 1 of 2")
    assert any(line.startswith(missing) and "img_gen, queued" in line for line in lines)
    assert says(run("jobs"), r"every jobs_variants .* 0 +1 +ad_copy +0 +0")
    assert says(run("status"), "nothing is due")
    refused = run("again", job, "--stage", "ad_copy").refused(1)
    assert refused.endswith("every jobs_variants (iou_eval, done): waiting for 1 of 2")
    variants.finish(missing)
    look(variants.database)
    assert variants.owed() == [("jobs", job, "ad_copy")] and there


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled", "set failed"])
def test_join_is_called_again_whatever_became_of_its_call(variants, run, outcome):  # noqa: F811
    job = variants.database.add_job("x", "y")
    variants.add(job, "iou_eval", "done", count=2)
    look(variants.database)
    if outcome == "cancelled":
        assert run("cancel", job).code == 0
    else:
        call(variants.database, ["ad_copy"], outcome.replace("set failed", "succeeded"), error="x")
    if outcome == "set failed":  # after it had answered
        variants.database.move(job, "ad_copy", "failed")
        [line] = [one for one in run("job", job).lines if one.startswith("rests ")]
        typed = line.split("to call ad_copy again: ./jsl ")[1]
        assert typed == f"again --stage ad_copy {job}"
    assert run("again", job, "--stage", "ad_copy").code == 0
    with connected(variants.database) as conn:
        row = claim(conn, stages=["ad_copy"])
    assert (row.key, row.owed, row.accepted, row.spent) == (job, True, False, 1)
    assert "is calling ad_copy" in run("again", job, "--stage", "ad_copy").refused(1)


def test_join_that_was_never_recorded_is_recorded_by_what_job_says(variants, run):  # noqa: F811
    job = variants.database.add_job("x", "y")
    variants.add(job, "iou_eval", "done", count=2)
    variants.database.rows("TRUNCATE stage_looks")
    [line] = [one for one in run("job", job).lines if one.startswith("every ")]
    typed = line.split("ad_copy is not recorded: ./jsl ")[1]
    assert run(*shlex.split(typed)).code == 0
    assert variants.owed() == [("jobs", job, "ad_copy")]
    # A look that comes later finds nothing left to do.
    before = variants.database.owed(job)
    look(variants.database)
    assert variants.database.owed(job) == before


def test_own_call_and_that_of_a_join_are_recorded_apart(variants, run, joined):  # noqa: F811
    call(variants.database, ["ad_copy", "instagram"])
    assert variants.owed() == []
    assert ", stage instagram, " in run("again", joined).lines[0]
    assert ", stage ad_copy, " in run("again", joined, "--stage", "ad_copy").lines[0]
    assert variants.owed() == [("jobs", joined, "ad_copy"), ("jobs", joined, "instagram")]


def test_again_records_no_join_of_another_stage_than_it_names(variants, run, joined):  # noqa: F811
    call(variants.database, ["ad_copy", "instagram"])
    variants.database.rows(OTHER_STAGE, "ad_copy")
    assert run("again", joined, "--stage", "ad_copy").refused(1).endswith(NOT_OURS)
    assert variants.owed() == []


def test_parent_whose_own_state_leads_nowhere_is_told_of_its_joins(variants, run):  # noqa: F811
    job = variants.database.add_job("x", "y")
    refused = run("again", job).refused(1)
    assert refused.endswith(
        "from which no stage follows; give --stage ad_copy for that of its rows"
    )
    refused = run("again", job, "--stage", "ad_copy").refused(1)
    assert refused.endswith("there is no row yet")


# --- ids that are hard to type -------------------------------------------------------------

HARD = ["-8", "--all", "a b", "it's", "$HOME", "'; DROP TABLE jobs; --",
        "it's\na\\n\x1bb\x7f\u0085c\u2028"]  # fmt: skip


def test_every_hint_works_as_it_is_typed(empty_database, tmp_path):
    empty_database.rows("CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text,"
                        " current_step text, status text, updated_at timestamptz)")  # fmt: skip
    environ = empty_database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    rested = Rested(empty_database, lambda *args: commands.run_here(environ, *args))
    assert rested.typed("install").code == 0
    others = itertools.product((back_off, accept, set_failed), (HARD[0], HARD[-1]))
    for arrange, rested.job in [*((give_up, job) for job in HARD), *others]:
        empty_database.rows("DELETE FROM jobs; DELETE FROM stage_calls; DELETE FROM stage_attempts")
        empty_database.rows("DELETE FROM stage_leases")
        empty_database.rows("INSERT INTO jobs VALUES (%s, 't', 'planner', 'done')", rested.job)
        arrange(rested)
        lines = rested.typed("job", "--", rested.job).lines
        [line] = [one for one in lines if "; ./jsl " in one or "again: " in one]
        rested.follow(line)
        assert rested.claimed().key == rested.job
