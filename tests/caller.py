"""A worker's Trigger in the test's own process, one call at a time, and what it logged."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace

import pytest
from raw_server import OK, RawServer, in_turn

import db
import logs
import stages
from ops.install import apply
from trigger import Trigger

WITHOUT_HOLDS = "UPDATE pipeline_stages SET held_until = now() - interval '1 second'"


@contextmanager
def logged(settings: SimpleNamespace) -> Iterator[io.StringIO]:
    """What a worker logs meanwhile, line by line as it would print it."""
    output, logger = io.StringIO(), logging.getLogger("listener")
    handler = logging.StreamHandler(output)
    handler.setFormatter(logs.OneLine(settings))
    logger.setLevel(settings.LOG_LEVEL)
    logger.addHandler(handler)
    logger.propagate = False  # pytest-xdist cannot pass on what pytest captures of it
    try:
        yield output
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


class Caller:
    """A Trigger on a connection of its own; a context manager."""

    def __init__(self, database, url: str, name: str = "caller", **settings: object):
        self.settings = database.settings(STAGE_API_URL=url, **settings)
        self.database = database
        self.conn = db.connect(self.settings, pinned=True)
        self.trigger = Trigger(self.settings, name)
        self.open = ExitStack()

    def __enter__(self) -> "Caller":
        self.open.callback(self.conn.close)
        self.output = self.open.enter_context(logged(self.settings))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def claim(self) -> stages.Call | None:
        """Settle the last result and claim the next due call."""
        return self.trigger.next(self.conn)

    def call(self) -> SimpleNamespace:
        """Claim the due call, run it, settle it: the row that the history has of it."""
        call = self.claim()
        assert call is not None, "nothing is due"
        self.trigger.run(call)
        self.trigger.leave(self.conn)
        return self.database.attempts(call.job_id)[-1]

    def call_again(self) -> SimpleNamespace:
        """The same, without waiting for back-off, lease or hold to pass."""
        self.database.rows("UPDATE stage_calls SET due_at = now() WHERE due_at < 'infinity'")
        self.database.rows(WITHOUT_HOLDS)
        return self.call()

    @property
    def lines(self) -> list[str]:
        """What was logged, tracebacks and all."""
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
    """serve(*behaviours, tls=None): a RawServer."""
    with ExitStack() as stack:
        yield lambda *behaviours, tls=None: stack.enter_context(RawServer(*behaviours, tls=tls))


@pytest.fixture
def accepting(serve) -> RawServer:
    """A server that keeps its connections alive and accepts everything."""
    return serve(in_turn(OK))


@pytest.fixture
def add_stage(database) -> Iterator[Callable[..., None]]:
    """add_stage(function, step="x"): state (step, 'done') leads to it, as a user would have it."""
    before = dict(stages.PIPELINE)

    def add(function: Callable, step: str = "x") -> None:
        stages.PIPELINE[step, "done"] = function
        with closing(db.connect(database.settings())) as conn:
            apply(conn)

    yield add
    stages.PIPELINE.clear()
    stages.PIPELINE.update(before)
