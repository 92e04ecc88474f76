"""Reaps orphans where the listener is process 1 of a container without an init."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def reap_orphans(ours: Iterable[int]) -> list[int]:
    """Reap the ended children that are not `ours`; their pids.

    What a stage function or ALERT_COMMAND started and left becomes a child of process 1 when its
    parent ends. A process with another number has no such children.
    """
    if os.getpid() != 1:
        return []
    reaped, kept = [], set(ours)
    with contextlib.suppress(OSError):  # no /proc, or one without this file
        for pid in map(int, Path("/proc/1/task/1/children").read_text().split()):
            with contextlib.suppress(ChildProcessError):
                if pid not in kept and os.waitpid(pid, os.WNOHANG)[0]:
                    reaped.append(pid)
    return reaped
