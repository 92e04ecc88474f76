"""Why a call that is owed is not made just now, and what a person types about it."""

from typing import Any, NamedTuple

import config
import db
import pipeline
from ops import rows
from ops.listeners import listeners
from ops.problem import IF_NEWER, INSTALL
from ops.table import clock, counted, readable

# A call, and everything that may keep it from being made. Where another transaction has changed or
# locked the row without committing, xmax is that transaction's id, and pg_locks has a lock of that
# id for as long as it runs.
WAITS = f"""
SELECT {rows.CALLED_FROM},
       c.join_of, c.stage, c.call_id, c.due_at, c.due_at = 'infinity' AS given_up,
       c.due_at > now() AND c.attempts > 0 AS is_later, c.run_after > now() AS is_planned,
       CASE WHEN c.run_after > now() THEN c.run_after END AS run_after, c.last_error,
       c.worker IS NOT NULL AS is_unsettled,
       c.last_error IS NULL AND c.attempts > 0 AS is_put_off,
       l.worker AS calling, l.call_id <> c.call_id AS is_of_another, l.unanswered, l.working,
       l.leased_until, s.max_running, s.name AS full, slow.next_at, other.pool, other.stays_with,
       other.stays_until,
       CASE WHEN tenant.most <= tenant.calling THEN tenant.most END AS tenant_most,
       h.stage IS NOT NULL AS has_route, h.held_until, h.held_until = 'infinity' AS paused,
       h.held_by, h.held_reason, k.pid AS locked_by, k.application_name, k.xact_start
FROM stage_calls AS c
LEFT JOIN LATERAL (SELECT * FROM stage_leases
                   WHERE job_id = c.job_id AND table_name = c.table_name AND stage = c.stage
                     AND leased_until > now()
                   ORDER BY leased_until DESC LIMIT 1) AS l ON true
LEFT JOIN LATERAL (SELECT n.name, n.max_running FROM stage_limits AS n
                   WHERE c.stage = ANY (n.stages)
                     AND n.max_running <= (SELECT count(*) FROM stage_leases AS m
                                           WHERE m.stage = ANY (n.stages)
                                             AND m.leased_until > now())
                   ORDER BY n.name LIMIT 1) AS s ON true
LEFT JOIN LATERAL (SELECT n.next_at FROM stage_limits AS n
                   WHERE c.stage = ANY (n.stages) AND n.next_at > now() LIMIT 1) AS slow ON true
LEFT JOIN LATERAL (SELECT n.name AS pool, n.stays_with,
                          n.stays_since + make_interval(secs => n.linger) AS stays_until
                   FROM stage_limits AS n
                   WHERE c.stage = ANY (n.stages) AND n.stays_with <> c.stage
                     AND n.stays_since + make_interval(secs => n.linger) > now()
                   LIMIT 1) AS other ON true
LEFT JOIN LATERAL (SELECT n.per_tenant AS most,
                          (SELECT count(*) FROM stage_leases AS m
                           WHERE m.stage = c.stage AND m.leased_until > now()
                             AND coalesce(m.tenant_id, '') = coalesce(c.tenant_id, '')) AS calling
                   FROM stage_limits AS n WHERE n.name = c.stage) AS tenant ON true
LEFT JOIN LATERAL (SELECT p.stage, max(p.held_until) FILTER (WHERE p.held_until > now())
                              AS held_until,
                          max(p.held_by) AS held_by, max(p.held_reason) AS held_reason
                   FROM pipeline_stages AS p WHERE p.stage = c.stage GROUP BY p.stage) AS h ON true
LEFT JOIN LATERAL (SELECT m.pid, a.application_name, a.xact_start
                   FROM pg_locks AS m LEFT JOIN pg_stat_activity AS a USING (pid)
                   WHERE m.locktype = 'transactionid' AND m.granted AND m.mode = 'ExclusiveLock'
                     AND m.transactionid = c.xmax LIMIT 1) AS k ON true
WHERE c.job_id = %(key)s AND c.table_name = %(table)s
  AND (%(stage)s::text IS NULL OR c.stage = %(stage)s)
ORDER BY c.due_at
"""


class Waits(NamedTuple):
    """Why a call waits; `mend` is the command that ends it, where there is one."""

    why: str
    mend: str | None = None


def owed(conn, row: Any, stage: str | None = None) -> list:
    """The calls of a row (to `stage`, if given) with what keeps each from being made."""
    given = {"key": row.key, "table": row.table_name, "stage": stage}
    return db.execute(conn, WAITS, given).fetchall()


def waits(conn, row: Any) -> dict[str, Waits]:
    """Why each call that the row owes waits, by the name of its join ("": the row's own call).
    Left out are calls that a listener is making, that were given up, or that a listener may take at
    any moment; a call that got no answer, or was taken with 202, is not.
    """
    calls = owed(conn, row)
    found = {call.join_of: why(row, call) for call in calls}
    if taken_by_nobody := [call for call in calls if found[call.join_of] is NOBODY]:
        there = [one for one in listeners(conn, config.settings()) if one["connected"]]
        found |= {call.join_of: taker(there, call.stage) for call in taken_by_nobody}
    return {join: waiting for join, waiting in found.items() if waiting}


