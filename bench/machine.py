"""Describes the machine, the server and the versions that figures were measured with."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

PACKAGES = ["psycopg2-binary", "requests", "urllib3", "procrastinate", "psycopg", "pgqueuer",
            "awa-pg", "dbos", "oban", "asyncpg", "aiohttp", "uvloop"]  # fmt: skip
# pg-boss needs a newer Node.js than most machines have: package.json installs one.
OWN_NODE = Path(__file__).parent / "node_modules" / ".bin" / "node"
NODE = str(OWN_NODE) if OWN_NODE.exists() else shutil.which("node") or ""
SETTINGS = ["server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers",
            "max_connections", "wal_sync_method"]  # fmt: skip


def machine() -> dict[str, str]:
    """The machine, and its load before the benchmark begins."""
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    memory = _found(r"MemTotal:\s+(\d+)", "/proc/meminfo") or 0
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "CPU": _found(r"model name\s+: (.*)", "/proc/cpuinfo") or platform.processor(),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": load,
        "Python": platform.python_version(),
        "Node.js": _output(NODE, "--version") if NODE else "none",
        "packages": ", ".join(f"{name} {v}" for name in PACKAGES if (v := _version(name))),
    }


def server(conn) -> dict[str, str]:
    """The settings of the server that decide what a commit costs."""
    cursor = conn.cursor()
    values = {}
    for name in SETTINGS:
        cursor.execute(f"SHOW {name}")
        values[name] = cursor.fetchone()[0]
    return values


def _found(pattern: str, path: str) -> str | None:
    with suppress(OSError):
        if match := re.search(pattern, Path(path).read_text()):
            return match[1].strip()
    return None


def _output(*command: str) -> str | None:
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return None


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
