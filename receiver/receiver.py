"""Receiver: what a stage API calls with each request; Job: what its work is given."""

import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from .answers import Answer, Failed, Refused, Running, json_answer, one_line, refusal
from .rows import (
    Moved,
    Request,
    Stage,
    TakenOver,
    finish,
    forget,
    give_up,
    read,
    running,
    running_keys,
    send_back,
    take,
)
from .session import CONFLICT, LOCK_BRIEFLY, Session, is_lost, rows
from .signature import keys_of, verify

log = logging.getLogger("receiver")

SCHEMA = Path(__file__).with_name("schema.sql")
# CREATE TABLE IF NOT EXISTS can fail where two processes run it at once: the second one waits.
ALONE = "SELECT pg_advisory_xact_lock(hashtextextended('stage_requests schema', 0))"
# CREATE TABLE IF NOT EXISTS needs CREATE on the schema even where the table is there.
IS_MISSING = "SELECT to_regclass('stage_requests') IS NULL"
# recover() waits once for so long for a row that is locked, so that it gets to the others.
WAIT_BRIEFLY = "SET LOCAL lock_timeout = '1s'"
# What no database takes in a text: NUL, and half of a surrogate pair.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
# Seconds for which a request that is not taken yet waits for the database.
PATIENCE_TO_TAKE = 5.0


class Headers(Protocol):
    """The headers of a request, of any framework."""

    def items(self) -> Iterable[tuple[str, str]]: ...


class Job:
    """A row that a request has taken.

    id: of the row, as text. body: of the request. key: its Idempotency-Key. stage: the Stage.
    """

    def __init__(self, request: Request, session: Session, owner: str, taken_from: tuple):
        self.id, self.body, self.key = request.row_id, request.body, request.key
        self.stage = request.stage
        self._request, self._session = request, session
        self._owner, self._taken_from = owner, taken_from
        self._writes: list[tuple[Any, Any]] = []

    def write(self, statement: str | Callable[[Any], Any], params: Any = None) -> None:
        """Have this executed in the transaction that sets the row done, in the order given.

        Args:
            statement: SQL with its `params` as the driver takes them, or a function that is given
                a cursor of that transaction. Where the database is lost in between, it is called
                again in another one.
        """
        self._writes.append((statement, params))

    def run(self, work: Callable[["Job"], dict | None]) -> Answer:
        """Run `work`, set the row done or failed, store the answer and return it.

        No transaction is open while `work` runs. What it returns is the answer's JSON. Where it
        raises, the row is set to failed, and nothing of what it wanted to write is written.
        """
        try:
            try:
                state, answer = "done", json_answer(200, **(work(self) or {"status": "done"}))
            except Exception as error:
                state, answer = "failed", self._failure(error)
            try:
                return self._finish(state, answer)
            except Exception as error:
                if isinstance(error, (TakenOver, Moved)) or is_lost(error) or state == "failed":
                    raise
                return self._finish("failed", self._failure(error))  # a write of `work` failed
        except TakenOver:
            return self._overtaken()
        except Moved:
            return self._set_aside()
        except Exception as error:
            if not is_lost(error):
                # Logged here as well: in a pool of threads nobody asks for the exception.
                log.exception("%s %s could not be finished", self.stage.name, self.id)
                raise
            log.error("%s %s: the database is away, nothing is finished", self.stage.name, self.id)
            return json_answer(503, error=f"database: {one_line(error)}")
        finally:
            self._session.close()

    def _finish(self, state: str, answer: Answer) -> Answer:
        writes = self._writes if state == "done" else []
        mine = self._request, self._owner, self._taken_from
        return self._session.transaction(lambda c: finish(c, *mine, state, answer, writes))

    def _failure(self, error: Exception) -> Answer:
        if isinstance(error, Failed):
            return json_answer(error.status, status="failed", error=str(error))
        log.error("%s %s failed", self.stage.name, self.id, exc_info=error)
        return json_answer(500, status="failed", error=one_line(error))

    def _overtaken(self) -> Answer:
        """The answer where another owner has taken the request over meanwhile."""
        log.warning("%s %s was taken over; this work is dropped", self.stage.name, self.id)
        known = self._session.transaction(lambda cursor: read(cursor, self.key))
        return (known and known.stored) or running(self._request).answer

    def _set_aside(self) -> Answer:
        """Give the request up where somebody has moved its row meanwhile."""
        self._session.transaction(lambda c: give_up(c, self._request, self._owner))
        step, status = self.stage.held(self._taken_from)
        error = f"the row was moved out of ({step}, {status}) meanwhile; nothing was written"
        return refusal(412, error, id=self.id).answer


