"""PIPELINE of a workload: eight stages for each row of jobs_variants, then two for the job, the
first of which is called by a join.
"""

from bench.pipeline import CHILD_STAGES, JOB_STAGES
from pipeline import Call, Table

VARIANTS = Table("jobs_variants", id="job_variants_id", parent=("jobs", "job_id"),
                 channel="job_variant_state_changed")  # fmt: skip


def stage(name: str):
    def function(call: Call):
        return call.post(f"/{name}")

    function.__name__ = name
    return function


STEPS = ["img_gen", *CHILD_STAGES]
PIPELINE = {
    **{
        VARIANTS(step, "done"): stage(name) for step, name in zip(STEPS, CHILD_STAGES, strict=False)
    },
    VARIANTS.every(STEPS[-1], "done"): stage(JOB_STAGES[0]),
    (JOB_STAGES[0], "done"): stage(JOB_STAGES[1]),
}
