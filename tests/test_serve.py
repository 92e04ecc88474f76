"""`serve`: what its pages show, to however many people, with and without a database."""

import json
import math
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from pages import Page
from reports import HOSTILE, NOT_KNOWN, ONLY_COUNTED, attempt, everything, give_up
from scraping import Scraped, scrape
from serving import STARTED, Site, serving
from test_ops_jobs import ZERO_TIME
from test_ops_report_page import ELEMENTS
from test_ops_status import SLOW
from test_pools import POOLED
from variants import PIPELINE, TABLE, install
from waiting import AWAY, until

import db
from ops.serve import app, asking, serve
from ops.serve import looks as looks_module
from ops.serve.app import PAGES, PROBES
from ops.serve.looks import Looks, Unreadable

LIVE = {"nav", "span", "form", "input", "label", "button"}
PAGE = Path(__file__).parent.parent / "docs" / "SERVE.md"
HERE = {"PIPELINE_MODULE": "variants", "PYTHONPATH": str(Path(__file__).parent)}
OURS = "application_name = 'job-state-listener serve'"


@pytest.fixture(scope="module")
def site(shared_database, tmp_path_factory) -> Site:
    """Without OPS_TOKEN."""
    with serving(shared_database, tmp_path_factory.mktemp("serve")) as site:
        yield site


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


# --- pages ---------------------------------------------------------------------------------


def test_pages_show_hostile_data_as_text(database, site):
    job = everything(database)
    names = [f"/job/{job}", "/stage/overlay", "/stage/planner", "/search?q=%3Cb%3E%22%27%00&x=%ff"]
    names += ["/", "/%3Cscript%3E%E2%80%AE", "/job/%00%ff", "/stage/%3Cb%3E", "/search?q=" + job]
    for name in names:
        shown = site.get(name)
        page = Page(shown.text)
        assert {e.tag for e in page.root.all()} <= ELEMENTS | LIVE, name
        assert not [a for e in page.root.all() for a in e.attributes if a.startswith("on")]
        assert shown.status_code == (404 if "/%" in name else 200), name
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown.text)
    assert HOSTILE[0] in site.page("/stage/overlay").table("given-up")[-1][2]


def test_overview_says_what_status_says(database, site, run_command):
    everything(database)
    said = json.loads(run_command(database, "status", "--json").out)
    shown = until(lambda: fresh(site, "8 jobs stalled"), "the rows of this test")
    rows = {row[0].split()[0]: row[2:] for row in shown.table("stages")}
    for stage in said["stages"]:
        numbers = [stage[name] for name in ("owed", "calling", "retrying", "given_up", "failed",
                                            "stalled")]  # fmt: skip
        assert rows[stage["stage"]][:6] == [f"{number}" if number else "–" for number in numbers]
    alarms = [e.text for e in shown.root.one("ol", "attention").all("li")]
    assert alarms[0].startswith("no listener is connected")
    assert [alarm for alarm in alarms if alarm.startswith("planner paused by <script>")]
    assert shown.figures["Given up"] == "8"
    links = {a.attributes["href"] for a in shown.root.all("a")}
    assert {f"/stage/{stage['stage']}" for stage in said["stages"]} <= links


def fresh(site: Site, words: str, path: str = "/") -> Page | None:
    """A page (the overview by default), once it is about what a test has just changed."""
    shown = site.page(path)
    return shown if words in shown.root.text else None


def test_overview_says_that_the_heartbeats_cannot_be_read(database, tmp_path):
    with serving(database, tmp_path, HEARTBEAT_DIR="/" + 300 * "x") as site:
        said = site.page("/").root.one("ol", "attention").text
    assert "the heartbeats cannot be read: [Errno 36] File name too long: " in said


