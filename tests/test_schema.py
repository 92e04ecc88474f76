"""The database trigger: what a change of a job's state owes, and what is notified of it."""

import uuid

import pytest
from subscription import Subscription

CALLS = "SELECT job_id, current_step, status, stage, tenant_id, attempts, worker FROM stage_calls"


@pytest.fixture
def each_database(each_shared_database):
    return each_shared_database.emptied()


@pytest.fixture
def subscription(each_database):
    with Subscription(each_database) as subscription:
        yield subscription


def payload(job: str, step: str | None, status: str | None, tenant: str | None = "tenant"):
    return {"job_id": job, "current_step": step, "status": status, "tenant_id": tenant}


def test_finished_stage_owes_a_call_and_notifies_once(each_database, subscription):
    job = each_database.add_job("img_gen", "running")
    assert subscription.messages() == []
    each_database.move(job, "img_gen", "done")
    assert subscription.messages() == [payload(job, "img_gen", "done")]
    assert [tuple(row) for row in each_database.rows(CALLS)] == [
        (job, "img_gen", "done", "vlm_analyze", "tenant", 0, None)
    ]
    assert each_database.value("SELECT due_at <= now() FROM stage_calls")


def test_row_born_in_a_routed_state_owes_a_call_and_notifies(each_database, subscription):
    job = each_database.add_job("overlay", "done")
    assert subscription.messages() == [payload(job, "overlay", "done")]
    assert each_database.owed(job).stage == "vlm_judge"


def test_row_born_in_another_state_is_silent(each_database, subscription):
    for step, status in [("img_gen", "queued"), ("vlm_judge", "done"), ("done", "img_gen")]:
        each_database.add_job(step, status)
    assert subscription.messages() == []
    assert each_database.rows(CALLS) == []


def test_moving_on_removes_the_open_call_and_still_notifies(each_database, subscription):
    job = each_database.add_job("img_gen", "done")
    each_database.move(job, "vlm_analyze", "running")
    assert each_database.owed(job) is None
    assert subscription.messages() == [
        payload(job, "img_gen", "done"),
        payload(job, "vlm_analyze", "running"),
    ]


def test_next_routed_state_replaces_the_open_call(each_database, subscription):
    job = each_database.add_job("img_gen", "done")
    first = each_database.owed(job)
    each_database.rows("UPDATE stage_calls SET attempts = 5, due_at = 'infinity', last_error = 'x'")
    each_database.move(job, "vlm_analyze", "done")
    call = each_database.owed(job)
    assert (call.stage, call.attempts, call.last_error) == ("yolo_detect", 0, None)
    assert call.call_id != first.call_id
    assert not call.given_up


def test_there_and_back_in_one_transaction_is_a_new_arrival(each_database, subscription):
    job = each_database.add_job("img_gen", "done")
    first = each_database.owed(job)
    subscription.messages()
    each_database.rows(
        "BEGIN; UPDATE jobs SET status = 'running'; UPDATE jobs SET status = 'done'; COMMIT"
    )
    assert each_database.owed(job).call_id != first.call_id
    assert subscription.messages() == [
        payload(job, "img_gen", "running"),
        payload(job, "img_gen", "done"),
    ]


def test_rolled_back_change_leaves_nothing(each_database, subscription):
    kept = each_database.add_job("img_gen", "done")
    call = each_database.owed(kept)
    subscription.messages()
    each_database.rows("BEGIN; UPDATE jobs SET status = 'running'")
    each_database.add_job("planner", "done")
    each_database.rows("ROLLBACK")
    assert subscription.messages() == []
    assert each_database.owed(kept) == call
    assert len(each_database.rows(CALLS)) == 1


