"""Runs ALERT_COMMAND for events that need a person. The listener does not wait for it: a command
that fails or hangs is run again later, and costs a line in the log, and a second where it cannot
be killed. An event that happens to many jobs of a stage is sent once and then counted.
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
from signals import Signals

log = logging.getLogger("listener.alerts")

TIME_LIMIT = 10.0  # seconds for one run
STOP_LIMIT = 5.0  # seconds for all runs once a stop is requested
AT_ONCE = 4
LONGEST_QUEUE = 1000
TRIES = 3
TRY_AGAIN_AFTER = 30.0  # seconds
# The beginning and the end of these are marked in the database, and one listener tells them. So
# they are sent each time.
MARKED = ("waiting", "refusing", "stalled")
# Seconds after an alert during which more of the same event and stage are only counted.
EPISODE = 600.0


@dataclass
class Message:
    """What the command gets."""

    about: tuple[str, Any]  # event, stage
    is_recovered: bool  # says that it is over
    said: bytes
    tries: int = 0
    at: float = 0.0  # time.monotonic() of the next try


@dataclass
class Run:
    """One run of the command, and the file that takes what it prints."""

    process: subprocess.Popen
    message: Message
    output: IO[bytes]
    until: float  # time.monotonic()

    def end_if_over(self) -> bool:
        """Kill the command if its time is over; whether it has ended."""
        if self.process.poll() is None and time.monotonic() < self.until:
            return False
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
            # A process of another user cannot be killed, and one that is blocked in the kernel ends
            # later. So wait for a second at most.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
            log.error("알림 명령 실패: %.0f초 안에 끝나지 않아 중단함", TIME_LIMIT)
        elif self.process.returncode:
            self.output.seek(0)
            said = self.output.read(300).decode(errors="replace").strip()
            log.error("알림 명령 실패: 종료 코드 %d: %s", self.process.returncode, said)
        self.output.close()
        return True

    @property
    def has_failed(self) -> bool:
        return self.process.returncode != 0


@dataclass
class Episode:
    """An event that was sent for a stage, and how many more there were since."""

    until: float  # time.monotonic() at which the count is sent
    said: dict[str, Any] = field(default_factory=dict)  # the last one
    count: int = 0
    recovered: dict[str, Any] | None = None  # to be sent at its end, unless it happens again


class Alerts:
    """Runs ALERT_COMMAND, at most AT_ONCE at a time, and never waits for it."""

    def __init__(self, settings: SimpleNamespace):
        self.command: list[str] = settings.ALERT_COMMAND or []
        self.waiting: deque[Message] = deque()
        self.again: deque[Message] = deque()  # those that have failed, by the time of the next try
        self.running: list[Run] = []
        self.is_closing = False
        self.start_error: str | None = None  # why the last start of the command failed
        self.episodes: dict[tuple[str, Any], Episode] = {}

    def send(self, event: str, text: str, **details: Any) -> None:
        """Give the command a JSON object on its standard input: event, text and `details`.

        More of the same event and stage within EPISODE are sent as one, with their `count`. Those
        of MARKED are sent each time.
        """
        said = {"event": event, "text": text, **details}
        key = event, details.get("stage")
        if event in MARKED:
            self.put(said)
            return
        if episode := self.episodes.get(key):
            episode.said, episode.count, episode.recovered = said, episode.count + 1, None
            return
        self.episodes[key] = Episode(time.monotonic() + EPISODE)
        self.put(said)

    def send_recovered(
        self, event: str, stage: str | None, text: str, at_once: bool = True
    ) -> None:
        """Send that an event of `stage` is over.

        Args:
            stage: None: of none in particular.
            at_once: False: not before the end of EPISODE, and not if it happens again until then.
        """
        text = f"{stage}: {text}" if stage else text
        said = {"event": "recovered", "text": text, "stage": stage, "of": event}
        episode = self.episodes.get((event, stage))
        if episode and not at_once:
            episode.recovered = said
            return
        self.episodes.pop((event, stage), None)
        self.put(said)

    def put(self, said: dict[str, Any]) -> None:
        if not self.command:
            return
        is_recovered = said["event"] == "recovered"
        about = (said["of"] if is_recovered else said["event"], said.get("stage"))
        self.give_up(about, not is_recovered)
        if len(self.waiting) + len(self.again) >= LONGEST_QUEUE:
            log.error("대기열이 가득 차서 버린 알림: %s", said["text"])
            return
        text = json.dumps(said, default=str, ensure_ascii=False)
        # An error may hold half of a surrogate pair, which UTF-8 has not.
        encoded = text.encode("utf-8", "backslashreplace") + b"\n"
        self.waiting.append(Message(about, is_recovered, encoded))
        self.run()

    def end_episodes(self, now: float) -> None:
        """Send the counts of episodes that are over, and what has recovered."""
        over = [(key, one) for key, one in self.episodes.items() if now >= one.until]
        for key, _ in over:  # first, as put() runs others that are over
            del self.episodes[key]
        for key, episode in over:
            if episode.count:
                if now < math.inf and not episode.recovered:
                    self.episodes[key] = Episode(now + EPISODE)
                text = f"{episode.count} more of the same, the last: {episode.said['text']}"
                self.put(episode.said | {"text": text, "count": episode.count})
            if episode.recovered:
                self.put(episode.recovered)

    @property
    def pids(self) -> list[int]:
        return [run.process.pid for run in self.running]

    @property
    def next_run(self) -> float:
        """time.monotonic() at which the next run is to be killed, or what has failed is to be tried
        again, or the next count to be sent.
        """
        times = [run.until for run in self.running] + [one.at for one in self.again]
        episodes = self.episodes.values()
        times += [one.until for one in episodes if one.count or one.recovered]
        return min(times, default=math.inf)

    def run(self) -> bool:
        """Send counts, end finished runs and start waiting ones; whether any is still running."""
        if any(time.monotonic() >= episode.until for episode in self.episodes.values()):
            self.end_episodes(time.monotonic())
        over = [run for run in self.running if run.end_if_over()]
        self.running = [run for run in self.running if run not in over]
        for run in over:
            if run.has_failed:
                self.try_again(run.message)
        while self.again and time.monotonic() >= self.again[0].at:
            self.waiting.append(self.again.popleft())
        while len(self.running) < AT_ONCE and (message := self.next_waiting()):
            self.waiting.remove(message)
            self.start(message)
        return bool(self.running)

    def next_waiting(self) -> Message | None:
        """The first message to be sent. Those about the same thing are sent one after the other:
        `recovered` must not arrive before the alert whose command is slow.
        """
        sent = [run.message.about for run in self.running]
        return next((message for message in self.waiting if message.about not in sent), None)

    def try_again(self, message: Message) -> None:
        """Later, as the database may have marked it as told; once more at once where the listener
        ends.
        """
        if self.is_closing and message.tries == 1:
            self.waiting.append(message)
        elif message.tries < TRIES and not self.is_closing:
            message.at = time.monotonic() + TRY_AGAIN_AFTER
            self.again.append(message)
        else:
            log_not_taken(message)

    def give_up(self, about: tuple[str, Any], is_recovered: bool) -> None:
        """Try no alert again that is over, and no `recovered` of what has begun again: it would
        come after the newer message.
        """

        def is_outdated(message: Message) -> bool:
            return (message.about, message.is_recovered) == (about, is_recovered)

        for message in filter(is_outdated, self.again):
            log_not_taken(message)
        self.again = deque(message for message in self.again if not is_outdated(message))
        for message in (*self.waiting, *(run.message for run in self.running)):
            if is_outdated(message):
                message.tries = TRIES

    def start(self, message: Message) -> None:
        message.tries += 1
        # Data goes to standard input only, so it can become no shell command, argument or variable.
        environ = {name: value for name, value in os.environ.items() if not is_secret(name)}
        try:
            output = scratch_file()
            # Output goes to a file: a pipe that is not read could fill up and block the command.
            with scratch_file() as given:
                given.write(message.said)
                given.seek(0)
                process = subprocess.Popen(
                    self.command, stdin=given, stdout=output, stderr=output,
                    env=environ, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.start_error = error.strerror
            log.error("알림 명령 실패: %s: %s", self.command[0], self.start_error)
            self.try_again(message)
            return
        self.running.append(Run(process, message, output, time.monotonic() + TIME_LIMIT))

    def close(self, stop: Signals | None = None) -> None:
        """Wait until all alerts are sent and all runs have ended, each within TIME_LIMIT. What has
        failed is tried once more, at once.

        Args:
            stop: once one is requested: wait for STOP_LIMIT at the most, and not past a second
                request; log what has not been sent by then, and leave runs to themselves.
        """
        self.is_closing = True
        self.waiting.extend(self.again)
        self.again.clear()
        self.end_episodes(math.inf)
        began = time.monotonic()
        while self.run():
            if stop and stop.requested:
                until = max(began, stop.stopped_at) + STOP_LIMIT
                if len(stop.stops) > 1 or time.monotonic() > until:
                    break
            time.sleep(0.05)
        for run in self.running:
            log.error("중지하느라 보내지 못한 알림 (명령이 실행 중): %s",
                      run.message.said.decode().strip())  # fmt: skip
        for message in self.waiting:
            log.error("중지하느라 보내지 못한 알림: %s", message.said.decode().strip())


def log_not_taken(message: Message) -> None:
    log.error("알림 명령이 받지 못한 알림: %s", message.said.decode().strip())


def scratch_file() -> IO[bytes]:
    """A file without a name; in memory if possible, so that no disk has to be writable."""
    with contextlib.suppress(AttributeError, OSError):  # not on macOS
        return os.fdopen(os.memfd_create("alert"), "w+b")
    return tempfile.TemporaryFile()


def is_secret(name: str) -> bool:
    """Whether an environment variable may hold a password, in a URL or by itself."""
    return name in config.SECRET or name.startswith(("STAGE_API_URL", "PGPASS"))
