"""Our listener, as its users run it: python listener.py install, python listener.py run."""

import os
import subprocess
import sys
from pathlib import Path

from bench.database import Database
from bench.peers.base import ROOT, Peer, Shape

LISTENER = [sys.executable, str(ROOT / "listener.py")]


class Ours(Peer):
    name = "ours"
    kind = "ours"
    best = (Shape(1, 2), Shape(1, 4), Shape(1, 8), Shape(1, 16), Shape(1, 32))
    options: tuple[str, ...] = ()

    def install(self, database: Database) -> None:
        subprocess.run([*LISTENER, "install", *self.options], env=os.environ | database.environ(),
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # fmt: skip

    def commands(self, shape: Shape) -> list[list[str]]:
        """A listener has one worker for each call in flight."""
        return [[*LISTENER, "run", "--workers", str(shape.in_flight)]] * shape.processes

    def environ(self, database: Database, api: str, directory: Path) -> dict[str, str]:
        (directory / ".env").touch()  # read instead of the developer's own
        told = {"STAGE_API_URL": api, "HEARTBEAT_DIR": str(directory / "heartbeats")}
        return database.environ() | told


class OursQuiet(Ours):
    name = "ours, no NOTIFY"
    kind = "trigger"
    options = ("--no-notify",)


class OursOwed(Ours):
    name = "ours, NOTIFY where owed"
    kind = "trigger"
    options = ("--notify-owed",)
