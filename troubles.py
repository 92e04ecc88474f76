"""What people are told of: rows that are stalled or failed, calls that wait, and stages that accept
none. Upkeep looks for each from time to time.
"""

import logging
from collections.abc import Iterable
from typing import Any

import pipeline
from alerts import Alerts
from db import UNPINNED, execute
from history import BATCH, by_table
from ops import listeners
from ops.alarms import why_late
from ops.resting import PART
from ops.table import counted, duration

log = logging.getLogger("listener")

EPISODES_INTERVAL = 60.0  # seconds between two looks at the stages


# --- rows that rest ------------------------------------------------------------------------

# The first listener that sees a stalled row marks its stage, until no row of it is stalled. Where
# only a part is asked for, a stage that has routes outside of it may have stalled rows there.
NEWLY_STALLED = f"""
{PART}
WITH stalled AS (
    SELECT stage, count(*) AS jobs,
           CASE WHEN count(DISTINCT reason) > 1 THEN 'several reasons, the last: ' ELSE '' END
               || (array_agg(reason ORDER BY since DESC NULLS LAST))[1] AS reason
    FROM stalled_jobs() GROUP BY stage
), marked AS (
    UPDATE pipeline_stages AS p
    SET stalled_since = CASE WHEN q.jobs IS NOT NULL THEN now() END
    FROM (SELECT e.table_name, e.join_of, e.current_step, e.status, s.jobs, s.reason
          FROM pipeline_stages AS e LEFT JOIN stalled AS s USING (stage)) AS q
    WHERE (p.table_name, p.join_of, p.current_step, p.status)
          = (q.table_name, q.join_of, q.current_step, q.status)
      AND (p.stalled_since IS NULL) = (q.jobs IS NOT NULL)
      AND (q.jobs IS NOT NULL OR %(part)s::text IS NULL OR NOT EXISTS (
          SELECT FROM pipeline_stages AS o
          WHERE o.stage = p.stage AND (o.table_name, o.join_of) <> (%(part)s::text, '')))
    RETURNING p.stage, q.jobs, q.reason
)
SELECT DISTINCT stage, jobs, reason FROM marked
"""


# Rows that their stage has set to failed after it had answered, or without an answer: those called
# in the last hour, as this must not take long. `status` and resting_rows() show older ones. The row
# in the history is made once, whichever listener looks first. The tables are named here, as
# stage_call_row() would take several times as long; OFFSET 0 keeps the planner from reading one of
# them as a whole.
NEWLY_FAILED = """
WITH batch AS (
    SELECT * FROM stage_attempts
    WHERE finished_at > coalesce(%(after)s, now() - interval '1 hour')
    ORDER BY finished_at
    FETCH FIRST %(batch)s ROWS WITH TIES
), candidate AS (
    SELECT a.* FROM batch AS a
    WHERE a.outcome NOT IN ('failed', 'skipped', 'cancelled') AND CASE a.table_name {rows} END
    OFFSET 0
), failed AS (
    SELECT a.* FROM candidate AS a
    WHERE NOT EXISTS (SELECT FROM stage_attempts AS later
                      WHERE (later.job_id, later.table_name, later.stage)
                            = (a.job_id, a.table_name, a.stage)
                        AND later.outcome NOT IN ('skipped', 'cancelled')
                        AND (later.finished_at, later.call_id, later.attempt)
                            > (a.finished_at, a.call_id, a.attempt))
      AND NOT EXISTS (SELECT FROM stage_calls AS c
                      WHERE c.job_id = a.job_id AND c.table_name = a.table_name
                        AND (c.join_of = '' OR c.stage = a.stage))
      AND NOT EXISTS (SELECT FROM stage_leases AS l
                      WHERE l.job_id = a.job_id AND l.table_name = a.table_name
                        AND l.leased_until > now())
      AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                      WHERE (p.table_name, p.join_of, p.current_step, p.status)
                            = (a.table_name, '', a.stage, 'failed'))
), recorded AS (
    INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, spent, stage, worker,
                                started_at, finished_at, outcome, error)
    SELECT job_id, table_name, call_id, attempt, spent, stage, worker, started_at, now(), 'failed',
           left('set failed by its stage' || coalesce(': ' || error, ''), 2000)
    FROM failed
    ON CONFLICT DO NOTHING
    RETURNING job_id::text, table_name, stage, error
)
SELECT recorded.*, seen.*
FROM (SELECT count(*) AS attempts, max(finished_at) AS until FROM batch) AS seen
LEFT JOIN recorded ON true
"""
IS_FAILED = """
WHEN {name} THEN EXISTS (
    SELECT FROM {table} AS r
    WHERE r.{id} = a.job_id{collate}
      AND (r.current_step::text, r.status::text) = (a.stage, 'failed')
    OFFSET 0)"""


