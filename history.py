"""The history: how finished attempts are counted and pruned, both by upkeep, a batch at a time."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
import psycopg2.extensions

import pipeline
from db import ConnectionLost, execute, reasons

log = logging.getLogger("listener")

BATCH = 1000  # rows that one statement handles


def log_failure(of: Callable, reason: str) -> None:
    log.error("정리 작업 실패 (다음 차례에 다시 시도): %s: %s", of.__name__, reason)


# Upper bounds (seconds) of the histogram of accepted calls in `metrics`; the last bucket has none.
BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
BOUNDS = {
    "within": [*BUCKETS, math.inf],
    "bounds": [f"{seconds} s" for seconds in BUCKETS],
}

# Counts the attempts in {rows} by stage, outcome and the smallest bucket that holds them. A
# negative duration (the clock was set back) counts as 0, as a counter must not fall.
TOTALS = """
SELECT stage, outcome, (%(within)s::float8[])[1 + width_bucket(
           finished_at - started_at - interval '1 microsecond', %(bounds)s::interval[]
       )] AS within_seconds,
       count(*) AS attempts,
       (1000000 * extract(epoch FROM sum(greatest(finished_at - started_at, '0')))
       )::bigint AS microseconds
FROM {rows}
GROUP BY stage, outcome, within_seconds
"""

# Adds the attempts in {rows} to stage_totals.
ADD_TOTALS = f"""
INSERT INTO stage_totals AS t (stage, outcome, within_seconds, attempts, microseconds)
{TOTALS}
ON CONFLICT (stage, outcome, within_seconds) DO UPDATE
SET attempts = t.attempts + excluded.attempts,
    microseconds = t.microseconds + excluded.microseconds
