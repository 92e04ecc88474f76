"""`retry` and `call`: a person decides about calls that wait, or runs one by hand."""

import re
import shlex
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from claims import LEASE_OVER, claim, connected
from commands import run_here
from stage_functions import BREAK
from tcp_proxy import TcpProxy
from waiting import gate, wait_for_call

import calls
import db
from demo.stage_server import Answer, Hangup
from ops import rows, steer
from ops.problem import Problem

GIVE_UP = "UPDATE stage_calls SET due_at = 'infinity', attempts = 5, last_error = 'HTTP 500'"
SEE = " See: ./jsl retry --help"
USAGE = "Give job ids, or some of --stage, --tenant, --error and --since, or --all."


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def given_up(database) -> list[str]:
    """Two given-up calls of planner's job, one of overlay."""
    jobs = [database.add_job(step, "done") for step in ("yolo_detect", "yolo_detect", "planner")]
    database.rows(GIVE_UP)
    return jobs


def due(database) -> set[str]:
    """The jobs whose calls are due, with all their attempts forgiven."""
    forgiven = "SELECT job_id::text FROM stage_calls WHERE free_attempts = attempts"
    return {row.job_id for row in database.rows(forgiven + " AND due_at <= now()")}


def test_retry_makes_the_jobs_named_due_again(database, run_command, given_up):
    done = run_command(database, "retry", *given_up[:2])
    assert (done.code, done.lines) == (
        0,
        [f"due again: job {job}, stage planner" for job in given_up[:2]],
    )
    assert due(database) == set(given_up[:2])


def test_retry_of_a_stage_leaves_the_others(database, run_command, given_up):
    assert len(run_command(database, "retry", "--stage", "planner", "--yes").lines) == 2
    assert due(database) == set(given_up[:2])


def test_given_up_call_of_a_stage_that_left_pipeline_is_not_advised_to_be_retried(
    database, run_command, given_up
):
    database.rows("UPDATE stage_calls SET stage = 'release', current_step = 'check'"
                  " WHERE stage = 'overlay'")  # fmt: skip
    lines = run_command(database, "job", given_up[2]).lines
    assert lines[1].endswith("given up: HTTP 500")
    assert lines[2].startswith("release waits: PIPELINE has no stage release; ./jsl again ")
    assert given_up[2] in run_command(database, "jobs", "--stage", "release").lines[1]
    note = f"PIPELINE has no stage release, so nobody calls it: ./jsl job {given_up[2]}"
    assert run_command(database, "retry", given_up[2]).lines[1:] == [note]
    note = "  note: 1 open call of states or stages that PIPELINE no longer has: ./jsl status"
    assert note in run_command(database, "install").lines


def test_given_up_call_of_a_stage_that_only_the_database_has_is_advised_to_be_retried(
    database, run_command, given_up
):
    for table in ("stage_calls", "pipeline_stages"):
        database.rows(f"UPDATE {table} SET stage = 'release' WHERE stage = 'overlay'")
    retry = f"; ./jsl retry {given_up[2]}"
    assert run_command(database, "job", given_up[2]).lines[1].endswith(retry)
    done = run_command(database, "retry", given_up[2])
    assert done.lines == [f"due again: job {given_up[2]}, stage release"]


def test_retry_of_all(database, run_command, given_up):
    done = run_command(database, "retry", "--all", "--yes")
    assert (done.code, len(done.lines)) == (0, 3)
    assert due(database) == set(given_up)


@pytest.mark.parametrize("which", [["--all"], ["--stage", "overlay"]])
def test_retry_with_nothing_given_up_says_so(database, run_command, which):
    database.add_job("planner", "done")
    done = run_command(database, "retry", *which)
    assert (done.code, done.lines) == (0, ["no such call was given up"])


