"""`job`: where one row is, what it owes, what it waits for, and every attempt so far."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import click

import db
import pipeline
from calls import may_be_retried
from logs import CONTROL
from ops import rows, waits
from ops.problem import Problem
from ops.resting import ACCEPTED, NEVER_RECORDED, listed
from ops.rows import TABLE, RowCommand, said, typed
from ops.table import (
    JSON,
    clipped,
    clock,
    counted,
    duration,
    echo_json,
    echo_lines,
    plain,
    readable,
    table,
)
from ops.text import Text

# Leases: once a stage has set its row running the row owes nothing, but its call is under way.
CALLING = """
SELECT stage, call_id, attempt, worker, started_at, leased_until, working, unanswered
FROM stage_leases WHERE job_id = %(key)s AND table_name = %(table)s AND leased_until > now()
ORDER BY started_at
"""

ATTEMPTS = """
SELECT started_at, finished_at, stage, call_id, attempt, spent, outcome, http_status, worker,
       extract(epoch FROM finished_at - started_at)::float8 AS seconds, error
FROM stage_attempts WHERE job_id = %(key)s AND table_name = %(table)s
ORDER BY started_at, attempt, finished_at
"""

RESTS = """
SELECT table_name, job_id, kind, stage, since, reason FROM resting_rows()
WHERE (table_name, job_id) IN (SELECT * FROM unnest(%(tables)s::text[], %(keys)s::text[]))
"""

# As in resting_rows(): a time in the future does not count.
RESTS_AT = """
SELECT greatest(%(accepted_at)s, CASE WHEN {time} <= now() THEN {time} END)
       + make_interval(secs => coalesce(s.timeout, 600)) AS at
FROM {table} AS r CROSS JOIN pipeline_stages AS s
WHERE {id} = %(key)s AND (s.table_name, s.join_of, s.stage) = (%(table)s, '', %(stage)s)
LIMIT 1
"""

# --- children and joins --------------------------------------------------------------------

MOST_CHILDREN = 20
NO_TIME = "NULL::timestamptz"

# Rows whose calls were given up come first; of many rows, also others that need a person.
# The limit is one of rows, as a row that owes several calls is listed once for each.
NEEDS_PERSON = "(c.due_at = 'infinity') IS TRUE OR {id}::text = ANY (%(resting)s)"
FIRST = f"""{rows.LISTED}
WHERE {{id}} IN (
    SELECT {{id}} FROM {{table}} AS r
    LEFT JOIN stage_calls AS c ON c.job_id = {{id}} AND c.table_name = {{name}}
    WHERE {{parent}} = %(key)s
    GROUP BY 1 ORDER BY bool_or({NEEDS_PERSON}) DESC, 1 LIMIT %(most)s)
ORDER BY ({NEEDS_PERSON}) DESC, {{id}}, join_of
"""

RESTS_BELOW = """
SELECT job_id FROM resting_rows()
WHERE table_name = %(table)s
  AND job_id IN (SELECT {id}::text FROM {table} AS r WHERE {parent} = %(key)s)
"""

COUNTED = """
SELECT r.current_step::text, r.status::text, count(DISTINCT {id}) AS rows, count(c.stage) AS owed,
       count(*) FILTER (WHERE c.due_at = 'infinity') AS given_up
FROM {table} AS r
LEFT JOIN stage_calls AS c ON c.job_id = {id} AND c.table_name = {name}
WHERE {parent} = %(key)s
GROUP BY 1, 2 ORDER BY 1, 2
"""

JOINED = """
SELECT r.rows, r.in_place, m.is_open, m.recorded_at
FROM (SELECT count(*) AS rows,
             count(*) FILTER (WHERE r.current_step::text = %(step)s
                                AND r.status::text = %(status)s) AS in_place
      FROM {table} AS r WHERE {parent} = %(key)s) AS r
