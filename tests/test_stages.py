"""What a stage API receives: method, path, body and headers of a call."""

import base64
import json
import time
import uuid
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from raw_server import OK, in_turn

import config
import pipeline
from demo import five_stages
from demo.stage_server import Answer
from stage_http import StageApi, TimeIsUp
from trigger import boottime

PATHS = {
    "vlm_analyze": "/api/yh/llava/stage1/validate",
    "yolo_detect": "/api/yh/yolo/detect",
    "planner": "/api/yh/planner",
    "overlay": "/api/yh/overlay",
    "vlm_judge": "/api/yh/llava/stage2/judge",
}
JOB = "7c2e4a1e-0000-4000-8000-000000000001"


def make_call(server, url: str = "", **changed) -> pipeline.Call:
    settings = config.read({"STAGE_API_URL": url or server.url})
    owed = dict(job_id=JOB, tenant_id="tenant", current_step="img_gen", status="done")
    owed |= dict(stage="vlm_analyze", call_id=1, attempt=1, spent=1, max_attempts=5, timeout=30)
    owed |= dict(started_at="now", listener="l", key=JOB, leased_until=boottime() + 60)
    owed |= dict(api=StageApi(settings), settings=settings, until=time.monotonic() + 30)
    return pipeline.Call(**(owed | changed))


def test_call_is_a_post_of_json_with_job_and_tenant_alone(accepting):
    assert make_call(accepting).post("/api/x").status == 200
    [request] = accepting.requests
    assert request.head.split("\r\n")[0] == "POST /api/x HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.body) == {"job_id": JOB, "tenant_id": "tenant"}


def test_stage_function_adds_fields_to_the_body(accepting):
    make_call(accepting).post("/api/x", text="안녕", proposal_id=7, nested={"a": [None, 1.5]})
    assert json.loads(accepting.requests[0].body) == {
        "job_id": JOB, "tenant_id": "tenant",
        "text": "안녕", "proposal_id": 7, "nested": {"a": [None, 1.5]},
    }  # fmt: skip


@pytest.mark.parametrize("job_id", [2**63 - 1, 0, -1, "42", "text id", None])
def test_job_id_keeps_its_json_type(accepting, job_id):
    make_call(accepting, job_id=job_id).post("/api/x")
    sent = json.loads(accepting.requests[0].body)["job_id"]
    assert (type(sent), sent) == (type(job_id), job_id)


def test_uuid_is_sent_as_its_text(accepting):
    make_call(accepting, job_id=uuid.UUID(JOB)).post("/api/x")
    assert json.loads(accepting.requests[0].body)["job_id"] == JOB


def test_headers_are_these_and_no_others(accepting):
    make_call(accepting, attempt=3).post("/api/x")
    headers = accepting.requests[0].headers
    assert headers.keys() == {
        "host", "user-agent", "accept-encoding", "content-type", "content-length",
        "idempotency-key", "x-attempt", "traceparent",
    }  # fmt: skip
    assert headers["x-attempt"] == "3"
    assert headers["accept-encoding"] == "identity"


def test_idempotency_key_is_that_of_the_call(accepting):
    def key(**changed) -> str:
        make_call(accepting, **changed).post("/api/x")
        return accepting.requests[-1].headers["idempotency-key"]

    first = key()
    assert uuid.UUID(first)
    assert [key(attempt=2), key(attempt=9, spent=4), key(tenant_id="other")] == [first] * 3
    others = [key(call_id=2), key(key="other"), key(stage="planner")]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    "text",
    [
        "a\r\nX-Forged: 1\r\n\r\nGET / HTTP/1.1",
        "💥 한국어 e\u0301 \u202e",
        '"\\\x01\x7f\x85\u2028',
        "x" * 2**20,
        "lone \ud800 surrogate",
        "",
    ],
    ids=["CRLF", "emoji", "control", "1MB", "surrogate", "empty"],
)
def test_hostile_text_arrives_intact_in_the_body_and_in_no_header(accepting, text):
    assert make_call(accepting, tenant_id=text).post("/api/x", note=text).status == 200
    [request] = accepting.requests
    assert json.loads(request.body) == {"job_id": JOB, "tenant_id": text, "note": text}
    assert len(request.headers) == 8 and "forged" not in request.head.lower()
    assert len(request.head) < 500


