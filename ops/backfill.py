"""`backfill`: records calls that rows owe and that the trigger did not record, because the rows
were there before install, or changed while the trigger was off (a restore,
session_replication_role, DISABLE TRIGGER, TRUNCATE).
"""

from collections import Counter
from datetime import datetime
from typing import Any

import click

import db
import joins
import pipeline
from ops import rows
from ops.problem import Problem
from ops.routes import require_installed
from ops.since import Since
from ops.table import counted, table
from pipeline import Route, State, Table

BATCH = 10_000  # rows looked at in one statement, so that none runs long

# --- calls of rows that have moved on -------------------------------------------------------

# Calls under way are left out: their listener checks the row. So are calls of joins: the claim
# checks whether all rows are there. A call that takes the place of an outdated one meanwhile has
# another call_id.
OUTDATED = """
FROM stage_calls AS c
WHERE c.worker IS NULL AND c.table_name = {name} AND c.join_of = '' AND NOT EXISTS (
    SELECT FROM {table} AS r
    WHERE {id} = c.job_id AND r.current_step::text = c.current_step
      AND r.status::text = c.status)
"""

COUNT_OUTDATED = f"SELECT count(*) {OUTDATED}"

DROP_OUTDATED = f"""
WITH outdated AS MATERIALIZED (
    SELECT c.job_id, c.call_id {OUTDATED}
), mine AS (
    SELECT c.job_id, c.call_id FROM stage_calls AS c JOIN outdated USING (job_id, call_id)
    WHERE c.worker IS NULL
    FOR UPDATE OF c SKIP LOCKED
), gone AS (
    DELETE FROM stage_calls AS c USING mine
    WHERE (c.job_id, c.call_id) = (mine.job_id, mine.call_id)
    RETURNING c.*
)
INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker, started_at,
                            finished_at, outcome, error)
SELECT job_id, table_name, call_id, attempts + 1, stage, 'backfill', now(), now(), 'skipped',
       'the job had moved on while the trigger was off'
FROM gone
ON CONFLICT DO NOTHING
"""


def drop_outdated(conn, of: Table, really: bool) -> int:
    """Count the calls whose rows have moved on without the trigger; with `really`, drop them."""
    done = db.execute(conn, (DROP_OUTDATED if really else COUNT_OUTDATED)
                      .format(**rows.names(conn, of)))  # fmt: skip
    return done.rowcount if really else done.fetchone()[0]


# --- calls of rows -------------------------------------------------------------------------

# Why a row that misses a call is left alone.
NO_TIME = "of unknown time"
# For a person: no command lists what was cancelled.
BY_WHOM = "SELECT job_id, stage, worker, error FROM stage_attempts WHERE outcome = 'cancelled'"

# The next batch of rows by id. For each row that should owe a call and has none: what became of its
# last call. Two kinds of attempts do not count: those of a stage that only follows from a join, and
# those skipped because the row was in another state or missing. If the last attempt names a stage
# that PIPELINE no longer has, the stage may have been renamed, so its call counts as made; but not
# if the row is at that stage's step, as the stage has then moved it on. A time in the future is
# treated as unknown.
MISSED = """
WITH batch AS (
    SELECT {id} AS id, r.current_step::text AS current_step, r.status::text AS status,
           {time} AS changed_at, {priority} AS priority, {run_after} AS run_after
    FROM {table} AS r
    WHERE %(after)s IS NULL OR {id} > %(after)s
    ORDER BY {id}
    LIMIT %(batch)s
), owing AS (
    SELECT b.*, p.stage, %(since)s IS NULL
               OR b.changed_at BETWEEN '1970-01-02' AND now() AS has_time  -- see views.sql
    FROM batch AS b
    JOIN pipeline_stages AS p ON p.table_name = {name} AND p.join_of = ''
        AND (p.current_step, p.status) = (b.current_step, b.status)
    WHERE %(since)s IS NULL
       OR (b.changed_at >= '1970-01-02' AND b.changed_at < %(since)s) IS NOT TRUE
), missed AS (
    SELECT o.*, CASE WHEN last.stage = o.stage AND (
                              last.call_id = ANY (last.accepted)  -- any attempt of it
                              OR (last.outcome, last.error)
                                 = ('skipped', 'an earlier attempt was accepted'))
                     THEN 'accepted'
                     -- Also while it was under way: then its result comes after that.
                     WHEN last.stage = o.stage AND last.call_id = ANY (last.cancelled)
                     THEN 'cancelled'
                     WHEN last.stage <> o.current_step
                          AND last.stage NOT IN (SELECT stage FROM pipeline_stages)
                          AND (last.call_id = ANY (last.accepted)
                               OR last.call_id = ANY (last.cancelled))
                     THEN 'under a name that PIPELINE no longer has'
                     WHEN o.has_time IS NOT TRUE THEN %(no_time)s END AS why
    FROM owing AS o
    CROSS JOIN LATERAL (
        SELECT (array_agg(a.stage ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS stage,
               (array_agg(a.outcome ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS outcome,
               (array_agg(a.error ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS error,
               (array_agg(a.call_id ORDER BY a.started_at DESC, a.finished_at DESC))[1] AS call_id,
               array_agg(a.call_id) FILTER (WHERE a.outcome = 'succeeded') AS accepted,
               array_agg(a.call_id) FILTER (WHERE a.outcome = 'cancelled') AS cancelled
        FROM stage_attempts AS a
        WHERE a.job_id = o.id AND a.table_name = {name}
          AND (a.stage = o.stage OR NOT EXISTS (
               SELECT FROM pipeline_stages AS q
               WHERE q.stage = a.stage AND q.table_name = {name} AND q.join_of <> ''))) AS last
    WHERE NOT EXISTS (SELECT FROM stage_calls AS c
                      WHERE c.job_id = o.id AND c.table_name = {name} AND c.join_of = '')
      AND NOT EXISTS (SELECT FROM stage_leases AS l
                      WHERE l.job_id = o.id AND l.table_name = {name}
                        AND (l.stage = o.stage OR NOT EXISTS (
                             SELECT FROM pipeline_stages AS q
                             WHERE q.stage = l.stage AND q.table_name = {name}
                               AND q.join_of <> '')))
)"""

