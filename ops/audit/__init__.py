"""`audit`: looks in the history of a real installation for promises that were broken."""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import click
import psycopg2

import config
import pipeline
from calls import REAP_INTERVAL
from logs import CONTROL
from ops import rows
from ops.audit import joins
from ops.audit.attempts import ATTEMPTS, Judge
from ops.audit.findings import BATCH, BLUR, PATIENCE, READ_ONLY, Finding, Findings, ask, at, windows
from ops.audit.limits import Limits
from ops.problem import Problem
from ops.resting import NEVER_RECORDED, listed, tables_of
from ops.routes import is_updates_only
from ops.rules import AFTER_LEAVING, EARLY, LIMIT, LOST, OVERLAP, REPEATED
from ops.since import Since
from ops.table import JSON, duration, echo_json, plain, table

RESTS = "row rests"
KINDS = (LOST, REPEATED, EARLY, OVERLAP, AFTER_LEAVING, joins.JOINED, LIMIT, ATTEMPTS, RESTS)
SHOWN = 20  # findings of a kind; the JSON has more

SPAN = """
SELECT now() AS until, (SELECT min(finished_at) FROM stage_attempts) AS first,
       (SELECT count(*) FROM stage_attempts WHERE finished_at > %(since)s) AS attempts,
       (SELECT count(*) FROM stage_calls WHERE due_at = 'infinity') AS given_up,
       o.due, o.due_since
FROM (SELECT coalesce(sum(due), 0)::bigint AS due, min(oldest_due_at) AS due_since
      FROM pipeline_overview) AS o
"""

# Rows that rest. A row without a time of its last change is included, as it may be in the span.
RESTING = """
SELECT kind, table_name, job_id, stage, since, reason FROM resting_rows()
WHERE since IS NULL OR since > %(since)s
ORDER BY since NULLS FIRST, job_id
"""

# What audit cannot tell, as it is printed.
UNKNOWN = (
    "A row that came to a state without a call and left it again leaves no trace.",
    "A second call of a stage for one row may be of a second arrival, or `again` by a person.",
    "That a row had left a state is seen only where another of its calls was made meanwhile, and "
    "had ended or was claimed {blur:.0f} s before.",
    "That a row of a join was missing is seen only where a call of that row was repeated "
    "afterwards or is still owed. A row that was given to another parent since may mislead.",
    "Calls that were under way together for less than {blur:.0f} s are not held against "
    "max_running or a pool, nor two calls of one stage for a row: a claim is dated by the "
    "beginning of its transaction. Two attempts of one call are.",
    "Where a call was lost, or taken with 202 and not finished, its lease may have ended up to "
    "{reaped:.0f} s before that was recorded. Other calls in that time are not held against it, "
    "nor against a limit.",
    "max_attempts, LEASE_MARGIN, per_minute and what has per_minute, fair or linger are taken as "
    "set here and today. Where they were changed: --since after that.",
    "Whether per_tenant, priority, run_after and linger were kept and tenants took turns: the "
    "history has neither tenants nor these columns.",
    "Times are the database's, and a call ends when its result is recorded. Where the clock was "
    "set, the history could not be written (a full disk), or a failover lost transactions, a "
    "finding may be wrong.",
    "What a stage did with a request that got no answer is not known.",
)

OLD_JOINS = (
    "A join whose rows were all there before PIPELINE had it counts as a lost arrival, unless its "
    "parent is at a later stage: --since after that."
)


class Audit:
    """Goes through the history since a time, and through the rows that rest now.

    Args:
        batch: how many attempts to look at in one statement.

    Raises:
        BadParameter: `since` is still to come.
    """

    def __init__(self, conn, settings: SimpleNamespace, since: datetime, batch: int = BATCH):
        self.conn, self.since, self.began = conn, since, time.monotonic()
        self.findings = Findings()
        [self.span] = ask(conn, READ_ONLY + SPAN, {"since": since})
        if since >= self.span.until:
            context = click.get_current_context(silent=True)
            raise click.BadParameter(
                f"{since:%F %T} is still to come", context, param_hint="--since"
            )
        self.failed = 0  # rows that their stage has set to failed
        self.updates_only = is_updates_only(conn)
        of_joins = set().union(*map(tables_of, pipeline.joins()))
        unread = {table: why for table, why in rows.unread(conn).items() if table in of_joins}
        self.problems = [rows.told(unread)] if unread else []
        self.joins = {name: state for name, state in pipeline.joins().items()
                      if tables_of(name).isdisjoint(unread)}  # fmt: skip
        self.look_at_history(settings, batch)
        self.look_at_rows(unread)

    def look_at_history(self, settings: SimpleNamespace, batch: int) -> None:
        limits = pipeline.full_limits(settings)
        leases = {stage: limit.lease for stage, limit in limits.items()}
        most = {stage: limit.max_attempts for stage, limit in limits.items()}
        judge = Judge(leases, settings.LEASE_MARGIN, most)
        self.limits = limited = Limits(self.conn, self.since, leases)
        for window in windows(self.conn, self.since, self.span.until, batch):
            self.findings.add(judge.look(self.conn, self.since, window))
            self.findings.add(joins.called_early(self.conn, window, self.joins))
            limited.look(self.conn, window, self.findings)

    def look_at_rows(self, unread: Collection[str]) -> None:
        """Find rows that rest now. A row that its stage has set to failed waits for a person, which
        is no broken promise: such rows are only counted.
        """
        resting = listed(self.conn, RESTING, {"since": self.since}, prefix=READ_ONLY)
        self.problems += filter(None, [resting.problem(unread)])
        stalled = [row for row in resting.rows if row.kind == "stalled"]
        self.failed = len(resting.rows) - len(stalled)
        for row in stalled:
            kind = LOST if row.reason.startswith(NEVER_RECORDED) else RESTS
            if kind == LOST and self.updates_only:
                continue
            finding = Finding(kind, row.table_name, row.job_id, row.stage, row.since, row.reason)
            self.findings.add([finding])
        if not self.updates_only:
            self.findings.add(joins.never_recorded(self.conn, self.since, self.joins))

    @property
    def broken(self) -> int:
        return self.findings.counts.total()

    def unknown(self) -> Iterator[str]:
        """Lines about what the history does not tell."""
        if self.span.first is None or self.span.first > self.since:
            first = f"begins {at(self.span.first)}" if self.span.first else "is empty"
            yield f"The history {first}; what was before is not known (HISTORY_DAYS)."
        if self.updates_only:
            yield "Rows without a call are not judged, as inserted ones owe none (--no-insert)."
        yield from self.problems
        yield from self.limits.unknown()
        for name in joins.without_time(self.conn):
            yield f"Whether every {name} was called is not known: its tables have no updated_at."
        if self.joins:
            yield OLD_JOINS
        for line in UNKNOWN:
            yield line.format(blur=BLUR, reaped=2 * REAP_INTERVAL)


