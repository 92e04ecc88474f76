"""The commands about single calls, in a pipeline with rows of another table and joins."""

import json
import re
import shlex
from contextlib import closing

import commands
import pytest
from busy import TIME
from claims import LEASE_OVER, claim_many, connected, result, settle
from commands import Done
from variants import PIPELINE, VARIANTS, stage

import db
import joins
from ops.install import apply
from pipeline import Table

JOIN = "jobs_variants (iou_eval, done)"
GIVE_UP = "UPDATE stage_calls SET due_at = 'infinity', last_error = 'HTTP 422', attempts = 1"
AN_HOUR_AGO = (
    "UPDATE stage_attempts SET started_at = now() - interval '1 h',"
    " finished_at = now() - interval '1 h'; UPDATE jobs SET updated_at = now() - interval '1 h'"
)


@pytest.fixture
def run(variants, tmp_path):
    """run(*args, api=None): a command, in this process."""

    def typed(*args: str, api=None, **settings: str) -> Done:
        environ = variants.database.environ | {"HEARTBEAT_DIR": str(tmp_path)} | settings
        return commands.run_here(environ | ({"STAGE_API_URL": api.url} if api else {}), *args)

    return typed


@pytest.fixture
def joined(variants) -> str:
    """A job that owes a call of its own and one of its join."""
    job = variants.database.add_job("ad_copy", "done")
    variants.add(job, "iou_eval", "done", count=2)
    look(variants.database)
    return job


def look(database) -> None:
    with connected(database) as conn:
        while joins.look(conn):
            pass


def call(database, stages: list[str], outcome: str = "succeeded", **given) -> None:
    """Claim and settle the calls of some stages, as a listener does."""
    with connected(database) as conn:
        for row in claim_many(conn, 10, stages=stages).claimed:
            if row.join_of:
                joins.note_parent(conn, row)
            settle(conn, result(row, outcome, table_name=row.table_name, **given))


# --- job -----------------------------------------------------------------------------------


def test_job_takes_the_id_of_either_table(variants, run):
    job = variants.database.add_job("img_gen", "queued")
    [variant] = variants.add(job, "img_gen", "done")
    assert run("job", variant).lines[0] == (
        f"jobs_variants {variant} is at (img_gen, done), of job {job}, tenant tenant"
    )
    assert run("job", variant).lines[1].startswith("owes: yolo_detect (call ")
    said = json.loads(run("job", variant, "--json").out)
    assert (said["table"], said["parent_id"], said["owes"]["stage"]) == (
        "jobs_variants",
        job,
        "yolo_detect",
    )


def test_parent_shows_its_rows_and_what_it_waits_for(variants, run):
    job = variants.database.add_job("img_gen", "queued")
    [first] = variants.add(job, "iou_eval", "done")
    [second] = variants.add(job, "img_gen", "done")
    lines = run("job", job).lines
    assert lines[:3] == [
        f"job {job} is at (img_gen, queued), tenant tenant",
        "owes: nothing",
        f"every {JOIN}: waiting for 1 of 2",
    ]
    assert re.split(r" {2,}", lines[3]) == ["jobs_variants", "state", "owes"]
    assert {tuple(re.split(r" {2,}", line)) for line in lines[4:]} == {
        (first, "iou_eval, done", "-"),
        (second, "img_gen, done", "yolo_detect: due now"),
    }


def test_parent_tells_its_own_call_and_that_of_its_join(variants, run, joined):
    _, own, join, *_ = run("job", joined).lines
    assert own.startswith("owes: instagram (call ")
    assert join.startswith(f"every {JOIN}: owes ad_copy (call ")
    said = json.loads(run("job", joined, "--json").out)
    assert said["owes"]["stage"] == "instagram"
    [told] = said["joins"]
    assert (told["rows"], told["in_place"], told["owes"]["stage"]) == (2, 2, "ad_copy")
    call(variants.database, ["ad_copy"])
    assert "all 2 are there; ad_copy was recorded " in run("job", joined).lines[2]
    variants.database.rows("UPDATE jobs_variants SET current_step = 'archive'")
    assert re.fullmatch(rf"every .*\): ad_copy was recorded {TIME}", run("job", joined).lines[2])


def test_cancelled_call_of_a_join_is_said_to_be(variants, run, joined):
    run("cancel", joined, "--stage", "ad_copy", "--reason", "no budget")
    again = f"./jsl again --stage ad_copy {joined}"
    line = run("job", joined).lines[2]
    assert line.startswith(f"every {JOIN}: all 2 are there; ad_copy was cancelled by ")
    assert line.endswith(f": no budget; to call it again: {again}")
    variants.database.move(joined, "ad_copy", "running")
    assert run("job", joined).lines[2].endswith(f"; to call it again: {FIRST}{again}")
    assert run(*shlex.split(again)[1:]).code == 0
    assert "owes ad_copy" in run("job", joined).lines[2]


STALLED = "SELECT stage FROM stalled_jobs()"


def test_call_of_a_join_stays_cancelled_where_its_stage_is_renamed(
    variants, run, joined, use_pipeline
):
    call(variants.database, ["ad_copy"], "retry")
    run("cancel", joined, "--stage", "ad_copy", "--reason", "no budget")
    call(variants.database, ["instagram"])
    variants.database.rows("UPDATE stage_joins SET recorded_at = now() - interval '1 h'")
    variants.database.rows(AN_HOUR_AGO)
    use_pipeline(PIPELINE | {VARIANTS.every("iou_eval", "done"): stage("posters")})
    with connected(variants.database) as conn:
        apply(conn)
    assert variants.database.rows(STALLED) == [("instagram",)]
    assert "posters was cancelled by " in run("job", joined).out


