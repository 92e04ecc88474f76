"""`status`: every column in a real situation."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg2
import pytest
from busy import TIME
from claims import STAGES, connected
from guide import JOBS_TRIGGER
from scraping import scrape
from test_plans import rows_read
from waiting import LISTENERS, PATIENCE, gate, until, wait_for_call, wait_until_idle

import db
import troubles
from demo.stage_api import Answer, StageApi
from heartbeat import Heartbeat, heartbeats
from ops.limits import limits
from ops.migrations import LATEST
from ops.problem import Problem
from ops.routes import require_installed

NAMES = ["owed", "calling", "retry", "given up", "oldest due", "calls", "failed", "p50", "p95"]
IDLE = ["0", "0", "0", "0", "-", "0", "-", "-", "-"]
NO_LISTENER = "no listener is connected: start ./jsl"


@pytest.fixture
def run_command(run_here):
    return run_here


class Status:
    """What `status` printed: the summary, a row for each stage, and the lines below them.

    Where the stages' rows are of several tables, `groups` has the stages of each.
    """

    def __init__(self, done):
        assert done.code == 0
        self.where, self.summary, *lines = done.lines
        start = next(i for i, line in enumerate(lines) if line.startswith("stage "))
        self.problems, rows = lines[: start - 1], lines[start + 1 :]
        assert [*lines[start - 1].split(), *lines[start].split()] == (
            ["given", "oldest", "calls", "stage", "owed", "calling", "retry", "up", "due", "/hour",
             "failed", "p50", "p95"]
        )  # fmt: skip
        self.stages, self.groups, group = {}, {}, None
        while rows and re.match(r"[\w…]+ +\d+ +\d|\w[\w, ]*:$", rows[0]):
            name, *row = re.split(r" {2,}", rows.pop(0))
            if not row:
                group = self.groups.setdefault(name.rstrip(":"), [])
                continue
            self.stages[name] = dict(zip(NAMES, row, strict=True))
            if group is not None:
                group.append(name)
        table = lines[start - 1 : len(lines) - len(rows)]
        assert [line for line in table if len(line) > 80] == []
        self.rest = rows

    def row(self, stage: str) -> list[str]:
        return list(self.stages[stage].values())

    @property
    def listeners(self) -> list[list[str]]:
        """Name, since and doing of each listener; since and doing of each call below it."""
        start = next(i for i, line in enumerate(self.rest) if line.startswith("listener "))
        return [re.split(r" {2,}", line.strip(), maxsplit=2) for line in self.rest[start + 1 :]]


def status(run_command, database, **settings) -> Status:
    return Status(run_command(database, "status", **settings))


def test_status_shows_every_situation(database, run_command, busy):
    database.rows(
        "UPDATE stage_calls SET due_at = now() - interval '3 h' WHERE stage = 'vlm_judge'"
    )
    database.add_job("overlay", "done")
    said = status(run_command, database)
    assert re.match(rf"{database.name} on .+, schema {LATEST}, {TIME}$", said.where)
    assert said.summary.startswith("oldest due 3 h, 0.1 calls/min, PostgreSQL ")
    assert said.summary.endswith(", NOTIFY queue 0%, triggers on")
    assert said.row("vlm_analyze") == ["1", "1", "0", "0", "-", "0", "-", "-", "-"]
    assert said.row("yolo_detect") == ["1", "0", "1", "0", "-", "1", "100%", "-", "-"]
    assert said.row("planner")[:4] == ["1", "0", "1", "0"]
    assert said.row("overlay") == ["1", "0", "0", "1", "-", "1", "100%", "-", "-"]
    assert said.row("vlm_judge") == ["2", "0", "0", "0", "3 h", "0", "-", "-", "-"]
    retry, held, given_up, hint, _, making, call = said.rest
    assert re.fullmatch(
        r"yolo_detect  next retry in \d+ (min|s); last error: HTTP 500: no memory", retry
    )
    assert re.match(rf"planner {{6}}next retry (?:due|in 1 s); held until {TIME} by \S+", held)
    assert given_up == "overlay      given up: HTTP 422: no text"
    assert hint == "given up: ./jsl jobs --given-up, then retry JOB_ID"
    assert making.endswith("  1 call under way")
    assert re.fullmatch(rf" +\S+ s  vlm_analyze {busy['vlm_analyze']}", call)


def test_status_as_json_says_the_same(database, run_command, busy):
    said = json.loads("\n".join(run_command(database, "status", "--json").lines))
    assert said["database"]["name"] == database.name
    assert said["triggers"] == {"ok": True, "problem": None, "misplaced": False}
    assert said["error"] is None
    assert [stage["stage"] for stage in said["stages"]] == STAGES
    by_name = {stage.pop("stage"): stage for stage in said["stages"]}
    assert by_name["planner"]["held_reason"] == "HTTP 503"
    assert by_name["planner"]["held_until"] and not by_name["planner"]["paused"]
    columns = ("owed", "calling", "retrying", "given_up")
    assert [by_name["overlay"][name] for name in columns] == [1, 0, 0, 1]
    assert by_name["overlay"]["last_error"] == "HTTP 422: no text"
    assert by_name["overlay"]["failure_share"] == 1.0
    assert by_name["yolo_detect"]["next_retry_seconds"] > 0
    assert by_name["yolo_detect"]["retry_error"] == "HTTP 500: no memory"
    assert {tuple(row["tables"]) for row in by_name.values()} == {("jobs",)}
    assert by_name["vlm_judge"]["oldest_due_seconds"] >= 0
    assert said["database"]["schema_version"] == LATEST
    [listener] = said["listeners"]
    assert (listener["connected"], listener["heartbeat"]) == (True, "alive")
    [call] = listener["calls"]
    assert (call["stage"], call["job_id"]) == ("vlm_analyze", busy["vlm_analyze"])
    assert (call["attempt"], call["unanswered"]) == (1, False)


def test_status_of_an_idle_database_without_listeners(database, run_command):
    said = status(run_command, database)
    assert said.summary.startswith("nothing is due, 0 calls/min, ")
    assert said.groups == {}
    assert {stage: said.row(stage) for stage in said.stages} == dict.fromkeys(STAGES, IDLE)
    assert said.rest == [NO_LISTENER]


def test_limits_read_no_calls_where_nothing_is_planned(database):
    database.add_job()
    with connected(database) as conn:
        assert rows_read(conn, lambda: limits(conn))["stage_calls"] == 0


ATTEMPTS = """
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            outcome)
SELECT gen_random_uuid(), n, 1, 'planner', 'w', now() - n * interval '10 s', now(),
       CASE n WHEN 5 THEN 'held' WHEN 6 THEN 'skipped' ELSE 'succeeded' END
