"""When lines of the log are written: as a worker begins to wait, and not before its next step."""

import io
import logging

import pytest

import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log_to():
    """log_to(stream): the listener's log, written there."""
    log, added = logging.getLogger("listener"), []

    def log_to(stream) -> logging.Logger:
        added.append(logs.Held(stream))
        log.addHandler(added[-1])
        log.setLevel(logging.INFO)
        return log

    yield log_to
    for handler in added:
        log.removeHandler(handler)


def test_lines_are_held_until_they_are_to_be_written(log_to):
    stream = io.StringIO()
    log = log_to(stream)
    log.info("one")
    log.info("two")
    assert stream.getvalue() == ""
    logs.write()
    logs.write()
    assert stream.getvalue() == "one\ntwo\n"


def test_warning_is_written_at_once_after_what_came_before(log_to):
    stream = io.StringIO()
    log = log_to(stream)
    log.info("one")
    log.warning("two")
    assert stream.getvalue() == "one\ntwo\n"


def test_terminal_sees_every_line_at_once(log_to):
    stream = Terminal()
    log_to(stream).info("one")
    assert stream.getvalue() == "one\n"


def test_what_is_held_is_written_at_the_end(log_to):
    stream = io.StringIO()
    log_to(stream).info("one")
    logging.shutdown([lambda: logging.getLogger("listener").handlers[-1]])
    assert stream.getvalue() == "one\n"
