"""A pipeline with children and joins, for tests: jobs with rows in jobs_variants."""

import uuid
from collections.abc import Callable, Iterator

import pytest

import pipeline
import stages
from pipeline import Table

VARIANTS = Table(
    "jobs_variants",
    id="job_variants_id",
    parent=("jobs", "job_id"),
    channel="job_variant_state_changed",
)

TABLE = """
CREATE TABLE jobs_variants (
    job_variants_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    current_step    text,
    status          text
);
CREATE INDEX ON jobs_variants (job_id);
"""


def stage(name: str) -> Callable:
    """A stage function of this name, whose path is its name."""

    def function(call: pipeline.Call):
        return call.post(f"/{name}")

    function.__name__ = name
    return function


PIPELINE = {
    ("img_gen", "done"): stage("vlm_analyze"),
    VARIANTS("img_gen", "done"): stage("yolo_detect"),
    VARIANTS("yolo_detect", "done"): stage("iou_eval"),
    VARIANTS.every("iou_eval", "done"): stage("ad_copy"),
    ("ad_copy", "done"): stage("instagram"),
}


OWED = "SELECT table_name, job_id::text, stage FROM stage_calls ORDER BY 1, 2, 3"


class Variants:
    """Rows of jobs_variants in a test's database."""

    def __init__(self, database):
        self.database = database

    def add(self, job: str, step="img_gen", status="queued", count: int = 1) -> list[str]:
        """The ids of new rows of a job."""
        ids = [str(uuid.uuid4()) for _ in range(count)]
        for variant in ids:
            self.database.rows("INSERT INTO jobs_variants VALUES (%s, %s, %s, %s)", variant, job,
                               step, status)  # fmt: skip
        return ids

    def move(self, variant: str, step: str, status: str) -> None:
        self.database.rows("UPDATE jobs_variants SET current_step = %s, status = %s"
                           " WHERE job_variants_id = %s", step, status, variant)  # fmt: skip

    def owed(self) -> list[tuple]:
        """What is owed: (table, id, stage), the joins' too."""
        return [tuple(row) for row in self.database.rows(OWED)]


@pytest.fixture
def use_pipeline(monkeypatch) -> Iterator[Callable[[dict], None]]:
    """use_pipeline(dict): PIPELINE of this process is another."""
    yield lambda routes: monkeypatch.setattr(stages, "PIPELINE", routes)
