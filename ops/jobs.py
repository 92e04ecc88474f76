"""`jobs`: how many rows are in which state, or which ones they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import click

import config
import db
import pipeline
from ops import resting, rows, waits
from ops.chosen import require_stage
from ops.job import LONGEST_TOLD, one_line, plainly, situation
from ops.problem import Problem
from ops.rows import TableName
from ops.since import Since
from ops.stage import OwedStage
from ops.table import JSON, Line, clipped, duration, echo_json, echo_lines, plain, readable, table
from ops.text import Text
from pipeline import JOBS, Table

# --- how many ------------------------------------------------------------------------------

# The states in the order of the pipeline; of one stage, (stage, 'done') comes last.
STATES = """
SELECT {name}::text AS table_name, j.current_step, j.status, j.jobs, p.stage,
       coalesce(c.owed, 0) AS owed, coalesce(c.given_up, 0) AS given_up
FROM (SELECT r.current_step::text, r.status::text, count(*) AS jobs
      FROM {table} AS r GROUP BY 1, 2) AS j
LEFT JOIN (SELECT current_step, status, stage FROM pipeline_stages
           WHERE table_name = {name} AND join_of = '') AS p USING (current_step, status)
LEFT JOIN (SELECT current_step, status, count(*) AS owed,
                  count(*) FILTER (WHERE due_at = 'infinity') AS given_up
           FROM stage_calls WHERE table_name = {name} AND join_of = ''
           GROUP BY 1, 2) AS c USING (current_step, status)
LEFT JOIN (SELECT stage AS current_step, min(position) AS position FROM pipeline_stages
           WHERE table_name = {name} GROUP BY 1) AS at USING (current_step)
LEFT JOIN (SELECT current_step, min(position) - 1 AS position FROM pipeline_stages
           WHERE table_name = {name} AND join_of = '' GROUP BY 1) AS before USING (current_step)
ORDER BY coalesce(at.position, before.position), j.current_step, p.stage IS NOT NULL,
         j.status = 'done', j.status
LIMIT %(limit)s + 1
"""

# Of the parents that have rows: how many have all of them in the join's state, and how many wait
# for some. A parent whose call was recorded no longer waits, although its rows may have moved on.
JOINED = """
SELECT %(join)s AS join, %(stage)s AS stage,
       count(*) FILTER (WHERE r.is_complete) AS complete,
       count(*) FILTER (WHERE NOT r.is_complete AND (m.is_open OR m.recorded_at IS NULL) IS TRUE)
           AS waiting,
       (SELECT count(*) FROM stage_calls AS c WHERE c.join_of = %(join)s) AS owed,
       (SELECT count(*) FROM stage_calls AS c
        WHERE c.join_of = %(join)s AND c.due_at = 'infinity') AS given_up
FROM (SELECT {parent} AS parent_id,
             bool_and((r.current_step::text = %(step)s AND r.status::text = %(status)s) IS TRUE)
                 AS is_complete
      FROM {table} AS r WHERE {parent} IS NOT NULL GROUP BY 1) AS r