def newly_failed(
    conn, after: Any = None, batch: int = BATCH, tables: Iterable[str] | None = None
) -> tuple[list, Any]:
    """The rows that their stage has set to failed, and about which no alert was sent. Checks one
    batch of the attempts of the last hour.

    Args:
        after: what the last batch returned.
        tables: whose rows; None: those of all.

    Returns:
        The rows, and the time after which the next batch begins; None: an hour ago.
    """
    declared = pipeline.tables()
    names = declared if tables is None else tables
    asked = by_table(conn, IS_FAILED, [declared[name] for name in names])
    sql = NEWLY_FAILED.format(rows=asked)
    found = execute(conn, sql, {"after": after, "batch": batch}).fetchall()
    is_last = found[0].attempts < batch
    return [row for row in found if row.job_id is not None], None if is_last else found[0].until


def newly_stalled(conn, part: str | None = None) -> list:
    """The stages (stage, jobs, reason) that are stalled since any listener last looked, or no more
    (jobs is None). With `part`: those that are stalled in it, or no more and have no route outside.
    """
    return execute(conn, UNPINNED + NEWLY_STALLED, {"part": part}).fetchall()


# --- calls that waited while no listener ran ------------------------------------------------

ABSENCE = """
SELECT count(*) AS calls, extract(epoch FROM now() - min(c.due_at))::float8 AS seconds
FROM stage_calls AS c
WHERE c.due_at < now() - make_interval(secs => %(after)s) AND c.worker IS NULL AND c.attempts = 0
  AND NOT EXISTS (SELECT FROM pipeline_stages AS p
                  WHERE p.stage = c.stage AND p.held_until > now())
"""


def tell_absence(conn, after: float, alerts: Alerts) -> None:
    """Tell people that calls had been waiting for more than `after` seconds at the start; but not
    where another listener has been there.
    """
    if not listeners.is_first(conn):
        return
    row = execute(conn, UNPINNED + ABSENCE, {"after": after}).fetchone()
    if row.calls:
        text = (
            f"a listener has started: {counted(row.calls, 'call')} had been waiting, "
            f"the oldest for {duration(row.seconds)}"
        )
        log.warning(
            "부재 후 시작: 밀린 호출 %d건, 가장 오래된 것은 %.0f초 전", row.calls, row.seconds
        )
        alerts.send("back", text, calls=row.calls, seconds=row.seconds)


# --- stages that wait, or accept nothing ----------------------------------------------------

# At least this many attempts, none of them accepted, show that the stage is at fault; not where all
# of them came within half of ALERT_AFTER, as while the stage was restarted.
REFUSALS = 3

# The first listener that sees it marks the stage until it is over. Paused stages are left as they
# are, as a person wants them to wait. A stage counts as refusing until a call of it succeeds, or is
# taken with 202. That there were fewer than REFUSALS attempts lately shows nothing: it may be tried
# with one call at a time, or have no calls.
# Each try of a held stage moves the due_at of its call. Such calls count as due since they were
# first due, as in pipeline_overview; so do calls that a listener puts off again and again, as its
# PIPELINE does not have them. A call that is being tried counts where its stage waited before.
EPISODES = """
WITH stage AS (
    SELECT stage, bool_or(held_until = 'infinity') IS TRUE AS paused,
           max(held_reason) FILTER (WHERE held_until > now()) AS held_reason,
           max(max_running) AS max_running,
           max(held_until) FILTER (WHERE hold_seconds IS NOT NULL) AS held_until,
           min(waiting_since) IS NOT NULL AS was_waiting, min(refusing_since) AS refusing_since
    FROM pipeline_stages GROUP BY stage
), tried AS (
    SELECT stage, count(*) AS attempts, max(finished_at) - min(finished_at) AS span,
           max(finished_at) FILTER (WHERE outcome = 'succeeded') AS accepted_at,
           (array_agg(error ORDER BY finished_at DESC))[1] AS last_error
    FROM stage_attempts
    WHERE finished_at > now() - make_interval(secs => %(recent)s)
      AND outcome NOT IN ('skipped', 'cancelled')
    GROUP BY stage
), state AS (
    SELECT s.stage, due.oldest, s.held_reason, s.max_running, tried.last_error, s.was_waiting,
           s.refusing_since IS NOT NULL AS was_refusing,
           CASE WHEN s.paused THEN s.was_waiting
                ELSE due.oldest < now() - make_interval(secs => %(after)s) IS TRUE END AS waiting,
           (s.refusing_since IS NOT NULL
            OR tried.attempts >= %(refusals)s
               AND tried.span >= make_interval(secs => 0.5 * %(after)s)) IS TRUE
               AND (greatest(tried.accepted_at, taken.at)
                    > coalesce(s.refusing_since, '-infinity')) IS NOT TRUE AS refusing
    FROM stage AS s
    LEFT JOIN tried USING (stage)
    CROSS JOIN LATERAL (
        SELECT max(l.started_at) AS at FROM stage_leases AS l
        WHERE l.stage = s.stage AND l.working AND l.leased_until > now()) AS taken
    CROSS JOIN LATERAL (
        SELECT least((SELECT min(c.due_at) FROM stage_calls AS c
                      WHERE c.stage = s.stage AND c.due_at <= now()),
                     (SELECT min(greatest(c.created_at, c.run_after)) FROM stage_calls AS c
                      WHERE s.held_until IS NOT NULL AND c.stage = s.stage
                        AND c.due_at < 'infinity' AND c.free_attempts > 0
                        AND CASE WHEN c.worker IS NULL
                                 THEN c.due_at < s.held_until + interval '1 minute'
                                 ELSE s.was_waiting END),
                     (SELECT min(greatest(c.created_at, c.run_after)) FROM stage_calls AS c
                      WHERE c.stage = s.stage AND c.due_at > now() - interval '1 minute'
                        AND c.due_at < now() + interval '1 minute'
                        AND c.worker IS NULL AND c.free_attempts > 0 AND c.last_error IS NULL)
               ) AS oldest) AS due
), marked AS (
    UPDATE pipeline_stages AS p
    SET waiting_since = CASE WHEN s.waiting THEN coalesce(p.waiting_since, now()) END,
        refusing_since = CASE WHEN s.refusing THEN coalesce(p.refusing_since, now()) END
    FROM state AS s
    WHERE p.stage = s.stage
      AND ((p.waiting_since IS NOT NULL) <> s.waiting
           OR (p.refusing_since IS NOT NULL) <> s.refusing)
    RETURNING s.*
)
SELECT DISTINCT stage, waiting, was_waiting, refusing, was_refusing, held_reason, last_error,
       last_error AS retry_error, m.max_running, 60 / r.seconds AS per_minute,
       CASE WHEN r.next_at > now() THEN r.next_at END AS next_at,
       extract(epoch FROM now() - oldest)::float8 AS seconds,
       (SELECT count(*) FROM stage_calls AS c
        WHERE c.stage = m.stage AND c.due_at <= now()) AS due,
       (SELECT count(*) FROM stage_leases AS l
        WHERE l.stage = m.stage AND l.leased_until > now()) AS calling
FROM marked AS m LEFT JOIN stage_limits AS r ON r.name = m.stage
"""