@pytest.mark.parametrize("now", [[], ["--now"]])
@pytest.mark.parametrize("yes", [[], ["--yes"]])
def test_retry_where_all_that_is_given_up_was_accepted_says_so(
    database, run_command, given_up, yes, now
):
    database.rows("UPDATE stage_calls SET last_error = %s", f"{calls.DO_NOT_RETRY}: disk full")
    done = run_command(database, "retry", "--all", *yes, *now)
    said = "no such call was given up, but for 3 that the stage has accepted"
    assert (done.code, done.lines) == (0, [said])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("", USAGE),
        ("--all --stage overlay", "--all goes without --stage, --tenant, --error and --since."),
        ("--all --tenant t", "--all goes without --stage, --tenant, --error and --since."),
        ("7 --all", "Job ids go with --stage and --table only."),
        ("7 --tenant t", "Job ids go with --stage and --table only."),
    ],
)
def test_retry_must_be_told_which_and_only_once(database, run_command, args, said):
    assert run_command(database, "retry", *args.split()).refused(2) == said + SEE


def test_retry_of_a_call_that_waits_for_its_rate_names_no_command(database, run_command):
    database.rows("INSERT INTO stage_limits (name, stages, seconds, next_at) VALUES"
                  " ('overlay', '{overlay}', 60, now() + interval '1 min')")  # fmt: skip
    refused = run_command(database, "retry", database.add_job("planner", "done")).refused(1)
    assert re.search(r"it is not given up: overlay has a rate; its next call is due \S+$", refused)


def test_retry_of_a_call_that_was_not_given_up_changes_nothing(database, run_command):
    job = database.add_job("planner", "done")
    before = database.owed(job)
    refused = run_command(database, "retry", job).refused(1)
    assert refused.startswith(f"job {job} owes a call to overlay, due ")
    assert refused.endswith("it is not given up")
    assert database.owed(job) == before


def test_retry_of_a_job_that_owes_nothing_says_where_it_is(database, run_command):
    job = database.add_job("vlm_judge", "done")
    refused = run_command(database, "retry", job).refused(1)
    assert refused == f"job {job} owes no call: it is at (vlm_judge, done)"


def test_retry_does_what_it_can_and_names_the_rest(database, run_command, given_up):
    unknown, idle = str(uuid.uuid4()), database.add_job("img_gen", "queued")
    done = run_command(database, "retry", given_up[0], unknown, given_up[2], idle)
    assert done.refused(1) == (
        f"there is no job {unknown}; job {idle} owes no call: it is at (img_gen, queued)"
    )
    assert done.out.count("due again: ") == 2
    assert due(database) == {given_up[0], given_up[2]}


def test_retry_says_what_keeps_a_call_that_is_due_again(database, run_command, given_up):
    run_command(database, "pause", "planner", "--reason", "new GPU")
    done = run_command(database, "retry", "--all", "--yes")
    assert any("planner is paused by" in line and line.endswith(": new GPU; ./jsl resume planner")
               for line in done.lines)  # fmt: skip


def test_retry_tells_what_it_did_before_a_malformed_id(database, run_command, given_up):
    done = run_command(database, "retry", given_up[0], "typo", given_up[1])
    assert "typo" in done.refused(2)
    assert done.out == f"due again: job {given_up[0]}, stage planner\n"
    assert due(database) == {given_up[0]}


# --- chosen by filters ---------------------------------------------------------------------

FILTERS = {
    "stage": ["--stage", "planner"],
    "error": ["--error", "no memory"],
    "error as JSON has it": ["--error", "메모리"],
    "tenant": ["--tenant", "acme"],
    "since": ["--since", "2h"],
}


@pytest.fixture
def chosen(database) -> list[str]:
    """Two jobs whose calls match every filter, the calls given up; a third matches none."""
    jobs = [database.add_job("yolo_detect", "done", tenant="acme") for _ in range(2)]
    jobs.append(database.add_job("planner", "done"))
    database.rows(GIVE_UP + ", created_at = now() - interval '1 day'")
    database.rows(
        "UPDATE stage_calls SET last_error = %s, created_at = now() WHERE stage = 'planner'",
        "HTTP 500: No Memory (\\uba54\\ubaa8\\ub9ac)",
    )
    return jobs


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_what_filters_choose_is_shown_first_and_done_as_typed_then(
    database, run_command, chosen, filters
):
    shown = run_command(database, "retry", *filters)
    assert {line.split()[0] for line in shown.lines[1:-1]} == set(chosen[:2])
    said, typed = shown.lines[-1].split(": ./jsl ")
    assert said == "2 calls, nothing was changed; to make them due"
    assert due(database) == set()
    done = run_command(database, *shlex.split(typed))
    assert sorted(done.lines) == sorted(
        f"due again: job {job}, stage planner" for job in chosen[:2]
    )
    assert due(database) == set(chosen[:2])


