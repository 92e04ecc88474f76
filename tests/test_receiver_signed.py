"""receiver/ checks the signatures of Standard Webhooks."""

import base64
import hashlib
import hmac
import json
import time
from datetime import datetime, timezone

import pytest
import standardwebhooks

from receiver import Receiver, SecretError, Stage
from receiver.answers import Refused

OURS, NEXT, THEIRS = ("whsec_" + base64.b64encode(bytes([n]) * 24).decode() for n in (1, 2, 3))
BODY = '{"job_id": "7", "tenant_id": "테넌트"}'.encode()
STAGE = Stage("vlm_analyze", after=("img_gen", "done"))


def signature(secret: str, key: str, sent: int, body: bytes) -> str:
    secret_bytes = base64.b64decode(secret.removeprefix("whsec_"))
    made = hmac.new(secret_bytes, f"{key}.{sent}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(made).decode()


def signed(*secrets: str, key: str = "k", ago: int = 0, body: bytes = BODY) -> dict[str, str]:
    sent = int(time.time()) - ago
    made = " ".join(signature(secret, key, sent, body) for secret in secrets)
    return {"Webhook-Id": key, "Webhook-Timestamp": str(sent), "Webhook-Signature": made}


def receive(headers: dict[str, str], body: bytes = BODY, secrets=f"{OURS},{NEXT}"):
    """The request, as a receiver with these secrets understands it."""
    return Receiver(lambda: None, secrets=secrets).request(STAGE, headers, body)


@pytest.mark.parametrize("secrets", [[OURS], [NEXT], [THEIRS, NEXT]])
def test_one_of_our_secrets_is_enough_and_the_signed_id_is_the_key(secrets):
    assert receive(signed(*secrets)).key == "k"


@pytest.mark.parametrize(("change", "error"), [
    (lambda headers: headers.pop("Webhook-Id"), "no webhook-id"),
    (lambda headers: headers.update({"Webhook-Signature": ""}), "no webhook-signature"),
    (lambda headers: headers.update({"Webhook-Signature": "v1,AAAA v1a,x v2, ,"}), "signature is"),
    (lambda headers: headers.update({"Webhook-Signature": "v1,열쇠"}), "signature is"),
    (lambda headers: headers.update({"Webhook-Id": "other"}), "signature is"),
    (lambda headers: headers.update({"Idempotency-Key": "other"}), "not the webhook-id"),
    (lambda headers: headers.update({"Webhook-Timestamp": "soon"}), "within 300 s"),
    (lambda headers: headers.update(signed(OURS, ago=-302)), "within 300 s"),
    (lambda headers: headers.update(signed(THEIRS)), "under any of our secrets"),
    (lambda headers: headers.update(signed(THEIRS, ago=301)), "under any of our secrets"),
    (lambda headers: headers.update(signed(OURS, body=BODY + b" ")), "signature is not"),
])  # fmt: skip
def test_what_is_not_signed_so_is_401(change, error):
    headers = signed(OURS)
    change(headers)
    with pytest.raises(Refused) as refused:
        receive(headers)
    assert refused.value.answer.status == 401
    assert error in json.loads(refused.value.answer.body)["error"]


def test_request_that_has_waited_for_a_worker_is_asked_for_again():
    with pytest.raises(Refused) as refused:
        receive(signed(OURS, ago=302))
    assert refused.value.answer.status == 503
    assert "more than 300 s" in json.loads(refused.value.answer.body)["error"]


def test_without_a_secret_nothing_is_checked():
    assert receive({"Idempotency-Key": "k"}, secrets=None).key == "k"


@pytest.mark.parametrize("secrets", ["", " ,", [], [""]])
def test_empty_secrets_are_refused(secrets):
    with pytest.raises(SecretError, match="secrets are empty"):
        Receiver(lambda: None, secrets=secrets)


@pytest.mark.parametrize("secret", ["plain", "whsec_", "whsec_%%", "whsec_QUJD\u200b", "whsk_QUJD"])
def test_secret_that_cannot_be_used_is_refused_and_not_shown(secret):
    with pytest.raises(SecretError, match="secret 2 is not whsec_ followed by base64"):
        Receiver(lambda: None, secrets=[OURS, secret])
    assert OURS not in repr(Receiver(lambda: None, secrets=OURS))


def test_signature_is_that_of_the_standard():
    webhook = standardwebhooks.Webhook(OURS)
    sent = datetime.now(tz=timezone.utc).replace(microsecond=0)
    made = webhook.sign("k", sent, BODY.decode())
    stamp = str(int(sent.timestamp()))
    headers = {"webhook-id": "k", "webhook-timestamp": stamp, "webhook-signature": made}
    assert receive(headers).key == "k"