def test_row_page_says_what_job_says(database, site, run_command):
    job = database.add_job("planner", "done", "한빛")
    attempt(database, job, "overlay", "retry", error="HTTP 500: \\uba54\\ubaa8\\ub9ac")
    give_up(database, job, "HTTP 500: 메모리")
    where, owes, *_ = run_command(database, "job", job).lines
    shown = site.page(f"/job/{job}")
    assert shown.root.one("h1").text == f"job {job}"
    assert where.endswith(shown.root.one("header").all("p")[0].text)
    assert shown.root.one("ul", "problem").text == owes
    [row] = shown.table("attempts")
    assert row[1:6] == ["overlay", "1", "retry", "–", "1.0 s"] and row[7] == "HTTP 500: 메모리"
    assert shown.section("jobs").all("svg", "lane")


def test_call_without_an_answer_is_said_to_have_none(database, site):
    """As `status` says it: the listener waits for it no more, but its stage may be at it."""
    job = database.add_job("planner", "done")
    database.rows("INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
                  " leased_until, unanswered) VALUES (%s, 1, 2, 'overlay', 'gone-1-a',"
                  " now() - interval '5 s', now() + interval '1 h', true)", job)  # fmt: skip
    shown = until(lambda: fresh(site, job), "the call of this test")
    [row] = shown.table("listeners")
    assert re.fullmatch(rf"overlay of {job} attempt 2, since .+, no answer", row[3])


def test_search_finds_by_id_and_by_tenant(database, site):
    jobs = [database.add_job(tenant="한빛 & co") for _ in range(2)]
    assert [row[0] for row in site.page(f"/search?q={jobs[0]}").table("by-id")] == [jobs[0]]
    found = site.page("/search?q=%ED%95%9C%EB%B9%9B+%26+co").table("by-tenant")
    assert {row[0] for row in found} == set(jobs)
    assert all(row[2].startswith("vlm_analyze: due now") for row in found)
    nothing = site.page("/search?q=nobody")
    assert nothing.root.one("p", "calm").text == "There is no row with this id or tenant."


def test_search_finds_rows_with_a_zero_time(server, make_database, tmp_path):
    database = make_database(server)
    database.rows(f"ALTER DATABASE {database.name} SET timezone = 'America/New_York'")
    job = database.add_job("x", "y", "kim")
    database.rows(ZERO_TIME)
    with serving(database, tmp_path) as site:
        assert [row[0] for row in site.page("/search?q=kim").table("by-tenant")] == [job]
        assert site.page("/search?q=kim%00").root.one("p", "calm")


def test_count_that_is_not_known_is_no_zero(use_pipeline, make_database, server, tmp_path):
    use_pipeline(PIPELINE)
    variants = install(make_database(server), TABLE)
    variants.database.rows("ALTER TABLE jobs_variants RENAME status TO state")
    with serving(variants.database, tmp_path, **HERE) as site:
        shown = site.page("/")
        figures = [shown.figures[name] for name in ("Given up", "Failed", "Stalled")]
        assert figures == ["0", "?", "?"]
        cells = {row[0]: row[6:8] for row in shown.table("stages")}
        assert cells["yolo_detect"] == ["?", "?"] and cells["vlm_analyze"] == ["–", "–"]
        alarm = site.page("/stage/yolo_detect").root.one("ol", "attention").text
        assert "which rows are failed or stalled is not known of jobs_variants, " in alarm
        assert not site.page("/stage/vlm_analyze").root.all("ol", "attention")


def test_rows_that_may_rest_unseen_are_not_shown_as_calm(server, make_database, tmp_path):
    database = make_database(server)
    job = database.add_job("x", "y")
    database.rows(ONLY_COUNTED)
    with serving(database, tmp_path) as site:
        assert site.page(f"/job/{job}").root.one("ul", "problem").all("li")[-1].text == NOT_KNOWN
        alarms = site.page("/stage/overlay").root.one("ol", "attention").text
        assert "1 job stalled" in alarms and NOT_KNOWN in alarms


def test_search_by_tenant_that_took_too_long_is_not_repeated():
    assert int(re.search(r"timeout = '(\d+)s'", asking.SHORT)[1]) > db.TRY_AGAIN_WITHIN