def test_filters_narrow_each_other_down(database, run_command, chosen):
    done = run_command(database, "retry", "--tenant", "acme", "--stage", "overlay", "--yes")
    assert done.lines == ["no such call was given up"]


def test_cancel_by_filters_is_shown_first_and_keeps_the_reason(database, run_command, chosen):
    shown = run_command(database, "cancel", "--error", "no memory", "--reason", "too large")
    assert database.value("SELECT count(*) FROM stage_calls") == 3
    typed = shown.lines[-1].split(": ./jsl ")[1]
    assert typed == "cancel '--reason=too large' --error 'no memory' --yes"
    assert len(run_command(database, *shlex.split(typed)).lines) == 2
    assert [row.job_id for row in database.rows("SELECT job_id::text FROM stage_calls")] == chosen[
        2:
    ]
    [attempt] = database.attempts(chosen[0])
    assert (attempt.outcome, attempt.error) == ("cancelled", "too large")


def test_cancel_does_what_it_can_and_names_the_rest(database, run_command, chosen):
    unknown = str(uuid.uuid4())
    done = run_command(database, "cancel", chosen[0], unknown, chosen[2])
    assert done.refused(1) == f"there is no job {unknown}"
    assert done.out.count("cancelled: ") == 2


def test_calls_of_a_filter_that_another_transaction_holds_are_named(database, run_command, chosen):
    with closing(database.connect()) as conn:
        conn.autocommit = False
        conn.cursor().execute("UPDATE jobs SET status = 'x' WHERE job_id = %s", [chosen[0]])
        done = run_command(database, "retry", "--stage", "planner", "--yes")
    said = done.refused(1)
    assert said.startswith("1 call is left: another transaction holds them, or they match only ")
    assert due(database) == {chosen[1]}


READING = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'jobs'::regclass"


@pytest.mark.parametrize("command", ["retry", "cancel"])
def test_search_for_the_calls_of_a_tenant_locks_none(variants, run_command, command):
    """Those of rows with a parent take long, as each is asked for its tenant."""
    database = variants.database
    job = database.add_job(tenant="acme")
    variants.add(job, status="done")
    database.rows(GIVE_UP)
    with closing(database.connect()) as change, ThreadPoolExecutor() as pool:
        change.cursor().execute("BEGIN; LOCK TABLE jobs")
        done = pool.submit(run_command, database, command, "--tenant", "acme", "--yes")
        database.wait_for(READING)
        free = database.rows("SELECT job_id FROM stage_calls FOR UPDATE SKIP LOCKED")
    assert len(free) == 2
    assert done.result().code == 1


@pytest.mark.parametrize("words", ["retry", "cancel", "retry --all --yes"])
def test_change_that_nobody_confirms_has_the_usual_deadline(database, given_up, monkeypatch, words):
    monkeypatch.setattr(db.Connection, "deadline", 1.0)
    monkeypatch.setattr(db, "DEADLINE", 1.0)
    changes = "DELETE FROM stage_calls" if "cancel" in words else "SET due_at = clock_timestamp()"
    with TcpProxy(database.environ) as proxy:
        proxy.hold_answer(changes)
        environ = database.environ | {name: str(at) for name, at in proxy.settings.items()}
        done = run_here(environ, *words.split(), *([] if "--all" in words else given_up[:1]))
    assert "the database did not answer within 1 s" in done.refused(3)


def test_more_calls_than_one_statement_takes_are_all_made_due(database, run_command):
    database.rows("INSERT INTO jobs (current_step, status)"
                  " SELECT 'planner', 'done' FROM generate_series(1, 1500)")  # fmt: skip
    database.rows(GIVE_UP)
    done = run_command(database, "retry", "--all", "--yes")
    assert done.lines[-1] == "and 1480 more"
    assert len(due(database)) == 1500


