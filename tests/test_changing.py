"""PIPELINE changes while calls are owed and listeners of another PIPELINE run."""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from claims import claim, connected
from commands import run_here
from raw_server import in_turn
from variants import TABLE, VARIANTS, stage
from waiting import until

import db
import history
import joins
import leftovers
import moves
import trigger
import upkeep
from ops import backfill, install, rows, steer
from ops.install import ORPHANS, apply
from ops.problem import Problem
from pipeline import Call, Route, Table, limits

A, B, C = stage("aa"), stage("bb"), stage("cc")
VARIANT = "INSERT INTO jobs_variants VALUES (%s, %s, %s, 'done')"
DUE = "UPDATE stage_calls SET due_at = now()"


@pytest.fixture
def change(database, use_pipeline) -> Callable[[dict], None]:
    """change(dict): use this PIPELINE, and install it."""

    def to(routes: dict) -> None:
        use_pipeline(routes)
        with closing(db.connect(database.settings())) as conn:
            apply(conn)

    return to


def add_variant(database, step: str) -> tuple[str, str]:
    """A job and its only variant; their ids."""
    job, variant = database.add_job("img_gen", "running"), str(uuid.uuid4())
    database.rows(VARIANT, variant, job, step)
    return job, variant


def look(database, really: bool = False):
    """What backfill finds, and with `really` records."""
    with closing(db.connect(database.settings())) as conn:
        return backfill.look(conn, really, None)


# --- listeners of another PIPELINE ---------------------------------------------------------


def test_call_of_a_table_that_left_waits_for_its_return(
    database, accepting, caller, change, use_pipeline
):
    database.rows(TABLE)
    both = {("x", "done"): A, VARIANTS("v", "done"): B}
    change(both)
    newer = caller(accepting.url)
    _, variant = add_variant(database, "v")
    use_pipeline({("x", "done"): A})
    said = run_here(database.environ, "install").lines
    assert "  removed  trigger job_state_listener_change on jobs_variants" in said
    assert "  removed  function job_state_listener_jobs_variants()" in said
    assert newer.claim() is None
    assert database.attempts(variant) == [] and not database.owed(variant).given_up
    change(both)
    database.rows(DUE)
    assert newer.claim().key == variant


def test_call_of_a_join_that_left_waits_for_its_return(database, accepting, caller, change):
    database.rows(TABLE)
    less = {("x", "done"): A, VARIANTS("v", "done"): B}
    change(less | {VARIANTS.every("bb", "done"): C})
    newer = caller(accepting.url)
    job, _ = add_variant(database, "bb")
    joins.look(newer.conn)
    change(less)
    assert newer.claim() is None and database.attempts(job) == []
    change(less | {VARIANTS.every("bb", "done"): C})
    database.rows(DUE)
    assert newer.call().stage == "cc"


def test_join_whose_row_arrived_before_it_left_is_looked_at_on_its_return(
    database, accepting, caller, change
):
    database.rows(TABLE)
    less = {("x", "done"): A, VARIANTS("v", "done"): B}
    change(less | {VARIANTS.every("bb", "done"): C})
    worker = caller(accepting.url)
    job, _ = add_variant(database, "bb")
    change(less)
    joins.look(worker.conn)  # takes the look of a join that is not known
    change(less | {VARIANTS.every("bb", "done"): C})
    joins.look(worker.conn)
    assert worker.call().job_id == job


@pytest.mark.parametrize("after", [{("x", "done"): B}, {("x", "done"): B, ("q", "done"): A}],
                         ids=["aa left", "aa is elsewhere"])  # fmt: skip
def test_older_listener_calls_no_other_stage_than_the_one_of_now(
    database, accepting, caller, change, after
):
    change({("x", "done"): A, ("aa", "done"): B})
    older = caller(accepting.url)
    job = database.add_job("x")
    change(after)
    for _ in range(3):
        assert older.claim() is None
        database.rows(DUE)
    assert (accepting.connections, database.attempts(job)) == (0, [])
    assert "(x, done) → bb" in older.line("다른 PIPELINE의 호출을 미룸")
    assert caller(accepting.url, "new").call().stage == "bb"


def test_pause_and_limit_of_a_stage_hold_until_its_last_listener_has_ended(
    database, accepting, caller, change
):
    change({("x", "done"): limits(max_running=1)(stage("aa")), ("y", "done"): B})
    older = caller(accepting.url)
    job = database.add_job("x")
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'aa'")
    change({("y", "done"): B})
    assert older.claim() is None
    assert (database.owed(job).stage, database.owed(job).attempts) == ("aa", 1)
    assert database.owed(job).free_attempts == 1 and accepting.connections == 0


