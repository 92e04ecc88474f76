"""The heartbeat: a small file for each listener that says what it is doing, and until when that may
last. The listener writes it and `check` reads it; neither uses the database for that.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

log = logging.getLogger("listener.heartbeat")

SIZE = 4096  # bytes, spaces included
LONGEST = 300  # characters of what a listener is doing, each of which may take twelve bytes
# Seconds between attempts to make the file, where that fails.
AGAIN = 1.0
# Marks our files, as HEARTBEAT_DIR may have files of other programs.
SUFFIX = ".heartbeat"
DEAD, HANGING, ALIVE = "dead", "hanging", "alive"


@lru_cache(maxsize=1)
def boot_id() -> str:
    """The id of the present boot: monotonic times of another boot cannot be compared."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Heartbeat:
    """The heartbeat file of this process, which holds a lock on it until it ends: unlike a pid, a
    lock cannot be reused by another process.

    The file keeps its size, so that a full disk cannot leave it empty. Where it cannot be written,
    the listener logs that once and goes on.
    """

    def __init__(self, directory: str, name: str):
        self.path = Path(directory) / f"{name}{SUFFIX}"
        self.file: int | None = None
        self.doing: str | None = None
        self.since: float | None = None
        self.valid_until = 0.0
        self.failed = False
        self.make_at = 0.0  # time.monotonic() before which the file is not made
        self.make()

    def make(self) -> None:
        """Make the file: at the start, and where a cleaner has removed it or its directory."""
        self.leave()
        self.make_at = time.monotonic() + AGAIN
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_dead(str(self.path.parent))
            self.file = make_locked(self.path)
        except OSError as error:
            self.warn(error)

    def is_in_place(self) -> bool:
        return self.file is not None and is_same(self.path, self.file)

    def beat(self, doing: str, seconds: float) -> None:
        """Say that this listener is `doing` something that may take up to `seconds`."""
        now = time.monotonic()
        if doing != self.doing:
            self.doing, self.since = doing, now
        elif abs(now + seconds - self.valid_until) < 1.0:
            return  # the file says the same already
        self.valid_until = now + seconds
        said = {"pid": os.getpid(), "listener": self.path.stem, "doing": doing[:LONGEST]}
        said |= {"since": self.since, "valid_until": self.valid_until, "boot": boot_id()}
        text = json.dumps(said)
        if not self.is_in_place() and now >= self.make_at:
            self.make()
        if self.file is not None:
            try:
                os.pwrite(self.file, text.encode().ljust(SIZE)[:SIZE], 0)
                self.failed = False
            except OSError as error:
                self.warn(error)

    def warn(self, error: OSError) -> None:
        if not self.failed:
            log.warning("heartbeat 파일을 쓸 수 없음 (작업은 계속): %s", error)
        self.failed = True

    def leave(self) -> None:
        """Close the file. A forked child must do so, as its copy would keep the lock."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def close(self) -> None:
        if self.is_in_place():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.leave()


def make_locked(path: Path) -> int:
    """Open and lock `path`; again if another listener's remove_dead() removed it in between."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            os.close(file)
            raise
        if is_same(path, file):
            return file
        os.close(file)


def is_same(path: Path, file: int) -> bool:
    """Whether `path` is the open `file`, and no other one that took its place."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


@dataclass(frozen=True)
class Beat:
    """The content of a heartbeat file; `state` is DEAD, HANGING or ALIVE."""

    listener: str
    pid: int
    state: str
    doing: str
    seconds: float  # since it has been doing that


def heartbeats(directory: str) -> list[Beat]:
    """The heartbeats in `directory`; none where it does not exist.

    Raises:
        OSError: it cannot be read, nor any of its files. (Path.glob would return nothing instead.)
    """
    beats, refused = [], None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(directory)):
            try:
                if name.endswith(SUFFIX):
                    beats.append(read_beat(Path(directory, name)))
            except PermissionError as error:
                refused = error
            except (OSError, ValueError, KeyError, TypeError):
                continue
    if refused and not beats:
        raise refused
    return beats


def carefully(path: str, flags: int) -> int:
    """An opener for files that others may have made: follows no link, waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def read_beat(path: Path) -> Beat:
    with open(path, opener=carefully) as file:
        text = file.read(SIZE)
    if not text and is_locked(path):  # it was made just now, or the disk is full
        return Beat(path.stem, 0, ALIVE, "something that it cannot write down: disk full?", 0.0)
    said = json.loads(text)
    now = time.monotonic()
    if not is_locked(path) or said["boot"] != boot_id():
        state = DEAD
    else:
        state = ALIVE if now <= said["valid_until"] else HANGING
    return Beat(said["listener"], said["pid"], state, said["doing"], max(0.0, now - said["since"]))


def is_locked(path: Path) -> bool:
    """Whether the process that made this file still lives, whatever pid was reused since.

    Raises:
        OSError: it has just ended and removed the file, or the file cannot be read.
    """
    with open(path, opener=carefully) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        if not is_same(path, file.fileno()):
            raise FileNotFoundError(path)
    return False


def remove_dead(directory: str) -> None:
    for path in Path(directory).glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if not is_locked(path):
                path.unlink()
