"""`test-job`: a job of its own goes through the pipeline, or the line says where it stalls."""

import re
from contextlib import closing

import pytest
from claims import connected
from commands import ROOT
from raw_server import answering
from reports import attempt
from scraping import scrape
from waiting import LISTENING, gate

import history
from demo.stage_api import StageApi
from demo.stage_server import Answer
from ops import trial
from ops.follow import Follower, Look
from signals import STOPPING

STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]


@pytest.fixture
def running(database, api, listener):
    """A listener that is ready."""
    listener(database, api=api, MAX_ATTEMPTS=2).wait_for_line(LISTENING)


def test_job_that_gets_through_prints_every_hop(database, run_command, running):
    done = run_command(database, "test-job")
    assert done.code == 0
    made, *hops, passed = done.lines
    job = re.fullmatch(r"job (\S+): \(img_gen, done\), tenant test_tenant", made)[1]
    hop = re.compile(r"  (\w+) +waited +\d+\.\d\d s, took +\d+\.\d\d s")
    assert [hop.fullmatch(line)[1] for line in hops] == STAGES
    assert re.fullmatch(r"passed: 5 stages in \d+\.\d s", passed)
    assert database.state(job) == ("vlm_judge", "done")


def test_clean_leaves_nothing_of_the_job(database, run_command, running):
    done = run_command(database, "test-job", "--clean")
    assert done.code == 0 and done.lines[-1].endswith("and its history are deleted")
    for table in ("jobs", "stage_calls", "stage_attempts"):
        assert database.value(f"SELECT count(*) FROM {table}") == 0


@pytest.mark.parametrize("number", STOPPING)
def test_clean_deletes_the_job_of_a_run_that_is_stopped(database, api, listener, running, number):
    with gate(api):
        process = listener(database, "test-job", "--clean")
        process.wait_for_line("tenant test_tenant")
        api.wait_for(lambda api: api.calls())
        process.signal(number)
        assert process.wait() == 130
    assert "and its history are deleted" in process.output
    assert database.value("SELECT count(*) FROM jobs") == 0


# An INSERT that goes on until the test has added a row to `go`.
SLOW_INSERT = """
CREATE TABLE go (); GRANT ALL ON go TO PUBLIC;
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    LOOP EXIT WHEN EXISTS (SELECT FROM go); PERFORM pg_sleep(0.01); END LOOP; RETURN NULL;
END $$;
CREATE TRIGGER wait AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION wait()
"""