FROM generate_series(1, 6) AS n
"""


def test_status_shows_how_the_last_hour_went(database, run_command):
    database.rows(ATTEMPTS)
    database.rows(ATTEMPTS.replace("now()", "(now() - interval '61 minutes')"))
    said = status(run_command, database)
    assert said.row("planner")[5:] == ["5", "20%", "25 s", "38 s"]  # of 10, 20, 30 and 40 s
    assert ", 0.1 calls/min, " in said.summary


def test_status_shows_how_many_may_run(database, run_command, busy):
    database.rows("UPDATE pipeline_stages SET max_running = 2 WHERE stage = 'vlm_analyze'")
    assert status(run_command, database).stages["vlm_analyze"]["calling"] == "1/2"


def test_status_shows_a_stage_that_lost_its_route_last(database, run_command):
    database.add_job("img_gen", "done")
    database.rows("DELETE FROM pipeline_stages WHERE stage = 'vlm_analyze'")
    said = status(run_command, database)
    assert list(said.stages) == [*STAGES[1:], "vlm_analyze"]
    assert said.row("vlm_analyze")[:4] == ["1", "0", "0", "0"]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (
            "ALTER TABLE jobs DISABLE TRIGGER job_state_insert_trigger",
            "trigger job_state_insert_trigger on jobs is disabled → ./jsl install",
        ),
        (
            "ALTER TABLE jobs DISABLE TRIGGER USER",
            "trigger job_state_change_trigger on jobs is disabled; 1 more → ./jsl install",
        ),
        (
            "DROP TRIGGER job_state_change_trigger ON jobs",
            "trigger job_state_change_trigger is missing on jobs → ./jsl install",
        ),
        (
            JOBS_TRIGGER,
            "trigger job_state_change_trigger on jobs runs another function; 1 more"
            " → ./jsl install",
        ),
    ],
    ids=["disabled", "both disabled", "missing", "made by the guide's SQL once more"],
)
def test_status_tells_of_a_broken_trigger(database, run_command, broken, problem):
    database.rows(broken)
    done = run_command(database, "status")
    assert done.lines[1].endswith(", triggers BROKEN")
    what, mend = problem.split(" → ")
    assert done.lines[2:4] == [f"PROBLEM  {what}", f"       → {mend}"]
    said = json.loads(run_command(database, "status", "--json").out)
    assert said["triggers"] == {"ok": False, "problem": problem, "misplaced": False}


def test_listener_does_not_start_where_the_trigger_records_nothing(database):
    database.rows(JOBS_TRIGGER)
    refused = pytest.raises(Problem, match="notify_job_state_change\\(\\) is not the listener's")
    with closing(db.connect(database.settings())) as conn, refused:
        require_installed(conn)


@pytest.mark.parametrize("kind", ["given_up", "failed", "stalled"])
def test_nothing_is_due_is_not_said_beside_what_is_stuck(database, run_command, kind):
    state = {"given_up": ("planner", "done"), "failed": ("overlay", "failed"),
             "stalled": ("overlay", "running")}  # fmt: skip
    database.add_job(*state[kind])
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 h'")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', last_error = 'HTTP 404'")
    said = status(run_command, database)
    assert said.summary.startswith("1 needs a person, ")
    assert said.row("overlay")[4] == "-"
    told = {"given_up": "given up: HTTP 404",
            "failed": "1 row is failed: set failed by its stage",
            "stalled": "1 row is stalled: running for longer than the timeout"}  # fmt: skip
    assert said.rest[0] == f"overlay      {told[kind]}"
    assert said.rest[1].startswith(f"{kind.replace('_', ' ')}: ./jsl jobs --{kind}"
                                   .replace("given_up", "given-up"))  # fmt: skip


def test_status_tells_of_broken_triggers_where_the_schema_was_renamed(database, run_command):
    database.rows("ALTER SCHEMA public RENAME TO app")
    database.rows(f"ALTER DATABASE {database.name} SET search_path = app")
    done = run_command(database, "status")
    assert done.lines[1].endswith(", triggers BROKEN")
    problems = [line for line in done.lines if line.startswith("PROBLEM")]
    assert "job_state_change_trigger on jobs runs another function" in problems[0]
    why = 'PROBLEM  relation "public.pipeline_stages" does not exist: which rows are fail'
    assert problems[1].startswith(why)


def test_rows_that_are_stalled_for_several_reasons_are_told_so(database, run_command):
    database.add_job("overlay", "running")
    database.add_job("planner", "done")
    database.rows("DELETE FROM stage_calls; UPDATE jobs SET updated_at = now() - interval '1 h'")
    begin = "several reasons, the last: "
    assert f"overlay      2 rows are stalled: {begin}" in run_command(database, "status").out
    with connected(database) as conn:
        [told] = troubles.newly_stalled(conn)
        assert told.jobs == 2 and told.reason.startswith(begin)


SLOW = """
DROP FUNCTION resting_rows();
CREATE FUNCTION resting_rows() RETURNS TABLE (kind text, stage text, since timestamptz, reason text)
LANGUAGE sql AS $$ SELECT 'failed', 'planner', now(), 'x' FROM pg_sleep(3600) $$
"""


@pytest.mark.slow
def test_status_says_that_it_does_not_know_what_rests(database, run_command):
    """Tables too large to be read in time, here by a function that takes forever."""
    database.rows(SLOW)
    said = json.loads(run_command(database, "status", "--json").out)
    assert said["resting_problem"].startswith("reading rows took too long: which rows are failed")
    assert {row["failed"] for row in said["stages"]} == {None}


def test_long_names_of_stages_lose_their_middle_not_the_numbers(database, run_command):
    database.rows("UPDATE pipeline_stages SET stage = 'instagram_feed_generation_of_the_shop'"
                  " WHERE stage = 'planner'")  # fmt: skip
    name = next(name for name in status(run_command, database).stages if "…" in name)
    assert name.startswith("instag") and name.endswith("e_shop")


def test_reason_is_whole_where_there_is_no_terminal(database, run_command):
    reason = "HTTP 503: the model is loaded again after a restart, " + "which takes a while, " * 3
    database.rows("UPDATE pipeline_stages SET held_until = now() + interval '1 min',"
                  " hold_seconds = 60, held_by = 'gpu-host-21023-4525a5', held_reason = %s"
                  " WHERE stage = 'planner'", reason.strip())  # fmt: skip
    [held, _] = status(run_command, database).rest
    assert held.endswith(f"by gpu-host-21023-4525a5: {reason.strip()}")


def test_status_shows_one_line_for_an_idle_listener(database, listener, run_command, tmp_path):
    listener(database, "run", "--workers", "8")
    wait_until_idle(tmp_path)
    [[_, _, doing]] = status(run_command, database).listeners
    assert doing == "waiting for a job to change"


def test_status_of_another_host_shows_what_the_database_knows(
    database, api, listener, run_command, tmp_path
):
    listener(database, api=api)
    wait_until_idle(tmp_path)
    elsewhere = {"HEARTBEAT_DIR": tmp_path / "elsewhere"}
    assert status(run_command, database, **elsewhere).listeners[0][2] == "connected"
    with gate(api):
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        making, call = status(run_command, database, **elsewhere).listeners
    assert making[2] == "1 call under way"
    assert call[1] == f"vlm_analyze {job}"


def test_listener_at_a_stage_that_has_taken_its_job_is_not_idle(database, listener, run_command):
    taken, finish = threading.Event(), threading.Event()

    def work(stage: str) -> float:
        taken.set()
        finish.wait(PATIENCE)
        return 0.0

    with StageApi(database.dsn, delay=work) as slow:
        listener(database, api=slow)
        job = database.add_job("planner", "done")
        assert taken.wait(PATIENCE)
        said, of_job = status(run_command, database), run_command(database, "job", job)
        finish.set()
    assert said.row("overlay")[:2] == ["0", "1"]
    assert said.listeners[1][1] == f"overlay {job}"
    assert of_job.lines[1] == "owes: nothing"
    assert re.fullmatch(
        rf"called: overlay \(call \d+\), \S+ is on it since {TIME}", of_job.lines[2]
    )


def test_status_shows_the_oldest_calls_and_how_many_more(
    database, api, listener, run_command, tmp_path
):
    with gate(api):
        listener(database, "run", "--workers", "12", api=api)
        wait_until_idle(tmp_path)
        oldest = database.add_job("img_gen", "done")
        wait_for_call(api, oldest)  # those that are claimed together are of one age
        for _ in range(11):
            database.add_job("img_gen", "done")
        api.wait_for(lambda api: len(api.calls()) == 12, PATIENCE)
        making, *calls, more = status(run_command, database).listeners
    assert making[2] == "12 calls under way"
    assert len(calls) == 10 and calls[0][1] == f"vlm_analyze {oldest}"
    assert more == ["and 2 more"]


def test_call_without_an_answer_is_shown_until_its_lease_is_over(
    database, api, listener, run_command, tmp_path
):
    """Its stage may still be working on it, but the worker is free for other calls."""
    with gate(api):
        process = listener(database, api=api, STAGE_TIMEOUT=0.2)
        job = database.add_job("img_gen", "done")
        process.wait_for_line("실행 실패")
        database.wait_for("SELECT unanswered FROM stage_leases")
        wait_until_idle(tmp_path)
        said, of_job = status(run_command, database), run_command(database, "job", job)
        refused = run_command(database, "call", job, api=api).refused(1)
    idle, call = said.listeners
    assert idle[2] == "waiting for a job to change"
    assert call[1:] == [f"vlm_analyze {job}", "no answer"]
    assert said.row("vlm_analyze")[:4] == ["1", "1", "1", "0"]
    assert ", due in " in of_job.lines[1] and "; last error: " in of_job.lines[1]
    assert refused.startswith(f"job {job}: its last call of vlm_analyze got no answer and may ")


def test_frozen_listener_is_hanging(database, listener, run_command, tmp_path):
    """Its heartbeat is written in its name by the test, as it would take 25 s otherwise."""
    heartbeat = Heartbeat(str(tmp_path / "heartbeats"), "stuck")
    heartbeat.beat("waiting for a job to change", -1)
    try:
        [[name, _, doing]] = status(run_command, database).listeners
    finally:
        heartbeat.close()
    assert (name, doing) == ("stuck", "hanging: waiting for a job to change")


def test_heartbeats_that_cannot_be_read_are_said_so_and_left_out(database, run_command):
    unreadable = {"HEARTBEAT_DIR": "/" + "x" * 300}  # root may read those of any user
    job = database.add_job("planner", "done")
    none, why = status(run_command, database, **unreadable).rest
    assert none == NO_LISTENER
    assert why.startswith("the heartbeats cannot be read: [Errno 36] File name too long: ")
    waits = run_command(database, "job", job, **unreadable).lines[-1]
    assert waits == "overlay waits: no listener is connected; ./jsl"


def test_stage_that_gives_no_answer_is_shown_to_get_one_call_at_a_time(
    database, api, listener, run_command, tmp_path
):
    api.on("vlm_analyze", lambda request: Answer(504))
    process = listener(database, api=api)
    [database.add_job() for _ in range(2)]
    process.wait_for_line("응답하지 않는 단계")
    with gate(api) as opened:
        called = database.add_job()
        wait_for_call(api, called)
        other = database.add_job()
        [beat] = heartbeats(str(tmp_path / "heartbeats"))
        said = f"vlm_analyze does not answer, so {beat.listener} makes one call of it at a time"
        waits = f"vlm_analyze waits: {said}"
        until(lambda: waits in run_command(database, "job", other).lines, "job says why it waits")
        shown = status(run_command, database)
        check = run_command(database, "check")
        opened.set()
    assert said.replace(" ", "  ", 1) in shown.rest
    assert "; one call at a time, as vlm_analyze does not answer" in check.out


def test_call_by_hand_is_shown_as_one(database, api, run_command):
    job = database.add_job("img_gen", "done")
    with gate(api) as opened, ThreadPoolExecutor() as pool:
        called = pool.submit(run_command, database, "call", job, api=api)
        wait_for_call(api, job)
        said = json.loads(run_command(database, "status", "--json").out)
        [[_, _, doing], [_, under_way]] = status(run_command, database).listeners
        opened.set()
        assert called.result().code == 0
    [hand] = said["listeners"]
    assert not hand["connected"] and hand["seconds"] >= 0
    assert doing == "a call by hand" and under_way == f"vlm_analyze {job}"


def test_calls_of_a_killed_listener_are_shown_until_they_end(
    database, api, listener, run_command, tmp_path
):
    with gate(api) as opened:
        process = listener(database, api=api)
        job = database.add_job("img_gen", "done")
        wait_for_call(api, job)
        directory = str(tmp_path / "heartbeats")
        until(lambda: heartbeats(directory)[0].doing == "making calls", "its heartbeat says so")
        process.kill_alone()
        database.wait_for(f"SELECT count(*) = 0 FROM pg_stat_activity WHERE {LISTENERS}")
        said = json.loads(run_command(database, "status", "--json").out)
        opened.set()
        database.wait_for("SELECT count(*) = 0 FROM stage_leases")
        after = status(run_command, database)
    other = run_command(database, "job", database.add_job("planner", "done"))
    [[_, _, dead]] = after.listeners
    [killed] = said["listeners"]
    assert (killed["connected"], killed["heartbeat"]) == (False, "dead")
    assert killed["doing"].startswith("dead: 1 call under way, not connected; the last lease ends ")
    assert [call["job_id"] for call in killed["calls"]] == [job]
    assert dead == "dead: making calls" and NO_LISTENER in after.rest
    assert other.lines[-1] == "overlay waits: no listener is connected; ./jsl"


# --- several installations -----------------------------------------------------------------


@pytest.fixture
def two_schemas(empty_database, run_command) -> dict[str, dict[str, str]]:
    """Settings of two installations in one database, by their schema."""
    found = {}
    for schema in ("public", "other"):
        empty_database.rows(
            f"CREATE SCHEMA IF NOT EXISTS {schema}; CREATE TABLE {schema}.jobs"
            " (job_id uuid PRIMARY KEY, tenant_id text, current_step text, status text)"
        )
        options = f"-c search_path={schema}"
        url = psycopg2.extensions.make_dsn(empty_database.dsn, options=options)
        found[schema] = {"DATABASE_URL": url}
        assert run_command(empty_database, "install", **found[schema]).code == 0
    return found


def test_listener_of_another_schema_is_not_ours(
    empty_database, two_schemas, listener, run_command, tmp_path
):
    """Though it has a heartbeat in the same directory."""
    listener(empty_database, **two_schemas["other"])
    wait_until_idle(tmp_path)
    rest = {
        schema: status(run_command, empty_database, **settings).rest
        for schema, settings in two_schemas.items()
    }
    assert rest["public"] == [NO_LISTENER]
    assert rest["other"][1].endswith("  waiting for a job to change")
    connected = {
        schema: scrape(empty_database, **settings).of("listeners_connected")
        for schema, settings in two_schemas.items()
    }
    assert connected == {"public": 0, "other": 1}


def test_listener_of_another_database_is_not_ours(
    database, server, make_database, listener, run_command, tmp_path
):
    """Though it has a heartbeat in the same directory."""
    listener(make_database(server))
    wait_until_idle(tmp_path)
    assert status(run_command, database).rest == [NO_LISTENER]


def test_listener_that_does_not_say_its_schema_counts(database, run_command):
    """Behind a pooler it does not, as the session is somebody else's next."""
    with closing(db.connect(database.settings(), db.LISTENER_APPLICATION + "pooled")):
        assert [row[0] for row in status(run_command, database).listeners] == ["pooled"]


