"""A worker's Trigger in the test's own process, one call at a time, and what it logged."""

import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import variants
from raw_server import OK, RawServer, in_turn

import calls
import db
import logs
import pipeline
import trigger
from calls import Result
from demo import five_stages
from listener import Listener
from trigger import boottime

WITHOUT_HOLDS = "UPDATE pipeline_stages SET held_until = now() - interval '1 second'"
CALL_OF = "SELECT call_id, attempts FROM stage_calls WHERE job_id = %s AND join_of = ''"


@contextmanager
def logged(settings: SimpleNamespace) -> Iterator[io.StringIO]:
    """Collects what is logged within the `with`, formatted as a listener prints it."""
    output, logger = io.StringIO(), logging.getLogger("listener")
    handler = logging.StreamHandler(output)
    handler.setFormatter(logs.OneLine(settings))
    logger.setLevel(settings.LOG_LEVEL)
    logger.addHandler(handler)
    logger.propagate = False  # pytest-xdist cannot transfer the records that pytest would capture
    try:
        yield output
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


class Caller:
    """A listener's turns, and one worker's, in the test's own process; a context manager."""

    def __init__(self, database, url: str, name: str = "caller", **settings: object):
        self.directory = tempfile.TemporaryDirectory()
        settings = {"HEARTBEAT_DIR": self.directory.name} | settings
        self.settings = database.settings(STAGE_API_URL=url, **settings)
        self.database = database
        self.conn = db.connect(self.settings, pinned=True)
        quiet = SimpleNamespace(stops=[], requested=False, child_ended=False)
        self.listener = Listener(self.settings, quiet, 1)
        self.listener.name = name
        self.listener.hearing.is_notified = True
        self.trigger = self.listener.workers.trigger
        self.open = ExitStack()

    def __enter__(self) -> "Caller":
        self.open.callback(self.conn.close)
        self.open.callback(self.directory.cleanup)
        self.open.callback(self.listener.heartbeat.close)
        self.output = self.open.enter_context(logged(self.settings))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def claim(self, only: object = None) -> pipeline.Call | None:
        """Settle all results; then claim the next due call, or the one that the job `only` owes."""
        listener = self.listener
        if only is not None:
            only = (only, *self.database.rows(CALL_OF, only)[0])
        while True:
            began = boottime()
            listener.unwritten.mark_and_tell_failed(self.conn)
            for wanted in listener.claiming.wanted(1, [], sweep=True):
                turn = calls.run_turn(
                    self.conn,
                    listener.unwritten.results,
                    wanted,
                    1,
                    listener.name,
                    sweep=True,
                    only=only,
                )
                listener.note_turn(self.conn, turn)
                if turn.claimed:
                    break
            if found := listener.to_make(self.conn, turn, began):
                return found[0]
            if not turn.claimed:
                return None

    def run(self, call: pipeline.Call) -> Result:
        """Run `call` as a worker does, and keep its result for the next settle() or claim()."""
        trigger.log_begin(call)
        ended = self.listener.health.revise(call, self.trigger.run(call))
        trigger.log_end(call, ended)
        self.listener.keep(call, ended)
        return ended

    def settle(self, conn=None) -> None:
        """Settle all results."""
        self.listener.unwritten.mark_and_tell_failed(conn or self.conn)
        unwritten, name = self.listener.unwritten.results, self.listener.name
        turn = calls.run_turn(conn or self.conn, unwritten, [], 0, name)
        self.listener.note_turn(self.conn, turn)

    def call(self) -> SimpleNamespace:
        """Claim the next due call, run it and settle it; its row in stage_attempts."""
        call = self.claim()
        assert call is not None, "nothing is due"
        self.run(call)
        self.settle()
        return self.database.attempts(call.job_id)[-1]

    def call_again(self) -> SimpleNamespace:
        """The same, after moving due_at and holds into the past, so that nothing has to be waited
        for.
        """
        self.database.rows(
            "UPDATE stage_calls SET due_at = due_at - interval '1 day' WHERE due_at < 'infinity'"
        )
        self.database.rows(WITHOUT_HOLDS)
        return self.call()

    @property
    def lines(self) -> list[str]:
        """All lines that were logged, including tracebacks."""
        return self.output.getvalue().splitlines()

    def line(self, text: str) -> str:
        """The one line that contains `text`."""
        found = [line for line in self.lines if text in line]
        assert len(found) == 1, f"{len(found)} lines contain {text!r} in {self.lines}"
        return found[0]


@pytest.fixture
def caller(database) -> Iterator[Callable[..., Caller]]:
    """caller(url, name="caller", **settings): a Caller on this test's database."""
    with ExitStack() as stack:
        yield lambda url, name="caller", **settings: stack.enter_context(
            Caller(database, url, name, **settings)
        )


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    """serve(*behaviours, **options): a RawServer."""
    with ExitStack() as stack:
        yield lambda *behaviours, **options: stack.enter_context(RawServer(*behaviours, **options))


@pytest.fixture
def accepting(serve) -> RawServer:
    """A server that keeps its connections alive and accepts everything."""
    return serve(in_turn(OK))


@pytest.fixture
def add_stage(database) -> Iterator[Callable[..., None]]:
    """add_stage(function, step="x"): add the route (step, 'done') → function and install.

    Only for a database that the test has not used yet.
    """
    before = dict(five_stages.PIPELINE)

    def add(function: Callable, step: str = "x") -> None:
        five_stages.PIPELINE[step, "done"] = function
        variants.install(database)

    yield add
    five_stages.PIPELINE.clear()
    five_stages.PIPELINE.update(before)