INSERTING = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'job-state-listener test-job' AND wait_event = 'PgSleep'
"""


@pytest.mark.parametrize("number", STOPPING)
def test_clean_deletes_a_job_that_was_just_being_made(database, listener, running, number):
    database.rows(SLOW_INSERT)
    process = listener(database, "test-job", "--clean")
    database.wait_for(INSERTING)
    process.signal(number)
    database.rows("INSERT INTO go DEFAULT VALUES")
    assert process.wait() == 130
    assert "and its history are deleted" in process.output
    assert database.value("SELECT count(*) FROM jobs") == 0


def test_clean_lets_no_counter_of_metrics_fall(database):
    job = database.add_job("vlm_judge", "done")
    attempt(database, job, ago=600), attempt(database, job, ago=60)
    with connected(database) as conn:
        assert history.count(conn) == 1
        before = scrape(database).counters()
        trial.remove(conn, job, [])
    assert database.attempts(job) == []
    assert scrape(database).counters() == before


def test_given_up_stage_is_named_with_its_error(database, api, run_command, running):
    api.on("planner", lambda _: Answer(422, b"no text"))
    done = run_command(database, "test-job")
    assert done.code == 1
    assert re.search(r"stalls at planner: given up: HTTP 422: no text; look with ./jsl", done.err)
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == STAGES[:2]


def test_stage_that_fails_the_job_is_named(database, api, run_command, running):
    api.on("overlay", lambda request: api.work(request, "failed"))
    done = run_command(database, "test-job")
    assert done.code == 1 and "stalls at overlay: the stage set it to failed" in done.err


@pytest.mark.slow
def test_stage_that_changes_nothing_is_named(database, api, run_command, running):
    api.on("yolo_detect", lambda _: Answer(202))
    done = run_command(database, "test-job", "--timeout", "5")
    assert done.code == 1
    assert "stalls at yolo_detect: accepted, but the job has not changed" in done.err


@pytest.mark.slow
def test_stage_that_leaves_the_job_where_nothing_leads_is_named(
    database, api, run_command, running
):
    def misspell(request):
        database.move(request.job_id, "yolo_detect", "doen")
        return Answer(200)

    api.on("yolo_detect", misspell)
    done = run_command(database, "test-job", "--timeout", "5")
    assert done.code == 1
    assert "stalls at (yolo_detect, doen): no stage of PIPELINE leads to that state" in done.err


def test_paused_stage_is_named_with_who_did_it(database, run_command, running):
    run_command(database, "pause", "vlm_analyze", "--reason", "new GPU")
    done = run_command(database, "test-job", "--timeout", "1.5", "--clean")
    assert done.code == 1
    paused = r"vlm_analyze is paused by \S+: new GPU; ./jsl resume vlm_analyze; "
    assert re.search(f"stalls at vlm_analyze: {paused}", done.err)
    assert "to look at it, run test-job without --clean" in done.err and "look with" not in done.err
    assert database.value("SELECT count(*) FROM jobs") == 0


TRIED = """
INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                            finished_at, outcome)
VALUES (%s, %s, 1, 1, %s, 'w', to_timestamp(%s), to_timestamp(%s), 'succeeded')
"""


def test_row_that_a_stage_has_made_waits_from_when_something_follows_from_it(variants, capsys):
    database, job = variants.database, variants.database.add_job("img_gen", "done")
    with connected(database) as conn:
        follower = Follower(conn, job, {}, stays=True)
        follower.since = 0

        def shown(now: float) -> list[str]:
            look = Look(conn, job)
            look.now = now
            follower.show(look)
            return re.findall("waited.*", capsys.readouterr().out)

        shown(100)
        [ready] = variants.add(job, "img_gen", "done")
        [queued] = variants.add(job, "img_gen", "queued")
        shown(200)
        variants.move(queued, "img_gen", "done")
        shown(300)
        for row, called in (ready, 305), (queued, 306):
            database.rows(TRIED, row, "jobs_variants", "yolo_detect", called, called + 2)
            variants.move(row, "yolo_detect", "done")
        assert shown(400) == [f"waited 105.00 s, took   2.00 s  {ready[:8]}…",
                              f"waited   6.00 s, took   2.00 s  {queued[:8]}…"]  # fmt: skip


def test_without_a_listener_no_job_is_made(database, run_command):
    refused = run_command(database, "test-job").refused(1)
    assert refused == "no listener is connected: start ./jsl"
    assert database.value("SELECT count(*) FROM jobs") == 0


@pytest.mark.parametrize(
    "column",
    ["bigint GENERATED ALWAYS AS IDENTITY", "bigserial", "text", "integer", "uuid"],
)
def test_id_of_any_type(empty_database, run_command, listener, serve, column):
    empty_database.rows(
        f"CREATE TABLE jobs (job_id {column} PRIMARY KEY, tenant_id text, current_step text,"
        " status text)"
    )
    run_command(empty_database, "install")
    refusing = serve(answering(b"HTTP/1.1 422 No\r\nContent-Length: 0\r\n\r\n"))
    listener(empty_database, STAGE_API_URL=refusing.url).wait_for_line(LISTENING)
    done = run_command(empty_database, "test-job")
    assert done.code == 1 and "stalls at vlm_analyze: given up: HTTP 422" in done.err


def test_table_that_wants_more_says_what(database, run_command, running):
    database.rows("ALTER TABLE jobs ADD COLUMN image text NOT NULL")
    done = run_command(database, "test-job")
    assert 'null value in column "image"' in done.refused(1)


# --- example_job ---------------------------------------------------------------------------

INSERT = "INSERT INTO jobs (tenant_id, current_step, status) VALUES ('theirs', 'img_gen', '{}')"


@pytest.fixture
def with_example_job(tmp_path, database, run_command):
    """with_example_job(body, *args): test-job with a pipeline whose example_job has this body."""

    def run(body: str, *args: str, pipeline: str = "from demo.five_stages import PIPELINE\n"):
        (tmp_path / "own.py").write_text(f"{pipeline}\ndef example_job(conn):\n    {body}\n")
        return run_command(database, "test-job", *args, PIPELINE_MODULE="own", PYTHONPATH=tmp_path)

    return run


def made(status: str = "done") -> str:
    sql = INSERT.format(status) + " RETURNING job_id"
    return f'c = conn.cursor(); c.execute("{sql}"); job = c.fetchone()[0]'


def test_job_of_example_job_is_followed(database, with_example_job, running):
    done = with_example_job(f"{made()}; return job")
    assert done.code == 0
    assert re.fullmatch(r"job \S+: \(img_gen, done\), tenant theirs", done.lines[0])
    assert [line.split()[0] for line in done.lines[1:-1]] == STAGES
    assert database.value("SELECT status FROM jobs") == "done"


BAD = {
    "raises": ("raise ValueError('no image')", "example_job of own: ValueError: no image"),
    "returns None": (made(), "example_job of own returned None: it must return the job's id"),
    "returns an id of no job": (
        "return '00000000-0000-0000-0000-000000000000'",
        "example_job of own returned 00000000-0000-0000-0000-000000000000, and there is no such",
    ),
    "returns no id": ("return 'x'", "example_job of own: invalid input syntax for type uuid"),
    "fails in SQL": (
        "conn.cursor().execute('SELECT 1 FROM images')",
        'example_job of own: relation "images" does not exist',
    ),
    "swallows an error": (
        "import contextlib, psycopg2\n"
        "    with contextlib.suppress(psycopg2.Error):\n"
        "        conn.cursor().execute('SELECT 1 FROM images')\n"
        "    return 1",
        "example_job of own has left its transaction failed: let the error pass",
    ),
    "closes the connection": (
        f"{made()}; conn.close(); return job",
        "example_job of own has closed its connection",
    ),
    "uses it after that": ("conn.close(); conn.cursor()", "example_job of own has lost or closed"),
    "makes what owes nothing": (
        f"{made('queued')}; return job",
        "in (img_gen, queued), from where no stage is called: insert its rows in (img_gen, done)",
    ),
}


def test_bad_example_job_is_one_line_and_leaves_nothing(database, with_example_job, running):
    for body, said in BAD.values():
        assert said in with_example_job(body).refused(1)
        assert database.value("SELECT count(*) FROM jobs") == 0


def test_transaction_of_example_job_may_be_its_own(database, with_example_job, running):
    done = with_example_job(f"{made()}; conn.commit(); c.execute('SELECT 1'); return job")
    assert done.code == 0


def test_tenant_is_refused_where_example_job_decides(database, with_example_job, running):
    refused = with_example_job(f"{made()}; return job", "--tenant", "mine").refused(2)
    assert refused.startswith("--tenant: example_job says which tenant the job is of")


def test_row_in_the_way_of_clean_is_named(database, with_example_job, running):
    database.rows("CREATE TABLE images (job_id uuid REFERENCES jobs)")
    body = f"{made()}; c.execute('INSERT INTO images VALUES (%s)', [job]); return job"
    refused = with_example_job(body, "--clean")
    assert refused.code == 1
    assert 'violates foreign key constraint "images_job_id_fkey" on table "images"' in refused.err
    assert database.value("SELECT count(*) FROM jobs") == 1


def test_pipeline_that_begins_with_another_table_needs_an_example_job(
    empty_database, run_command, listener, tmp_path
):
    (tmp_path / "own.py").write_text("from examples.variants.stages import PIPELINE\n")
    settings = {"PIPELINE_MODULE": "own", "PYTHONPATH": tmp_path}
    empty_database.rows((ROOT / "examples" / "variants" / "schema.sql").read_text())
    run_command(empty_database, "install", **settings)
    listener(empty_database, **settings).wait_for_line(LISTENING)
    refused = run_command(empty_database, "test-job", **settings).refused(1)
    assert refused == (
        "PIPELINE begins with jobs_variants (img_gen, done): test-job needs a function "
        "example_job(conn) in own, see docs/STAGES.md"
    )


# --- tables below tables -------------------------------------------------------------------

BELOW = """
CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id text, current_step text, status text);
CREATE TABLE parts (part_id bigint PRIMARY KEY, job_id bigint REFERENCES jobs,
                    current_step text, status text);