def episodes(conn, after: float) -> list:
    """The stages whose calls have been waiting for `after` seconds, or that accepted none of
    several in that time, and those where that is over.
    """
    # No success between two looks may be missed, however short `after` is.
    recent = max(after, 2 * EPISODES_INTERVAL)
    given = {"after": after, "recent": recent, "refusals": REFUSALS}
    return execute(conn, UNPINNED + EPISODES, given).fetchall()


def tell_episode(alerts: Alerts, row: Any, unclaimable: str | None = None) -> None:
    """Send the alert of an episode that has begun, or is over.

    Args:
        unclaimable: why no call of the stage can be claimed.
    """
    stage = row.stage
    if row.waiting and not row.was_waiting:
        refused = unclaimable and f"no call can be claimed: {unclaimable}"
        why = row.held_reason or refused or why_late(row._asdict())
        tell_waiting(alerts, stage, row.seconds, why)
    elif row.was_waiting and not row.waiting:
        tell_no_more_waiting(alerts, stage)
    if row.refusing and not row.was_refusing:
        text = f"{stage} accepts no call: {row.last_error}"
        log.error("호출을 하나도 수락하지 않는 단계: stage=%s %s", stage, row.last_error)
        alerts.send("refusing", text, stage=stage, reason=row.last_error)
    elif row.was_refusing and not row.refusing:
        alerts.send_recovered("refusing", stage, "it accepts calls again")


def tell_waiting(alerts: Alerts, stage: str, seconds: float, why: str) -> None:
    text = f"a call of {stage} has been due for {duration(seconds)}: {why}"
    log.error("밀린 단계: stage=%s 대기=%.0f초 %s", stage, seconds, why)
    alerts.send("waiting", text, stage=stage, seconds=seconds, reason=why)


def tell_no_more_waiting(alerts: Alerts, stage: str) -> None:
    alerts.send_recovered("waiting", stage, "no call of it is late any more")


# As in EPISODES, of stages that left PIPELINE, which have no row to be marked.
OF_NO_STAGE = """
SELECT c.stage, extract(epoch FROM now() - min(c.due_at))::float8 AS seconds
FROM stage_calls AS c
WHERE c.due_at < now() - make_interval(secs => %(after)s)
  AND NOT EXISTS (SELECT FROM pipeline_stages AS p WHERE p.stage = c.stage)
GROUP BY c.stage
"""


def tell_gone_stages(conn, after: float, alerts: Alerts, told: set[str]) -> None:
    """Tell people of calls that wait for a stage which left PIPELINE, and when that is over, unless
    this listener was restarted meanwhile. Only the listener that was connected first does; `told`
    has the stages that it has told.
    """
    if not listeners.is_first(conn):
        told.clear()  # another one tells people now
        return
    found = {row.stage: row for row in execute(conn, UNPINNED + OF_NO_STAGE, {"after": after})}
    for stage, row in found.items():
        if stage not in told:
            tell_waiting(alerts, stage, row.seconds, f"PIPELINE has no stage {stage}")
    for stage in told - found.keys():
        tell_no_more_waiting(alerts, stage)
    told.clear()
    told.update(found)
