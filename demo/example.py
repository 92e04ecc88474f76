"""A pipeline of examples/ runs to its end: its own tables, jobs of its example_job(), and the
listener with its stages.py.
"""

import importlib
import random
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg2
from psycopg2.extensions import connection as Connection

from demo.jobs import query
from demo.stage_api import Stage, StageApi
from demo.stage_examples import EXAMPLES, SECONDS
from demo.start import environment, own_database, tell_server
from demo.terminal import Ended, Listener, headline, run_command, show, signals
from pipeline import State, Table

FOLDER = Path(__file__).parent.parent / "examples"
JOBS = 2
TIME_LIMIT = 120  # seconds for all jobs
WIDTH = 8  # of a figure in the table


class Example:
    """One of EXAMPLES, and the jobs that go through it."""

    def __init__(self, name: str):
        self.name = name
        self.module = f"examples.{name}.stages"
        self.stages: dict[str, Stage] = {stage.name: stage for stage in EXAMPLES[name].values()}
        found = importlib.import_module(self.module)
        self.pipeline, self.example_job = found.PIPELINE, found.example_job
        self.jobs: dict[str, list[str]] = {}  # job: its variants
        self.labels: dict[str, str] = {}  # how a row is called in what is printed

    @property
    def names(self) -> list[str]:
        """The stages in the order of PIPELINE."""
        return list(dict.fromkeys(function.__name__ for function in self.pipeline.values()))

    @property
    def children(self) -> Table | None:
        """The table of the variants, if there is one."""
        return next((key.table for key in self.pipeline if isinstance(key, State)), None)

    def add_job(self, connection: Connection) -> None:
        job = str(self.example_job(connection))
        self.labels[job] = f"job {job[:8]}"
        table, self.jobs[job] = self.children, []
        if table:
            sql = f"SELECT {table.id}::text FROM {table.name} WHERE job_id = %s ORDER BY image_url"
            self.jobs[job] = [row for [row] in query(connection, sql, [job])]
        for number, row in enumerate(self.jobs[job], 1):
            self.labels[row] = f"job {job[:8]} variant {number}"
        rows = f", and {len(self.jobs[job])} rows in {table.name}" if table else ""
        show(f"▸ {self.labels[job]} is inserted{rows}")

    def rows(self, stage: str, job: str) -> list[str]:
        """The rows of a job that pass a stage."""
        is_child = self.stages[stage].rows.id != "job_id"
        return self.jobs[job] if is_child else [job]

    def expected(self) -> dict[tuple[str, str], int]:
        """How often each row should be called by each stage."""
        return {
            (row, stage): 1 + self.stages[stage].fails
            for stage in self.names
            for job in self.jobs
            for row in self.rows(stage, job)
        }


def run(stack: ExitStack, name: str) -> None:
    """The demo, step by step. What must be undone goes on `stack`. Raises Ended."""
    example = Example(name)
    headline("① Database: a PostgreSQL of its own, in a temporary directory")
    dsn = own_database(stack)
    connection = stack.enter_context(closing(psycopg2.connect(dsn, connect_timeout=5)))
    connection.autocommit = True
    tell_server(connection)
    query(connection, (FOLDER / name / "schema.sql").read_text())
    show(f"The application's tables are made: examples/{name}/schema.sql")

    delay = {stage: SECONDS[stage] for stage in example.names}
    api = StageApi(
        dsn,
        stages=EXAMPLES[name],
        delay=lambda stage: delay[stage] * random.uniform(0.8, 1.2),
    )
    stack.enter_context(api)
    headline(f"② Stage API: a stand-in on {api.url}")
    for stage in example.stages.values():
        if stage.fails:
            show(f"Its {stage.name} sets each row to failed {stage.fails} times, then succeeds.")

    settings = environment(
        stack, dsn, api.url, PIPELINE_MODULE=example.module, LOG_LEVEL="ERROR", RETRY_DELAY="1"
    )
    headline(f"③ PIPELINE_MODULE={example.module} python listener.py install")
    run_command("install", settings)

    headline(f"④ python listener.py run --workers 6, and {JOBS} jobs arrive (▸)")
    show("Every call, once the stage API has answered it; of the log, errors only:")
    listener = Listener(settings, workers=6)
    stack.callback(listener.close)
    watch(connection, api, listener, example)

    headline("⑤ All jobs are through, so the listener is told to stop")
    listener.close()
    report(api, example)
    print(f"Next: examples/{name}/README.md says how to make this pipeline yours.")


