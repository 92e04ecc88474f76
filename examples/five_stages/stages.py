"""The guide's five stages. `overlay` needs a text, which is in the table job_inputs."""

from pipeline import Call
from stage_http import Answer


def vlm_analyze(call: Call) -> Answer:
    """LLaVA Stage 1."""
    return call.post("/api/yh/llava/stage1/validate")


def yolo_detect(call: Call) -> Answer:
    return call.post("/api/yh/yolo/detect")


def planner(call: Call) -> Answer:
    return call.post("/api/yh/planner")


def overlay(call: Call) -> Answer:
    row = call.fetch_one("SELECT text FROM job_inputs WHERE job_id = %(job_id)s")
    return call.post("/api/yh/overlay", text=row.text)


def vlm_judge(call: Call) -> Answer:
    """LLaVA Stage 2."""
    return call.post("/api/yh/llava/stage2/judge")


PIPELINE = {
    ("img_gen", "done"): vlm_analyze,
    ("vlm_analyze", "done"): yolo_detect,
    ("yolo_detect", "done"): planner,
    ("planner", "done"): overlay,
    ("overlay", "done"): vlm_judge,
}

EXAMPLE_JOB = """
WITH job AS (
    INSERT INTO jobs (tenant_id, current_step, status) VALUES ('example', 'img_gen', 'done')
    RETURNING job_id
), input AS (
    INSERT INTO job_inputs (job_id, text) SELECT job_id, '오늘의 커피' FROM job
)
SELECT job_id FROM job
"""


def example_job(conn):
    """A job as the application makes it, in the state that PIPELINE begins with; its id."""
    with conn.cursor() as cursor:
        cursor.execute(EXAMPLE_JOB)
        return cursor.fetchone()[0]
