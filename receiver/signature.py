"""Signatures of Standard Webhooks: v1, HMAC-SHA256 of "id.timestamp.body"."""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping

from .answers import refusal

TOLERANCE = 300  # seconds that the clocks of sender and receiver may differ
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


class SecretError(ValueError):
    """A secret that cannot be used."""


def keys_of(secrets: str | Iterable[str] | None) -> list[bytes]:
    """The keys in one or more `whsec_…`, given as a list, or with a space or comma in between.

    Raises:
        SecretError: one of them is not `whsec_` and base64; its value is not in the text. Or there
            is none, and yet `secrets` is not None.
    """
    given = re.split(r"[\s,]+", secrets) if isinstance(secrets, str) else list(secrets or ())
    keys = []
    for number, secret in enumerate(filter(None, given), 1):
        kind, _, encoded = secret.partition("_")
        try:
            key = base64.b64decode(encoded, validate=True) if kind == "whsec" else b""
        except ValueError:  # not base64, or not ASCII
            key = b""
        if not key:
            raise SecretError(f"secret {number} is not whsec_ followed by base64")
        keys.append(key)
    if secrets is not None and not keys:
        raise SecretError("secrets are empty: allowed is whsec_…, or None to check nothing")
    return keys


def verify(keys: list[bytes], headers: Mapping[str, str], body: bytes, now: float) -> None:
    """Check that one of the signatures was made with one of `keys`.

    Args:
        headers: with names in lower case.
        body: the bytes as they arrived.
        now: seconds since 1970.

    Raises:
        Refused: 401, and what is missing or wrong; 503 where only its time is too old, as that of a
            request that has waited for a worker: sent again, it is signed anew.
    """
    if missing := [name for name in HEADERS if not headers.get(name)]:
        raise refusal(401, f"not signed: no {', '.join(missing)}")
    identity, sent, signatures = (headers[name] for name in HEADERS)
    if not re.fullmatch("[0-9]{1,15}", sent) or int(sent) - now > TOLERANCE:
        raise refusal(401, f"webhook-timestamp is not within {TOLERANCE} s of this clock")
    signed = f"{identity}.{sent}.".encode() + body
    allowed = [b"v1," + base64.b64encode(hmac.digest(k, signed, hashlib.sha256)) for k in keys]
    offered = [signature.encode() for signature in signatures.split()]
    # A list and not a generator, so that the time does not depend on which signature matches.
    if not any([hmac.compare_digest(one, other) for one in allowed for other in offered]):
        raise refusal(401, "the signature is not that of this body under any of our secrets")
    if now - int(sent) > TOLERANCE:
        error = f"signed {now - int(sent):.0f} s ago, more than {TOLERANCE} s by this clock"
        raise refusal(503, error)
