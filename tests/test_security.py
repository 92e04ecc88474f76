"""What SECURITY.md says is held by a test, and what no other file tests about secrets."""

import re
from pathlib import Path

import pytest
from waiting import until, wait_until_idle

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)[2:]]
NAMED = re.compile(r"`(test_\w+)`")


def test_every_line_of_the_table_names_its_tests():
    assert len(ROWS) > 20
    for row in ROWS:
        assert len(row) == 4 and NAMED.search(row[3]), row


def test_every_test_that_is_named_exists():
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    existing = set(re.findall(r"^def (test_\w+)\(", "\n".join(sources), re.MULTILINE))
    assert set(NAMED.findall(PAGE)) - existing == set()


# --- ps and heartbeats ---------------------------------------------------------------------

SECRET = "kP7-s3cr3t"


@pytest.mark.parametrize("workers", [1, 2])
def test_process_list_and_heartbeats_show_no_secret(
    database, api, listener, tmp_path, login_with, workers
):
    url = api.url.replace("//", f"//me:{SECRET}@")
    process = listener(database, "run", "--workers", str(workers), STAGE_API_URL=url,
                       LOG_LEVEL="DEBUG", **login_with(database, SECRET))  # fmt: skip
    wait_until_idle(tmp_path)
    until(lambda: len(process.children()) == workers, "its workers")
    told = [path.read_text() for path in (tmp_path / "heartbeats").iterdir()]
    told += [Path(f"/proc/{pid}/cmdline").read_text() for pid in (process.pid, *process.children())]
    shown = ("SELECT coalesce(string_agg(a::text, ' '), '') FROM pg_stat_activity AS a"
             " WHERE datname = current_database()")  # fmt: skip
    told += [process.output, database.value(shown)]
    assert len(told) == workers + 4
    assert "s3cr3t" not in "".join(told)