NOBODY = Waits("no listener is connected", pipeline.JSL)


def taker(there: list[dict[str, Any]], stage: str) -> Waits | None:
    """Why no listener may take a call that nothing else keeps: each that is connected may be
    busy or stopping, have another PIPELINE, which may lack its stage, or make one call of the stage
    at a time.
    """
    if not there:
        return NOBODY
    names = ", ".join(row["listener"] for row in there)
    if all(row["takes_none"] for row in there):
        return Waits("; ".join(f"{row['listener']}: {row['takes_none']}" for row in there))
    if all(stage in row["one_at_a_time"] for row in there):
        why = there[0]["one_at_a_time"][stage]
        one = "makes" if len(there) == 1 else "each make"
        return Waits(f"{stage} {why}, so {names} {one} one call of it at a time")
    return None


def why(row: Any, call: Any) -> Waits | None:
    """Why a call (see WAITS) is not made; None where it is under way or was given up."""
    if not rows.is_readable(row):
        mend = rows.typed("cancel", row) if rows.has_left(row) else None
        return Waits(rows.gone_table(row), mend)
    if not call.has_route and rows.is_wanted(call):
        return Waits(f"the database's PIPELINE has no stage {call.stage}: {INSTALL}, {IF_NEWER}")
    if not call.has_route:
        again = rows.own_stage(row) and not call.join_of
        mend = rows.typed("again", row) if again else rows.typed("cancel", row)
        return Waits(f"PIPELINE has no stage {call.stage}", mend)
    if call.locked_by:
        return Waits(locked(call))
    if call.working:
        return Waits(working(call))
    if call.unanswered:
        until = clock(call.leased_until)
        return Waits(f"its last call got no answer, and the stage may be at it until {until}")
    if not call.calling and (route := rows.lost_state(call)):
        return Waits(f"PIPELINE has no {route} any more", rows.typed("cancel", row))
    if call.given_up or (call.calling and not call.is_of_another):
        return None
    if call.calling:
        until = clock(call.leased_until)
        return Waits(f"an earlier call of {call.stage} is under way, until {until} at the latest")
    if hold := held(call):
        return hold
    if call.is_planned:
        until = clock(call.run_after)
        return Waits(f"its row has run_after {until}", rows.typed("retry", row, "--now"))
    if call.is_later and call.is_unsettled:
        until = clock(call.due_at)
        return Waits(f"its row was locked when its last attempt ended; looked at from {until} on")
    if call.is_later and call.is_put_off:
        return Waits(
            "put off by a listener whose PIPELINE does not lead to it: start one that has it"
        )
    if call.is_later:
        return Waits("its last attempt failed", rows.typed("retry", row, "--now"))
    if call.full:
        return Waits(full(call))
    if call.tenant_most:
        most = counted(call.tenant_most, "call")
        return Waits(f"{call.stage} is at its limit of {most} of this tenant")
    if call.next_at:
        return Waits(f"{call.stage} has a rate; its next call is due {clock(call.next_at)}")
    if call.pool:
        until = clock(call.stays_until)
        return Waits(f"pool {call.pool} stays with {call.stays_with} until {until}, while that has "
                     "calls due")  # fmt: skip
    return NOBODY


def full(call: Any) -> str:
    pool = "" if call.full == call.stage else "pool "
    return f"{pool}{call.full} is at its limit of {counted(call.max_running, 'call')} at once"


def working(call: Any) -> str:
    return f"{call.stage} has taken it and works on it; {unless_it_ends(call)}"


def unless_it_ends(call: Any) -> str:
    """What becomes of a call that an asynchronous stage has taken and does not finish in time."""
    return f"from {clock(call.leased_until)} on it counts as a call without an answer"


def locked(call: Any) -> str:
    name = f" {call.application_name}" if call.application_name else ""
    since = f" since {clock(call.xact_start)}" if call.xact_start else ""
    return f"another transaction holds it{since} (server process {call.locked_by}{name})"


def held(stage: Any) -> Waits | None:
    """The pause or hold of a stage."""
    if not stage.held_until:
        return None
    until = "is paused" if stage.paused else f"is held until {clock(stage.held_until)}"
    reason = readable(stage.held_reason)
    resume = f"{pipeline.JSL} resume {stage.stage}"
    return Waits(f"{stage.stage} {until} by {stage.held_by}: {reason}", resume)


HELD = """
SELECT stage, max(held_until) AS held_until, max(held_until) = 'infinity' AS paused,
       max(held_by) AS held_by, max(held_reason) AS held_reason
FROM pipeline_stages WHERE held_until > now() AND stage = ANY (%(stages)s::text[])
GROUP BY stage
"""


def held_of(conn, stages: set[str]) -> list[Waits]:
    """The pauses and holds of some stages, in the order of PIPELINE."""
    found = db.execute(conn, HELD, {"stages": list(stages)}).fetchall()
    order = pipeline.stage_names()
    by_name = {row.stage: why for row in found if (why := held(row))}
    return [by_name[name] for name in order if name in by_name]
