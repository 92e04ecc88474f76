"""A hot standby of an embedded server, on the same port of another address of this machine."""

import shutil
import subprocess
from contextlib import closing
from typing import Any

import psycopg2

from demo.database import EmbeddedDatabase


class Standby(EmbeddedDatabase):
    """Follows `primary` until it is promoted; a context manager.

    options: further server settings.
    """

    host = "127.0.0.2"

    def __init__(self, primary: EmbeddedDatabase, options: dict[str, Any] | None = None):
        options = {"fsync": "off"} | (options or {})
        super().__init__(primary.major, options, primary.parent, primary.environ)
        self.primary, self.port = primary, primary.port

    def _create(self) -> None:
        super()._create()
        copy(self, self.primary)


def copy(server: EmbeddedDatabase, primary: EmbeddedDatabase) -> None:
    """Replace the data of a stopped server by a copy of the data of `primary`."""
    # Empty the directory, but keep it: PostgreSQL finds the shared memory that a crash has left by
    # the inode of its data directory.
    data = server._directory / "data"
    for each in data.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    command = [server._bin / "pg_basebackup", "-D", data, "-R", "-N", "-c", "fast"]
    subprocess.run([*command, "-d", primary.dsn()], check=True, **server._process)


def promote(server: EmbeddedDatabase) -> None:
    """Make a primary of a standby. Raises RuntimeError where it does not become one."""
    with closing(psycopg2.connect(server.dsn())) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_promote(true, 60)")
        if not cursor.fetchone()[0]:
            raise RuntimeError("the standby did not become the primary")


def follow(server: EmbeddedDatabase, primary: EmbeddedDatabase) -> None:
    """Start a primary that was stopped, now as a standby of another one."""
    data = server._directory / "data"
    signal = data / "standby.signal"
    signal.touch()
    shutil.chown(signal, data.stat().st_uid, data.stat().st_gid)
    server.options |= {"primary_conninfo": primary.dsn()}
    server.start()


def rebuild(server: EmbeddedDatabase, primary: EmbeddedDatabase) -> None:
    """Start a crashed primary as a standby, with a copy of the data of `primary`."""
    copy(server, primary)
    follow(server, primary)
