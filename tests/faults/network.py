"""A network that can lose everything: a namespace of its own, joined to this machine by a cable."""

import os
import shutil
import subprocess
from contextlib import suppress

import pytest

IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
NOBODY = "02:00:00:00:00:01"  # a hardware address that nobody has


def require_root(*programs: str) -> None:
    """Skip the test where this machine cannot do what it needs."""
    if os.geteuid():
        pytest.skip("only root can make namespaces")
    for program in programs:
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            pytest.skip(f"{program} is not installed")


class Network:
    """A context manager. `here` is this machine's address, `there` that of the namespace.

    within: the command that runs another one in there.
    """

    def __init__(self):
        require_root("ip")
        number = os.getpid()
        self.name, self.cable = f"jsl{number}", f"jsl{number}"
        net = f"10.{203 + number % 50}.{number // 64 % 256}"
        self.here, self.there = f"{net}.{number % 64 * 4 + 1}", f"{net}.{number % 64 * 4 + 2}"
        self.within = (IP, "netns", "exec", self.name)

    def ip(self, *words: str) -> None:
        done = subprocess.run([IP, *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def __enter__(self) -> "Network":
        try:
            self.ip("netns", "add", self.name)
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        try:
            peer = ("peer", "name", "cable", "netns", self.name)
            self.ip("link", "add", self.cable, "type", "veth", *peer)
            self.ip("address", "add", f"{self.here}/30", "dev", self.cable)
            self.ip("link", "set", self.cable, "up")
            self.ip("-n", self.name, "address", "add", f"{self.there}/30", "dev", "cable")
            for device in ("cable", "lo"):
                self.ip("-n", self.name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.ip("link", "delete", self.cable)
        self.ip("netns", "delete", self.name)

    def lose_everything(self) -> None:
        """Every packet of both sides goes to nobody; neither is told."""
        self._neighbours("replace", "lladdr", NOBODY, "nud", "permanent")

    def mend(self) -> None:
        self._neighbours("delete")

    def _neighbours(self, what: str, *how: str) -> None:
        self.ip("neighbour", what, self.there, *how, "dev", self.cable)
        self.ip("-n", self.name, "neighbour", what, self.here, *how, "dev", "cable")