COUNTED = """
SELECT (SELECT id::text FROM batch ORDER BY batch.id DESC LIMIT 1) AS last,
       (SELECT json_agg(json_build_array(current_step, status, stage, why, rows))
        FROM (SELECT current_step, status, stage, why, count(*) AS rows
              FROM missed GROUP BY 1, 2, 3, 4) AS counted) AS found
"""

COUNT = MISSED + COUNTED

RECORD = f"""{MISSED}, recorded AS (
    INSERT INTO stage_calls (job_id, table_name, tenant_id, current_step, status, stage, priority,
                             run_after, due_at)
    SELECT id, {{name}}, left((stage_call_row({{name}}, '', id)).tenant_id #>> '{{{{}}}}', 500),
           current_step, status, stage, priority, run_after, greatest(clock_timestamp(), run_after)
    FROM missed WHERE why IS NULL
    ON CONFLICT DO NOTHING
)
{COUNTED}"""


def statement(conn, sql: str, of: Table) -> str:
    column = rows.time_column(conn, of)
    time = f"r.{column}" if column else "NULL::timestamptz"
    return sql.format(time=time, **rows.names(conn, of))


# --- calls of joins ------------------------------------------------------------------------

# The next batch of parents by id, and those of them whose rows are all in place although
# stage_joins has no call that was recorded since the last row arrived. Without --since, only
# parents of which stage_joins knows that a row arrived. The time of the last arrival is not
# stored: the times of the rows and of the parent are upper bounds of it. The history does not say
# which join a call was of. stage_joins does, so an accepted call of the stage counts for this
# join only where stage_joins has nothing of the parent, as it may be lost, or something of a join
# that PIPELINE no longer has, which may be this one under another name. A parent that is already
# at the stage, or at a later one, was called by somebody else. A stage is not later because a
# retry of it, (stage, 'failed') to the same stage, stands after the join in PIPELINE. Where we have
# called the join before, --since takes it by its time: its last row may have arrived once more.
JOIN_MISSED = """
WITH batch AS (
    SELECT {parent_id} AS id, r.current_step::text AS current_step, {parent_time} AS changed_at
    FROM {parent_table} AS r
    WHERE (%(after)s IS NULL OR {parent_id} > %(after)s)
      AND (%(since)s IS NOT NULL OR {parent_id} IN (
          SELECT parent_id FROM stage_joins WHERE join_of = %(join)s AND is_open))
    ORDER BY {parent_id}
    LIMIT %(batch)s
), complete AS (
    SELECT b.id, b.current_step, greatest(b.changed_at, child.changed_at) AS changed_at
    FROM batch AS b CROSS JOIN LATERAL (
        SELECT bool_and((r.current_step::text = %(step)s AND r.status::text = %(status)s) IS TRUE)
                   AS are_there, max({time}) AS changed_at
        FROM {table} AS r WHERE {parent} = b.id) AS child
    WHERE child.are_there
), missed AS (
    SELECT c.id, CASE
        WHEN m.parent_id IS NULL AND last.outcome IS NOT NULL
             AND (NOT EXISTS (SELECT FROM stage_joins AS o
                              WHERE o.parent_id = c.id AND o.recorded_at IS NOT NULL)
                  OR EXISTS (SELECT FROM stage_joins AS o
                             WHERE o.parent_id = c.id AND o.recorded_at IS NOT NULL
                               AND o.join_of NOT IN (SELECT join_of FROM pipeline_stages)))
        THEN last.outcome
        WHEN (m.recorded_at IS NULL OR %(since)s IS NULL OR c.changed_at IS NULL)
             AND c.current_step IN (
            SELECT s.stage FROM pipeline_stages AS s
            WHERE s.table_name = %(table)s
              AND (s.current_step, s.status) <> (s.stage, 'failed')
              AND s.position >= (
                SELECT min(p.position) FROM pipeline_stages AS p
                WHERE p.join_of = %(join)s)) THEN 'past it'
        WHEN %(since)s IS NOT NULL AND c.changed_at IS NULL
        THEN CASE WHEN m.is_open THEN %(no_time)s ELSE 'not seen' END END AS why
    FROM complete AS c
    LEFT JOIN stage_joins AS m ON m.parent_id = c.id AND m.join_of = %(join)s
    LEFT JOIN LATERAL (
        SELECT a.outcome FROM stage_attempts AS a
        WHERE a.job_id = c.id AND a.table_name = %(table)s AND a.stage = %(stage)s
          AND a.outcome IN ('succeeded', 'cancelled')
        ORDER BY a.finished_at DESC
        LIMIT 1) AS last ON true
    WHERE (m.is_open OR m.recorded_at IS NULL) IS TRUE
      AND (c.changed_at < %(since)s) IS NOT TRUE
      AND NOT EXISTS (SELECT FROM stage_calls AS o
                      WHERE o.job_id = c.id AND o.table_name = %(table)s AND o.join_of = %(join)s)
      AND NOT EXISTS (SELECT FROM stage_leases AS l
                      WHERE l.job_id = c.id AND l.table_name = %(table)s AND l.stage = %(stage)s)
      AND NOT EXISTS (SELECT FROM stage_looks AS k
                      WHERE k.parent_id = c.id AND k.join_of = %(join)s AND k.arrived)
)"""