def test_rolled_back_savepoint_leaves_nothing(each_database, subscription):
    job = each_database.add_job("img_gen", "queued")
    each_database.rows("BEGIN; SAVEPOINT here; UPDATE jobs SET status = 'done'")
    each_database.rows("ROLLBACK TO here; UPDATE jobs SET status = 'running'; COMMIT")
    assert subscription.messages() == [payload(job, "img_gen", "running")]
    assert each_database.rows(CALLS) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jobs SET status = status, current_step = current_step",
        "UPDATE jobs SET status = 'done', current_step = 'img_gen'",
        "UPDATE jobs SET updated_at = now(), tenant_id = 'another'",
        "INSERT INTO jobs (job_id, current_step, status) SELECT job_id, 'img_gen', 'done' FROM jobs"
        " ON CONFLICT (job_id) DO UPDATE SET status = excluded.status, updated_at = now()",
        "INSERT INTO jobs (job_id, current_step, status) SELECT job_id, 'planner', 'done' FROM jobs"
        " ON CONFLICT (job_id) DO NOTHING",
    ],
)
def test_same_state_again_changes_nothing(each_database, subscription, change):
    job = each_database.add_job("img_gen", "done")
    call = each_database.owed(job)
    subscription.messages()
    each_database.rows(change)
    assert subscription.messages() == []
    assert each_database.owed(job) == call


def test_upsert_that_moves_a_job_owes_the_next_call(each_database, subscription):
    job = each_database.add_job("img_gen", "queued")
    each_database.rows(
        "INSERT INTO jobs (job_id, current_step, status) VALUES (%s, 'img_gen', 'done')"
        " ON CONFLICT (job_id) DO UPDATE SET status = excluded.status",
        job,
    )
    assert each_database.owed(job).stage == "vlm_analyze"
    assert subscription.messages() == [payload(job, "img_gen", "done")]


def test_null_is_a_state_like_any_other(each_database, subscription):
    job = each_database.add_job(None, None, None)
    each_database.move(job, "img_gen", None)
    each_database.move(job, "img_gen", "done")
    assert each_database.owed(job).tenant_id is None
    each_database.move(job, None, "done")
    assert each_database.owed(job) is None
    each_database.move(job, None, None)
    states = [("img_gen", None), ("img_gen", "done"), (None, "done"), (None, None)]
    assert subscription.messages() == [payload(job, *state, None) for state in states]


def test_change_made_by_a_before_trigger_counts(database):
    database.rows("""
        CREATE FUNCTION finish() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.status := 'done'; RETURN NEW; END $$;
        CREATE TRIGGER finish BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION finish()""")
    job = database.add_job("img_gen", "queued")
    with Subscription(database) as subscription:
        database.rows("UPDATE jobs SET updated_at = now()")
        assert subscription.messages() == [payload(job, "img_gen", "done")]
    assert database.owed(job).stage == "vlm_analyze"


def test_every_job_of_one_statement_owes_its_call(each_database, subscription):
    each_database.rows(
        "INSERT INTO jobs (current_step, status) SELECT 'planner', 'queued'"
        " FROM generate_series(1, 500)"
    )
    each_database.rows("UPDATE jobs SET status = 'done'")
    assert each_database.value("SELECT count(*) FROM stage_calls JOIN jobs USING (job_id)") == 500
    assert len({said["job_id"] for said in subscription.messages()}) == 500
    each_database.rows("UPDATE jobs SET status = 'running'")
    assert each_database.value("SELECT count(*) FROM stage_calls") == 0


def test_deleted_job_leaves_its_call_to_the_claim(each_database, subscription):
    job = each_database.add_job("img_gen", "done")
    subscription.messages()
    each_database.rows("DELETE FROM jobs")
    assert subscription.messages() == []
    assert each_database.owed(job).stage == "vlm_analyze"


@pytest.mark.parametrize("step", ["planner", "img_gen"])
def test_job_made_anew_under_its_old_id_owes_a_new_call(each_database, step):
    database = each_database
    job = database.add_job("img_gen", "done")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', attempts = 5")
    first = database.owed(job)
    database.rows("DELETE FROM jobs")
    database.rows(
        "INSERT INTO jobs (job_id, current_step, status) VALUES (%s, %s, 'done')", job, step
    )
    call = database.owed(job)
    assert (call.current_step, call.attempts, call.given_up) == (step, 0, False)
    assert call.call_id != first.call_id


def test_session_with_an_empty_search_path_is_served(each_database, subscription):
    job = str(uuid.uuid4())
    each_database.rows("SET search_path = ''")
    each_database.rows(
        "INSERT INTO public.jobs (job_id, current_step, status) VALUES (%s, 'img_gen', 'done')", job
    )
    each_database.rows("UPDATE public.jobs SET current_step = 'planner'")
    each_database.rows("RESET search_path")
    assert each_database.owed(job).stage == "overlay"
    assert [said["current_step"] for said in subscription.messages()] == ["img_gen", "planner"]