def test_retry_now_hurries_what_is_in_its_back_off_and_keeps_what_is_spent(database, run_command):
    job = database.add_job("planner", "done")
    later = "UPDATE stage_calls SET due_at = now() + interval '1 h', attempts = 2"
    database.rows(later + ", last_error = 'HTTP 500'")
    hint = run_command(database, "retry", "--all", "--yes")
    assert hint.lines == ["no such call was given up; 1 call due later: --now"]
    refused = run_command(database, "retry", job).refused(1)
    assert refused.endswith(f"its last attempt failed: ./jsl retry --now {job}")
    assert run_command(database, "retry", "--now", "--all", "--yes").code == 0
    owed = database.owed(job)
    assert database.value("SELECT due_at <= now() FROM stage_calls")
    assert (owed.attempts, owed.free_attempts) == (2, 0)


# --- call ----------------------------------------------------------------------------------


def test_call_that_succeeds_is_logged_and_exits_0(database, api, run_command):
    job = database.add_job("planner", "done")
    done = run_command(database, "call", job, api=api)
    assert done.code == 0
    assert f"[TRIGGER] 파이프라인 단계 트리거: job={job} stage=overlay attempt=1/5" in done.lines[0]
    assert f"파이프라인 단계 실행 성공: job={job} stage=overlay status=200" in done.lines[1]
    assert database.state(job) == ("overlay", "done")
    assert [attempt.outcome for attempt in database.attempts(job)] == ["succeeded"]


def test_call_after_a_lost_attempt_is_the_last_in_the_history(database, api, run_command):
    job = database.add_job("planner", "done")
    with connected(database) as conn:
        claim(conn)
    database.rows(LEASE_OVER)
    assert run_command(database, "call", job, api=api).code == 0
    sql = "SELECT outcome FROM stage_attempts ORDER BY finished_at"
    assert database.rows(sql) == [("lost",), ("succeeded",)]


def test_call_that_fails_exits_1_and_stays_owed(database, api, run_command):
    api.on("overlay", lambda _: Answer(500, b"no memory"))
    job = database.add_job("planner", "done")
    done = run_command(database, "call", job, api=api)
    assert done.code == 1
    assert "파이프라인 단계 실행 실패" in done.lines[-1]
    assert "HTTP 500: no memory" in done.lines[-1]
    assert database.owed(job).last_error == "HTTP 500: no memory"


def test_call_of_a_job_that_owes_nothing_exits_1(database, api, run_command):
    job = database.add_job("planner", "running")
    refused = run_command(database, "call", job, api=api).refused(1)
    assert refused == f"job {job} owes no call: it is at (planner, running)"
    assert api.requests == []


def test_call_that_a_listener_makes_is_left_to_it(database, api, listener, run_command):
    with gate(api):
        listener(database, api=api)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        worker = database.owed(job).worker
        refused = run_command(database, "call", job, api=api).refused(1)
        assert refused.startswith(f"job {job}: {worker} is calling vlm_analyze; its lease ends ")
        assert len(api.calls(job)) == 1


WAITING = {
    "given up": GIVE_UP,
    "not due yet": "UPDATE stage_calls SET due_at = now() + interval '1 h', attempts = 1",
    "stage held": "UPDATE pipeline_stages SET held_until = now() + interval '1 h'",
}


@pytest.mark.parametrize("why", WAITING)
def test_call_does_not_wait(database, api, run_command, why):
    job = database.add_job("planner", "done")
    database.rows(WAITING[why])
    assert run_command(database, "call", job, api=api).code == 0
    assert database.state(job) == ("overlay", "done")


def test_call_of_a_given_up_job_has_all_its_attempts_again(database, api, run_command):
    api.on("overlay", lambda _: Answer(500))
    job = database.add_job("planner", "done")
    database.rows(GIVE_UP)
    assert run_command(database, "call", job, api=api).code == 1
    owed = database.owed(job)
    assert (owed.given_up, owed.attempts - owed.free_attempts) == (False, 1)


def test_call_that_its_stage_has_no_place_for_changes_nothing(database):
    database.rows("INSERT INTO stage_limits VALUES ('overlay', '{overlay}', 1)")
    database.add_job("planner", "done")
    with connected(database) as conn:
        claim(conn)
        job = database.add_job("planner", "done")
        database.rows(f"{GIVE_UP} WHERE job_id = %s", job)
        before = database.owed(job)
        with pytest.raises(Problem, match="overlay is at its limit of 1 call at once"):
            steer.call_by_hand(conn, database.settings(), "w", rows.find(conn, job), None)
    assert before.given_up and database.owed(job) == before


