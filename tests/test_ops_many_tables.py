"""Commands where jobs is not the only table: each knows the rows of all of them."""

import json
import re
import uuid
from contextlib import closing
from pathlib import Path

import commands
import pytest
from claims import claim_many, connected, result, settle
from reports import attempt, read
from scraping import PREFIX, Scraped
from test_joins import CROPS, CROPS_TABLE
from test_ops_status import status
from test_ops_verify import INSTALL, INSTALL_NEWER, problems
from variants import TABLE, VARIANTS, Variants, install, stage
from waiting import until

import db
import history
import joins
import pipeline
import troubles
from ops.install import apply
from ops.place import changes
from ops.problem import GRANTS
from ops.tables import faults
from ops.verify import run_checks
from pipeline import Table

HERE = {"PIPELINE_MODULE": "variants", "PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def command(variants, tmp_path):
    """command(*args, api=None, **settings) on the database of `variants`, in this process."""

    def typed(*args: str, api=None, **settings: str) -> commands.Done:
        environ = variants.database.environ | {"HEARTBEAT_DIR": str(tmp_path)} | settings
        return commands.run_here(environ | ({"STAGE_API_URL": api.url} if api else {}), *args)

    return typed


def fail_by_stage(variants: Variants, error: str = "HTTP 500: CUDA out of memory") -> str:
    """A variant that its stage has set failed, and then answered `error`."""
    [variant] = variants.add(variants.database.add_job("x", "y"), "img_gen", "done")
    with connected(variants.database) as conn:
        [row] = claim_many(conn, 1, stages=["yolo_detect"]).claimed
        variants.move(variant, "yolo_detect", "failed")
        said = f"{error} (set failed by its stage)"
        settle(conn, result(row, "failed", table_name=row.table_name, error=said))
    return variant


# --- status, metrics -----------------------------------------------------------------------


def test_status_shows_of_which_table_the_rows_of_a_stage_are(variants, run_command):
    variants.add(variants.database.add_job("x", "y"), "img_gen", "done", count=3)
    said = status(run_command, variants.database, **HERE)
    assert said.row("yolo_detect")[0] == "3"
    assert list(said.stages) == ["vlm_analyze", "yolo_detect", "iou_eval", "ad_copy", "instagram"]
    assert said.groups == {"jobs": ["vlm_analyze", "ad_copy", "instagram"],
                           "jobs_variants": ["yolo_detect", "iou_eval"]}  # fmt: skip


def test_status_shows_failed_and_stalled_rows_with_the_reason(variants, run_command):
    fail_by_stage(variants)
    job = variants.database.add_job("vlm_analyze", "running")
    variants.database.rows("UPDATE jobs SET updated_at = now() - interval '1 h'"
                           " WHERE job_id = %s", job)  # fmt: skip
    said = status(run_command, variants.database, **HERE)
    assert said.summary.startswith("2 need a person, ")
    assert said.rest[:4] == [
        "vlm_analyze  1 row is stalled: running for longer than the timeout",
        "yolo_detect  1 row is failed: HTTP 500: CUDA out of memory (set failed by its stage)",
        "failed: ./jsl jobs --failed, then job ID for the way back",
        "stalled: ./jsl jobs --stalled",
    ]
    found = json.loads(run_command(variants.database, "status", "--json", **HERE).out)
    stages = {row["stage"]: row for row in found["stages"]}
    assert [stages["yolo_detect"][name] for name in ("tables", "failed", "stalled")] == (
        [["jobs_variants"], 1, 0]
    )
    assert stages["yolo_detect"]["failed_reason"].startswith("HTTP 500: CUDA out of memory")
    assert stages["vlm_analyze"]["stalled"] == 1 and found["resting_problem"] is None


def test_row_that_rests_is_listed_while_its_join_owes_a_call(variants, command):
    job = variants.database.add_job("vlm_analyze", "running")
    variants.add(job, "iou_eval", "done")
    with connected(variants.database) as conn:
        joins.look(conn)
    variants.database.rows("UPDATE jobs SET updated_at = now() - interval '1 h'")
    for options in ("--stalled",), ("--stage", "vlm_analyze"), ("--stage", "ad_copy"):
        assert job in command("jobs", *options).out
    said = command("job", job).out
    assert "rests since " in said and "running for longer than the timeout" in said
    assert "owes ad_copy (call " in said
    variants.database.move(job, "ad_copy", "running")  # its own stage is at work on it
    assert job not in command("jobs", "--stalled").out


def test_job_shows_which_of_its_rows_a_person_has_cancelled(variants, command):
    job = variants.database.add_job("img_gen", "queued")
    dropped, _ = variants.add(job, "img_gen", "done", count=2)
    variants.add(job, "iou_eval", "done")
    command("cancel", dropped, "--reason", "twice")
    said = command("job", job).lines
    assert "every jobs_variants (iou_eval, done): waiting for 2 of 3" in said
    [line] = [line for line in said if line.startswith(dropped)]
    assert re.fullmatch(rf"{dropped} +img_gen, done +cancelled by \S+: twice", line)
    [children] = json.loads(command("job", job, "--json").out)["children"]
    found = {row["job_id"]: row["rests"] for row in children["rows"] if row["rests"]}
    assert {id: (rests["kind"], rests["stage"]) for id, rests in found.items()} == (
        {dropped: ("cancelled", "yolo_detect")}
    )
    command("again", dropped)
    assert "cancelled" not in command("job", job).out


def test_row_that_failed_late_is_told_while_its_join_owes_a_call(variants):
    job = variants.database.add_job("img_gen", "done")
    variants.add(job, "iou_eval", "done")
    with connected(variants.database) as conn:
        [row] = claim_many(conn, 1, stages=["vlm_analyze"]).claimed
        settle(conn, result(row))
        joins.look(conn)
        variants.database.move(job, "vlm_analyze", "failed")
        assert [one.stage for one in troubles.newly_failed(conn)[0]] == ["vlm_analyze"]


def test_status_and_metrics_count_the_same_rows(variants, command):
    fail_by_stage(variants), fail_by_stage(variants)
    stages = json.loads(command("status", "--json").out)["stages"]
    found = Scraped(command("metrics").out)
    for name in ("failed", "stalled"):
        shown = {row["stage"]: row[name] for row in stages}
        assert shown == {s: found.of(f"{name}_jobs", stage=s) for s in pipeline.stage_names()}
    assert found.of("failed_jobs", stage="yolo_detect") == 2


def test_rows_of_a_table_that_cannot_be_read_are_not_known_and_those_of_others_are(
    variants, command
):
    variants.database.add_job("vlm_analyze", "failed")
    variants.database.rows("ALTER TABLE jobs_variants RENAME status TO state")
    shown = json.loads(command("status", "--json").out)
    reasons = [f"column {name}.status does not exist" for name in "rx"]  # of the table, of the join
    of = "jobs_variants, jobs_variants (iou_eval, done)"
    assert shown["resting_problem"] == (
        f"{'; '.join(reasons)}: which rows are failed or stalled is not known of {of}"
    )
    said = command("status").out
    assert f"PROBLEM  {reasons[0]}; " in said and "nothing is due" not in said
    failed = {row["stage"]: row["failed"] for row in shown["stages"]}
    assert failed == {"vlm_analyze": 1, "yolo_detect": None, "iou_eval": None, "ad_copy": None,
                      "instagram": 0}  # fmt: skip
    found = Scraped(command("metrics").out)
    counted = {dict(labels)["stage"]: jobs for (name, *labels), jobs in found.items()
               if name == f"{PREFIX}failed_jobs"}  # fmt: skip
    assert counted == {stage: jobs for stage, jobs in failed.items() if jobs is not None}
    readable = [found.of("table_readable", table=name) for name in ("jobs", "jobs_variants")]
    assert (found.of("up"), readable) == (1, [1, 0])


# How jobs_variants becomes unreadable, and what the commands say of it and advise.
UNREADABLE = {
    "column renamed": (
        "ALTER TABLE jobs_variants RENAME status TO state",
        "column r.status does",
        "./jsl verify",
    ),
    "table renamed": (
        "ALTER TABLE jobs_variants RENAME TO x",
        "public.jobs_variants",
        "./jsl verify",
    ),
    "locked": ("BEGIN; LOCK TABLE jobs_variants", "is locked by server process", "try again"),
}


@pytest.mark.parametrize("made", [
    pytest.param(made, marks=pytest.mark.slow) if made == "locked" else made for made in UNREADABLE
])  # fmt: skip
def test_commands_show_what_they_can_of_the_tables_that_can_be_read(
    variants, command, tmp_path, made
):
    sql, reason, mend = UNREADABLE[made]
    job, page = variants.database.add_job("vlm_analyze", "failed"), tmp_path / "report.html"
    [variant] = variants.add(job, "img_gen", "done")
    variants.database.rows("UPDATE stage_calls SET due_at = 'infinity', last_error = 'HTTP 500'")
    with closing(variants.database.connect()) as other:
        other.cursor().execute(sql)
        shown = {args: command(*args) for args in [
            ("jobs", "--failed"), ("jobs", "--stalled"), ("jobs", "--given-up"), ("jobs",),
            ("jobs", "--stage", "vlm_analyze"), ("job", job),
            ("job", variant), ("report", "--out", str(page), "--job", job), ("audit",),
        ]}  # fmt: skip
        refused = [command("again", *args).refused(1)
                   for args in [(job,), ("--table", "jobs_variants", variant)]]  # fmt: skip
    choice = f"; if {job} is a row of another table, give --table jobs"
    assert refused[0].endswith(choice)
    for said in (shown["jobs",].err, refused[0].removesuffix(choice), refused[1]):
        assert reason in said and said.rstrip().endswith(": " + mend), said
    for args, done in shown.items():
        assert done.code == 1 and "jobs_variants" in done.err, (args, done)
        assert done.err.count(reason) == 1, (args, done)
    told = {args[:2]: done.out for args, done in shown.items()}
    assert job in told["jobs", "--failed"] and job in told["jobs", "--stage"]
    assert told["jobs", "--stalled"] == "no job matches, as far as could be read\n"
    assert re.search(f"{variant} .*HTTP 500 +- +jobs_variants", told["jobs", "--given-up"])
    assert "vlm_analyze  failed" in told["jobs",]
    assert f"job {job} is at (vlm_analyze, failed)" in told["job", job]
    assert ": set failed by its stage; " in told["job", job] and reason not in told["job", job]
    assert told["job", variant].startswith(f"jobs_variants {variant} cannot be read\nowes: yolo_")
    assert "no promise was broken, as far as could be read" in told["audit",]
    assert job in page.read_text() and reason in page.read_text()


def test_lock_is_told_of_the_table_that_has_it(variants, command):
    with closing(variants.database.connect()) as one, closing(variants.database.connect()) as other:
        one.cursor().execute("BEGIN; LOCK TABLE jobs_variants")
        other.cursor().execute("BEGIN; LOCK TABLE jobs")
        said = command("jobs").refused(1)
        pids = {"jobs_variants": one.info.backend_pid, "jobs": other.info.backend_pid}
    for table, pid in pids.items():
        assert f"{table} cannot be read: {table} is locked by server process {pid}: try" in said


def test_status_says_of_every_stage_why_no_call_of_it_can_be_claimed(
    variants, api, listener, run_command
):
    database = variants.database
    variants.add(database.add_job(), "img_gen", "done")
    database.rows("ALTER TABLE jobs RENAME status TO state")
    with closing(database.connect()) as other:
        other.cursor().execute("BEGIN; LOCK TABLE jobs_variants")
        locked = f"jobs_variants is locked by server process {other.info.backend_pid}"
        reasons = {"vlm_analyze: column r.status does not exist", f"yolo_detect: {locked}"}

        def told() -> bool:
            lines = run_command(database, "status", **HERE).out.splitlines()
            said = [line.partition("claimed of ")[2] for line in lines if "PROBLEM" in line]
            return reasons in [set(one.split("; ")) for one in said]

        listener(database, api=api, **HERE)
        until(told, "both reasons")


def test_verify_tells_which_table_is_locked(variants, command, api):
    with closing(variants.database.connect()) as other:
        other.cursor().execute("BEGIN; LOCK TABLE jobs_variants")
        done = command("verify", api=api)
        locked = f"jobs_variants is locked by server process {other.info.backend_pid}"
        assert problems(done) == [(locked, "./jsl verify, once more")]
        for table in ("jobs", "stage_calls"):
            other.cursor().execute(f"ROLLBACK; BEGIN; LOCK TABLE {table}")
            [[said, _]] = problems(command("verify", api=api))
            assert said == locked.replace("jobs_variants", table)


ACCEPTED_YESTERDAY = """
WITH owed AS (DELETE FROM stage_calls RETURNING *)
INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                            finished_at, outcome)
SELECT job_id, table_name, call_id, 1, stage, '', now(), now() - interval '1 day', 'succeeded'
FROM owed
"""


def test_role_that_may_not_read_another_table_sees_the_others(variants, command, make_role):
    job, role = variants.database.add_job("vlm_analyze", "failed"), make_role(variants.database)
    variants.database.rows(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role};"
                           f"GRANT EXECUTE ON FUNCTION resting_rows() TO {role};"
                           f"REVOKE ALL ON jobs_variants FROM {role}")  # fmt: skip
    said = f"jobs_variants cannot be read: permission denied for table jobs_variants: {GRANTS}"
    for args, shown in {("job", job): "(vlm_analyze, failed)", ("jobs",): "vlm_analyze  failed",
                        ("audit",): "as far as could be read"}.items():  # fmt: skip
        done = command(*args, DB_USER=role, DB_PASSWORD=role)
        assert done.refused(1) == said and shown in done.out
    [variant] = variants.add(job, "img_gen", "done")
    variants.database.rows(ACCEPTED_YESTERDAY)
    assert "accepted by the stage" in command("job", variant).out
    done = command("job", variant, DB_USER=role, DB_PASSWORD=role)
    assert done.refused(1) == said and "accepted by the stage" not in done.out


