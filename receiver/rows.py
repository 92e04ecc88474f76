"""The SQL of taking and finishing rows, and of what is remembered of their requests."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .answers import JSON, Answer, Refused, Running, json_answer, one_line, refusal
from .session import rows, sqlstate


@dataclass(frozen=True)
class Stage:
    """A stage, and the rows that it takes.

    Args:
        name: the step that it sets.
        after: the states in which it takes a row, one (step, status) or a list of them. Where
            (stage, 'failed') leads to the stage again, that is one of them. For a join also what
            the stage itself leaves, and later states of the parent: its call may be made again.
        running: whether a row that was taken is set to (stage, 'running'). If not, it keeps its
            state until the work is over: it still owes the call, and the listener repeats calls
            that got lost. Use that for joins, and for work that is often killed.
        table: of the rows, with its schema where that is needed.
        id: the column that identifies a row; the body has the id under this name.
        where: what else must be true of the row r, in SQL. %(name)s is a field of the body; but
            key, stage, table and id are those of the request.
        touch: a column that is set to now() with each change of the state.

    Raises:
        ValueError: `after` is no state, and no list of states.
    """

    name: str
    after: tuple[str, str] | list[tuple[str, str]]
    running: bool = True
    table: str = "jobs"
    id: str = "job_id"
    where: str = "r.tenant_id IS NOT DISTINCT FROM %(tenant_id)s"
    touch: str | None = None

    def __post_init__(self) -> None:
        states = self.states if isinstance(self.after, (tuple, list)) else []
        if not states or not all(map(is_state, states)):
            allowed = "(step, status), or a list of such"
            raise ValueError(f"Stage({self.name!r}): after={self.after!r}: allowed is {allowed}")

    @property
    def states(self) -> list[tuple[str, str]]:
        return [self.after] if isinstance(self.after, tuple) else self.after

    def held(self, taken_from: tuple[str, str]) -> tuple[str, str]:
        """The state of a row while it is worked on."""
        return (self.name, "running") if self.running else taken_from

    def sql(self, statement: str) -> str:
        """A statement about rows, with the names of this stage's table."""
        table = ".".join(map(quoted, self.table.split(".")))
        touch = f", {quoted(self.touch)} = now()" if self.touch else ""
        return statement.format(table=table, id=quoted(self.id), where=self.where, touch=touch)


def is_state(value: Any) -> bool:
    return isinstance(value, tuple) and list(map(type, value)) == [str, str]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class Request:
    """A request whose signature is right, and whose body names a row."""

    stage: Stage
    key: str
    body: dict[str, Any]
    row_id: str

    @property
    def values(self) -> dict[str, Any]:
        """For statements. All are text: PostgreSQL takes their type from their use."""
        names = re.findall(r"%\((\w+)\)s", self.stage.where)
        fields = {name: self.body.get(name) for name in names}
        return {name: None if value is None else str(value) for name, value in fields.items()} | {
            "key": self.key,
            "stage": self.stage.name,
            "table": self.stage.table,
            "id": self.row_id,
        }


class Known(NamedTuple):
    """What is stored about the request with a key."""

    stage: str
    table: str
    row_id: str
    state: str
    owner: str
    from_step: str
    from_status: str
    http_status: int
    answer: str
    is_late: bool

    @property
    def stored(self) -> Answer | None:
        """The stored answer; None where the request is not finished."""
        if self.state not in ("done", "failed"):
            return None
        return Answer(self.answer.encode(), self.http_status, JSON)


READ = """
SELECT stage, table_name, row_id, state, owner, from_step, from_status, http_status, answer,
       started_at < clock_timestamp() - make_interval(secs => %(lost_after)s)
FROM stage_requests WHERE key = %(key)s"""


def read(cursor: Any, key: str, lost_after: float = 0) -> Known | None:
    found = rows(cursor, READ, {"key": key, "lost_after": float(lost_after)})
    return Known(*found[0]) if found else None


# --- taking --------------------------------------------------------------------------------

FIND = """
SELECT r.current_step, r.status, ({where}) IS TRUE
FROM {table} AS r WHERE r.{id} = %(id)s"""

# Where a request under another key took this row and has not finished, the row was set back since:
# that request is given up.
CLAIM = """
WITH void AS (
    UPDATE stage_requests SET state = 'abandoned', finished_at = now()
    WHERE row_id = %(id)s AND stage = %(stage)s AND table_name = %(table)s
      AND key <> %(key)s AND state = 'running'
)
INSERT INTO stage_requests AS r (key, stage, table_name, row_id, owner, from_step, from_status)
VALUES (%(key)s, %(stage)s, %(table)s, %(id)s, %(owner)s, %(from_step)s, %(from_status)s)
ON CONFLICT (key) DO UPDATE
SET state = 'running', owner = excluded.owner, from_step = excluded.from_step,
    from_status = excluded.from_status, started_at = clock_timestamp(), finished_at = NULL
WHERE r.state IN ('abandoned', 'failed') OR (r.state = 'running' AND r.owner = %(owner_before)s)"""

