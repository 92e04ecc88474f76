"""What users test their stage functions with, and `call --dry-run`: nothing is sent."""

import ast
import json
import os
import re
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_stages import make_call as real_call
from variants import VARIANTS

from examples.variants import stages as ten
from pipeline import MissingValue, Table
from stage_http import Answer, NoAnswer, TimeIsUp
from stage_testing import FakeStageApi, make_call

# --- make_call and FakeStageApi ------------------------------------------------------------


def test_stage_function_is_tested_without_a_database():
    api = FakeStageApi()
    rows = {"job_inputs": {"text": "오늘의 커피", "proposal_id": 7}}
    assert ten.overlay(make_call(api, ten.VARIANTS("planner", "done"), rows=rows)).status == 200
    [request] = api.requests
    assert request.path == "/api/yh/overlay"
    assert [*request.body] == ["job_variants_id", "job_id", "tenant_id", "text", "proposal_id"]
    assert (request.body["text"], request.body["proposal_id"]) == ("오늘의 커피", 7)


def test_request_has_the_headers_that_are_sent():
    api = FakeStageApi(settings={"STAGE_API_TOKEN": "s3cr3t"})
    make_call(api, attempt=3).post("/x")
    [request] = api.requests
    assert uuid.UUID(request.headers["idempotency-key"]) and request.headers["X-Attempt"] == "3"
    assert request.headers["Authorization"] == "Bearer s3cr3t"


def test_same_request_as_a_stage_api_gets(accepting):
    api = FakeStageApi(settings={"STAGE_API_URL": accepting.url})
    given = {"text": "안녕", "id": uuid.UUID(int=7)}
    real_call(accepting).post("/api/x y", **given)
    job = {name: getattr(real_call(accepting), name) for name in ("job_id", "stage", "tenant_id")}
    make_call(api, **job).post("/api/x y", **given)
    [[real], [fake]] = accepting.requests, api.requests
    assert json.loads(real.body) == fake.body
    headers = {name.lower(): value for name, value in fake.headers.items()}
    assert headers == {k: v for k, v in real.headers.items() if k != "host"}


def test_answers_come_one_after_the_other_and_the_last_stays():
    api = FakeStageApi(503, Answer(409, "busy"), 200)
    call = make_call(api)
    assert [call.post("/x").status for _ in range(4)] == [503, 409, 200, 200]
    assert call.answer == Answer(200)


def test_stage_api_may_leave_a_call_without_an_answer():
    api = FakeStageApi(NoAnswer("time ran out"))
    with pytest.raises(NoAnswer):
        make_call(api).post("/x")
    assert len(api.requests) == 1


def test_what_the_real_one_refuses_is_refused():
    api = FakeStageApi()
    with pytest.raises(ValueError, match="slash"):
        make_call(api).post("x")
    with pytest.raises(ValueError, match="JSON"):
        make_call(api).post("/x", score=float("nan"))
    with pytest.raises(TimeIsUp):
        make_call(api, until=0.0).post("/x")
    assert api.requests == []


@pytest.mark.parametrize(
    ("state", "ids"),
    [
        (("img_gen", "done"), ["job_id"]),
        (VARIANTS("img_gen", "done"), ["job_variants_id", "job_id"]),
        (VARIANTS.every("img_gen", "done"), ["job_id"]),
        (Table("parts", id="part", parent=(VARIANTS, "variant")).every("a", "b"),
         ["job_variants_id", "job_id"]),
        (Table("parts", id="part", parent=(VARIANTS, "variant"))("a", "b"), ["part", "variant"]),
        (Table("alone", id="n")("a", "b"), ["n"]),
    ],
    ids=["jobs", "child", "join", "join of children", "grandchild", "no parent"],
)  # fmt: skip
def test_state_says_whose_ids_the_body_has(state, ids):
    api = FakeStageApi()
    call = make_call(api, state)
    call.post("/x")
    assert [*api.requests[0].body] == [*ids, "tenant_id"]
    assert (call.key, call.job_id) == (call.ids[ids[0]], call.ids[ids[-1]])


def test_ids_and_other_fields_may_be_given():
    assert make_call(job_id=7).ids == {"job_id": 7}
    call = make_call(None, VARIANTS("a", "b"), ids={"job_variants_id": 3}, job_id=7, tenant_id=None)
    assert (call.ids, call.key, call.job_id) == ({"job_variants_id": 3, "job_id": 7}, "3", 7)
    assert call.tenant_id is None
    with pytest.raises(ValueError, match=r"ids=\['variant'\]: a row of jobs_variants has job_vari"):
        make_call(None, VARIANTS("a", "b"), ids={"variant": 3})
    with pytest.raises(ValueError, match="is no state"):
        make_call(None, "img_gen")