def test_metrics_watch_the_triggers_of_every_table(variants, command):
    variants.database.rows("ALTER TABLE jobs_variants DISABLE TRIGGER job_state_listener_delete")
    found = {
        tuple(sorted(dict(labels).values())): value
        for (name, *labels), value in Scraped(command("metrics").out).items()
        if name == f"{PREFIX}database_trigger_enabled"
    }
    assert found == {
        ("job_state_change_trigger",): 1,
        ("job_state_insert_trigger",): 1,
        ("job_state_listener_change", "jobs_variants"): 1,
        ("job_state_listener_insert", "jobs_variants"): 1,
        ("job_state_listener_delete", "jobs_variants"): 0,
    }


# --- job -----------------------------------------------------------------------------------


def test_of_many_rows_those_that_need_a_person_are_named(variants, run_command):
    database = variants.database
    job = database.add_job("x", "y")
    *others, failed, given_up = sorted(variants.add(job, "iou_eval", "running", 40))
    variants.move(failed, "yolo_detect", "failed")
    variants.move(given_up, "img_gen", "done")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', last_error = 'HTTP 404: no image'")
    lines = run_command(database, "job", job, **HERE).lines
    assert [re.split("  +", line) for line in lines[3:]] == [
        ["jobs_variants", "rows", "owed", "given up"],
        ["img_gen, done", "1", "1", "1"],
        ["iou_eval, running", "38", "0", "0"],
        ["yolo_detect, failed", "1", "0", "0"],
        ["needs a person", "state", "owes"],
        [failed, "yolo_detect, failed", "set failed by its stage"],
        [given_up, "img_gen, done", "yolo_detect: given up: HTTP 404: no image"],
    ]
    database.rows("UPDATE jobs_variants SET current_step = 'yolo_detect', status = 'failed'")
    lines = run_command(database, "job", job, **HERE).lines
    assert [line.split()[0] for line in lines[-21:-1]] == others[:20]
    assert lines[-1] == "more than 20 rows of jobs_variants need a person"


