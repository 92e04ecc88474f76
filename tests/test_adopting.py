"""docs/ADOPTING.md: its SQL and commands move a database of the guide's users to this listener."""

import psycopg2
import pytest
from claims import connected
from guide import DATABASE, JOBS_TRIGGER
from subscription import Subscription
from test_readme import Readme

import pipeline
from demo import five_stages
from ops.install import apply

PAGES = ["docs/ADOPTING.md", "docs/ADOPTING.ko.md"]


@pytest.fixture(scope="module")
def page() -> Readme:
    return Readme(PAGES[0])


@pytest.fixture
def guide(empty_database):
    """A database of the guide's users, with a tenant."""
    empty_database.rows(DATABASE)
    empty_database.rows("INSERT INTO tenants VALUES ('tenant', 'A tenant')")
    return empty_database


@pytest.fixture
def with_variants(page, monkeypatch):
    """PIPELINE as the page writes it."""
    written = vars(five_stages) | {"Table": pipeline.Table}
    exec(page.block("python", "VARIANTS = "), written)
    monkeypatch.setattr(five_stages, "PIPELINE", written["PIPELINE"])


# --- the steps -----------------------------------------------------------------------------


def test_old_listener_hears_what_it_always_heard(guide, run_command):
    moved = guide.add_job(status="queued")
    with Subscription(guide) as subscription:
        guide.move(moved, "img_gen", "done")
        before = subscription.messages()
    done = run_command(guide, "install")
    assert done.code == 0 and "  renewed  function notify_job_state_change()" in done.lines
    guide.move(moved, "img_gen", "queued")
    with Subscription(guide) as subscription:
        guide.move(moved, "img_gen", "done")
        assert subscription.messages() == before != []


def test_jobs_that_finish_between_install_and_start_are_called(
    guide, page, run_command, listener, served
):
    lost = guide.add_job()  # a job that the old listener has lost
    run_command(guide, "install")
    moved = guide.add_job(status="queued")
    guide.move(moved, "img_gen", "done")
    assert guide.rows(page.block("sql", "SELECT current_step")) == []
    assert run_command(guide, "verify", api=served).code == 0
    assert listener(guide, "run", "--once", api=served).wait() == 0
    assert (guide.state(moved), guide.state(lost)) == (("vlm_judge", "done"), ("img_gen", "done"))
    assert run_command(guide, "backfill", "--since", "2h", "--apply").code == 0
    assert listener(guide, "run", "--once", api=served).wait() == 0
    assert guide.state(lost) == ("vlm_judge", "done")


@pytest.fixture
def served(guide):
    from demo.stage_api import StageApi

    with StageApi(guide.dsn) as api:
        yield api


def test_shared_env_file_that_stops_the_old_one_leaves_ours_running(
    guide, page, run_command, listener, served, tmp_path
):
    run_command(guide, "install")
    written = page.block("", "ENABLE_JOB_STATE_LISTENER").splitlines()
    ours = [line for line in written if line.startswith(("ENABLE", "LISTENER"))]
    stopped = "\n".join(ours).replace("ENABLE_JOB_STATE_LISTENER=true",
                                      "ENABLE_JOB_STATE_LISTENER=false")  # fmt: skip
    process = listener(guide, api=served)
    process.stop()
    (tmp_path / ".env").write_text(stopped)
    assert "the listener is enabled" in run_command(guide, "verify", api=served).out
    (tmp_path / ".env").write_text(stopped.replace("LISTENER_ENABLED=true", ""))
    said = run_command(guide, "verify", api=served).out
    assert "the listener is off: ENABLE_JOB_STATE_LISTENER=false in " in said


def test_trigger_on_variants_may_stay_or_go(guide, page, with_variants):
    with connected(guide) as conn:
        apply(conn)
    job = guide.add_job(status="queued")
    add = "INSERT INTO jobs_variants (job_id, creation_order) VALUES (%s, 1)"
    move = "UPDATE jobs_variants SET status = %s"
    guide.rows(add, job)
    with Subscription(guide, "job_variant_state_changed") as subscription:
        guide.rows(move, "done")
        assert len(subscription.messages()) == 2
        guide.rows(page.block("sql", "DROP TRIGGER"))
        guide.rows(move, "running")
        assert len(subscription.messages()) == 1
    guide.rows(move, "done")
    assert [row.stage for row in guide.rows("SELECT stage FROM stage_calls")] == ["vlm_analyze"]


def test_way_back_is_uninstall_and_the_guides_sql(guide, run_command):
    run_command(guide, "install")
    run_command(guide, "uninstall", "--yes")
    guide.rows(JOBS_TRIGGER)
    done = run_command(guide, "uninstall", "--yes")  # typed once more, it removes nothing
    note = "note: function notify_job_state_change() is not ours and stays"
    assert (done.code, done.lines) == (0, [note, "nothing to remove"])
    job = guide.add_job(status="queued")
    with Subscription(guide) as subscription:
        guide.move(job, "img_gen", "done")
        assert len(subscription.messages()) == 1


# --- inserts, foreign keys, the guide's SQL ------------------------------------------------


def test_insert_is_called_unless_install_was_told_otherwise(guide, run_command):
    run_command(guide, "install")
    assert guide.owed(guide.add_job()) is not None
    run_command(guide, "install", "--no-insert")
    assert guide.owed(guide.add_job()) is None


def test_job_deleted_by_a_cascade_takes_its_call_along(guide, run_command, listener, served):
    guide.rows("ALTER TABLE jobs DROP CONSTRAINT jobs_tenant_id_fkey,"
               " ADD FOREIGN KEY (tenant_id) REFERENCES tenants ON DELETE CASCADE")  # fmt: skip
    run_command(guide, "install")
    job = guide.add_job()
    guide.rows("DELETE FROM tenants")
    assert listener(guide, "run", "--once", api=served).wait() == 0
    assert [attempt.outcome for attempt in guide.attempts(job)] == ["skipped"]


def test_job_of_a_tenant_who_is_there_goes_through(guide, run_command, listener, served):
    run_command(guide, "install")
    listener(guide, api=served).wait_for_line("LISTEN 'job_state_changed' 시작")
    assert "foreign key" in run_command(guide, "test-job").refused(1)
    assert run_command(guide, "test-job", "--tenant", "tenant", "--clean").code == 0
    assert guide.rows("SELECT FROM jobs") == []


def test_guides_update_with_limit_is_refused_and_the_pages_works(guide, page, run_command):
    run_command(guide, "install")
    guide.rows("INSERT INTO tenants VALUES ('test_tenant', 'Test')")
    jobs = [guide.add_job(status="queued", tenant="test_tenant") for _ in "12"]
    with pytest.raises(psycopg2.errors.SyntaxError, match="LIMIT"):
        guide.rows("UPDATE jobs SET status = 'done' WHERE tenant_id = 'test_tenant' LIMIT 1")
    guide.rows(page.block("sql", "UPDATE jobs"))
    assert sorted(guide.owed(job) is None for job in jobs) == [False, True]
