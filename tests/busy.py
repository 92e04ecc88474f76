"""A database with a call in each situation that a call can be in."""

import pytest
from claims import STAGES
from waiting import LONGEST_WAITS, gate, wait_for_call

from demo.stage_server import Answer

BEFORE = dict(zip(STAGES, ["img_gen", *STAGES], strict=False))
RETRIED = "WHERE stage = 'yolo_detect'"
# A clock time as commands print it.
TIME = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"


@pytest.fixture
def busy(database, api, listener):
    """A job in each situation, by stage: calling, retried, held, given up, due but not claimed."""
    api.on("yolo_detect", lambda _: Answer(500, b"no memory"))
    api.on("planner", lambda _: Answer(503, headers={"Retry-After": "1800"}))
    api.on("overlay", lambda _: Answer(422, b"no text"))
    with gate(api):
        only = [f"--stage={stage}" for stage in STAGES[:-1]]
        process = listener(database, "run", "--workers=1", *only, api=api, RETRY_DELAY=3600,
                           program=LONGEST_WAITS)  # fmt: skip
        jobs = {stage: database.add_job(BEFORE[stage], "done") for stage in STAGES[1:]}
        process.wait_for_line("파이프라인 단계 실행 실패", count=3)
        database.wait_for(f"SELECT attempts = 1 AND worker IS NULL FROM stage_calls {RETRIED}")
        later = "due_at = now() + interval '4 min'"
        database.rows(f"UPDATE stage_calls SET {later} {RETRIED}")
        jobs["vlm_analyze"] = database.add_job("img_gen", "done")
        wait_for_call(api, jobs["vlm_analyze"])
        # The hold is now recorded for the stage, no longer for this call.
        database.wait_for("SELECT due_at <= now() FROM stage_calls WHERE stage = 'planner'")
        yield jobs
