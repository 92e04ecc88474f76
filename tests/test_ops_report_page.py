"""`report`: a page that needs nothing else, that data cannot break, and that is written whole."""

import re
import uuid
from datetime import datetime, timedelta, timezone
from functools import partial

import pytest
from claims import claim
from pages import CHROMIUM, Page, laid_out
from reports import HOSTILE, attempt, everything, give_up, html_of, read

from ops.report.markup import SHOWN, share, span
from ops.report.page import CSS as FILE

ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section"),
    *(
        "article",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "p",
        "a",
        "code",
        "wbr",
        "b",
        "div",
        "small",
        "bdi",
        "time",
        "ul",
        "ol",
        "li",
    ),
    *("dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "defs", "pattern", "g", "rect", "line", "path", "circle", "text"),
}
CSS = FILE.read_text(encoding="utf-8")
KST = timezone(timedelta(hours=9))
OF_OTHERS = {"src", "srcset", "style", "action", "data", "poster", "xlink:href", "formaction"}


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


# --- safe, whole and alone -----------------------------------------------------------------


def test_page_refers_to_nothing_outside_and_has_no_script(database):
    shown = Page(html_of(database, everything(database)))
    elements = shown.root.all()
    assert {e.tag for e in elements} <= ELEMENTS
    names = {name for e in elements for name in e.attributes}
    assert not names & OF_OTHERS and not [name for name in names if name.startswith("on")]
    ids = {e.attributes.get("id") for e in elements}
    links = [e.attributes["href"] for e in elements if "href" in e.attributes]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    [policy] = [e for e in elements if e.attributes.get("http-equiv")]
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_css_refers_to_nothing_outside(database):
    assert "<" not in CSS and "http" not in CSS and "@import" not in CSS
    patterns = re.findall(r"url\((.*?)\)", CSS)
    known = [e.attributes["id"] for e in read(database).root.all("pattern")]
    assert len(patterns) > 5 and {name.removeprefix("#") for name in patterns} == set(known)
    painted = {name for name in re.findall(r"var\((--[\w-]+)\)", CSS)}
    assert painted == set(re.findall(r"(--[\w-]+):", CSS))


def test_hostile_data_is_shown_as_text(database):
    everything(database)
    shown = read(database)
    assert len(shown.root.all("style")) == 1 and shown.root.one("style").children == [f"\n{CSS}"]
    errors = [row[0] for row in shown.table("given-up")]
    assert sorted(errors) == sorted(
        " ".join(text.translate(SHOWN).split()) if len(text) < 200 else "x" * 239 + "…"
        for text in HOSTILE
    )
    assert "\\u202eright to left\\u2066" in errors and "한빛미디어 초코상사" in errors
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown.source)
    assert "x" * 300 not in shown.source


def test_headings_language_and_charts_speak_to_everyone(database):
    shown = Page(html_of(database, everything(database)))
    root = shown.root
    assert root.one("html").attributes["lang"] == "en"
    assert root.all("title")[0].text.startswith("Pipeline report: ")
    assert [e.text for e in root.all("h1")] == ["Pipeline report"]
    for section in root.all("section"):
        heading = section.one("h2")
        assert section.attributes["aria-labelledby"] == heading.attributes["id"] and heading.text
    for chart in root.all("svg"):
        named = chart.attributes.get("aria-label") and chart.attributes["role"] == "img"
        nested = "viewbox" in chart.attributes  # within one that is named
        assert named or nested or chart.attributes["aria-hidden"] == "true"
    heads = [cell for table in root.all("table") for cell in table.all("th")]
    assert heads and {cell.attributes["scope"] for cell in heads} == {"row", "col"}
    assert all(table.one("caption").text for table in root.all("table"))


def test_secrets_are_not_on_the_page(database):
    secret = "s3cr3t" * 100  # longer than what is shown of a text
    errors = [f"401 for Bearer {secret}", "password=hunter22", "http://u:hunter22@gpu1/ refused"]
    for error in errors:
        give_up(database, database.add_job("planner", "done", error), error)
        attempt(database, outcome="retry", error=error)
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity', held_reason = %s", secret)
    source = html_of(database, STAGE_API_TOKEN=secret)
    assert "***" in source and "s3cr3t" not in source and "hunter22" not in source


