"""Families: jobs of a chaos run that have rows in a second table, the variants. A join calls for
the job once all of its variants are done.

They use states of their own beside the five stages. The job stays in QUEUED until the join's call.
"""

import uuid
from collections.abc import Callable
from dataclasses import replace

import receiver
from chaos.audit import EFFECT
from demo.stage_api import Stage
from pipeline import Call, State, Table
from stage_http import Answer

VARIANTS = Table("jobs_variants", id="job_variants_id", parent=("jobs", "job_id"))
TABLE = """
CREATE TABLE jobs_variants (
    job_variants_id uuid PRIMARY KEY,
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    current_step    text,
    status          text,
    priority        integer,
    run_after       timestamptz
);
CREATE INDEX ON jobs_variants (job_id);
"""
QUEUED, CUT, DETECTED = ("family", "queued"), ("cut", "done"), ("detect", "done")


def detect(call: Call) -> Answer:
    return call.post("/variants/detect")


def ad_copy(call: Call) -> Answer:
    return call.post("/ad_copy")


def pipeline(order: dict[str, str]) -> dict[State, Callable[[Call], Answer]]:
    """order: see program.py."""
    variants = replace(VARIANTS, **order)
    return {variants(*CUT): detect, variants.every(*DETECTED): ad_copy}


ROUTES = {"/".join(CUT): detect.__name__}
JOINS = {"/".join(DETECTED): ad_copy.__name__}

# The stages by path. A family's job is taken in any state: the call itself says that its variants
# are in place.
FAMILY = [QUEUED, *(("ad_copy", status) for status in ("running", "done", "failed"))]
STAGES = {
    "/variants/detect": Stage(
        receiver.Stage("detect", CUT, table=VARIANTS.name, id=VARIANTS.id, where="true"),
        makes=EFFECT,
    ),
    "/ad_copy": Stage(receiver.Stage("ad_copy", FAMILY), makes=EFFECT),
}

# Variants that owe nothing and on which no stage works, as in application.py.
LEFT_BEHIND = """
SELECT v.job_variants_id::text, v.current_step, v.status FROM jobs_variants AS v
WHERE (v.current_step, v.status) <> ('detect', 'done')
  AND NOT EXISTS (SELECT FROM stage_calls AS c WHERE c.job_id = v.job_variants_id)
  AND (SELECT max(chaos.seconds(a.at)) FROM chaos.audit AS a WHERE a.job = v.job_variants_id::text)
      < chaos.seconds(now()) - 8
LIMIT 20
"""
INSERT = """
INSERT INTO jobs_variants VALUES (%s, %s, %s, %s, %s, now() + make_interval(secs => %s))
"""
MOVE = "UPDATE jobs_variants SET current_step = %s, status = %s WHERE job_variants_id = %s"


def variant_id(job: str, number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{job}/{number}"))
