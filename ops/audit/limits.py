"""Whether limits were kept: calls under way at once of a stage or pool, and calls in a minute."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from calls import REAP_INTERVAL
from ops.audit.findings import BLUR, BY_INDEX, KEPT, Finding, Findings, Window, ask, at
from ops.rules import LIMIT

# Since when each limit holds: the first attempt whose transaction is newer than the one that wrote
# the limit's row (by age(xmin), below 0 after billions of transactions). Earlier claims may
# have had another limit, or none. Where claims update that row themselves its transaction tells
# nothing, and today's limit is used throughout.
LIMITED = f"""{BY_INDEX}
SELECT l.name, l.stages, l.max_running, l.seconds,
       CASE WHEN l.seconds IS NOT NULL OR l.linger IS NOT NULL OR l.is_fair THEN %(since)s
            ELSE (SELECT min(a.finished_at) FROM stage_attempts AS a
                  WHERE a.finished_at > %(since)s
                    AND (age(l.xmin) < 0 OR age(a.xmin) < age(l.xmin))) END AS since,
       (SELECT min(a.finished_at) FROM stage_attempts AS a WHERE a.finished_at > %(since)s) AS first
FROM stage_limits AS l
ORDER BY l.name
"""

# For every call that was claimed in this window: how many calls under its limit were certainly
# under way at that moment, that is, claimed before and ended more than BLUR later. A call counts
# until the end of its lease at the latest. One that was lost, or taken with 202 and not finished,
# was recorded up to `reaped` seconds after that.
CROWDED = f"""{BY_INDEX}
WITH limited AS (
    SELECT * FROM unnest(%(names)s::text[], %(stages)s::text[], %(most)s::integer[],
                         %(leases)s::float8[], %(holds_since)s::timestamptz[])
        AS l (name, stage, most, lease, holds_since)
), spans AS (
    SELECT a.table_name, a.job_id, a.call_id, a.attempt, a.stage, l.name, l.most, l.holds_since,
           max(a.worker) AS worker, min(a.started_at) AS began,
           least(min(a.finished_at - make_interval(secs => CASE
                     WHEN a.outcome = 'lost' OR (a.outcome, a.http_status) = ('unknown', 202)
                     THEN %(reaped)s ELSE 0 END)),
                 min(a.started_at) + make_interval(secs => l.lease))
               - make_interval(secs => %(blur)s) AS ended
    FROM stage_attempts AS a JOIN limited AS l ON l.stage = a.stage
    WHERE a.finished_at > %(after)s
      AND a.finished_at <= %(upto)s + make_interval(secs => %(longest)s)
      AND a.outcome NOT IN ('skipped', 'cancelled')
      AND (a.outcome <> 'failed' OR a.http_status IS NOT NULL)
    GROUP BY a.table_name, a.job_id, a.call_id, a.attempt, a.stage, l.name, l.most, l.holds_since,
             l.lease
), events AS (
    SELECT *, sum(change) OVER (PARTITION BY name ORDER BY at, change, call_id
                                ROWS UNBOUNDED PRECEDING) AS running
    FROM spans CROSS JOIN LATERAL (VALUES (began, 1), (ended, -1)) AS e (at, change)
    WHERE ended > began
)
SELECT table_name, job_id::text AS id, call_id, attempt, stage, name, worker, began, found,
       format('number %%s of %%s', running, most) AS what,
       (   SELECT string_agg(s.job_id::text, ', ' ORDER BY s.began)
           FROM spans AS s
           WHERE s.name = e.name AND s.began <= e.began AND s.ended > e.began
             AND (s.call_id, s.attempt) <> (e.call_id, e.attempt)) AS beside
FROM (SELECT *, count(*) OVER () AS found FROM events
      WHERE change = 1 AND running > most AND began > holds_since
        AND began > %(after)s AND began <= %(upto)s
      ORDER BY began LIMIT %(kept)s) AS e
"""

# For each call, how many began in the minute that ends with it. Two more than the rate are allowed:
# one because a minute includes both of its ends, and one by a person (`call`), who need not wait.
FAST = f"""{BY_INDEX}
WITH begun AS (
    SELECT a.table_name, a.job_id, a.call_id, a.attempt, a.stage, l.most, max(a.worker) AS worker,
           min(a.started_at) AS began
    FROM stage_attempts AS a
    JOIN unnest(%(stages)s::text[], %(most)s::float8[]) AS l (stage, most) ON l.stage = a.stage
    WHERE a.finished_at > %(after)s - interval '1 minute'
      AND a.finished_at <= %(upto)s + make_interval(secs => %(longest)s)
      AND a.outcome NOT IN ('skipped', 'cancelled')
      AND (a.outcome <> 'failed' OR a.http_status IS NOT NULL)
    GROUP BY a.table_name, a.job_id, a.call_id, a.attempt, a.stage, l.most
), counted AS (
    SELECT *, count(*) OVER (PARTITION BY stage ORDER BY began
                             RANGE BETWEEN '1 minute' PRECEDING AND CURRENT ROW) AS in_a_minute
    FROM begun
)
SELECT table_name, job_id::text AS id, call_id, attempt, stage, stage AS name, worker, began,
       format('number %%s of %%s within a minute', in_a_minute, most) AS what, NULL AS beside, found
FROM (SELECT *, count(*) OVER () AS found FROM counted
      WHERE in_a_minute > most + 2 AND began > %(since)s
        AND began > %(after)s AND began <= %(upto)s
      ORDER BY began LIMIT %(kept)s) AS f
"""


class Limits:
    """The limits in force, and since when each of them holds."""

    def __init__(self, conn, since: datetime, leases: dict[str, float]):
        """leases: the seconds of a lease, by stage."""
        self.known = ask(conn, LIMITED, {"since": since})
        found = [row for row in self.known if row.since]
        blur = timedelta(seconds=BLUR)
        self.crowded = [
            (row.name, stage, row.max_running, leases[stage], row.since + blur)
            for row in found
            if row.max_running
            for stage in row.stages
            if stage in leases
        ]
        self.fast = [(row.name, 60 / row.seconds) for row in found if row.seconds]
        reaped = 2 * REAP_INTERVAL
        self.given = {"longest": max(leases.values()) + reaped, "blur": BLUR, "reaped": reaped,
                      "kept": KEPT, "since": since}  # fmt: skip

    def unknown(self) -> Iterator[str]:
        """Lines about the limits that are not known to hold since the first call in the span."""
        for row in self.known:
            limit = f"held against the limit of {row.name}, which"
            if row.since and row.first and row.since > row.first:
                yield f"Calls before {at(row.since)} are not {limit} is known to hold since then."
            elif row.since is None and row.first:
                yield f"No call is {limit} was installed after the last one."

    def look(self, conn, window: Window, findings: Findings) -> None:
        """Find the calls that were claimed in `window` though their limit was reached."""
        for sql, names, rows in (
            (CROWDED, ("names", "stages", "most", "leases", "holds_since"), self.crowded),
            (FAST, ("stages", "most"), self.fast),
        ):
            if not rows:
                continue
            arrays = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
            found = ask(conn, sql, self.given | arrays | window._asdict())
            more = found[0].found - len(found) if found else 0
            findings.add(map(finding_of, found), more, LIMIT)


def finding_of(row) -> Finding:
    text = f"attempt {row.attempt} of call {row.call_id} by {row.worker}: {row.what}"
    text += f" of pool {row.name}" if row.name != row.stage else ""
    text += f", beside {row.beside}" if row.beside else ""
    return Finding(LIMIT, row.table_name, row.id, row.stage, row.began, text)
