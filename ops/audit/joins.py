"""Calls of joins: made though a row was missing, or never recorded."""

from collections.abc import Iterator, Mapping
from datetime import datetime

import pipeline
from ops import backfill, rows
from ops.audit.findings import BLUR, BY_INDEX, READ_ONLY, Finding, Window, ask
from ops.rules import LOST

JOINED = "join called while a row was missing"

# A call is owed only while its row is in the state that owes it. So if a call of a row was claimed
# before the call of the join, and was claimed again after it (or is still owed), the row was not in
# the join's state in between. Calls that the join's own state owes are left out.
CALLED = (
    BY_INDEX
    + """
SELECT j.job_id::text AS id, j.stage, j.call_id, j.attempt, j.worker, j.started_at,
       child.id::text AS child, c.stage AS child_stage, c.call_id AS child_call
FROM stage_attempts AS j
CROSS JOIN LATERAL (
    SELECT {id} AS id FROM {table} AS r WHERE {parent} = j.job_id OFFSET 0) AS child
CROSS JOIN LATERAL (
    SELECT a.call_id, a.stage, min(a.started_at) AS first, max(a.started_at) AS last
    FROM stage_attempts AS a
    WHERE a.job_id = child.id AND a.table_name = {name} AND a.stage = ANY (%(child_stages)s)
      AND a.outcome NOT IN ('skipped', 'cancelled')
    GROUP BY a.call_id, a.stage
    OFFSET 0) AS c
WHERE j.finished_at > %(after)s AND j.finished_at <= %(upto)s
  AND j.table_name = %(table)s AND j.stage = %(stage)s AND j.outcome NOT IN ('skipped', 'cancelled')
  AND (j.outcome <> 'failed' OR j.http_status IS NOT NULL)
  AND c.first < j.started_at - make_interval(secs => %(blur)s)
  AND (c.last > j.started_at + make_interval(secs => %(blur)s)
       OR EXISTS (SELECT FROM stage_calls AS o
                  WHERE o.job_id = child.id AND o.table_name = {name} AND o.call_id = c.call_id))
"""
)


def called_early(conn, window: Window, joins: Mapping[str, pipeline.State]) -> Iterator[Finding]:
    """The calls of joins that were made while a row was missing, as a call of that row shows."""
    for state in joins.values():
        parent, stage = pipeline.owner(state).name, pipeline.pipeline()[state].__name__
        if stage in own_stages(parent):
            continue  # an attempt of this stage may be of the join or of the parent's own state
        here = (state.step, state.status)
        others = own_stages(state.table.name) - own_stages(state.table.name, here)
        given = {"table": parent, "stage": stage, "child_stages": list(others), "blur": BLUR}
        sql = CALLED.format(**rows.names(conn, state.table))
        for row in ask(conn, sql, given | window._asdict()):
            text = (
                f"attempt {row.attempt} of call {row.call_id} by {row.worker}: "
                f"{state.table.name} {row.child} still owed call {row.child_call} to "
                f"{row.child_stage}"
            )
            yield Finding(JOINED, parent, row.id, stage, row.started_at, text)


def own_stages(table: str, state: tuple[str, str] | None = None) -> set[str]:
    """The stages that follow from a state of a row of `table` itself: from any, or from `state`."""
    return {
        function.__name__
        for route, function in pipeline.routes().items()
        if route.table == table and not route.join and state in (None, route[2:])
    }


# --- never recorded ------------------------------------------------------------------------

# Parents in stage_looks are left out: a listener will still record their calls. So are those in
# stage_joins: audit has them from resting_rows().
NEVER_RECORDED = f"""{backfill.JOIN_MISSED}, found AS (
    SELECT c.id, c.changed_at FROM missed AS m JOIN complete AS c ON c.id = m.id
    WHERE m.why IS NULL AND NOT EXISTS (
        SELECT FROM stage_looks AS k WHERE k.parent_id = m.id AND k.join_of = %(join)s
        UNION ALL
        SELECT FROM stage_joins AS j WHERE j.parent_id = m.id AND j.join_of = %(join)s)
)
SELECT (SELECT id::text FROM batch ORDER BY batch.id DESC LIMIT 1) AS last,
       ARRAY(SELECT id::text FROM found ORDER BY found.id) AS ids,
       ARRAY(SELECT changed_at FROM found ORDER BY id) AS times
"""


def never_recorded(conn, since: datetime, joins: Mapping[str, pipeline.State]) -> Iterator[Finding]:
    """The parents whose last row arrived since then, and of which nothing was recorded."""
    for name, state in joins.items():
        parent, stage = pipeline.owner(state).name, pipeline.pipeline()[state].__name__
        given = {"join": name, "stage": stage, "step": state.step, "status": state.status,
                 "table": parent, "since": since, "no_time": backfill.NO_TIME}  # fmt: skip
        sql = READ_ONLY + backfill.join_statement(conn, NEVER_RECORDED, state)
        after = None
        while True:
            [batch] = ask(conn, sql, given | {"after": after, "batch": backfill.BATCH})
            for id_, when in zip(batch.ids, batch.times, strict=True):
                text = f"every {name}: all rows are there, and no call was recorded"
                yield Finding(LOST, parent, id_, stage, when, text)
            if batch.last is None:
                break
            after = batch.last


def without_time(conn) -> Iterator[str]:
    """The joins that never_recorded() cannot judge, as neither table has a time column."""
    for name, state in pipeline.joins().items():
        tables = [state.table, pipeline.owner(state)]
        if all(rows.time_column(conn, table) is None for table in tables):
            yield name
