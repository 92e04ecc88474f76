"""What the stand-in stage API does in the pipelines of examples/."""

from demo.stage_api import FIND_JOB, FINISH_JOB, STAGES, Rows, Stage

# --- of a variant ---

# Also one that this stage has set to failed.
TAKE_VARIANT = """
UPDATE jobs_variants AS v SET current_step = %(stage)s, status = 'running'
  FROM jobs AS j
 WHERE v.job_variants_id = %(row_id)s AND j.job_id = v.job_id AND v.job_id = %(job_id)s
   AND j.tenant_id IS NOT DISTINCT FROM %(tenant_id)s
   AND (v.current_step, v.status) IN ((%(before)s, 'done'), (%(stage)s, 'failed'))
RETURNING v.job_variants_id"""

FINISH_VARIANT = """
UPDATE jobs_variants SET status = %(result)s
 WHERE job_variants_id = %(row_id)s AND current_step = %(stage)s AND status = 'running'
RETURNING job_variants_id"""

FIND_VARIANT = """
SELECT current_step, status FROM jobs_variants WHERE job_variants_id = %(row_id)s"""

VARIANTS = Rows("job_variants_id", TAKE_VARIANT, FINISH_VARIANT, FIND_VARIANT)

# --- of a job whose variants are all there ---

TAKE_JOINED = """
UPDATE jobs SET current_step = %(stage)s, status = 'running'
 WHERE job_id = %(job_id)s AND tenant_id IS NOT DISTINCT FROM %(tenant_id)s
   AND current_step = 'img_gen' AND status = 'done'
   AND NOT EXISTS (SELECT FROM jobs_variants AS v
                    WHERE v.job_id = %(job_id)s
                      AND (v.current_step, v.status) IS DISTINCT FROM (%(before)s, 'done'))
RETURNING job_id"""

JOINED = Rows("job_id", TAKE_JOINED, FINISH_JOB, FIND_JOB)

MAKE_PROPOSAL = """
INSERT INTO planner_proposals (job_variants_id, layout) VALUES (%(row_id)s, '{"text": "top"}')"""

# Some overlays have an id, some have none.
MAKE_OVERLAY = """
INSERT INTO overlays (job_variants_id, overlay_id)
VALUES (%(row_id)s, CASE WHEN random() < 0.5 THEN gen_random_uuid() END)"""

# --- the stages by their paths ---

OVERLAY = "/api/yh/overlay"

EXAMPLES: dict[str, dict[str, Stage]] = {
    "five_stages": {path: Stage(*names) for path, names in STAGES.items()}
    | {OVERLAY: Stage("overlay", "planner", needs=("text",))},
    "variants": {path: Stage(*names, VARIANTS) for path, names in STAGES.items()}
    | {
        "/api/yh/planner": Stage("planner", "yolo_detect", VARIANTS, makes=MAKE_PROPOSAL),
        OVERLAY: Stage("overlay", "planner", VARIANTS, ("text", "proposal_id"),
                       makes=MAKE_OVERLAY),
        "/api/yh/ocr/evaluate": Stage("ocr_eval", "vlm_judge", VARIANTS, fails=2),
        "/api/yh/readability/evaluate": Stage("readability_eval", "ocr_eval", VARIANTS),
        "/api/yh/iou/evaluate": Stage("iou_eval", "readability_eval", VARIANTS),
        "/api/yh/gpt/ad-copy-kor": Stage("ad_copy_gen_kor", "iou_eval", JOINED),
        "/api/yh/instagram/feed": Stage("instagram_feed_gen", "ad_copy_gen_kor"),
    },
}  # fmt: skip

# Seconds of pretended work, in the examples: short, as there are many calls.
SECONDS = dict(vlm_analyze=0.8, yolo_detect=0.3, planner=0.5, overlay=0.3, vlm_judge=0.6,
               ocr_eval=0.3, readability_eval=0.3, iou_eval=0.2, ad_copy_gen_kor=0.7,
               instagram_feed_gen=0.5)  # fmt: skip
