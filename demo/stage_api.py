"""A stand-in for the five stage APIs, without their models: for the demo, compose and the tests.

It is built on receiver/, as a real one may be, and synchronous: it takes a job that is in the state
before the stage, commits (stage, 'running'), works for a while, commits (stage, 'done'), and only
then answers. The stages of examples/ are in stage_examples.py.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click
import psycopg2
from psycopg2.extensions import make_dsn

import config
import receiver
from demo.stage_server import Answer, Hangup, Request, StageServer, json_answer

# path: (the stage it runs, the step that must be done before it)
STAGES = {
    "/api/yh/llava/stage1/validate": ("vlm_analyze", "img_gen"),
    "/api/yh/yolo/detect": ("yolo_detect", "vlm_analyze"),
    "/api/yh/planner": ("planner", "yolo_detect"),
    "/api/yh/overlay": ("overlay", "planner"),
    "/api/yh/llava/stage2/judge": ("vlm_judge", "overlay"),
}

# Seconds of pretended work: about a tenth of what the models take.
DELAYS = dict(vlm_analyze=1.8, yolo_detect=0.5, planner=0.9, overlay=0.4, vlm_judge=1.4)


@dataclass(frozen=True)
class Stage:
    """A stage of the stand-in.

    takes: its name, and which rows it takes.
    needs: what the body must hold besides the ids.
    fails: how many times it sets a row to failed before it succeeds.
    makes: an SQL statement that writes the stage's result, with the values of a receiver.Request.
    """

    takes: receiver.Stage
    needs: tuple[str, ...] = ()
    fails: int = 0
    makes: str | None = None

    @property
    def name(self) -> str:
        return self.takes.name


def of_jobs(name: str, before: str, **more: Any) -> Stage:
    """A stage that takes jobs from (before, 'done')."""
    return Stage(receiver.Stage(name, after=(before, "done")), **more)


CONNECTION_LOST = (psycopg2.OperationalError, psycopg2.InterfaceError)

Behaviour = Callable[[Request], Answer | None]


class StageApi:
    """All stages on one port, in threads of this process; a context manager.

    stages: by path; the five where none are given.
    delay: seconds a stage works, a number or a function of the stage's name.
    port: 0 picks a free one, which stays the same over close() and start().
    log: called with every finished Request.
    """

    def __init__(
        self,
        dsn: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        delay: float | Callable[[str], float] = 0.0,
        log: Callable[[Request], None] = lambda request: None,
        stages: dict[str, Stage] | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._dsn, self._host, self._port, self._log = dsn, host, port, log
        self._delay = delay if callable(delay) else lambda stage: delay
        self._stages = stages or {path: of_jobs(*names) for path, names in STAGES.items()}
        self._failed: Counter[tuple[str, str]] = Counter()
        self._behaviours: dict[str, Behaviour | None] = {}
        self._changed = threading.Condition()
        self._idle: list[psycopg2.extensions.connection] = []
        self._receiver = receiver.Receiver(self._take_connection, self._idle.append, patience=30)
        self._is_installed = False
        self._server: StageServer | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def start(self) -> "StageApi":
        """Serve in the background. Raises OSError when host and port cannot be had."""
        self.closing.clear()
        with suppress(psycopg2.Error):  # else with the first call
            self.install()
        self._server = StageServer((self._host, self._port), self)
        self._port = self._server.server_address[1]
        return self

    def close(self, grace: float = 1.0) -> None:
        """Refuse new calls, let those under way end within `grace` seconds, then cut all."""
        self.closing.set()
        if self._server:
            self._server.stop_accepting()
            with suppress(TimeoutError):
                self.wait_for(lambda api: all(r.finished for r in api.requests), grace)
            self._server.cut_connections()
            self._server = None
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> "StageApi":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def on(self, stage: str, behaviour: Behaviour | None) -> None:
        """Let behaviour(request) answer for a stage, or for a path that has none; None ends that.

        Where it returns None the stage works as usual. It may call work() itself, change the job
        through connect(), wait for `closing`, write to request.connection, or raise Hangup.
        """
        self._behaviours[stage] = behaviour

    def connect(self) -> psycopg2.extensions.connection:
        """A new connection to the database of the jobs; nothing is committed unless you do."""
        return psycopg2.connect(self._dsn, application_name="stage-api", connect_timeout=5)

    def calls(self, job_id: str | None = None, stage: str | None = None) -> list[Request]:
        """The requests so far in order of arrival, of one job or one stage where given."""
        wanted = [r for r in list(self.requests) if job_id in (None, r.job_id)]
        return [r for r in wanted if stage in (None, r.stage)]

    def wait_for(self, predicate: Callable[["StageApi"], object], timeout: float = 60) -> None:
        """Block until predicate(api) is true; it is called whenever a request arrives or ends."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout):
                seen = ", ".join(map(str, self.requests)) or "none"
                raise TimeoutError(f"not within {timeout} s; requests: {seen}")

    def arrived(self, request: Request) -> None:
        if stage := self._stages.get(request.path):
            request.stage, request.row_id = stage.name, request.id_in(stage.takes.id)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def finished(self, request: Request) -> None:
        """Note that the answer was sent, or will never be."""
        with self._changed:
            request.finished = time.monotonic()
            self._changed.notify_all()
        self._log(request)

    def answer(self, request: Request) -> Answer:
        behaviour = self._behaviours.get(request.stage or request.path)
        answer = behaviour and behaviour(request)
        if not answer and self.closing.is_set():
            raise Hangup
        return answer or self.work(request)

    def work(self, request: Request, result: str = "done", seconds: float | None = None) -> Answer:
        """Run the stage: take the job if it may, work, commit `result` ('done' or 'failed').

        seconds: how long it works, if not for the stage's delay.
        """
        stage = self._stages.get(request.path)
        if stage is None:
            return json_answer(404, error=f"no stage at {request.path}")
        if missing := [name for name in stage.needs if request.body.get(name) is None]:
            return json_answer(422, error=f"expected {', '.join(missing)}")

        run = self._work_of(stage, request, result, seconds)
        body, status, headers = self._receiver.run(stage.takes, request.headers, request.raw, run)
        return Answer(status, body, headers)

    def _work_of(
        self, stage: Stage, request: Request, result: str, seconds: float | None
    ) -> Callable[[receiver.Job], dict]:
        """What a Receiver runs for a request; see work()."""

        def run(job: receiver.Job) -> dict:
            self.closing.wait(self._delay(stage.name) if seconds is None else seconds)
            if self._result(stage, request, result) == "failed":
                raise receiver.Failed(f"{stage.name} failed")
            if stage.makes:
                job.write(stage.makes, vars(request))
            return {"job_id": request.job_id, "stage": stage.name, "status": "done"}

        return run

    def _result(self, stage: Stage, request: Request, asked: str) -> str:
        """The state to set: 'failed' in the first `stage.fails` calls of a row, then `asked`."""
        key = (stage.name, request.row_id)
        if self._failed[key] >= stage.fails:
            return asked
        self._failed[key] += 1
        return "failed"

    def install(self) -> None:
        """Make the receiver's table, where it is missing."""
        if not self._is_installed:
            receiver.Receiver(self.connect, patience=0).install()
            self._is_installed = True

    def watch(self) -> None:
        """Send rows back, now and then, that a process which died has left running."""
        self._receiver.watch(*(stage.takes for stage in self._stages.values()))

    def _take_connection(self) -> psycopg2.extensions.connection:
        self.install()
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if not connection.closed:
                    return connection
        return self.connect()


