"""PIPELINE of a workload: eight stages for each row of jobs_variants, then two for the job, the
first of which is called by a join.
"""

from bench.pipeline import CHILD_STAGES, stage
from pipeline import Table

VARIANTS = Table("jobs_variants", id="job_variants_id", parent=("jobs", "job_id"),
                 channel="job_variant_state_changed")  # fmt: skip
STEPS = ["img_gen", *CHILD_STAGES]
PIPELINE = {
    **{
        VARIANTS(step, "done"): stage(name, f"/{name}")
        for step, name in zip(STEPS, CHILD_STAGES, strict=False)
    },
    VARIANTS.every(STEPS[-1], "done"): stage("join", "/join"),
    ("join", "done"): stage("finish", "/finish"),
}