def test_search_finds_what_can_be_read(use_pipeline, make_database, server, tmp_path):
    use_pipeline(PIPELINE)
    variants = install(make_database(server), TABLE)
    job = variants.database.add_job(tenant="kim")
    [variant] = variants.add(job, status="done")
    variants.database.rows("ALTER TABLE jobs_variants RENAME status TO state")
    unread = "jobs_variants cannot be read: column r.status does not exist"
    with serving(variants.database, tmp_path, **HERE) as site:
        for asked, table, row in [("kim", "by-tenant", job), (job, "by-id", job),
                                  (variant, "by-id", variant)]:  # fmt: skip
            shown = site.page(f"/search?q={asked}")
            assert [found[0].split()[-1] for found in shown.table(table)] == [row]
            assert unread in shown.root.one("p", "problem").text


def test_row_whose_table_cannot_be_read_is_not_said_to_be_gone(use_pipeline, make_database, server,
                                                               tmp_path):  # fmt: skip
    use_pipeline(PIPELINE)
    variants = install(make_database(server), TABLE)
    [variant] = variants.add(variants.database.add_job("x", "y"))
    variants.database.rows("ALTER TABLE jobs_variants RENAME status TO state")
    unread = f"{variant} is in no table that can be read; jobs_variants cannot be read: column "
    with serving(variants.database, tmp_path, **HERE) as site:
        for path in (f"/job/{variant}", f"/job/jobs_variants/{variant}"):
            assert unread in site.page(path, 503).root.one("p", "problem").text
        assert site.get(f"/job/jobs/{variant}").status_code == 404


def test_rows_of_other_tables_have_pages(use_pipeline, make_database, server, tmp_path):
    use_pipeline(PIPELINE)
    variants = install(make_database(server), TABLE)
    job = variants.database.add_job("x", "y")
    ids = variants.add(job, "img_gen", "done", count=3)
    with serving(variants.database, tmp_path, **HERE) as site:
        shown = site.page(f"/job/jobs/{job}")
        assert {row[0] for row in shown.table("rows")} == {f"jobs_variants {id_}" for id_ in ids}
        assert "waiting for 3 of 3" in shown.root.text
        child = site.page(f"/job/jobs_variants/{ids[0]}")
        assert child.root.one("h1").text == f"jobs_variants {ids[0]}"
        assert site.page(f"/job/{ids[0]}").root.one("h1").text == f"jobs_variants {ids[0]}"
        assert site.get(f"/job/jobs/{ids[0]}").status_code == 404


def test_pools_are_shown(use_pipeline, make_database, server, tmp_path):
    use_pipeline(POOLED)
    database = install(make_database(server), "SELECT 1;").database
    here = {"PIPELINE_MODULE": "test_pools", "PYTHONPATH": str(Path(__file__).parent)}
    with serving(database, tmp_path, **here) as site:
        lines = [e.text for e in site.page("/").section("pools").all("li")]
    assert lines == [
        "pool gpu1: 0/1",
        "pool gpu2: 0/1",
        "pool gpu3: 0/2",
        "pool gpu4: 0/2",
        "pool gpu5: 0/2",
    ]


def test_secrets_are_on_no_page(database, tmp_path):
    secret, job = "s3cr3t-of-the-api", database.add_job("planner", "done", "s3cr3t-of-the-api")
    error = f"401 for Bearer {secret}, password=hunter22"
    attempt(database, job, "overlay", "retry", error=error)
    give_up(database, job, error)
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity', held_reason = %s", error)
    with serving(database, tmp_path, STAGE_API_TOKEN=secret) as site:
        for path in ("/", "/stage/overlay", f"/job/{job}", f"/search?q={job}", "/report"):
            shown = site.get(path).text
            assert "***" in shown and "s3cr3t" not in shown and "hunter22" not in shown, path


