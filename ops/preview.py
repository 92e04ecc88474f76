"""`call JOB_ID --dry-run`: prints what the stage function would send."""

import contextlib
import inspect
import io
import json
import math
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import click
import requests
import urllib3
from requests.adapters import HTTPAdapter

import config
import db
import pipeline
import trigger
from logs import CONTROL
from ops import rows, steer
from ops.problem import IF_NEWER, INSTALL, Problem

# The columns of a claim (see calls.CLAIM_DUE) that a call is made of.
NEXT_ATTEMPT = """
SELECT c.call_id, c.job_id, c.job_id::text AS key, c.table_name, c.join_of, c.current_step,
       c.status, c.stage, c.attempts + 1 AS attempt, c.attempts - c.free_attempts + 1 AS spent,
       now()::text AS started_at, extract(epoch FROM c.created_at)::float8 AS recorded_at,
       false AS after_hold, at.tenant_id, at.parent_id
FROM stage_calls AS c
LEFT JOIN LATERAL stage_call_row(c.table_name, c.join_of, c.job_id) AS at ON true
WHERE c.job_id = %(key)s AND c.table_name = %(table)s AND c.call_id = %(call_id)s
"""


def show(conn, settings: SimpleNamespace, row: Any, stage: str | None) -> None:
    """Run the stage function of the call that a row (see rows.find) owes, and print each request
    that it makes instead of sending it. It gets 200 without a body as the answer.

    Raises:
        Problem: the row owes no call (to `stage`) or several; or the function fails.
    """
    call = next_attempt(conn, settings, row, stage)
    redact = config.redactor(settings)
    shown: list[requests.PreparedRequest] = []

    def keep(request: requests.PreparedRequest) -> None:
        click.echo(("\n" if shown else "") + as_text(request, redact))
        shown.append(request)

    try:
        with db.without_callback(), nothing_sent(keep):
            trigger.call_function(call, pipeline.routes())
    except db.ConnectionLost:
        raise
    except (Exception, SystemExit) as error:
        after = ", after the answer 200 without a body that --dry-run gave it" if shown else ""
        raise Problem(f"stage function {call.stage}: {described(call, error)}{after}") from None
    what = "nothing was sent" if shown else "the stage function sends nothing"
    click.echo(f"dry run: {what}, and nothing claimed", err=True)


def next_attempt(conn, settings: SimpleNamespace, row: Any, stage: str | None) -> pipeline.Call:
    """The call that `row` owes as it would be made now; it is not claimed."""
    rows.require_readable(row)
    chosen = rows.one_owed(conn, row, stage)
    given = {"key": row.key, "table": row.table_name, "call_id": chosen and chosen.call_id}
    owed = db.execute(conn, NEXT_ATTEMPT, given).fetchone()
    if owed is None:
        raise Problem(steer.why_nothing_owed(conn, row, stage))
    rows.require_state(row, chosen)
    limits = pipeline.full_limits(settings).get(owed.stage)
    if limits is None:
        raise Problem(f"PIPELINE has no stage {owed.stage}: {INSTALL}, {IF_NEWER}")
    call = pipeline.claimed_call(owed, limits, "dry run", leased_from=math.inf)
    call.api, call.settings = pipeline.stage_apis(settings)[owed.stage], settings
    call.until = math.inf
    return call


def described(call: pipeline.Call, error: BaseException) -> str:
    """An exception of the stage function, and the line of its file where it arose."""
    text = f"{type(error).__name__}: {error}"
    file = inspect.getsourcefile(pipeline.routes().get(call.route, trigger.call_function))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f"{text} ({file}:{lines[-1]})" if lines else text


# --- nothing is sent -----------------------------------------------------------------------


class WouldConnect(Exception):
    """Raised where the stage function opens a connection of its own."""


@contextlib.contextmanager
def nothing_sent(keep: Callable[[requests.PreparedRequest], None]) -> Iterator[None]:
    """Pass each request of call.post and of `requests` to `keep`, and refuse all other connections.

    A library that does not use Python's sockets, such as psycopg2, can still connect.
    """

    def send(adapter: HTTPAdapter, request: requests.PreparedRequest, *_: Any, **__: Any):
        keep(request)
        head = {"Content-Length": "0"}
        empty = urllib3.HTTPResponse(io.BytesIO(), head, 200, preload_content=False)
        return adapter.build_response(request, empty)

    def connect(_: socket.socket, address: Any):
        raise WouldConnect(f"it connects to {address} by itself, which --dry-run does not let it")

    # Methods of the classes are replaced, as the function may make sessions and sockets of its own.
    with (
        mock.patch.object(HTTPAdapter, "send", send),
        mock.patch.object(socket.socket, "connect", connect),
        mock.patch.object(socket.socket, "connect_ex", connect),
    ):
        yield


# --- on the screen -------------------------------------------------------------------------

SECRET = re.compile(r"(?i)auth|cookie|token|secret|password|api-?key")


def as_text(request: requests.PreparedRequest, redact: Callable[[str], str]) -> str:
    """Method, URL, headers and body, without secrets."""
    lines = [f"{request.method} {request.url}"]
    for name, value in request.headers.items():
        value = value if isinstance(value, str) else value.decode("latin-1")
        lines.append(f"{name}: {'***' if SECRET.search(name) else value}")
    lines += ["", *readable(request.body).split("\n")]
    return "\n".join(redact(line).translate(CONTROL) for line in lines)


def readable(body: Any) -> str:
    """JSON with indentation and letters as they are; anything else as it is."""
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    with contextlib.suppress(TypeError, ValueError):
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    return str(body or "")
