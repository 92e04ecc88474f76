"""A hot standby of an embedded server, on the same port of another address of this machine."""

import shutil
import subprocess

from demo.database import EmbeddedDatabase


class Standby(EmbeddedDatabase):
    """Follows `primary` until it is promoted; a context manager."""

    host = "127.0.0.2"

    def __init__(self, primary: EmbeddedDatabase):
        options = {"fsync": "off", "listen_addresses": self.host}
        super().__init__(primary.major, options, primary.parent)
        self.primary, self.port = primary, primary.port

    def settings(self, database: str = "postgres") -> dict[str, str]:
        return super().settings(database) | {"DB_HOST": self.host}

    def _create(self) -> None:
        super()._create()
        data = self._directory / "data"
        shutil.rmtree(data)
        copy = [self._bin / "pg_basebackup", "-D", data, "-R", "-N", "-c", "fast"]
        subprocess.run([*copy, "-d", self.primary.dsn()], check=True, **self._process)
