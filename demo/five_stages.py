"""The guide's five stages, which the stand-in stage API runs. Demo, tests, chaos and benchmark use
this pipeline, as stages.py may be changed.
"""

from collections.abc import Callable

from pipeline import Call
from stage_http import Answer


def vlm_analyze(call: Call) -> Answer:
    return call.post("/api/yh/llava/stage1/validate")


def yolo_detect(call: Call) -> Answer:
    return call.post("/api/yh/yolo/detect")


def planner(call: Call) -> Answer:
    return call.post("/api/yh/planner")


def overlay(call: Call) -> Answer:
    return call.post("/api/yh/overlay")


def vlm_judge(call: Call) -> Answer:
    return call.post("/api/yh/llava/stage2/judge")


PIPELINE: dict[tuple[str, str], Callable[[Call], Answer]] = {
    ("img_gen", "done"): vlm_analyze,
    ("vlm_analyze", "done"): yolo_detect,
    ("yolo_detect", "done"): planner,
    ("planner", "done"): overlay,
    ("overlay", "done"): vlm_judge,
}