def test_call_of_a_join_that_was_accepted_is_not_said_to_be_that_of_a_stage_that_left(
    variants, run, joined, use_pipeline
):
    call(variants.database, ["ad_copy"])
    use_pipeline({state: f for state, f in PIPELINE.items() if state != ("ad_copy", "done")})
    with connected(variants.database) as conn:
        apply(conn)
    assert run("cancel", joined, "--stage", "instagram", "--reason", "it is gone").code == 0
    variants.database.move(joined, "ad_copy", "ready")
    variants.database.rows("UPDATE stage_joins SET recorded_at = recorded_at - interval '1 h',"
                           " parent_status = 'ready'")  # fmt: skip
    variants.database.rows("UPDATE stage_attempts SET finished_at = finished_at - interval '1 h'")
    assert variants.database.rows(STALLED) == [("ad_copy",)]
    assert any("there; ad_copy was recorded " in line for line in run("job", joined).lines)


def test_many_rows_are_summed_up(variants, run):
    job = variants.database.add_job("img_gen", "queued")
    variants.add(job, "img_gen", "done", count=25), variants.add(job, "iou_eval", "running")
    lines = [re.split(r" {2,}", line) for line in run("job", job).lines[3:]]
    assert lines == [
        ["jobs_variants", "rows", "owed", "given up"],
        ["img_gen, done", "25", "25", "0"],
        ["iou_eval, running", "1", "0", "0"],
    ]


def test_row_that_its_stage_set_failed_says_why_and_how_it_goes_on(variants, run):
    job = variants.database.add_job("img_gen", "queued")
    [variant] = variants.add(job, "img_gen", "done")
    with connected(variants.database) as conn:
        [row] = claim_many(conn, 1, stages=["yolo_detect"]).claimed
        variants.move(variant, "yolo_detect", "failed")
        settle(conn, result(row, "failed", table_name="jobs_variants", error="HTTP 500: no memory"))
    rests = next(line for line in run("job", variant).lines if line.startswith("rests"))
    why, sql = rests.split("; to call yolo_detect again: ")
    assert why.endswith(": set failed by its stage: HTTP 500: no memory")
    variants.database.rows(sql)
    assert ("jobs_variants", variant, "yolo_detect") in variants.owed()


def test_stalled_join_is_called_again_by_what_job_says(variants, run, joined):
    call(variants.database, ["ad_copy", "instagram"])
    variants.database.rows("UPDATE stage_joins SET recorded_at = now() - interval '1 h'")
    variants.database.rows(AN_HOUR_AGO)
    said = json.loads(run("job", joined, "--json").out)["rests"]
    assert said["stage"] in ("ad_copy", "instagram")
    run(*shlex.split(said["mend"])[1:])
    assert ("jobs", joined, said["stage"]) in variants.owed()


@pytest.fixture
def ambiguous(variants, use_pipeline) -> None:
    """A stage that follows from a state of the job and from a join."""
    use_pipeline(PIPELINE | {("img_gen", "done"): stage("ad_copy")})
    with connected(variants.database) as conn:
        apply(conn)


# Else the stage may be called while it is at work.
FIRST = "once this has lasted longer than the timeout of ad_copy, "


def type_way_out(run, job: str) -> str:
    """Type what `job` says of a row that rests; returns the reason."""
    rests = next(line for line in run("job", job).lines if line.startswith("rests"))
    why, said = rests.split("; to call ad_copy again: ")
    typed = json.loads(run("job", job, "--json").out)["rests"]["mend"]
    assert said.removeprefix(FIRST) == typed
    assert run(*shlex.split(typed.removeprefix("./jsl "))).code == 0
    return why


@pytest.mark.parametrize("step", ["img_gen", "ad_copy"])
def test_parent_at_work_is_not_sent_back_for_a_join_that_was_never_recorded(
    variants, run, ambiguous, step
):
    job = lose_arrival(variants, "TRUNCATE")
    variants.database.move(job, step, "running")
    assert run("job", job).out.count(FIRST) == (2 if step == "ad_copy" else 0)
    assert "never recorded" in type_way_out(run, job)
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [JOIN]


def test_own_call_that_was_accepted_is_not_made_again_for_a_join_that_was_never_recorded(
    variants, run, ambiguous
):
    job = lose_arrival(variants, "TRUNCATE")
    variants.database.move(job, "img_gen", "done")
    call(variants.database, ["ad_copy"])
    assert "never recorded" in type_way_out(run, job)
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [JOIN]
    assert stalled(run) == []


def test_parent_at_work_is_not_sent_back_for_a_join_whose_call_was_accepted(
    variants, run, ambiguous
):
    job = variants.database.add_job("img_gen", "running")
    variants.add(job, "iou_eval", "done")
    look(variants.database)
    call(variants.database, ["ad_copy"])
    variants.database.rows("UPDATE stage_joins SET recorded_at = now() - interval '1 h'")
    variants.database.rows(AN_HOUR_AGO)
    assert "accepted by the stage" in type_way_out(run, job)
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [JOIN]