def test_rows_that_owe_several_calls_are_counted_as_rows(database, use_pipeline, run_command):
    use_pipeline({
        VARIANTS("img_gen", "done"): stage("resize"),
        CROPS.every("cut", "done"): stage("merge"),
    })  # fmt: skip
    variants = install(database, TABLE, CROPS_TABLE)
    job = database.add_job("x", "y")
    added = sorted(variants.add(job, "img_gen", "done", 20))
    database.rows("INSERT INTO crops SELECT gen_random_uuid(), job_variants_id, 'cut', 'done'"
                  " FROM jobs_variants")  # fmt: skip
    with connected(database) as conn:
        joins.look(conn)
    twenty = run_command(database, "job", job).lines
    assert [line.split()[0] for line in twenty[3:]] == [one for one in added for _ in range(2)]
    added = sorted([*added, *variants.add(job, "img_gen", "done")])
    database.rows("UPDATE stage_calls SET due_at = 'infinity'")
    said = run_command(database, "job", job).lines
    assert re.split("  +", said[3]) == ["img_gen, done", "21", "41", "41"]
    assert list(dict.fromkeys(line.split()[0] for line in said[5:-1])) == added[:20]
    assert said[-1] == "more than 20 rows of jobs_variants need a person"


def test_join_of_a_deleted_job_waits_for_no_row(variants, run_command):
    database = variants.database
    job = database.add_job("x", "y")
    attempt(database, job, "ad_copy")
    variants.add(job, "iou_eval", "running")
    database.rows("DELETE FROM jobs_variants; DELETE FROM jobs")
    assert run_command(database, "job", job, **HERE).lines[:3] == [
        f"job {job} was deleted",
        "owes: nothing",
        "every jobs_variants (iou_eval, done): owes nothing",
    ]


