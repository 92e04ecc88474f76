"""A stage works in a transaction of its own, which may outlast its lease or its answer."""

import threading
from contextlib import closing

import pytest
from waiting import PATIENCE, wait_for_call, wait_for_sweeps, wait_until_idle

from demo.stage_server import Answer

SETTLED = "SELECT count(*) = 1 FROM stage_attempts WHERE job_id = %s AND stage = 'vlm_analyze'"
MOVE = "UPDATE jobs SET current_step = 'vlm_analyze', status = %s WHERE job_id = %s"


class OpenTransaction:
    """Behaviour of a stage: sets its states in a transaction that stays open until end()."""

    def __init__(self, api, *states: str, answer: Answer | None = None):
        self.api, self.states, self.answer = api, states, answer
        self.flushed, self.ended = threading.Event(), threading.Event()
        self.conn = api.connect()

    def __call__(self, request) -> Answer:
        if self.flushed.is_set():  # the call after a rollback
            return self.api.work(request)
        with self.conn.cursor() as cursor:
            for status in self.states:
                cursor.execute(MOVE, (status, request.job_id))
        self.flushed.set()
        if self.answer is None:
            self.ended.wait(PATIENCE)
        return self.answer or Answer(200)

    def end(self, how: str) -> None:
        getattr(self.conn, how)()
        self.ended.set()

    def close(self) -> None:
        self.conn.close()
        self.ended.set()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_open_transaction_keeps_other_listeners_away_after_the_lease(
    how, database, api, listener, tmp_path
):
    lease = {"STAGE_TIMEOUT": 1, "LEASE_MARGIN": 2, "SWEEP_INTERVAL": 0.1}
    for _ in range(2):
        listener(database, api=api, **lease)
    wait_until_idle(tmp_path, listeners=2)
    with closing(OpenTransaction(api, "running")) as stage:
        api.on("vlm_analyze", stage)
        job = database.add_job()
        wait_for_call(api, job)
        database.wait_for("SELECT due_at <= now() FROM stage_calls WHERE job_id = %s", job)
        wait_for_sweeps(database, listeners=2)
        assert len(api.calls(job)) == 1
        stage.end(how)
        if how == "commit":
            database.move(job, "vlm_analyze", "done")
        database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    is_repeated = len(api.calls(job, "vlm_analyze")) > 1
    assert is_repeated == (how == "rollback")


def test_accepted_call_is_not_repeated_when_the_stage_rolls_back(database, api, listener, tmp_path):
    lease = {"STAGE_TIMEOUT": 2, "LEASE_MARGIN": 2, "SWEEP_INTERVAL": 0.1}
    listener(database, api=api, **lease)
    wait_until_idle(tmp_path)
    with closing(OpenTransaction(api, "running", answer=Answer(200))) as stage:
        api.on("vlm_analyze", stage)
        job = database.add_job()
        database.wait_for(SETTLED, job)
        database.wait_for("SELECT due_at <= now() FROM stage_calls WHERE job_id = %s", job)
        stage.end("rollback")
        database.wait_for("SELECT count(*) = 0 FROM stage_calls")
        wait_for_sweeps(database)
    assert database.state(job) == ("img_gen", "done")
    assert len(api.calls(job)) == 1


def test_waiting_for_a_stage_to_commit_does_not_stop_other_calls(database, api, listener):
    listener(database, api=api, SWEEP_INTERVAL=3600)
    with closing(OpenTransaction(api, "running", "done", answer=Answer(200))) as stage:
        api.on("vlm_analyze", stage)
        job = database.add_job()
        database.wait_for(SETTLED, job)
        other = database.add_job("overlay", "done")
        database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
        assert [call.stage for call in api.calls(other)] == ["vlm_judge"]
        stage.end("commit")
        wait_for_call(api, job, count=2)
    assert api.calls(job)[1].stage == "yolo_detect"


def test_answer_is_settled_once_the_stage_lets_go_and_not_at_the_lease(database, api, listener):
    listener(database, api=api, SWEEP_INTERVAL=3600)
    with closing(OpenTransaction(api, "running", answer=Answer(200))) as stage:
        api.on("vlm_analyze", stage)
        job = database.add_job()
        database.wait_for(SETTLED, job)
        assert database.owed(job)
        stage.end("rollback")
        database.wait_for("SELECT count(*) = 0 FROM stage_calls")
    assert [row.outcome for row in database.attempts(job)] == ["succeeded"]
    assert len(api.calls(job)) == 1


def test_stop_while_a_stage_has_answered_and_not_committed(database, api, listener):
    lease = {"STAGE_TIMEOUT": 2, "LEASE_MARGIN": 2, "SWEEP_INTERVAL": 0.1}
    process = listener(database, api=api, **lease)
    with closing(OpenTransaction(api, "running", answer=Answer(200))) as stage:
        api.on("vlm_analyze", stage)
        job = database.add_job()
        database.wait_for(SETTLED, job)
        assert process.stop() == 0
        stage.end("rollback")
    listener(database, api=api, **lease)
    database.wait_for("SELECT count(*) = 0 FROM stage_calls")
    assert len(api.calls(job)) == 1
    assert [row.outcome for row in database.attempts(job)] == ["succeeded", "skipped"]