def test_job_id_of_text_cannot_forge_a_header(accepting):
    forged = "1\r\nX-Forged: 1\r\n\r\n" + "안녕" * 5000
    assert make_call(accepting, job_id=forged).post("/api/x").status == 200
    [request] = accepting.requests
    assert json.loads(request.body)["job_id"] == forged
    assert len(request.headers) == 8 and len(request.head) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_number_that_json_does_not_have_is_refused_before_anything_is_sent(accepting, value):
    with pytest.raises(ValueError, match="JSON"):
        make_call(accepting).post("/api/x", score=value)
    assert accepting.connections == 0


@pytest.mark.parametrize("value", [
    b"x", bytearray(b"x"), memoryview(b"x"), {"x"}, frozenset("x"), [{"a": b"x"}],
    map(str, [1]), (n for n in [1]), {"a": 1}.keys(), range(2), object(), StageApi,
])  # fmt: skip
def test_value_whose_text_would_be_python_is_refused_before_anything_is_sent(accepting, value):
    with pytest.raises(TypeError, match=r"a field is of type \w+, which JSON does not have"):
        make_call(accepting).post("/api/x", image=value)
    assert accepting.connections == 0


def test_value_with_a_text_of_its_own_is_sent_as_that(accepting):
    given = [uuid.UUID(JOB), Decimal("1.50"), date(2026, 1, 2), timedelta(1), Path("/a")]
    make_call(accepting).post("/api/x", given=given)
    sent = [JOB, "1.50", "2026-01-02", "1 day, 0:00:00", "/a"]
    assert json.loads(accepting.requests[0].body)["given"] == sent


def test_field_may_be_called_path(accepting):
    make_call(accepting).post("/api/x", path="/images/1.png")
    assert json.loads(accepting.requests[0].body)["path"] == "/images/1.png"


@pytest.mark.parametrize("stage", PATHS)
def test_state_before_a_stage_leads_to_its_path(accepting, stage):
    before = dict(zip(PATHS, ["img_gen", *PATHS], strict=False))[stage]
    function = five_stages.PIPELINE[before, "done"]
    assert function.__name__ == stage
    assert function(make_call(accepting)).status == 200
    assert accepting.requests[0].head.startswith(f"POST {PATHS[stage]} ")


def test_pipeline_has_the_five_stages_and_no_more():
    assert pipeline.stage_names() == list(PATHS)
    assert len(five_stages.PIPELINE) == 5


def test_answer_is_kept_in_the_call(accepting):
    call = make_call(accepting)
    assert call.post("/api/x") is call.answer


def test_nothing_is_sent_once_the_time_is_used_up(accepting):
    with pytest.raises(TimeIsUp, match="before its POST"):
        make_call(accepting, until=time.monotonic()).post("/api/x")
    assert accepting.connections == 0


