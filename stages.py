"""The pipeline: which stage a state leads to, and how that stage's API is called.

To add a stage, write a function of one argument (a `Call`) that returns `call.post(...)`, give
its state a line in PIPELINE, and run `make trigger`. Its limits stand above it:

    @limits(max_running=1, timeout=120, max_attempts=3)
    def vlm_analyze(call): ...

`examples/` has a larger pipeline: more tables, joins, and values from the database.
"""

from collections.abc import Callable

from pipeline import Answer, Call, Limits, MissingValue, Table, limits, quoted

__all__ = ["PIPELINE", "Answer", "Call", "Limits", "MissingValue", "Table", "limits", "quoted"]


def vlm_analyze(call: Call) -> Answer:
    """LLaVA Stage 1."""
    return call.post("/api/yh/llava/stage1/validate")


def yolo_detect(call: Call) -> Answer:
    return call.post("/api/yh/yolo/detect")


def planner(call: Call) -> Answer:
    return call.post("/api/yh/planner")


def overlay(call: Call) -> Answer:
    return call.post("/api/yh/overlay")


def vlm_judge(call: Call) -> Answer:
    """LLaVA Stage 2."""
    return call.post("/api/yh/llava/stage2/judge")


PIPELINE: dict[tuple[str, str], Callable[[Call], Answer]] = {
    ("img_gen", "done"): vlm_analyze,
    ("vlm_analyze", "done"): yolo_detect,
    ("yolo_detect", "done"): planner,
    ("planner", "done"): overlay,
    ("overlay", "done"): vlm_judge,
}
