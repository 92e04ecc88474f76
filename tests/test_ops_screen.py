"""`status --watch`: in place on a terminal, elsewhere one after the other; it ends well."""

import re
import signal
from contextlib import closing

import pytest
from terminal import CODES, Terminal
from waiting import until

from ops.screen import ENTER, LEAVE
from ops.table import width

SESSION = "application_name = 'job-state-listener status' AND datname = current_database()"
PAUSE = """
UPDATE pipeline_stages SET held_until = 'infinity', held_by = 'anna', held_reason = %s
WHERE stage = 'planner'
"""


@pytest.fixture
def watch(tmp_path):
    """watch(database, size=(80, 24), **settings): `status --watch` in a terminal."""
    (tmp_path / ".env").touch()
    opened = []

    def start(database, size=(80, 24), **settings) -> Terminal:
        environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path)} | settings
        args = ("status", "--watch", "--interval", "0.1")
        opened.append(Terminal(environ, tmp_path, *args, size=size))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_watch_draws_in_place_what_changes(database, watch):
    terminal = watch(database)
    assert "nothing is due, " in terminal.wait_for("no listener is connected")
    database.add_job("img_gen", "done")
    assert "oldest due " in terminal.wait_for("vlm_analyze     1 ")
    assert "\n\n" not in terminal.pictures[-1].rstrip("\n")


def test_ctrl_c_gives_the_terminal_back_with_the_last_picture(database, watch):
    terminal = watch(database)
    terminal.wait_for("no listener is connected")
    terminal.type("\x03")
    assert terminal.wait() == 0
    assert terminal.output.count(ENTER) == terminal.output.count(LEAVE) == 1
    after = terminal.output.split(LEAVE)[1]
    assert re.search(r"^stage +owed", after, re.MULTILINE)
    assert after.rstrip().endswith("no listener is connected: start ./jsl\033[0m")
    assert "Traceback" not in terminal.output


def test_sigterm_gives_the_terminal_back(database, watch):
    terminal = watch(database)
    terminal.wait_for("no listener is connected")
    terminal.process.terminate()
    assert terminal.wait() == 0
    assert LEAVE in terminal.output


def test_ctrl_z_gives_the_terminal_back_until_continued(database, watch):
    terminal = watch(database)
    terminal.wait_for("no listener is connected")
    terminal.type("\x1a")
    until(lambda: LEAVE in terminal.output, "the terminal is given back")
    until(lambda: state(terminal.process.pid) == "T", "it is stopped")
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait_for("no listener is connected")
    assert terminal.output.count(ENTER) == 2


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_watch_survives_a_lost_database(server, database, watch):
    terminal = watch(database)
    terminal.wait_for("no listener is connected")
    with closing(server.connect()) as conn:
        cursor = conn.cursor()
        cursor.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = %s AND application_name = 'job-state-listener status'",
            [database.name],
        )
        away = terminal.wait_for("PROBLEM  the database is away, trying again: ")
        assert re.search("^stage +owed", away, re.MULTILINE)  # what was known before
        cursor.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
    database.add_job("img_gen", "done")
    assert "PROBLEM" not in terminal.wait_for("vlm_analyze     1 ")


def test_watch_goes_on_where_a_statement_fails(database, watch):
    terminal = watch(database)
    terminal.wait_for("no listener is connected")
    database.rows("ALTER VIEW pipeline_overview RENAME TO hidden")
    terminal.wait_for("PROBLEM  the database refused, trying again: relation ")
    database.rows("ALTER VIEW hidden RENAME TO pipeline_overview")
    until(lambda: "PROBLEM" not in terminal.pictures[-1], "the problem is over")


def test_watch_uses_one_connection(database, watch):
    terminal = watch(database)
    terminal.wait_for("no listener is connected")
    sessions = database.rows(f"SELECT pid FROM pg_stat_activity WHERE {SESSION}")
    for _ in range(3):
        terminal.wait_for("no listener is connected")
    assert database.rows(f"SELECT pid FROM pg_stat_activity WHERE {SESSION}") == sessions
    assert len(sessions) == 1


def test_picture_fits_a_small_terminal(database, watch):
    database.rows(PAUSE, "GPU 점검 중: " + "아주 긴 이유 " * 20)
    terminal = watch(database, size=(47, 9))
    lines = terminal.wait_for("lines more than this terminal has").split("\n")
    assert len(lines) == 9
    assert max(map(width, lines)) <= 47
    small = watch(database, size=(47, 20))
    held = next(line for line in small.wait_for("paused by").split("\n") if "paused by" in line)
    assert 46 <= width(held) <= 47 and held.endswith("…")


def test_what_is_to_be_typed_is_never_cut(database, tmp_path):
    (tmp_path / ".env").touch()
    job = database.add_job("overlay", "failed")
    terminal = Terminal(database.environ, tmp_path, "job", job, size=(60, 24))
    with closing(terminal):
        assert terminal.wait() == 0
    assert terminal.output.endswith("AND (current_step, status) = ('overlay', 'failed')\n")
    database.rows("ALTER TABLE jobs DISABLE TRIGGER job_state_change_trigger")
    terminal = Terminal(database.environ, tmp_path, "status", size=(20, 24))
    with closing(terminal):
        assert terminal.wait() == 0
    assert "→ ./jsl install" in terminal.output


def test_colour_is_for_terminals_without_no_color(database, watch):
    database.rows(PAUSE, "GPU maintenance")
    coloured, plain = watch(database), watch(database, NO_COLOR="1")
    for terminal in (coloured, plain):
        terminal.wait_for("paused by anna: GPU maintenance")
    sgr = re.compile(r"\033\[[0-9;]*m")
    assert set(sgr.findall(coloured.output)) == {"\033[33m", "\033[0m"}
    assert not sgr.search(plain.output)


@pytest.mark.parametrize("term", ["dumb", ""])
def test_terminal_that_cannot_move_its_cursor_gets_one_picture_after_another(database, watch, term):
    terminal = watch(database, TERM=term, NO_COLOR="1")
    until(lambda: terminal.output.count("nothing is due") >= 3, "three pictures")
    assert not CODES.search(terminal.output)


# --- where there is no terminal ------------------------------------------------------------


def test_pipe_gets_one_picture_after_another_in_plain_text(database, listener):
    process = listener(database, "status", "--watch", "--interval", "0.1")
    process.wait_for_line("nothing is due", count=3)
    process.signal(signal.SIGINT)
    assert process.wait() == 0
    assert "\033" not in process.output
    one, two, *_ = process.output.split("\n\n")
    assert one.split("\n")[1:] == two.split("\n")[1:]


def test_json_gets_one_document_after_the_other(database, listener):
    process = listener(database, "status", "--watch", "--json", "--interval", "0.1")
    process.wait_for_line('"calls_per_minute": 0.0,', count=2)
    process.signal(signal.SIGINT)
    assert process.wait() == 0
    assert process.lines.count("{") >= 2 and process.lines.count("}") >= 2
