"""ALERT_COMMAND: told of what needs a person, beside the loop: a program that fails or hangs costs
the listener nothing but a line in its log. What happens to many jobs of a stage is told once, and
then counted.
"""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import IO, Any

import config

log = logging.getLogger("listener.alerts")

TIME_LIMIT = 10.0  # seconds for one run
AT_ONCE = 4
LONGEST_QUEUE = 1000
# Seconds after an alert in which more of the same are only counted.
EPISODE = 600.0


@dataclass
class Run:
    """One run of the command, and the file that takes what it prints."""

    process: subprocess.Popen
    output: IO[bytes]
    until: float  # time.monotonic()

    def end_if_over(self) -> bool:
        """End it where its time is over; whether it has ended."""
        if self.process.poll() is None and time.monotonic() < self.until:
            return False
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
            self.process.wait()
            log.error("알림 명령 실패: %.0f초 안에 끝나지 않아 중단함", TIME_LIMIT)
        elif self.process.returncode:
            self.output.seek(0)
            said = self.output.read(300).decode(errors="replace").strip()
            log.error("알림 명령 실패: 종료 코드 %d: %s", self.process.returncode, said)
        self.output.close()
        return True


@dataclass
class Episode:
    """What was told of a stage, and how much more of it has come since."""

    until: float  # time.monotonic() at which that is told
    said: dict[str, Any] = field(default_factory=dict)  # the last of it
    count: int = 0


class Alerts:
    """Runs ALERT_COMMAND, at most AT_ONCE at a time, and never waits for it."""

    def __init__(self, settings: SimpleNamespace):
        self.command: list[str] = settings.ALERT_COMMAND or []
        self.waiting: deque[bytes] = deque()
        self.running: list[Run] = []
        self.episodes: dict[tuple[str, Any], Episode] = {}

    def send(self, event: str, text: str, **details: Any) -> None:
        """Give the command a JSON object on its standard input: event, text and `details`.

        More of the same event and stage within EPISODE is told as one, with its `count`.
        """
        said = {"event": event, "text": text, **details}
        key = event, details.get("stage")
        if episode := self.episodes.get(key):
            episode.said, episode.count = said, episode.count + 1
            return
        self.episodes[key] = Episode(time.monotonic() + EPISODE)
        self.put(said)

    def recovered(self, event: str, stage: str, text: str) -> None:
        """What was told of `stage` is over."""
        self.episodes.pop((event, stage), None)
        self.put({"event": "recovered", "text": f"{stage}: {text}", "stage": stage, "of": event})

    def put(self, said: dict[str, Any]) -> None:
        if not self.command:
            return
        if len(self.waiting) >= LONGEST_QUEUE:
            log.error("알림 대기열이 가득 차 버림: %s", said["text"])
            return
        self.waiting.append(json.dumps(said, default=str, ensure_ascii=False).encode() + b"\n")
        self.look()

    def end_episodes(self, now: float) -> None:
        """Tell of what was counted, once its time has come."""
        for key, episode in list(self.episodes.items()):
            if now < episode.until:
                continue
            del self.episodes[key]
            if episode.count:
                if now < math.inf:
                    self.episodes[key] = Episode(now + EPISODE)
                text = f"{episode.count} more of the same, the last: {episode.said['text']}"
                self.put(episode.said | {"text": text, "count": episode.count})

    @property
    def pids(self) -> list[int]:
        return [run.process.pid for run in self.running]

    @property
    def next_look(self) -> float:
        """time.monotonic() at which a run that has not ended is ended, or more is told."""
        times = [run.until for run in self.running]
        times += [episode.until for episode in self.episodes.values() if episode.count]
        return min(times, default=math.inf)

    def look(self) -> bool:
        """End what is over, start what waits; whether something still runs."""
        if any(time.monotonic() >= episode.until for episode in self.episodes.values()):
            self.end_episodes(time.monotonic())
        self.running = [run for run in self.running if not run.end_if_over()]
        while self.waiting and len(self.running) < AT_ONCE:
            self.start(self.waiting.popleft())
        return bool(self.running)

    def start(self, said: bytes) -> None:
        # Data goes to standard input alone: no shell, no argument, no variable can be made of it.
        environ = {name: value for name, value in os.environ.items() if not is_secret(name)}
        try:
            output = scratch_file()
            # A file, and no pipe that could be full where nobody reads it.
            with scratch_file() as given:
                given.write(said)
                given.seek(0)
                process = subprocess.Popen(
                    self.command, stdin=given, stdout=output, stderr=output,
                    env=environ, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            log.error("알림 명령 실패: %s: %s", self.command[0], error.strerror)
            return
        self.running.append(Run(process, output, time.monotonic() + TIME_LIMIT))

    def close(self, hurry: bool = False) -> None:
        """Let what waits and what runs come to its end, which TIME_LIMIT brings about.

        Args:
            hurry: what waits is logged as not sent, and what runs goes on by itself.
        """
        self.end_episodes(math.inf)
        while hurry and self.waiting:
            log.error("중지하느라 보내지 못한 알림: %s", self.waiting.popleft().decode().strip())
        while not hurry and self.look():
            time.sleep(0.05)


def scratch_file() -> IO[bytes]:
    """A file without a name; in memory where that is possible, so on a full or read-only disk."""
    with contextlib.suppress(AttributeError, OSError):  # not on macOS
        return os.fdopen(os.memfd_create("alert"), "w+b")
    return tempfile.TemporaryFile()


def is_secret(name: str) -> bool:
    """Whether an environment variable may hold a password, in a URL or by itself."""
    return name in config.SECRET or name.startswith(("STAGE_API_URL", "PGPASS"))
