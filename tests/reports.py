"""Makes and reads pages of `report`, and fills a database for them."""

import os
import uuid
from contextlib import closing
from datetime import datetime, timedelta, timezone

from claims import STAGES
from pages import Page

import config
import db
from ops.report import with_alarms
from ops.report.data import collect
from ops.report.page import page

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></title><img src=http://evil.example onerror=alert(1)>",
    '"quo\'tes" & <!-- ]]> &amp;',
    "\u202eright to left\u2066",
    "bell\x07 escape\x1b[31m line\nbreak",
    "한빛미디어 초코상사",
    "شركة",
    "x" * 5000,
]


def html_of(database, *jobs: str, since: float = 86400, **settings) -> str:
    """The page about the last `since` seconds, as the command writes it."""
    # An empty directory, so that no listener of this machine is shown.
    settings = database.settings(**({"HEARTBEAT_DIR": os.devnull} | settings))
    start = datetime.now(timezone.utc) - timedelta(seconds=since)
    with closing(db.connect(settings)) as conn:
        found = collect(conn, start, jobs, config.redactor(settings), {})
        return page(with_alarms(conn, settings, found))


def read(database, *jobs: str, **given) -> Page:
    return Page(html_of(database, *jobs, **given))


# The rows that rest can be counted, and not be listed: their reasons cannot be read.
ONLY_COUNTED = """
DROP FUNCTION resting_rows();
CREATE FUNCTION resting_rows() RETURNS TABLE (
    kind text, table_name text, job_id text, tenant_id text, current_step text, status text,
    stage text, since timestamptz, reason text)
LANGUAGE plpgsql AS $$ BEGIN
    IF current_query() NOT LIKE '%%GROUP BY stage, kind%%' THEN
        RAISE EXCEPTION 'a page is damaged';
    END IF;
    RETURN QUERY SELECT 'stalled', 'jobs', 'x', NULL, 'planner', 'done', 'overlay', now(), 'x';
END $$
"""
NOT_KNOWN = "a page is damaged: which rows are failed or stalled is not known of jobs"


def attempt(database, job: str | None = None, stage: str = "planner", outcome: str = "succeeded",
            seconds: float = 1.0, ago: float = 60.0, error: str | None = None) -> str:  # fmt: skip
    """Add an attempt that ended `ago` seconds ago; its job."""
    job = job or str(uuid.uuid4())
    database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, outcome, error,"
        " started_at, finished_at) SELECT %s, 1, count(*) + 1, %s, 'w', %s, %s,"
        " now() - make_interval(secs => %s), now() - make_interval(secs => %s)"
        " FROM stage_attempts WHERE job_id = %s",
        *(job, stage, outcome, error, ago + seconds, ago, job),
    )
    return job


def give_up(database, job: str, error: str) -> None:
    database.rows("UPDATE stage_calls SET due_at = 'infinity', attempts = 1, last_error = %s"
                  " WHERE job_id = %s", error, job)  # fmt: skip


def everything(database) -> str:
    """Add one of everything that the page shows, with hostile texts; the id of one of the jobs."""
    for number, text in enumerate(HOSTILE):
        attempt(database, outcome="retry", error=text, ago=600 * number, seconds=700)
        attempt(database, stage=STAGES[number % 5], seconds=number, ago=5000 * number)
        give_up(database, database.add_job("planner", "done", text), text)
        database.add_job("img_gen", "done", text)
        job = database.add_job("overlay", "running", text)
        database.rows("UPDATE jobs SET updated_at = now() - interval '1 d' WHERE job_id = %s", job)
    for outcome in ("held", "unknown", "lost", "failed", "skipped", "cancelled"):
        job = attempt(database, outcome=outcome, ago=7200)
    hold = "UPDATE pipeline_stages SET held_until = %s, held_by = %s, held_reason = %s"
    database.rows(f"{hold} WHERE stage = 'planner'", "infinity", HOSTILE[0], HOSTILE[1])
    in_an_hour = datetime.now(timezone.utc) + timedelta(hours=1)
    database.rows(f"{hold} WHERE stage = 'overlay'", in_an_hour, "w", HOSTILE[2])
    return job
