"""make demo: a board on a terminal, plain lines elsewhere, or the listener's log."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest
from terminal import CODES, Terminal
from waiting import PATIENCE, until

from demo.board import CELL, COLUMNS, Board, Cell, Row
from demo.database import EmbeddedDatabase
from demo.killing import worker_behind
from demo.stage_api import DELAYS, StageApi
from demo.start import environment
from ops.table import width

ROOT = Path(__file__).parent.parent
OURS = {name: value for name, value in os.environ.items() if name[:2] not in ("DB", "PG")}
LOST = re.compile(r"✗ kill -9 of the worker that calls (\w+) for ([\w/]+)")


def demo(*args, **environ):
    return subprocess.run([sys.executable, "-m", "demo", *args], cwd=ROOT, env=OURS | environ,
                          encoding="utf-8", capture_output=True, timeout=300)  # fmt: skip


def on_terminal(report: Path, *args):
    command = ("-m", "demo", "--report", str(report))
    return Terminal({"PATH": os.environ["PATH"]}, ROOT, *args, program=command)


def require_nothing_lost(said: str) -> None:
    """The worker was killed, and its call was made again and accepted, as all others were."""
    stage, label = LOST.search(said).groups()
    assert re.search(f"{label} {stage} again in . s: its worker was killed by SIGKILL\n", said)
    assert f"{label} {stage}: called again, accepted, so nothing is lost" in said
    verdict = re.search(r"✓ (\d+) of (\d+) calls accepted, each of them once", said)
    assert verdict[1] == verdict[2]


# --- from beginning to end -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, stages", [
    ([], list(DELAYS)),
    (["variants"], ["analyze", "detect", "planner", "overlay", "judge", "eval", "gen"]),
])  # fmt: skip
def test_on_a_terminal_the_stages_of_each_job_fill_in_place(tmp_path, name, stages):
    report = tmp_path / "report.html"
    terminal = on_terminal(report, *name)
    try:
        assert terminal.wait() == 0, terminal.output
        pictures = terminal.pictures
    finally:
        terminal.close()
    for picture in pictures:
        lines = picture.split("\n")
        assert len(lines) <= 24 and max(map(width, lines)) <= 80, picture
    assert all(stage in pictures[0] for stage in stages)
    for mark in ("▶", "○", "↻", "✓ "):
        assert any(mark in line for p in pictures for line in jobs_in(p)), mark
    after = CODES.sub("", terminal.output.rpartition("\033[?1049l")[2])
    assert jobs_in(after) and not re.search("[▶○↻·]", "".join(jobs_in(after)))
    require_nothing_lost(after)
    assert max(map(width, after.split("\n"))) <= max(80, width(f"   {report}"))
    assert re.search("^listener +since +doing$", after, re.MULTILINE)  # of status
    assert str(report) in after or os.path.relpath(report, ROOT) in after
    assert report.read_text().startswith("<!")


def jobs_in(picture: str) -> list[str]:
    return re.findall(r"^[0-9a-f]{6}(?:[0-9a-f]{2}|/\d) .*$", picture, re.MULTILINE)


@pytest.mark.slow
def test_without_a_terminal_it_is_plain_lines(tmp_path):
    report = os.path.relpath(tmp_path / "report.html", ROOT)
    done = demo("five_stages", "--report", report)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "\033" not in done.stdout
    assert max(width(line) for line in done.stdout.splitlines() if report not in line) <= 80
    require_nothing_lost(done.stdout)


@pytest.mark.slow
def test_log_is_that_of_the_listener(tmp_path):
    done = demo("--log", "--report", str(tmp_path / "report.html"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    begun = (
        r"^\d{4}-\d\d-\d\d \S+ INFO \[\d+\] \[TRIGGER\] 파이프라인 단계 트리거: job=[0-9a-f-]{36} "
    )
    assert len(re.findall(begun, done.stdout, re.MULTILINE)) >= 25
    assert "its worker was killed by SIGKILL" in done.stdout and "✓ 25 of 25" in done.stdout


@pytest.mark.slow
def test_database_that_is_given_is_left_without_the_jobs_of_the_demo(tmp_path):
    with EmbeddedDatabase() as server:
        done = demo("--report", str(tmp_path / "report.html"), **server.settings())
        assert done.returncode == 0, done.stdout
        assert "only the demo's jobs are touched" in done.stdout
        with psycopg2.connect(server.dsn()) as conn, conn.cursor() as cursor:
            for table in ("jobs", "stage_calls", "stage_leases", "stage_attempts"):
                cursor.execute(f"SELECT count(*) FROM {table}")
                assert cursor.fetchone() == (0,), table
        conn.close()


SHOW = """
import config, json
found = config.settings()
names = "STAGE_API_URL", "STAGE_API_URLS", "STAGE_API_TOKEN", "ALERT_COMMAND", "MAX_ATTEMPTS"
print(json.dumps([getattr(found, name) for name in names]))"""


def test_no_setting_of_the_caller_or_of_env_reaches_a_listener_of_the_demo(tmp_path, monkeypatch):
    file = tmp_path / ".env"
    file.write_text("STAGE_API_URL_PLANNER=http://gpu7:8011\nALERT_COMMAND=/srv/chat\n")
    monkeypatch.setattr("demo.start.ENV_FILE", file)
    monkeypatch.setenv("STAGE_API_URL_OVERLAY", "http://gpu8:8011")
    monkeypatch.setenv("STAGE_API_TOKEN", "of-production")
    monkeypatch.setenv("MAX_ATTEMPTS", "1")
    environ = environment(STAGE_API_URL="http://127.0.0.1:1") | {"PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, "-c", SHOW], cwd=tmp_path, env=environ)
    assert json.loads(said) == ["http://127.0.0.1:1", {}, None, None, 5]


# --- ended before its time -----------------------------------------------------------------


def test_ctrl_c_gives_the_terminal_back_and_leaves_nothing_running(tmp_path):
    terminal = on_terminal(tmp_path / "report.html")
    try:
        terminal.wait_for("INSERT job")
        terminal.type("\x03")
        assert terminal.wait() == 128 + signal.SIGINT
        assert "\033[?25h\033[?1049l" in terminal.output
        assert "Stopped by SIGINT; nothing is left running." in terminal.output
    finally:
        terminal.close()
    port = re.search(r"PostgreSQL [\d.]+ on 127.0.0.1:(\d+)", terminal.output)[1]
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(host="127.0.0.1", port=port, user="postgres", connect_timeout=5)


def test_database_with_jobs_of_others_is_refused(database):
    database.add_job()
    done = demo(**{name: str(value) for name, value in database.environ.items()})
    assert done.returncode == 1
    assert "✗ jobs are on their way in this database; name an empty one" in done.stdout


def test_database_with_another_pipeline_is_refused_and_keeps_it(database):
    database.rows("DELETE FROM jobs; UPDATE pipeline_stages SET stage = 'caption'"
                  " WHERE stage = 'planner'")  # fmt: skip
    done = demo(**{name: str(value) for name, value in database.environ.items()})
    assert done.returncode == 1
    assert "✗ another PIPELINE is installed in this database; name an empty one" in done.stdout
    assert database.value("SELECT count(*) FROM pipeline_stages WHERE stage = 'caption'") == 1


def test_unknown_name_is_told_what_is_allowed():
    done = demo("nope")
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert said == "demo: there is no pipeline nope; allowed is five_stages or variants, or none\n"


def test_report_that_cannot_be_written_is_said_at_once(tmp_path):
    done = demo("--report", str(tmp_path / "none" / "report.html"))
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == f"demo: there is no directory {tmp_path / 'none'} to write a report in\n"


# --- the board by itself -------------------------------------------------------------------


@pytest.mark.parametrize("cell, shown", [
    (Cell(), "·"),
    (Cell(due_in=-1.0), "○"),
    (Cell(calling=0.42), "▶ 0.4"),
    (Cell(calling=0.42, due_in=6.0), "▶ 0.4"),
    (Cell(due_in=4.2, ended=1), "↻ 4 s"),
    (Cell(ended=1), "↻"),
    (Cell(took=1.84, ended=1), "✓ 1.8"),
    (Cell(took=1.84, ended=2), "✓*1.8"),
])  # fmt: skip
def test_cell_says_how_a_row_stands_at_a_stage(cell, shown):
    assert str(cell) == shown and len(shown) <= CELL


@pytest.mark.parametrize("stages", [
    list(DELAYS), ["a"], [f"stage_of_number_{n}" for n in range(11)],
    ["extraordinarily_long_names_of", "internationalization_stages"],
])  # fmt: skip
def test_board_is_never_wider_than_the_terminal(stages):
    board = Board("title", stages, [Row("key", "3f2a9c1d", stages)])
    board.cells = {("key", stage): Cell(took=9.9, ended=2) for stage in stages}
    assert max(width(text) for text, _ in board.picture()) <= COLUMNS


def test_what_became_of_the_killed_worker_stays_on_the_board():
    board = Board("title", list(DELAYS))
    board.add("✗ kill -9", 31)
    for number in range(50):
        board.add(f"↻ event {number}", 33)
    shown = [text for text, _ in board.last_events(5)]
    assert ["kill" in shown[0], "event 46" in shown[1], "event 49" in shown[4]] == [True] * 3


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_worker_is_found_by_the_socket_of_its_request(accepting_api):
    script = ("import requests, sys; s = requests.Session();"
              f"s.post('{accepting_api.url}/anything', json={{}}); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        request = until(lambda: next(iter(accepting_api.requests), None), "a request", PATIENCE)
        assert worker_behind(request) == process.pid
        process.communicate()


@pytest.fixture
def accepting_api(database):
    with StageApi(database.dsn) as api:
        yield api