LEFT JOIN stage_joins AS m ON m.parent_id = %(key)s AND m.join_of = %(join)s
"""


def children(conn, row: Any, unread: Mapping[str, str]) -> list[dict[str, Any]]:
    """The tables whose rows may belong to `row`; for each, the calls of the first rows that do (see
    first()), and how many are in which state. Of more than MOST_CHILDREN, those that need a person
    come first.
    """
    found = []
    for child in pipeline.tables().values():
        if pipeline.parent_name(child) != row.table_name or child.name in unread:
            continue
        names = rows.names(conn, child)
        given = {"key": row.key, "table": child.name, "most": MOST_CHILDREN + 1}
        states = db.execute(conn, COUNTED.format(**names), given).fetchall()
        resting = []
        if are_many(states):  # what is not known, resting() says
            below = listed(conn, RESTS_BELOW.format(**names), given, only=child.name)
            resting = [one.job_id for one in below.rows]
        sql = FIRST.format(time=NO_TIME, **names)
        of_parent = db.execute(conn, sql, given | {"resting": resting}).fetchall()
        found.append({"table": child.name, "rows": of_parent, "states": states})
    return found


def are_many(states: list) -> bool:
    return sum(state.rows for state in states) > MOST_CHILDREN


def first(found: list) -> list:
    """Of the calls that children() has found, those of the first MOST_CHILDREN rows."""
    ids = list(dict.fromkeys(child.job_id for child in found))[:MOST_CHILDREN]
    return [child for child in found if child.job_id in ids]


def rows_of_join(conn, row: Any, name: str) -> Any:
    """How many rows a join of `row` has, how many are in place, and what is recorded of it."""
    state = pipeline.joins()[name]
    sql = JOINED.format(**rows.names(conn, state.table))
    given = {"key": row.key, "join": name, "step": state.step, "status": state.status}
    return db.execute(conn, sql, given).fetchone()


def joins(conn, row: Any, owed: list, unread: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each join of `row` with its call; also joins that still have a call, and that left PIPELINE
    or whose rows cannot be read.
    """
    calls = {call.join_of: call for call in owed if call.join_of}
    found = []
    for name, state in pipeline.joins().items():
        if pipeline.parent_name(state.table) != row.table_name or state.table.name in unread:
            continue
        looked = rows_of_join(conn, row, name)._asdict()
        stage = pipeline.pipeline()[state].__name__
        found.append({"join": name, "stage": stage, **looked, "owes": calls.pop(name, None)})
    nothing = {"rows": None, "in_place": None, "is_open": None, "recorded_at": None}
    found += [{"join": name, "stage": call.stage, **nothing, "owes": call}
              for name, call in calls.items()]  # fmt: skip
    return found


# --- why it rests --------------------------------------------------------------------------


def resting(
    conn, row: Any, owed: list, calling: list, below: list[dict], unread: Mapping[str, str]
) -> tuple[dict[tuple, Any], str | None]:
    """By (table, id): why this row and the rows that belong to it rest; and why that is not known
    of all (see Listed.problem). Nothing of `row` itself where it cannot be read: its way out
    depends on its state.
    """
    ids = [(child.table_name, child.job_id) for of in below for child in of["rows"]]
    if not (own(owed) or calling or row.is_unread) and rows.is_readable(row):
        ids.append((row.table_name, row.key))
    if not ids:
        return {}, None
    tables, keys = zip(*ids, strict=True)
    found = listed(conn, RESTS, {"tables": list(tables), "keys": list(keys)})
    return {(one.table_name, one.job_id): one for one in found.rows}, found.problem(unread)


class Rest(NamedTuple):
    """A row of RESTS."""

    table_name: str
    job_id: str
    kind: str
    stage: str
    since: datetime
    reason: str


CANCELLED = "cancelled"


def join_cancellation(attempts: list, join: dict[str, Any]) -> Any:
    """As cancellation(), of the last call of a join. If it was tried under the present name of its
    stage, attempts under other names are not of this call.
    """
    stage, since = join["stage"], join["recorded_at"]
    own = [one for one in attempts if one.stage == stage]
    is_tried = since and any(one.finished_at >= since for one in own)
    return cancellation(own if is_tried else attempts, stage)


