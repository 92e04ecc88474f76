"""The lines of the log: one event, one line, no secrets, whatever the data."""

import ast
import logging
import re
import sys
from pathlib import Path

import pytest

import config
from logs import EVENTS, LONGEST_LINE, OneLine, event_of

ROOT = Path(__file__).parent.parent


def line(message: str, *args: object, exc_info=None, **settings: str) -> str:
    record = logging.LogRecord("listener", logging.INFO, "", 1, message, args, exc_info)
    return OneLine(config.read(settings)).format(record)


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028", "\u2029"])
def test_data_cannot_begin_a_line_of_its_own(character):
    text = line("job=%s", f"a{character}2025-01-01 INFO [1] forged")
    assert character not in text
    assert len(text.splitlines()) == 1


def test_korean_and_emoji_stay_readable():
    assert line("Job 상태 변화 감지: %s", "작업 🎨").endswith("Job 상태 변화 감지: 작업 🎨")


def test_long_line_is_cut():
    text = line("job=%s", "x" * 10 * LONGEST_LINE)
    assert text.endswith("x…")
    assert len(text) < LONGEST_LINE + 100


SECRETS = {
    "DB_PASSWORD": "pw-of-db",
    "STAGE_API_URL": "http://me:pw-of%2Fapi@127.0.0.1",
    "DATABASE_URL": "postgresql://me:pw%2Fof-url@host/jobs",
}


@pytest.mark.parametrize(
    "secret", ["pw-of-db", "pw-of%2Fapi", "pw-of/api", "pw%2Fof-url", "pw/of-url"]
)
def test_known_secrets_are_replaced_wherever_they_stand(secret):
    assert secret not in line("could not use '%s' here", secret, **SECRETS)
    assert line("before %s after", secret, **SECRETS).endswith("before *** after")


@pytest.mark.parametrize("text", ["http://someone:else@host/path", "host=h password = else"])
def test_what_looks_like_a_secret_is_replaced(text):
    assert "else" not in line(text)


def raised(text: str):
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


def test_every_line_of_a_traceback_is_marked():
    error = raised("first\n2025-01-01 00:00:00,000 INFO [1] forged\r\x1b[2Jend")
    first, *trace = line("단계 함수 오류", exc_info=error).split("\n")
    assert first.endswith("단계 함수 오류")
    assert all(text.startswith("    | ") for text in trace)
    assert "    | 2025-01-01 00:00:00,000 INFO [1] forged\\r\\x1b[2Jend" in trace


def test_traceback_shows_no_secret_and_is_bounded():
    assert "pw-of-db" not in line("오류", exc_info=raised("with pw-of-db"), **SECRETS)
    assert len(line("오류", exc_info=raised("y" * 1_000_000))) < 25_000


# --- the names of events -------------------------------------------------------------------

LEVELS = ("info", "warning", "error", "exception", "critical", "log")


def log_calls(source: str) -> list[ast.Call]:
    """The calls of a module's loggers that write lines of INFO or above."""
    nodes = list(ast.walk(ast.parse(source)))
    loggers = {
        node.targets[0].id
        for node in nodes
        if isinstance(node, ast.Assign) and "logging.getLogger(" in ast.unparse(node.value)
    }
    return [
        node
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LEVELS
        and ast.unparse(node.func.value) in loggers
    ]


def template(call: ast.Call) -> str:
    """Its text, which is written out: what was put together could have no name."""
    said = call.args[call.func.attr == "log"]
    assert isinstance(said, ast.Constant), f"not a plain text: {ast.unparse(call)}"
    return said.value


def test_every_line_of_the_log_has_an_event_and_every_event_a_line():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("ops/**/*.py")]
    said = {template(call) for file in sources for call in log_calls(file.read_text())}
    assert len(said) > 40
    assert [text for text in said if event_of(text) is None] == []
    assert set(EVENTS.values()) - {event_of(text) for text in said} == set()


def test_names_of_events_are_plain_and_each_has_one():
    assert len(set(EVENTS.values())) == len(EVENTS)
    assert [name for name in EVENTS.values() if not re.fullmatch("[a-z]+(_[a-z]+)*", name)] == []


@pytest.mark.parametrize("fault", ['log.info("새로운 일: %s", 1)', 'log.info(f"설정: {1}")'])
def test_line_without_an_event_would_be_found(fault):
    [call] = log_calls(f'import logging\nlog = logging.getLogger("x")\n{fault}')
    with pytest.raises(AssertionError):
        assert event_of(template(call))
