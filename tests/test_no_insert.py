"""`install --no-insert`: only an UPDATE makes a row owe a call, an INSERT does not."""

import pytest
from claims import connected
from subscription import Subscription
from variants import PIPELINE, TABLE, Variants

import joins
from ops.install import apply
from ops.routes import announced, is_updates_only

OBJECTS = "SELECT oid, tgname FROM pg_trigger WHERE tgname ^@ 'job_state_' ORDER BY tgname"
INSERT_TRIGGERS = "SELECT tgname FROM pg_trigger WHERE tgname ~ '^job_state_.*insert'"


@pytest.fixture
def run_command(run_here):
    return run_here


def test_only_an_update_owes_a_call(database, run_command):
    done = run_command(database, "install", "--no-insert")
    assert done.code == 0
    assert "  removed  trigger job_state_insert_trigger on jobs" in done.lines
    assert any("a row that is inserted owes no call" in line for line in done.lines)
    with Subscription(database) as subscription:
        born, moved = database.add_job("img_gen"), database.add_job("img_gen", "queued")
        assert subscription.messages() == []
        database.move(moved, "img_gen", "done")
        assert len(subscription.messages()) == 1
    assert database.owed(born) is None and database.owed(moved).stage == "vlm_analyze"


def test_installing_again_keeps_no_insert_until_told_otherwise(database, run_command):
    run_command(database, "install", "--no-insert")
    before = database.rows(OBJECTS)
    run_command(database, "install")
    assert database.rows(OBJECTS) == before
    run_command(database, "install", "--insert")
    assert database.owed(database.add_job("img_gen")).stage == "vlm_analyze"


@pytest.mark.parametrize("first", ["notify", "insert"])
def test_no_insert_and_no_notify_are_two_settings(database, first):
    second = {"notify": "insert", "insert": "notify"}[first]
    with connected(database) as conn:
        apply(conn, **{first: False})
        apply(conn, **{second: False})
        assert announced(conn) == "nothing" and is_updates_only(conn)
        with Subscription(database) as subscription:
            database.move(database.add_job("img_gen", "queued"), "img_gen", "done")
            assert subscription.messages() == []
        apply(conn, **{first: True})
        assert announced(conn) == {"notify": "all", "insert": "nothing"}[first]
        assert is_updates_only(conn) == (first == "notify")


def test_trigger_from_before_install_does_not_mean_no_insert(empty_database, run_command):
    """The guide's trigger was on UPDATE alone."""
    empty_database.rows("""
        CREATE TABLE jobs (job_id uuid PRIMARY KEY, tenant_id text, current_step text, status text);
        CREATE FUNCTION notify_job_state_change() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_notify(''job_state_changed'', ''{}''); RETURN NEW; END';
        CREATE TRIGGER job_state_change_trigger AFTER UPDATE ON jobs FOR EACH ROW
            EXECUTE FUNCTION notify_job_state_change()""")
    run_command(empty_database, "install")
    assert empty_database.owed(empty_database.add_job("img_gen")).stage == "vlm_analyze"


def test_listener_runs_verify_and_status_say_so(database, api, listener, run_command):
    run_command(database, "install", "--no-insert")
    done = run_command(database, "verify", api=api)
    said = "trigger job_state_change_trigger, enabled on jobs, not for rows that are inserted"
    assert done.code == 0 and f"ok       {said}" in done.lines
    lines = run_command(database, "status").lines
    assert "a row that is inserted owes no call (install --no-insert)" in lines
    assert 'trigger="job_state_insert_trigger"' not in run_command(database, "metrics").out
    job = database.add_job("overlay", "queued")
    database.move(job, "overlay", "done")
    assert listener(database, "run", "--once", api=api).wait() == 0
    assert database.state(job) == ("vlm_judge", "done")


def test_no_insert_is_for_every_table(database, use_pipeline):
    use_pipeline(PIPELINE)
    database.rows(TABLE)
    variants = Variants(database)
    with connected(database) as conn:
        apply(conn)
        assert len(database.rows(INSERT_TRIGGERS)) == 2
        apply(conn, insert=False)
        assert database.rows(INSERT_TRIGGERS) == []
        job = database.add_job("img_gen", "queued")
        [variant] = variants.add(job, "img_gen", "done")
        assert variants.owed() == []
        variants.move(variant, "yolo_detect", "done")
        assert variants.owed() == [("jobs_variants", variant, "iou_eval")]


def test_join_waits_for_a_row_that_is_updated(database, use_pipeline):
    use_pipeline(PIPELINE)
    database.rows(TABLE)
    variants = Variants(database)
    with connected(database) as conn:
        apply(conn, insert=False)
        job = database.add_job("img_gen", "queued")
        variants.add(job, "iou_eval", "done")
        assert not joins.look(conn) and variants.owed() == []
        [last] = variants.add(job)
        variants.move(last, "iou_eval", "done")
        joins.look(conn)
    assert variants.owed() == [("jobs", job, "ad_copy")]


def test_row_that_was_left_out_is_shown_and_can_be_called(database, run_command):
    run_command(database, "install", "--no-insert")
    job = database.add_job()
    database.rows("UPDATE jobs SET updated_at = now() - interval '1 hour'")
    assert "its call was never recorded" in run_command(database, "jobs", "--stalled").out
    run_command(database, "backfill", "--apply")
    assert database.owed(job).stage == "vlm_analyze"


def test_partitioned_table_is_warned_about(empty_database, run_command):
    empty_database.rows("""
        CREATE TABLE jobs (job_id uuid, tenant_id text, current_step text, status text)
            PARTITION BY HASH (job_id);
        CREATE UNIQUE INDEX ON jobs (job_id);
        CREATE TABLE jobs_0 PARTITION OF jobs FOR VALUES WITH (MODULUS 1, REMAINDER 0)""")
    done = run_command(empty_database, "install", "--no-insert")
    assert any("moves a row of jobs to another partition" in line for line in done.lines)
    assert "another partition" not in run_command(empty_database, "install", "--insert").out
