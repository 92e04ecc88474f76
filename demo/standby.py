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
        super().__init__(primary.major, {"fsync": "off"} | (options or {}), primary.parent)
        self.primary, self.port = primary, primary.port

    def _create(self) -> None:
        super()._create()
        data = self._directory / "data"
        shutil.rmtree(data)
        copy = [self._bin / "pg_basebackup", "-D", data, "-R", "-N", "-c", "fast"]
        subprocess.run([*copy, "-d", self.primary.dsn()], check=True, **self._process)


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