def test_skip_of_a_row_that_was_not_found_is_no_call_that_was_made(database, accepting, change):
    change({("x", "done"): A})
    job = database.add_job("x")
    database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
        " finished_at, outcome, error) SELECT job_id, call_id, 1, stage, 'w', now(), now(),"
        " 'skipped', 'the job has moved on: deleted' FROM stage_calls"
    )
    database.rows("DELETE FROM stage_calls")
    assert look(database).missed.total() == 1
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 day'")
    database.rows("UPDATE stage_attempts SET finished_at = now() - interval '1 day'")
    assert "never recorded" in database.value("SELECT reason FROM resting_rows()")
    assert look(database, really=True).missed.total() == 1 and database.owed(job)


# --- calls that were recorded before -------------------------------------------------------


def test_call_of_a_transaction_that_was_open_during_install_gets_the_stage_of_now(
    database, accepting, caller, change
):
    change({("x", "done"): A})
    job = database.add_job("w")
    with closing(database.connect()) as application:
        application.autocommit = False
        application.cursor().execute("UPDATE jobs SET current_step = 'x'")
        change({("x", "done"): B})
        application.commit()
    worker = caller(accepting.url)
    assert worker.claim() is None
    with closing(db.connect(database.settings())) as conn:
        assert db.execute(conn, ORPHANS).fetchone() == (1,)
    leftovers.adopt(worker.conn)
    assert (worker.call().stage, database.owed(job)) == ("bb", None)


GONE = "SELECT FROM stage_calls WHERE stage = 'gone'"


def test_all_calls_recorded_under_the_name_of_before_are_made_soon(
    database, accepting, caller, change, monkeypatch
):
    monkeypatch.setattr(upkeep, "BATCH", 2)
    change({("x", "done"): A})
    for _ in range(5):
        database.add_job("x")
    database.rows("UPDATE stage_calls SET stage = 'gone'")
    worker = caller(accepting.url)
    until(lambda: worker.listener.upkeep.run(worker.conn) or not database.rows(GONE), "all calls")


def owing_job_of_exchanged_stages(database, change) -> str:
    """A job whose call was locked while its stage got the name of another one."""
    change({("x", "done"): A, ("y", "done"): B})
    job = database.add_job("x")
    with closing(database.connect()) as application:
        application.autocommit = False
        application.cursor().execute("SELECT FROM stage_calls FOR UPDATE")
        change({("x", "done"): B, ("y", "done"): A})
        application.rollback()
    return job


def test_calls_of_stages_that_exchanged_their_names_while_locked_are_made(
    database, accepting, caller, change
):
    job = owing_job_of_exchanged_stages(database, change)
    worker = caller(accepting.url)
    assert worker.claim() is None and database.owed(job).stage == "bb"
    database.rows(DUE)
    assert worker.call().stage == "bb"


def test_call_by_hand_of_a_stage_that_exchanged_its_name_is_not_made_under_the_old_one(
    database, accepting, change
):
    job = owing_job_of_exchanged_stages(database, change)
    settings = database.settings(STAGE_API_URL=accepting.url)
    with closing(db.connect(settings)) as conn:
        row = rows.find(conn, job, None)
        with pytest.raises(Problem, match="recorded for aa, before PIPELINE changed: try again"):
            steer.call_by_hand(conn, settings, "hand", row, None)
        assert accepting.connections == 0
        assert steer.call_by_hand(conn, settings, "hand", row, None)
    assert [attempt.stage for attempt in database.attempts(job)] == ["bb"]


def test_calls_are_taken_over_in_batches(database, accepting, change, monkeypatch):
    change({("x", "done"): A})
    for _ in range(3):
        database.add_job("x")
    monkeypatch.setattr(install, "AT_ONCE", 1)
    monkeypatch.setattr(install, "ADOPT", leftovers.ADOPT.format(every="true", batch=1))
    change({("x", "done"): B})
    assert database.value("SELECT count(*) FROM stage_calls WHERE stage = 'bb'") == 3


