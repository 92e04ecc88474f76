"""Replaces secrets by *** in all text that is logged, stored or printed. A stage API may show our
headers in its error page, so secrets are found in every encoding in which they may come back.
"""

import base64
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import psycopg2.extensions

import signing

# Shorter secrets are not replaced: three letters also occur in the log's own words.
SHORTEST = 4
# All texts that we cut are at least this long.
SHORTEST_CUT = 200

PASSWORD_IN_URL = re.compile(r"(://[^:/@\s]*):[^@/\s]+@")
PASSWORD_NAMED = re.compile(r"(?i)(password\s*=\s*)\S+")
AUTHORIZATION = re.compile(
    r"(?i)(authorization\W{1,12}(?:b['\"])?(?:basic|bearer|token)(?:\s|%20)+)[\w.~+/=-]+"
)
# Characters of encoded text: percent signs, backslashes, HTML entities, + for a space.
ENCODED = re.compile(r"[%\\&+]")
NAMED = {'"': "quot", "&": "amp", "'": "apos", "<": "lt", ">": "gt"}


def secrets_in(values: SimpleNamespace) -> Iterator[str | None]:
    """Every secret of the settings but the database's, also as `requests` sends it."""
    yield from (values.STAGE_API_TOKEN, values.OPS_TOKEN)
    for secret in values.STAGE_API_SECRET or ():
        yield from (secret, secret.removeprefix(signing.PREFIX).rstrip("="))
    for url in (values.STAGE_API_URL, *values.STAGE_API_URLS.values()):
        user, password = urlsplit(url).username, urlsplit(url).password
        if user is not None:
            sent = f"{unquote(user)}:{unquote(password or '')}".encode()
            yield base64.b64encode(sent).decode().rstrip("=")
            yield from (password or user, unquote(password or user))


def passwords_in(values: SimpleNamespace) -> Iterator[str | None]:
    """The password of the database, in every form in which the settings have it."""
    yield values.DB_PASSWORD
    yield (values.DB_PASSWORD or "").strip()  # as a line that was cut into words has it
    if values.DATABASE_URL:
        yield psycopg2.extensions.parse_dsn(values.DATABASE_URL).get("password")
        # Also as it was written, percent-encoded, as errors quote it like that.
        yield from re.findall(r"://[^:/@]*:([^@]*)@", values.DATABASE_URL)


def redactor(values: SimpleNamespace) -> "Redactor":
    """The Redactor for the secrets of `values`, which also replaces text that looks like one. A
    password of the database that is the name of our role or database is left, as commands that we
    advise have it.
    """
    dsn = psycopg2.extensions.parse_dsn(values.DATABASE_URL or "")
    names = {values.DB_USER, values.DB_NAME, dsn.get("user"), dsn.get("dbname")}
    passwords = {*passwords_in(values)} - names
    return Redactor([*secrets_in(values), *passwords])


class Redactor:
    """Called with a text, returns it without secrets."""

    def __init__(self, secrets: Iterable[str | None]):
        known = {secret for secret in secrets if secret and len(secret) >= SHORTEST}
        self.secrets = sorted(known, key=len, reverse=True)

    def __call__(self, message: str) -> str:
        for secret in self.secrets:
            message = message.replace(secret, "***")
        if ENCODED.search(message):
            for secret in self.secrets:
                if not secret.isascii() or not secret.isalnum():
                    message = pattern(secret).sub("***", message)
        if "://" in message:
            message = PASSWORD_IN_URL.sub(r"\1:***@", message)
        lower = message.lower()
        if "password" in lower:
            message = PASSWORD_NAMED.sub(r"\1***", message)
        if "authorization" in lower:
            message = AUTHORIZATION.sub(r"\1***", message)
        if len(message) >= SHORTEST_CUT and self.secrets:
            *lines, last = message.split("\n")
            long = [self.without_a_beginning(o) if len(o) >= SHORTEST_CUT else o for o in lines]
            message = "\n".join([*long, self.without_a_beginning(last)])
        return message

    def without_a_beginning(self, line: str) -> str:
        """`line` without the beginning of a secret at its end, where a text was cut."""
        for secret in self.secrets:
            for found in pattern(secret[:SHORTEST]).finditer(line, max(0, len(line) - 4096)):
                if ends_within(secret, line, found.end()):
                    return line[: found.start()] + "***"
        return line


# What a cut may leave of an encoded letter, or of a letter of several bytes.
HALF = re.compile(r"[%\\&][\w%\\&#;]{0,40}|[\ufffd…]*")


def ends_within(secret: str, line: str, position: int) -> bool:
    """Whether `line` ends within `secret`, whose first letters end at `position` of the line."""
    before = position
    for letter in secret[SHORTEST:]:
        found = pattern(letter).match(line, position)
        if found is None:  # half of this letter, or of the one before: &a of &amp;
            return any(HALF.fullmatch(line, start) for start in (position, before))
        before, position = position, found.end()
    return False


@lru_cache(maxsize=1024)
def pattern(text: str) -> re.Pattern:
    """Matches `text` however it is spelled, letter by letter."""
    runs = re.findall(r"\\+|[^\\]", text)
    return re.compile("".join(spelled(run[0], len(run)) for run in runs))


# How many backslashes stand for one in JSON in JSON, four deep. Without a limit, the search in a
# long run of them would take the square of its length.
DEEPEST = 16
ANY, SOME = rf"\\{{0,{DEEPEST}}}", rf"\\{{1,{DEEPEST}}}"


def spelled(letter: str, count: int = 1) -> str:
    """A regular expression for one letter as it is encoded in URLs, JSON, HTML, Python or C.

    Args:
        count: how many of them; only of backslashes, which are doubled where JSON is put into JSON.
    """
    if letter.isascii() and letter.isalnum():
        return letter
    raw = letter.encode("utf-8", "surrogatepass")
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    ways = [
        "".join(f"%(?:25)*(?i:{byte:02x})" for byte in raw),
        "".join(rf"{SOME}u(?i:{units[i : i + 4]})" for i in range(0, len(units), 4)),
        "".join(rf"{SOME}x(?i:{byte:02x})" for byte in raw),
        rf"{SOME}x(?i:{ord(letter):02x})",
        rf"{SOME}U(?i:{ord(letter):08x})",
        rf"{ANY}&(?:amp;)*#0*{ord(letter)};",
        rf"{ANY}&(?:amp;)*#[xX]0*(?i:{ord(letter):x});",
    ]
    if letter in NAMED:
        ways.insert(0, rf"{ANY}&(?:amp;)*{NAMED[letter]};")
    if letter == "\\":
        encoded = "|".join(ways)
        return rf"(?:(?:{encoded}){{{count}}}|\\{{{count},{DEEPEST * count}}})"
    ways.append(ANY + re.escape(letter))
    if letter == " ":
        ways.append(r"\+")
    return f"(?:{'|'.join(ways)})"
