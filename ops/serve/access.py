"""Access control of `serve`: sessions for people who know OPS_TOKEN, a token in each form, and
refusal of requests that come from another site.
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

COOKIE = "job_state_listener"
SESSION_SECONDS = 12 * 3600
FORM_SECONDS = 3600
LONGEST_NAME = 60
# After a wrong token, attempts from the same address are refused for this many seconds; the delay
# doubles with every further wrong token.
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
REMEMBERED = 10_000


@dataclass(frozen=True)
class Session:
    """A person who has entered the token: the name that they gave, and the id of the session."""

    name: str
    id: str

    @property
    def person(self) -> str:
        """The name for the history. It is not verified, as several people know the token."""
        return f"{self.name} (serve)"


NOBODY = Session("", "")


class TooSoon(Exception):
    """A wrong token was entered before: try again after `seconds`."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


class Remembered(OrderedDict):
    """Values by name; the oldest are dropped when there are more than REMEMBERED."""

    def keep(self, name: str, value: float) -> None:
        self[name] = value
        self.move_to_end(name)
        while len(self) > REMEMBERED:
            self.popitem(last=False)


class Spent(dict[str, float]):
    """Ids that are no longer valid, each until its time would be over anyway."""

    def keep(self, id_: str, seconds: float) -> None:
        now = time.time()
        for old in [one for one, until in self.items() if until < now]:
            del self[old]
        self[id_] = now + seconds


class Access:
    """Makes and checks cookies and form tokens. They are signed with a key derived from OPS_TOKEN
    and random bytes, so those of an earlier process are not valid.

    Args:
        token: OPS_TOKEN; None where nobody may act.
    """

    def __init__(self, token: str | None):
        self.token = (token or "").encode()
        self.is_on = token is not None
        self.key = hmac.digest(self.token, secrets.token_bytes(32), "sha256")
        self.lock = threading.Lock()
        self.ended = Spent()  # sessions
        self.used = Spent()  # forms that people sent who were logged in
        self.used_logins = Remembered()  # login forms, which anybody can send
        self.failures = Remembered()  # by address: how many wrong tokens
        self.refused_until = Remembered()  # by address: time.monotonic()

    # --- entering the token ---

    def try_token(self, address: str, given: str) -> bool:
        """Whether `given` is the token. A wrong one delays the next attempt from `address`.

        Raises:
            TooSoon: that delay is not over; `given` was not compared.
        """
        with self.lock:
            seconds = self.refused_until.get(address, 0.0) - time.monotonic()
            if seconds > 0:
                raise TooSoon(seconds)
            if self.is_on and hmac.compare_digest(
                self.digest(given.encode()), self.digest(self.token)
            ):
                self.failures.pop(address, None)
                return True
            count = self.failures.get(address, 0) + 1
            self.failures.keep(address, count)
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(count - 1, 10))
            self.refused_until.keep(address, time.monotonic() + delay)
            return False

    def digest(self, text: bytes) -> bytes:
        """A digest, so that values of equal length are compared, whatever was entered."""
        return hmac.digest(self.key, text, "sha256")

    # --- sessions ---

    def cookie(self, name: str) -> str:
        """The value of the cookie of a new session."""
        return self.signed("session", base64.urlsafe_b64encode(name.encode()).decode(),
                           SESSION_SECONDS)  # fmt: skip

    def session(self, cookie: str) -> Session | None:
        """The session of this cookie; None where it is not one of ours, or has expired."""
        parts = self.verified("session", cookie) if self.is_on else None
        if parts is None:
            return None
        name, id_ = parts
        return Session(base64.urlsafe_b64decode(name).decode(), id_)

    def end(self, session: Session) -> None:
        with self.lock:
            self.ended.keep(session.id, SESSION_SECONDS)

    # --- forms ---

    def form_token(self, session: Session, path: str) -> str:
        """A token for one form of this session, which can be sent to `path` once."""
        return self.signed(f"form {session.id} {path}", "", FORM_SECONDS)

    def take_form(self, session: Session, path: str, token: str) -> bool:
        """Use up a form's token; False where it is not of this session and path, or was used."""
        parts = self.verified(f"form {session.id} {path}", token)
        if parts is None:
            return False
        used = self.used_logins if session is NOBODY else self.used
        with self.lock:
            if parts[1] in used:
                return False
            used.keep(parts[1], FORM_SECONDS)
        return True

    # --- signing ---

    def signed(self, purpose: str, text: str, seconds: float) -> str:
        said = f"{text}.{int(time.time() + seconds)}.{secrets.token_urlsafe(16)}"
        return f"{said}.{self.signature(purpose, said)}"

    def verified(self, purpose: str, value: str) -> tuple[str, str] | None:
        """The text that was signed for this purpose, and its unique id; None where the signature is
        wrong, the time is over, or the session was ended.
        """
        said, _, signature = value.rpartition(".")
        wanted = self.signature(purpose, said).encode()
        if not hmac.compare_digest(signature.encode(), wanted):
            return None
        text, until, number = said.split(".")
        with self.lock:
            ended = purpose == "session" and number in self.ended
        return None if ended or float(until) < time.time() else (text, number)

    def signature(self, purpose: str, said: str) -> str:
        return hmac.digest(self.key, f"{purpose}\n{said}".encode(), "sha256").hex()


def name_of(given: str) -> str | None:
    """A person's name on one line; None where it is empty, too long, or not printable."""
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
    """Whether only this machine can connect to a server bound to `host`."""
    address = host.strip("[]")
    return host == "localhost" or (
        is_address(address) and ipaddress.ip_address(address).is_loopback
    )


def name_in(header: str) -> str | None:
    """The name or address in a Host header, in lower case; None where it cannot be one."""
    found = HOST.fullmatch(header)
    return found[1].lower().rstrip(".") if found else None


def is_known_host(header: str, known: Collection[str] | None) -> bool:
    """Whether a Host header is one of the `known` names, localhost or an address. Any other may be
    the name of a website that points to this machine (DNS rebinding).

    Args:
        known: names in lower case; None: all.
    """
    name = name_in(header)
    if name is None:
        return False
    return known is None or name in known or name == "localhost" or is_address(name)


def is_cross_site(host: str, origin: str | None, fetch_site: str | None) -> bool:
    """Whether the headers say that a form of another site was sent to us."""
    if fetch_site not in (None, "same-origin"):
        return True
    return origin is not None and origin.partition("://")[2].lower() != host.lower()
