"""The listener processes of a chaos run, and the supervisor that starts them again."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from chaos.history import Exit, Listening
from demo.terminal import CHILD, GUARDIAN

STARTED = re.compile(r"Job State Listener 시작: listener=(\S+)")
LISTENING = "LISTEN 'job_state_changed' 시작"
ORPHAN = "리스너가 사라져 워커가 결과를 기록함"
# The last line of a traceback.
BUG = re.compile(r"^    \| [\w.]+(Error|Exception|Exit)\b")
RESTART_DELAY = 0.3  # seconds
PATIENCE = 40.0  # seconds, for a stop


class Listener:
    """A slot for a listener, whose process is started again when it ends.

    program: the arguments of Python that run it.
    """

    def __init__(self, slot: int, workers: int, environ: dict[str, str], directory: Path,
                 program: Sequence[str] = ("listener.py",)):  # fmt: skip
        self.slot, self.workers, self.environ, self.program = slot, workers, environ, program
        self.log = directory / f"listener-{slot}.log"
        self.asked = False  # sent SIGTERM
        self.ready = False  # it has logged that it starts
        self.started = self.ended = 0.0
        self.names: list[str] = []
        self.listening: list[Listening] = []
        self.bugs: list[str] = []
        self.orphans = 0  # results that a worker wrote, as its listener was gone
        self.process: subprocess.Popen | None = None
        self.guardians: dict[int, subprocess.Popen] = {}  # by session

    def start(self) -> None:
        command = [sys.executable, *self.program, "run", "--workers", str(self.workers)]
        self.asked, self.ready, self.started = False, False, time.time()
        self.process = subprocess.Popen(command, env=self.environ, **CHILD)
        # The guardian ends what is left where this program, or only the listener, is killed.
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
                elif ORPHAN in line:
                    self.orphans += 1
                elif BUG.search(line):
                    self.bugs.append(f"listener {self.slot}: {line.strip()[:300]}")

    def pids(self) -> list[int]:
        """The pid of the listener, and those of its workers; empty while it does not run."""
        process = self.process
        if process is None:
            return []
        workers = ""
        with suppress(OSError):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        return [process.pid, *map(int, workers.split())]

    def terminate(self) -> None:
        self.asked = True
        for pid in self.pids()[:1]:
            os.kill(pid, signal.SIGTERM)

    def dismiss_guardians(self) -> None:
        """End guardians whose session is gone, as its number may be given to another one."""
        ended = [sid for sid in self.guardians if self.process is None or sid != self.process.pid]
        there = sessions() if ended else set()
        for session in set(ended) - there:
            guardian = self.guardians.pop(session)
            guardian.kill()
            guardian.wait()
            guardian.stdin.close()

    def end_all(self) -> None:
        """Kill what is left of all its processes."""
        self.dismiss_guardians()
        for guardian in self.guardians.values():
            guardian.communicate()


def sessions() -> set[int]:
    """The session ids of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _parent, _group, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found.add(int(session))
    return found


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
                listener.process.kill()
                listener.bugs.append(f"listener {listener.slot} did not stop on SIGTERM")

    def end_watch(self) -> None:
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join()

    def close(self) -> None:
        self.end_watch()
        for listener in self.listeners:
            listener.end_all()