def test_job_names_the_one_of_two_joins_whose_last_arrival_was_not_seen(variants, run, two_joins):
    variants.add(two_joins, "iou_eval", "done")
    look(variants.database)
    call(variants.database, ["ad_copy"])
    variants.database.rows(f"{ADD_PHOTO}, (gen_random_uuid(), %s, 'new', 'new')", *[two_joins] * 2)
    look(variants.database)
    variants.database.rows(f"{REPLICA}; UPDATE photos SET current_step = 'sharp', status = 'done'")
    assert "never recorded" in type_way_out(run, two_joins)
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [OF_PHOTOS]


# --- ids that need more --------------------------------------------------------------------


@pytest.fixture
def numbers(empty_database, use_pipeline, tmp_path):
    """run(*args) on a database whose tables both have numbers as ids, some of them the same."""
    use_pipeline(PIPELINE)
    empty_database.rows(
        "CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id text, current_step text,"
        " status text);"
        "CREATE TABLE jobs_variants (job_variants_id bigint PRIMARY KEY, job_id bigint,"
        " current_step text, status text); CREATE INDEX ON jobs_variants (job_id)"
    )
    with closing(db.connect(empty_database.settings())) as conn:
        apply(conn)
    empty_database.rows(
        "INSERT INTO jobs VALUES (7, 't', 'img_gen', 'done'), (-8, 't', 'img_gen', 'done');"
        "INSERT INTO jobs_variants VALUES (7, 7, 'img_gen', 'done'), (9, 7, 'img_gen', 'done')"
    )
    environ = empty_database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    return lambda *args: commands.run_here(environ, *args)


@pytest.mark.parametrize("command", ["job", "retry", "cancel", "call"])
def test_id_of_two_tables_needs_the_table(empty_database, numbers, command):
    assert numbers(command, "7").refused(1) == (
        "7 is in jobs and in jobs_variants: give --table jobs or --table jobs_variants"
    )
    assert numbers(command, "10").refused(1) == "there is no row 10 in jobs or jobs_variants"
    refused = numbers(command, "10", "--table", "jobs_variants").refused(1)
    assert refused == "there is no jobs_variants 10"


def test_hint_for_an_id_of_two_tables_works_as_typed(empty_database, numbers):
    empty_database.rows(GIVE_UP)
    owes = numbers("job", "7", "--table", "jobs_variants").lines[1]
    typed = owes.split("; ./jsl ")[1].split()
    assert numbers(*typed).lines == ["due again: jobs_variants 7, stage yolo_detect"]


def test_id_may_begin_with_a_dash(empty_database, numbers):
    empty_database.rows(GIVE_UP)
    typed = numbers("job", "-8").lines[1].split("; ./jsl ")[1].split()
    assert numbers(*typed).lines == ["due again: job -8, stage vlm_analyze"]
    assert numbers("cancel", "-8", "--reason", "-").lines == [
        "cancelled: job -8, stage vlm_analyze"
    ]
    [*_, attempt] = json.loads(numbers("job", "--json", "--", "-8").out)["attempts"]
    assert (attempt["outcome"], attempt["error"]) == ("cancelled", "-")


def test_text_id_with_two_dashes_and_blanks_works_as_the_hint_says(empty_database, run_command):
    empty_database.rows(
        "CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text, current_step text,"
        " status text)"
    )
    run_command(empty_database, "install")
    for id_, hint in (("--all", "retry -- --all"), ("-a b", "retry '-a b'")):
        empty_database.rows("INSERT INTO jobs VALUES (%s, 't', 'planner', 'done')", id_)
        empty_database.rows(GIVE_UP)
        owes = run_command(empty_database, "job", "--", id_).lines[1]
        assert owes.endswith(f"; ./jsl {hint}")
    done = run_command(empty_database, "retry", "--", "--all")
    assert done.lines == ["due again: job --all, stage overlay"]


# --- retry, cancel, call -------------------------------------------------------------------


def test_retry_of_a_row_revives_all_that_was_given_up_of_it(variants, run, joined):
    variants.database.rows(GIVE_UP)
    assert sorted(run("retry", joined).lines) == [
        f"due again: job {joined}, stage ad_copy",
        f"due again: job {joined}, stage instagram",
    ]


def test_retry_leaves_the_other_call_of_the_same_row(variants, run, joined):
    variants.database.rows(f"{GIVE_UP} WHERE join_of <> ''")
    before = variants.database.value("SELECT due_at FROM stage_calls WHERE join_of = ''")
    assert run("retry", joined).lines == [f"due again: job {joined}, stage ad_copy"]
    after = variants.database.value("SELECT due_at FROM stage_calls WHERE join_of = ''")
    assert after == before


def test_retry_of_all_calls_of_one_table(variants, run, joined):
    variants.add(joined, "img_gen", "done")
    variants.database.rows(GIVE_UP)
    [line] = run("retry", "--all", "--table", "jobs_variants", "--yes").lines
    assert line.startswith("due again: jobs_variants ")


@pytest.mark.parametrize("command", ["cancel", "call"])
def test_one_of_several_calls_must_be_named(variants, run, api, joined, command):
    refused = run(command, joined, api=api).refused(1)
    assert refused == (
        f"job {joined} owes calls to instagram and ad_copy: "
        "give --stage instagram or --stage ad_copy"
    )
    refused = run(command, joined, "--stage", "iou_eval", api=api).refused(1)
    assert refused == (
        f"job {joined} owes no call to iou_eval: it is at (ad_copy, done); "
        f"what its rows in other tables owe: ./jsl job {joined}"
    )


def test_cancel_drops_the_call_that_is_named(variants, run, joined):
    done = run("cancel", joined, "--stage", "ad_copy")
    assert done.lines == [f"cancelled: job {joined}, stage ad_copy"]
    assert variants.owed() == [("jobs", joined, "instagram")]