LEFT JOIN stage_joins AS m ON m.parent_id = r.parent_id AND m.join_of = %(join)s
"""


def states_of(conn, only: Table, limit: int) -> list:
    """The states that rows of a table are in; one more than `limit`, if there are more."""
    sql = STATES.format(**rows.names(conn, only))
    return db.execute(conn, sql, {"limit": limit}).fetchall()


def joins_of(conn, only: Table) -> list:
    """How many parents each join has that waits for rows of a table."""
    found = []
    for name, state in pipeline.joins().items():
        if state.table.name == only.name:
            stage = pipeline.pipeline()[state].__name__
            given = {"join": name, "stage": stage, "step": state.step, "status": state.status}
            sql = JOINED.format(**rows.names(conn, only))
            found.append(db.execute(conn, sql, given).fetchone())
    return found


# --- which rows ----------------------------------------------------------------------------

# When a row last changed: the time column of its table; where there is none, or its time is in the
# future or before 1970 (see views.sql), the last time that the listener has recorded for the row.
RECORDED = """greatest(c.created_at, (
    SELECT max(a.finished_at) FROM stage_attempts AS a
    WHERE a.job_id = {id} AND a.table_name = {name}))"""
CHANGED_BY_COLUMN = """
CASE WHEN r.{column} BETWEEN '1970-01-02' AND now() THEN r.{column} ELSE {recorded} END"""
RECORDED_SINCE = """{id} IN (
    SELECT job_id FROM stage_attempts WHERE finished_at >= %(since)s AND table_name = {name}
    UNION ALL
    SELECT job_id FROM stage_calls WHERE created_at >= %(since)s AND table_name = {name})"""

MATCHING = """
WHERE (%(since)s::timestamptz IS NULL OR {changed})
  AND (%(tenant)s::text IS NULL OR {tenant} = %(tenant)s)
  AND (%(stage)s::text IS NULL OR c.stage = %(stage)s
       OR (c.stage IS NULL AND l.stage = %(stage)s)
       OR ((c.stage IS NULL OR c.join_of <> '')
           AND r.current_step::text = %(stage)s AND r.status::text <> 'done'))
"""

OF_ALL_TABLES = """
SELECT * FROM ({of_each}) AS listed
ORDER BY since DESC NULLS LAST, job_id, join_of
LIMIT %(limit)s + 1
"""

# stage_calls has the tenant of a row that has one of its own, but not that of the row's parent.
GIVEN_UP = """
SELECT g.table_name, g.job_id::text, at.tenant_id, g.current_step, g.status, g.join_of, g.stage,
       coalesce(g.given_up_at, g.owed_since) AS since, g.call_id, g.attempts, g.last_error
