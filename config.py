"""Settings from the environment and a `.env` file: read once, validated before anything starts.

The environment wins over `.env`, which is looked for in the working directory and then beside
this file. Every name below is documented with its default and unit in `.env.example`.
"""

import difflib
import keyword
import os
import re
import shlex
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import dotenv.parser
import psycopg2.extensions

import signing
from redaction import redactor

if not (hasattr(os, "fork") and hasattr(os, "waitid")):  # here, as every program imports config
    sys.stderr.write(
        "error: this runs on Linux, and for development on macOS with Python 3.13 or later;"
        " on Windows use Docker or WSL\n"
    )
    sys.exit(2)

__all__ = ["SETTINGS", "SettingsError", "read", "redactor", "require_database", "settings"]


class SettingsError(Exception):
    """A setting that cannot be used; the message is the one line a person needs."""


class Allowed(ValueError):
    """Raised by a parser; the message says what is allowed."""


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
            raise Allowed(f"{unit} from {low} to {high}")
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
    """A file of certificates, loaded here so that a wrong path is found before the first call."""
    try:
        if not os.path.isfile(text):
            raise ValueError
        ssl.create_default_context(cafile=text)
    except (OSError, ValueError):
        raise Allowed("a readable file of certificates in PEM") from None
    return text


def database_url(text: str) -> str:
    """A database URL, also in SQLAlchemy's spelling `postgresql+driver://` of the guide's users.

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
    """Whether database and file system can store the text. Bytes that are not UTF-8 arrive as
    surrogates, which they cannot.
    """
    return not re.search(r"[\0\ud800-\udfff]", value)


def text(value: str) -> str:
    if not storable(value):
        raise Allowed("text in UTF-8 without NUL")
    return value


def token(text: str) -> str:
    """A token allowed in an HTTP header after "Bearer" (RFC 6750, 2.1, and a little more)."""
    if not re.fullmatch(r"[!-~]+", text):
        raise Allowed("visible ASCII characters without spaces")
    return text


def secrets(text: str) -> tuple[str, ...]:
    """The secrets that sign requests: one, or two while it is being changed."""
    found = tuple(text.replace(",", " ").split())
    try:
        if len(found) not in (1, 2):
            raise ValueError
        for secret in found:
            signing.key(secret)
    except ValueError:
        raise Allowed(
            f"{signing.PREFIX} and base64 of {signing.SHORTEST} to {signing.LONGEST} bytes (try "
            f'echo "{signing.PREFIX}$(openssl rand -base64 32)"), or two with a space between'
        ) from None
    return found


def long_token(text: str) -> str:
    """A token that is too long to be guessed."""
    if not re.fullmatch(r"[!-~]{16,}", text):
        raise Allowed("16 visible ASCII characters or more, without spaces")
    return text


def command(text: str) -> list[str]:
    """A program and its arguments, quoted as for a shell; no shell runs them."""
    try:
        return shlex.split(text)
    except ValueError:
        raise Allowed("a program and its arguments, with quotes that are closed") from None


def module(text: str) -> str:
    """The name of a Python module as `import` takes it, with dots or without."""
    parts = text.split(".")
    named = all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    if not named or parts[-1] == "py":  # the name of a file
        raise Allowed("the name of a Python module, such as stages or examples.variants.stages")
    return text


def directory_for_heartbeats() -> str:
    """The default of HEARTBEAT_DIR. Listener and `check` must choose the same directory.

    tempfile.gettempdir() is not used: it fails on a read-only root, and as it chooses by writing a
    file, its answer changes when a disk is full. /dev/shm can be written in any container.
    """
    given = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    for place in [*filter(None, given), "/tmp", "/var/tmp", "/dev/shm"]:  # noqa: S108
        if os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            return os.path.join(place, "job-state-listener")
    return "/tmp/job-state-listener"  # noqa: S108 (the heartbeat says that it cannot be written)


SECONDS = "a number of seconds"
# From and to; also of @limits(timeout=…, max_attempts=…).
TIMEOUTS, ATTEMPTS = (0.1, 86_400), (1, 1_000_000)
SECRET = {"DB_PASSWORD", "DATABASE_URL", "STAGE_API_TOKEN", "STAGE_API_SECRET", "OPS_TOKEN"}
# STAGE_API_URL_VLM_ANALYZE is the base URL of the stage vlm_analyze, instead of STAGE_API_URL.
STAGE_URL = "STAGE_API_URL_"

# name: (default, parser). The order is the order of `.env.example`.
SETTINGS: dict[str, tuple[str | None, Callable[[str], Any]]] = {
    "ENABLE_JOB_STATE_LISTENER": ("true", boolean),
    "LISTENER_ENABLED": (None, boolean),
    "PIPELINE_MODULE": ("stages", module),
    "JOB_STATE_LISTENER_RECONNECT_DELAY": ("5", number(float, 0.1, 3600, SECONDS)),
    "DB_HOST": (None, host),
    "DB_PORT": ("5432", number(int, 1, 65535, "a port")),
    "DB_NAME": (None, text),
    "DB_USER": (None, text),
    "DB_PASSWORD": (None, text),
    "DATABASE_URL": (None, database_url),
    "STAGE_API_URL": ("http://localhost:8011", http_url),
    "STAGE_API_TOKEN": (None, token),
    "STAGE_API_SECRET": (None, secrets),
    "STAGE_API_CA_BUNDLE": (None, certificates),
    "STAGE_TIMEOUT": ("600", number(float, *TIMEOUTS, SECONDS)),
    "LEASE_MARGIN": ("30", number(float, 1, 3600, SECONDS)),
    "MAX_ATTEMPTS": ("5", number(int, *ATTEMPTS, "a whole number")),
    "RETRY_DELAY": ("5", number(float, 0.01, 3600, SECONDS)),
    "LISTENER_WORKERS": ("4", number(int, 1, 256, "a whole number")),
    "SWEEP_INTERVAL": ("30", number(float, 0.1, 3600, SECONDS)),
    "POLL_INTERVAL": ("1", number(float, 0.05, 3600, SECONDS)),
    "HISTORY_DAYS": ("30", number(float, 0.01, 36500, "a number of days")),
    "HEARTBEAT_DIR": (directory_for_heartbeats(), text),
    "ALERT_COMMAND": (None, command),
    "ALERT_AFTER": ("600", number(float, 1, 86400, SECONDS)),
    "OPS_TOKEN": (None, long_token),
    "LOG_LEVEL": ("INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR")),
    "LOG_FORMAT": ("text", one_of("text", "json")),
}


# Settings that another setting overrides. Where that one is set, a bad value of these is ignored.
OVERRULED = {
    "DATABASE_URL": ("DB_HOST", "DB_PORT", "DB_NAME", "DB_USER", "DB_PASSWORD"),
    "LISTENER_ENABLED": ("ENABLE_JOB_STATE_LISTENER",),
}


def read(environ: Mapping[str, str]) -> SimpleNamespace:
    """The settings of `environ`, one attribute a name. A blank value counts as not set.

    LISTENER_ENABLED says whether the listener is on, by whichever setting. STAGE_API_URLS has the
    base URLs of single stages, by the stage's name in capitals. WARNINGS has a line for each value
    that was ignored.

    Raises:
        SettingsError: naming the variable, its value (unless secret) and what is allowed.
    """
    given = {
        # A password may have spaces at its ends; a Secret made with `echo` ends with a newline.
        name: value.strip("\r\n" if name == "DB_PASSWORD" else None)
        for name, value in environ.items()
        if value and value.strip()
    }
    overruled = {name for by, names in OVERRULED.items() if by in given for name in names}
    values = SimpleNamespace(WARNINGS=[], READ_FROM={})
    for name, (default, parse) in SETTINGS.items():
        if name == "DB_PORT" and "://" in given.get(name, "") and not overruled:
            values.WARNINGS.append(not_a_port(given.pop(name)))
        value = given.get(name, default)
        try:
            setattr(values, name, None if value is None else parsed(name, value, parse))
        except SettingsError:
            if name not in overruled:
                raise
            setattr(values, name, None)
    values.STAGE_API_URLS = {
        name.removeprefix(STAGE_URL): parsed(name, value, http_url)
        for name, value in given.items()
        if name.startswith(STAGE_URL)
    }
    urls = [values.STAGE_API_URL, *values.STAGE_API_URLS.values()]
    if values.STAGE_API_TOKEN and any(urlsplit(url).username is not None for url in urls):
        raise SettingsError(
            "STAGE_API_TOKEN cannot be used with a user in a STAGE_API_URL: give one of them"
        )
    if values.LISTENER_ENABLED is None:
        values.LISTENER_ENABLED = values.ENABLE_JOB_STATE_LISTENER
    return values


def not_a_port(text: str) -> str:
    """Warn of DB_PORT=tcp://…, which Kubernetes sets where a service is called db."""
    default = SETTINGS["DB_PORT"][0]
    shown = repr(re.sub(r"//[^@]*@", "//***@", text))[:80]
    return f"DB_PORT={shown} is passed over, {default} is used: Kubernetes sets it for a service db"


