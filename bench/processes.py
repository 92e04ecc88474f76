"""Starts the processes of a peer, measures them through /proc, and stops them."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

STOP_LIMIT = 15  # seconds


class Processes:
    """The processes of one peer; a context manager that leaves none of them behind."""

    def __init__(self, commands: list[list[str]], environ: dict[str, str], directory: Path):
        self.log_path = directory / "log"
        self.log = self.log_path.open("ab")
        self.started = time.monotonic()
        self.processes = [
            subprocess.Popen(
                command, env=os.environ | environ | {"BENCH_NUMBER": str(number)}, cwd=directory,
                stdout=self.log, stderr=self.log, start_new_session=True,
            )
            for number, command in enumerate(commands)
        ]  # fmt: skip

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + STOP_LIMIT
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.log.close()

    def check(self) -> None:
        """Raises RuntimeError with the end of the log where a process has ended."""
        ended = [process.returncode for process in self.processes if process.poll() is not None]
        if ended:
            raise RuntimeError(f"ended with {ended}:\n{self.log_text()[-2000:]}")

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def pids(self) -> list[int]:
        """The pids of all processes and of what they have started."""
        return [pid for process in self.processes for pid in descendants(process.pid)]

    def memory(self) -> float:
        """MiB of all processes together; of pages that several share, each has its part (PSS)."""
        rollups = [_read(pid, "smaps_rollup") for pid in self.pids()]
        return sum(int(re.search(r"^Pss: +(\d+)", text, re.M)[1]) for text in rollups) / 1024

    def cpu(self) -> float:
        """Seconds of CPU time used so far."""
        return sum(tree_seconds(process.pid) for process in self.processes)


def descendants(pid: int) -> list[int]:
    """`pid` and all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time in nanosecond resolution; /proc/PID/stat has ticks of 10 ms."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def seconds_of_ended(pid: int) -> float:
    """CPU time of the children of `pid` that have ended, in ticks of 10 ms."""
    cutime, cstime = _read(pid, "stat").rpartition(")")[2].split()[13:15]
    return (int(cutime) + int(cstime)) / os.sysconf("SC_CLK_TCK")


def tree_seconds(pid: int) -> float:
    """CPU time of `pid` and all that it has started."""
    spent = 0.0
    for one in descendants(pid):
        with suppress(OSError):
            spent += cpu_seconds(one) + seconds_of_ended(one)
    return spent


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