def test_report_is_served_whole(database, site):
    attempt(database)
    shown = site.get("/report")
    assert Page(shown.text).section("pipeline")
    assert "style-src 'unsafe-inline'" in shown.headers["Content-Security-Policy"]


def test_report_begins_with_what_needs_a_person(database, site):
    give_up(database, database.add_job("planner", "done"), "HTTP 404: no text")
    alarm = "overlay 1 call given up HTTP 404: no text ./jsl retry --stage overlay"
    shown = until(lambda: fresh(site, alarm, "/report"), "the call of this test")
    assert alarm in [e.text for e in shown.root.one("ol", "attention").all("li")]


# --- for programs --------------------------------------------------------------------------


def test_metrics_are_those_of_the_command(database, site):
    shown = site.get("/metrics")
    assert shown.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert Scraped(shown.text).keys() == scrape(database).keys()
    assert Scraped(shown.text).of("up") == 1


def test_metrics_keep_their_names_though_one_is_a_password(database, tmp_path, login_with):
    with serving(database, tmp_path, **login_with(database, "listener")) as site:
        assert Scraped(site.get("/metrics").text).keys() == scrape(database).keys()


def test_row_whose_id_has_a_password_is_found(empty_database, run_command, tmp_path, login_with):
    empty_database.rows("CREATE TABLE jobs (job_id text PRIMARY KEY, tenant_id text,"
                        " current_step text, status text)")  # fmt: skip
    run_command(empty_database, "install")
    empty_database.rows("INSERT INTO jobs VALUES ('s3cr3t-7', 't', 'planner', 'done')")
    with serving(empty_database, tmp_path, **login_with(empty_database, "s3cr3t")) as site:
        shown = site.page("/job/s3cr3t-7").root
        assert shown.one("h1").text == "job ***-7" and "due now" in shown.text


@pytest.mark.parametrize("target", ["*", "foo", "http:"])
def test_target_without_a_slash_is_no_page(database, tmp_path, target):
    with serving(database, tmp_path) as site:
        answer = site.raw(f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert answer.split()[1] == b"404"
        assert "Traceback" not in site.process.output


def test_every_answer_has_strict_headers(database, site):
    for path in ("/", "/stage/planner", "/search", "/nowhere", "/metrics", "/healthz"):
        headers = site.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Server"] == "job-state-listener"


def test_pages_without_a_form_refresh_themselves_until_told_not_to(database, site):
    paths = ["/", "/stage/planner", "/?refresh=off", "/search", "/report"]
    refresh = [site.get(path).headers.get("Refresh") for path in paths]
    assert refresh == ["5", "5", None, None, None]
    assert "stop" in site.page("/").root.one("nav").text


def test_head_is_get_without_a_body(database, site):
    for path in ("/", "/metrics", "/nowhere"):
        asked, got = site.head(path), site.get(path)
        assert (asked.status_code, asked.content) == (got.status_code, b"")
        assert asked.headers["Content-Type"] == got.headers["Content-Type"]
        assert int(asked.headers["Content-Length"]) > 100


def test_unknown_paths_are_not_found(database, site):
    paths = ["/nowhere", "/stage/nope", "/job/7", "/job/none/7", "/stage", "/healthz/x", "/a//",
             "/login", "/logout", "/do/pause"]  # fmt: skip
    assert {path: site.get(path).status_code for path in paths} == dict.fromkeys(paths, 404)


def test_nothing_can_be_sent_without_a_token_to_enter(database, site):
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "GETT"):
        for path in ("/", "/do/pause", "/login"):
            assert site.request(method, path).status_code == 405
    assert "Log in" not in site.get("/").text and "/do/" not in site.get("/stage/planner").text


def test_what_is_no_request_gets_one_line(database, site):
    long = b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n"
    for sent, code in ((b"GARBAGE\r\n\r\n", 400), (long, 414), (b"GET / HTTP/1.1\r\n\r\n", 421)):
        answer = site.raw(sent)
        assert f"{code} ".encode() in answer.splitlines()[0], sent[:20]
        assert b"Traceback" not in answer
    assert site.get("/healthz").text == "ok\n"


