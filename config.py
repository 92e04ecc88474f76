"""Settings from the environment and a `.env` file: read once, validated before anything starts.

The environment wins over `.env`, which is looked for in the working directory and then beside
this file. Every name below is documented with its default and unit in `.env.example`.
"""

import os
import re
import shlex
import ssl
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import dotenv
import psycopg2.extensions

from redaction import redactor


__all__ = ["SETTINGS", "SettingsError", "read", "redactor", "require_database", "settings"]


class SettingsError(Exception):
    """A setting that cannot be used; the message is the one line a person needs."""


class Allowed(ValueError):
    """Raised by a parser: says what is allowed."""


def boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    if text.lower() not in words:
        raise Allowed("true or false")
    return words[text.lower()]


def number(kind: type, low: float, high: float, unit: str) -> Callable[[str], Any]:
    """A parser for a `kind` (int or float) from `low` to `high`, both included."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise Allowed(f"{unit} from {low:g} to {high:g}")
        return value

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for word in words:
            if text.lower() == word.lower():
                return word
        raise Allowed(" or ".join(words))

    return parse


def host(text: str) -> str:
    """`docker --env-file` keeps an inline comment in the value: refuse it by name."""
    if not storable(text) or (re.search(r"[\s#@/]", text) and not text.startswith("/")):
        raise Allowed("a host name, an address or a socket directory, without spaces or comments")
    return text


# A host of letters and digits, or an address in brackets: `requests` would refuse anything else at
# every call. An @ in the path would be the end of a password that is not percent-encoded.
HOST = r"(\w[\w.-]*|\[[\da-f:.]+(%25\w+)?\])"
URL = re.compile(rf"https?://([^@/?#\\\s]*@)?{HOST}(:\d*)?(/[^@?#\s]*)?", re.ASCII | re.IGNORECASE)


def http_url(text: str) -> str:
    try:
        usable = URL.fullmatch(text) and storable(text) and urlsplit(text).port != 0
    except ValueError:
        usable = False
    if not usable:
        raise Allowed("a URL such as http://localhost:8011")
    return text.rstrip("/")


def certificates(text: str) -> str:
    """A wrong path would otherwise be found out at the first call."""
    try:
        if not os.path.isfile(text):
            raise ValueError
        ssl.create_default_context(cafile=text)
    except (OSError, ValueError):
        raise Allowed("a readable file of certificates in PEM") from None
    return text


def database_url(text: str) -> str:
    """Also takes the SQLAlchemy spelling `postgresql+driver://`, which the guide's users have.

    A password with a bare @, / or # in it would be read as part of the host, and shown in errors.
    """
    text = re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", text)
    try:
        if "://" in text and not re.fullmatch(r"\w+://([^@/?#]*@)?[^@]*", text):
            raise ValueError
        port = psycopg2.extensions.parse_dsn(text).get("port", "5432")
        if not re.fullmatch(r"[\d,]+", port):
            raise ValueError
    except (psycopg2.Error, ValueError):
        allowed = (
            "postgresql://user:password@host:5432/name, with @ in a password as %40 and / as %2F"
        )
        raise Allowed(allowed) from None
    return text


def storable(value: str) -> bool:
    """Whether database and file system can take it; what is no UTF-8 arrives as surrogates."""
    return not re.search(r"[\0\ud800-\udfff]", value)


def text(value: str) -> str:
    if not storable(value):
        raise Allowed("text in UTF-8 without NUL")
    return value


def token(text: str) -> str:
    """What may stand in an HTTP header after "Bearer" (RFC 6750, 2.1, and a little more)."""
    if not re.fullmatch(r"[!-~]+", text):
        raise Allowed("visible ASCII characters without spaces")
    return text


def command(text: str) -> list[str]:
    """A program and its arguments, quoted as for a shell, which never sees them."""
    try:
        return shlex.split(text)
    except ValueError:
        raise Allowed("a program and its arguments, with quotes that are closed") from None


SECONDS = "a number of seconds"
SECRET = {"DB_PASSWORD", "DATABASE_URL", "STAGE_API_TOKEN"}
# STAGE_API_URL_VLM_ANALYZE: where the stage vlm_analyze is, should it be elsewhere.
STAGE_URL = "STAGE_API_URL_"

# name: (default, parser). The order is the order of `.env.example`.
SETTINGS: dict[str, tuple[str | None, Callable[[str], Any]]] = {
    "ENABLE_JOB_STATE_LISTENER": ("true", boolean),
    "JOB_STATE_LISTENER_RECONNECT_DELAY": ("5", number(float, 0.1, 3600, SECONDS)),
    "DB_HOST": (None, host),
    "DB_PORT": ("5432", number(int, 1, 65535, "a port")),
    "DB_NAME": (None, text),
    "DB_USER": (None, text),
    "DB_PASSWORD": (None, text),
    "DATABASE_URL": (None, database_url),
    "STAGE_API_URL": ("http://localhost:8011", http_url),
    "STAGE_API_TOKEN": (None, token),
    "STAGE_API_CA_BUNDLE": (None, certificates),
    "STAGE_TIMEOUT": ("600", number(float, 0.1, 86400, SECONDS)),
    "LEASE_MARGIN": ("30", number(float, 1, 3600, SECONDS)),
    "MAX_ATTEMPTS": ("5", number(int, 1, 1000, "a whole number")),
    "RETRY_DELAY": ("5", number(float, 0.01, 3600, SECONDS)),
    "LISTENER_WORKERS": ("4", number(int, 1, 256, "a whole number")),
    "SWEEP_INTERVAL": ("30", number(float, 0.1, 3600, SECONDS)),
    "POLL_INTERVAL": ("1", number(float, 0.05, 3600, SECONDS)),
    "HISTORY_DAYS": ("30", number(float, 0.01, 36500, "a number of days")),
    "HEARTBEAT_DIR": (str(Path(tempfile.gettempdir()) / "job-state-listener"), text),
    "ALERT_COMMAND": (None, command),
    "LOG_LEVEL": ("INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR")),
    "LOG_FORMAT": ("text", one_of("text", "json")),
}


def read(environ: dict[str, str]) -> SimpleNamespace:
    """The settings of `environ`, one attribute a name. An empty value counts as not set.

    STAGE_API_URLS has the base URLs of single stages, by the stage's name in capitals.

    Raises:
        SettingsError: naming the variable, its value (unless secret) and what is allowed.
    """
    values = SimpleNamespace()
    for name, (default, parse) in SETTINGS.items():
        given = environ.get(name, "").strip() or default
        setattr(values, name, None if given is None else parsed(name, given, parse))
    values.STAGE_API_URLS = {
        name.removeprefix(STAGE_URL): parsed(name, given.strip(), http_url)
        for name, given in environ.items()
        if name.startswith(STAGE_URL) and given.strip()
    }
    urls = [values.STAGE_API_URL, *values.STAGE_API_URLS.values()]
    if values.STAGE_API_TOKEN and any(urlsplit(url).username is not None for url in urls):
        raise SettingsError(
            "STAGE_API_TOKEN cannot be used with a user in a STAGE_API_URL: give one of them"
        )
    return values


def parsed(name: str, given: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(given)
    except Allowed as allowed:
        # What stands before an @ may be a password, and so may a port that is no number.
        secret = name in SECRET or re.search(r"@|//.*:\d*[^\d/]", given)
        shown = "***" if secret else repr(given)[:80]
        raise SettingsError(f"{name}={shown} cannot be used: allowed is {allowed}") from None


@lru_cache(maxsize=1)
def settings() -> SimpleNamespace:
    """This process's settings, read at the first call."""
    beside = [Path(".env"), Path(__file__).parent / ".env"]
    # Not Path.is_file(), which fails in a directory that is closed to us.
    file = next((path for path in beside if os.path.isfile(path)), None)
    try:
        from_file = dotenv.dotenv_values(file, encoding="utf-8-sig") if file else {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file.absolute()} cannot be read as UTF-8: {error}") from None
    return read({**{k: v for k, v in from_file.items() if v}, **os.environ})


def __getattr__(name: str):
    """`from config import ENABLE_JOB_STATE_LISTENER`, as the guide shows."""
    if name in SETTINGS:
        return getattr(settings(), name)
    raise AttributeError(f"module 'config' has no attribute {name!r}")


def require_database(values: SimpleNamespace) -> None:
    """Raises SettingsError where nothing says which database to use."""
    if not values.DB_HOST and not values.DATABASE_URL:
        raise SettingsError(
            "no database is set: give DB_HOST or DATABASE_URL (see .env.example), "
            "or try `make demo`, which brings its own"
        )
