"""A pipeline for tests in which (stage, 'failed') leads to the stage again."""

from variants import PIPELINE as ONCE
from variants import VARIANTS, stage

PIPELINE = ONCE | {
    ("vlm_analyze", "failed"): stage("vlm_analyze"),
    VARIANTS("yolo_detect", "failed"): stage("yolo_detect"),
    ("ad_copy", "failed"): stage("ad_copy"),
}
