"""For tests of stage functions: no database, no stage API, nothing to install.

    def test_overlay_sends_the_text():
        api = FakeStageApi()
        rows = {"job_inputs": {"text": "오늘의 커피"}}
        overlay(make_call(api, ("planner", "done"), rows=rows))
        [request] = api.requests
        assert request.path == "/api/yh/overlay"
        assert request.body["text"] == "오늘의 커피"

docs/STAGES.md, "Testing a stage", has more.
"""

import json
import math
import re
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psycopg2.extras import NamedTupleCursor

import config
import pipeline
from pipeline import JOBS, Call, State
from stage_http import Answer, StageApi

__all__ = ["Answer", "FakeStageApi", "OfflineCall", "Query", "Request", "make_call"]

JOB_ID = "00000000-0000-4000-8000-000000000001"
ROW_ID = "00000000-0000-4000-8000-000000000002"  # of a row that has a parent

# What a query finds: a row, several, or none.
Found = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


# --- the stage API -------------------------------------------------------------------------


class Request(NamedTuple):
    """A request as a stage API gets it.

    path: without STAGE_API_URL.
    body: read from the JSON, so that a UUID is its text.
    headers: all of them; case does not matter.
    """

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]


class FakeStageApi(StageApi):
    """Keeps each request in `requests`, and answers.

    Args:
        answers: one after the other, and then the last again and again; 200 if there is none. Each
            is a status, an Answer, or an exception to raise, such as stage_http.NoAnswer().
        settings: by name, as in .env: STAGE_API_URL, STAGE_API_TOKEN, STAGE_API_SECRET.
    """

    def __init__(
        self, *answers: int | Answer | Exception, settings: Mapping[str, str] | None = None
    ):
        super().__init__(config.read(settings or {}))
        self.answers = list(answers or [200])
        self.requests: list[Request] = []

    def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        seconds: float,
        data: bytes | None = None,
    ) -> Answer:
        sent = self.request(method, path, headers, data)
        self.requests.append(Request(path, json.loads(data or b"{}"), sent.headers))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer) if isinstance(answer, int) else answer


# --- the call ------------------------------------------------------------------------------


class Query(NamedTuple):
    """A query of a stage function."""

    sql: str
    params: dict[str, Any]


# What psycopg2 replaces; any other % it refuses.
PLACEHOLDER = re.compile(r"%(?:%|\(([^)]*)\)s)")


@dataclass
class OfflineCall(Call):
    """A call that answers queries from `rows`, and keeps them in `queries`."""

    rows: Mapping[str, Found] = field(default_factory=dict)
    queries: list[Query] = field(default_factory=list)

    def query(self, sql: str, params: dict[str, Any], cursor: type = NamedTupleCursor) -> list:
        query = Query(sql, self.values | params)
        self.queries.append(query)
        said = " ".join(sql.split())
        for name in PLACEHOLDER.findall(sql):
            if name and name not in query.params:
                raise LookupError(f"no value for %({name})s in: {said}")
        if "%" in PLACEHOLDER.sub("", sql):
            raise ValueError(f"a % that is neither %(name)s nor %% in: {said}")
        if cursor is NamedTupleCursor:
            return [named(one) for one in self.found(said)]
        return [tuple(one.values()) for one in self.found(said)]

    def look_up(self, sql: str, params: dict[str, Any]) -> list:
        """No rows: a declared trace is not looked up, so that no test needs a row for it."""
        return []

    def found(self, sql: str) -> Sequence[Mapping[str, Any]]:
        fitting = [text for text in self.rows if " ".join(text.split()) in sql]
        if len(fitting) != 1:
            how = "several of rows fit" if fitting else f"none of rows={list(self.rows)} fits"
            raise LookupError(f"{how} this query: {sql}")
        found = self.rows[fitting[0]]
        return [found] if isinstance(found, Mapping) else found or []


def named(columns: Mapping[str, Any]) -> Any:
    """The row as psycopg2 names its columns, which raises ValueError for a keyword of Python."""
    names = [re.sub(r"\W", "_", name) for name in columns]
    names = [f"f{name}" if re.match("[_0-9]", name) else name for name in names]
    return namedtuple("Record", names)(*columns.values())


def make_call(
    api: StageApi | None = None,
    state: State | tuple[str, str] = ("step", "done"),
    *,
    rows: Mapping[str, Found] | None = None,
    ids: Mapping[str, Any] | None = None,
    settings: Mapping[str, str] | None = None,
    **fields: Any,
) -> OfflineCall:
    """A call as the listener hands it to a stage function.

    Args:
        api: whom it posts to; a FakeStageApi() of its own where it is left out.
        state: the key of PIPELINE; it says whose ids the body begins with.
        rows: what queries find. The key is a text that only one query of the function has, such as
            the name of its table; the value is the row as a dict, a list of rows, or None: no row.
        ids: ids by the names of their columns, where others are wanted than those made up.
        settings: by name, as in .env; others have their defaults.
        fields: of the Call, such as tenant_id, attempt=2 or stage="overlay".

    Raises:
        ValueError: `state` is none, or its rows have no such id.
    """
    pipeline.check({state: make_call})
    route = pipeline.route_of(state)
    table = pipeline.owner(state) if isinstance(state, State) else JOBS
    columns = dict(zip(table.ids, (ROW_ID, JOB_ID) if table.parent else (JOB_ID,), strict=True))
    if unknown := [name for name in ids or {} if name not in columns]:
        raise ValueError(f"ids={unknown}: a row of {route.table} has {' and '.join(columns)}")
    columns |= ids or {}
    if "job_id" in fields:
        columns[table.ids[-1]] = fields["job_id"]
    given: dict[str, Any] = {
        "job_id": columns[table.ids[-1]],
        "tenant_id": "tenant",
        "current_step": route.step,
        "status": route.status,
        "stage": "stage",
        "call_id": 1,
        "attempt": 1,
        "spent": fields.get("attempt", 1),
        "max_attempts": 5,
        "timeout": 30.0,
        "started_at": "2026-01-01 00:00:00+00",
        "listener": "test",
        "key": str(columns[table.id]),
        "leased_until": math.inf,
        "table": route.table,
        "join": route.join,
        "ids": columns,
        "api": api or FakeStageApi(settings=settings),
        "settings": config.read(settings or {}),
        "until": math.inf,
        "rows": rows or {},
    }
    return OfflineCall(**given | fields)