def parsed(name: str, given: str, parse: Callable[[str], Any]) -> Any:
    try:
        if name not in MAY_BE_QUOTED and in_quotes(given):
            raise Allowed("this without its quotes, which `docker --env-file` keeps")
        return parse(given)
    except Allowed as allowed:
        # Text before an @ may be a password; so may a port that is not a number.
        secret = name in SECRET or re.search(r"@|//.*:\d*[^\d/]", given)
        shown = "***" if secret else repr(given)[:80]
        raise SettingsError(f"{name}={shown} cannot be used: allowed is {allowed}") from None


# Quotes around these may be meant: a password can be anything, a command is split like a shell's.
MAY_BE_QUOTED = {"DB_PASSWORD", "ALERT_COMMAND"}


def in_quotes(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


@lru_cache(maxsize=1)
def settings() -> SimpleNamespace:
    """This process's settings, read once. READ_FROM says where each name with a value was."""
    beside = [Path(".env"), Path(__file__).parent / ".env"]
    # Not Path.is_file(), which raises in a directory that we may not enter.
    file = next((path for path in beside if os.path.isfile(path)), None)
    from_file, unread = ({}, []) if file is None else values_in(file)
    given = from_file | os.environ
    values = read(given)
    where = str(file and file.absolute())
    values.WARNINGS += unread + [f"{where}: {said}" for said in misspelt(from_file)]
    values.READ_FROM = {
        name: "the environment" if name in os.environ else where
        for name, value in given.items()
        if value.strip()
    }
    return values


def misspelt(given: Iterable[str]) -> list[str]:
    """A warning for each name that is nearly one of ours. Other names are ignored, as a `.env` may
    be shared with an application.
    """
    missing = SETTINGS.keys() - set(given)
    found = []
    for name in given:
        if name not in SETTINGS and not name.startswith(STAGE_URL):
            # One that is set as well, as in a copy of .env.example, has to be a letter away.
            near = difflib.get_close_matches(name, missing, 1, 0.8)
            near = near or difflib.get_close_matches(name, SETTINGS, 1, 0.95)
            found += [f"{name} is no setting: did you mean {meant}?" for meant in near]
    return found


REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
SINGLE_QUOTED = re.compile(r"\s*(export\s+)?[^=\s]+\s*=\s*'")
SOME_NAME = re.compile(r"\s*(?:export\s+)?(\w+)")


def values_in(file: Path) -> tuple[dict[str, str], list[str]]:
    """The values in a `.env` file, and a warning for each line that cannot be read.

    ${NAME} is replaced by the value of NAME, except in single quotes. Where NAME is not set the
    text stays, as it may be part of a password; python-dotenv would remove it.

    Raises:
        SettingsError: the file cannot be read, or the line of a setting of ours.
    """
    try:
        with open(file, encoding="utf-8-sig") as stream:
            lines = list(dotenv.parser.parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file.absolute()} cannot be read as UTF-8: {error}") from None
    found: dict[str, str] = {}
    unread = []
    for line in lines:
        if line.error:
            unread.append(f"{file.absolute()}: line {line.original.line} cannot be read")
            name = SOME_NAME.match(line.original.string)
            if name and name[1] in SETTINGS:
                raise SettingsError(f"{unread[-1]}: {name[1]} has a quote that ends too early")
        elif line.key and line.value:
            known = found | os.environ
            found[line.key] = line.value
            if not SINGLE_QUOTED.match(line.original.string):
                found[line.key] = with_references(line.value, known)
    return found, unread


def with_references(text: str, known: Mapping[str, str]) -> str:
    return REFERENCE.sub(lambda found: known.get(found[1], found[0]), text)


def why_off(values: SimpleNamespace) -> str | None:
    """The setting that keeps the listener off, and where it was read; None where none does."""
    if values.LISTENER_ENABLED:
        return None
    given = ("LISTENER_ENABLED", "ENABLE_JOB_STATE_LISTENER")
    name = next((name for name in given if name in values.READ_FROM), given[1])
    return f"{name}=false in {values.READ_FROM.get(name, 'the settings')}"


def __getattr__(name: str):
    """`from config import ENABLE_JOB_STATE_LISTENER`, as the guide shows."""
    if name in SETTINGS:
        return getattr(settings(), name)
    raise AttributeError(f"module 'config' has no attribute {name!r}")


def require_database(values: SimpleNamespace) -> None:
    """Raises SettingsError where nothing says which database to use."""
    if not values.DB_HOST and not values.DATABASE_URL:
        hints = "".join(f"; {said}" for said in values.WARNINGS)
        raise SettingsError(
            "no database is set: give DB_HOST or DATABASE_URL (see .env.example), "
            f"or try `make demo`, which brings its own{hints}"
        )