# --- the database --------------------------------------------------------------------------


def test_without_its_database_it_says_so(database, tmp_path):
    secret = "s3cr3t-w0rd"
    with serving(database, tmp_path, **AWAY | {"DB_PORT": "1", "DB_PASSWORD": secret}) as site:
        shown = site.get("/")
        assert shown.status_code == 503 and shown.headers["Refresh"] == "5"
        assert Page(shown.text).root.one("h1").text == "No database"
        assert "onnection refused" in shown.text
        assert site.get("/healthz").status_code == 200
        ready = site.get("/readyz")
        assert (ready.status_code, ready.text.count("\n")) == (503, 1)
        metrics = site.get("/metrics")
        assert metrics.status_code == 200 and Scraped(metrics.text).of("up") == 0
        assert secret not in shown.text + ready.text + site.process.output


def test_without_our_tables_it_says_what_to_run(empty_database, tmp_path):
    with serving(empty_database, tmp_path) as site:
        assert site.get("/").status_code == 503
        assert "make trigger" in site.get("/readyz").text


def test_lost_connection_is_made_anew(database, site):
    assert site.get("/readyz").text == "ok\n"
    ended = database.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}"
                          " AND datname = current_database()")  # fmt: skip
    assert len(ended) == 1
    assert site.get(f"/search?q={time.time()}").status_code == 200  # nobody has asked that yet


def test_its_connection_cannot_write(database):
    looks = Looks(database.settings())
    with pytest.raises(Unreadable, match="read-only transaction"):
        looks.look("any", lambda conn: db.execute(conn, "UPDATE jobs SET status = 'done'"))
    looks.close()


def test_slow_look_does_not_keep_others_waiting(database, monkeypatch):
    monkeypatch.setattr(looks_module, "PATIENCE", 0.0)
    looks = Looks(database.settings())
    began, ends = threading.Event(), threading.Event()

    def slow(conn) -> bool:
        began.set()
        return ends.wait(60)

    with ThreadPoolExecutor(2) as pool:
        page = pool.submit(looks.look, "slow", slow)
        assert began.wait(60)
        other = pool.submit(looks.look, "other", lambda conn: None)
        try:
            with pytest.raises(Unreadable, match="Busy"):
                other.result(20)
        finally:
            ends.set()
        assert page.result(60)
    assert looks.look("other", lambda conn: 1) == 1
    looks.close()


def test_hundred_viewers_cost_one_look_a_second(server, make_database, tmp_path):
    transactions = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"

    def spent(viewers: int) -> tuple[int, float]:
        """Transactions, and for how many seconds everybody looked."""
        database = make_database(server)
        with serving(database, tmp_path) as site, ThreadPoolExecutor(viewers) as pool:
            began, ready = time.monotonic(), threading.Barrier(viewers)

            def view(_: int) -> set[int]:
                ready.wait()
                return {site.get("/").status_code for _ in range(2)}

            assert set().union(*pool.map(view, range(viewers))) == {200}
            seconds = time.monotonic() - began
            site.process.stop()
        database.conn.close()  # with its own transactions; the server counts what has ended
        name = database.name
        database.conn = server.connect()
        until(lambda: not database.value("SELECT count(*) FROM pg_stat_activity WHERE datname = %s",
                                         name), "the end of its sessions")  # fmt: skip
        return database.value(transactions, name), seconds

    alone, seconds_alone = spent(1)
    together, seconds = spent(100)
    assert together <= alone * (1 + math.ceil(seconds)), (alone, together, seconds, seconds_alone)


