"""`metrics`: where everything stands, in Prometheus' text format."""

import contextlib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import psycopg2

import config
import db
import history
import pipeline
from logs import CONTROL
from ops.limits import limits
from ops.listeners import connected
from ops.pools import pools
from ops.resting import resting
from ops.routes import broken_triggers, difference, triggers
from ops.text import OutFile
from ops.verify import QUEUE
from ops.whole import write_whole

# --- what there is -------------------------------------------------------------------------

# name: (type, help), in the order in which they are written.
FAMILIES = {
    "job_state_listener_up": (
        "gauge",
        "1 if the database answered; if 0, only the scrape's own metrics are there.",
    ),
    "job_state_listener_scrape_timestamp_seconds": ("gauge", "When these metrics were read."),
    "job_state_listener_scrape_duration_seconds": ("gauge", "How long reading them took."),
    "job_state_listener_listeners_connected": ("gauge", "Listeners connected to the database."),
    "job_state_listener_owed_calls": ("gauge", "Calls that jobs owe, given-up ones included."),
    "job_state_listener_due_calls": (
        "gauge",
        "Owed calls whose time has come, those of a held or paused stage included.",
    ),
    "job_state_listener_oldest_due_age_seconds": (
        "gauge",
        "How long the oldest due call has been due, tried in vain or not; 0 where none is.",
    ),
    "job_state_listener_running_calls": ("gauge", "Calls under way; status says calling."),
    "job_state_listener_working_calls": (
        "gauge",
        "Of those, calls that an asynchronous stage has taken with 202 and works on.",
    ),
    "job_state_listener_pool_calls": ("gauge", "Calls under way of all stages of a pool."),
    "job_state_listener_pool_size": ("gauge", "How many may be under way."),
    "job_state_listener_max_running_calls": (
        "gauge",
        "How many may be under way; only of stages with such a limit.",
    ),
    "job_state_listener_max_tenant_calls": (
        "gauge",
        "How many of one tenant may be under way; only of stages with per_tenant.",
    ),
    "job_state_listener_max_calls_per_minute": (
        "gauge",
        "How many may begin in a minute; only of stages with per_minute.",
    ),
    "job_state_listener_planned_calls": (
        "gauge",
        "Owed calls that wait for their run_after; only of stages whose table declares it.",
    ),
    "job_state_listener_retrying_calls": ("gauge", "Owed calls that failed and are tried again."),
    "job_state_listener_given_up_calls": ("gauge", "Owed calls that wait for a person."),
    "job_state_listener_stage_held": (
        "gauge",
        "1 while nobody calls the stage: unreachable, overloaded, refusing or breaking for several "
        "jobs, or no database for its lookups.",
    ),
    "job_state_listener_stage_paused": (
        "gauge",
        "1 while nobody calls the stage because a person paused it.",
    ),
    "job_state_listener_stalled_jobs": (
        "gauge",
        "Jobs that no call and no stage has moved on for longer than the stage's timeout.",
    ),
    "job_state_listener_failed_jobs": (
        "gauge",
        "Jobs that their stage has set failed, where no stage follows from that.",
    ),
    "job_state_listener_table_readable": (
        "gauge",
        "1 if the rows of the table, and of joins of them, could be read for stalled_jobs and "
        "failed_jobs; else those of their stages are missing.",
    ),
    "job_state_listener_attempts_total": (
        "counter",
        "Finished attempts by outcome; nothing was called where it is skipped or cancelled.",
    ),
    "job_state_listener_call_duration_seconds": (
        "histogram",
        "How long accepted calls took, those with the outcome succeeded.",
    ),
    "job_state_listener_database_trigger_enabled": (
        "gauge",
        "1 if the database trigger is there, ours, enabled, sees every change and finds its "
        "columns; else calls go unrecorded. table: if not jobs.",
    ),
    "job_state_listener_routes_in_sync": (
        "gauge",
        "1 if the database has the routes of this stages.py; else listeners do not start.",
    ),
    "job_state_listener_notification_queue_usage_ratio": (
        "gauge",
        "How full the server's NOTIFY queue is; at 1 the application's commits fail.",
    ),
}

# All outcomes, as in the CHECK of stage_attempts.
OUTCOMES = (
    "succeeded", "held", "retry", "unknown", "failed", "skipped", "cancelled", "lost",
)  # fmt: skip

# Escapes text for a label, so that it cannot end the label or control a terminal.
ESCAPED = {code: text.replace("\\", "\\\\") for code, text in CONTROL.items()}
ESCAPED |= {ord("\n"): "\\n", ord("\\"): "\\\\", ord('"'): '\\"'}


class Page:
    """The text: every sample below the header of its family."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {name: [] for name in FAMILIES}

    def add(self, name: str, value: Any, suffix: str = "", **labels: str) -> None:
        """A sample of job_state_listener_`name`; `suffix` is that of a histogram's part."""
        name = f"job_state_listener_{name}"
        pairs = ",".join(f'{key}="{text.translate(ESCAPED)}"' for key, text in labels.items())
        labelled = f"{name}{suffix}{{{pairs}}}" if pairs else f"{name}{suffix}"
        self.lines[name].append(f"{labelled} {value}")

    def text(self) -> str:
        lines = []
        for name, (kind, words) in FAMILIES.items():
            if self.lines[name]:
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", *self.lines[name]]
        return "\n".join(lines) + "\n"


# --- asking --------------------------------------------------------------------------------

STAGES = """
SELECT stage, owed, due, calling, working, max_running, retrying, given_up, held_until, paused,
       coalesce(extract(epoch FROM now() - oldest_due_at), 0)::float8 AS oldest_due_age
FROM pipeline_overview
ORDER BY position NULLS LAST, stage
"""

