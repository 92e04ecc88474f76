"""How commands print: columns, spans, and what a terminal would wrap."""

from datetime import datetime, timedelta, timezone

import pytest

from ops.table import clipped, clock, duration, table, width


def test_columns_line_up_under_headings_of_several_lines():
    printed = table(["job", "given\nup", "share"], [["a", 12, "5%"], ["bcd", 3, "100%"]], ["share"])
    assert printed.split("\n") == [
        "     given",
        "job     up  share",
        "a       12     5%",
        "bcd      3   100%",
    ]


def test_korean_text_takes_two_columns_a_letter():
    printed = table(["tenant", "state"], [["점검", "done"], ["acme", "running"]])
    assert [width(line) for line in printed.split("\n")] == [13, 12, 15]
    assert printed.split("\n")[1] == "점검    done"


def test_control_characters_stay_in_their_cell():
    assert table(["a"], [["x\ny\x1b[2J"]]).split("\n")[1] == "x\\ny\\x1b[2J"


@pytest.mark.parametrize("text", ["a" * 30, "점" * 30, "a점" * 15, "e\u0301" * 30])
@pytest.mark.parametrize("columns", [1, 2, 10, 29])
def test_clipped_text_fits_and_says_that_it_is_cut(text, columns):
    cut = clipped(text, columns)
    assert columns - 1 <= width(cut) <= columns
    assert cut.endswith("…")
    assert text.startswith(cut[:-1])


def test_text_that_fits_is_left_as_it_is():
    assert clipped("점검 done", 9) == "점검 done"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0, "0 s"), (0.0371, "0.04 s"), (0.4, "0.4 s"), (9.87, "9.9 s"), (12.3, "12 s"),
     (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172800, "2 d")],
)  # fmt: skip
def test_span_is_short(seconds, shown):
    assert duration(seconds) == shown


def test_time_has_its_date_only_on_another_day():
    now = datetime.now(timezone.utc)
    assert len(clock(now)) == 8
    assert clock(now - timedelta(days=2)).count("-") == 2
