"""`traceparent`: which trace the calls of a job and of its rows belong to."""

import re
from contextlib import closing

import pytest
from test_stages import JOB, make_call
from variants import PIPELINE, TABLE, VARIANTS, install, stage

import db
import pipeline
import tracing
from ops.install import apply
from ops.problem import Problem
from pipeline import Table

HEADER = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-01")
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def trace_of(request) -> str:
    return HEADER.fullmatch(request.headers["traceparent"])[1]


def test_all_stages_of_a_job_are_one_trace_which_its_id_names(database, api, listener):
    jobs = [database.add_job(), database.add_job()]
    assert listener(database, "run", "--once", api=api).wait() == 0
    assert len(api.requests) == 10
    for job in jobs:
        found = [HEADER.fullmatch(r.headers["traceparent"]) for r in api.calls(job)]
        assert {header[1] for header in found} == {job.replace("-", "")}
        assert len({header[2] for header in found}) == 5


def test_each_attempt_is_a_span(accepting):
    for call in (make_call(accepting), make_call(accepting), make_call(accepting, attempt=2)):
        call.post("/x")
    first, again, second = (request.headers["traceparent"] for request in accepting.requests)
    assert first == again and first != second and first[:36] == second[:36]


@pytest.mark.parametrize(
    "key", ["7", "주문 7", "00000000-0000-0000-0000-000000000000", JOB.upper()]
)
def test_id_that_is_no_uuid_has_a_trace_of_its_own(accepting, key):
    make_call(accepting, key=key).post("/x")
    make_call(accepting, key=key + "7").post("/x")
    one, another = map(trace_of, accepting.requests)
    assert int(one, 16) and one != another


def test_calls_of_a_job_its_rows_and_their_join_are_one_trace(
    database, variants, accepting, caller
):
    job = database.add_job()
    variants.add(job, "img_gen", "done", count=2)
    worker = caller(accepting.url)
    assert [worker.call().outcome for _ in range(3)] == ["succeeded"] * 3
    assert {trace_of(request) for request in accepting.requests} == {job.replace("-", "")}


CROPS = Table("crops", id="crop_id", parent=(VARIANTS, "variant_id"))
CROPS_TABLE = """
CREATE TABLE crops (crop_id uuid PRIMARY KEY, variant_id uuid, current_step text, status text);
ALTER TABLE jobs ADD trace text
"""
TRACED = Table("jobs", id="job_id", trace="trace")


@pytest.fixture
def crops(database, use_pipeline):
    """add(trace): a job with this trace, one variant and one crop of that, each of which owes."""
    use_pipeline({TRACED("a", "done"): stage("one"), VARIANTS("a", "done"): stage("two"),
                  CROPS("a", "done"): stage("three")})  # fmt: skip
    variants = install(database, TABLE, CROPS_TABLE)

    def add(trace: str | None) -> str:
        job = database.add_job("a", "queued")
        database.rows("UPDATE jobs SET trace = %s, status = 'done' WHERE job_id = %s", trace, job)
        [variant] = variants.add(job, "a", "done")
        database.rows("INSERT INTO crops VALUES (gen_random_uuid(), %s, 'a', 'done')", variant)
        return job

    return add


def test_declared_column_gives_the_trace_to_a_job_and_all_below_it(crops, accepting, caller):
    worker = caller(accepting.url)
    for given in (GIVEN, None, GIVEN.upper()):
        job = crops(given)
        assert [worker.call().outcome for _ in range(3)] == ["succeeded"] * 3
        expected = GIVEN[3:35] if given == GIVEN else job.replace("-", "")
        assert {trace_of(request) for request in accepting.requests[-3:]} == {expected}


def test_calls_are_made_without_the_column(crops, database, accepting, caller):
    job, worker = crops(GIVEN), caller(accepting.url)
    database.rows("ALTER TABLE jobs DROP trace")
    assert [worker.call().outcome for _ in range(3)] == ["succeeded"] * 3
    assert {trace_of(request) for request in accepting.requests} == {job.replace("-", "")}


def test_calls_are_made_without_a_database(accepting, use_pipeline):
    use_pipeline({TRACED("img_gen", "done"): stage("one")})
    call = make_call(accepting)
    call.settings.DB_HOST, call.settings.DB_PORT = "127.0.0.1", 1
    assert call.post("/x").status == 200
    assert trace_of(accepting.requests[0]) == JOB.replace("-", "")


def test_column_that_is_not_there_is_refused(database, use_pipeline):
    use_pipeline({TRACED("a", "done"): stage("one")})
    with (
        pytest.raises(Problem, match="table jobs has no column trace: add it"),
        closing(db.connect(database.settings())) as conn,
    ):
        apply(conn)


def test_jobs_that_are_declared_are_still_announced():
    assert TRACED.channel == db.CHANNEL
    with pytest.raises(ValueError, match="table jobs: id='id': allowed is 'job_id'"):
        pipeline.check({Table("jobs", id="id")("a", "done"): stage("one")})
    assert PIPELINE and pipeline.check({TRACED("a", "done"): stage("one")} | PIPELINE) is None


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (GIVEN, 1),
        (f" {GIVEN}\n", 1),
        (GIVEN[:-1] + "0", 0),
        (GIVEN[:-2] + "03", 1),
        ("01" + GIVEN[2:] + "-later", 1),
    ],
)
def test_traceparent_is_read(given, flags):
    trace = tracing.read(given)
    assert trace == (GIVEN[3:35], GIVEN[36:52], flags)
    assert trace.traceparent("0" * 15 + "1") == f"00-{GIVEN[3:35]}-0000000000000001-0{flags}"


BAD = [
    *(None, "", "x", GIVEN[:-1], GIVEN + "-more", GIVEN.replace("0af", "0AF")),
    *("ff" + GIVEN[2:], "01" + GIVEN[2:] + "later"),
    *(GIVEN.replace(GIVEN[3:35], "0" * 32), GIVEN.replace(GIVEN[36:52], "0" * 16)),
]


@pytest.mark.parametrize("given", BAD)
def test_what_is_no_traceparent_is_passed_over(given):
    assert tracing.read(given) is None