def test_cancel_of_a_row_is_recorded_with_its_table(variants, run):
    [variant] = variants.add(variants.database.add_job("x", "y"), "img_gen", "done")
    assert run("cancel", variant).lines == [
        f"cancelled: jobs_variants {variant}, stage yolo_detect"
    ]
    [attempt] = variants.database.attempts(variant)
    assert (attempt.table_name, attempt.outcome) == ("jobs_variants", "cancelled")


@pytest.mark.parametrize("is_lost", [False, True])
def test_call_makes_the_call_that_is_named(variants, run, accepting, joined, is_lost):
    if is_lost:  # the listener of the first claim, before it has stored where the parent was
        with connected(variants.database) as conn:
            claim_many(conn, 1, stages=["ad_copy"])
        variants.database.rows(LEASE_OVER)
    assert run("call", joined, "--stage", "ad_copy", api=accepting).code == 0
    assert [request.head.split()[1] for request in accepting.requests] == ["/ad_copy"]
    assert variants.owed() == [("jobs", joined, "instagram")]
    noted = "SELECT is_noted, parent_step FROM stage_joins"
    assert tuple(variants.database.row(noted)) == (True, "ad_copy")


def test_call_of_a_row_whose_stage_sets_it_failed_is_recorded_so(variants, run, serve):
    [variant] = variants.add(variants.database.add_job("x", "y"), "img_gen", "done")

    def fail(connection):
        connection.receive()
        variants.move(variant, "yolo_detect", "failed")
        connection.send(b"HTTP/1.1 500 Error\r\nContent-Length: 9\r\n\r\nno memory")

    done = run("call", variant, api=serve(fail))
    assert done.code == 1
    [attempt] = variants.database.attempts(variant)
    assert attempt.outcome == "failed"
    assert attempt.error == "HTTP 500: no memory (set failed by its stage)"
    assert "단계가 failed로 설정함" in done.out


def test_call_of_a_join_that_is_not_complete_any_more_is_made_once_it_is(variants, run, api):
    job = variants.database.add_job("x", "y")
    [variant] = variants.add(job, "iou_eval", "done")
    look(variants.database)
    variants.move(variant, "img_gen", "queued")
    assert f"job {job} owes no call" in run("call", job, "--stage", "ad_copy", api=api).err
    variants.database.rows("SET session_replication_role = replica")
    variants.move(variant, "iou_eval", "done")
    look(variants.database)
    assert variants.owed() == [("jobs", job, "ad_copy")]


@pytest.mark.parametrize("is_by_hand", [False, True])
def test_call_of_a_join_whose_rows_have_changed_is_left_to_the_look_at_them(
    variants, run, accepting, is_by_hand
):
    job = variants.database.add_job("x", "y")
    [variant] = variants.add(job, "iou_eval", "done")
    look(variants.database)
    variants.move(variant, "img_gen", "running")
    variants.finish(variant)
    refused = run("call", job, api=accepting).refused(1)
    assert refused.startswith(f"job {job}: not called, as rows of its join have changed")
    assert refused.endswith(f"where none runs: ./jsl again --stage ad_copy {job}")
    assert (accepting.requests, variants.owed()) == ([], [])
    if is_by_hand:
        assert run("again", "--stage", "ad_copy", job).code == 0
    else:
        look(variants.database)
    assert variants.owed() == [("jobs", job, "ad_copy")]
    assert run("call", job, api=accepting).code == 0
    look(variants.database)
    assert (len(accepting.requests), variants.owed()) == (1, [])


PHOTOS = Table("photos", id="id", parent=("jobs", "job_id"))
PHOTOS_TABLE = """
CREATE TABLE photos (id uuid PRIMARY KEY, job_id uuid, current_step text, status text);
CREATE INDEX ON photos (job_id);
"""
OF_PHOTOS = "photos (sharp, done)"


@pytest.fixture
def two_joins(variants, use_pipeline) -> str:
    """A job without rows, of whose joins two lead to ad_copy."""
    use_pipeline(PIPELINE | {PHOTOS.every("sharp", "done"): stage("ad_copy")})
    variants.database.rows(PHOTOS_TABLE)
    with connected(variants.database) as conn:
        apply(conn)
    return variants.database.add_job("x", "y")


ADD_PHOTO = "INSERT INTO photos VALUES (gen_random_uuid(), %s, 'sharp', 'done')"
OWED_JOINS = "SELECT join_of FROM stage_calls ORDER BY 1"


def test_again_records_the_complete_one_of_two_joins_that_lead_to_a_stage(variants, run, two_joins):
    variants.database.rows(ADD_PHOTO, two_joins)
    variants.add(two_joins, "img_gen", "queued")
    assert run("again", "--stage", "ad_copy", two_joins).code == 0
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [OF_PHOTOS]


def test_again_asks_for_the_join_where_two_that_lead_to_a_stage_are_complete(
    variants, run, two_joins
):
    variants.database.rows(ADD_PHOTO, two_joins)
    variants.add(two_joins, "iou_eval", "done")
    look(variants.database)
    call(variants.database, ["ad_copy"]), call(variants.database, ["ad_copy"])
    asked = run("again", "--stage", "ad_copy", two_joins).refused(1)
    assert asked.endswith(f"to ad_copy: give --join '{JOIN}' or --join '{OF_PHOTOS}'")
    assert run("again", "--join", OF_PHOTOS, two_joins).code == 0
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [OF_PHOTOS]
    unknown = run("again", "--join", "photos", two_joins).refused(1)
    assert unknown == f"job has no join 'photos': there is {JOIN}, {OF_PHOTOS}"
    assert "not both" in run("again", "--join", JOIN, "--stage", "ad_copy", two_joins).refused(2)