CREATE TABLE pieces (piece_id bigint PRIMARY KEY, part_id bigint REFERENCES parts,
                     current_step text, status text);
CREATE INDEX ON parts (job_id);
CREATE INDEX ON pieces (part_id);
"""

BELOW_PIPELINE = '''
from pipeline import Table

PARTS = Table("parts", id="part_id", parent=("jobs", "job_id"), channel="parts")
PIECES = Table("pieces", id="piece_id", parent=(PARTS, "part_id"), channel="pieces")


def cut(call): return call.post("/pieces")
def glue(call): return call.post("/parts")
def paint(call): return call.post("/jobs")


PIPELINE = {
    PIECES("new", "done"): cut,
    PIECES.every("cut", "done"): glue,
    PARTS.every("glue", "done"): paint,
}


def example_job(conn):
    conn.cursor().execute("""
        INSERT INTO jobs VALUES (7, 'theirs', 'new', 'done');
        INSERT INTO parts VALUES (7, 7, 'new', 'done'), (8, 7, 'new', 'done');
        INSERT INTO pieces VALUES (1, 7, 'new', 'done'), (2, 7, 'new', 'done'),
                                  (8, 8, 'new', 'done')""")
    return 7
'''

OTHER_HISTORY = """
INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                            finished_at, outcome)
VALUES (7, 'pieces', 1000, 1, 'cut', 'w', now(), now(), 'succeeded')
"""


def test_tables_below_tables_are_followed_and_cleaned(
    empty_database, run_command, listener, tmp_path
):
    database = empty_database
    (tmp_path / "own.py").write_text(BELOW_PIPELINE)
    settings = {"PIPELINE_MODULE": "own", "PYTHONPATH": tmp_path}
    database.rows(BELOW)
    run_command(database, "install", **settings)
    database.rows(OTHER_HISTORY)  # of another job's piece 7

    def work(table: str, column: str, step: str):
        def behaviour(request):
            with closing(database.connect()) as conn:
                conn.cursor().execute(f"UPDATE {table} SET current_step = %s WHERE {column} = %s",
                                      (step, request.body[column]))  # fmt: skip
            return Answer(200)

        return behaviour

    with StageApi(database.dsn) as api:
        api.on("/pieces", work("pieces", "piece_id", "cut"))
        api.on("/parts", work("parts", "part_id", "glue"))
        api.on("/jobs", work("jobs", "job_id", "paint"))
        listener(database, api=api, **settings).wait_for_line(LISTENING)
        done = run_command(database, "test-job", "--clean", **settings)
    assert done.code == 0
    hops = sorted((words[0], words[-1]) for words in map(str.split, done.lines) if "took" in words)
    assert hops == [("cut", "1"), ("cut", "2"), ("cut", "8"), ("glue", "7"), ("glue", "8"),
                    ("paint", "s")]  # fmt: skip
    assert database.rows("SELECT table_name, job_id FROM stage_attempts") == [("pieces", 7)]
    for table in ("jobs", "parts", "pieces", "stage_joins", "stage_looks"):
        assert database.value(f"SELECT count(*) FROM {table}") == 0, table