"""

# Attempts are counted once, in the order in which they finished. Those of the last 5 minutes, on
# which moves.LOOK relies, are left for later: an attempt that finished earlier may not be committed
# yet.
COUNT = f"""
WITH mark AS (
    SELECT counted_until FROM stage_totals_mark FOR UPDATE SKIP LOCKED
), batch AS (
    SELECT stage, outcome, started_at, finished_at FROM stage_attempts
    WHERE finished_at > (SELECT counted_until FROM mark)
      AND finished_at < now() - interval '5 minutes'
    ORDER BY finished_at
    FETCH FIRST %(batch)s ROWS WITH TIES
), added AS (
    {ADD_TOTALS.format(rows="batch")}
), moved AS (
    UPDATE stage_totals_mark SET counted_until = (SELECT max(finished_at) FROM batch)
    WHERE EXISTS (SELECT FROM batch)
)
SELECT count(*) FROM batch
"""


def count(conn, batch: int = BATCH) -> int:
    """Add a batch of attempts to stage_totals, oldest first; how many."""
    return execute(conn, COUNT, {"batch": batch} | BOUNDS).fetchone()[0]


# One listener at a time, in small batches, so that no other waits. Attempts that are not counted
# yet are not deleted, nor those that alone tell why a row that still rests in its state owes
# nothing: without them `backfill` would have an accepted or cancelled call made again, also one of
# the name that its stage had before. So with the cancelled call of a join, as long as its parent
# exists: it would be taken for one that was accepted. Nor those of a row that is `running`: where
# it has no updated_at, they alone say since when, and without them it would no longer be found
# stalled.
# Whether rows of a table that cannot be read rest is not known, so all that tells of them is kept.
PRUNE = """
WITH batch AS (
    SELECT ctid AS place, job_id, table_name, stage, outcome, finished_at FROM stage_attempts
    WHERE finished_at > coalesce(%(pruned_until)s::timestamptz, '-infinity')
      AND finished_at < now() - make_interval(secs => 86400 * %(days)s)
      AND finished_at <= (SELECT counted_until FROM stage_totals_mark)
      AND (SELECT pg_try_advisory_xact_lock(hashtext('job_state_listener.prune')))
    ORDER BY finished_at
    FETCH FIRST %(batch)s ROWS WITH TIES
), pruned AS (
    DELETE FROM stage_attempts WHERE ctid = ANY (ARRAY(
        SELECT b.place FROM batch AS b
        WHERE NOT CASE b.table_name {rests}
                  ELSE b.table_name = ANY (%(unreadable)s) END))
    RETURNING stage
)
SELECT (SELECT count(*) FROM pruned) AS pruned, count(*) AS attempts, max(finished_at) AS until
FROM batch
"""
# The tables are named here, and OFFSET 0 is used, for the reasons given at troubles.NEWLY_FAILED.
RESTS = """
WHEN {name} THEN EXISTS (
    SELECT FROM {table} AS r
    JOIN pipeline_stages AS p ON p.table_name = {name}
        AND ((p.stage, 'running') = (r.current_step::text, r.status::text)
             OR (b.outcome IN ('succeeded', 'skipped', 'cancelled') AND p.join_of = ''
                 AND (p.current_step, p.status) = (r.current_step::text, r.status::text)
                 OR b.outcome = 'cancelled' AND p.join_of <> '')
                AND (p.stage = b.stage OR b.stage NOT IN (SELECT stage FROM pipeline_stages)))
    WHERE r.{id} = b.job_id{collate}
    OFFSET 0)"""
CAN_BE_READ = "SELECT CASE b.table_name {rests} END FROM stage_attempts AS b LIMIT 0"


def prune(conn, days: float, after: Any = None, batch: int = BATCH):
    """Look at a batch of the attempts that finished more than `days` ago, and delete them except
    for those that are still needed.

    Args:
        after: `until` of the last batch: what was kept is not looked at again.

    Returns:
        A row: how many `attempts` it looked at, how many were `pruned`, and `until` when they had
        finished; None where there was none.
    """
    tables = list(pipeline.tables().values())
    given = {"days": days, "pruned_until": after, "batch": batch, "unreadable": []}
    try:
        return execute(conn, PRUNE.format(rests=by_table(conn, RESTS, tables)), given).fetchone()
    except ConnectionLost:
        raise
    except psycopg2.Error:
        refused = {table.name: why_unreadable(conn, table) for table in tables}
        failed = {name: error for name, error in refused.items() if error}
        if len(failed) in (0, len(tables)):
            raise
    given["unreadable"] = list(failed)
    readable = [table for table in tables if table.name not in failed]
    done = execute(conn, PRUNE.format(rests=by_table(conn, RESTS, readable)), given).fetchone()
    if done.attempts < batch:  # the last one of this round
        log_failure(prune, reasons(failed))
    return done


def why_unreadable(conn, table: pipeline.Table) -> psycopg2.Error | None:
    try:
        execute(conn, CAN_BE_READ.format(rests=by_table(conn, RESTS, [table])), {})
    except ConnectionLost:
        raise
    except psycopg2.Error as error:
        return error
    return None


# An id of a text type is compared by the collation of its own column, or no index on that serves.
COLLATIONS = """
SELECT wanted.name, format(' COLLATE %%I.%%I', n.nspname, c.collname) AS collate
FROM unnest(%(names)s::text[], %(ids)s::text[]) AS wanted (name, id)
JOIN pg_attribute AS a
    ON (a.attrelid, a.attname) = (to_regclass(quote_ident(wanted.name)), wanted.id)
JOIN pg_collation AS c ON c.oid = a.attcollation
JOIN pg_namespace AS n ON n.oid = c.collnamespace
"""


def by_table(conn, template: str, tables: Iterable[pipeline.Table]) -> str:
    """`template` with the names of each table, for a statement with parameters."""
    tables = list(tables)
    given = {"names": [table.name for table in tables], "ids": [table.id for table in tables]}
    collated = {row.name: row.collate for row in execute(conn, COLLATIONS, given)}
    return "".join(
        template.format(
            name=psycopg2.extensions.QuotedString(table.name).getquoted().decode(),
            table=pipeline.name_in_sql(table.name),
            id=pipeline.name_in_sql(table.id),
            collate=collated.get(table.name, ""),
        )
        for table in tables
    ).replace("%", "%%")