@dataclass
class Receiver:
    """Takes requests for stages.

    Args:
        connect: makes a connection of the DB-API, which nobody else uses until `release`.
        release: closes it, where none is given. A pool has both: pool.getconn, pool.putconn.
        secrets: `whsec_…` of the signatures, several while one is changed. None: not checked.
        lost_after: None: a request is taken for lost once the session that works on it is gone,
            as its advisory lock is free then. Seconds, where a pooler keeps no sessions: once it
            has run for so long. No connection is held while the work runs, then.
        patience: seconds for which finished work waits for a database that is away.
        most_deaths: so often `recover` sends a row back whose process died; then it sets it failed.
        keep_days: for which answers are remembered.

    Raises:
        SecretError
    """

    connect: Callable[[], Any]
    release: Callable[[Any], Any] = lambda connection: connection.close()
    secrets: str | Iterable[str] | None = field(default=None, repr=False)
    lost_after: float | None = None
    patience: float = 60.0
    most_deaths: int = 3
    keep_days: int = 30
    keys: list[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.keys = keys_of(self.secrets)

    def run(
        self,
        stage: Stage,
        headers: Headers,
        body: bytes,
        work: Callable[[Job], dict | None],
    ) -> Answer:
        """Take the row, work, and answer when that is over. See Job.run.

        Args:
            headers: of the request; the case of their names does not matter.
            body: the bytes as they arrived, which the signature is about.
        """
        try:
            return self.take(self.request(stage, headers, body)).run(work)
        except Refused as refused:
            return refused.answer

    def begin(self, stage: Stage, headers: Headers, body: bytes) -> tuple[Answer, Job | None]:
        """Take the row and answer 202; job.run(work) is to follow, in any thread.

        Returns:
            The answer, and the job, which is None where there is nothing to do. A repeated request
            is answered with 202 until the work is over, then with the stored answer.
        """
        try:
            job = self.take(self.request(stage, headers, body))
        except Running as being_done:
            return being_done.answer._replace(status=202), None
        except Refused as refused:
            return refused.answer, None
        return json_answer(202, status="running", stage=stage.name, id=job.id), job

    def request(self, stage: Stage, headers: Headers, body: bytes) -> Request:
        """The request, where its signature and its body are right.

        Raises:
            Refused: 401, 422 or 503.
        """
        given = {name.lower(): value for name, value in headers.items()}
        key = given.get("idempotency-key")
        if self.keys:
            verify(self.keys, given, body, time.time())
            if key not in (None, given["webhook-id"]):
                raise refusal(401, "Idempotency-Key is not the webhook-id that was signed")
            key = given["webhook-id"]
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        row_id = content.get(stage.id) if isinstance(content, dict) else None
        if not isinstance(row_id, (str, int)):
            raise refusal(422, f"expected a JSON object with {stage.id}")
        # Without a key, only the state of the row tells whether the request was done before.
        request = Request(stage, key or str(uuid.uuid4()), content, str(row_id))
        if any(value and NO_TEXT.search(value) for value in request.values.values()):
            raise refusal(422, "a value has NUL, or half of a surrogate pair, which no row has")
        return request

    def take(self, request: Request) -> Job:
        """Take the row of a request.

        Raises:
            Refused: see rows.take; 503 where the database is away.
        """
        session = self.session(PATIENCE_TO_TAKE, request.key)
        owner = uuid.uuid4().hex

        def taken(cursor: Any) -> tuple:
            known = read(cursor, request.key, self.lost_after or 0)
            runs = known is not None and known.state == "running" and not known.is_late
            is_busy = runs if self.lost_after else not session.has_lock
            return take(cursor, request, owner, known, is_busy)

        try:
            taken_from = session.transaction(taken)
        except Exception as error:
            session.close()
            if is_lost(error):
                raise refusal(503, f"database: {one_line(error)}") from error
            raise
        session.patience = self.patience
        session.rest()
        return Job(request, session, owner, taken_from)

    def session(self, patience: float, key: str | None = None) -> Session:
        return Session(self.connect, self.release, None if self.lost_after else key, patience)

    def recover(self, *stages: Stage) -> int:
        """Send back the rows whose request was lost with its process, so that they owe the call
        again; returns how many. Also forgets requests that ended more than `keep_days` ago.

        See `watch`, which calls it again and again. Of a stage with running=False nothing needs
        to be sent back.
        """
        session, sent = self.session(PATIENCE_TO_TAKE), 0
        try:
            for stage in (one for one in stages if one.running):
                asked = partial(running_keys, stage=stage, lost_after=self.lost_after or 0)
                for key, owner, row_id in session.transaction(asked):
                    lost = partial(self.sent_back, stage=stage, key=key, owner=owner)
                    try:
                        sent += session.transaction(lost, retried=CONFLICT)
                    except Exception as error:  # such as a trigger of the application's
                        if is_lost(error):
                            raise
                        text = one_line(error)
                        log.error("%s %s cannot be sent back: %s", stage.name, row_id, text)
            session.transaction(partial(forget, days=self.keep_days))
        finally:
            session.close()
        return sent

    def watch(self, *stages: Stage, every: float = 60.0) -> threading.Event:
        """Call `recover` now, and every so many seconds, in a thread of its own.

        In the process that serves: a thread does not outlive a fork. One process that does it is
        enough, any number is harmless.

        Returns:
            What ends it, once it is set.
        """
        over = threading.Event()
        threading.Thread(target=self._watch, args=(stages, every, over), daemon=True).start()
        return over

    def _watch(self, stages: tuple[Stage, ...], every: float, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self.recover(*stages)
            except Exception as error:
                log.warning("lost requests are not looked for: %s", one_line(error))
            over.wait(every)

    def sent_back(self, cursor: Any, stage: Stage, key: str, owner: str) -> bool:
        """Send one row back unless its request is still worked on; whether it was sent back."""
        cursor.execute(WAIT_BRIEFLY)
        if not self.lost_after and not rows(cursor, LOCK_BRIEFLY, {"key": key})[0][0]:
            return False
        sent = send_back(cursor, stage, key, owner, self.most_deaths)
        if sent:
            log.warning("%s %s was lost with its process; set to %s", stage.name, *sent)
        return sent is not None

    def install(self) -> None:
        """Make the table of schema.sql, where it is missing."""

        def make(cursor: Any) -> None:
            cursor.execute(ALONE)
            [(is_missing,)] = rows(cursor, IS_MISSING, {})
            if is_missing:
                cursor.execute(SCHEMA.read_text())

        session = self.session(self.patience)
        try:
            session.transaction(make)
        finally:
            session.close()
