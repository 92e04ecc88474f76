"""The servers of the database: how many connections are left, which of several hosts is the
primary, and whether two are at once (a split brain).

    python hosts.py     prints the primaries as JSON: [system, timeline] by host
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psycopg2

import config
import db

# Warn where fewer connections than these are left.
FEW = 3
# Seconds between two looks at the other hosts, and for one look.
LOOK_EVERY = 60.0
TIME_LIMIT = 30.0
# How often an idle listener asks whether its server answers, where another one could, and how long
# it waits for that (seconds).
PING_EVERY, PING_DEADLINE = 5.0, 4.0

# Computed from what every role may read. Superusers have some reserved connections more.
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


class Place(NamedTuple):
    """The database cluster of a primary and its timeline, which grows with each promotion."""

    system: str
    timeline: int


# The name of a WAL file begins with the timeline.
PLACE = """
SELECT system_identifier::text AS system,
       ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer AS timeline
FROM pg_control_system()
"""


def place(conn) -> Place | None:
    """The place of the server we are connected to; None where we may not read it."""
    try:
        return Place(*db.execute(conn, PLACE).fetchone())
    except db.ConnectionLost:
        raise
    except psycopg2.Error:
        return None


PING = "SELECT 1"


def is_several(settings: SimpleNamespace) -> bool:
    return len(list(db.targets(settings))) > 1


def timelines(
    settings: SimpleNamespace, trying: Callable[[], None] = lambda: None
) -> dict[str, Place]:
    """The place of each host that is a primary, by its name; the latest timeline comes last.

    Args:
        trying: called before each host is tried.
    """
    found = {}
    for target in db.targets(settings):
        trying()
        with (
            contextlib.suppress(psycopg2.Error),
            contextlib.closing(db.connect_to(db.options(target))) as conn,
        ):
            if there := place(conn):
                found[f"{conn.info.host}:{conn.info.port}"] = there
    return dict(sorted(found.items(), key=lambda item: item[1].timeline))


def split_brain(found: dict[str, Place]) -> str | None:
    """A line where two hosts are primaries on different timelines; None where not."""
    if len({there.timeline for there in found.values()}) < 2:
        return None
    *old, (new, latest) = [(name, there.timeline) for name, there in found.items()]
    others = ", ".join(f"{name} on {line}" for name, line in old if line != latest)
    return f"two primaries: {new} is on timeline {latest}, but {others} takes writes as well"


class OldPrimary(db.ConnectionLost):
    """This host is an old primary: another one has been primary on a later timeline."""


class Watch:
    """Remembers the latest timeline, so that the listener does not work on an old primary. Looks at
    all hosts now and then, in a separate process, as a dead host takes seconds.
    """

    def __init__(self, settings: SimpleNamespace):
        self.settings, self.several = settings, is_several(settings)
        self.look_at = time.monotonic() + LOOK_EVERY if self.several else float("inf")
        self.ping_at = 0.0 if self.several else float("inf")
        self.process: subprocess.Popen | None = None
        self.said = ""
        self.latest: dict[str, int] = {}  # timeline by system
        self.here: tuple[str, Place] | None = None  # where the listener is connected

    def check_new_connection(self, conn, trying: Callable[[], None]) -> None:
        """Check that a new connection leads to the latest primary; at the first connection, also
        asks the other hosts.

        Raises:
            OldPrimary
        """
        self.here = None
        if not self.several:
            return
        if not self.latest:
            self.learn(timelines(self.settings, trying).values())
        if there := place(conn):
            self.here = f"{conn.info.host}:{conn.info.port}", there
            self.learn([there])
        self.require_latest()

    def learn(self, places: Iterable[Place]) -> None:
        for system, timeline in places:
            self.latest[system] = max(timeline, self.latest.get(system, 0))

    def require_latest(self) -> None:
        """Raises OldPrimary where the listener is connected to one."""
        if self.here is None:
            return
        name, (system, timeline) = self.here
        if timeline < self.latest[system]:
            raise OldPrimary(
                f"{name} is an old primary: it is on timeline {timeline}, and another host has"
                f" been primary on {self.latest[system]} (is it the right one after all? then stop"
                " the other one and restart the listener)"
            )

    def ping(self, conn) -> None:
        """Where there are other hosts, ask this one now and then for a sign of life.

        Raises:
            ConnectionLost: it did not answer at once, and may be frozen.
        """
        if time.monotonic() < self.ping_at:
            return
        self.ping_at = time.monotonic() + PING_EVERY
        conn.deadline = PING_DEADLINE
        try:
            db.execute(conn, PING)
        finally:
            conn.deadline = db.DEADLINE

    def look(self) -> str | None:
        """Start a look when it is time, or take its result; never waits. Returns a line about a
        split brain when it is first seen.
        """
        now = time.monotonic()
        if self.process is None and now >= self.look_at:
            self.look_at = now + LOOK_EVERY
            with contextlib.suppress(OSError):
                self.process = subprocess.Popen(
                    # By its path: with -m, modules of the working directory would come first.
                    [sys.executable, str(Path(__file__))], stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
                    start_new_session=True,
                )  # fmt: skip
        if self.process is None:
            return None
        if self.process.poll() is None:
            if now > self.look_at - LOOK_EVERY + TIME_LIMIT:
                self.process.kill()
            return None
        with self.process as ended:
            text = ended.communicate()[0]
        self.process = None
        found = {}
        with contextlib.suppress(ValueError):  # the process has failed
            found = {name: Place(*there) for name, there in json.loads(text).items()}
        if not found:
            return None  # it has failed, or reached no primary
        self.learn(found.values())
        said = split_brain(found) or ""
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
    print(json.dumps(timelines(config.settings())))