def test_job_names_the_join_where_two_lead_to_a_stage(variants, run, two_joins):
    variants.database.rows(f"{REPLICA}; {ADD_PHOTO}", two_joins)
    line = next(line for line in run("job", two_joins).lines if OF_PHOTOS in line)
    assert line.endswith(f"ad_copy is not recorded: ./jsl again --join '{OF_PHOTOS}' {two_joins}")
    run(*shlex.split(line)[-4:])
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == [OF_PHOTOS]


# --- jobs ----------------------------------------------------------------------------------


def test_jobs_has_a_block_for_each_table_and_what_joins_wait_for(variants, run):
    waiting, complete = (variants.database.add_job("x", "y") for _ in range(2))
    variants.add(waiting, "iou_eval", "done", count=2), variants.add(waiting, "img_gen", "done")
    variants.add(complete, "iou_eval", "done", count=3)
    look(variants.database)
    assert [re.split(r" {2,}", line) for line in run("jobs").lines] == [
        ["step", "status", "jobs", "leads to", "owed", "given up"],
        ["x", "y", "2", "-", "0", "0"],
        [""],
        ["step", "status", "jobs_variants", "leads to", "owed", "given up"],
        ["img_gen", "done", "1", "yolo_detect", "1", "0"],
        ["iou_eval", "done", "5", "-", "0", "0"],
        [""],
        ["join", "complete", "waiting", "leads to", "owed", "given up"],
        [f"every {JOIN}", "1", "1", "ad_copy", "1", "0"],
    ]
    [join] = json.loads(run("jobs", "--json").out)["joins"]
    assert (join["complete"], join["waiting"], join["owed"]) == (1, 1, 1)
    assert run("jobs", "--table", "jobs").lines[-1].split()[:3] == ["x", "y", "2"]


def test_lists_have_rows_of_all_tables_with_the_tenant_of_their_parents(variants, run):
    acme, zoo = (variants.database.add_job("img_gen", "done", t) for t in ("acme", "zoo"))
    [first] = variants.add(acme, "img_gen", "done")
    variants.add(zoo, "img_gen", "done")
    variants.database.rows(GIVE_UP)

    def found(*args: str) -> set[str]:
        return {row["job_id"] for row in json.loads(run("jobs", *args, "--json").out)["jobs"]}

    assert found("--tenant", "acme") == {acme, first}
    assert found("--tenant", "acme", "--given-up") == {acme, first}
    assert found("--tenant", "acme", "--since", "1h") == {acme, first}
    assert found("--tenant", "acme", "--table", "jobs_variants") == {first}
    assert found("--given-up", "--table", "jobs_variants", "--stage", "vlm_analyze") == set()
    heading, *_, times = run("jobs", "--tenant", "acme").lines
    assert heading.split() == ["job", "state", "since", "owes", "tenant", "table"]
    assert times == (
        "since: jobs.updated_at, "
        "when a call was last recorded or tried (jobs_variants has no updated_at)"
    )


def test_parent_is_listed_with_the_call_of_its_join(variants, run, joined):
    [line] = run("jobs", "--stage", "ad_copy").lines[1:-1]
    assert re.split(r" {2,}", line)[3] == "ad_copy: due now"


def test_failed_rows_are_listed_with_the_reason(variants, run):
    [variant] = variants.add(variants.database.add_job("x", "y"), "yolo_detect", "failed")
    variants.database.rows(
        "INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker,"
        " started_at, finished_at, outcome, error) VALUES (%s, 'jobs_variants', 1, 1,"
        " 'yolo_detect', 'w', now(), now(), 'failed', 'HTTP 500: \\u2191')", variant)  # fmt: skip
    line = run("jobs", "--failed").lines[1]
    job, state, _, why, tenant, table = re.split(r" {2,}", line)
    assert (job, state, tenant, table) == (
        variant, "yolo_detect, failed", "tenant", "jobs_variants",
    )  # fmt: skip
    assert why == "set failed by its stage: HTTP 500: ↑"
    assert run("jobs", "--failed", "--table", "jobs").lines == ["no job matches"]


# --- backfill ------------------------------------------------------------------------------

REPLICA = "SET session_replication_role = replica"
ORIGIN = "RESET session_replication_role"
DISABLE = "ALTER TABLE jobs_variants DISABLE TRIGGER USER"
ENABLE = "ALTER TABLE jobs_variants ENABLE TRIGGER USER"


@pytest.mark.parametrize(("off", "on"), [(REPLICA, ORIGIN), (DISABLE, ENABLE)])
def test_backfill_finds_rows_of_all_tables(variants, run, off, on):
    job = variants.database.add_job("x", "y")
    variants.database.rows(off)
    [variant] = variants.add(job, "img_gen", "done")
    variants.database.rows(on)
    assert run("backfill", "--apply").lines == [
        "state                         stage        jobs",
        "jobs_variants: img_gen, done  yolo_detect     1",
        f"every {JOIN}: left out where no row was seen to come, as its rows stay in place: "
        "./jsl backfill --since 1d",
        "1 call recorded",
    ]
    assert variants.owed() == [("jobs_variants", variant, "yolo_detect")]


