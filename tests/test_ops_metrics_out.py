"""`metrics`: the text, the database that is away, and the file that is replaced."""

import os
import resource
import shutil
import subprocess
import time

import pytest
from scraping import EVERYTHING, PREFIX, STAGES, Scraped, scrape
from test_ops_mistakes import HOSTILE, NOWHERE
from waiting import AWAY

from ops.metrics import FAMILIES, Page
from ops.problem import Problem
from ops.whole import write_whole

PROMTOOL = shutil.which("promtool")


@pytest.fixture
def run_command(run_here):
    return run_here


# --- what is written -----------------------------------------------------------------------


@pytest.fixture
def everything(database, run_command) -> str:
    """A text in which no family is missing."""
    database.rows(EVERYTHING)
    return run_command(database, "metrics").out


def test_every_family_is_written_with_its_type_and_help(everything):
    families = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            family.documentation,
        )
        for family in Scraped(everything).families
    }
    assert families == FAMILIES


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_names_and_units_are_as_prometheus_wants_them(everything):
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=everything, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_hostile_stage_stays_in_its_label(database):
    name = HOSTILE + '"} 1\nforged{le="\\'
    database.add_job("planner", "done", HOSTILE)
    database.rows("UPDATE stage_calls SET stage = %s, last_error = %s", name, HOSTILE)
    database.rows(
        "INSERT INTO stage_attempts SELECT job_id, call_id, 1, stage, 'w', now(), now(), 500,"
        " 'failed', %s FROM stage_calls",
        HOSTILE,
    )
    found = scrape(database)
    stages = {dict(key[1:])["stage"] for key in found if key[0] == PREFIX + "owed_calls"}
    [hostile] = stages - set(STAGES)
    assert hostile.count("\n") == 2
    assert hostile.replace("\\x1b", "\x1b").endswith('"} 1\nforged{le="\\')
    assert found.of("attempts_total", stage=hostile, outcome="failed") == 1


def test_no_secret_and_no_data_of_a_job_is_written(database, run_command, login_with):
    job = database.add_job("planner", "done", "acme-tenant")
    database.rows("UPDATE stage_calls SET due_at = 'infinity', last_error = 'token s3cr3t-w0rd'")
    login = login_with(database, "s3cr3t-w0rd")
    done = run_command(database, "metrics", STAGE_API_TOKEN="t0ken-w0rd", **login)
    assert "job_state_listener_up 1" in done.lines
    for text in ("s3cr3t", "t0ken", "acme", job):
        assert text not in done.out + done.err


def test_time_of_the_scrape_and_how_long_it_took_are_told(database):
    before = time.time()
    found = scrape(database)
    longest = time.time() - before + 0.001  # they are rounded
    assert 0 <= found.of("scrape_timestamp_seconds") - before + 0.001 <= longest + 0.001
    assert 0 < found.of("scrape_duration_seconds") <= longest
    assert found.of("up") == 1


# --- the database is away ------------------------------------------------------------------

SCRAPE = {"up", "scrape_timestamp_seconds", "scrape_duration_seconds"}


def says_down(text: str) -> bool:
    found = Scraped(text)
    assert {key[0].removeprefix(PREFIX) for key in found} == SCRAPE
    return found.of("up") == 0


def test_database_that_is_away_is_not_up_and_the_exit_code_says_so(run_command):
    done = run_command(NOWHERE, "metrics", DB_PASSWORD="s3cr3t-w0rd")
    assert says_down(done.out)
    assert done.refused(3).startswith("the database cannot be reached: ")
    assert "s3cr3t" not in done.err


def test_file_says_that_the_database_is_away(database, run_command, tmp_path):
    file = tmp_path / "listener.prom"
    assert run_command(database, "metrics", "--out", str(file)).lines == [""]
    assert Scraped(file.read_text()).of("up") == 1
    done = run_command(database, "metrics", "--out", str(file), **AWAY)
    assert done.refused(3).startswith("the database cannot be reached: ")
    assert done.out == "" and says_down(file.read_text())


def test_database_without_our_tables_is_not_up(empty_database, run_command):
    done = run_command(empty_database, "metrics")
    assert says_down(done.out)
    assert "run `make trigger` (./jsl install)" in done.refused(1)


def test_nothing_half_read_is_written(database, run_command):
    """The stages could be read, what comes after them could not."""
    database.rows("DROP TABLE stage_totals")
    done = run_command(database, "metrics")
    assert done.code == 1 and says_down(done.out)


def test_missing_setting_leaves_the_file_as_it_is(run_command, tmp_path):
    file = tmp_path / "listener.prom"
    file.write_text("old")
    done = run_command(NOWHERE, "metrics", "--out", str(file), DB_HOST="")
    assert done.refused(2).startswith("no database is set")
    assert file.read_text() == "old"


# --- --out ---------------------------------------------------------------------------------


def test_file_is_replaced_as_a_whole_and_everyone_may_read_it(database, run_command, tmp_path):
    file = tmp_path / "out" / "listener.prom"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o600)
    with open(file) as reader:  # a collector that has it open sees all of the old one
        assert run_command(database, "metrics", "--out", str(file)).lines == [""]
        assert reader.read() == "old"
    assert Scraped(file.read_text()).of("up") == 1
    assert file.stat().st_mode & 0o777 == 0o644
    assert os.listdir(file.parent) == ["listener.prom"]


def test_directory_that_is_not_there_is_one_line(database, run_command, tmp_path):
    file = tmp_path / "nowhere" / "listener.prom"
    done = run_command(database, "metrics", "--out", str(file))
    assert done.refused(1) == f"{file} cannot be written: No such file or directory"


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "listener.prom"
    file.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(Problem, match=r"listener.prom cannot be written: .*; it is as it was"):
            write_whole(file, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["listener.prom"]


def test_what_is_no_file_is_not_replaced(database, run_command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused = run_command(database, "metrics", "--out", str(pipe)).refused(1)
    assert refused == f"{pipe} is not a file that could be replaced; nothing was written"
    assert pipe.is_fifo()
    assert "is a directory" in run_command(database, "metrics", "--out", str(tmp_path)).refused(2)


def test_page_refuses_a_metric_that_is_not_documented():
    with pytest.raises(KeyError):
        Page().add("made_up", 1)


def test_role_that_may_only_read_the_views_is_told_where_the_grants_are(
    database, run_command, make_role
):
    role = make_role(database)
    run_command(database, "install", "--reader", role)
    done = run_command(database, "metrics", DB_USER=role, DB_PASSWORD=role)
    assert "see 'Roles and grants' in docs/INSTALLING.md" in done.refused(1)