def test_queries_are_answered_from_rows_and_kept():
    call = make_call(job_id=7, rows={"FROM notes": [{"note": "a"}, {"note": "b"}], "texts": None})
    assert call.fetch_value("SELECT note\n  FROM notes WHERE lang = %(lang)s", lang="ko") == "a"
    assert call.fetch_value("SELECT text FROM texts WHERE job_id = %(job_id)s") is None
    assert call.queries[0].params == {"job_id": 7, "tenant_id": "tenant", "lang": "ko"}
    with pytest.raises(MissingValue, match="no row for this job"):
        call.fetch_one("SELECT text FROM texts")


def test_null_where_a_value_is_needed_is_a_failure():
    call = make_call(rows={"job_inputs": {"text": None}})
    with pytest.raises(MissingValue, match="text is NULL"):
        call.fetch_one("SELECT text FROM job_inputs")
    assert call.fetch_value("SELECT text FROM job_inputs") is None


def test_query_that_no_row_was_given_for_says_which():
    call = make_call(rows={"job_inputs": {"text": "a"}, "text": {"text": "b"}})
    with pytest.raises(
        LookupError, match=r"none of rows=\['job_inputs', 'text'\] fits .* SELECT 1"
    ):
        call.fetch_value("SELECT 1")
    with pytest.raises(LookupError, match="several of rows fit this query"):
        call.fetch_value("SELECT text FROM job_inputs")


@pytest.fixture
def asking(database):
    """A call that asks a database, and one that does not."""
    real = real_call(SimpleNamespace(url="http://127.0.0.1:9"), settings=database.settings())
    return real, make_call(rows={"SELECT": {"class": 7}})


@pytest.mark.parametrize(
    "sql", ["SELECT %(nobody)s", "SELECT 'a' LIKE '% b'", "SELECT %s", "SELECT %(number)d"]
)
def test_placeholder_that_psycopg2_would_refuse_is_refused(asking, sql):
    for call in asking:
        with pytest.raises((LookupError, ValueError, TypeError)):
            call.fetch_value(sql, number=7)


def test_value_may_be_a_column_of_any_name_and_a_row_may_not(asking):
    for call in asking:
        assert call.fetch_value("SELECT %(number)s AS class WHERE '%%' <> 'a'", number=7) == 7
        with pytest.raises(ValueError, match="keyword: 'class'"):
            call.fetch_one("SELECT 7 AS class")
    assert asking[0].fetch_value("SELECT 7, 8") == 7


def test_columns_are_named_as_psycopg2_names_them(asking):
    call = make_call(rows={"SELECT": {"?column?": 1, "a b": 2, "1st": 3}})
    real, fake = (one.fetch_one('SELECT 1, 2 AS "a b", 3 AS "1st"') for one in (asking[0], call))
    assert real._asdict() == fake._asdict()


def test_settings_are_defaults_and_those_given(monkeypatch):
    monkeypatch.setenv("STAGE_API_URL", "http://elsewhere")
    call = make_call(settings={"RETRY_DELAY": "7"})
    assert (call.settings.RETRY_DELAY, call.settings.STAGE_API_URL) == (7, "http://localhost:8011")


def test_users_need_no_database_setting_and_no_server(tmp_path):
    test = ROOT / "docs" / "STAGES.md"
    section = test.read_text().split("## Testing a stage")[1]
    code = section.split("```python\n")[1].split("```")[0]
    names = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    code = code.replace("from stages import", "from examples.variants.stages import")
    (tmp_path / "test_mine.py").write_text(code)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DB_HOST": "nowhere.invalid"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(names)} passed" in done.stdout and len(names) > 1


# --- call --dry-run ------------------------------------------------------------------------

EVERYTHING = """
SELECT (SELECT json_agg(c) FROM stage_calls AS c)::text AS calls,
       (SELECT count(*) FROM stage_leases) AS leases,
       (SELECT count(*) FROM stage_attempts) AS attempts
"""


@pytest.fixture
def own_stages(tmp_path):
    """own_stages(body): a stages.py whose stage of (img_gen, done) has this body; as settings."""

    def write(body: str) -> dict[str, str]:
        code = "import requests, urllib.request\nfrom stage_http import Answer\n"
        code += f"def vlm_analyze(call):\n    {body}\n"
        code += "from demo.five_stages import PIPELINE\n"
        code += "PIPELINE = PIPELINE | {('img_gen', 'done'): vlm_analyze}\n"
        (tmp_path / "own_stages.py").write_text(code)
        return {"PIPELINE_MODULE": "own_stages", "PYTHONPATH": str(tmp_path)}

    return write


def test_dry_run_prints_the_request_and_changes_nothing(database, accepting, run_command):
    job = database.add_job()
    before = database.row(EVERYTHING)
    done = run_command(database, "call", job, "--dry-run", api=accepting)
    assert done.code == 0, done
    head, body = done.out.split("\n\n")
    lines = head.split("\n")
    assert lines[0] == f"POST {accepting.url}/api/yh/llava/stage1/validate"
    assert "X-Attempt: 1" in lines and "Content-Type: application/json" in lines
    assert json.loads(body) == {"job_id": job, "tenant_id": "tenant"}
    assert done.err == "dry run: nothing was sent, and nothing claimed\n"
    assert accepting.connections == 0
    assert database.row(EVERYTHING) == before