JOIN_COUNTED = """
SELECT (SELECT id::text FROM batch ORDER BY batch.id DESC LIMIT 1) AS last,
       (SELECT json_agg(json_build_array('every', %(join)s, %(stage)s, why, parents))
        FROM (SELECT why, count(*) AS parents FROM missed GROUP BY why) AS counted) AS found
"""

JOIN_COUNT = JOIN_MISSED + JOIN_COUNTED

# Runs after a statement that takes the lock of joins.py, so that no listener processes stage_looks
# between our reading of stage_joins and the row that we append.
JOIN_RECORD = f"""
SELECT pg_advisory_xact_lock(hashtextextended('job_state_listener.joins',
                                              'stage_looks'::regclass::oid::bigint));
{JOIN_MISSED}, recorded AS (
    INSERT INTO stage_looks (parent_id, join_of, arrived)
    SELECT id, %(join)s, true FROM missed WHERE why IS NULL
)
{JOIN_COUNTED}"""


def join_statement(conn, sql: str, join: State) -> str:
    parent = pipeline.owner(join)
    of_parent, column = rows.names(conn, parent), rows.time_column(conn, join.table)
    parent_column = rows.time_column(conn, parent)
    return sql.format(
        parent_id=of_parent["id"],
        parent_table=of_parent["table"],
        parent_time=in_the_past(parent_column),
        time=in_the_past(column),
        **rows.names(conn, join.table),
    )


def in_the_past(column: str | None) -> str:
    if not column:
        return "NULL::timestamptz"
    return f"CASE WHEN r.{column} BETWEEN '1970-01-02' AND now() THEN r.{column} END"


# --- looking through -----------------------------------------------------------------------


def look_through(conn, sql: str, given: dict[str, Any], found: "Found", of: str) -> None:
    """Run `sql` over all rows of a table, or parents of a join, by batches; add to `found`."""
    after = None
    while True:
        row = db.execute(conn, sql, given | {"after": after, "batch": BATCH}).fetchone()
        for step, status, stage, why, count in row.found or []:
            if why:
                found.kept[why] += count
            else:
                found.missed[Route(of, "", step, status), stage] += count
        if row.last is None:
            return
        after = row.last


class Found:
    """The counts to report: missing calls by route and stage; rows left alone by reason; outdated
    calls; and lines about tables that could not be checked.
    """

    def __init__(self):
        self.missed: Counter[Any] = Counter()
        self.kept: Counter[Any] = Counter()
        self.outdated, self.left_out = 0, []


