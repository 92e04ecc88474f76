"""The servers of the database: how many connections are left, and whether two of several hosts are
primary at once (a split brain).

    python -m hosts     prints a line where there is one
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psycopg2

import config
import db

# Fewer connections that are left than these are said.
FEW = 3
# Seconds between two looks at the other hosts, and for one look.
LOOK_EVERY = 60.0
TIME_LIMIT = 30.0
# How often an idle listener asks whether its server answers, where another one could, and how long
# it waits for that (seconds).
PING_EVERY, PING_DEADLINE = 5.0, 4.0

# What a session that may not read the others' statistics can know. Superusers have some more.
LEFT = """
SELECT least(
    current_setting('max_connections')::integer
    - current_setting('superuser_reserved_connections')::integer
    - coalesce(current_setting('reserved_connections', true)::integer, 0)
    - (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL),
    (SELECT datconnlimit - (SELECT count(*) FROM pg_stat_activity AS a WHERE a.datid = d.oid)
     FROM pg_database AS d WHERE datname = current_database() AND datconnlimit >= 0),
    (SELECT rolconnlimit - (SELECT count(*) FROM pg_stat_activity WHERE usesysid = r.oid)
     FROM pg_roles AS r WHERE rolname = session_user AND rolconnlimit >= 0))::integer
"""


def connections_left(conn) -> int:
    """How many more sessions an ordinary role can have, this database and this role."""
    return max(0, db.execute(conn, LEFT).fetchone()[0])


# The name of a WAL file begins with the timeline. It grows with each promotion.
TIMELINE = """
SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer
"""


PING = "SELECT 1"


def ping(conn) -> None:
    """Raises ConnectionLost where the server does not answer at once: it may be frozen."""
    conn.deadline = PING_DEADLINE
    try:
        db.execute(conn, PING)
    finally:
        conn.deadline = db.DEADLINE


def is_several(settings: SimpleNamespace) -> bool:
    return len(list(db.targets(settings))) > 1


def timelines(settings: SimpleNamespace) -> dict[str, int]:
    """The timeline of each host that is primary, by its name; the latest one last."""
    found = {}
    for target in db.targets(settings):
        with (
            contextlib.suppress(psycopg2.Error),
            contextlib.closing(db.connect_to(db.CONNECTION | target)) as conn,
        ):
            name = f"{conn.info.host}:{conn.info.port}"
            found[name] = db.execute(conn, TIMELINE).fetchone()[0]
    return dict(sorted(found.items(), key=lambda item: item[1]))


def split_brain(settings: SimpleNamespace) -> str | None:
    """What is wrong where two hosts are primary on different timelines."""
    found = timelines(settings)
    if len(set(found.values())) < 2:
        return None
    *old, (new, latest) = found.items()
    others = ", ".join(f"{name} on {line}" for name, line in old if line != latest)
    return f"two primaries: {new} is on timeline {latest}, but {others} takes writes as well"


class Watch:
    """Looks at all hosts now and then, in a process of its own: a dead host costs seconds."""

    def __init__(self, settings: SimpleNamespace):
        self.look_at = time.monotonic() + LOOK_EVERY if is_several(settings) else float("inf")
        self.process: subprocess.Popen | None = None
        self.said = ""

    def look(self) -> str | None:
        """Never waits; what is wrong, once, as soon as it is known."""
        now = time.monotonic()
        if self.process is None and now >= self.look_at:
            self.look_at = now + LOOK_EVERY
            with contextlib.suppress(OSError):
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "hosts"], stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
                    env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
                    start_new_session=True,
                )  # fmt: skip
        if self.process is None:
            return None
        if self.process.poll() is None:
            if now > self.look_at - LOOK_EVERY + TIME_LIMIT:
                self.process.kill()
            return None
        with self.process as ended:
            said = ended.communicate()[0].strip()
        self.process = None
        is_new, self.said = bool(said) and said != self.said, said
        return said if is_new else None

    @property
    def pids(self) -> list[int]:
        return [self.process.pid] if self.process else []

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with self.process:
                self.process = None


if __name__ == "__main__":
    if problem := split_brain(config.settings()):
        print(problem)