def test_dry_run_prints_what_is_then_sent(database, accepting, run_command):
    job = database.add_job()
    said = run_command(database, "call", job, "--dry-run", api=accepting).out
    assert run_command(database, "call", job, api=accepting).code == 0
    [request] = accepting.requests
    said = {name.lower(): value for name, value in re.findall(r"(?m)^([\w-]+): (.*)$", said)}
    assert said == {name: value for name, value in request.headers.items() if name != "host"}


@pytest.mark.parametrize("table", ["jobs", "jobs_variants"])
def test_dry_run_of_a_row_of_any_table(database, run_command, variants, table):
    job = database.add_job()
    row = job if table == "jobs" else variants.add(job, "img_gen", "done")[0]
    here = {"PIPELINE_MODULE": "variants", "PYTHONPATH": str(ROOT / "tests")}
    done = run_command(database, "call", row, "--dry-run", **here)
    assert done.code == 0, done
    ids = {"job_id": job} if table == "jobs" else {"job_variants_id": row, "job_id": job}
    assert json.loads(done.out.split("\n\n")[1]) == ids | {"tenant_id": "tenant"}


def test_dry_run_asks_the_database_and_shows_letters(database, run_command, own_stages):
    job = database.add_job()
    sql = "\"SELECT '안녕' || status FROM jobs WHERE job_id = %(job_id)s\""
    settings = own_stages(f"return call.post('/x', note=call.fetch_value({sql}))")
    assert '"note": "안녕done"' in run_command(database, "call", job, "--dry-run", **settings).out


def test_dry_run_shows_no_secret(database, run_command, own_stages):
    job = database.add_job()
    settings = own_stages("return requests.post('http://me:pass-word@h/x', data='s3cr3t-token',"
                          " headers={'X-Api-Key': 'mine', 'Cookie': 'crumbs'})")  # fmt: skip
    done = run_command(
        database, "call", job, "--dry-run", STAGE_API_TOKEN="s3cr3t-token", **settings
    )
    assert done.code == 0 and "POST http://me:***@h/x" in done.out and "X-Api-Key: ***" in done.out
    assert not re.search("pass-word|s3cr3t|mine|crumbs|bWU6", done.out + done.err)


def test_dry_run_of_a_given_up_call_counts_on(database, run_command):
    job = database.add_job()
    database.rows("UPDATE stage_calls SET due_at = 'infinity', attempts = 5")
    assert "X-Attempt: 6" in run_command(database, "call", job, "--dry-run").out
    assert database.owed(job).given_up


def test_dry_run_of_what_owes_nothing_says_so(database, run_command):
    job = database.add_job("img_gen", "queued")
    said = run_command(database, "call", job, "--dry-run").refused(1)
    assert said == f"job {job} owes no call: it is at (img_gen, queued)"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('text')", r"vlm_analyze: KeyError: 'text' \(.*own_stages.py:4\)"),
        ("return call.fetch_one('SELECT 1 WHERE false')", "MissingValue: no row for this job in: "),
        ("return call.post('/x').json()", "attribute 'json' .*after the answer 200 without"),
        ("return 7", "must return call.post"),
        ("urllib.request.urlopen('http://127.0.0.1:9')", "it connects to .*127.0.0.1.* by itself"),
        ("exit(3)", "SystemExit: 3"),
    ],
    ids=["bug", "no row", "after it", "no answer", "connects", "exits"],
)  # fmt: skip
def test_dry_run_of_a_function_that_fails_is_one_line(
    database, run_command, own_stages, body, said
):
    job = database.add_job()
    done = run_command(database, "call", job, "--dry-run", **own_stages(body))
    assert done.code == 1 and re.search(said, done.err), done
    assert done.err.count("\n") == 1


def test_dry_run_of_a_function_that_sends_nothing_says_so(database, run_command, own_stages):
    job = database.add_job()
    done = run_command(database, "call", job, "--dry-run", **own_stages("return Answer(200)"))
    assert (done.code, done.out) == (0, "")
    assert done.err == "dry run: the stage function sends nothing, and nothing claimed\n"


def test_dry_run_of_a_function_with_requests_of_its_own(
    database, accepting, run_command, own_stages
):
    job = database.add_job()
    code = f"return requests.post('{accepting.url}/mine', json={{'a': 1}})"
    done = run_command(database, "call", job, "--dry-run", **own_stages(code))
    assert done.code == 0 and done.out.startswith(f"POST {accepting.url}/mine\n"), done
    assert accepting.connections == 0
