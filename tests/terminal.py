"""A pseudo-terminal of a given size in which a command runs."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import commands
from waiting import PATIENCE, until

import config

HOME = "\033[H"
CODES = re.compile(r"\033\[[0-9;?]*[A-Za-z]")


class Terminal:
    """What `python listener.py …` draws on it, and what is typed.

    Args:
        program: what Python runs instead of listener.py.
    """

    def __init__(self, environ: dict[str, str], directory: Path, *args: str, size=(80, 24),
                 program: tuple[str, ...] = (str(commands.ROOT / "listener.py"),)):  # fmt: skip
        self.columns, self.rows = size
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        ours = {k: v for k, v in os.environ.items() if k not in config.SETTINGS}
        ours = {k: v for k, v in ours.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, *program, *args],
            env=ours | {"TERM": "xterm"} | environ,
            cwd=directory,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        written = b""
        while True:
            try:
                read = os.read(self.master, 65536)
            except OSError:  # EIO: nobody has it open any more
                return
            if not read:
                return
            written += read
            self.output = written.decode(errors="replace").replace("\r\n", "\n")

    @property
    def pictures(self) -> list[str]:
        """The pictures that are complete, without colours."""
        return [CODES.sub("", drawn) for drawn in self.output.split(HOME)[1:-1]]

    def wait_for(self, text: str) -> str:
        """A picture drawn from now on that has `text` in it."""
        before = len(self.pictures)
        return until(
            lambda: next((p for p in self.pictures[before:] if text in p), None),
            f"{text!r} in {self.output[-2000:]!r}",
        )

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self) -> int:
        """The exit code, once all that was drawn is read."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(PATIENCE)
        os.close(self.master)