def lose_arrival(variants, how: str) -> str:
    """A job whose last row arrived while nobody could see it."""
    database = variants.database
    job = database.add_job("x", "y")
    [variant] = variants.add(job, "yolo_detect", "running")
    variants.add(job, "iou_eval", "done")
    look(database)
    if how == "TRUNCATE":
        variants.move(variant, "iou_eval", "done")
        database.rows("TRUNCATE stage_looks")
        return job
    off, on = (REPLICA, ORIGIN) if how == "replica" else (DISABLE, ENABLE)
    database.rows(off)
    variants.move(variant, "iou_eval", "done")
    database.rows(on)
    return job


@pytest.mark.parametrize("how", ["TRUNCATE", "replica", "DISABLE"])
def test_backfill_finds_joins_whose_last_arrival_was_not_seen(variants, run, how):
    job = lose_arrival(variants, how)
    missing = run("backfill", "--since", "1h").lines
    assert re.split(r" {2,}", missing[1]) == [f"every {JOIN}", "ad_copy", "1"]
    assert variants.owed() == []
    assert run("backfill", "--since", "1h", "--apply").lines[-1] == "1 call recorded"
    assert variants.owed() == [("jobs", job, "ad_copy")]
    assert run("backfill", "--since", "1h", "--apply").lines[-1] == "0 calls recorded"


def stalled(run) -> list[tuple]:
    found = json.loads(run("status", "--json").out)["stages"]
    return [(row["stage"], row["stalled_reason"]) for row in found if row["stalled"]]


OLD = "UPDATE jobs SET updated_at = now() - interval '1 y'"
TIMELESS = "ALTER TABLE jobs DROP COLUMN updated_at, DROP COLUMN created_at"


@pytest.mark.parametrize(
    ("how", "then"),
    [(how, "SELECT") for how in ("TRUNCATE", "replica", "DISABLE")]
    + [("TRUNCATE", OLD), ("TRUNCATE", TIMELESS)],
)
def test_join_whose_last_arrival_was_not_seen_is_called_by_what_status_says(
    variants, run, how, then
):
    job = lose_arrival(variants, how)
    variants.database.rows(then)
    assert job in run("jobs", "--stalled").out
    [(_, reason)] = stalled(run)
    done = run(*shlex.split(reason.split("never recorded: ./jsl ")[1]))
    assert variants.owed() == []
    done = run(*shlex.split(done.lines[-1].split("1 call missing; to record: ./jsl ")[1]))
    assert done.lines[-1] == "1 call recorded"
    assert variants.owed() == [("jobs", job, "ad_copy")] and stalled(run) == []


def test_status_shows_no_join_that_waits_is_looked_at_or_was_there_before_install(variants, run):
    waiting, arrived, emptied = (variants.database.add_job("x", "y") for _ in range(3))
    variants.add(waiting, "iou_eval", "done"), variants.add(waiting, "img_gen", "queued")
    [last] = variants.add(arrived, "img_gen", "queued")
    variants.add(arrived, "iou_eval", "done"), variants.add(emptied, "iou_eval", "done")
    variants.add(emptied, "img_gen", "queued")
    look(variants.database)
    variants.finish(last)
    variants.database.rows(REPLICA)
    variants.database.rows("DELETE FROM jobs_variants WHERE job_id = %s", emptied)
    variants.add(variants.database.add_job("x", "y"), "iou_eval", "done")
    assert stalled(run) == []


def test_backfill_leaves_parents_of_which_no_row_was_seen_to_come_where_there_is_no_time(
    variants, run
):
    variants.database.rows(f"{TIMELESS}; {REPLICA}")
    variants.add(variants.database.add_job("x", "y"), "iou_eval", "done")
    assert run("backfill").lines == [
        f"every {JOIN}: left out where no row was seen to come, as neither jobs nor jobs_variants "
        "has a time",
        "no call is missing",
    ]
    assert run("backfill", "--since", "1h").refused(1).endswith("leave it out")


def test_backfill_promises_no_call_of_a_join_that_it_never_makes(variants, run):
    job = lose_arrival(variants, "TRUNCATE")
    variants.database.rows(REPLICA)
    variants.add(variants.database.add_job("x", "y"), "iou_eval", "done")
    variants.database.rows("UPDATE jobs SET updated_at = now() + interval '9 h'")
    seen, unseen = (line for line in run("backfill", "--since", "1h").lines if ": 1 " in line)
    assert seen.startswith("left out: 1 whose time is not known")
    assert seen.endswith("backfill without --since takes them")
    assert unseen.startswith("left out: 1 with all rows of a join, none of which was seen to come")
    assert unseen.endswith("where the stage is not at work: ./jsl again --stage STAGE ID")
    assert run("backfill", "--apply").lines[-1] == "1 call recorded"
    assert variants.owed() == [("jobs", job, "ad_copy")]


def test_backfill_leaves_older_parents(variants, run):
    lose_arrival(variants, "TRUNCATE")
    variants.database.rows("UPDATE jobs SET updated_at = now() - interval '3 h'")
    assert run("backfill", "--since", "2h").lines[-1] == "no call is missing"


def test_backfill_never_repeats_a_join_that_was_recorded_though_history_is_pruned(variants, run):
    job = variants.database.add_job("x", "y")
    variants.add(job, "iou_eval", "done", count=2)
    look(variants.database)
    call(variants.database, ["ad_copy"])
    variants.database.rows("TRUNCATE stage_attempts")
    assert run("backfill", "--since", "1h").lines[-1] == "no call is missing"


