"""What every demo needs first: a database of its own, and settings for its listener."""

import os
import tempfile
from contextlib import ExitStack

from psycopg2.extensions import connection as Connection

from demo.database import EmbeddedDatabase


def own_database(stack: ExitStack) -> str:
    """A PostgreSQL in a temporary directory, gone with `stack`; its connection string."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # PGHOSTADDR, PGSSLMODE and others would lead us elsewhere
    return stack.enter_context(EmbeddedDatabase()).dsn()


def server(connection: Connection) -> str:
    info = connection.info
    version = info.parameter_status("server_version").split()[0]
    return f"PostgreSQL {version} on {info.host}:{info.port}"


def environment(stack: ExitStack, dsn: str, api_url: str, **settings: str) -> dict[str, str]:
    """The environment of a listener, whatever `.env` says."""
    ours = {
        "DATABASE_URL": dsn,
        "STAGE_API_URL": api_url,
        "HEARTBEAT_DIR": stack.enter_context(tempfile.TemporaryDirectory(prefix="heartbeat-")),
        "LISTENER_ENABLED": "true",
        "LOG_LEVEL": "INFO",
        "PYTHONIOENCODING": "utf-8",
    }
    return os.environ | ours | settings
