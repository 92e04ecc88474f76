"""Secrets do not come back, however a stage API, a proxy or a traceback spells them."""

import base64
import html
import json
import re
import time
from urllib.parse import quote, quote_plus

import pytest
from fuzzing import fuzzed
from hypothesis import example, given
from hypothesis import strategies as st

import config
from stage_http import TEXT_LIMIT
from stage_testing import make_call

TOKEN = 'tok"en/with+odd\\chars=&<x>'
PASSWORDS = [
    "p@ss 'w\"ord\\",
    "비밀번호-💥 입니다",
    "a+b/c=d%e",
    "<script>&amp;</script>",
    "plain-7",
]
SPELLINGS = {
    "as it is": str,
    "JSON": json.dumps,
    "JSON with its letters": lambda s: json.dumps(s, ensure_ascii=False),
    "JSON in JSON": lambda s: json.dumps(json.dumps(s)),
    "JSON of PHP": lambda s: json.dumps(s).replace("/", "\\/"),
    "JSON of Java": lambda s: json.dumps(s).replace("&", "\\u0026").replace("<", "\\u003c"),
    "URL": quote,
    "URL, every sign": lambda s: quote(s, safe=""),
    "URL in lower case": lambda s: re.sub("%..", lambda found: found[0].lower(), quote(s, safe="")),
    "URL, twice": lambda s: quote(quote(s, safe=""), safe=""),
    "form": quote_plus,
    "HTML": html.escape,
    "HTML in numbers": lambda s: "".join(c if c.isalnum() else f"&#{ord(c)};" for c in s),
    "JSON in HTML": lambda s: html.escape(json.dumps(s)),
    "Python": repr,
    "bytes of Python": lambda s: repr(s.encode()),
}


def test_call_that_a_stage_function_prints_shows_no_secret():
    given = {"STAGE_API_TOKEN": "the-token", "DB_PASSWORD": "the-password"}
    call = make_call(settings=given)
    assert call.settings.DB_PASSWORD == "the-password"
    assert "the-" not in repr(call) and "api=" not in repr(call) and call.stage in repr(call)


def is_nothing_left(said: str) -> bool:
    """Whether only the quotes are left that `said` was in."""
    quotes = re.sub("&[#\\w]+(;|$)", "", said.removeprefix("b"))
    return "***" in said and not re.search(r"\w", quotes)


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("secret", [TOKEN, *PASSWORDS])
def test_secret_is_replaced_in_every_spelling(secret, spell):
    redact = config.redactor(config.read({"DB_PASSWORD": secret}))
    said = redact(f"before {spell(secret)} after")
    left = said.removeprefix("before ").removesuffix(" after")
    assert is_nothing_left(left), said


@fuzzed(200)
@given(secret=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=4, max_size=20))
@example(secret="\\\\\\\\")
@example(secret="%25%")
def test_any_password_is_replaced_in_every_spelling(secret):
    values = config.read({"DB_PASSWORD": secret})
    if len(secret.strip()) < 4:  # white space around a setting is no part of it
        return
    redact = config.redactor(values)
    for spell in SPELLINGS.values():
        written = spell(secret.strip())
        assert written.strip("\"'") not in redact(f"before {written} after")


@pytest.mark.parametrize(
    "given",
    [
        {"DB_USER": "postgres", "DB_NAME": "feedlyai", "DB_PASSWORD": "postgres"},
        {"DB_USER": "listener", "DB_NAME": "postgres", "DB_PASSWORD": "postgres"},
        {"DATABASE_URL": "postgresql://postgres:postgres@db/feedlyai"},
        {"DATABASE_URL": "postgresql://listener:postgres@db/postgres"},
    ],
)
def test_password_that_is_the_name_of_our_role_or_database_is_left_in_commands(given):
    redact = config.redactor(config.read(given))
    assert redact("./jsl install --reader postgres") == "./jsl install --reader postgres"
    for said in ("password=postgres", "postgresql://x:postgres@db/y"):
        assert "postgres" not in redact(said).removeprefix("postgresql")


@pytest.mark.parametrize(
    "given",
    [{"STAGE_API_TOKEN": "feedlyai"}, {"STAGE_API_URL": "http://me:feedlyai@api"}],
)
def test_secret_of_the_stage_api_is_replaced_though_it_is_the_name_of_our_database(given):
    given |= {"DB_USER": "listener", "DB_NAME": "feedlyai", "DB_PASSWORD": "feedlyai"}
    assert config.redactor(config.read(given))("HTTP 401: feedlyai") == "HTTP 401: ***"