FROM given_up_calls AS g
CROSS JOIN LATERAL (
    SELECT coalesce(g.tenant_id, (stage_call_row(
        CASE WHEN g.table_name = ANY (%(unread)s::text[]) THEN '' ELSE g.table_name END,
        '', g.job_id)).tenant_id #>> '{}')
        AS tenant_id) AS at
WHERE (%(since)s::timestamptz IS NULL OR coalesce(g.given_up_at, g.owed_since) >= %(since)s)
  AND (%(tenant)s::text IS NULL OR left(at.tenant_id, 500) = left(%(tenant)s, 500))
  AND (%(stage)s::text IS NULL OR g.stage = %(stage)s)
  AND (%(table)s::text IS NULL OR g.table_name = %(table)s)
ORDER BY since DESC, job_id
LIMIT %(limit)s + 1
"""

RESTING = """
SELECT table_name, job_id, tenant_id, current_step, status, stage, since, reason
FROM resting_rows()
WHERE kind = %(kind)s
  AND (%(since)s::timestamptz IS NULL OR since >= %(since)s)
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
  AND (%(stage)s::text IS NULL OR stage = %(stage)s)
  AND (%(table)s::text IS NULL OR table_name = %(table)s)
ORDER BY since NULLS FIRST, job_id
LIMIT %(limit)s + 1
"""


@dataclass(frozen=True)
class Listing:
    """A list of rows.

    Args:
        sql: its query.
        times: what the column `since` and the option --since compare.
        heading: of the last column, whose cells are tells(row).
    """

    sql: str
    times: str
    heading: str
    kind: str | None = None  # of resting_rows()

    def tells(self, row: Any) -> str:
        if self.sql == RESTING:
            return readable(row.reason) or ""
        if self.sql == GIVEN_UP:
            return f"{row.stage}: {readable(row.last_error)}"
        return f"{row.stage}: {situation(row)}" if row.stage else "-"


def resting_rows(conn, given: dict[str, Any]) -> tuple[list, str | None]:
    """The rows of RESTING, and what of them is not known."""
    found = resting.listed(conn, RESTING, given, given["table"])
    if len(found.by_part) < 2:
        return found.rows, found.problem()
    oldest = sorted(found.rows, key=lambda row: (row.since or EARLIEST, row.job_id))
    return oldest[: given["limit"] + 1], found.problem()


EARLIEST = datetime.min.replace(tzinfo=timezone.utc)
STALLED = Listing(RESTING, "when anything last happened to the job", "stalled", "stalled")
FAILED = Listing(RESTING, "when anything last happened to the job", "failed", "failed")


def any_row(conn, settings, tables: list[Table], since: datetime | None) -> Listing:
    """All rows of some tables.

    Raises:
        Problem: neither the tables nor the history tell which rows have changed since then.
    """
    of_each, times = [], []
    for one in tables:
        names, column = rows.names(conn, one), rows.time_column(conn, one)
        recorded = RECORDED.format(**names)
        if column is None:
            require_history(one, settings, since)
            time, changed = recorded, RECORDED_SINCE.format(**names)
            times.append(f"when a call was last recorded or tried ({one.name} has no updated_at)")
        else:
            time = CHANGED_BY_COLUMN.format(column=column, recorded=recorded)
            changed = f"{time} >= %(since)s"
            times.append(f"{one.name}.{column}")
        sql = rows.LISTED + MATCHING
        of_each.append(sql.format(time=time, changed=changed, **names))
    return Listing(
        OF_ALL_TABLES.format(of_each=" UNION ALL ".join(of_each)), ", ".join(times), "owes"
    )


def require_history(of: Table, settings, since: datetime | None) -> None:
    kept = datetime.now().astimezone() - timedelta(days=settings.HISTORY_DAYS)
    if since and since < kept:
        raise Problem(
            f"{of.name} has neither updated_at nor created_at of type timestamptz, and the "
            f"history that is asked instead begins {settings.HISTORY_DAYS:g} days ago "
            "(HISTORY_DAYS): give a later --since"
        )


# --- the command ---------------------------------------------------------------------------


@click.command(short_help="How many jobs are in which state, or which jobs they are.")
@click.option(
    "--stage",
    type=OwedStage(),
    metavar="STAGE",
    help="Jobs that owe this stage a call, or are in it and not done.",
)
@click.option("--given-up", is_flag=True, help="Jobs whose call was given up.")
@click.option("--stalled", is_flag=True, help="Jobs that no call and no stage moves on.")
@click.option("--failed", is_flag=True, help="Jobs that their stage has set to failed.")
@click.option("--table", "only", type=TableName(), metavar="TABLE", help="Rows of this table.")
@click.option(
    "--tenant",
    type=Text(),
    metavar="TENANT",
    help="Jobs of this tenant; other rows by their parent's.",
)
@click.option(
    "--since",
    type=Since(),
    metavar="SPAN|TIME",
    help="Jobs that changed since: 30m, 2h, 3d, 2026-11-24, '2026-11-24 05:12'.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="At most so many lines.",
)
@JSON
def jobs(stage, given_up, stalled, failed, only, tenant, since, limit, as_json) -> None:
    """How many jobs are in which state and what they owe; with an option, which jobs they are.

    So are the rows of the other tables of the pipeline. Options narrow the list down together.
    Newest first, stalled and failed jobs oldest first. The last line says what --since and the
    column since compare: updated_at where a table has such a column (of type timestamptz), else
    created_at, else the listener's own record. Exit 1 where a table cannot be read.
    """
    if given_up + stalled + failed > 1:
        raise click.UsageError(
            "Give one of --given-up, --stalled and --failed.", click.get_current_context()
        )
    settings = config.settings()
    conn = rows.connected("jobs")
    if stage:
        require_stage(conn, stage)
    given = {"stage": stage, "tenant": tenant, "since": since, "limit": limit, "table": only}
    if stalled or failed:
        kind = STALLED if stalled else FAILED
        found, problem = resting_rows(conn, given | {"kind": kind.kind})
        show_rows(conn, kind, found, limit, as_json, problem)
        return
    unread = {name: why for name, why in rows.unread(conn).items() if only in (None, name)}
    tables = [one for one in pipeline.tables().values()
              if only in (None, one.name) and one.name not in unread]  # fmt: skip
    problem = rows.told(unread) or None
    if problem and not (tables or given_up):
        raise Problem(problem)
    if not (stage or given_up or tenant is not None or since):
        show_states(conn, tables, limit, as_json, problem)
        return
    kind = (
        Listing(GIVEN_UP, "when the call was given up", "given up") if given_up
        else any_row(conn, settings, tables, since)
    )  # fmt: skip
    found = db.execute(conn, kind.sql, given | {"unread": [*unread]}).fetchall()
    show_rows(conn, kind, found, limit, as_json, problem)


def show_rows(
    conn, kind: Listing, found: list, limit: int, as_json: bool, problem: str | None
) -> None:
    """Raises Problem at the end, where there is a `problem`."""
    more = len(found) > limit
    if as_json:
        listed = [plainly(row) for row in found[:limit]]
        echo_json({"jobs": listed, "since": kind.times, "more": more, "problem": problem})
    else:
        echo_lines(job_lines(kind, found[:limit], problem))
        for hold in waits.held_of(conn, {row.stage for row in found if row.stage}):
            click.echo(one_line(f"{hold.why}; {hold.mend}"))
        if more:
            say_more(limit)
    if problem:
        raise Problem(problem)


def say_more(limit: int) -> None:
    click.echo(f"more than {limit}: --limit {min(10 * limit, 10_000)}, or narrow it down")


def show_states(conn, tables: list[Table], limit: int, as_json: bool, problem: str | None) -> None:
    """Raises Problem at the end, where there is a `problem`."""
    states = {one.name: states_of(conn, one, limit) for one in tables}
    joins = {one.name: joins_of(conn, one) for one in tables}
    more = any(len(found) > limit for found in states.values())
    if as_json:
        echo_json({
            "states": [row._asdict() for found in states.values() for row in found[:limit]],
            "joins": [row._asdict() for found in joins.values() for row in found],
            "more": more,
            "problem": problem,
        })  # fmt: skip
    else:
        for name, found in states.items():
            echo_lines(state_lines(name, found[:limit]))
            if joins[name]:
                echo_lines(joined_lines(joins[name]))
        if more:
            say_more(limit)
    if problem:
        raise Problem(problem)


def state_lines(name: str, found: list) -> Iterator[Line]:
    cells = [
        [row.current_step or "-", row.status or "-", row.jobs, row.stage or "-", row.owed,
         row.given_up]
        for row in found
    ]  # fmt: skip
    if name != JOBS.name:
        yield "", 0
    header = ["step", "status", name, "leads to", "owed", "given up"]
    yield from ((line, 0) for line in table(header, cells).split("\n"))
    if not found:
        yield f"there are no {'jobs' if name == JOBS.name else f'rows in {name}'}", 0


def joined_lines(found: list) -> Iterator[Line]:
    """Lines for each join: how many parents are complete, and how many wait for rows."""
    cells = [[f"every {row.join}", row.complete, row.waiting, row.stage, row.owed, row.given_up]
             for row in found]  # fmt: skip
    yield "", 0
    header = ["join", "complete", "waiting", "leads to", "owed", "given up"]
    yield from ((line, 0) for line in table(header, cells).split("\n"))


def job_lines(kind: Listing, found: list, problem: str | None) -> Iterator[Line]:
    with_table = rows.names_tables(found)
    now = datetime.now().astimezone()
    if not found:
        yield "no job matches" + ", as far as could be read" * bool(problem), 0
        return
    cells = [
        [
            row.job_id,
            f"{row.current_step}, {row.status}",
            duration(row.since and round(max(0.0, (now - row.since).total_seconds()))),
            clipped(plain(kind.tells(row)), LONGEST_TOLD),
            row.tenant_id or "-",
            *([row.table_name] if with_table else []),
        ]
        for row in found
    ]
    header = ["job", "state", "since", kind.heading, "tenant", *(["table"] if with_table else [])]
    yield from ((line, 0) for line in table(header, cells, right=["since"]).split("\n"))
    yield f"since: {kind.times}", 0
