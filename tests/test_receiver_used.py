"""receiver/ with other drivers, with pools, and in the frameworks that stage APIs are made with.

The frameworks are imported by the tests that need them: every process of the tests imports this
module, and they would take a quarter of the time that it needs before its first test.
"""

import asyncio
import json

import psycopg
import psycopg2.pool
import psycopg_pool
import pytest
from conftest import Database
from psycopg2.extras import NamedTupleCursor, RealDictCursor
from receiving import ANALYZE, Site


@pytest.fixture(scope="module")
def made(server):
    database = Database(server, server.create_installed())
    yield Site(database)
    database.close()


@pytest.fixture
def site(made) -> Site:
    made.database.rows("DELETE FROM jobs; DELETE FROM stage_requests; DELETE FROM effects")
    return Site(made.database)


# --- drivers and pools ---------------------------------------------------------------------


def psycopg2_autocommit(dsn):
    def connect():
        connection = psycopg2.connect(dsn)
        connection.autocommit = True
        return connection

    return {"connect": connect}


def psycopg2_rows_as_dicts(dsn):
    return {"connect": lambda: psycopg2.connect(dsn, cursor_factory=RealDictCursor)}


def psycopg2_rows_with_names(dsn):
    return {"connect": lambda: psycopg2.connect(dsn, cursor_factory=NamedTupleCursor)}


def psycopg2_pool(dsn):
    pool = psycopg2.pool.ThreadedConnectionPool(1, 4, dsn)
    return {"connect": pool.getconn, "release": pool.putconn}


def psycopg3(dsn):
    return {"connect": lambda: psycopg.connect(dsn)}


def psycopg3_rows_as_dicts(dsn):
    return {"connect": lambda: psycopg.connect(dsn, row_factory=psycopg.rows.dict_row)}


def psycopg3_pool(dsn):
    pool = psycopg_pool.ConnectionPool(dsn, min_size=1, max_size=4, open=True)
    return {"connect": pool.getconn, "release": pool.putconn}


def sqlalchemy_engine(dsn):
    import sqlalchemy

    url = "postgresql+psycopg2://"
    engine = sqlalchemy.create_engine(url, creator=lambda: psycopg2.connect(dsn))
    return {"connect": engine.raw_connection}


@pytest.mark.parametrize("kind", [
    psycopg2_autocommit, psycopg2_rows_as_dicts, psycopg2_rows_with_names, psycopg2_pool,
    psycopg3, psycopg3_rows_as_dicts, psycopg3_pool, sqlalchemy_engine,
])  # fmt: skip
def test_driver_takes_works_repeats_and_recovers(site, kind):
    site.receiver = site.make(**kind(site.database.dsn))
    job, lost = site.database.add_job(), site.database.add_job()
    request = site.request(job)
    first = site.run(request)
    assert first.status == 200 and site.run(request) == first
    assert (site.effects(job), site.database.state(job)) == (1, ("vlm_analyze", "done"))
    assert site.run(({}, b'{"job_id": "no uuid"}')).status == 422
    # Its process dies within the work.
    _, taken = site.receiver.begin(ANALYZE, *site.request(lost))
    taken._session.drop()
    site.database.wait_for("SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'")
    assert site.receiver.recover(ANALYZE) == 1
    assert site.database.state(lost) == ("img_gen", "done")
    # What is lost while it works is written on another connection.
    retried = site.request(lost)

    def work(job):
        site.cut("pg_stat_activity WHERE datname = current_database()"
                 " AND pid <> pg_backend_pid() AND backend_type = 'client backend'")  # fmt: skip
        return site.work(job)

    assert site.run(retried, work).status == 200 and site.effects(lost) == 1


@pytest.mark.parametrize("driver", [psycopg2, psycopg], ids=["psycopg2", "psycopg"])
@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("lost_after", [None, 900])
def test_connection_is_given_back_as_it_came(site, driver, autocommit, lost_after):
    connection, given_back = driver.connect(site.database.dsn), []
    connection.autocommit = autocommit
    site.receiver = site.make(lambda: connection, release=given_back.append, lost_after=lost_after)
    job = site.database.add_job()
    assert site.run(site.request(job)).status == 200 and site.effects(job) == 1
    assert given_back and connection.autocommit == autocommit
    connection.close()


def test_statement_of_sqlalchemy_is_written_with_the_rest(site):
    import sqlalchemy
    from sqlalchemy.dialects.postgresql import psycopg2 as dialect

    effects = sqlalchemy.table("effects", *map(sqlalchemy.column, ("job_id", "made_by")))

    def work(job):
        made = effects.insert().values(job_id=job.id, made_by=job.key)
        made = made.compile(dialect=dialect.dialect())
        job.write(str(made), made.params)

    job = site.database.add_job()
    assert site.run(site.request(job), work).status == 200 and site.effects(job) == 1


# --- frameworks ----------------------------------------------------------------------------


def post_to_flask(site, request):
    import flask

    app = flask.Flask("stage")

    @app.post("/api/yh/llava/stage1/validate")
    def validate():
        return site.receiver.run(
            ANALYZE, flask.request.headers, flask.request.get_data(), site.work
        )

    headers, body = request
    answer = app.test_client().post("/api/yh/llava/stage1/validate", headers=headers, data=body)
    return answer.status_code, answer.get_data(), answer.headers["Content-Type"]


def post_to_fastapi(site, request):
    import fastapi
    import httpx
    from fastapi.concurrency import run_in_threadpool

    app = fastapi.FastAPI()

    @app.post("/api/yh/llava/stage1/validate")
    async def validate(request: fastapi.Request):
        given = ANALYZE, request.headers, await request.body(), site.work
        return fastapi.Response(*await run_in_threadpool(site.receiver.run, *given))

    async def post(headers, body):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            url = "http://stage/api/yh/llava/stage1/validate"
            return await client.post(url, headers=headers, content=body)

    answer = asyncio.run(post(*request))
    return answer.status_code, answer.content, answer.headers["Content-Type"]


@pytest.mark.parametrize("post", [post_to_flask, post_to_fastapi])
def test_framework_passes_request_and_answer_on(site, post):
    job = site.database.add_job()
    request = site.request(job)
    first = post(site, request)
    assert first == (
        200,
        json.dumps({"seen": "강아지"}, ensure_ascii=False).encode(),
        "application/json",
    )
    assert post(site, request) == first and site.effects(job) == 1