def cancellation(attempts: list, stage: str, other: str | None = None) -> Any:
    """The attempt that says that a person has cancelled the last call of `stage`; None where there
    is none, or the call was under way and was accepted. As in resting_rows(), a stage that left
    PIPELINE may be that of now under the name of before; not `other`.
    """
    others = {*pipeline.stage_names(), other} - {stage}
    last = max((one for one in attempts if one.stage not in others), default=None,
               key=lambda one: one.finished_at)  # fmt: skip
    if last is None or last.outcome == "succeeded":
        return None
    of_call = (one for one in attempts if one.call_id == last.call_id)
    return next((one for one in of_call if one.outcome == CANCELLED), None)


def cancelled(row: Any, key: str, attempts: list) -> Any:
    """Where a person has cancelled the call that `row` would owe: that, as a Rest; else None."""
    stage = rows.own_stage(row)
    if stage is None or (found := cancellation(attempts, stage, row.current_step)) is None:
        return None
    why = reason_of(found)
    return Rest(row.table_name, key, CANCELLED, stage, found.started_at, why)


def cancelled_below(conn, below: list[dict]) -> Iterator[Any]:
    """As cancelled(), of the rows that belong to one and are shown; those with a call left out."""
    for child in [child for of in below for child in first(of["rows"])]:
        if child.stage is None and rows.own_stage(child):
            given = {"key": child.job_id, "table": child.table_name}
            attempts = db.execute(conn, ATTEMPTS, given).fetchall()
            if found := cancelled(child, child.job_id, attempts):
                yield found


def way_out(row: Any, why: Any, above: list[dict[str, Any]]) -> str:
    """The command, or the SQL, with which a person has the stage called for which `row` rests.
    A join that is complete, and whose call was never recorded, is named first. One whose call was
    accepted is named only where the row's own state does not lead to the stage.
    """
    found, is_open = [], why.reason.startswith(NEVER_RECORDED)
    if is_open or (why.reason.startswith(ACCEPTED) and why.stage != rows.own_stage(row)):
        found = [one["join"] for one in above
                 if (one["stage"], one["is_open"]) == (why.stage, is_open)
                 and 0 < one["rows"] == one["in_place"]]  # fmt: skip
    return rows.way_to_join(row, found[0], why.stage) if found else rows.way_on(row, why.stage)


def reason_of(cancelled: Any) -> str:
    return f"cancelled by {cancelled.worker}: {cancelled.error}"


class Accepted(NamedTuple):
    """A call that its stage has accepted, and that has not moved its row on yet."""

    stage: str
    at: datetime
    rests_at: datetime


def accepted(conn, row: Any, attempts: list) -> Accepted | None:
    """The call of `row`'s own state, which owes none, where its stage has accepted it."""
    stage = rows.own_stage(row) if row.is_there and rows.is_readable(row) else None
    tried = [one for one in attempts if one.stage == stage]
    last = max(tried, default=None, key=lambda one: one.finished_at)
    succeeded = {one.call_id for one in tried if one.outcome == "succeeded"}
    if last is None or last.call_id not in succeeded:
        return None
    table = pipeline.tables()[row.table_name]
    column = rows.time_column(conn, table)
    sql = RESTS_AT.format(time=f"r.{column}" if column else NO_TIME, **rows.names(conn, table))
    given = {"key": row.key, "table": row.table_name, "stage": stage}
    found = db.execute(conn, sql, given | {"accepted_at": last.finished_at}).fetchone()
    return found and Accepted(last.stage, last.finished_at, found.at)


# --- all of it -----------------------------------------------------------------------------


class Found(NamedTuple):
    """All that is known of a row."""

    row: Any  # as rows.find has it
    owed: list
    calling: list
    attempts: list
    below: list[dict[str, Any]]
    above: list[dict[str, Any]]
    rests: dict[tuple, Any]
    waiting: dict[str, waits.Waits]
    unread: Mapping[str, str]  # tables that cannot be read, and why
    unknown: str | None  # why it is not known which of these rows rest
    accepted: Accepted | None  # not where it rests

    @property
    def problem(self) -> str:
        """What could not be read; empty where all could."""
        return "; ".join(filter(None, [rows.told(self.unread), self.unknown]))


