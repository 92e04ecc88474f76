"""Signs requests, so that a stage API can verify who sent them (Standard Webhooks)."""

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence

PREFIX = "whsec_"
SHORTEST, LONGEST = 24, 64  # bytes of a key


def key(secret: str) -> bytes:
    """The key of a secret, which is `whsec_` and the key in base64.

    Raises:
        ValueError: it is no such secret, or its key is shorter than 24 or longer than 64 bytes.
    """
    if not secret.startswith(PREFIX):
        raise ValueError(f"a secret begins with {PREFIX}")
    found = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    if not SHORTEST <= len(found) <= LONGEST:
        raise ValueError(f"a key has {SHORTEST} to {LONGEST} bytes")
    return found


def headers(secrets: Sequence[str], message_id: str, body: bytes) -> dict[str, str]:
    """The headers that sign `body` as sent now: one signature for each secret.

    Args:
        message_id: the same for every attempt of a call.
    """
    timestamp = str(int(time.time()))
    content = f"{message_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(key(secret), content, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(d).decode()}" for d in digests),
    }