def test_given_up_call_of_a_stage_that_left_the_pipeline_says_so(database, api, run_command):
    job = database.add_job("planner", "done")
    database.rows(f"{GIVE_UP}, stage = 'painter'")
    refused = run_command(database, "call", job, api=api).refused(1)
    assert refused == f"job {job}: PIPELINE has no stage painter: ./jsl again {job}"


def test_call_that_may_still_be_running_is_not_repeated(database, api, run_command):
    def cut(request):
        request.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
        raise Hangup

    api.on("overlay", cut)
    job = database.add_job("planner", "done")
    assert run_command(database, "call", job, api=api).code == 1
    assert database.attempts(job)[-1].outcome == "unknown"
    api.on("overlay", None)
    refused = run_command(database, "call", job, api=api).refused(1)
    assert f"job {job}: its last call of overlay got no answer and may still be running" in refused
    assert len(api.calls(job)) == 1


def test_call_of_a_job_that_has_moved_on_unseen_calls_nothing(database, api, run_command):
    job = database.add_job("planner", "done")
    database.rows("SET session_replication_role = replica")
    database.move(job, "overlay", "running")
    done = run_command(database, "call", job, api=api)
    assert done.refused(1) == f"job {job} owes no call: it is at (overlay, running)"
    assert "Job 상태가 변경되어 스킵" in done.out
    assert api.requests == []


def test_call_without_our_tables_says_what_to_run(empty_database, run_command):
    refused = run_command(empty_database, "call", "7").refused(1)
    assert refused == ("the listener's tables are missing: run `make trigger` (./jsl install)")


CALLING = "datname = current_database() AND application_name LIKE 'job-state-listener call%%'"


@pytest.mark.parametrize("loses", ["its session", "its tables for a while"])
def test_call_that_was_accepted_is_recorded_though_it(loses, database, api, listener):
    with gate(api, "overlay", Answer(200)) as opened, database.connect() as change:
        process = listener(database, "call", job := database.add_job("planner"), api=api)
        wait_for_call(api, job)
        change.autocommit = False
        if loses == "its session":
            database.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {CALLING}")
        else:
            change.cursor().execute("LOCK TABLE stage_calls IN ACCESS EXCLUSIVE MODE")
        opened.set()
        if loses != "its session":
            process.wait_for_line("워커가 결과를 기록할 수 없음")
        change.rollback()
        assert process.wait() == 0
    assert [attempt.outcome for attempt in database.attempts(job)] == ["succeeded"]
    assert database.owed(job) is None


def test_call_that_cannot_be_recorded_within_its_lease_says_so(database, api, listener):
    allowed = "UPDATE pg_database SET datallowconn = %s WHERE datname = current_database()"
    with gate(api, "overlay", Answer(200)) as opened:
        process = listener(database, "call", job := database.add_job("planner"), api=api,
                           STAGE_TIMEOUT=2, LEASE_MARGIN=2)  # fmt: skip
        wait_for_call(api, job)
        database.rows(allowed, False)
        database.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {CALLING}")
        opened.set()
        assert process.wait() == 3
    said = "the result of this call to overlay (succeeded) could not be recorded"
    assert process.wait_for_line(said).endswith(f"./jsl job {job} says whether it is made again")
    database.rows(allowed, True)


@pytest.mark.parametrize("args", [["call"], ["run", "--once"]], ids=" ".join)
def test_debugger_stops_in_the_stage_function(database, api, run_command, args):
    job = database.add_job("overlay", "done")
    # Printed in one piece, as the listener may write a line at the same time.
    say = "print(f'at {call.job_id} {call.attempt}')"
    typed = f"{BREAK}\ncontinue\n{say}\ncontinue\nq\n"
    given = [*args, job] if args == ["call"] else args
    done = run_command(database, *given, api=api, stdin=typed, python=("-m", "pdb"))
    assert f"at {job} 1" in done.out, done.out
    assert "The program exited via sys.exit(). Exit status: 0" in done.out
    assert database.state(job) == ("vlm_judge", "done")