def test_call_that_its_stage_has_taken_is_not_hurried_under_a_new_name(
    database, accepting, caller, change, run_command
):
    """Its lease has the old one."""
    change({("x", "done"): A, ("y", "done"): B})
    worker, job = caller(accepting.url), database.add_job("x")
    assert worker.claim().stage == "aa"
    change({("x", "done"): C, ("y", "done"): B, ("z", "done"): A})
    database.rows("UPDATE stage_calls SET worker = NULL")  # as after a 504
    run_command(database, "retry", "--now", job)
    assert not database.value("SELECT due_at <= now() FROM stage_calls")


@pytest.mark.parametrize("priority", [5, -5])
@pytest.mark.parametrize("recorded", ["before", "after"])
def test_call_of_a_table_without_priorities_any_more_is_made(
    database, accepting, caller, change, priority, recorded
):
    database.rows("ALTER TABLE jobs ADD priority integer")
    paced = limits(per_minute=6000)(stage("aa"))
    change({Table("jobs", id="job_id", priority="priority")("x", "done"): paced})
    database.rows(
        "INSERT INTO jobs (current_step, status, priority) VALUES ('x', 'done', %s)", priority
    )
    change({("x", "done"): paced})
    worker = caller(accepting.url)
    if recorded == "after":  # by a trigger that install has replaced since
        database.rows("UPDATE stage_calls SET priority = %s", priority)
        leftovers.adopt(worker.conn)
    assert worker.call().outcome == "succeeded"


def test_priorities_stay_where_they_are_declared(database, change):
    database.rows("ALTER TABLE jobs ADD priority integer")
    urgent = Table("jobs", id="job_id", priority="priority")("x", "done")
    change({urgent: A})
    database.rows("INSERT INTO jobs (current_step, status, priority) VALUES ('x', 'done', 5)")
    change({urgent: B})
    assert database.rows("SELECT stage, priority FROM stage_calls") == [("bb", 5)]


# --- calls under way -----------------------------------------------------------------------


def take(worker) -> Call:
    """Claim a call, as if its stage had answered 202."""
    call = worker.claim()
    worker.listener.keep(call, trigger.result(call, "taken", http_status=202))
    worker.settle()
    return call


def working(name: str) -> Callable:
    return limits(asynchronous=True, max_running=1)(stage(name))


@pytest.mark.parametrize("after", [{("x", "done"): B}, {("x", "done"): working("new")}],
                         ids=["removed", "renamed"])  # fmt: skip
def test_taken_call_goes_on_though_its_stage_was_changed(
    database, accepting, caller, change, after
):
    change({("x", "done"): working("old"), ("y", "done"): working("other")})
    database.add_job("x")
    take(caller(accepting.url))
    change(after | {("y", "done"): working("other")})
    newer = caller(accepting.url, "newer")
    moves.record_missed(newer.conn)
    assert moves.look(newer.conn)[0] == [] and newer.claim() is None
    database.rows("UPDATE jobs SET current_step = 'elsewhere'")
    moves.record_missed(newer.conn)
    assert [row.outcome for row in moves.look(newer.conn)[0]] == ["succeeded"]


def test_renamed_stage_counts_the_calls_of_its_old_name(database, accepting, caller, change):
    change({("x", "done"): working("old")})
    first, second = database.add_job("x"), database.add_job("x")
    call = take(caller(accepting.url))
    change({("x", "done"): working("new")})
    newer = caller(accepting.url, "newer")
    assert newer.claim() is None
    database.move(call.job_id, "new", "running")
    database.move(call.job_id, "new", "done")
    assert [row.stage for row in moves.look(newer.conn)[0]] == ["new"]
    assert newer.claim().job_id == ({first, second} - {call.job_id}).pop()


def test_call_that_is_claimed_during_a_rename_counts_under_the_new_name(
    database, accepting, caller, change
):
    change({("x", "done"): working("old")})
    database.add_job("x")
    take(caller(accepting.url))
    database.rows("CREATE TABLE claimed AS TABLE stage_leases; DELETE FROM stage_leases")
    with database.connect() as claiming, ThreadPoolExecutor() as pool:
        claiming.autocommit = False
        claiming.cursor().execute("SELECT FROM stage_limits FOR UPDATE")
        claiming.cursor().execute("INSERT INTO stage_leases TABLE claimed")
        renaming = pool.submit(change, {("x", "done"): working("new")})
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database())"
        )
        claiming.commit()
        renaming.result()
    assert database.value("SELECT stage FROM stage_leases") == "new"


