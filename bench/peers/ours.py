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
    best = (Shape(1), Shape(2), Shape(3), Shape(4), Shape(6))

    def shape(self, in_flight: int) -> Shape:
        """One call in flight for each process."""
        return Shape(in_flight, 1)

    def install(self, database: Database) -> None:
        environ = os.environ | database.environ()
        subprocess.run([*LISTENER, "install", *self.options], env=environ, check=True,
                       cwd=ROOT, stdout=subprocess.DEVNULL)  # fmt: skip

    options: tuple[str, ...] = ()

    def commands(self, shape: Shape) -> list[list[str]]:
        return [[*LISTENER, "run", "--workers", str(shape.processes)]]

    def environ(self, database: Database, api: str, directory: Path) -> dict[str, str]:
        (directory / ".env").touch()  # so that nobody's own has a say
        told = {"STAGE_API_URL": api, "HEARTBEAT_DIR": str(directory / "heartbeats")}
        return database.environ() | told


class OursQuiet(Ours):
    """With a trigger that only writes the debt; the workers poll."""

    name = "ours, no NOTIFY"
    options = ("--no-notify",)
    hears = False

    def unavailable(self) -> str | None:
        done = subprocess.run([*LISTENER, "install", "--help"], capture_output=True, text=True)
        return None if "--no-notify" in done.stdout else "install has no --no-notify"