@click.command(short_help="Look through the history for promises that were broken.")
@click.option("--since", default="7d", show_default=True, type=Since(), metavar="TIME",
              help="How far back: 24h, 7d or a date.")  # fmt: skip
@JSON
def audit(since: datetime, as_json: bool) -> None:
    """Look through the history for promises that were broken; exit 1 if one was, or where a table
    cannot be read.

    Arrivals without a call, accepted calls that were repeated, two calls of a row at once, calls of
    a state that was left, repeats before their lease was over, joins that were called while a row
    was missing, more calls than a limit or max_attempts allow, rows that rest. What is allowed
    is no finding: a repeat of a call without an answer, `again`, `retry`, `cancel`, a job that was
    sent back. Nothing is changed. What the history cannot tell is said at the end.
    """
    settings = config.settings()
    conn = rows.connected("audit")
    conn.deadline = PATIENCE + BLUR
    try:
        done = Audit(conn, settings, since)
    except psycopg2.errors.QueryCanceled:
        raise Problem("the database took too long to answer; try a later --since") from None
    redact = config.redactor(settings)
    if as_json:
        echo_json(as_dict(done, redact))
    else:
        for line in lines(done):
            click.echo(redact(line).translate(CONTROL))
    if done.problems:
        raise Problem("; ".join(done.problems))
    sys.exit(1 if done.broken else 0)


def as_dict(done: Audit, redact: Callable[[str], str]) -> dict[str, Any]:
    kept = [one for kind in KINDS for one in done.findings.kept.get(kind, [])]
    return {
        "since": done.since,
        "until": done.span.until,
        "attempts": done.span.attempts,
        "seconds": round(time.monotonic() - done.began, 1),
        "broken": {kind: done.findings.counts[kind] for kind in KINDS},
        "findings": [one._replace(text=redact(one.text))._asdict() for one in kept],
        "given_up": done.span.given_up,
        "failed": done.failed,
        "due": done.span.due,
        "due_since": done.span.due_since,
        "not_known": list(done.unknown()),
        "problem": redact("; ".join(done.problems)) or None,
    }


def lines(done: Audit) -> Iterator[str]:
    seconds = duration(time.monotonic() - done.began)
    attempts = "1 attempt" if done.span.attempts == 1 else f"{done.span.attempts} attempts"
    what = f"{attempts} since {done.since:%F %T}, looked through in {seconds}"
    found = "1 finding" if done.broken == 1 else f"{done.broken} findings"
    known = ", as far as could be read" * bool(done.problems)
    yield f"{what}: {found}" if done.broken else f"{what}: no promise was broken{known}"
    yield ""
    for kind in KINDS:
        if kept := done.findings.kept.get(kind):
            yield f"{done.findings.counts[kind]} × {kind}"
            yield from shown(kept[:SHOWN])
            if (more := done.findings.counts[kind] - SHOWN) > 0:
                yield f"… and {more} more (--json has the first {len(kept)})"
            yield f"look at one: {pipeline.typed('job', kept[0].table, kept[0].id)}"
            yield ""
    if done.span.given_up:
        yield f"{done.span.given_up} given up, for a person: {pipeline.JSL} jobs --given-up"
    if done.failed:
        yield f"{done.failed} failed, for a person: {pipeline.JSL} jobs --failed"
    if done.span.due:
        since = at(done.span.due_since)
        yield f"{done.span.due} due, the oldest since {since}: {pipeline.JSL} status"
    yield "What this history cannot tell:"
    yield from (f"- {line}" for line in done.unknown())


def shown(kept: list[Finding]) -> Iterator[str]:
    cells = [[one.id, one.stage, at(one.at), plain(one.text)] for one in kept]
    names = ["job", "stage", "when", "what"]
    if len(pipeline.tables()) > 1:
        cells = [[one.table, *row] for one, row in zip(kept, cells, strict=True)]
        names = ["table", "row", *names[1:]]
    yield from table(names, cells).split("\n")