def test_call_without_limits_that_is_claimed_during_a_rename_is_not_made_twice(
    database, accepting, caller, change
):
    change({("x", "done"): stage("old")})
    job = database.add_job("x")
    with connected(database) as claiming:
        db.execute(claiming, "BEGIN")
        claim(claiming, stages=["old"])
        change({("x", "done"): stage("new")})
        db.execute(claiming, "COMMIT")
    newer = caller(accepting.url, "newer")
    assert leftovers.adopt(newer.conn) == 1
    overview = "SELECT calling FROM pipeline_overview WHERE stage = 'new'"
    assert database.value(overview) == 1
    database.move(job, "x", "queued")
    database.move(job, "x", "done")
    assert newer.claim() is None


def test_row_that_runs_under_the_old_name_keeps_its_call(database, accepting, caller, change):
    change({("x", "done"): working("old")})
    database.add_job("x")
    call = take(caller(accepting.url))
    database.move(call.job_id, "old", "running")
    change({("x", "done"): working("new")})
    newer = caller(accepting.url, "newer")
    moves.record_missed(newer.conn)
    assert moves.look(newer.conn)[0] == []
    database.move(call.job_id, "old", "done")
    moves.record_missed(newer.conn)
    assert [row.outcome for row in moves.look(newer.conn)[0]] == ["succeeded"]


def test_taken_call_ends_with_its_move_though_no_stage_is_asynchronous_now(database, api, listener):
    job = database.add_job("vlm_judge", "done")
    database.rows(
        "INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
        " leased_until, working) VALUES (%s, 1, 1, 'vlm_judge', 'w', now(), 'infinity', true)",
        job,
    )
    listener(database, api=api)
    database.wait_for("SELECT outcome = 'succeeded' FROM stage_attempts WHERE job_id = %s", job)