def test_page_stays_small_however_much_there_is(database):
    database.rows(
        "INSERT INTO stage_attempts SELECT gen_random_uuid(), n, 1,"
        " (ARRAY['vlm_analyze', 'yolo_detect', 'planner', 'overlay', 'vlm_judge'])[n %% 5 + 1],"
        " 'w', now() - make_interval(secs => 4 * n),"
        " now() - make_interval(secs => 4 * n - n %% 400), 200, (ARRAY['succeeded', 'held',"
        " 'retry', 'unknown', 'failed', 'skipped', 'cancelled', 'lost'])[n %% 8 + 1],"
        " repeat('e', 2000) FROM generate_series(1, 21000) AS n"
    )
    database.rows(
        "INSERT INTO stage_calls (job_id, current_step, status, stage, due_at, last_error)"
        " SELECT gen_random_uuid(), 'img_gen', 'done', 'vlm_analyze', 'infinity',"
        " n || repeat(' error', 100) FROM generate_series(1, 5000) AS n"
    )
    assert len(html_of(database).encode()) < 300_000


def test_page_can_be_made_on_every_version(each_shared_database):
    job = everything(each_shared_database.emptied())
    shown = read(each_shared_database, job)
    assert len(shown.root.all("section")) == 9


# --- in a browser --------------------------------------------------------------------------


def twenty_stages(database) -> str:
    """Stages with long names, and calls from milliseconds to hours; a job that went through all."""
    job = str(uuid.uuid4())
    for number in range(20):
        stage = f"instagram_feed_generation_korean_{number}"
        attempt(database, job, stage, seconds=0.2, ago=10 - number / 2)
        for hours, seconds in {1: 0.002, 5: 0.4, 9: 9, 13: 20, 17: 580, 21: 9000}.items():
            attempt(database, stage=stage, seconds=seconds, ago=3600 * hours)
    return job


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_shows_the_page_at_any_width_without_overlapping_labels(database, tmp_path):
    pages = [html_of(database), html_of(database, everything(database))]
    pages.append(html_of(database, twenty_stages(database)))
    found = laid_out(pages, [360, 768, 1280], tmp_path)
    assert [page["width"] for page in found] == [360] * 3 + [768] * 3 + [1280] * 3
    for page in found:
        assert page["wide"] <= page["width"], page
        assert (page["beyond"], page["unseen"], page["overlaps"], page["scripts"]) == (0, 0, [], 0)
        assert page["title"].startswith("Pipeline report")
    assert found[1]["charts"] > 15 and found[2]["charts"] > 60


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_that_prefers_dark_shows_it_dark(database, tmp_path):
    [dark] = laid_out([html_of(database)], [360], tmp_path, dark=True)
    assert max(map(int, re.findall(r"\d+", dark["ground"]))) < 60


# --- the command ---------------------------------------------------------------------------


def test_report_is_written_and_replaces_the_old_one(database, run_command, tmp_path):
    attempt(database)
    target = tmp_path / "report.html"
    target.write_text("old")
    done = run_command(database, "report", "--out", "report.html", "--since", "2h")
    assert re.fullmatch(r"wrote report\.html \(\d+ kB\)", "\n".join(done.lines))
    shown = Page(target.read_text(encoding="utf-8"))
    assert shown.figures["Calls"] == "1" and "2.0 h, from" in shown.root.text
    assert [path.name for path in tmp_path.glob("*.html*")] == ["report.html"]


def test_report_to_standard_output_is_the_page_alone(database, run_command):
    done = run_command(database, "report", "--out", "-", LC_ALL="C")
    assert not done.err and Page(done.out).figures["Calls"] == "0"


