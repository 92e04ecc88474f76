"""The stage API of a chaos run: the stand-in of the demo with every behaviour of a real one.

BEHAVIOURS lists them. Each is a function of (api, request, chance) that returns an answer, or
writes to the connection itself and raises Hangup.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from email.utils import formatdate
from random import Random

import psycopg2

from chaos import audit, families, plan
from chaos.history import Post
from demo.stage_api import STAGES, StageApi, of_jobs
from demo.stage_server import Answer, Hangup, Request, json_answer

TOO_LONG = plan.STAGE_TIMEOUT
ACCEPTED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"

OF_JOBS = {path: of_jobs(*stage, makes=audit.EFFECT) for path, stage in STAGES.items()}

# The statements of a stage that does not use the receiver.
TAKE = """
UPDATE {table} SET current_step = %(stage)s, status = 'running'
WHERE {id} = %(row_id)s AND (current_step, status) IN %(states)s"""
FINISH = """
UPDATE {table} SET status = %(result)s
WHERE {id} = %(row_id)s AND current_step = %(stage)s AND status = 'running'"""


class Pipeline(StageApi):
    """Chooses the behaviour for each request by the seed, and keeps a record of all requests.

    A listener's URL is `url_of(slot)`, so that the record says whose request it was.
    """

    def __init__(self, dsn: str, seed: int):
        super().__init__(dsn, stages=OF_JOBS | families.STAGES)
        self.seed = seed
        self.calm = threading.Event()  # set: every stage just works
        self.posts: list[Post] = []
        self._later: list[threading.Thread] = []
        self._seen: Counter[tuple] = Counter()

    @property
    def port(self) -> int:
        return self._port

    def arrived(self, request: Request) -> None:
        request.wall = time.time()
        request.behaviour = "none"
        request.key = request.headers.get("Idempotency-Key", "")
        _, slot, path = request.path.split("/", 2)
        request.slot, request.path = int(slot), f"/{path}"
        super().arrived(request)
        # A variant's own id, or else the job's.
        request.job_id = request.body.get(families.VARIANTS.id, request.job_id)

    def answer(self, request: Request) -> Answer:
        if self.closing.is_set():
            raise Hangup
        is_asynchronous = request.stage == plan.ASYNCHRONOUS
        name, chance = "work later" if is_asynchronous else "work", Random(0)
        if not self.calm.is_set():
            key = (request.job_id, request.stage)
            self._seen[key] += 1
            weights = ASYNCHRONOUS_WEIGHTS if is_asynchronous else WEIGHTS
            name, chance = plan.behaviour(self.seed, *key, self._seen[key], weights)
        request.behaviour = name
        try:
            return HOW[name](self, request, chance)
        except psycopg2.Error as error:
            return json_answer(500, error=f"database: {error}".strip())

    def finished(self, request: Request) -> None:
        self.posts.append(
            Post(
                job=request.job_id,
                stage=request.stage,
                slot=request.slot,
                key=request.key,
                attempt=int(request.headers.get("X-Attempt", 0)),
                arrived=request.wall,
                finished=time.time(),
                status=request.status,
                sent=request.sent,
                behaviour=request.behaviour,
            )
        )
        super().finished(request)
        request.headers = request.connection = None  # the request is kept; these need not be

    def work_later(self, request: Request, seconds: float, result: str = "done") -> Answer:
        """Answer 202, and do what work() does in a thread."""
        stage = self._stages[request.path]
        given = stage.takes, request.headers, request.raw
        (body, status, headers), job = self._receiver.begin(*given)
        if job:
            work = self._work_of(stage, request, result, seconds)
            self._later.append(threading.Thread(target=job.run, args=[work], daemon=True))
            self._later[-1].start()
        return Answer(status, body, headers)

    @property
    def working(self) -> int:
        """How many requests were answered with 202 and are being worked on."""
        self._later = [thread for thread in self._later if thread.is_alive()]
        return len(self._later)

    def execute(self, cursor, statement: str, request: Request, **more: object) -> None:
        """TAKE or FINISH, for the row of a request."""
        takes = self._stages[request.path].takes
        given = vars(request) | {"states": tuple(takes.states)} | more
        cursor.execute(takes.sql(statement), given)

    @contextmanager
    def transaction(self, request: Request) -> Iterator[psycopg2.extensions.cursor]:
        """A transaction in which the job is set to (stage, 'running') but not committed."""
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            self.execute(cursor, TAKE, request)
            yield cursor


def url_of(slot: int, port: int) -> str:
    return f"http://127.0.0.1:{port}/{slot}"


# --- behaviours of all stages --------------------------------------------------------------


def work(api: Pipeline, request: Request, chance: Random) -> Answer:
    return api.work(request, seconds=chance.uniform(0, 0.15))


def work_slowly(api: Pipeline, request: Request, chance: Random) -> Answer:
    return api.work(request, seconds=chance.uniform(0.3, 0.75 * TOO_LONG))


def fail(api: Pipeline, request: Request, chance: Random) -> Answer:
    return api.work(request, "failed", seconds=chance.uniform(0, 0.5))


def refuse(_api: Pipeline, _request: Request, chance: Random) -> Answer:
    """An error that says nothing was done."""
    return Answer(chance.choice([400, 404, 422, 408, 425, 500, 500, 500, 502, 302]))


def throttle(_api: Pipeline, _request: Request, chance: Random) -> Answer:
    patience = chance.choice(["1", "2", formatdate(time.time() + 2, usegmt=True), "soon", None])
    headers = {"Retry-After": patience} if patience else {}
    return Answer(chance.choice([429, 503]), headers=headers)


def hang(api: Pipeline, _request: Request, chance: Random) -> Answer:
    api.closing.wait(TOO_LONG + chance.uniform(0.2, 3))
    raise Hangup


def hang_then_work(api: Pipeline, request: Request, chance: Random) -> Answer:
    api.closing.wait(TOO_LONG + chance.uniform(0.2, 3))
    return api.work(request, seconds=0)


def answer_too_late(api: Pipeline, request: Request, chance: Random) -> Answer:
    answer = api.work(request, seconds=0)
    api.closing.wait(TOO_LONG + chance.uniform(-0.2, 1))
    return answer


def drip(api: Pipeline, request: Request, _chance: Random) -> Answer:
    """Work, then send the answer a byte at a time, for longer than the timeout."""
    request.status = api.work(request, seconds=0).status
    with suppress(OSError):
        request.connection.sendall(ACCEPTED.replace(b": 2", b": 90"))
        for _ in range(90):
            request.connection.sendall(b"x")
            if api.closing.wait(0.1):
                raise Hangup
    raise Hangup


def cut_answer(api: Pipeline, request: Request, chance: Random) -> Answer:
    request.status = api.work(request, seconds=0).status
    with suppress(OSError):
        request.connection.sendall(ACCEPTED[: chance.randrange(1, len(ACCEPTED))])
    raise Hangup


def hang_up(_api: Pipeline, _request: Request, _chance: Random) -> Answer:
    raise Hangup


def take_and_die(api: Pipeline, request: Request, chance: Random) -> Answer:
    """The job is left in 'running', until somebody puts it back."""
    with api.transaction(request) as cursor:
        cursor.connection.commit()
    api.closing.wait(chance.uniform(0, 0.3))
    raise Hangup


def accept_and_forget(_api: Pipeline, _request: Request, _chance: Random) -> Answer:
    return Answer(200)


def answer_before_commit(api: Pipeline, request: Request, chance: Random) -> Answer:
    """The answer leaves while the transaction is open; it may still be rolled back."""
    with api.transaction(request) as cursor:
        api.execute(cursor, FINISH, request, result="done")
        request.status = 200
        with suppress(psycopg2.Error, OSError):  # too late for another answer
            request.connection.sendall(ACCEPTED + b"{}")
            request.sent = True
            api.closing.wait(chance.choice([0.0, 0.3, 1.5]))
            end_by_chance(cursor, chance, 0.8)
    raise Hangup


def work_in_one_transaction(api: Pipeline, request: Request, chance: Random) -> Answer:
    """Set 'running' without committing; commit it with the result, or roll back."""
    with api.transaction(request) as cursor:
        api.closing.wait(chance.choice([0.1, 0.5, plan.LEASE + 0.5]))
        api.execute(cursor, FINISH, request, result="done")
        committed = end_by_chance(cursor, chance, 0.7)
    return Answer(200 if committed else 500)


def end_by_chance(cursor, chance: Random, commit: float) -> bool:
    committed = chance.random() < commit
    cursor.connection.commit() if committed else cursor.connection.rollback()
    return committed


# name: (how often, how)
BEHAVIOURS: dict[str, tuple[float, Callable]] = {
    "work": (60, work),
    "work slowly": (10, work_slowly),
    "fail": (3, fail),
    "refuse": (6, refuse),
    "throttle": (1, throttle),
    "hang": (2, hang),
    "hang, then work": (2, hang_then_work),
    "answer too late": (2, answer_too_late),
    "drip": (1, drip),
    "cut answer": (2, cut_answer),
    "hang up": (1, hang_up),
    "take and die": (1, take_and_die),
    "accept and forget": (1, accept_and_forget),
    "answer before commit": (4, answer_before_commit),
    "work in one transaction": (4, work_in_one_transaction),
}


# --- behaviours of asynchronous stages -----------------------------------------------------


def work_later(api: Pipeline, request: Request, chance: Random) -> Answer:
    return api.work_later(request, chance.uniform(0, 1))


def work_after_the_lease(api: Pipeline, request: Request, chance: Random) -> Answer:
    """Work for longer than the lease, so that a repeated request finds the first one at work."""
    return api.work_later(request, plan.LEASE + chance.uniform(0.2, 3))


def fail_later(api: Pipeline, request: Request, chance: Random) -> Answer:
    return api.work_later(request, chance.uniform(0, 1), "failed")


def work_before_answering(api: Pipeline, request: Request, chance: Random) -> Answer:
    """Answer 202 only after the row has moved on."""
    answer = api.work(request, seconds=0)
    api.closing.wait(chance.choice([0.0, 0.1, 0.5]))
    return Answer(202) if answer.status == 200 else answer


def fail_before_answering(api: Pipeline, request: Request, chance: Random) -> Answer:
    answer = api.work(request, "failed", seconds=0)
    api.closing.wait(chance.choice([0.0, 0.1, 0.5]))
    return Answer(202) if answer.status == 500 else answer


def take_and_forget(api: Pipeline, request: Request, _chance: Random) -> Answer:
    """The job is left in 'running', until somebody puts it back."""
    with api.transaction(request) as cursor:
        cursor.connection.commit()
    return Answer(202)


def answer_and_forget(_api: Pipeline, _request: Request, _chance: Random) -> Answer:
    return Answer(202)


ASYNCHRONOUS: dict[str, tuple[float, Callable]] = {
    "work later": (70, work_later),
    "work after the lease": (4, work_after_the_lease),
    "fail later": (4, fail_later),
    "work before the 202": (8, work_before_answering),
    "fail before the 202": (3, fail_before_answering),
    "take and forget": (2, take_and_forget),
    "answer 202 and forget": (4, answer_and_forget),
}


HOW = {name: how for name, (_, how) in (BEHAVIOURS | ASYNCHRONOUS).items()}
WEIGHTS = {name: often for name, (often, _) in BEHAVIOURS.items()}
# An asynchronous stage also has the behaviours of the others.
ASYNCHRONOUS_WEIGHTS = WEIGHTS | {name: often for name, (often, _) in ASYNCHRONOUS.items()}
ASYNCHRONOUS_WEIGHTS["work"] = 10
