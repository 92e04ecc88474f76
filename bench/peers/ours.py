"""Our listener, as its users run it: python listener.py install, python listener.py run.

`before` is another checkout of it, the directory named by BENCH_BEFORE.
"""

import os
import subprocess
import sys
from pathlib import Path

from bench.database import Database
from bench.peers.base import ROOT, Peer, Shape


class Ours(Peer):
    name = "ours"
    kind = "ours"
    best = (Shape(1, 2), Shape(1, 4), Shape(1, 8), Shape(1, 16), Shape(1, 32))
    options: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return ROOT

    @property
    def listener(self) -> list[str]:
        return [sys.executable, str(self.root / "listener.py")]

    def install(self, database: Database) -> None:
        environ = os.environ | database.environ()
        subprocess.run([*self.listener, "install", *self.options], env=environ, check=True,
                       cwd=self.root, stdout=subprocess.DEVNULL)  # fmt: skip

    def commands(self, shape: Shape) -> list[list[str]]:
        """A listener has one worker for each call in flight."""
        return [[*self.listener, "run", "--workers", str(shape.in_flight)]] * shape.processes

    def environ(self, database: Database, api: str, directory: Path) -> dict[str, str]:
        (directory / ".env").touch()  # read instead of the developer's own
        told = {"STAGE_API_URL": api, "HEARTBEAT_DIR": str(directory / "heartbeats")}
        return database.environ() | told | {"PYTHONPATH": str(self.root)}


class OursQuiet(Ours):
    """Installed with --no-notify, so the listener polls."""

    name = "ours, no NOTIFY"
    options = ("--no-notify",)
    hears = False


class OursOwed(Ours):
    """A trigger that notifies only where a call is owed. To the listener it makes no difference."""

    name = "ours, NOTIFY where owed"
    kind = "reference"
    options = ("--notify-owed",)
    calls = hears = False


class Before(Ours):
    """The version before a change that is measured."""

    name = "before"
    kind = "before"

    @property
    def root(self) -> Path:
        return Path(os.environ["BENCH_BEFORE"]).resolve()

    def connections(self, shape: Shape) -> int:
        """In the first design, which had no workers.py, each worker had a connection."""
        one = (self.root / "workers.py").exists()
        return shape.processes * (1 if one else shape.in_flight)

    def unavailable(self) -> str | None:
        if not os.environ.get("BENCH_BEFORE"):
            return "BENCH_BEFORE names no other checkout"
        there = (self.root / "listener.py").exists()
        return None if there else f"BENCH_BEFORE: no listener.py in {self.root}"