# --- report --------------------------------------------------------------------------------


def test_report_shows_failed_rows_with_the_sql_that_sends_them_back(variants):
    variant = fail_by_stage(variants)
    shown = read(variants.database)
    [row] = shown.table("set-failed")
    assert row[0] == "HTTP 500: CUDA out of memory (set failed by its stage)"
    assert row[1:3] == ["jobs_variants (yolo_detect, failed) stage yolo_detect", "1"]
    assert shown.figures["Set failed"] == "1"
    variants.database.rows(row[4])
    assert variants.owed() == [("jobs_variants", variant, "yolo_detect")]
    assert "Set failed" not in read(variants.database).figures


def test_report_of_a_job_shows_its_joins_and_the_rows_that_belong_to_it(variants):
    failed = fail_by_stage(variants)
    [job] = [str(row.job_id) for row in variants.database.rows("SELECT job_id FROM jobs")]
    [waiting, *_] = variants.add(job, "iou_eval", "done", 2)
    parent = read(variants.database, job).section("jobs").one("article")
    assert parent.one("h3").text == job
    said = [line.text for line in parent.one("ul", "said").all("li")]
    assert said[1:] == ["owes: nothing", "every jobs_variants (iou_eval, done): waiting for 1 of 3"]
    assert parent.one("h4").text == (
        "jobs_variants: 3 rows, 2 at (iou_eval, done), 1 at (yolo_detect, failed)"
    )
    children = {child.text.split()[0]: child.text for child in parent.all("h5")}
    assert len(children) == 3 and "at (iou_eval, done)" in children[waiting]
    assert "at (yolo_detect, failed)" in children[failed] and "1 attempt," in children[failed]
    [lane, _axis] = parent.all("svg", "lane")
    assert lane.attributes["aria-label"].startswith("yolo_detect; attempt 1 failed")


