"""The listener processes of a chaos run, and the supervisor that starts them again."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import config
from chaos.history import Exit, Listening
from demo.terminal import CHILD, GUARDIAN

STARTED = re.compile(r"Job State Listener 시작: worker=(\S+)")
LISTENING = "LISTEN 'job_state_changed' 시작"
# The last line of a traceback. A worker that was frozen between claim and POST says it like this,
# and has not sent anything.
BUG = re.compile(
    r"^    \| (?!TimeoutError: the stage function used up)[\w.]+(Error|Exception|Exit)\b"
)
RESTART_DELAY = 0.3  # seconds
PATIENCE = 40.0  # seconds, for a stop


def environment(settings: dict[str, object]) -> dict[str, str]:
    """What a listener is told: these settings, and the defaults of all others, whatever the
    caller's environment and `.env` say."""
    given = {name: default or "" for name, (default, _) in config.SETTINGS.items()}
    given |= {name: str(value) for name, value in settings.items()}
    return os.environ | given | {"PYTHONIOENCODING": "utf-8"}


class Listener:
    """One place for `python listener.py run`; its process comes and goes.

    workers: how many worker processes it has; more than one means a parent and its children.
    """

    def __init__(self, slot: int, workers: int, environ: dict[str, str], directory: Path):
        self.slot, self.workers, self.environ = slot, workers, environ
        self.log = directory / f"listener-{slot}.log"
        self.asked = False  # sent SIGTERM
        self.ready = False  # a worker has started
        self.started = self.ended = 0.0
        self.names: list[str] = []
        self.listening: list[Listening] = []
        self.bugs: list[str] = []
        self.process: subprocess.Popen | None = None
        self.guardians: dict[int, subprocess.Popen] = {}  # by process group

    def start(self) -> None:
        command = [sys.executable, "listener.py", "run", "--workers", str(self.workers)]
        self.asked, self.ready, self.started = False, False, time.time()
        self.process = subprocess.Popen(command, env=self.environ, **CHILD)
        # Should this program be killed, or should only a parent have been.
        guard = ["sh", "-c", GUARDIAN, str(self.process.pid)]
        silent = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.guardians[self.process.pid] = subprocess.Popen(guard, **silent)
        threading.Thread(target=self.read, args=(self.process.stdout,), daemon=True).start()

    def read(self, lines) -> None:
        with self.log.open("a") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if found := STARTED.search(line):
                    self.names.append(found[1])
                    self.ready = True
                elif LISTENING in line:
                    self.listening.append(Listening(self.slot, time.time()))
                elif BUG.search(line):
                    self.bugs.append(f"listener {self.slot}: {line.strip()[:300]}")

    def parent(self) -> list[int]:
        """The pid of the process that was started, if it runs."""
        process = self.process
        return [process.pid] if process else []

    def pids(self) -> list[int]:
        """Those of the worker processes."""
        found = self.parent()
        if found and self.workers > 1:
            with suppress(OSError):
                path = Path(f"/proc/{found[0]}/task/{found[0]}/children")
                return [int(pid) for pid in path.read_text().split()]
            return []
        return found

    def terminate(self) -> None:
        self.asked = True
        for pid in self.parent():
            os.kill(pid, signal.SIGTERM)

    def dismiss_guardians(self) -> None:
        """Of groups that are gone: their number may soon be another's."""
        for group, guardian in list(self.guardians.items()):
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                guardian.kill()
                guardian.wait()
                guardian.stdin.close()
                del self.guardians[group]

    def end_group(self) -> None:
        """Whatever is left of all its processes."""
        self.dismiss_guardians()
        for guardian in self.guardians.values():
            guardian.communicate()


class Supervisor:
    """Starts the listeners, and each one again when it ends, as systemd would."""

    def __init__(self, listeners: list[Listener]):
        self.listeners = listeners
        self.exits: list[Exit] = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self) -> None:
        for listener in self.listeners:
            listener.start()
        self.thread.start()

    def watch(self) -> None:
        while not self.stopping.wait(0.05):
            for listener in self.listeners:
                listener.dismiss_guardians()
                self.note_exit(listener)
                if not listener.process and time.time() > listener.ended + RESTART_DELAY:
                    listener.start()

    def note_exit(self, listener: Listener) -> None:
        process = listener.process
        if process is None or process.poll() is None:
            return
        how = {"asked": listener.asked, "ready": listener.ready, "code": process.returncode}
        listener.ended = time.time()
        how |= {"started": listener.started, "at": listener.ended}
        self.exits.append(Exit(listener.slot, process.pid, **how))
        listener.process = None

    def stop(self) -> None:
        """Stop all of them as an operator would, and note how they end."""
        self.end_watch()
        running = [listener for listener in self.listeners if listener.process]
        for listener in running:
            if not listener.asked:  # a second signal would be a kill
                listener.terminate()
        for listener in running:
            with suppress(subprocess.TimeoutExpired):
                listener.process.wait(PATIENCE)
            self.note_exit(listener)
            if listener.process:
                os.killpg(listener.process.pid, signal.SIGKILL)
                listener.bugs.append(f"listener {listener.slot} did not stop on SIGTERM")

    def end_watch(self) -> None:
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join()

    def close(self) -> None:
        self.end_watch()
        for listener in self.listeners:
            listener.end_group()