def look(conn, row: Any, unread: Mapping[str, str]) -> Found:
    given = {"key": row.key, "table": row.table_name}
    owed = rows.owed(conn, row)
    calling, attempts = (db.execute(conn, sql, given).fetchall() for sql in (CALLING, ATTEMPTS))
    below, above = children(conn, row, unread), joins(conn, row, owed, unread)
    rests, unknown = resting(conn, row, owed, calling, below, unread)
    dropped = [*cancelled_below(conn, below)]
    if not (own(owed) or calling):
        dropped += filter(None, [cancelled(row, row.key, attempts)])
    rests |= {(one.table_name, one.job_id): one for one in dropped}
    waiting = waits.waits(conn, row) if owed else {}
    is_known = own(owed) or calling or (row.table_name, row.key) in rests or unknown
    left = None if is_known or row.is_unread else accepted(conn, row, attempts)
    return Found(row, owed, calling, attempts, below, above, rests, waiting, unread, unknown, left)


# --- the command ---------------------------------------------------------------------------


@click.command(cls=RowCommand)
@click.argument("job_id", type=Text())
@TABLE
@JSON
def job(job_id: str, table: str | None, as_json: bool) -> None:
    """Where JOB_ID is, what it owes, and every attempt so far.

    JOB_ID is the id of a job or of a row of another table of the pipeline. One that other rows
    belong to shows those, too. Exit 1 where not all of it can be read.
    """
    conn = rows.connected("job")
    unread = rows.unread(conn)
    found = look(conn, rows.find(conn, job_id, table, unread), unread)
    if as_json:
        echo_json(as_object(found))
    else:
        for line in place_lines(found):
            click.echo(line)  # whole: what a person has to type may stand at its end
        lines = [line for of in found.below for line in child_lines(of, found.rests)]
        if lines := [*lines, *attempt_lines(found.attempts)]:
            echo_lines((line, 0) for line in lines)
    if found.problem:
        raise Problem(found.problem)


def own(owed: list) -> Any:
    """The call that the row's own state owes."""
    return next((call for call in owed if not call.join_of), None)


def as_object(found: Found) -> dict[str, Any]:
    row, owed, calling, attempts, below, above, rests, waiting, *_ = found
    place = {name: getattr(row, name) for name in ("current_step", "status", "tenant_id")}
    why = rests.get((row.table_name, row.key))
    return {
        "job_id": row.key,
        "table": row.table_name,
        "parent_id": row.parent_id,
        "job": place if row.is_there else None,
        "owes": plainly(own(owed)),
        "waits": plainly(waiting.get("")),
        "calling": plainly(calling[-1] if calling else None),
        "rests": why and dict(plainly(why) or (), mend=way_out(row, why, above)),
        "accepted": plainly(found.accepted),
        "joins": [
            one | {"owes": plainly(one["owes"]), "waits": plainly(waiting.get(one["join"]))}
            for one in above
        ],
        "children": [
            {
                "table": of["table"],
                "rows": [child_object(child, rests) for child in first(of["rows"])],
                "states": [plainly(state) for state in of["states"]],
            }
            for of in below
        ],
        "attempts": [plainly(attempt) for attempt in attempts],
        "problem": found.problem or None,
    }


def child_object(child: Any, rests: dict[tuple, Any]) -> dict[str, Any]:
    why = rests.get((child.table_name, child.job_id))
    return dict(plainly(child) or (), rests=plainly(why))


def plainly(found: Any) -> dict[str, Any] | None:
    """A row of an answer with its errors readable."""
    if found is None:
        return None
    return {
        name: readable(value) if name in ("error", "last_error", "reason") else value
        for name, value in found._asdict().items()
    }


# --- its lines -----------------------------------------------------------------------------


