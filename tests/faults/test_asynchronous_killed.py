"""Asynchronous stages while listeners are killed: every call is made once, and ends."""

import random
import threading
from collections import Counter
from contextlib import closing

import pytest
from asynchronous import PIPELINE
from conftest import ROOT
from variants import TABLE, install

from demo.stage_server import Answer

pytestmark = pytest.mark.slow
JOBS = 60
SET = "UPDATE jobs SET current_step = 'planner', status = %s WHERE job_id = %s"


def test_d1_asynchronous_calls_are_made_once_while_listeners_are_killed(
    database, use_pipeline, api, listener
):
    use_pipeline(PIPELINE)
    install(database, TABLE)
    dice = random.Random(7)

    def work(job: str, seconds: float) -> None:
        with closing(database.connect()) as conn:
            cursor = conn.cursor()
            if dice.random() < 0.7:
                cursor.execute(SET, ["running", job])
            api.closing.wait(seconds)
            cursor.execute(SET, ["done", job])

    def behave(request):
        if dice.random() < 0.2:  # done before it answers
            work(request.job_id, 0)
        else:
            threading.Thread(target=work, args=(request.job_id, dice.uniform(0, 0.5))).start()
        return Answer(202)

    api.on("/planner", behave)
    given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "asynchronous",
             "SWEEP_INTERVAL": 1, "LISTENER_WORKERS": 2,
             # One that is killed before it has handed on its claim leaves that to its lease.
             "STAGE_TIMEOUT": 15, "LEASE_MARGIN": 2}  # fmt: skip
    running = [listener(database, api=api, **given) for _ in range(2)]
    for number in range(JOBS):
        database.add_job("vlm_analyze", "done")
        if number % 10 == 9:
            running.pop(0).kill_alone()  # its workers write what they have
            running.append(listener(database, api=api, **given))
            database.wait_for("SELECT count(*) > %s FROM stage_attempts", number - 9)
    database.wait_for("SELECT count(*) = %s FROM stage_attempts WHERE outcome = 'succeeded'", JOBS)
    database.wait_for("SELECT count(*) = 0 FROM stage_leases")
    assert set(Counter(request.job_id for request in api.calls()).values()) == {1}
    assert database.value("SELECT count(*) FROM stage_moves") == 0