def test_report_of_a_row_shows_whose_it_is_and_how_it_goes_on(variants):
    variant = fail_by_stage(variants)
    [article] = read(variants.database, variant).section("jobs").all("article")
    assert article.one("h3").text == f"jobs_variants {variant}"
    where, _, rests = [line.text for line in article.one("ul", "said").all("li")]
    assert "(yolo_detect, failed), of job " in where
    assert "set failed by its stage" in rests and 'UPDATE "jobs_variants" SET' in rests
    assert not article.all("h4")


def test_report_counts_the_children_that_it_does_not_show(variants):
    job = variants.database.add_job("img_gen", "running")
    variants.add(job, "iou_eval", "done", 40)
    variants.database.rows("DELETE FROM stage_looks")
    attempt(variants.database, job, "vlm_analyze")
    article = read(variants.database, job).section("jobs").one("article")
    assert article.one("h4").text == (
        "jobs_variants: 40 rows, 40 at (iou_eval, done), the first 12 below"
    )
    assert len(article.all("h5")) == 12


# --- install, verify, uninstall ------------------------------------------------------------


def test_verify_names_pipeline_tables_functions_and_triggers(variants, run_command, api):
    done = run_command(variants.database, "verify", api=api, **HERE)
    assert problems(done) == []
    said = [line.removeprefix("ok       ") for line in done.lines]
    tables = "tables of PIPELINE: jobs (job_id), jobs_variants (job_variants_id, job_id)"
    assert f"{tables}; no updated_at or created_at of type timestamptz in jobs_variants" in said
    assert "functions notify_job_state_change(), job_state_listener_jobs_variants()" in said
    assert (
        "triggers job_state_change_trigger, job_state_insert_trigger, enabled on jobs; "
        "job_state_listener_change, job_state_listener_insert, job_state_listener_delete, "
        "enabled on jobs_variants"
    ) in said
    assert "routes: PIPELINE of variants.py (5 states, 2 tables, 1 join) is in the database" in said