def place_lines(found: Found) -> Iterator[str]:
    """Where the row is, what it owes, and what it waits for."""
    row, call = found.row, own(found.owed)
    yield where(row)
    yield f"owes: {owes(row, call)}"
    if found.calling and not call:
        under_way = found.calling[-1]
        yield f"called: {under_way.stage} (call {under_way.call_id}), {on_it(under_way)}"
    if left := found.accepted:
        since = f"since {clock(left.at)} {left.stage} has not moved it on"
        yield plain(f"accepted: {since}; from {clock(left.rests_at)} on it rests")
    if why := found.rests.get((row.table_name, row.key)):
        yield rest_line(row, why, found.above)
    for one in found.above:
        yield join_line(row, one, join_cancellation(found.attempts, one))
    for one in found.owed:
        if one.join_of in found.waiting:
            yield wait_line(one.stage, found.waiting[one.join_of])
    if is_unattended(found):
        after = plain(f"after the timeout of {row.current_step} it rests")
        yield f"running: no call of it is under way; {after}"


def is_unattended(found: Found) -> bool:
    """Whether the row is `running` at a stage of which no listener has a call: somebody else called
    it, or it was cut off. Not where it rests.
    """
    row = found.row
    is_running = row.is_there and rows.is_readable(row) and row.status == "running"
    rest = found.rests.get((row.table_name, row.key))
    is_known = own(found.owed) or found.calling or rest or found.unknown
    return is_running and row.current_step in pipeline.stage_names() and not is_known


def where(row: Any) -> str:
    if not (row.is_there and rows.is_readable(row)):
        return plain(f"{said(row)} {rows.absence(row)}")
    parent = pipeline.parent_name(pipeline.tables()[row.table_name])
    of = f", of {rows.word_for(parent)} {row.parent_id}" if parent else ""
    return plain(
        f"{said(row)} is at ({row.current_step}, {row.status}){of}, tenant {row.tenant_id}"
    )


def owes(row: Any, call: Any) -> str:
    if call is None:
        return "nothing" + misspelt(row)
    spent = counted(call.spent, "attempt")
    text = f"{call.stage} (call {call.call_id}, {spent} spent), {situation(call)}"
    is_retried = call.given_up and rows.is_wanted(call) and may_be_retried(call.last_error)
    return f"{text}; {one_line(typed('retry', row))}" if is_retried else text


def misspelt(row: Any) -> str:
    """The state of PIPELINE from which the row's own differs by case or spaces alone."""
    states = [(route.step, route.status) for route in pipeline.routes()
              if route.table == row.table_name and not route.join]  # fmt: skip
    states += [(of.step, of.status) for of in pipeline.joins().values()
               if of.table.name == row.table_name]  # fmt: skip
    own = row.current_step, row.status
    near = [state for state in states if folded(state) == folded(own)]
    if not near or own in near:
        return ""
    return plain("; PIPELINE has no such state: is ({}, {}) meant?".format(*near[0]))


def folded(state: tuple[str | None, str | None]) -> list[str]:
    return [(word or "").strip().lower() for word in state]


def wait_line(stage: str, waiting: waits.Waits) -> str:
    """Why a call that is owed is not made now, and what a person types about it."""
    return one_line(f"{stage} waits: " + "; ".join(filter(None, waiting)))


def situation(call: Any) -> str:
    """The state of a call that is owed: given up, under way, or when it is due."""
    error = call.last_error and plain(readable(call.last_error))
    if call.given_up:
        return f"given up: {error}"
    if call.worker and call.leased_until:
        return on_it(call)
    when = f"due in {duration(call.due_in_seconds)}" if call.due_in_seconds > 0 else "due now"
    return f"{when}; last error: {error}" if error else when


def on_it(call: Any) -> str:
    """Who works on a call that is under way; where it got no answer, its stage may."""
    if call.unanswered:
        return f"no answer; the stage may run until {clock(call.leased_until)}"
    who = f"{call.stage} works on it" if call.working else f"{call.worker} is on it"
    return f"{who} since {clock(call.started_at)}"


