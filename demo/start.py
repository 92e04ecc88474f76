"""What every demo needs first: a database of its own, and settings for its listener."""

import os
from contextlib import ExitStack
from pathlib import Path

from psycopg2.extensions import connection as Connection

import config
from demo.database import EmbeddedDatabase

ENV_FILE = Path(__file__).parent.parent / ".env"


def own_database(stack: ExitStack) -> str:
    """A PostgreSQL in a temporary directory, gone with `stack`; its connection string."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # PGHOSTADDR, PGSSLMODE and others would lead us elsewhere
    return stack.enter_context(EmbeddedDatabase()).dsn()


def server(connection: Connection) -> str:
    info = connection.info
    version = info.parameter_status("server_version").split()[0]
    return f"PostgreSQL {version} on {info.host}:{info.port}"


def environment(**settings: object) -> dict[str, str]:
    """The environment of a listener with these settings and the defaults of all others, whatever
    the caller's environment and `.env` say: they may name a production API.

    Raises:
        config.SettingsError: `.env` cannot be read.
    """
    defaults = {name: default or "" for name, (default, _) in config.SETTINGS.items()}
    in_file, _ = config.values_in(ENV_FILE) if ENV_FILE.is_file() else ({}, [])
    given = {*os.environ, *in_file}
    urls = {name: "" for name in given if name.startswith(config.STAGE_URL)}
    ours = {name: str(value) for name, value in settings.items()}
    return os.environ | defaults | urls | {"PYTHONIOENCODING": "utf-8"} | ours
