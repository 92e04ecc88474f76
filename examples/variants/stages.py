"""Ten stages: eight for each variant of a job, then two for the job as a whole."""

from pipeline import Table, limits

VARIANTS = Table("jobs_variants", id="job_variants_id", parent=("jobs", "job_id"),
                 channel="job_variant_state_changed")  # fmt: skip

# --- for each variant: the body has job_variants_id, job_id, tenant_id and the fields given ---


# fmt: off
def vlm_analyze(call): return call.post("/api/yh/llava/stage1/validate")
def yolo_detect(call): return call.post("/api/yh/yolo/detect")
def planner(call): return call.post("/api/yh/planner")
def readability_eval(call): return call.post("/api/yh/readability/evaluate")
def iou_eval(call): return call.post("/api/yh/iou/evaluate")
# fmt: on


def overlay(call):
    row = call.fetch_one("""
        SELECT text, (SELECT proposal_id FROM planner_proposals
                      WHERE job_variants_id = %(job_variants_id)s
                      ORDER BY created_at DESC LIMIT 1) AS proposal_id
        FROM job_inputs WHERE job_id = %(job_id)s""")
    return call.post("/api/yh/overlay", text=row.text, proposal_id=row.proposal_id)


def vlm_judge(call):
    # None where overlay has made no row, or its id is NULL: this stage does not need it.
    found = call.fetch_value(
        "SELECT overlay_id FROM overlays WHERE job_variants_id = %(job_variants_id)s"
    )
    return call.post("/api/yh/llava/stage2/judge", overlay_id=found)


@limits(max_running=2, max_attempts=4)
def ocr_eval(call):
    return call.post("/api/yh/ocr/evaluate")


# --- for the job ---


def ad_copy_gen_kor(call):
    return call.post("/api/yh/gpt/ad-copy-kor")


def instagram_feed_gen(call):
    return call.post("/api/yh/instagram/feed")


PIPELINE = {
    VARIANTS("img_gen", "done"): vlm_analyze,
    VARIANTS("vlm_analyze", "done"): yolo_detect,
    VARIANTS("yolo_detect", "done"): planner,
    VARIANTS("planner", "done"): overlay,
    VARIANTS("overlay", "done"): vlm_judge,
    VARIANTS("vlm_judge", "done"): ocr_eval,
    VARIANTS("ocr_eval", "failed"): ocr_eval,  # again, at most max_attempts times
    VARIANTS("ocr_eval", "done"): readability_eval,
    VARIANTS("readability_eval", "done"): iou_eval,
    VARIANTS.every("iou_eval", "done"): ad_copy_gen_kor,  # once a job, when all have arrived
    ("ad_copy_gen_kor", "done"): instagram_feed_gen,
}


def example_job(conn):
    """A job as the application makes it, in the state that PIPELINE begins with; its id."""
    with conn.cursor() as cursor:
        cursor.execute("INSERT INTO tenants VALUES ('example', 'Example') ON CONFLICT DO NOTHING")
        cursor.execute("INSERT INTO jobs (tenant_id, current_step, status)"
                       " VALUES ('example', 'img_gen', 'done') RETURNING job_id")  # fmt: skip
        [job_id] = cursor.fetchone()
        cursor.execute("INSERT INTO job_inputs VALUES (%s, '오늘의 커피')", [job_id])
        cursor.execute("INSERT INTO jobs_variants (job_id, image_url, current_step, status)"
                       " SELECT %s, '/images/' || n || '.png', 'img_gen', 'done'"
                       " FROM generate_series(1, 3) AS n", [job_id])  # fmt: skip
        return job_id