def test_call_beyond_a_lowered_max_attempts_keeps_its_last_error(database, serve, caller, change):
    change({("x", "done"): A})
    url = serve(in_turn(b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\nno memory")).url
    job, before = database.add_job("x"), caller(url)
    before.call()
    before.call_again()
    database.rows(DUE)
    after = caller(url, "after", MAX_ATTEMPTS=2)
    assert after.claim() is None
    after.settle()
    error = "no attempt is left; the last one: HTTP 500: no memory"
    assert database.owed(job).last_error == error


# --- what install carries over -------------------------------------------------------------


@pytest.mark.parametrize("option", ["--no-notify", "--notify-owed"])
def test_table_that_takes_the_place_of_jobs_keeps_the_options(database, run_command, option):
    run_command(database, "install", "--no-insert", option)
    arguments = "SELECT tgargs::text FROM pg_trigger WHERE tgrelid = 'jobs'::regclass"
    before = database.rows(arguments)
    database.rows(
        "CREATE TABLE jobs_new (LIKE jobs INCLUDING ALL); ALTER TABLE jobs RENAME TO jobs_old;"
        " ALTER TABLE jobs_new RENAME TO jobs"
    )
    run_command(database, "install")
    assert database.rows(arguments) == before and len(before) == 1


@pytest.mark.parametrize("batch", [1, install.BATCH])
def test_calls_that_waited_take_turns_by_the_tenant_of_the_parent(
    database, accepting, caller, change, monkeypatch, batch
):
    monkeypatch.setattr(install, "BATCH", batch)
    database.rows(TABLE)
    change({VARIANTS("v", "done"): A})
    for tenant in ("first", "second", None):
        job = database.add_job("img_gen", "running", tenant)
        database.rows(VARIANT, str(uuid.uuid4()), job, "v")
    change({VARIANTS("v", "done"): limits(per_tenant=1)(stage("aa"))})
    worker = caller(accepting.url)
    calls = [worker.claim() for _ in range(4)]
    assert {call.tenant_id for call in calls if call} == {"first", "second", None}
    assert calls[3] is None


# --- history of the name of before ---------------------------------------------------------


@pytest.fixture
def renamed(database, accepting, caller, change) -> dict[str, str]:
    """Jobs that rest at (x, done), whose stage has another name now: one was accepted, the other
    was cancelled, long ago.
    """
    change({("x", "done"): A})
    jobs = {"accepted": database.add_job("x")}
    caller(accepting.url).call()
    jobs["cancelled"] = database.add_job("x")
    database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
        " finished_at, outcome, error) SELECT job_id, call_id, 0, stage, 'kim', now(), now(),"
        " 'cancelled', 'contract ended' FROM stage_calls; DELETE FROM stage_calls"
    )
    database.rows(
        "UPDATE stage_attempts SET started_at = now() - interval '40 days',"
        " finished_at = now() - interval '40 days';"
        " UPDATE jobs SET updated_at = now() - interval '40 days'"
    )
    change({("x", "done"): B, ("aa", "done"): C})
    return jobs


def test_calls_of_the_name_of_before_are_not_repeated(database, renamed):
    found = look(database, really=True)
    assert found.missed.total() == 0
    assert found.kept == {"under a name that PIPELINE no longer has": 2}
    [row] = database.rows("SELECT job_id, reason FROM resting_rows()")
    assert (row.job_id, row.reason[:21]) == (renamed["accepted"], "accepted by the stage")


def test_job_says_that_its_call_was_cancelled_under_the_name_of_before(database, renamed):
    lines = run_here(database.environ, "job", renamed["cancelled"]).lines
    again = f"; to call bb again: ./jsl again {renamed['cancelled']}"
    assert [line for line in lines if "cancelled by kim: contract ended" + again in line]


def test_history_of_the_name_of_before_is_kept_while_its_rows_rest(database, renamed):
    database.rows("UPDATE stage_totals_mark SET counted_until = now()")
    with connected(database) as conn:
        history.prune(conn, 30)
        assert len(database.rows("SELECT 1 FROM stage_attempts")) == 2
        database.rows("UPDATE jobs SET current_step = 'elsewhere'")
        history.prune(conn, 30)
    assert database.rows("SELECT 1 FROM stage_attempts") == []


def test_row_that_the_stage_of_before_has_moved_on_misses_its_call(database, renamed):
    job = renamed["accepted"]
    database.rows("SET session_replication_role = replica")
    database.rows("UPDATE jobs SET current_step = 'aa' WHERE job_id = %s", job)
    assert look(database, really=True).missed.total() == 1 and database.owed(job).stage == "cc"


# --- what people are told ------------------------------------------------------------------


def test_status_says_that_the_database_has_other_routes(database, run_command):
    database.rows("DELETE FROM pipeline_stages WHERE current_step IN ('planner', 'overlay')")
    done = run_command(database, "status")
    [problem] = [line for line in done.lines if line.startswith("PROBLEM")]
    assert problem.startswith("PROBLEM  routes differ (2): (overlay, done) → vlm_judge in ")


def test_status_says_so_beside_a_broken_trigger(database, run_command):
    database.rows("DELETE FROM pipeline_stages WHERE current_step = 'planner'")
    database.rows("DROP TRIGGER job_state_change_trigger ON jobs")
    lines = run_command(database, "status").lines
    trigger, routes = [line for line in lines if line.startswith("PROBLEM")]
    assert trigger == "PROBLEM  trigger job_state_change_trigger is missing on jobs"
    assert routes.startswith("PROBLEM  routes differ (1): ")


def test_install_says_what_becomes_of_a_stage_that_leaves(database, run_command):
    database.rows(
        "INSERT INTO pipeline_stages (current_step, status, stage, held_until)"
        " VALUES ('x', 'done', 'leaving', 'infinity'); UPDATE pipeline_stages"
        " SET stage = 'renamed', held_until = 'infinity' WHERE stage = 'planner'"
    )
    note, unseen = [line for line in run_command(database, "install").lines if "note: " in line][:2]
    assert note.strip().startswith("note: leaving has left PIPELINE: its pause is gone, and rows ")
    assert unseen.strip().startswith(
        "note: rows in (leaving, running), (leaving, failed), (renamed, running), (renamed, failed)"
        " are not told as stalled or failed any more: ./jsl jobs shows "
    )
    paused = "SELECT stage FROM pipeline_stages WHERE held_until = 'infinity'"
    assert database.rows(paused) == [("planner",)]


@pytest.mark.parametrize(("after", "told"), [(("aa", "done"), []), (("bb", "done"), ["aa"])])
def test_install_says_what_a_renamed_stage_may_still_write(after, told):
    def routes(name: str, state: tuple[str, str]) -> dict:
        return {
            Route("jobs", "", "x", "done"): (name, None),
            Route("jobs", "", *state): ("c", None),
        }

    before, now = routes("aa", ("aa", "done")), routes("bb", after)
    assert install.left(before, now) == told
    assert install.untold(before, now) == ["(aa, running)", "(aa, failed)"]
    assert install.untold(before, before | routes("bb", ("aa", "failed"))) == ["(aa, running)"]
