"""The terminal of the demo: its own lines, and those of the listener and the commands it runs."""

import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from ops.table import clipped, paint

STOP_LIMIT = 10  # seconds for the listener to finish what it has in hand
COLOURS = {
    "ERROR": 31,
    "WARNING": 33,
    "실행 실패": 33,
    "실행 성공": 32,
    "[TRIGGER]": 36,
    "[LISTENER]": 2,
    "▸": 35,
}
KEPT = 12  # lines of a program that is not shown, for when it fails

# In a session of its own, so that a Ctrl-C in the terminal reaches the demo alone.
CHILD = {
    "cwd": Path(__file__).parent.parent,
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "encoding": "utf-8",
    "errors": "replace",
    "start_new_session": True,
}

# Where the demo is killed by SIGKILL, the pipe that this shell reads is closed. The shell then
# kills the listener and its workers, which are process groups of their own in its session.
GUARDIAN = """
read -r _
kill -KILL "-$0"
for file in /proc/[0-9]*/stat; do
    read -r pid rest < "$file" && set -- ${rest##*) } && [ "$4" = "$0" ] && kill -KILL "$pid"
done
"""

signals: list[
    int
] = []  # signals received; checked between steps, so that no step is left half done


class Ended(Exception):
    """The demo cannot go on, for the reason given."""


def take_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: signals.append(number))


def headline(text: str) -> None:
    if signals:
        raise Ended
    print("\n" + paint(clipped(text, columns()), 1))


def show(line: str, colour: int = 0) -> None:
    """Print a line, cut so that the terminal does not wrap it."""
    print(paint(clipped(line, columns()), colour))


def show_log(line: str) -> None:
    """Print a line of a program unchanged."""
    print(paint(line, next((COLOURS[word] for word in COLOURS if word in line), 0)))


def columns() -> int:
    return min(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def run_command(
    name: str, environment: dict[str, str], *arguments: str, quiet: bool = False
) -> None:
    """Run `python listener.py NAME` to its end. Raises Ended where it fails.

    Args:
        quiet: show what it says only where it fails.
    """
    command = [sys.executable, "listener.py", name, *arguments]
    done = subprocess.run(command, env=environment, timeout=30, **CHILD)
    if not quiet or done.returncode:
        for line in done.stdout.splitlines():
            show(line)
    if done.returncode:
        raise Ended(f"./jsl {name} ended with exit code {done.returncode}")


class Listener:
    """`python listener.py run`.

    quiet: whether its lines are shown only where it ends by itself.
    """

    def __init__(self, environment: dict[str, str], workers: int, quiet: bool = False) -> None:
        command = [sys.executable, "listener.py", "run", "--workers", str(workers)]
        self._process = subprocess.Popen(command, env=environment, **CHILD)
        guardian = ["sh", "-c", GUARDIAN, str(self._process.pid)]
        self._guardian = subprocess.Popen(
            guardian, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._quiet, self._kept = quiet, deque(maxlen=KEPT)
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))

    def show(self, seconds: float) -> int | None:
        """Show or keep its lines for `seconds`; its exit code if it has ended, else None."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(Empty):
                self._take(self._lines.get(timeout=left))
        return self._process.poll()

    def _take(self, line: str) -> None:
        if self._quiet:
            self._kept.append(line)
        else:
            show_log(line)

    def show_kept(self) -> None:
        """Print its last lines, if they were not shown."""
        while self._kept:
            show_log(self._kept.popleft())

    def close(self) -> None:
        """Stop it as an operator would; after STOP_LIMIT or at a second signal, by force."""
        if self._guardian.returncode is not None:
            return
        self._process.terminate()
        deadline = time.monotonic() + STOP_LIMIT
        try:
            while self.show(0.1) is None and time.monotonic() < deadline and len(signals) < 2:
                pass
        finally:
            self._guardian.communicate()  # ends the listener and its workers if they still run
            self._process.wait()
            self._reader.join(STOP_LIMIT)
        while not self._lines.empty():
            self._take(self._lines.get())
