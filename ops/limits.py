"""What each stage declares with @limits, priority and run_after, and what comes of it just now."""

import db

# Calls are counted only for stages of a table with run_after.
LIMITS = """
SELECT s.stage, s.max_running, s.pool, s.asynchronous,
       round((60 / l.seconds)::numeric, 9)::float8 AS per_minute,
       CASE WHEN l.next_at > now() THEN l.next_at END AS next_at,
       coalesce(l.is_fair, false) AS fair, l.per_tenant,
       nullif(l.last_tenant, '') AS last_tenant, s.by_priority,
       CASE WHEN s.by_time THEN later.planned END AS planned, later.planned_at
FROM (
    SELECT p.stage, min(p.position) AS position, max(p.max_running) AS max_running,
           max(p.pool) AS pool, bool_or(p.asynchronous) AS asynchronous,
           bool_or(p.join_of = '' AND t.priority_column IS NOT NULL) AS by_priority,
           bool_or(p.join_of = '' AND t.run_after_column IS NOT NULL) AS by_time
    FROM pipeline_stages AS p JOIN pipeline_tables AS t ON t.name = p.table_name
    GROUP BY p.stage) AS s
LEFT JOIN stage_limits AS l ON l.name = s.stage
CROSS JOIN LATERAL (
    SELECT count(*) AS planned, min(c.run_after) AS planned_at FROM stage_calls AS c
    WHERE s.by_time AND c.stage = s.stage AND c.run_after > now() AND c.worker IS NULL
      AND c.due_at < 'infinity') AS later
ORDER BY s.position
"""
LIMIT_FIELDS = ("pool", "asynchronous", "per_minute", "next_at", "fair", "per_tenant",
                "last_tenant", "by_priority", "planned", "planned_at")  # fmt: skip


def limits(conn) -> list:
    """A row for each stage.

    next_at: when the next call of a stage with a rate may begin; None: now.
    last_tenant: who was served last, where tenants take turns.
    by_priority: a table of its rows declares priority.
    planned, planned_at: its calls that wait for their run_after, and the first of these times;
        `planned` is None where no table of its rows declares run_after.
    """
    return db.execute(conn, LIMITS).fetchall()