# name: (what went wrong, the line, the command that mends it)
DAMAGE = {
    "trigger missing": (
        "DROP TRIGGER job_state_listener_delete ON jobs_variants",
        "trigger job_state_listener_delete is missing on jobs_variants",
        INSTALL,
    ),
    "trigger disabled": (
        "ALTER TABLE jobs_variants DISABLE TRIGGER job_state_listener_insert",
        "trigger job_state_listener_insert on jobs_variants is disabled",
        INSTALL,
    ),
    "function without its owner's rights": (
        "ALTER FUNCTION job_state_listener_jobs_variants() SECURITY INVOKER",
        "function job_state_listener_jobs_variants() is not the listener's",
        INSTALL,
    ),
    "state that the function was not told": (
        "DO $$ BEGIN EXECUTE replace(pg_get_functiondef("
        "'job_state_listener_jobs_variants()'::regprocedure), '\"iou_eval\"', '\"x\"'); END $$",
        "the function job_state_listener_jobs_variants() does not know all routes",
        INSTALL,
    ),
    "join that the function was not told": (
        "DO $$ BEGIN EXECUTE replace(pg_get_functiondef("
        "'job_state_listener_jobs_variants()'::regprocedure), 'jobs_variants (iou_eval, done)',"
        " 'x'); END $$",
        "the function job_state_listener_jobs_variants() does not know all routes",
        INSTALL,
    ),
    "function of the claim missing": (
        "DROP FUNCTION stage_join_is_complete",
        "function stage_join_is_complete is missing",
        INSTALL,
    ),
    "parent without an index": (
        "DROP INDEX jobs_variants_job_id_idx",
        "jobs_variants.job_id has no index, so each look at a parent would read all of"
        " jobs_variants",
        "CREATE INDEX ON jobs_variants (job_id)",
    ),
    "another parent declared": (
        "UPDATE pipeline_tables SET parent_column = 'status' WHERE name = 'jobs_variants'",
        "routes differ: table jobs_variants: parent_column is job_id in demo/five_stages.py,"
        " status in the database",
        INSTALL_NEWER,
    ),
}


def test_table_that_was_added_to_pipeline_is_named(variants, command, api):
    variants.database.rows("DELETE FROM pipeline_tables WHERE name = 'jobs_variants'")
    [[what, _]] = problems(command("verify", api=api))
    assert what == "routes differ: the database does not know table jobs_variants"


def test_damage_to_another_table_is_named_and_mended(variants, command, api):
    for damage, (sql, what, mend) in DAMAGE.items():
        variants.database.rows(sql)
        assert problems(command("verify", api=api)) == [(what, mend)], damage
        if mend in (INSTALL, INSTALL_NEWER):
            assert command("install").code == 0
        else:
            variants.database.rows(mend)
        assert problems(command("verify", api=api)) == [], damage


def test_table_that_install_has_not_seen_is_a_difference_alone(database, run_command, api):
    database.rows(TABLE)
    [(what, mend)] = problems(run_command(database, "verify", api=api, **HERE))
    assert what.startswith("routes differ: ") and mend == INSTALL_NEWER


def test_role_that_may_not_read_another_table_is_told(variants, command, api, make_role):
    role = make_role(variants.database)
    done = command("verify", api=api, DB_USER=role, DB_PASSWORD=role)
    [lacks] = [line for line in done.lines if f"role {role} lacks " in line]
    assert "SELECT on jobs_variants" in lacks


def test_install_names_the_objects_and_routes_of_every_table(empty_database, run_command):
    assert run_command(empty_database, "install").code == 0
    empty_database.rows(TABLE)
    done = run_command(empty_database, "install", **HERE)
    assert done.code == 0
    for line in [
        "  kept     table jobs_variants",
        "  created  function job_state_listener_jobs_variants()",
        "  created  trigger job_state_listener_change on jobs_variants",
        "  created  trigger job_state_listener_delete on jobs_variants",
        "  routed   jobs_variants (yolo_detect, done) → iou_eval",
        "  routed   every jobs_variants (iou_eval, done) → ad_copy",
    ]:
        assert line in done.lines


def test_uninstall_takes_what_is_ours_from_every_table(variants, command):
    [variant] = variants.add(variants.database.add_job("x", "y"), "img_gen", "done")
    done = command("uninstall", "--yes")
    assert "  function job_state_listener_jobs_variants()" in done.lines
    assert "  trigger job_state_listener_delete on jobs_variants" in done.lines
    assert (
        "and with them 1 open call and the history. jobs, jobs_variants are not touched."
        in done.lines
    )
    variants.move(variant, "yolo_detect", "done")
    left = ("SELECT relname FROM pg_class WHERE relkind IN ('r', 'v')"
            " AND relnamespace = %s::regnamespace")  # fmt: skip
    found = variants.database.rows(left, "public")
    assert {row.relname for row in found} == {"jobs", "jobs_variants"}
    assert command("uninstall").lines == ["nothing to remove"]


# --- what install refuses ------------------------------------------------------------------