def rest_line(row: Any, why: Any, above: list[dict]) -> str:
    since = f" since {clock(why.since)}" if why.since else ""
    # Some reasons end with a command for all rows alike; `jobs` shows it, `job` does not.
    reason = readable(why.reason).partition(f": {pipeline.JSL} ")[0]
    text = f"rests{since}: {plain(reason)}"
    back = one_line(way_out(row, why, above))
    if why.reason.startswith(NEVER_RECORDED):
        back = rows.wait_first(row, why.stage) + back
    return f"{text}; to call {why.stage} again: {back}"


def one_line(text: str) -> str:
    """Text to be typed on one line; never cut, however long it is."""
    return text.translate(CONTROL)


def join_line(row: Any, join: dict[str, Any], dropped: Any) -> str:
    text = f"every {join['join']}: "
    if join["owes"]:
        return text + f"owes {owes(row, join['owes'])}"
    again = rows.way_to_join(row, join["join"], join["stage"])
    back = rows.wait_first(row, join["stage"]) + one_line(again)
    if join["recorded_at"] and not join["is_open"]:  # its rows may have moved on since
        is_complete = 0 < join["rows"] == join["in_place"]
        there = f"all {join['rows']} are there; " if is_complete else ""
        if dropped:
            why = f"{join['stage']} was {plain(readable(reason_of(dropped)))}"
            return text + there + why + f"; to call it again: {back}" * is_complete
        return text + f"{there}{join['stage']} was recorded {clock(join['recorded_at'])}"
    if rows.was_deleted(row):
        return text + "owes nothing"
    if not join["rows"]:
        return text + "there is no row yet"
    if join["in_place"] < join["rows"]:
        return text + f"waiting for {join['rows'] - join['in_place']} of {join['rows']}"
    return text + f"all {join['rows']} are there; {join['stage']} is not recorded: {back}"


LONGEST_TOLD = 60


def child_lines(of: dict[str, Any], rests: dict[tuple, Any]) -> Iterator[str]:
    """The rows that belong to one; of many how many are in which state, and which need a person."""
    shown, title = of["rows"], of["table"]
    if are_many(of["states"]):
        header = [of["table"], "rows", "owed", "given up"]
        cells = [[f"{s.current_step}, {s.status}", s.rows, s.owed, s.given_up]
                 for s in of["states"]]  # fmt: skip
        yield from table(header, cells).split("\n")
        shown = [child for child in shown if needs_person(child, rests)]
        title = "needs a person"
    header = [title, "state", "owes"]
    cells = [[child.job_id, f"{child.current_step}, {child.status}", told(child, rests)]
             for child in first(shown)]  # fmt: skip
    if cells:
        yield from table(header, cells).split("\n")
    if len(first(shown)) < len(shown):
        yield f"more than {MOST_CHILDREN} rows of {of['table']} need a person"


def needs_person(child: Any, rests: dict[tuple, Any]) -> bool:
    why = rests.get((child.table_name, child.job_id))
    return child.given_up or (why is not None and why.kind != CANCELLED)


def told(child: Any, rests: dict[tuple, Any]) -> str:
    text = f"{child.stage}: {situation(child)}" if child.stage else "-"
    if not child.stage and (why := rests.get((child.table_name, child.job_id))):
        text = plain(readable(why.reason))
    return clipped(text, LONGEST_TOLD)


def number(attempt: Any) -> str:
    """The number of an attempt as MAX_ATTEMPTS counts; "-" where it is not counted. The column
    `attempt` counts every claim, also that which finds no attempt left and gives the call up.
    """
    # None: no claim made this row, or an earlier version wrote it for a lost attempt.
    spent = attempt.attempt if attempt.spent is None else attempt.spent
    return "-" if attempt.outcome in ("held", CANCELLED) or not spent else str(spent)


def attempt_lines(attempts: list) -> list[str]:
    if not attempts:
        return []
    cells = [
        [f"{a.started_at.astimezone():%F %T}", a.stage, number(a), a.outcome, a.http_status or "-",
         f"{a.seconds:.2f}", readable(a.error) or ""]
        for a in attempts
    ]  # fmt: skip
    header = ["started", "stage", "attempt", "outcome", "HTTP", "seconds", "error"]
    return table(header, cells, right=["attempt", "HTTP", "seconds"]).split("\n")