RECENT = "stage_attempts WHERE finished_at > (SELECT counted_until FROM stage_totals_mark)"

# Totals and uncounted attempts are read in one statement, so that an attempt that a listener counts
# meanwhile is in exactly one of them. Without the two settings the planner, which does not know how
# few attempts come after the mark, would read and sort the whole history.
COUNTERS = f"""
SET LOCAL enable_seqscan = off;
SET LOCAL enable_sort = off;
SELECT stage, outcome, within_seconds, sum(attempts)::bigint AS attempts,
       sum(microseconds)::bigint AS microseconds
FROM (
    SELECT stage, outcome, within_seconds, attempts, microseconds FROM stage_totals
    UNION ALL
    {history.TOTALS.format(rows=RECENT)}) AS every
GROUP BY stage, outcome, within_seconds
"""


def read_stages(conn, page: Page) -> None:
    stages = db.execute(conn, STAGES).fetchall()
    rests = resting(conn)
    for row in stages:
        held = row.held_until is not None and not row.paused
        values = {
            "owed_calls": row.owed,
            "due_calls": row.due,
            "oldest_due_age_seconds": row.oldest_due_age,
            "running_calls": row.calling,
            "working_calls": row.working,
            "retrying_calls": row.retrying,
            "given_up_calls": row.given_up,
            "stage_held": int(held),
            "stage_paused": int(bool(row.paused)),
            "stalled_jobs": rests.of(row.stage, "stalled").jobs,
            "failed_jobs": rests.of(row.stage, "failed").jobs,
            "max_running_calls": row.max_running,
        }
        for name, value in values.items():
            if value is not None:
                page.add(name, value, stage=row.stage)
    for table in pipeline.tables():
        page.add("table_readable", int(table not in rests.unknown_tables), table=table)
    for of in limits(conn):
        values = {
            "max_tenant_calls": of.per_tenant,
            "max_calls_per_minute": of.per_minute,
            "planned_calls": of.planned,
        }
        for name, value in values.items():
            if value is not None:
                page.add(name, value, stage=of.stage)
    for pool in pools(conn):
        page.add("pool_calls", pool.calling, pool=pool.name)
        page.add("pool_size", pool.size, pool=pool.name)
    read_counters(conn, page, [row.stage for row in stages])


def read_counters(conn, page: Page, stages: Iterable[str]) -> None:
    """The counters of `stages`, from zero on, and of every other stage in the history."""
    rows = db.execute(conn, COUNTERS, history.BOUNDS).fetchall()
    for stage in dict.fromkeys([*stages, *sorted(row.stage for row in rows)]):
        ours = [row for row in rows if row.stage == stage]
        for outcome in OUTCOMES:
            attempts = sum(row.attempts for row in ours if row.outcome == outcome)
            page.add("attempts_total", attempts, stage=stage, outcome=outcome)
        add_durations(page, stage, [row for row in ours if row.outcome == "succeeded"])


def add_durations(page: Page, stage: str, accepted: list) -> None:
    name = "call_duration_seconds"
    for bound in (*history.BUCKETS, math.inf):
        calls = sum(row.attempts for row in accepted if row.within_seconds <= bound)
        le = f"{bound:g}" if bound < math.inf else "+Inf"
        page.add(name, calls, "_bucket", stage=stage, le=le)
    page.add(name, sum(row.microseconds for row in accepted) / 1e6, "_sum", stage=stage)
    page.add(name, sum(row.attempts for row in accepted), "_count", stage=stage)


def read_all(conn, page: Page) -> None:
    """Everything that the database knows.

    Raises:
        psycopg2.Error: some of it could not be read.
    """
    read_stages(conn, page)
    page.add("listeners_connected", connected(conn))
    for row in triggers(conn):
        enabled = not broken_triggers([row])
        table = {} if row.table_name == pipeline.JOBS.name else {"table": row.table_name}
        page.add("database_trigger_enabled", int(enabled), trigger=row.name, **table)
    page.add("routes_in_sync", int(not difference(conn)))
    full = db.execute(conn, QUEUE).fetchone()[0]
    page.add("notification_queue_usage_ratio", full / 100)


def scrape(settings: SimpleNamespace) -> tuple[Page, psycopg2.Error | None]:
    """The metrics, and the error where they could not be read. Then the page has only our own: a
    page with half of the others would look complete.
    """
    page, failure, began = Page(), None, time.monotonic()
    try:
        with contextlib.closing(db.connect(settings, "job-state-listener metrics")) as conn:
            read_all(conn, page)
    except psycopg2.Error as error:
        page, failure = Page(), error
    add_own(page, began, failure is None)
    return page, failure


def add_own(page: Page, began: float, is_up: bool) -> None:
    """Add the metrics that need no database; `began` is a time.monotonic()."""
    page.add("up", int(is_up))
    page.add("scrape_timestamp_seconds", round(time.time(), 3))
    page.add("scrape_duration_seconds", round(time.monotonic() - began, 3))


# --- the command ---------------------------------------------------------------------------


@click.command(short_help="Print metrics for Prometheus.")
@click.option("--out", type=OutFile(), metavar="FILE",
              help="Replace FILE by them, whole or not at all.")  # fmt: skip
def metrics(out: Path | None) -> None:
    """Print metrics for Prometheus, in its text format.

    Where the database cannot be read, job_state_listener_up is 0, and the exit code is not.
    """
    page, failure = scrape(config.settings())
    if out:
        write_whole(out, page.text())
    else:
        click.echo(page.text(), nl=False)
    if failure:
        raise failure
