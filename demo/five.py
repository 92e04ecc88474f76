"""The guide's five stages in the demo: jobs are inserted as queued and soon set to done."""

from contextlib import suppress

from psycopg2.extensions import connection as Connection

from demo import jobs
from demo.board import MAGENTA, Board, Row
from demo.jobs import JOBS, TENANT
from demo.stage_api import DELAYS
from demo.stage_server import Answer, Request

BORN_DONE = JOBS[2]  # inserted as done; the others are inserted as queued and then updated
BUSY_ONCE = "planner"  # the stage that answers 503 once


class FiveStages:
    """Five jobs, one a second, in a database that may also have other jobs."""

    module = "demo.five_stages"
    workers = 2
    time_limit = 60  # seconds for all jobs
    stages = tuple(DELAYS)
    api_stages = None  # the stand-in's own five
    delays = DELAYS
    notes = (f"its {BUSY_ONCE} answers 503 once",)
    next = "Next: name your database in .env, `make trigger`, `make run`; see README.md."

    def __init__(self) -> None:
        self.busy_answers = [Answer(503, headers={"Retry-After": "1"})]
        self.script = []
        for second, job in enumerate(JOBS, 1):
            is_done = job == BORN_DONE
            self.script.append((second, jobs.insert, job, "done" if is_done else "queued"))
            if not is_done:
                self.script.append((second + 0.5, jobs.release, job, "done"))

    def prepare(self, connection: Connection) -> None:
        jobs.check_database(connection)

    def answer(self, request: Request) -> Answer | None:
        """The answer of the stand-in to a request that it does not work on; None: it works."""
        if request.tenant_id != TENANT:
            return Answer(503, headers={"Retry-After": "5"})  # costs the job no attempt
        with suppress(IndexError):
            return self.busy_answers.pop() if request.stage == BUSY_ONCE else None
        return None

    @property
    def all_arrived(self) -> bool:
        return not self.script

    def arrive(self, board: Board, connection: Connection) -> None:
        """Insert and update the jobs whose time has come."""
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
        """By HTTP status: how many answers with it a row gets from the stage; without the 503."""
        return {200: 1}