def look(conn, really: bool, since: datetime | None) -> Found:
    found = Found()
    tables = pipeline.tables()
    timeless = [name for name, of in tables.items() if rows.time_column(conn, of) is None]
    if since and len(timeless) == len(tables):
        where = " or ".join(timeless)
        raise Problem(
            f"--since needs a column updated_at or created_at of type timestamptz in {where}: "
            "leave it out"
        )
    for name, of in tables.items():
        found.outdated += drop_outdated(conn, of, really)
        if since and name in timeless:
            found.left_out.append(f"{name} has no updated_at or created_at of type timestamptz: "
                                  "its rows are left out with --since")  # fmt: skip
            continue
        given = {"since": since, "no_time": NO_TIME}
        look_through(conn, statement(conn, RECORD if really else COUNT, of), given, found, name)
    for name, join in pipeline.joins().items():
        parent = pipeline.parent_name(join.table)
        is_timeless = {parent, join.table.name} <= {*timeless}
        why = f"as neither {parent} nor {join.table.name} has a time"
        if since and is_timeless:
            found.left_out.append(f"every {name}: left out with --since, {why}")
            continue
        look_through_join(conn, name, join, really, {"since": since, "no_time": NO_TIME}, found)
        if since is None:
            if not is_timeless:
                why = f"as its rows stay in place: {pipeline.JSL} backfill --since 1d"
            found.left_out.append(f"every {name}: left out where no row was seen to come, {why}")
    return found


def look_through_join(conn, name: str, join: State, really: bool, given: dict, found: Found):
    given = given | {
        "join": name, "stage": pipeline.pipeline()[join].__name__, "step": join.step,
        "status": join.status, "table": pipeline.parent_name(join.table),
    }  # fmt: skip
    sql = join_statement(conn, JOIN_RECORD if really else JOIN_COUNT, join)
    look_through(conn, sql, given, found, "")
    while really and joins.look(conn):
        pass


# --- the command ---------------------------------------------------------------------------


@click.command(short_help="Record the calls that jobs owe and nobody recorded.")
@click.option("--apply", "really", is_flag=True, help="Record them; without it, only count.")
@click.option("--since", type=Since(), metavar="TIME",
              help="Only jobs changed since then: 2h, 3d or a date.")  # fmt: skip
def backfill(really: bool, since: datetime | None) -> None:
    """Give jobs the call that they owe and that nobody recorded.

    They were in a state that leads to a stage before install, or came to it while the trigger was
    off. So with rows of other tables, and with jobs whose rows are all in the state that a call
    waits for; where none of these was seen to come, only with --since. A call that was accepted
    before is not repeated. Without --apply nothing is changed.
    """
    conn = rows.connected("backfill")
    require_installed(conn)
    found = look(conn, really, since)
    if found.missed:
        cells = [[state_of(route), stage, n] for (route, stage), n in found.missed.items()]
        click.echo(table(["state", "stage", "jobs"], sorted(cells)))
    if found.outdated:
        what = f"{counted(found.outdated, 'recorded call')} of jobs that have moved on"
        click.echo(f"{what}{' → dropped' * really}")
    say_kept(found.kept)
    for said in found.left_out:
        click.echo(said)
    count = sum(found.missed.values())
    if really:
        db.execute(conn, db.WAKE)
        click.echo(f"{counted(count, 'call')} recorded")
    elif count or found.outdated:
        given = f" --since {since.isoformat(timespec='seconds')}" if since else ""
        apply = f"{pipeline.JSL} backfill{given} --apply"
        click.echo(f"{counted(count, 'call')} missing; to record: {apply}")
    else:
        click.echo("no call is missing")


def state_of(route: Route) -> str:
    if not route.table:
        return f"every {route.status}"
    state = f"{route.step}, {route.status}"
    return state if route.table == pipeline.JOBS.name else f"{route.table}: {state}"


def say_kept(kept: Counter) -> None:
    unknown, cancelled = kept.pop(NO_TIME, 0), kept.pop("cancelled", 0)
    again = ("to call it all the same, where the stage is not at work: "
             f"{pipeline.JSL} again --stage STAGE ID")  # fmt: skip
    if past := kept.pop("past it", 0):
        click.echo(f"left alone, as they are at the stage or past it: {past}; {again}")
    unseen = kept.pop("not seen", 0)
    if kept:
        what = ", ".join(f"{n} {why}" for why, n in sorted(kept.items()))
        stay = f"{pipeline.JSL} jobs --stalled, once the timeout of their stage is over"
        click.echo(f"left alone, as their call was made before: {what}; those that stay: {stay}")
    if cancelled:
        click.echo(f"left alone, as their call was cancelled: {cancelled}; by whom: {BY_WHOM}")
    if unknown:
        click.echo(
            f"left out: {unknown} whose time is not known, as it is empty, in the future or "
            "before 1970; backfill without --since takes them"
        )
    if unseen:
        click.echo(
            f"left out: {unseen} with all rows of a join, none of which was seen to come, and whose"
            f" time is not known, as it is empty, in the future or before 1970; {again}"
        )
