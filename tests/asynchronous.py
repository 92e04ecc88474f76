"""A pipeline for tests whose stages are asynchronous: they answer 202 and then work."""

from variants import VARIANTS, stage

from pipeline import limits


def asynchronous(name: str, **given):
    return limits(asynchronous=True, **given)(stage(name))


analyze = asynchronous("vlm_analyze", max_running=2)

PIPELINE = {
    ("img_gen", "done"): analyze,
    ("vlm_analyze", "failed"): analyze,
    ("vlm_analyze", "done"): asynchronous("planner"),
    VARIANTS("img_gen", "done"): asynchronous("yolo_detect"),
    VARIANTS.every("yolo_detect", "done"): asynchronous("ad_copy"),
}