def database_from_environment() -> str | None:
    """The connection string in DATABASE_URL or of DB_HOST, DB_PORT and so on; no `.env` is read."""
    given = config.read(os.environ)
    if given.DATABASE_URL or not given.DB_HOST:
        return given.DATABASE_URL
    where = {"host": given.DB_HOST, "port": given.DB_PORT, "dbname": given.DB_NAME}
    return make_dsn(**where, user=given.DB_USER, password=given.DB_PASSWORD)


def print_line(request: Request) -> None:
    work = f"{request.stage or request.path} {request.status or 'no answer'}"
    seconds = request.finished - request.time
    print(f"{time.strftime('%H:%M:%S')} {request.job_id} {work} {seconds:.2f}s", flush=True)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8011, show_default=True, type=click.IntRange(0, 65535))
@click.option("--delay-scale", default=1.0, show_default=True, type=click.FloatRange(0))
def main(host: str, port: int, delay_scale: float) -> None:
    """Serve until SIGTERM or Ctrl-C, on the database of DATABASE_URL or DB_HOST, DB_PORT, …

    A delay scale of 10 is about as slow as the real models, 0 does not wait at all.
    """
    # Signals are blocked before any thread starts, so that only sigwait() below receives them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        dsn = database_from_environment()
    except config.SettingsError as error:
        sys.exit(f"stage API: {error}")
    if not dsn:
        sys.exit("stage API: no database is set: give DATABASE_URL or DB_HOST")
    delay = {stage: seconds * delay_scale for stage, seconds in DELAYS.items()}.__getitem__
    api = StageApi(dsn, host=host, port=port, delay=delay, log=print_line)
    try:
        api.start()
    except OSError as error:
        sys.exit(f"stage API: cannot listen on {host}:{port}: {error.strerror}")
    api.watch()
    print(f"stage API on {api.url}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    api.close(grace=5)


if __name__ == "__main__":
    main()