def test_session_of_a_role_that_may_claim_nothing_is_no_listener(database, make_role, run_command):
    role = make_role(database)
    given = database.settings(DB_USER=role, DB_PASSWORD=role)
    with closing(db.connect(given, db.LISTENER_APPLICATION + "pretended")):
        assert status(run_command, database).rest == [NO_LISTENER]
        database.rows(f"GRANT UPDATE ON stage_calls TO {role}")
        assert [row[0] for row in status(run_command, database).listeners] == ["pretended"]


def test_listener_whose_role_has_its_rights_by_set_role_counts(database, make_role, run_command):
    role, group = make_role(database), make_role(database)
    database.rows(f"ALTER ROLE {role} NOINHERIT; GRANT {group} TO {role};"
                  f" GRANT UPDATE ON stage_calls TO {group}")  # fmt: skip
    given = database.settings(DB_USER=role, DB_PASSWORD=role)
    with closing(db.connect(given, db.LISTENER_APPLICATION + "member")):
        assert [row[0] for row in status(run_command, database).listeners] == ["member"]


def test_status_names_what_an_older_database_needs(database, run_command):
    database.rows("DROP TABLE stage_limits CASCADE; DROP TABLE job_state_listener_schema;"
                  "ALTER TABLE stage_leases DROP COLUMN unanswered")  # fmt: skip
    assert run_command(database, "status").refused(1) == (
        f"the database's part is of version 1, this program needs {LATEST}: "
        "run `make trigger` (./jsl install)"
    )


def test_status_works_on_a_newer_database_and_says_so(database, run_command):
    database.rows("UPDATE job_state_listener_schema SET version = 99")
    said = status(run_command, database)
    [problem] = said.problems
    assert problem.startswith("PROBLEM  the database's part is of version 99, newer than this ")
