"""The demo, step by step: start a database, a stage API and the listener, insert jobs, and check
what became of them.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psycopg2
from psycopg2.extensions import connection as Connection

from demo import jobs
from demo.board import MAGENTA, RED, Board
from demo.example import Example
from demo.five import FiveStages
from demo.killing import Killing
from demo.stage_api import StageApi, database_from_environment
from demo.start import environment, own_database, server
from demo.terminal import (
    Ended,
    Listener,
    headline,
    run_command,
    show,
    signals,
    take_signals,
)
from ops.screen import Screen

# Short, so that the call of a killed worker is made again soon.
LEASE = {"STAGE_TIMEOUT": "6", "LEASE_MARGIN": "1"}
LOOK_EVERY = 0.2  # seconds


def play(stack: ExitStack, name: str | None, log: bool, report: Path) -> None:
    """Run the demo. What must be undone at its end is put on `stack`.

    Args:
        name: of a pipeline in examples/; None: the guide's five stages.
        log: whether the listener's log is shown instead of the board.
        report: the file that `report` writes.

    Raises:
        Ended
    """
    shown = Example(name) if name else FiveStages()
    given = None if name else database_from_environment()
    dsn = given or own_database(stack)
    connection = stack.enter_context(closing(psycopg2.connect(dsn, connect_timeout=5)))
    connection.autocommit = True
    where = "yours: only the demo's jobs are touched" if given else "in a temporary directory"
    headline(f"① {server(connection)}, {where}")
    shown.prepare(connection)
    stack.callback(jobs.forget, connection)

    killing = Killing(shown.stages[1])
    api = StageApi(dsn, stages=shown.api_stages,
                   delay=lambda stage: shown.delays[stage] * random.uniform(0.8, 1.2))  # fmt: skip
    for stage in shown.stages:
        api.on(stage, lambda request: shown.answer(request) or killing.wait_for(request))
    stack.enter_context(api)
    headline(f"② A stage API that only pretends: {api.url}")
    for note in shown.notes:
        show(f"   {note}")

    heartbeats = stack.enter_context(tempfile.TemporaryDirectory(prefix="heartbeat-"))
    settings = environment(DATABASE_URL=dsn, STAGE_API_URL=api.url, PIPELINE_MODULE=shown.module,
                           HEARTBEAT_DIR=heartbeats, RETRY_DELAY="1", **LEASE)  # fmt: skip
    headline(f"③ PIPELINE_MODULE={shown.module} ./jsl install")
    run_command("install", settings, quiet=not log)

    headline(f"④ ./jsl run --workers {shown.workers}, and jobs arrive")
    listener = Listener(settings, shown.workers, quiet=not log)
    stack.callback(listener.close)
    try:
        board = watch(connection, api, listener, shown, killing, log)
    except Ended:
        if not signals:
            listener.show_kept()
        raise

    headline("⑤ ./jsl status")
    run_command("status", settings)
    headline("⑥ ./jsl report, a page for your browser:")
    run_command("report", settings, "--out", str(report), quiet=True)
    print(f"   {shortest(report)}")
    listener.close()
    judge(api, board, shown, killing)
    if given:
        print("Tables and triggers stay; `./jsl uninstall` removes all but jobs, stage_requests.")
    print(shown.next)


def watch(connection: Connection, api: StageApi, listener: Listener, shown: Example | FiveStages,
          killing: Killing, log: bool) -> Board:  # fmt: skip
    """Insert jobs and show their progress until all have passed every stage. Raises Ended."""
    title = f"Job State Listener: {len(shown.stages)} stages, {shown.workers} workers"
    board = Board(title, shown.stages)
    began, told = time.monotonic(), 0
    with screen(log) as picture:
        while not (shown.all_arrived and board.is_full and is_idle(api)):
            exit_code = listener.show(LOOK_EVERY)
            board.elapsed = time.monotonic() - began
            shown.arrive(board, connection)
            if request := killing.look():
                board.add(f"✗ kill -9 of the worker that calls {request.stage} for "
                          f"{board.label(request.row_id)}", RED)  # fmt: skip
            board.look(connection)
            if picture:
                picture.draw(board.picture())
            else:
                told = tell(board, told, log)
            require_going_on(board, api, shown, exit_code)
    return board


def is_idle(api: StageApi) -> bool:
    return all(request.finished for request in list(api.requests))


def tell(board: Board, told: int, log: bool) -> int:
    """Print the events after the first `told`; beside the log, only those that it does not have.

    Returns:
        How many events there are now.
    """
    for text, colour in board.events[told:]:
        if not log or colour in (MAGENTA, RED):
            show(text, colour)
    return len(board.events)


def require_going_on(board: Board, api: StageApi, shown: Example | FiveStages,
                     exit_code: int | None) -> None:  # fmt: skip
    """Raises Ended where the demo cannot go on: a signal, an ended listener, a time limit."""
    if signals:
        raise Ended
    if exit_code is not None:
        raise Ended(f"the listener ended with exit code {exit_code}")
    ours = {row.key for row in board.rows}
    if any(request.row_id not in ours for request in list(api.requests)):
        raise Ended("a job that is not the demo's came due; it was put off and stays owed")
    if board.elapsed > shown.time_limit:
        missing = len(board.expected) - board.accepted
        raise Ended(f"not through after {shown.time_limit} s: {missing} calls are missing")


@contextmanager
def screen(log: bool) -> Iterator[Screen | None]:
    """A terminal to draw on, unless there is none or the log is wanted."""
    there = Screen()
    if log or not there.in_place:
        yield None
        return
    try:
        with there:
            take_signals()  # Screen would turn them into KeyboardInterrupt
            yield there
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        take_signals()


def judge(api: StageApi, board: Board, shown: Example | FiveStages, killing: Killing) -> None:
    """Compare the stage API's answers with the expected ones. Raises Ended where they differ."""
    answered = Counter((r.row_id, r.stage, r.status) for r in api.requests
                       if r.status in (200, 500))  # fmt: skip
    expected = {
        (key, stage, status): times
        for key, stage in board.expected
        for status, times in shown.answers(stage).items()
    }
    if answered != expected:
        raise Ended(f"{answered.total()} calls were answered, expected: {sum(expected.values())}")
    accepted = len(board.expected)
    headline(f"✓ {accepted} of {accepted} calls accepted, each of them once")
    if killing.is_done:
        print(f"  The call of the killed worker ({killing.stage}) was made again: nothing is lost.")


def report_file(given: str | None) -> Path:
    """The path of the report: in the working directory, or in one that outlasts the demo."""
    if given:
        return Path(given).absolute()
    folder = Path.cwd() if os.access(".", os.W_OK) else Path(tempfile.mkdtemp(prefix="demo-"))
    return folder / "demo-report.html"


def shortest(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)
