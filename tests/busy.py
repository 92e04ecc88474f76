"""A database in which everything that can happen to a call has happened to one."""

import pytest
from claims import STAGES
from waiting import gate, wait_for_call

from demo.stage_server import Answer

BEFORE = dict(zip(STAGES, ["img_gen", *STAGES], strict=False))
# As the operator's commands print one.
TIME = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"


@pytest.fixture
def busy(database, api, listener):
    """One job in every situation, by stage: calling, retried, held, given up, due and not taken."""
    api.on("yolo_detect", lambda _: Answer(500, b"no memory"))
    api.on("planner", lambda _: Answer(503, headers={"Retry-After": "1800"}))
    api.on("overlay", lambda _: Answer(422, b"no text"))
    with gate(api):
        only = [f"--stage={stage}" for stage in STAGES[:-1]]
        process = listener(database, "run", "--workers=1", *only, api=api, RETRY_DELAY=3600)
        jobs = {stage: database.add_job(BEFORE[stage], "done") for stage in STAGES[1:]}
        process.wait_for_line("파이프라인 단계 실행 실패", count=3)
        jobs["vlm_analyze"] = database.add_job("img_gen", "done")
        wait_for_call(api, jobs["vlm_analyze"])
        # Only the stage is held by now, no longer this call of it.
        database.wait_for("SELECT due_at <= now() FROM stage_calls WHERE stage = 'planner'")
        yield jobs
