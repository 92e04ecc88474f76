"""Who may act: a session for whoever knows OPS_TOKEN, a token in each form, and no request that
another site has sent.
"""

import base64
import hmac
import ipaddress
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

COOKIE = "job_state_listener"
SESSION_SECONDS = 12 * 3600
FORM_SECONDS = 3600
LONGEST_NAME = 60
# After a wrong token: the next attempt from that address after so many seconds, then after twice
# as many. Nobody waits in here, the attempt is refused.
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
REMEMBERED = 10_000


@dataclass(frozen=True)
class Session:
    """A person who has entered the token: the name that they gave, and what tells this session
    from others.
    """

    name: str
    id: str

    @property
    def person(self) -> str:
        """As the history has it. The token is known to several people, so the name is a claim."""
        return f"{self.name} (serve)"


NOBODY = Session("", "")


class TooSoon(Exception):
    """Seconds until another token is looked at."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


class Remembered(OrderedDict):
    """Values by name, the oldest of which go when there are too many."""

    def keep(self, name: str, value: float) -> None:
        self[name] = value
        self.move_to_end(name)
        while len(self) > REMEMBERED:
            self.popitem(last=False)


class Access:
    """Signs with a key that is made of OPS_TOKEN and of chance, anew with each start: what an
    earlier process has given out is worth nothing.

    Args:
        token: OPS_TOKEN; None where nobody may act.
    """

    def __init__(self, token: str | None):
        self.token = (token or "").encode()
        self.is_on = token is not None
        self.key = hmac.digest(self.token, secrets.token_bytes(32), "sha256")
        self.lock = threading.Lock()
        self.used = Remembered()  # forms that were sent, sessions that were ended
        self.failures = Remembered()  # by address: how many wrong tokens
        self.refused_until = Remembered()  # by address: time.monotonic()

    # --- entering the token ---

    def is_right(self, address: str, given: str) -> bool:
        """Whether it is the token.

        Raises:
            TooSoon: after a wrong one from this address; it was not looked at.
        """
        with self.lock:
            seconds = self.refused_until.get(address, 0.0) - time.monotonic()
            if seconds > 0:
                raise TooSoon(seconds)
            if self.is_on and hmac.compare_digest(self.digest(given.encode()), self.expected):
                self.failures.pop(address, None)
                return True
            count = self.failures.get(address, 0) + 1
            self.failures.keep(address, count)
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(count - 1, 10))
            self.refused_until.keep(address, time.monotonic() + delay)
            return False

    @property
    def expected(self) -> bytes:
        return self.digest(self.token)

    def digest(self, text: bytes) -> bytes:
        """Of one length, whatever was entered."""
        return hmac.digest(self.key, text, "sha256")

    # --- sessions ---

    def cookie(self, name: str) -> str:
        """The value of the cookie of a new session."""
        return self.signed("session", base64.urlsafe_b64encode(name.encode()).decode(),
                           SESSION_SECONDS)  # fmt: skip

    def session(self, cookie: str) -> Session | None:
        """The session that this is the cookie of; None where it is none of ours, or over."""
        parts = self.verified("session", cookie) if self.is_on else None
        if parts is None:
            return None
        name, id_ = parts
        return Session(base64.urlsafe_b64decode(name).decode(), id_)

    def end(self, session: Session) -> None:
        with self.lock:
            self.used.keep(session.id, 0.0)

    # --- forms ---

    def form_token(self, session: Session, path: str) -> str:
        """For one form, of this session, that is sent once to `path`."""
        return self.signed(f"form {session.id} {path}", "", FORM_SECONDS)

    def take_form(self, session: Session, path: str, token: str) -> bool:
        """Whether the form was made for this session and path, and was not sent before."""
        parts = self.verified(f"form {session.id} {path}", token)
        if parts is None:
            return False
        with self.lock:
            if parts[1] in self.used:
                return False
            self.used.keep(parts[1], 0.0)
        return True

    # --- signing ---

    def signed(self, purpose: str, text: str, seconds: float) -> str:
        said = f"{text}.{int(time.time() + seconds)}.{secrets.token_urlsafe(16)}"
        return f"{said}.{self.signature(purpose, said)}"

    def verified(self, purpose: str, value: str) -> tuple[str, str] | None:
        """The text that was signed for this purpose and what tells it from others; None where it
        was not, or its time is over, or it was ended.
        """
        said, _, signature = value.rpartition(".")
        wanted = self.signature(purpose, said).encode()
        if not hmac.compare_digest(signature.encode(), wanted):
            return None
        text, until, number = said.split(".")
        with self.lock:
            ended = purpose == "session" and number in self.used
        return None if ended or float(until) < time.time() else (text, number)

    def signature(self, purpose: str, said: str) -> str:
        return hmac.digest(self.key, f"{purpose}\n{said}".encode(), "sha256").hex()


def name_of(given: str) -> str | None:
    """The name that a person gave, on one line; None where it is no name."""
    name = " ".join(given.split())
    return name if 0 < len(name) <= LONGEST_NAME and name.isprintable() else None


# --- where a request comes from -------------------------------------------------------------

# What a Host header may look like: a name or an address, and perhaps a port.
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII | re.IGNORECASE)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what is bound to `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_known_host(header: str, known: Collection[str] | None) -> bool:
    """Whether a Host header is one that people use, and not the name of a site that has made its
    name point here (DNS rebinding). No such name is an address.

    Args:
        known: names in small letters; None: all.
    """
    found = HOST.fullmatch(header)
    if not found:
        return False
    name = found[1].lower().rstrip(".")
    return known is None or name in known or name == "localhost" or is_address(name)


def is_cross_site(host: str, origin: str | None, fetch_site: str | None) -> bool:
    """Whether a browser says that a form of another site was sent to us."""
    if fetch_site not in (None, "same-origin"):
        return True
    return origin is not None and urlsplit(origin).netloc.lower() != host.lower()