@pytest.mark.parametrize("user", ["me", "", "사용자"])
@pytest.mark.parametrize("password", ["s3cr3t", "p@ss/word", "비밀번호"])
def test_credentials_of_a_url_are_replaced_as_they_are_sent(user, password):
    url = f"http://{quote(user)}:{quote(password, safe='')}@api"
    redact = config.redactor(config.read({"STAGE_API_URL": url}))
    sent = base64.b64encode(f"{user}:{password}".encode()).decode()
    for written in (sent, quote(sent, safe=""), sent.replace("=", "\\u003d"), sent.rstrip("=")):
        said = redact(f"bad header {written} here")
        assert said.startswith("bad header ***") and sent.rstrip("=") not in said


def test_user_without_a_password_is_a_token():
    redact = config.redactor(config.read({"STAGE_API_URL": "http://t0ken-of-api@api"}))
    sent = base64.b64encode(b"t0ken-of-api:").decode()
    assert redact(f"t0ken-of-api, sent as {sent}") == "***, sent as ***=="


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer other-token",
        '{"authorization": "Basic other-token=="}',
        "[(b'authorization', b'Bearer other-token')]",
        "HTTP_AUTHORIZATION = 'Bearer other-token'",
        '"HTTP_AUTHORIZATION"=>"Basic other-token"',
        "{'Authorization': 'Bearer other-token'}",
    ],
)
def test_header_with_credentials_of_others_is_replaced(text):
    said = config.redactor(config.read({}))(text)
    assert "other-token" not in said and "***" in said


@pytest.mark.parametrize(
    "text",
    [
        "Basic authentication required",
        "the Authorization header is missing",
        "Bearer token expired, 100% of them; a+b \\ & more",
        "x" * 500 + " the end",
        "실행 실패: HTTP 401: 인증이 필요합니다",
    ],
)
def test_text_without_secrets_is_left_as_it_is(text):
    redact = config.redactor(config.read({"STAGE_API_TOKEN": TOKEN, "DB_PASSWORD": "비밀번호"}))
    assert redact(text) == text


def test_long_run_of_backslashes_takes_no_time():
    for secret in ("!Secret9xyz", "a\\\\\\\\b"):
        redact = config.redactor(config.read({"DB_PASSWORD": secret}))
        began = time.process_time()
        assert redact("\\" * 50_000) == "\\" * 50_000
        assert time.process_time() - began < 5


# --- the cut -------------------------------------------------------------------------------

PAGE = "<h1>Forbidden</h1> your headers were: " + "x: y, " * 60


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("secret", [TOKEN, "비밀번호-💥 입니다", "s" * 300, "abcabcabcabd"])
def test_beginning_of_a_secret_at_the_cut_is_replaced(secret, spell):
    redact = config.redactor(config.read({"DB_PASSWORD": secret}))
    written = spell(secret)
    for end in range(len(written) * 2 // 3, len(written)):
        left = redact(PAGE + written[:end]).removeprefix(PAGE)
        assert is_nothing_left(left), written[:end]


def test_secret_of_several_bytes_is_replaced_though_one_of_them_is_cut():
    redact = config.redactor(config.read({"DB_PASSWORD": "비밀번호입니다"}))
    whole = (PAGE + "비밀번호입니다").encode()
    for end in range(1, 9):
        assert redact(whole[:-end].decode(errors="replace")) == PAGE + "***"


@pytest.fixture
def failed(database, caller, serve):
    """failed(body, url=…, **settings): the error of a call that was answered so."""

    def call(body, url=lambda url: url, **settings) -> str:
        def behave(connection):
            request = connection.receive()
            data = body(request) if callable(body) else body
            head = f"HTTP/1.1 422 No\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.send(head.encode() + data)

        worker = caller(url(serve(behave).url), **settings)
        database.add_job()
        attempt = worker.call()
        assert attempt.outcome == "failed"
        return attempt.error + worker.output.getvalue()

    return call


@pytest.mark.parametrize("left", [4, 5, 17, 43])
@pytest.mark.parametrize("line", ["." * 500, "." * 150 + "\n"])
def test_error_page_that_is_cut_within_our_token_leaves_nothing_of_it(failed, left, line):
    token = "Tq7-" + "aB3/" * 10
    page = (line * 20)[-(TEXT_LIMIT - left) :] + token
    said = failed(page.encode(), STAGE_API_TOKEN=token)
    assert said.startswith("HTTP 422: .....") and "Tq" not in said


def as_json(request) -> bytes:
    return json.dumps(request.headers).encode()


def as_html(request) -> bytes:
    return html.escape(request.head).encode()


@pytest.mark.parametrize("page", [as_json, as_html])
def test_error_page_that_shows_our_headers_is_kept_without_credentials(failed, page):
    token = 'tok"en/with\\odd&chars=='
    assert token.split('"')[1] not in failed(page, STAGE_API_TOKEN=token)
    said = failed(page, lambda url: url.replace("//", "//me:s3cr3t-of-api@"))
    assert "***" in said and base64.b64encode(b"me:s3cr3t-of-api").decode()[:8] not in said