JOBS = "CREATE TABLE jobs (job_id uuid PRIMARY KEY, tenant_id text, current_step text, status text)"
OTHER = ", or name another column in Table(...)"
ONE_TYPE = f"give all ids one type (ALTER TABLE){OTHER}"
# name: (jobs, the table beside it, the one line)
REFUSED = {
    "unknown table": (
        JOBS, "",
        "there is no table jobs_variants beside jobs: create it, or take it out of PIPELINE",
    ),
    "missing column": (
        JOBS, TABLE.replace("status          text", "state text"),
        f"table jobs_variants has no column status: add it (ALTER TABLE){OTHER}",
    ),
    "parent without an index": (
        JOBS, TABLE.replace("CREATE INDEX ON jobs_variants (job_id);", ""),
        "jobs_variants.job_id has no index, so each look at a parent would read all of"
        " jobs_variants: CREATE INDEX ON jobs_variants (job_id)",
    ),
    "id types that differ": (
        JOBS, TABLE.replace("uuid PRIMARY KEY DEFAULT gen_random_uuid()", "bigint PRIMARY KEY"),
        "jobs_variants.job_id is of type uuid, jobs_variants.job_variants_id of bigint:"
        f" {ONE_TYPE}; jobs_variants has ids of type bigint, jobs of uuid: {ONE_TYPE}",
    ),
    "id of another table not unique by itself": (
        JOBS, TABLE.replace("PRIMARY KEY DEFAULT gen_random_uuid()", "NOT NULL"),
        "jobs_variants.job_variants_id is not unique by itself, so a call could go to another row:"
        f" CREATE UNIQUE INDEX ON jobs_variants (job_variants_id){OTHER}",
    ),
    "numbers that each tenant counts": (
        JOBS.replace("job_id uuid PRIMARY KEY", "job_id uuid").replace(
            "status text)", "status text, PRIMARY KEY (tenant_id, job_id))"),
        TABLE.replace("REFERENCES jobs ON DELETE CASCADE", ""),
        "jobs.job_id is not unique by itself, so a call could go to another row:"
        " CREATE UNIQUE INDEX ON jobs (job_id)",
    ),
    "ids that cannot be compared": (
        JOBS.replace("job_id uuid PRIMARY KEY", "job_id json"),
        TABLE.replace("uuid PRIMARY KEY DEFAULT gen_random_uuid()", "json").replace(
            "uuid NOT NULL REFERENCES jobs ON DELETE CASCADE", "json").replace(
            "CREATE INDEX ON jobs_variants (job_id);",
            "CREATE INDEX ON jobs_variants ((job_id::text));"),
        "jobs.job_id is of type json, which cannot be an id: give it a type such as"
        " uuid, bigint or text (ALTER TABLE)",
    ),
    "rows in tables that inherit": (
        JOBS, f"{TABLE} CREATE TABLE old_variants (PRIMARY KEY (job_variants_id))"
        " INHERITS (jobs_variants);",
        "old_variants INHERITS jobs_variants, whose triggers do not see its rows:"
        " ALTER TABLE … NO INHERIT jobs_variants, or partition it instead",
    ),
    "tables of two owners": (
        JOBS, f"{TABLE} ALTER TABLE jobs_variants OWNER TO pg_monitor;",
        "jobs_variants belongs to pg_monitor, jobs to {owner}, and our functions run with the"
        " rights of one owner: ALTER TABLE jobs_variants OWNER TO {owner}",
    ),
}  # fmt: skip


def test_generated_column_that_no_trigger_sees_is_refused(empty_database, run_command):
    if empty_database.conn.info.server_version < 180000:
        pytest.skip("PostgreSQL 18 has VIRTUAL generated columns")
    virtual = "status text GENERATED ALWAYS AS ('done') VIRTUAL"
    empty_database.rows(f"{JOBS}; {TABLE.replace('status          text', virtual)}")
    said = run_command(empty_database, "install", **HERE).refused(1)
    assert said.startswith(
        "jobs_variants.status is a VIRTUAL generated column, which no trigger "
        f"sees: make it a STORED or a plain one (ALTER TABLE){OTHER}"
    )


@pytest.mark.parametrize("fault", REFUSED)
def test_table_that_cannot_be_used_is_refused_in_one_line(
    each_server, make_database, run_command, fault
):
    jobs, beside, line = REFUSED[fault]
    database = make_database(each_server, installed=False)
    database.rows(f"{jobs}; {beside}")
    owner = database.value("SELECT current_user")
    said = run_command(database, "install", **HERE).refused(1)
    assert said.startswith(line.format(owner=owner)) and said.endswith("; nothing was changed")
    assert not database.value("SELECT to_regclass('stage_calls')")


