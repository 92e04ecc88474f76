"""A pipeline with children and joins, for tests: jobs with rows in jobs_variants."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

import db
import pipeline
from demo import five_stages
from ops.install import apply
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


MOVE = "UPDATE jobs_variants SET current_step = %s, status = %s WHERE job_variants_id = %s"
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
        self.database.rows(MOVE, step, status, variant)

    def finish(self, *variants: str) -> None:
        """Bring rows to where their join waits for them."""
        for variant in variants:
            self.move(variant, "iou_eval", "done")

    def delete(self, variant: str) -> None:
        self.database.rows("DELETE FROM jobs_variants WHERE job_variants_id = %s", variant)

    def give(self, variant: str, job: str) -> None:
        """Let a row belong to another job."""
        given = "UPDATE jobs_variants SET job_id = %s WHERE job_variants_id = %s"
        self.database.rows(given, job, variant)

    def owed(self) -> list[tuple]:
        """All calls that are owed, as (table, id, stage); also those of joins."""
        return [tuple(row) for row in self.database.rows(OWED)]


@pytest.fixture
def use_pipeline(monkeypatch) -> Iterator[Callable[[dict], None]]:
    """use_pipeline(dict): replace PIPELINE in this process."""
    yield lambda routes: monkeypatch.setattr(five_stages, "PIPELINE", routes)


def install(database, *tables: str) -> Variants:
    """Make the application's `tables` and install the PIPELINE in use, in a new database."""

    def prepare(made) -> None:
        made.rows("SELECT 1;" + "".join(tables))
        with closing(db.connect(made.settings())) as conn:
            apply(conn)

    routes = [(route, f.__name__, pipeline.limits_of(f)) for route, f in pipeline.routes().items()]
    key = f"{tables} {[vars(table) for table in pipeline.tables().values()]} {routes}"
    database.become(database.server.template(key, prepare, database.server.installed()))
    return Variants(database)


@pytest.fixture
def variants(database, use_pipeline) -> Variants:
    use_pipeline(PIPELINE)
    return install(database, TABLE)


@pytest.fixture
def each_variants(each_database, use_pipeline) -> Variants:
    """On every PostgreSQL that there is."""
    use_pipeline(PIPELINE)
    return install(each_database, TABLE)
