"""Signed requests, checked as a stage API checks them: with the package `standardwebhooks`."""

import base64
import json
import re
import time
import uuid

import pytest
from commands import run_here
from conftest import ROOT
from raw_server import OK, in_turn
from standardwebhooks import Webhook, WebhookVerificationError
from test_ops_mistakes import NOWHERE

import config
from stage_http import StageApi
from stage_testing import FakeStageApi, make_call


def secret_of(letter: str, size: int = 32) -> str:
    return "whsec_" + base64.b64encode(letter.encode() * size).decode()


SECRET, NEXT = secret_of("a"), secret_of("\u007e", 64)
REFUSED = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"


def test_every_attempt_is_signed_under_the_key_of_its_call(database, serve, caller):
    server, job = serve(in_turn(REFUSED, OK)), database.add_job()
    worker = caller(server.url, STAGE_API_SECRET=SECRET)
    before = int(time.time())
    assert [worker.call().outcome, worker.call_again().outcome] == ["retry", "succeeded"]
    for request in server.requests:
        body = Webhook(SECRET).verify(request.body, request.headers)
        assert body == {"job_id": job, "tenant_id": "tenant"}
        assert request.headers["webhook-id"] == request.headers["idempotency-key"]
        assert before <= int(request.headers["webhook-timestamp"]) <= time.time()
    assert server.requests[0].headers["webhook-id"] == server.requests[1].headers["webhook-id"]


@pytest.mark.parametrize("between", [" ", ",", ", "])
def test_while_a_secret_is_changed_both_are_accepted(accepting, between):
    given = {"STAGE_API_URL": accepting.url, "STAGE_API_SECRET": SECRET + between + NEXT}
    api = StageApi(config.read(given))
    body = {"text": "오늘의 커피 \u2028", "id": uuid.UUID(int=7)}
    api.post("/x", body, {"Idempotency-Key": "k"}, time.monotonic() + 30)
    [request] = accepting.requests
    for secret in (SECRET, NEXT):
        assert Webhook(secret).verify(request.body, request.headers)["text"] == body["text"]
    assert re.fullmatch(r"v1,\S+ v1,\S+", request.headers["webhook-signature"])
    for secret, sent in ((secret_of("b"), request.body), (SECRET, request.body + b" ")):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(sent, request.headers)


def test_without_a_secret_nothing_is_signed():
    api = FakeStageApi()
    make_call(api).post("/x")
    assert not [name for name in api.requests[0].headers if name.startswith("webhook")]


@pytest.mark.parametrize("size", [24, 64])
def test_secret_of_24_to_64_bytes_is_taken(size):
    assert config.read({"STAGE_API_SECRET": secret_of("a", size)}).STAGE_API_SECRET


BAD = {
    "no prefix": SECRET.removeprefix("whsec_"),
    "short": secret_of("a", 23),
    "long": secret_of("a", 65),
    "no base64": SECRET[:-3] + "*a=",
    "cut": SECRET.rstrip("="),
    "letters": SECRET + "비밀",
    "three": f"{SECRET} {NEXT} {SECRET}",
    "one bad": f"{SECRET} whsec_",
    "commas": ",",
}


@pytest.mark.parametrize("given", BAD.values(), ids=BAD)
def test_bad_secret_is_one_line_that_does_not_show_it(given):
    said = run_here(NOWHERE.environ | {"STAGE_API_SECRET": given}, "status").refused(2)
    assert said.startswith("STAGE_API_SECRET=*** cannot be used: allowed is whsec_ and base64 of")
    assert "YWFh" not in said


def test_listener_does_not_start_with_a_bad_secret(database, run_command):
    said = run_command(database, "run", "--once", STAGE_API_SECRET="whsec_abc").refused(2)
    assert said.startswith("STAGE_API_SECRET=*** cannot be used")


def test_dry_run_shows_the_signature_and_not_the_secret(database, run_command):
    job = database.add_job()
    done = run_command(database, "call", job, "--dry-run", STAGE_API_SECRET=f"{SECRET} {NEXT}")
    head, body = done.out.split("\n\n")
    headers = dict(line.split(": ", 1) for line in head.split("\n")[1:])
    for secret in (SECRET, NEXT):
        Webhook(secret).verify(json.dumps(json.loads(body)), headers)
        assert secret.removeprefix("whsec_").rstrip("=") not in done.out + done.err


@pytest.mark.parametrize("shown", [SECRET, SECRET.removeprefix("whsec_"), SECRET.rstrip("=")])
def test_secret_that_comes_back_is_not_stored(shown):
    redact = config.redactor(config.read({"STAGE_API_SECRET": f"{SECRET},{NEXT}"}))
    assert "YWFh" not in redact(f"500: {{'secret': '{shown}'}}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "requests are not signed: STAGE_API_SECRET is not set"),
        (SECRET, "requests are signed"),
        (f"{SECRET} {NEXT}", "requests are signed, with two secrets"),
    ],
)
def test_verify_says_whether_requests_are_signed(database, api, given, said):
    environ = database.environ | {"STAGE_API_URL": api.url, "STAGE_API_SECRET": given}
    assert f"ok       {said}" in run_here(environ, "verify").lines


def test_both_languages_show_the_same_code():
    pages = [(ROOT / "docs" / name).read_text() for name in ("SIGNING.md", "SIGNING.ko.md")]
    english, korean = (re.findall(r"```\w*\n.+?```", page, re.DOTALL) for page in pages)
    assert len(english) == 3 and english == korean