def watch(connection: Connection, api: StageApi, listener: Listener, example: Example) -> None:
    """Let a job arrive every two seconds, and show each call until all are through."""
    began, shown = time.monotonic(), 0
    while len(example.jobs) < JOBS or not is_through(connection, api, example):
        if len(example.jobs) < JOBS and time.monotonic() - began >= 2 * len(example.jobs):
            example.add_job(connection)
        exit_code = listener.show(0.1)
        shown = show_answers(api, example, began, shown)
        if signals:
            raise Ended
        if exit_code is not None:
            raise Ended(f"the listener ended with exit code {exit_code}")
        if time.monotonic() - began > TIME_LIMIT:
            raise Ended(f"not through after {TIME_LIMIT} s")
    show_answers(api, example, began, shown)


def is_through(connection: Connection, api: StageApi, example: Example) -> bool:
    states = query(connection, "SELECT current_step, status FROM jobs")
    ends = all(state == (example.names[-1], "done") for state in states)
    return ends and all(request.finished for request in list(api.requests))


def show_answers(api: StageApi, example: Example, began: float, shown: int) -> int:
    """Print the answers after the first `shown`, as far as they are there; how many were shown."""
    answered = sorted((r for r in list(api.requests) if r.finished), key=lambda r: r.finished)
    for request in answered[shown:]:
        failed = " failed, retried" if request.status != 200 else ""
        show(f"{request.finished - began:5.1f} s  {example.labels[request.row_id]:24} "
             f"{request.stage:18} {request.status}{failed}")  # fmt: skip
    return len(answered)


def report(api: StageApi, example: Example) -> None:
    """The table and the verdict. Raises Ended where a call was not made exactly once."""
    widths = {job: max(2, len(rows)) * WIDTH + 2 for job, rows in example.jobs.items()}
    cells = [f"job {job[:8]}".ljust(width) for job, width in widths.items()]
    headline(f"{'stage':19}" + "".join(cells).rstrip())
    if example.children:
        cells = ["".join(f"{n:{WIDTH - 2}}  " for n in range(1, len(rows) + 1)).ljust(widths[job])
                 for job, rows in example.jobs.items()]  # fmt: skip
        print(f"{'variant':19}" + "".join(cells).rstrip())
    for stage in example.names:
        cells = ["".join(cell(api, stage, row) for row in example.rows(stage, job))
                 .ljust(widths[job]) for job in example.jobs]  # fmt: skip
        print(f"{stage:19}" + "".join(cells).rstrip())
    fails = {stage.name: stage.fails for stage in example.stages.values() if stage.fails}
    for name, times in fails.items():
        print(f"* failed {times} times, as {name} does here, and succeeded at call {times + 1}")

    calls = Counter((request.row_id, request.stage) for request in api.requests)
    if calls != example.expected():
        raise Ended(f"{calls.total()} calls, expected: {sum(example.expected().values())}")
    print(f"No other call was made: {calls.total()} in all.")
    headline(f"✓ {len(example.jobs)} jobs went through {len(example.names)} stages, "
             "and each call was made once")  # fmt: skip


def cell(api: StageApi, stage: str, row: str) -> str:
    """How long a row was in a stage."""
    mine = [r for r in api.requests if (r.stage, r.row_id) == (stage, row)]
    seconds = sum(request.finished - request.time for request in mine)
    return f"{seconds:{WIDTH - 4}.1f} s{'*' if len(mine) > 1 else ' '} "