def test_grants_of_the_docs_are_enough_to_look(server, make_database, make_role, run_command,
                                               tmp_path):  # fmt: skip
    database = make_database(server)
    role, job = make_role(database), database.add_job()
    run_command(database, "install", "--reader", role)
    grants = re.search(r"`(GRANT SELECT ON [^`]+) TO viewer`", PAGE.read_text(encoding="utf-8"))[1]
    database.rows(f"{grants} TO {role}")
    with serving(database, tmp_path, DB_USER=role, DB_PASSWORD=role) as site:
        for path in ("/", "/stage/overlay", f"/job/{job}", "/search?q=x", "/report", "/readyz"):
            assert site.get(path).status_code == 200, path
        assert Scraped(site.get("/metrics").text).of("up") == 1


# --- the process ---------------------------------------------------------------------------


def test_viewer_who_sends_nothing_holds_nobody_up(database, site):
    with socket.create_connection(site.address) as silent:
        silent.sendall(b"GET / HT")
        assert site.get("/").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_with_exit_0_though_somebody_is_connected(database, tmp_path, number):
    with serving(database, tmp_path) as site, socket.create_connection(site.address) as silent:
        site.get("/")
        site.process.signal(number)
        assert site.process.wait() == 0
        assert silent.recv(1) == b""
    assert "상태 페이지 중지됨" in site.process.lines[-1]
    assert len(site.process.lines) == 2 and STARTED in site.process.lines[0]


PATIENT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import db
db.SESSION["statement_timeout"] = "600s"
runpy.run_path({str(ROOT / "listener.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_stops_while_the_database_does_not_answer(server, make_database, tmp_path):
    database, program = make_database(server), tmp_path / "patient.py"
    database.rows(SLOW)
    program.write_text(PATIENT)
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND " + OURS
    with (
        serving(database, tmp_path, program=program) as site,
        socket.create_connection(site.address) as viewer,
    ):
        viewer.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: database.value(asleep), "its look")
        assert site.process.stop() == 0
        assert database.value(asleep) == 1


def test_port_that_is_taken_gets_one_line(database, site, run_command):
    refused = run_command(database, "serve", "--port", str(site.address[1])).refused(2)
    assert "Address already in use" in refused and "--port" in refused


@pytest.mark.parametrize("host", ["no host", "a..b", "192.0.2.1"])
def test_address_that_cannot_be_listened_on_gets_one_line(database, run_command, host):
    assert "give another --port, or --host" in run_command(
        database, "serve", "--host", host
    ).refused(2)


def test_address_is_taken_in_brackets_as_urls_have_it(database, tmp_path):
    with serving(database, tmp_path, "--host", "[::1]") as site:
        assert "//[::1]:" in site.process.output and "WARNING" not in site.process.output


def test_serving_the_network_without_tls_is_a_warning(database, tmp_path):
    with serving(database, tmp_path, "--host", "0.0.0.0") as site:
        assert " WARNING " in site.process.wait_for_line("TLS")
        assert site.get("/", Host="any.example").status_code == 200
    # As the address bar has it, with its port.
    allowed = ("--allow-host", "Jobs.example.:443")
    with serving(database, tmp_path, "--host", "0.0.0.0", *allowed) as site:
        hosts = ["jobs.example", "JOBS.example:443", "10.1.2.3:8080", "[::1]", "other.example"]
        codes = [site.get("/", Host=host).status_code for host in hosts]
        assert codes == [200, 200, 200, 200, 421]


def test_name_that_no_browser_could_send_gets_one_line(database, run_command):
    done = run_command(database, "serve", "--allow-host", "https://jobs.example/")
    assert "'https://jobs.example/' is not a name" in done.refused(2)


def test_page_of_the_docs_has_every_path_option_and_log_line():
    text = PAGE.read_text(encoding="utf-8")
    for first in {first for first, _ in PAGES} - {"login", "logout", "do"} | {*PROBES}:
        assert f"`/{first}" in text
    assert all(max(option.opts, key=len) in text for option in serve.params)
    for file in Path(app.__file__).parent.glob("*.py"):
        calls = re.findall(r'log\.(?!debug)\w+\("([^:"]+)', file.read_text(encoding="utf-8"))
        assert all(f"`{words}`" in text for words in calls if "%" not in words), file
