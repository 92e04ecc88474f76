"""Answers, and exceptions that are turned into answers."""

import json
from typing import Any, NamedTuple

JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    """An HTTP answer. Flask takes it as it is; FastAPI and Starlette as Response(*answer)."""

    body: bytes
    status: int
    headers: dict[str, str]


class Failed(Exception):
    """Raised by the work to set the row to (stage, 'failed'). Not logged as a bug.

    Args:
        error: the reason, for people.
        status: of the answer, 400 to 599.

    Raises:
        ValueError: `status` is another, which the listener would not take for a failure.
    """

    def __init__(self, error: str, status: int = 500):
        if not 400 <= status <= 599:
            raise ValueError(f"Failed(…, {status!r}): allowed is 400 to 599")
        super().__init__(error)
        self.status = status


class Refused(Exception):
    """The request is not worked on; `answer` says why."""

    def __init__(self, answer: Answer):
        super().__init__(answer)
        self.answer = answer


class Running(Refused):
    """The request is being worked on already."""


def json_answer(status: int, /, **content: Any) -> Answer:
    text = json.dumps(content, ensure_ascii=False, default=str)
    return Answer(text.encode("utf-8", "replace"), status, JSON)


def refusal(status: int, error: str, /, **content: Any) -> Refused:
    return Refused(json_answer(status, error=error, **content))


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
