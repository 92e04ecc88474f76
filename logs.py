"""The log: one event, one line, for people with grep or, as JSON, for collectors."""

import io
import json
import logging
import re
import sys
import time
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any, overload

from config import redactor

LONGEST_LINE = 4000
LONGEST_TRACE = 20_000
CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}
CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}

# The events of the log by the words that their lines begin with, up to the first colon or bracket.
# People grep for the words; JSON has the name as well. An alert of the same event has the same one.
EVENTS = {
    "Job State Listener 시작": "listener_started",
    "Job State Listener 중지됨": "listener_stopped",
    "Job State Listener 비활성화됨": "listener_disabled",
    "시작할 수 없음": "listener_cannot_start",
    "중지 요청": "stop_requested",
    "바로 중지": "stopped_at_once",
    "설정": "setting_warning",
    "PostgreSQL 연결 성공": "database_connected",
    "남은 데이터베이스 연결이 %d개뿐": "few_connections_left",
    "리스너 오류 발생": "listener_error",
    "재연결 시도": "reconnecting",
    "프라이머리가 둘": "split_brain",
    "LISTEN '%s' 시작": "listening",
    "[LISTENER] Job 상태 변화 감지": "state_changed",
    "NOTIFY가 전달되지 않음": "notifications_not_delivered",
    "NOTIFY가 너무 많음": "notification_flood",
    "NOTIFY %d건은 로그에 남기지 않음": "notifications_not_logged",
    "알 수 없는 NOTIFY 무시": "notification_ignored",
    "NOTIFY로 온 메시지": "notification_message",
    "[TRIGGER] 파이프라인 단계 트리거": "call_started",
    "파이프라인 단계 실행 성공": "call_succeeded",
    "파이프라인 단계 실행 실패": "call_failed",
    "단계가 작업을 접수함": "call_taken",
    "단계 함수 오류": "stage_function_error",
    "Job 상태가 변경되어 스킵": "call_skipped",
    "이미 수락된 호출이라 스킵": "call_already_accepted",
    "다른 PIPELINE의 호출을 미룸": "call_of_other_pipeline",
    "데이터베이스의 PIPELINE이 다름": "pipeline_differs",
    "리스가 모자라 호출하지 않고 되돌림": "call_released",
    "시작하지 않은 호출 %d건을 되돌림": "calls_given_back",
    "포기한 호출을 되살림": "call_revived",
    "포기": "call_cannot_be_claimed",
    "단계가 failed로 설정함": "failed_by_stage",
    "단계가 모든 job을 거절함": "stage_refuses",
    "응답하지 않는 단계": "stage_silent",
    "밀린 단계": "waiting",
    "호출을 하나도 수락하지 않는 단계": "refusing",
    "정체된 단계": "stalled",
    "트리거가 호출을 기록하지 않음": "trigger_broken",
    "부재 후 시작": "back",
    "한 건씩 다시 시도": "turn_done_in_parts",
    "단계의 호출을 가져올 수 없음": "stage_cannot_be_claimed",
    "결과를 기록할 수 없음": "result_not_recorded",
    "리스 만료 후 다시 확인됨": "call_left_to_its_lease",
    "데이터베이스 시계가 되돌아감": "database_clock_set_back",
    "failed 상태 확인 실패": "failed_check_error",
    "조인 확인 실패": "join_check_error",
    "작업 완료 확인 실패": "move_check_error",
    "정리 작업 실패": "upkeep_error",
    "커밋이 응답 없는 동기 스탠바이를 기다림": "standby_away",
    "워커를 시작할 수 없음": "worker_cannot_start",
    "호출 없이 종료된 워커": "worker_ended",
    "워커가 알 수 없는 것을 보냄": "worker_message_unknown",
    "워커 오류": "worker_error",
    "리스너가 사라져 워커가 결과를 기록함": "worker_recorded_result",
    "워커가 결과를 기록할 수 없음": "worker_cannot_record_result",
    "heartbeat 파일을 쓸 수 없음": "heartbeat_not_written",
    "알림 명령 실패": "alert_command_failed",
    "알림 명령이 받지 못한 알림": "alert_not_taken",
    "대기열이 가득 차서 버린 알림": "alert_dropped",
    "중지하느라 보내지 못한 알림": "alert_not_sent",
    "상태 페이지 시작": "serve_started",
    "상태 페이지 중지됨": "serve_stopped",
    "TLS 없이 %s에서 열림": "serve_without_tls",
    "로그인": "login",
    "로그인 실패": "login_failed",
    "로그인 거절": "login_refused",
    "조작": "action",
    "페이지 오류": "page_error",
    "요청 처리 오류": "request_error",
}

# Characters that JSON does not escape and that some terminals interpret.
IN_JSON = {code: f"\\u{code:04x}" for code in CONTROL if code >= 127}

# \uXXXX, but not \\uXXXX: there the backslash is the character that is escaped.
ESCAPED = re.compile(r"(?<!\\)(?:\\u[0-9a-fA-F]{4})+")


@overload
def readable(text: str) -> str: ...
@overload
def readable(text: None) -> None: ...
def readable(text: str | None) -> str | None:
    """`text` with the letters that JSON wrote as \\uXXXX; ASCII stays as it is."""

    def decoded(found: re.Match) -> str:
        letters = json.loads(f'"{found[0]}"')
        return "".join(c if ord(c) >= 0x80 and not 0xD800 <= ord(c) < 0xE000
                       else f"\\u{ord(c):04x}" for c in letters)  # fmt: skip

    return text and ESCAPED.sub(decoded, text)


def about(**fields: Any) -> dict[str, Any]:
    """What an event is about, for `extra`: fields of its JSON, unseen in its line of text."""
    return {"about": fields}


def ids(of: dict[str, Any]) -> str:
    """The ids of a row, as lines of the log begin: `job=…`, or each with its column's name."""
    if len(of) == 1:
        return f"job={next(iter(of.values()))}"
    return " ".join(f"{name}={value}" for name, value in of.items())


def event_of(template: str) -> str | None:
    """The name of an event by the text of its log call; None where it is no event of ours."""
    return EVENTS.get(template.partition(": ")[0].partition(" (")[0])


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
    """The same event as a JSON object: time, level, event, pid, message, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        said = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": event_of(str(record.msg)),
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
    # Lines that cannot be written (full disk, pipe without a reader) are dropped: logging would
    # print it on standard error, with a traceback and its secrets.
    logging.raiseExceptions = False
    # Skip data that our lines do not show (see "Optimization" in the docs of logging).
    logging._srcfile, logging.logThreads, logging.logMultiprocessing = None, False, False
    handler = logging.StreamHandler(sys.stdout)
    formatter = OneObject if settings.LOG_FORMAT == "json" else OneLine
    handler.setFormatter(formatter(settings))
    root = logging.getLogger("listener")
    root.handlers, root.propagate = [handler], False
    root.setLevel(settings.LOG_LEVEL)
    for said in settings.WARNINGS:
        root.warning("설정: %s", said)
