"""The log: one event, one line, for people with grep or, as JSON, for collectors."""

import io
import json
import logging
import sys
import time
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

from config import redactor

LONGEST_LINE = 4000
LONGEST_TRACE = 20_000
CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}
CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}

# What JSON leaves as it is, and some terminals obey.
IN_JSON = {code: f"\\u{code:04x}" for code in CONTROL if code >= 127}


def about(**fields: Any) -> dict[str, Any]:
    """What an event is about, for `extra`: fields of its JSON, unseen in its line of text."""
    return {"about": fields}


def ids(of: dict[str, Any]) -> str:
    """The ids of a row, as lines of the log begin: `job=…`, or each with its column's name."""
    if len(of) == 1:
        return f"job={next(iter(of.values()))}"
    return " ".join(f"{name}={value}" for name, value in of.items())


class OneLine(logging.Formatter):
    """One event, one line: control characters in data are escaped, secrets are replaced.

    A traceback follows its line, each of its own lines marked, so that no text in an exception
    can pass for an event.
    """

    def __init__(self, settings: SimpleNamespace):
        super().__init__("%(asctime)s %(levelname)s [%(process)d] %(message)s")
        self.redact = redactor(settings)
        self.second, self.shown = -1, ""  # the last second, and how it is written

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self.second:
            self.second = second
            self.shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self.shown},{int(record.msecs):03d}"

    def said(self, record: logging.LogRecord) -> str:
        message = self.redact(record.getMessage())
        if not message.isprintable():
            message = message.translate(CONTROL)
        return message[:LONGEST_LINE] + "…" if len(message) > LONGEST_LINE else message

    def trace(self, record: logging.LogRecord) -> str:
        """The traceback: of this process, or as text from a worker."""
        said = getattr(record, "about", {}).get("traceback", "")
        if record.exc_info:
            said = self.formatException(record.exc_info)
        if not said:
            return ""
        return self.redact(said)[-LONGEST_TRACE:].rstrip("\n")

    def format(self, record: logging.LogRecord) -> str:
        record.message, record.asctime = self.said(record), self.formatTime(record)
        line = self.formatMessage(record)
        if trace := self.trace(record):
            lines = [text.translate(CONTROL)[:LONGEST_LINE] for text in trace.split("\n")]
            line += "".join(f"\n    | {text}" for text in lines)
        return line


class OneObject(OneLine):
    """The same event as a JSON object: time, level, pid, message, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        said = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "pid": record.process,
            "message": self.said(record),
        }
        for name, value in getattr(record, "about", {}).items():
            plain = value is None or isinstance(value, (int, float))
            said[name] = value if plain else self.redact(str(value))[:LONGEST_LINE]
        if trace := self.trace(record):
            said["traceback"] = trace
        return json.dumps(said, ensure_ascii=False).translate(IN_JSON)


def set_up(settings: SimpleNamespace) -> None:
    """Log to standard output, where `docker logs … | grep` looks."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    # What cannot be written, to a full disk or a pipe that nobody reads, is lost: logging would
    # print it on standard error, with a traceback and its secrets.
    logging.raiseExceptions = False
    # What no line of ours says need not be found out (see "Optimization" in the docs of logging).
    logging._srcfile, logging.logThreads, logging.logMultiprocessing = None, False, False
    handler = logging.StreamHandler(sys.stdout)
    formatter = OneObject if settings.LOG_FORMAT == "json" else OneLine
    handler.setFormatter(formatter(settings))
    root = logging.getLogger("listener")
    root.handlers, root.propagate = [handler], False
    root.setLevel(settings.LOG_LEVEL)
    for said in settings.WARNINGS:
        root.warning("설정: %s", said)
