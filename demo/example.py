"""A pipeline of examples/ in the demo: its tables, and jobs made by its example_job()."""

import importlib
from pathlib import Path

from psycopg2.extensions import connection as Connection

from demo.board import MAGENTA, Board, Row
from demo.jobs import query
from demo.stage_api import Stage
from demo.stage_examples import EXAMPLES, SECONDS
from demo.stage_server import Answer, Request
from pipeline import State

FOLDER = Path(__file__).parent.parent / "examples"
JOBS = 2
EVERY = 2.0  # seconds until the next job arrives


class Example:
    """One of EXAMPLES, and the jobs that go through it."""

    workers = 6
    time_limit = 120  # seconds for all jobs

    def __init__(self, name: str):
        self.name = name
        self.module = f"examples.{name}.stages"
        found = importlib.import_module(self.module)
        self.pipeline, self.example_job = found.PIPELINE, found.example_job
        self.stages = list(dict.fromkeys(f.__name__ for f in self.pipeline.values()))
        self.api_stages: dict[str, Stage] = EXAMPLES[name]
        self.by_name = {stage.name: stage for stage in self.api_stages.values()}
        self.delays = {stage: SECONDS[stage] for stage in self.stages}
        self.jobs = 0
        self.notes = [
            f"its {stage.name} sets every row to failed {stage.fails} times, then succeeds"
            for stage in self.api_stages.values() if stage.fails
        ]  # fmt: skip
        self.next = f"Next: examples/{name}/README.md says how to make this pipeline yours."

    def prepare(self, connection: Connection) -> None:
        query(connection, (FOLDER / self.name / "schema.sql").read_text())

    def answer(self, request: Request) -> Answer | None:
        """The answer of the stand-in to a request that it does not work on; None: it works."""
        return None

    @property
    def all_arrived(self) -> bool:
        return self.jobs == JOBS

    def arrive(self, board: Board, connection: Connection) -> None:
        """Insert a job when it is time for the next one."""
        if self.all_arrived or board.elapsed < EVERY * self.jobs:
            return
        job = str(self.example_job(connection))
        self.jobs += 1
        variants = self.variants(connection, job)
        rows = [Row(job, job[:8], self.passed_by(is_child=False))] + [
            Row(variant, f"{job[:6]}/{number}", self.passed_by(is_child=True))
            for number, variant in enumerate(variants, 1)
        ]
        board.rows += [row for row in rows if row.stages]
        more = f" with {len(variants)} variants" if variants else ""
        board.add(f"▸ job {job[:8]} is inserted{more}", MAGENTA)

    def variants(self, connection: Connection, job: str) -> list[str]:
        table = next((key.table for key in self.pipeline if isinstance(key, State)), None)
        if not table:
            return []
        sql = f"SELECT {table.id}::text FROM {table.name} WHERE job_id = %s ORDER BY image_url"
        return [row for [row] in query(connection, sql, [job])]

    def passed_by(self, is_child: bool) -> list[str]:
        return [name for name in self.stages
                if (self.by_name[name].takes.id != "job_id") == is_child]  # fmt: skip

    def answers(self, stage: str) -> dict[int, int]:
        """By HTTP status: how many answers with it a row gets from the stage."""
        fails = self.by_name[stage].fails
        return {200: 1} | ({500: fails} if fails else {})