def test_netrc_and_proxy_variables_are_ignored(accepting, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login intruder password stolen\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make_call(accepting).post("/api/x").status == 200
    assert "authorization" not in accepting.requests[0].headers


@pytest.mark.parametrize(
    ("written", "sent"),
    [("user:p%40ss", "user:p@ss"), ("이름:%EB%B9%84%EB%B0%80", "이름:비밀"), ("user", "user:")],
)
def test_credentials_of_the_url_are_sent_as_they_are(
    accepting, tmp_path, monkeypatch, written, sent
):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login intruder password stolen\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    make_call(accepting, url=accepting.url.replace("//", f"//{written}@")).post("/api/x")
    header = accepting.requests[0].headers["authorization"]
    assert base64.b64decode(header.removeprefix("Basic ")).decode() == sent


def test_base_path_of_the_url_is_kept(accepting):
    make_call(accepting, url=accepting.url + "/base/").post("/api/x")
    assert accepting.requests[0].head.startswith("POST /base/api/x ")


# --- where it is sent ----------------------------------------------------------------------


def test_stage_with_a_url_of_its_own_is_called_there(database, serve, caller):
    own, others = serve(in_turn(OK)), serve(in_turn(OK))
    database.add_job("img_gen"), database.add_job("overlay")
    worker = caller(others.url, STAGE_API_URL_VLM_JUDGE=own.url)
    assert [worker.call().outcome for _ in range(2)] == ["succeeded", "succeeded"]
    assert [r.head.split()[1] for r in own.requests] == ["/api/yh/llava/stage2/judge"]
    assert [r.head.split()[1] for r in others.requests] == ["/api/yh/llava/stage1/validate"]


def test_url_of_no_stage_is_one_line(database, run_command):
    done = run_command(database, "verify", STAGE_API_URL_PLANER="http://api")
    said = (
        "STAGE_API_URL_PLANER: demo/five_stages.py has no such stage: remove it from the"
        " environment, or rename it; allowed is STAGE_API_URL_VLM_ANALYZE or"
    )
    assert said in done.out + done.err and done.code == 2
    assert run_command(database, "run", "--once", STAGE_API_URL_PLANER="http://api").code == 2
    *_, note, _ = run_command(database, "install", STAGE_API_URL_PLANER="http://api").lines
    assert note.startswith(f"  note: no listener can start: {said}")


def test_bad_url_of_a_stage_is_one_line():
    with pytest.raises(config.SettingsError, match="STAGE_API_URL_PLANNER='ftp://x' cannot be"):
        config.read({"STAGE_API_URL_PLANNER": "ftp://x"})


def test_token_is_sent_as_bearer(database, accepting, caller):
    database.add_job()
    caller(accepting.url, STAGE_API_TOKEN="s3cr3t").call()
    assert accepting.requests[0].headers["authorization"] == "Bearer s3cr3t"


def test_token_is_shown_nowhere(database, api, listener, run_command):
    token = "s3cr3t-token"
    api.on("planner", lambda request: Answer(400, request.headers["Authorization"].encode()))
    api.on("vlm_judge", lambda request: Answer(500, request.headers["Authorization"].encode()))
    process = listener(database, "run", api=api, STAGE_API_TOKEN=token, RETRY_DELAY=3600)
    jobs = [database.add_job("yolo_detect"), database.add_job("overlay")]
    process.wait_for_line("파이프라인 단계 실행 실패", count=2)
    process.stop()
    commands = ["status", "status --json", f"job {jobs[0]}", f"job --json {jobs[1]}", "verify"]
    shown = [run_command(database, *c.split(), STAGE_API_TOKEN=token) for c in commands]
    assert token not in process.output + "".join(done.out + done.err for done in shown)
    stored = database.rows("SELECT last_error FROM stage_calls") + database.rows(
        "SELECT error FROM stage_attempts"
    )
    assert len(stored) == 4 and all("Bearer ***" in row[0] for row in stored)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "한글", "tab\t."])
def test_token_that_no_header_can_hold_is_refused_unseen(token):
    with pytest.raises(config.SettingsError) as refused:
        config.read({"STAGE_API_TOKEN": token})
    assert str(refused.value).startswith("STAGE_API_TOKEN=*** cannot be used: allowed is visible")


def test_token_and_user_of_the_url_exclude_each_other():
    both = {"STAGE_API_TOKEN": "t", "STAGE_API_URL": "http://user:pw@api"}
    with pytest.raises(config.SettingsError, match="give one of them") as refused:
        config.read(both)
    assert "pw" not in str(refused.value)
