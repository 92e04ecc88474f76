"""`serve` with OPS_TOKEN: what a person may do there, and what nobody may do in their name."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlencode

import pytest
from pages import Page
from reports import give_up
from serving import TOKEN, Person, Site, said, serving
from waiting import PATIENCE

from ops.serve import access, looks
from ops.serve.access import NOBODY, Access, Session
from ops.serve.actions import perform

PAUSE = "/do/pause?stage=planner"
PAUSED = "SELECT held_by FROM pipeline_stages WHERE stage = 'planner' AND held_until > now()"

ENDS_ITS_SESSION = """
CREATE FUNCTION ends_its_session() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END';
CREATE TRIGGER ends_its_session BEFORE UPDATE ON pipeline_stages
    FOR EACH ROW EXECUTE FUNCTION ends_its_session()
"""


@pytest.fixture(scope="module")
def site(shared_database, tmp_path_factory) -> Site:
    directory = tmp_path_factory.mktemp("serve")
    with serving(shared_database, directory, OPS_TOKEN=TOKEN) as site:
        yield site


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


@pytest.fixture
def kim(site) -> Person:
    person = Person(site)
    assert person.enter().status_code == 303
    return person


# --- what a person may do ------------------------------------------------------------------


def test_person_pauses_and_resumes_a_stage_under_their_name(database, site, kim):
    assert "Pause" in site.get("/stage/planner").text
    done = kim.does(PAUSE, reason="new <weights>")
    assert done.status_code == 200 and said(done).startswith("paused: planner")
    held = database.row("SELECT * FROM pipeline_stages WHERE stage = 'planner'")
    assert (held.held_by, held.held_reason) == ("kim (serve)", "new <weights>")
    shown = Page(site.get("/").text).root.text
    assert "paused by kim (serve)" in shown and "new <weights>" in shown
    assert said(kim.does("/do/resume?stage=planner")).startswith("resumed: planner")
    assert database.value(f"SELECT count(*) FROM ({PAUSED}) AS held") == 0
    acted = "조작: kim (serve): pause '--reason=new <weights>' -- planner → "
    assert site.process.wait_for_line(acted)


def test_person_cancels_a_call_and_has_it_made_again(database, kim):
    job = database.add_job("planner", "done")
    links = re.findall(r'href="(/do/[^"]+)"', kim.at(f"/job/{job}").text)
    ways = {link.partition("?")[0]: link.replace("&amp;", "&") for link in links}
    assert set(ways) == {"/do/retry", "/do/cancel", "/do/again"}
    assert said(kim.does(ways["/do/cancel"], reason="절대 안 됨")).startswith("cancelled: job")
    [attempt] = database.attempts(job)
    assert (attempt.worker, attempt.error) == ("kim (serve)", "절대 안 됨")
    assert "cancelled by kim (serve)" in said(kim.does(ways["/do/again"]))
    assert database.owed(job).stage == "overlay"
    refused = kim.does(ways["/do/retry"])
    assert refused.status_code == 409 and "it is not given up" in said(refused)


def test_person_retries_a_row_or_all_that_a_stage_gave_up(database, kim):
    jobs = [database.add_job("planner", "done") for _ in range(3)]
    for job in jobs:
        give_up(database, job, "HTTP 500")
    of_empty_id = "/do/retry?table=jobs&stage=overlay"
    assert kim.does(of_empty_id).status_code == 400
    assert said(kim.does(f"/do/retry?id={jobs[0]}&stage=overlay")).count("due again") == 1
    assert said(kim.does("/do/retry?stage=overlay")).count("due again") == 2
    assert not any(database.owed(job).given_up for job in jobs)


def test_retry_of_a_stage_that_left_pipeline_is_advised_nowhere(database, kim, run_command):
    job = database.add_job("planner", "done")
    give_up(database, job, "HTTP 500")
    database.rows("UPDATE stage_calls SET stage = 'release'")
    status = run_command(database, "status").lines
    report = run_command(database, "report", "--out", "-").out
    texts = [*status, report, kim.at("/stage/release").text, kim.at(f"/job/{job}").text]
    assert all("release" in text for text in texts[len(status) :])
    assert "cancel --stage release" in report and "1 call given up" in report
    assert re.findall("retry --stage|then retry|Retry [^<]*…", "\n".join(texts)) == []


def test_retry_of_a_stage_leaves_what_waits_and_says_so(database, kim):
    job = database.add_job("planner", "done")
    database.rows("UPDATE stage_calls SET due_at = now() + interval '1 hour'")
    way = "/do/retry?stage=overlay"
    form = Page(kim.at(way).text).root.text
    assert "is due now where it is chosen by its row, not by its stage" in form
    assert "1 call due later" in said(kim.does(way))
    assert said(kim.does(f"/do/retry?id={job}&stage=overlay")).count("due again") == 1


def test_mistakes_get_the_words_of_the_command(database, kim):
    for path in ("/do/pause?stage=paint", "/do/again?id=7&table=paint"):
        refused = kim.does(path)
        assert refused.status_code == 400 and "'paint' is no" in said(refused)
    assert kim.does("/do/again?id=no-id").status_code == 409
    assert kim.submit("/do/pause", kim.form(PAUSE) | {"stage": ""}).status_code == 400
    for path, nul in (("/do/again?id=7", "id"), ("/do/cancel?id=7", "reason")):
        assert kim.does(path, **{nul: "a\0b"}).status_code == 400
    for path in ("/do/cancel?stage=overlay", "/do/pause?id=1"):
        assert "not said what is meant" in kim.does(path).text


def test_locked_table_and_who_locked_it_are_named(database, kim):
    with closing(database.connect()) as other:
        locks = "SET application_name = 'psql'; BEGIN; LOCK TABLE pipeline_stages"
        other.cursor().execute(locks)
        refused, page = kim.does(PAUSE), kim.at("/", 503)
        locked = f"pipeline_stages is locked by server process {other.info.backend_pid} (psql)"
    assert (refused.status_code, said(refused)) == (409, f"{locked}: try again")
    assert locked in Page(page.text).root.text


def test_action_says_whether_it_was_done_where_the_database_is_lost(database, kim, tmp_path):
    with serving(database, tmp_path, OPS_TOKEN=TOKEN, DB_PORT="1") as site:
        lee = Person(site, "lee")
        lee.enter()
        refused = lee.does(PAUSE)
    assert refused.status_code == 503 and said(refused).endswith("; nothing was changed")
    database.rows(ENDS_ITS_SESSION)
    try:
        refused = kim.does(PAUSE)
    finally:
        database.rows("DROP FUNCTION ends_its_session CASCADE")
    assert refused.status_code == 503
    assert said(refused).endswith("; it is not known whether it was done")


def test_action_does_not_wait_for_long_queries_of_other_pages(database, monkeypatch):
    monkeypatch.setattr(looks, "PATIENCE", 0.01)
    busy, kim = looks.Looks(database.settings()), Session("kim", "1")
    with ThreadPoolExecutor() as pool, busy.lock:
        acting = pool.submit(perform, busy, kim, "pause", {"stage": "planner"})
        done = acting.result(PATIENCE)
    assert done.status == 503 and done.said.endswith("; nothing was changed: try again")
    assert paused_by(database) is None


# --- logging in ----------------------------------------------------------------------------


def test_person_who_is_not_known_is_asked_for_the_token_first(database, site):
    asked = site.get(PAUSE)
    assert (asked.status_code, asked.headers["Location"]) == (
        303,
        "/login?next=%2Fdo%2Fpause%3Fstage%3Dplanner",
    )
    entered = Person(site).enter(after="%2Fdo%2Fpause%3Fstage%3Dplanner")
    assert (entered.status_code, entered.headers["Location"]) == (303, PAUSE)
    cookie = entered.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Secure" not in cookie
    behind_tls = Person(site).enter(**{"X-Forwarded-Proto": "https"})
    assert behind_tls.headers["Set-Cookie"].endswith("; Secure")


@pytest.mark.parametrize("after", ["//evil.example", "https://evil.example", "/%5Cevil", "/a%0Ab"])
def test_login_leads_to_no_other_site(database, site, after):
    assert Person(site).enter(after=after).headers["Location"] == "/"


def test_wrong_token_is_refused_and_the_next_attempt_has_to_wait(database, tmp_path):
    with serving(database, tmp_path, OPS_TOKEN=TOKEN) as site:
        refused = Person(site).enter("wrong-" + TOKEN)
        assert (refused.status_code, said(refused)) == (403, "That is not the token.")
        soon = Person(site).enter()  # the right one
        assert soon.status_code in (303, 429)  # 303: the test took longer than the delay
        assert site.process.wait_for_line("로그인 실패")
        assert TOKEN not in site.process.output + refused.text + soon.text


def test_delays_after_wrong_tokens_double_and_are_those_of_one_address(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: clock[0])
    guarded, waited = Access(TOKEN), []
    for _ in range(9):
        assert not guarded.try_token("10.0.0.1", "guess")
        with pytest.raises(access.TooSoon) as soon:
            guarded.try_token("10.0.0.1", TOKEN)
        waited.append(soon.value.seconds)
        assert guarded.try_token("10.0.0.2", TOKEN)
        clock[0] += soon.value.seconds
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert guarded.try_token("10.0.0.1", TOKEN)


@pytest.mark.parametrize("name", ["", "   ", "x" * 61, "kim\x1b[31m", "\u202ekim"])
def test_name_is_one_line_of_visible_letters(database, site, name):
    assert Person(site, name).enter().status_code == 400


def test_session_is_over_after_its_time_and_after_leaving(database, site, kim, monkeypatch):
    before = kim.cookies.copy()
    assert kim.does("/logout").headers["Location"] == "/"
    kim.cookies = before
    assert kim.get(site.url + PAUSE, allow_redirects=False).status_code == 303
    guarded = Access(TOKEN)
    assert guarded.session(guarded.cookie("김")).name == "김"
    monkeypatch.setattr(access, "SESSION_SECONDS", -1)
    assert guarded.session(guarded.cookie("kim")) is None
    monkeypatch.setattr(access, "FORM_SECONDS", -1)
    session = Session("kim", "1")
    assert not guarded.take_form(session, PAUSE, guarded.form_token(session, PAUSE))


def test_session_that_was_left_is_over_however_many_login_forms_are_sent(monkeypatch):
    monkeypatch.setattr(access, "REMEMBERED", 3)
    guarded = Access(TOKEN)
    cookie = guarded.cookie("kim")
    kim = guarded.session(cookie)
    form = guarded.form_token(kim, PAUSE)
    assert guarded.take_form(kim, PAUSE, form)
    guarded.end(kim)
    for _ in range(5):
        assert guarded.take_form(NOBODY, "/login", guarded.form_token(NOBODY, "/login"))
    assert guarded.session(cookie) is None and not guarded.take_form(kim, PAUSE, form)


def test_what_is_over_anyway_is_forgotten(monkeypatch):
    guarded = Access(TOKEN)
    guarded.end(Session("kim", "1"))
    now = time.time()
    monkeypatch.setattr(access.time, "time", lambda: now + access.SESSION_SECONDS + 1)
    guarded.end(Session("kim", "2"))
    assert guarded.ended.keys() == {"2"}


@pytest.mark.parametrize("other", ["x=1", 'prefs={"a":1}', "flag", "n=a b", "x[]=1", "=;;"])
def test_cookie_of_another_program_is_no_obstacle(site, kim, other):
    cookie = f"{other}; job_state_listener={kim.cookies['job_state_listener']}; {other}"
    assert "Log out" in site.get("/", Cookie=cookie).text


def test_token_that_could_be_guessed_is_refused_in_one_line(database, run_command):
    refused = run_command(database, "serve", OPS_TOKEN="fifteen-letters").refused(2)
    assert refused == "OPS_TOKEN=*** cannot be used: allowed is 16 visible ASCII characters or " \
        "more, without spaces"  # fmt: skip


# --- forged and replayed -------------------------------------------------------------------


def paused_by(database) -> str | None:
    row = database.row(f"{PAUSED} LIMIT 1")
    return row and row.held_by


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "evil.example", "Origin": "http://evil.example"},  # its name leads here
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json"},
        {"Cookie": ""},
        {"Cookie": "job_state_listener=a2lt.99999999999.x." + "0" * 64},
    ],
    ids=str,
)
def test_request_of_another_site_is_refused(database, kim, headers):
    fields = kim.form(PAUSE)
    assert kim.submit(PAUSE, fields, **headers).status_code in (403, 415, 421)
    assert paused_by(database) is None
    assert kim.submit(PAUSE, fields).status_code == 200  # the form itself was good


def test_form_is_good_once_for_one_person_and_one_action(database, site, kim):
    lee = Person(site, "lee")
    lee.enter()
    own = kim.form(PAUSE)
    refused = [
        kim.submit(PAUSE, {"stage": "planner"}),
        kim.submit(PAUSE, own | {"form": own["form"][:-1] + "x"}),
        kim.submit(PAUSE, own | {"form": kim.form("/do/resume?stage=planner")["form"]}),
        kim.submit(PAUSE, own | {"form": kim.form("/logout")["form"]}),
        kim.submit(PAUSE, own | {"form": kim.cookies["job_state_listener"]}),
        lee.submit(PAUSE, own),
    ]
    assert {one.status_code for one in refused} == {403} and paused_by(database) is None
    assert kim.submit(PAUSE, own).status_code == 200 and paused_by(database) == "kim (serve)"
    kim.does("/do/resume?stage=planner")
    replayed = kim.submit(PAUSE, own)
    assert replayed.status_code == 403 and "sent before" in said(replayed)
    assert paused_by(database) is None


def test_looking_changes_nothing(database, site, kim):
    for path in (PAUSE, "/do/retry?stage=planner", "/logout"):
        kim.at(path)
    for method in ("GET", "HEAD", "PUT", "PATCH"):
        kim.request(method, site.url + PAUSE, data=kim.form(PAUSE))
    assert paused_by(database) is None and kim.at(PAUSE)


def test_forms_that_are_too_long_or_without_a_length_are_not_read(database, site, kim):
    assert kim.does(PAUSE, reason="x" * 20_000).status_code == 413
    in_parts = {"Content-Type": "application/x-www-form-urlencoded"}
    assert kim.submit(PAUSE, iter([b"stage=planner"]), **in_parts).status_code == 411
    assert paused_by(database) is None


def test_form_of_which_the_end_is_missing_does_nothing(database, site, kim):
    jobs = [database.add_job("planner", "done") for _ in range(2)]
    for job in jobs:
        give_up(database, job, "HTTP 500")
    fields = urlencode(kim.form(f"/do/retry?stage=overlay&id={jobs[0]}"))
    cookie = "; ".join(f"{name}={value}" for name, value in kim.cookies.items())
    head = (f"POST /do/retry HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n"
            "Content-Type: application/x-www-form-urlencoded\r\n"
            f"Content-Length: {len(fields)}\r\n\r\n")  # fmt: skip
    cut = site.raw((head + fields.partition("&id=")[0]).encode(), ends=True)
    assert b" 408 " in cut and all(database.owed(job).given_up for job in jobs)
    assert b" 200 " in site.raw((head + fields).encode())
    assert [database.owed(job).given_up for job in jobs] == [False, True]


def test_what_another_process_has_given_out_is_worth_nothing(database, site, kim, tmp_path):
    with serving(database, tmp_path, OPS_TOKEN=TOKEN) as other:
        stranger = Person(other)
        stranger.cookies = kim.cookies
        assert stranger.get(other.url + PAUSE, allow_redirects=False).status_code == 303
