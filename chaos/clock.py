"""The clock of the database servers of a run, which libfaketime sets back."""

import os
import tempfile
import time
from pathlib import Path

# Seconds of one step. It is longer than any run, so that audit.py can take the steps out of each
# time of the database.
STEP = 86400
# Seconds after which every process has read the file again.
READ_AGAIN = 1.1
LIBRARY = "libfaketime.so.1"
PLACES = ("lib/*/faketime", "lib/faketime", "lib64/faketime", "local/lib/faketime")


def library() -> Path | None:
    """libfaketime, where it is installed; Debian's package has this name."""
    return next(
        (file for place in PLACES for file in Path("/usr").glob(f"{place}/{LIBRARY}")), None
    )


class Clock:
    """A context manager. The servers that are started with `environ` show this clock's time."""

    def __init__(self, preloaded: Path):
        self.back = 0
        # The user of the servers may not be allowed into our TMPDIR.
        self.directory = tempfile.TemporaryDirectory(prefix="chaos-clock-", dir="/tmp")
        os.chmod(self.directory.name, 0o755)
        self.file = Path(self.directory.name) / "clock"
        self.environ = {
            "LD_PRELOAD": str(preloaded),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            # Once in each second. To read it at each call would crash a server now and then: the
            # handler of a signal asks for the time, too, and must not allocate memory.
            "FAKETIME_CACHE_DURATION": "0",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",  # kill -9 would leave it behind; 0.9.10 ignores this
            "NO_FAKE_STAT": "1",
        }

    def __enter__(self) -> "Clock":
        self.set_back(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.cleanup()

    def set_back(self, seconds: int) -> None:
        """Set it so many seconds further back than it is, and return when all servers see it. Who
        must not see another time than the others meanwhile is to be frozen.
        """
        self.back += seconds
        new = self.file.with_suffix(".new")
        new.write_text(f"-{self.back}\n")
        new.chmod(0o644)
        new.replace(self.file)
        time.sleep(READ_AGAIN)

    def set_right(self) -> None:
        self.set_back(-self.back)
