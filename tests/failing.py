"""A pipeline for tests in which (stage, 'failed') leads to the stage again."""

from variants import PIPELINE as ONCE
from variants import VARIANTS

PIPELINE = ONCE | {
    ("vlm_analyze", "failed"): ONCE["img_gen", "done"],
    VARIANTS("yolo_detect", "failed"): ONCE[VARIANTS("img_gen", "done")],
    ("ad_copy", "failed"): ONCE[VARIANTS.every("iou_eval", "done")],
}