# How each is mended, as far as its line is SQL.
@pytest.mark.parametrize("fault", [name for name in REFUSED if " ON " in REFUSED[name][2]])
def test_sql_of_a_refusal_mends_the_table(empty_database, run_command, fault):
    jobs, beside, _ = REFUSED[fault]
    empty_database.rows(f"{jobs}; {beside}")
    said = run_command(empty_database, "install", **HERE).refused(1)
    empty_database.rows(re.search(r"CREATE [^;,]+ ON \w+ \(\w+\)", said)[0])
    assert run_command(empty_database, "install", **HERE).code == 0


def test_verify_names_every_fault_of_every_table(variants):
    variants.database.rows("ALTER TABLE jobs_variants DROP COLUMN status CASCADE;"
                           " ALTER TABLE jobs DROP CONSTRAINT jobs_pkey CASCADE")  # fmt: skip
    with closing(db.connect(variants.database.settings())) as conn:
        found = [fault.what for fault in faults(conn)]
    assert [text.split(" ")[0] for text in found] == ["jobs.job_id", "table"]


def test_name_in_capitals_is_no_obstacle(empty_database, use_pipeline, api):
    rows = Table("Job Parts", id="Part", parent=("jobs", "Job"))
    use_pipeline({("a", "done"): stage("one"), rows("b", "done"): stage("two"),
                  rows.every("c", "done"): stage("three")})  # fmt: skip
    empty_database.rows(JOBS)
    empty_database.rows('CREATE TABLE "Job Parts" ("Part" uuid, "Job" uuid,'
                        ' current_step text, status text)')  # fmt: skip
    settings = empty_database.settings(STAGE_API_URL=api.url)
    with closing(db.connect(settings)) as conn:
        for fault in list(faults(conn)):
            empty_database.rows(fault.mend.removesuffix(OTHER))
        apply(conn)
        assert [said for ok, said in run_checks(conn, settings) if not ok] == []


# The last one is written as what triggers.sql fills in.
NAMES = [("order", "user"), ("it's", 'the "id"'), ("{calls}", "{table}")]


@pytest.mark.parametrize(("name", "key"), NAMES, ids=[name for name, _ in NAMES])
def test_name_that_needs_quotes_is_no_obstacle(empty_database, use_pipeline, name, key):
    orders = Table(name, id=key, channel=name)
    use_pipeline({("a", "done"): stage("one"), orders("b", key): stage("two")})
    quoted = ['"{}"'.format(word.replace('"', '""')) for word in (name, key)]
    table = quoted[0]
    empty_database.rows(JOBS)
    empty_database.rows("CREATE TABLE {} ({} uuid PRIMARY KEY, current_step text,"
                        " status text)".format(*quoted))  # fmt: skip
    job = str(uuid.uuid4())
    with connected(empty_database) as conn:
        apply(conn)
        empty_database.rows(f"INSERT INTO {table} VALUES (%s, 'b', %s)", job, key)
        [row] = claim_many(conn, 1, stages=["two"]).claimed
        empty_database.rows(f"UPDATE {table} SET current_step = 'two', status = 'failed'")
        settle(conn, result(row, table_name=name))
        assert [row.job_id for row in troubles.newly_failed(conn)[0]] == [job]
        empty_database.rows("UPDATE stage_totals_mark SET counted_until = now()")
        done = history.prune(conn, 0)
        assert done.pruned == done.attempts > 0
    empty_database.rows(pipeline.sent_back(name, job, "two", ("two", "failed")))
    assert empty_database.value("SELECT stage FROM stage_calls") == "two"


def test_tenant_column_that_is_not_declared_is_no_change(empty_database, use_pipeline):
    parts = Table("parts", id="part")
    use_pipeline({("a", "done"): stage("one"), parts("b", "done"): stage("two")})
    empty_database.rows(JOBS)
    empty_database.rows("CREATE TABLE parts (part uuid PRIMARY KEY, tenant_id text,"
                        " current_step text, status text)")  # fmt: skip
    with connected(empty_database) as conn:
        apply(conn)
        assert list(changes(conn)) == []
        empty_database.rows("ALTER TABLE parts DROP tenant_id CASCADE")
        assert [said.split()[2] for said in changes(conn)] == ["parts"]
