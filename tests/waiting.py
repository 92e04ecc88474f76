"""Waiting for events by polling, and stages that wait for the test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.stage_api import StageApi
from demo.stage_server import Answer
from heartbeat import ALIVE, heartbeats

# Long enough for a busy machine; nothing waits this long unless it fails.
PATIENCE = 60.0

# The address of a database that is not there: refused at once.
AWAY = {"DB_HOST": "127.0.0.1", "DB_PORT": 1}
# The `program` of a listener whose retries do not come at once by chance.
LONGEST_WAITS = Path(__file__).with_name("longest_waits.py")
# How pg_stat_activity shows a claim.
CLAIM = "EXECUTE claim("
# The query of an idle listener after a claim.
NEXT_DUE = "min(coming.due_at)"
LISTENING = "LISTEN 'job_state_changed' 시작"
RECONNECTING = "재연결 시도"
LISTENERS = "datname = current_database() AND application_name LIKE 'job-state-listener run %%'"


def until(predicate: Callable[[], object], what: str, timeout: float = PATIENCE):
    """Call `predicate` until its value is true; that value."""
    end = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        threading.Event().wait(0.02)
    return value


def wait_until_idle(directory: Path, listeners: int = 1) -> None:
    """Block until so many listeners have looked for due calls, found none, and wait."""

    def waiting() -> bool:
        beats = heartbeats(str(directory / "heartbeats"))
        doing = [beat.doing for beat in beats if beat.state == ALIVE]
        return doing == ["waiting for a job to change"] * listeners

    until(waiting, f"{listeners} waiting listeners")


def wait_for_sweeps(database, listeners: int = 1, times: int = 3) -> None:
    """Block until each listener has looked for due calls `times` more times.

    A look is a claim, and perhaps a query after it; polling may see either of the two.
    """
    start = database.value("SELECT clock_timestamp()")
    looks: set[tuple] = set()

    def looked() -> bool:
        looks.update(
            database.rows(
                f"SELECT pid, query_start FROM pg_stat_activity WHERE {LISTENERS}"
                " AND (query LIKE %s OR query LIKE %s) AND query_start > %s",
                f"%{CLAIM}%",
                f"%{NEXT_DUE}%",
                start,
            )
        )
        by_pid = [pid for pid, _ in looks]
        return sum(by_pid.count(pid) >= 2 * times for pid in set(by_pid)) >= listeners

    until(looked, f"{times} sweeps of {listeners} listeners")


def backends(database) -> list[int]:
    """The server processes of the listeners that are connected."""
    return [row.pid for row in database.rows(f"SELECT pid FROM pg_stat_activity WHERE {LISTENERS}")]


def is_gone(pid: int) -> bool:
    """Whether a process has ended. A zombie, which nobody has reaped, counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def terminate_backends(database) -> None:
    """Terminate the sessions of all listeners, once there is one."""
    until(lambda: backends(database), "a connected listener")
    database.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {LISTENERS}")


@contextmanager
def gate(
    api: StageApi, stage: str = "vlm_analyze", answer: Answer | None = None
) -> Iterator[threading.Event]:
    """Keep calls of a stage waiting until the event is set; then give `answer`, or work."""
    opened = threading.Event()

    def wait(_request) -> Answer | None:
        opened.wait(PATIENCE)
        return answer

    api.on(stage, wait)
    try:
        yield opened
    finally:
        opened.set()


def wait_for_call(api: StageApi, job: str, count: int = 1):
    """The job's `count`th request, as soon as it has arrived."""
    api.wait_for(lambda api: len(api.calls(job)) >= count, PATIENCE)
    return api.calls(job)[count - 1]
