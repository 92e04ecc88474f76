"""PIPELINE of the same ten stages for jobs alone: what bench/children.py is compared with."""

from bench.pipeline import CHILD_STAGES, JOB_STAGES, stage

STAGES = [*CHILD_STAGES, *JOB_STAGES]
PIPELINE = {
    (step, "done"): stage(name, f"/{name}")
    for step, name in zip(["img_gen", *STAGES], STAGES, strict=False)
}