MOVE = """
UPDATE {table} AS r SET current_step = %(to_step)s, status = %(to_status)s{touch}
WHERE r.{id} = %(id)s AND r.current_step = %(from_step)s AND r.status = %(from_status)s"""


def take(cursor: Any, request: Request, owner: str, known: Known | None, is_busy: bool) -> tuple:
    """Remember the key and set the row running for `owner`; returns the state it was taken from.

    Args:
        known: what is stored about the key.
        is_busy: another process works on this key, and is not taken for lost.

    A failed request is taken again if its row is in a state that the stage takes: the call of a
    join is retried under the same key.

    Raises:
        Refused: with the stored answer; 409 where the row is being worked on, Running where under
            this key; 412 where it is in another state; 422 where there is none, or the key is that
            of another row.
    """
    stage = request.stage
    if known and (known.stage, known.table, known.row_id) != (
        stage.name, stage.table, request.row_id):  # fmt: skip
        raise refusal(422, "this key is that of another request")
    if known and known.stored and known.state == "done":
        raise Refused(known.stored)
    runs = known is not None and known.state == "running"
    if known and runs and known.owner == owner:
        return known.from_step, known.from_status  # we took it in a commit whose answer was lost
    if is_busy:
        raise running(request)
    *now, fits = find(cursor, request)
    state = tuple(now)
    if known and known.stored and not (fits and state in stage.states):
        raise Refused(known.stored)  # it failed, and its row was not sent back to be tried again
    if known and runs and state == stage.held((known.from_step, known.from_status)):
        taken_from, moves = (known.from_step, known.from_status), False
    elif fits and state in stage.states:
        taken_from, moves = state, stage.running
    elif state == (stage.name, "running"):
        raise refusal(409, "another request works on this row", id=request.row_id)
    else:
        raise refused_in(request, state, fits)
    step, status = taken_from
    given = {"owner": owner, "owner_before": known.owner if known else ""}
    cursor.execute(CLAIM, request.values | given | {"from_step": step, "from_status": status})
    if cursor.rowcount != 1:
        raise running(request)
    if moves and not move(cursor, request, taken_from, stage.held(taken_from)):
        raise refusal(409, "another transaction has just moved this row", id=request.row_id)
    return taken_from


def find(cursor: Any, request: Request) -> tuple:
    """The step and status of the row, and whether the stage's `where` is true of it.

    Raises:
        Refused: 422 where there is no such row.
    """
    stage = request.stage
    try:
        found = rows(cursor, stage.sql(FIND), request.values)
    except Exception as error:
        if (sqlstate(error) or "").startswith("22"):  # an id that its column cannot hold
            raise refusal(422, one_line(error), id=request.row_id) from error
        raise
    if not found:
        raise refusal(422, f"no row of {stage.table} has this {stage.id}", id=request.row_id)
    return found[0]


def move(cursor: Any, request: Request, before: tuple, after: tuple) -> bool:
    """Set the row's state to `after` if it is `before`; whether it was."""
    states = dict(from_step=before[0], from_status=before[1], to_step=after[0], to_status=after[1])
    cursor.execute(request.stage.sql(MOVE), request.values | states)
    return cursor.rowcount == 1


def running(request: Request) -> Running:
    error = "this request is being worked on"
    return Running(json_answer(409, error=error, stage=request.stage.name, id=request.row_id))


def refused_in(request: Request, state: tuple, fits: bool) -> Refused:
    stage = request.stage
    error = f"the row is in ({state[0]}, {state[1]})"
    if state in stage.states and not fits:
        return refusal(412, f"{error}, but not {stage.where}", id=request.row_id)
    wanted = " or ".join(f"({step}, {status})" for step, status in stage.states)
    return refusal(412, f"{error}; {stage.name} needs {wanted}", id=request.row_id)


# --- finishing -----------------------------------------------------------------------------


class TakenOver(Exception):
    """Another owner has taken the request over; this one must not finish it."""


class Moved(Exception):
    """Somebody has set the row's state meanwhile."""


# The fence: only the present owner of the request can finish it.
FINISH = """
UPDATE stage_requests
SET state = %(state)s, http_status = %(http_status)s, answer = %(answer)s, finished_at = now()
WHERE key = %(key)s AND owner = %(owner)s AND state = 'running'"""