@pytest.mark.parametrize("step", ["ad_copy", "instagram"])
def test_backfill_leaves_parents_that_are_past_a_join(variants, run, step):
    job = variants.database.add_job(step, "running")
    variants.database.rows(REPLICA)
    variants.add(job, "iou_eval", "done")
    said = "left alone, as they are at the stage or past it: 1; to call it all the same"
    assert said in run("backfill", "--since", "1h").out


@pytest.mark.parametrize("state", [("ad_copy", "running"), ("instagram", "done")])
def test_parent_that_is_past_a_join_whose_last_arrival_was_not_seen_is_left_to_a_person(
    variants, run, state
):
    job = lose_arrival(variants, "TRUNCATE")
    variants.database.move(job, *state)
    for since in ([], ["--since", "1h"]):
        assert "or past it: 1; to call it" in run("backfill", "--apply", *since).out
        assert variants.owed() == []
    assert stalled(run) == [("ad_copy", "its call was never recorded")]
    assert "never recorded" in type_way_out(run, job)
    assert variants.owed() == [("jobs", job, "ad_copy")]


def test_parent_at_a_stage_before_its_join_is_not_past_it(variants, run, use_pipeline):
    # The route of a retry comes after the join, but its stage does not.
    use_pipeline(PIPELINE | {("vlm_analyze", "failed"): PIPELINE["img_gen", "done"]})
    with connected(variants.database) as conn:
        apply(conn)
    job = lose_arrival(variants, "TRUNCATE")
    variants.database.move(job, "vlm_analyze", "done")
    assert stalled(run) == [("ad_copy", "its call was never recorded: ./jsl backfill")]
    assert run("backfill", "--apply").lines[-1] == "1 call recorded"


def test_second_call_of_a_join_whose_last_arrival_was_not_seen_needs_since(variants, run):
    job = variants.database.add_job("x", "y")
    first, second = variants.add(job, "iou_eval", "done", count=2)
    look(variants.database)
    call(variants.database, ["ad_copy"])
    variants.database.move(job, "instagram", "done")
    for variant in (first, second):
        variants.move(variant, "img_gen", "running")
    variants.finish(first)
    look(variants.database)
    variants.database.rows(REPLICA)
    variants.finish(second)
    assert run("backfill", "--apply").lines[-1] == "0 calls recorded"
    variants.database.rows("UPDATE jobs SET updated_at = now() + interval '9 h'")
    unknown = run("backfill", "--since", "1h").out
    assert "or past it: 1; to call it" in unknown and "without --since" not in unknown
    variants.database.rows("UPDATE jobs SET updated_at = now()")
    assert run("backfill", "--since", "1h", "--apply").lines[-1] == "1 call recorded"
    assert variants.owed() == [("jobs", job, "ad_copy")]


def test_own_call_that_was_made_before_that_of_a_join_is_not_repeated(variants, run):
    job = variants.database.add_job("img_gen", "done")
    call(variants.database, ["vlm_analyze"])
    variants.add(job, "iou_eval", "done")
    look(variants.database)
    call(variants.database, ["ad_copy"])
    run("backfill", "--apply")
    assert variants.owed() == []


def test_calls_of_rows_that_moved_on_unseen_are_dropped(variants, run):
    [variant] = variants.add(variants.database.add_job("x", "y"), "img_gen", "done")
    variants.database.rows(REPLICA)
    variants.move(variant, "yolo_detect", "running")
    assert "1 recorded call of jobs that have moved on" in run("backfill", "--apply").out
    [attempt] = variants.database.attempts(variant)
    assert (attempt.table_name, attempt.outcome) == ("jobs_variants", "skipped")


def test_two_joins_of_one_parent_are_found_apart(variants, run, use_pipeline):
    use_pipeline(PIPELINE | {VARIANTS.every("yolo_detect", "done"): stage("collage")})
    with closing(db.connect(variants.database.settings())) as conn:
        apply(conn)
    job = lose_arrival(variants, "TRUNCATE")
    run("backfill", "--since", "1h", "--apply")
    assert variants.owed() == [("jobs", job, "ad_copy")]


TWICE = """
INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                            finished_at, outcome)
SELECT job_id, table_name, call_id + 1, attempt, stage, worker, started_at, finished_at, outcome
FROM stage_attempts
"""


@pytest.mark.parametrize(
    ("since", "owed"),
    [
        ("SELECT", [OF_PHOTOS]),
        (TWICE, [OF_PHOTOS]),
        # Nothing says any more which join it was.
        ("TRUNCATE stage_joins", []),
        ("UPDATE stage_joins SET join_of = 'its name before'", []),
    ],
)
def test_backfill_takes_no_call_of_another_join_for_that_of_a_join(
    variants, run, two_joins, since, owed
):
    variants.add(two_joins, "iou_eval", "done")
    look(variants.database)
    call(variants.database, ["ad_copy"])
    variants.database.rows(f"{REPLICA}; {ADD_PHOTO}", two_joins)
    variants.database.rows(since)
    run("backfill", "--since", "1h", "--apply")
    assert [join for (join,) in variants.database.rows(OWED_JOINS)] == owed


# --- what is said of mistakes --------------------------------------------------------------


def test_table_that_the_application_dropped_is_not_said_to_be_ours(variants, run):
    variants.database.rows("DROP TABLE jobs_variants")
    refused = run("jobs").refused(1)
    said = 'relation "public.jobs_variants" does not exist: ./jsl verify'
    assert refused == f"jobs_variants cannot be read: {said}"
    variants.database.rows("DROP TABLE stage_attempts CASCADE")
    assert run("jobs", "--since", "1h", "--table", "jobs").refused(1) == (
        'relation "stage_attempts" does not exist: run `make trigger` (./jsl install)'
    )


