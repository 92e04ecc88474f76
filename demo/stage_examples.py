"""The stages of the stand-in stage API for the pipelines of examples/."""

from typing import Any

import receiver
from demo.stage_api import STAGES, Stage, of_jobs

OF_TENANT = """r.job_id = %(job_id)s AND EXISTS (
    SELECT FROM jobs AS j
    WHERE j.job_id = r.job_id AND j.tenant_id IS NOT DISTINCT FROM %(tenant_id)s)"""


def of_variants(name: str, before: str, **more: Any) -> Stage:
    """A stage that takes variants in (before, 'done'), and variants that it has set to failed."""
    after = [(before, "done"), (name, "failed")]
    takes = receiver.Stage(
        name, after, table="jobs_variants", id="job_variants_id", where=OF_TENANT
    )
    return Stage(takes, **more)


# Takes a job whose variants are all in place. The call is owed by the join, not by the job's state,
# so the job keeps its state until the work is done.
ALL_THERE = """r.tenant_id IS NOT DISTINCT FROM %(tenant_id)s AND NOT EXISTS (
    SELECT FROM jobs_variants AS v WHERE v.job_id = r.job_id
       AND (v.current_step, v.status) IS DISTINCT FROM ('iou_eval', 'done'))"""
# It may be owed again, by `again` or as a variant was redone: then the job is where this stage or a
# later one has left it.
JOINS_AFTER = [("img_gen", "done")] + [
    (step, status)
    for step in ("ad_copy_gen_kor", "instagram_feed_gen")
    for status in ("failed", "done")
]
JOINED = receiver.Stage("ad_copy_gen_kor", JOINS_AFTER, running=False, where=ALL_THERE)

MAKE_PROPOSAL = """
INSERT INTO planner_proposals (job_variants_id, layout) VALUES (%(row_id)s, '{"text": "top"}')"""

# Only some of the overlays get an id.
MAKE_OVERLAY = """
INSERT INTO overlays (job_variants_id, overlay_id)
VALUES (%(row_id)s, CASE WHEN random() < 0.5 THEN gen_random_uuid() END)"""

# --- the stages by their paths ---

OVERLAY = "/api/yh/overlay"

EXAMPLES: dict[str, dict[str, Stage]] = {
    "five_stages": {path: of_jobs(*names) for path, names in STAGES.items()}
    | {OVERLAY: of_jobs("overlay", "planner", needs=("text",))},
    "variants": {path: of_variants(*names) for path, names in STAGES.items()}
    | {
        "/api/yh/planner": of_variants("planner", "yolo_detect", makes=MAKE_PROPOSAL),
        OVERLAY: of_variants("overlay", "planner", needs=("text", "proposal_id"),
                             makes=MAKE_OVERLAY),
        "/api/yh/ocr/evaluate": of_variants("ocr_eval", "vlm_judge", fails=2),
        "/api/yh/readability/evaluate": of_variants("readability_eval", "ocr_eval"),
        "/api/yh/iou/evaluate": of_variants("iou_eval", "readability_eval"),
        "/api/yh/gpt/ad-copy-kor": Stage(JOINED),
        "/api/yh/instagram/feed": of_jobs("instagram_feed_gen", "ad_copy_gen_kor"),
    },
}  # fmt: skip

# Seconds of pretended work, in the examples: short, as there are many calls.
SECONDS = dict(vlm_analyze=0.8, yolo_detect=0.3, planner=0.5, overlay=0.3, vlm_judge=0.6,
               ocr_eval=0.3, readability_eval=0.3, iou_eval=0.2, ad_copy_gen_kor=0.7,
               instagram_feed_gen=0.5)  # fmt: skip