def test_report_that_cannot_be_made_leaves_the_old_one(database, run_command, tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")
    job = str(uuid.uuid4())
    arguments = ("report", "--out", "report.html", "--job")
    assert run_command(database, *arguments, job).refused(1) == f"there is no job {job}"
    assert "not a job id" in run_command(database, *arguments, "no-such-id").refused(2)
    assert target.read_text() == "old"


@pytest.mark.parametrize("out", ["no/such/directory.html", ".", "x" * 300])
def test_path_that_cannot_be_written_gets_one_line(database, run_command, out):
    assert out in run_command(database, "report", "--out", out).refused(1)


def test_time_that_cannot_be_gets_one_line(database, run_command):
    def refused(since: str, code: int) -> str:
        return run_command(database, "report", "--out", "-", "--since", since).refused(code)

    assert "'soon'" in refused("soon", 2)
    assert "still to come" in refused("2100-01-01", 2)
    assert "--out" in run_command(database, "report").refused(2)


def test_listener_role_with_the_views_may_read_it(server, make_database, make_role, run_command):
    database = make_database(server)
    role = make_role(database)
    given = {"DB_USER": role, "DB_PASSWORD": role}
    database.rows("GRANT SELECT ON jobs, pipeline_tables, pipeline_stages, stage_calls,"
                  " stage_limits, stage_leases, stage_attempts, job_state_listener_schema"
                  f" TO {role}")  # fmt: skip
    refused = run_command(database, "report", "--out", "-", **given).refused(1)
    assert "permission denied" in refused and "Roles and grants" in refused
    assert run_command(database, "install", "--reader", role).code == 0
    everything(database)
    assert run_command(database, "report", "--out", "-", **given).code == 0


def test_jobs_with_other_types_and_columns_are_reported(empty_database, run_command):
    empty_database.rows(
        "CREATE TABLE jobs (job_id bigint PRIMARY KEY, tenant_id uuid, current_step varchar(50),"
        " status varchar(20))"
    )
    run_command(empty_database, "install")
    empty_database.rows("INSERT INTO jobs VALUES (7, gen_random_uuid(), 'img_gen', 'done'),"
                        " (8, NULL, 'overlay', 'done')")  # fmt: skip
    done = run_command(empty_database, "report", "--out", "-", "--job", "7", "--job", "8")
    assert [e.text for e in Page(done.out).section("jobs").all("h3")] == ["7", "8"]


# --- figures as words ----------------------------------------------------------------------


def test_spans_are_said_as_a_person_says_them():
    seconds = [0, 0.0004, 0.0402, 0.9996, 1.25, 9.96, 61, 118, 3600, 86400 * 400]
    said = ["0 ms", "0 ms", "40 ms", "1.0 s", "1.2 s", "10 s", "61 s", "2.0 min", "60 min", "400 d"]
    assert [span(number) for number in seconds] == said and span(None) == "–"


def test_shares_are_never_rounded_to_nothing_or_all():
    parts = [0, 1, 30, 5000, 99_950, 99_999, 100_000]
    said = ["0 %", "<0.1 %", "<0.1 %", "5.0 %", ">99.9 %", ">99.9 %", "100 %"]
    assert [share(part, 100_000) for part in parts] == said and share(0, 0) == "–"


def test_all_times_are_those_of_this_machine(database, run_command, conn):
    """Whatever the time zone of the database."""
    job = database.add_job("planner", "done")
    began = datetime.fromisoformat(claim(conn).started_at).astimezone(KST)
    database.rows("UPDATE pipeline_stages SET held_until = now() + interval '1 h'"
                  " WHERE stage = 'planner'")  # fmt: skip
    until = database.value("SELECT max(held_until) FROM pipeline_stages").astimezone(KST)
    told = partial(run_command, database, TZ="KST-9")
    shown = told("report", "--out", "-", "--job", job).out
    assert "KST" in shown and f"held until {until:%H:%M:%S}" in shown
    assert f"{began:%m-%d %H:%M:%S} " in shown
    ends = database.value("SELECT leased_until FROM stage_leases").astimezone(KST)
    assert f"its lease ends {ends:%H:%M:%S}\n" in told("retry", job).err.replace(f"{ends:%F} ", "")
