"""Whatever anybody NOTIFYs, a listener hears it: one line each, and it goes on."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from caller import logged
from conftest import Database
from fuzzing import fuzzed, joined
from hypothesis import example, given
from hypothesis import strategies as st
from waiting import LISTENING, until, wait_until_idle

import db
import logs
import notifications
from demo.stage_api import StageApi
from ops.install import apply

pytestmark = pytest.mark.slow

# What a payload can be: no NUL, no surrogates, fewer than 8000 bytes.
TEXTS = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=40)
STATES = st.sampled_from(["img_gen", "planner", "done", "failed"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | STATES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
# A surrogate in a string is escaped here, and is one again when it is read.
SHAPED = st.fixed_dictionaries(
    {}, optional={name: VALUES for name in ("job_id", "current_step", "status", "tenant_id", "x")}
).map(json.dumps)
GOOD = {"job_id": 1, "current_step": "img_gen", "status": "done"}
BROKEN = joined(
    "{", "}", "[", "]", '"', ":", ",", "\\", '"job_id"', "1e999", "\x1b[2J", "\r\n",
    "[" * 1000, "9" * 5000, json.dumps(GOOD), other=TEXTS,
)  # fmt: skip


def deep(depth: int) -> str:
    """JSON that can be read, and perhaps not be printed."""
    return json.dumps(GOOD).replace("1", "[" * depth + "]" * depth)


PAYLOADS = (TEXTS | SHAPED | BROKEN | st.integers(900, 3900).map(deep)).map(
    lambda payload: payload.encode()[:7999].decode(errors="ignore")
)


@contextmanager
def hearing(database) -> Iterator[Callable[[str, object, int], list[str]]]:
    """hear(sql, given, count): what a listener logs when `sql` sends `count` notifications."""
    settings = database.settings(LOG_LEVEL="DEBUG")
    with logged(settings) as output, closing(db.connect(settings)) as conn:
        heard = notifications.Hearing(settings)
        heard.others = notifications.Allowance(1e9, 1e9)
        notifications.listen(conn)

        def hear(sql: str, given: object, count: int) -> list[str]:
            said = output.tell()
            database.rows(sql, given)
            until(
                lambda: (heard.hear(conn) and len(heard.heard) >= count) or not count,
                "every notification",
            )
            heard.log()
            output.seek(said)
            return output.read().split("\n")[:-1]

        yield hear


NOTIFY = f"SELECT pg_notify('{db.CHANNEL}', n) FROM unnest(%s::text[]) AS n"


def test_any_notification_is_one_line_and_no_error(database):
    with hearing(database) as hear:

        @fuzzed(100)
        @given(payloads=st.lists(PAYLOADS, unique=True, max_size=5))
        @example(payloads=[deep(900), deep(990), deep(3900), "9" * 7999, "[" * 7999])
        def notify(payloads: list[str]) -> None:
            lines = hear(NOTIFY, payloads, len(payloads))
            assert len(lines) == len(payloads)
            for line in lines:
                assert "Job 상태 변화 감지: job=" in line or "알 수 없는 NOTIFY 무시: " in line
                assert line.translate(logs.CONTROL) == line and len(line) < 5000

        notify()


# Where the database has no encoding a text is any bytes, and PostgreSQL itself ends a connection
# that is to be told of such a one in UTF-8.
NO_UTF8 = f"SELECT pg_notify('{db.CHANNEL}', convert_from('\\xff', 'SQL_ASCII'))"
DONE = "SELECT count(*) = 1 FROM jobs WHERE current_step = 'vlm_judge' AND status = 'done'"


def test_notification_that_is_no_utf8_costs_a_reconnect(server, database, listener, tmp_path):
    name = f"{database.name}_ascii"
    database.rows(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0")
    with closing(Database(server, name)) as ascii, StageApi(ascii.dsn) as api:
        with closing(db.connect(ascii.settings())) as conn:
            apply(conn)
        process = listener(ascii, api=api)
        wait_until_idle(tmp_path)
        ascii.rows(NO_UTF8)
        process.wait_for_line(LISTENING, count=2)
        ascii.add_job("overlay", "done")
        ascii.wait_for(DONE)
        process.kill()
