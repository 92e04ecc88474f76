"""`report`: the pipeline as one page of HTML, for a browser, a mail or a printer."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import click
import psycopg2

import config
import db
from logs import CONTROL
from ops import rows
from ops.alarms import alarms
from ops.problem import Problem
from ops.report.data import Report, collect, redacted
from ops.report.page import page
from ops.since import Since
from ops.status import look
from ops.text import Text
from ops.whole import write_whole


@click.command(short_help="Write a page of HTML about the pipeline.")
@click.option("--out", required=True, type=Text(), metavar="FILE.html",
              help="Where to write it, whole or not at all; - is standard output.")  # fmt: skip
@click.option("--since", default="24h", show_default=True, type=Since(), metavar="TIME",
              help="How far back it goes: 24h, 7d or a date.")  # fmt: skip
@click.option("--job", "job_ids", type=Text(), multiple=True, metavar="JOB_ID",
              help="Show the timeline of this job, or of a row of another table, with the rows "
                   "that belong to it, not the slowest; may be repeated.")  # fmt: skip
def report(out: str, since: datetime, job_ids: tuple[str, ...]) -> None:
    """Write a page of HTML: where jobs wait, how calls went, what failed and why.

    It is one file that needs no other file, no script and no network. Exit 1 where a table cannot
    be read.
    """
    found = read(since, job_ids)
    whole = page(found)
    if out == "-":
        click.echo(whole.encode(), nl=False)
    else:
        write_whole(Path(out), whole)
        size = len(whole.encode()) / 1000
        click.echo(f"wrote {out} ({size:.0f} kB)".translate(CONTROL))
    if found.problem:
        raise Problem(found.problem)


def read(since: datetime, job_ids: tuple[str, ...]) -> Report:
    """Raises Problem where there is no such job, or no answer in time."""
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener report")
    ids = list(dict.fromkeys(rows.key_of(conn, id_) for id_ in job_ids))
    unread = rows.unread(conn)
    for key in ids:
        if not rows.places(conn, key, unread):
            raise Problem("; ".join(filter(None, [f"there is no job {key}", rows.told(unread)])))
    try:
        found = collect(conn, since, ids, config.redactor(settings), unread)
        return with_alarms(conn, settings, found)
    except psycopg2.errors.QueryCanceled:
        raise Problem("the database took too long to answer; try a later --since") from None


def with_alarms(conn, settings: SimpleNamespace, found: Report) -> Report:
    """`found` with what needs a person now, as `status` knows it."""
    now = redacted(alarms(look(conn, settings)), config.redactor(settings))
    return replace(found, alarms=now)
