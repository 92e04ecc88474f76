"""The guide's five stages in the demo: jobs are inserted, and a second later they are done."""

import importlib
from contextlib import suppress

from psycopg2.extensions import connection as Connection

from demo import jobs
from demo.board import MAGENTA, Board, Row
from demo.jobs import JOBS, TENANT
from demo.stage_api import DELAYS
from demo.stage_examples import EXAMPLES
from demo.stage_server import Answer, Request
from demo.terminal import Ended, one_line

BORN_DONE = JOBS[2]  # inserted as done; the others are inserted as queued and then updated
HICCUP = "planner"  # answers 503 once


class FiveStages:
    """Five jobs, one a second, in a database that may have other rows."""

    module = "stages"
    workers = 2
    time_limit = 60  # seconds for all jobs
    stages = tuple(DELAYS)
    api_stages = None  # those that the stand-in has by itself
    delays = DELAYS
    notes = (f"its {HICCUP} answers 503 once",)
    next = "Next: name your database in .env, then `make trigger` and `make run`; see README.md."

    def __init__(self) -> None:
        """Raises Ended where stages.py is no longer the guide's, which the stand-in runs."""
        try:
            found = [f.__name__ for f in importlib.import_module("stages").PIPELINE.values()]
        except Exception as error:
            raise Ended(f"stages.py cannot be used: {one_line(error)}") from None
        if found != list(self.stages):
            names = " or ".join(f"make demo PIPELINE={name}" for name in EXAMPLES)
            raise Ended(f"this demo runs the guide's stages, and stages.py has others: {names}")
        self.hiccups = [Answer(503, headers={"Retry-After": "1"})]
        self.script = []
        for second, job in enumerate(JOBS, 1):
            is_done = job == BORN_DONE
            self.script.append((second, jobs.insert, job, "done" if is_done else "queued"))
            if not is_done:
                self.script.append((second + 0.5, jobs.release, job, "done"))

    def prepare(self, connection: Connection) -> None:
        jobs.check_database(connection)

    def answer(self, request: Request) -> Answer | None:
        """What the stand-in answers instead of working."""
        if request.tenant_id != TENANT:
            return Answer(503, headers={"Retry-After": "5"})  # costs that job nothing
        with suppress(IndexError):
            return self.hiccups.pop() if request.stage == HICCUP else None
        return None

    @property
    def all_arrived(self) -> bool:
        return not self.script

    def arrive(self, board: Board, connection: Connection) -> None:
        """Insert and update jobs as it is their time."""
        while self.script and self.script[0][0] <= board.elapsed:
            _, action, job, status = self.script.pop(0)
            if action is jobs.insert:
                jobs.insert(connection, job, status)
                board.rows.append(Row(job, job[:8], self.stages))
            else:
                jobs.release(connection, job)
            done = "INSERT" if action is jobs.insert else "UPDATE"
            board.add(f"▸ {done} job {job[:8]} (img_gen, {status})", MAGENTA)

    def answers(self, stage: str) -> dict[int, int]:
        """How often a row is answered with which status; the 503 was before it was worked on."""
        return {200: 1}