# --- a table that left PIPELINE ------------------------------------------------------------

ROWS = Table("v", id="id", parent=("jobs", "job_id"))
NUMBERED = """
CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id text, current_step text, status text);
CREATE TABLE v (id bigint PRIMARY KEY, job_id bigint, current_step text, status text);
CREATE INDEX ON v (job_id);
"""


@pytest.fixture
def older(empty_database, use_pipeline, tmp_path):
    """Runs a command of a program whose PIPELINE has no table v yet; job 7 and its rows 7 and 8
    have given-up calls.
    """
    environ = empty_database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    empty_database.rows(NUMBERED)
    own = {("img_gen", "done"): stage("vlm_analyze")}
    use_pipeline(own | {ROWS("a", "done"): stage("yolo_detect")})
    assert commands.run_here(environ, "install").code == 0
    empty_database.rows("INSERT INTO jobs VALUES (7, 't', 'img_gen', 'done')")
    empty_database.rows("INSERT INTO v VALUES (7, 7, 'a', 'done'), (8, 7, 'a', 'done')")
    empty_database.rows(GIVE_UP)
    use_pipeline(own)
    return lambda *args: commands.run_here(environ, *args)


@pytest.fixture
def gone(older):
    """The same after table v has left PIPELINE."""
    assert older("install").code == 0
    return older


@pytest.mark.parametrize("args", [("jobs", "--given-up"), ("retry", "--all"), ("cancel", "--all")])
def test_a_list_names_the_table_of_rows_that_are_not_jobs(gone, args):
    header, *lines = gone(*args).lines
    assert header.split()[-1] == "table"
    assert sorted(line.split()[-1] for line in lines if line[0] in "78") == ["jobs", "v", "v"]


@pytest.mark.parametrize("command", ["job", "retry", "cancel"])
def test_an_id_that_a_row_of_a_gone_table_has_too_asks_for_the_table(gone, command):
    asked = "7 is in jobs and in v: give --table jobs or --table v"
    assert gone(command, "7").refused(1) == asked
    assert gone(command, "--table", "jobs", "7").code == 0
    done = gone(command, "--table", "v", "7")
    assert done.code == 0 and "v 7" in done.out
    unknown = gone(command, "--table", "w", "7").refused(2)
    assert "'w' is no table: PIPELINE has jobs. See:" in unknown


def test_a_row_of_a_gone_table_can_be_cancelled_and_not_called(gone):
    lines = gone("job", "8").lines
    assert lines[0] == "v 8 cannot be read: PIPELINE has no table v"
    assert lines[1].endswith("given up: HTTP 422")
    assert lines[2].endswith("yolo_detect waits: PIPELINE has no table v; ./jsl cancel 8")
    for refused in (gone("again", "8"), gone("call", "8"), gone("call", "--dry-run", "8")):
        assert refused.refused(1) == (
            "v 8 cannot be read: PIPELINE has no table v; to drop what it owes: ./jsl cancel 8"
        )
    assert gone("cancel", "--table", "v", "--all", "--yes").code == 0
    assert "no job 8" in gone("job", "8").refused(1)


OTHER = "this program has another PIPELINE than the database: use the one that was installed"


def test_what_only_another_pipeline_wants_is_left_to_it(older):
    lines = older("job", "--table", "v", "8").lines
    assert lines[0] == f"v 8 cannot be read: {OTHER}"
    assert lines[2] == f"yolo_detect waits: {OTHER}"
    assert older("again", "8").refused(1) == f"v 8 cannot be read: {OTHER}"
    assert older("retry", "8").code == 0
    assert older("retry", "8").refused(1) == f"v 8: {OTHER}"
    assert json.loads(older("job", "8", "--json").out)["waits"] == {"why": OTHER, "mend": None}
    mend = "       → run `make trigger` (./jsl install), if this PIPELINE is the newer one"
    assert mend in older("status").lines


OWN = {("img_gen", "done"): stage("vlm_analyze")}
OF_ROWS = OWN | {ROWS("a", "done"): stage("yolo_detect")}
JOINED = OF_ROWS | {ROWS.every("b", "done"): stage("ad_copy")}


def test_row_of_a_table_that_only_the_database_lacks_is_not_said_to_be_deleted(gone, use_pipeline):
    use_pipeline(OF_ROWS)
    assert gone("job", "8").lines[0] == f"v 8 cannot be read: {OTHER}"
    assert gone("cancel", "--table", "v", "--all", "--yes").code == 0
    for args in (["8"], ["--table", "v", "8"]):
        assert gone("job", *args).refused(1) == f"8 cannot be found: {OTHER}"


@pytest.mark.parametrize(("there", "here", "watched"), [(OWN, OF_ROWS, 2), (OF_ROWS, JOINED, 4)])
def test_trigger_that_only_the_pipeline_of_this_program_needs_is_not_missing(
    older, use_pipeline, there, here, watched
):
    """`install` as advice would take away what the newer PIPELINE has."""
    use_pipeline(there)
    assert older("install").code == 0
    use_pipeline(here)
    status = older("status").out
    assert "triggers on" in status and "PROBLEM  routes differ" in status
    assert "→ ./jsl install\n" not in older("verify").out
    assert older("metrics").out.count("trigger_enabled{") == watched