def finish(
    cursor: Any, request: Request, owner: str, taken_from: tuple, state: str, answer: Answer,
    writes: list[tuple[Any, Any]],
) -> Answer:  # fmt: skip
    """Set request and row to `state` and run `writes`; returns the stored answer.

    Raises:
        TakenOver, Moved: the transaction is to be rolled back.
    """
    values = {"state": state, "http_status": answer.status, "answer": answer.body.decode()}
    cursor.execute(FINISH, {"key": request.key, "owner": owner} | values)
    if cursor.rowcount != 1:
        known = read(cursor, request.key)
        if known and known.stored and known.owner == owner:
            return known.stored  # we finished it in a commit whose answer was lost
        raise TakenOver
    stage = request.stage
    if not move(cursor, request, stage.held(taken_from), (stage.name, state)):
        raise Moved
    for statement, params in writes:
        if callable(statement):
            call_within(cursor, statement)
        else:
            cursor.execute(statement, params)
    return answer


TRANSACTION = "SELECT pg_current_xact_id()::text"


def call_within(cursor: Any, function: Callable[[Any], Any]) -> None:
    """function(cursor), which must neither commit nor roll back.

    Raises:
        RuntimeError: it did.
    """
    began = rows(cursor, TRANSACTION, {})
    function(cursor)
    if rows(cursor, TRANSACTION, {}) != began:
        name = getattr(function, "__name__", function)
        raise RuntimeError(f"{name} has ended the transaction that it was to write in")


GIVE_UP = """
UPDATE stage_requests SET state = 'abandoned', finished_at = now()
WHERE key = %(key)s AND owner = %(owner)s AND state = 'running'"""


def give_up(cursor: Any, request: Request, owner: str) -> None:
    cursor.execute(GIVE_UP, {"key": request.key, "owner": owner})


# --- what was lost with its process --------------------------------------------------------

# With lost_after = 0 the lock of a request decides whether it is lost, so its time is not asked
# for: the clock may have been set back since.
RUNNING = """
SELECT key, owner, row_id FROM stage_requests
WHERE stage = %(stage)s AND table_name = %(table)s AND state = 'running'
  AND (%(lost_after)s = 0
       OR started_at < clock_timestamp() - make_interval(secs => %(lost_after)s))"""

ABANDON = """
UPDATE stage_requests SET state = 'abandoned', sent_back = sent_back + 1, finished_at = now()
WHERE key = %(key)s AND owner = %(owner)s AND state = 'running'
RETURNING row_id, from_step, from_status"""

# Deaths before the row was last done are of work that has succeeded since: they do not count.
SENT_BACK = """
SELECT coalesce(sum(sent_back), 0) FROM stage_requests
WHERE row_id = %(id)s AND stage = %(stage)s AND table_name = %(table)s
  AND started_at > coalesce((
      SELECT max(finished_at) FROM stage_requests
      WHERE row_id = %(id)s AND stage = %(stage)s AND table_name = %(table)s AND state = 'done'
  ), '-infinity')"""

# Also counts from 0 again: a person who sends the row back gives it all attempts again.
FAIL = """
UPDATE stage_requests
SET sent_back = 0, state = CASE key WHEN %(key)s THEN 'failed' ELSE state END,
    http_status = CASE key WHEN %(key)s THEN 500 ELSE http_status END,
    answer = CASE key WHEN %(key)s THEN %(answer)s ELSE answer END
WHERE row_id = %(id)s AND stage = %(stage)s AND table_name = %(table)s"""

FORGET = """
DELETE FROM stage_requests
WHERE state <> 'running' AND finished_at < now() - make_interval(days => %(days)s)"""


def running_keys(cursor: Any, stage: Stage, lost_after: float) -> list[tuple]:
    """Key, owner and row of the stage's requests that have run for `lost_after` seconds."""
    given = {"stage": stage.name, "table": stage.table, "lost_after": float(lost_after)}
    return rows(cursor, RUNNING, given)


def send_back(cursor: Any, stage: Stage, key: str, owner: str, most: int) -> tuple | None:
    """Give a request up and set its row back; to failed if that was done `most` times already.

    Returns:
        The row's id and its new state; None where somebody else owns or has finished the request,
        or has moved the row.
    """
    lost = rows(cursor, ABANDON, {"key": key, "owner": owner})
    if not lost:
        return None
    [(row_id, *taken_from)] = lost
    request = Request(stage, key, {}, row_id)
    after = tuple(taken_from)
    if rows(cursor, SENT_BACK, request.values)[0][0] > most:
        error = f"its process died {most + 1} times"
        answer = json_answer(500, status="failed", error=error).body.decode()
        cursor.execute(FAIL, request.values | {"answer": answer})
        after = (stage.name, "failed")
    return (row_id, after) if move(cursor, request, (stage.name, "running"), after) else None


def forget(cursor: Any, days: int) -> None:
    cursor.execute(FORGET, {"days": days})
