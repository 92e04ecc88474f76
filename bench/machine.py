"""Describes the machine, the server and the versions that figures were measured with."""

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from bench.database import Database, Server

PACKAGES = ["psycopg2-binary", "requests", "urllib3", "procrastinate", "psycopg", "pgqueuer",
            "awa-pg", "dbos", "oban", "asyncpg", "aiohttp", "uvloop"]  # fmt: skip
# pg-boss needs a newer Node.js than most machines have: package.json installs one.
OWN_NODE = Path(__file__).parent / "node_modules" / ".bin" / "node"
NODE = str(OWN_NODE) if OWN_NODE.exists() else shutil.which("node") or ""
SETTINGS = ["server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers",
            "wal_sync_method"]  # fmt: skip
COMMITS = 200


def machine() -> dict[str, str]:
    """The machine, and its load before the benchmark begins."""
    model = re.search(r"model name\s+: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {found.name: found.version for found in importlib.metadata.distributions()}
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "CPU": model[1] if model else platform.machine(),
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "Python": platform.python_version(),
        "Node.js": subprocess.getoutput(f"{NODE} --version") if NODE else "none",
        "packages": ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions),
    }


def server(server: Server) -> dict[str, str]:
    """The settings that decide what a commit costs, and what it costs."""
    values = {name: server.value(f"SHOW {name}") for name in SETTINGS}
    with Database(server) as database:
        milliseconds = statistics.median(commit(database) for _ in range(COMMITS)) * 1000
    return values | {"a commit": f"{milliseconds:.2f} ms (median of {COMMITS})"}


def commit(database: Database) -> float:
    """Seconds for one INSERT and its commit."""
    began = time.perf_counter()
    database.execute("INSERT INTO jobs (tenant_id) VALUES ('bench')")
    return time.perf_counter() - began
