"""Whether more calls of a stage were under way at once than its max_running."""

from datetime import datetime, timedelta

from ops.audit.findings import BLUR, BY_INDEX, KEPT, Finding, Findings, Window, ask
from ops.rules import LIMIT

# Since when a limit holds: the first attempt that was written after the row of the limit, by the
# transactions that wrote them. What was claimed before may have had no limit, or another.
LIMITED = f"""{BY_INDEX}
SELECT l.name AS stage, l.max_running, (
    SELECT min(a.finished_at) FROM stage_attempts AS a
    WHERE a.finished_at > %(since)s AND age(a.xmin) < age(l.xmin)) AS since
FROM stage_limits AS l
"""

# For every call that was claimed in this window, how many of its stage were surely under way at one
# moment: claimed before, and with BLUR still to go. A call that ended later than its lease had lost
# its place.
CROWDED = f"""{BY_INDEX}
WITH limited AS (
    SELECT * FROM unnest(%(stages)s::text[], %(most)s::integer[], %(leases)s::float8[],
                         %(holds_since)s::timestamptz[]) AS l (stage, most, lease, holds_since)
), spans AS (
    SELECT a.table_name, a.job_id, a.call_id, a.attempt, a.stage, l.most, l.holds_since,
           max(a.worker) AS worker, min(a.started_at) AS began,
           least(min(a.finished_at), min(a.started_at) + make_interval(secs => l.lease))
               - make_interval(secs => %(blur)s) AS ended
    FROM stage_attempts AS a JOIN limited AS l ON l.stage = a.stage
    WHERE a.finished_at > %(after)s
      AND a.finished_at <= %(upto)s + make_interval(secs => %(longest)s)
      AND a.outcome NOT IN ('skipped', 'cancelled', 'lost')
      AND (a.outcome <> 'failed' OR a.http_status IS NOT NULL)
    GROUP BY a.table_name, a.job_id, a.call_id, a.attempt, a.stage, l.most, l.holds_since, l.lease
), events AS (
    SELECT *, sum(change) OVER (PARTITION BY stage ORDER BY at, change, call_id
                                ROWS UNBOUNDED PRECEDING) AS running
    FROM spans CROSS JOIN LATERAL (VALUES (began, 1), (ended, -1)) AS e (at, change)
    WHERE ended > began
)
SELECT table_name, job_id::text AS id, call_id, attempt, stage, worker, began, most, running, found,
       (   SELECT string_agg(s.job_id::text, ', ' ORDER BY s.began)
           FROM spans AS s
           WHERE s.stage = e.stage AND s.began <= e.began AND s.ended > e.began
             AND (s.call_id, s.attempt) <> (e.call_id, e.attempt)) AS beside
FROM (SELECT *, count(*) OVER () AS found FROM events
      WHERE change = 1 AND running > most AND began > holds_since
        AND began > %(after)s AND began <= %(upto)s
      ORDER BY began LIMIT %(kept)s) AS e
"""


class Limits:
    """The limits that hold now, each since when."""

    def __init__(self, conn, since: datetime, leases: dict[str, float]):
        """leases: the seconds of a lease, by stage."""
        found = ask(conn, LIMITED, {"since": since})
        self.rows = [row for row in found if row.since and row.stage in leases]
        self.leases = [leases[row.stage] for row in self.rows]

    def look(self, conn, window: Window, findings: Findings) -> None:
        """Find the calls that were claimed in `window` though their stage was full."""
        if not self.rows:
            return
        blur = timedelta(seconds=BLUR)
        given = {
            "stages": [row.stage for row in self.rows],
            "most": [row.max_running for row in self.rows],
            "holds_since": [row.since + blur for row in self.rows],
            "leases": self.leases,
            "longest": max(self.leases),
            "blur": BLUR,
            "kept": KEPT,
        }
        found = ask(conn, CROWDED, given | window._asdict())
        more = found[0].found - len(found) if found else 0
        findings.add(map(finding_of, found), more, LIMIT)


def finding_of(row) -> Finding:
    text = (
        f"attempt {row.attempt} of call {row.call_id} by {row.worker}: number {row.running} of "
        f"{row.most}, beside {row.beside}"
    )
    return Finding(LIMIT, row.table_name, row.id, row.stage, row.began, text)
