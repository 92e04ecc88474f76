"""The stage API of `python -m chaos once`, built on receiver/ and killed on purpose.

    python -m chaos.once_api SOCKET CHILDREN

SOCKET is the number of a file descriptor that listens; DSN in the environment is the database. Each
child serves one request at a time, and another takes its place when it dies. All end when standard
input does.

What happens to a request is in the table `planned`: the first row of its job is taken from there, a
`moment` (see moments.py) and what is done then. The effect of a request is a row of `effects`.
"""

import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from contextlib import closing, suppress
from socketserver import TCPServer

import psycopg2

from chaos.moments import Watched, Wire
from chaos.once_pipeline import ANSWERED_FIRST, LATE, STAGES, TIMED
from demo.stage_server import Answer, Hangup, Request
from demo.stage_server import Handler as KeepAlive
from receiver import Receiver
from receiver.receiver import Job

TABLES = """
CREATE TABLE planned (number serial PRIMARY KEY, job_id text, moment integer, what text);
CREATE INDEX ON planned (job_id);
CREATE TABLE effects (job_id text);
CREATE TABLE happened (job_id text, moment integer, what text);
"""
# Written before the fault, as a process that is killed cannot write it any more.
NEXT = """
WITH one AS (
    DELETE FROM planned WHERE number = (SELECT min(number) FROM planned WHERE job_id = %(job)s)
    RETURNING job_id, moment, what)
INSERT INTO happened SELECT * FROM one RETURNING moment, what"""
EFFECT = "INSERT INTO effects VALUES (%s)"
AT_THE_END = ("drop", "answer late")
SECONDS = 2.5  # longer than LATE and than the listener waits


class Planned:
    """A request, and what is planned for it."""

    def __init__(self, api: "Api", request: Request):
        self.api, self.request = api, request
        self.moment, self.what = api.next(request.job_id)
        self.connect = Watched(api.connect, self.happens)

    def happens(self, moment: int, wire: Wire) -> None:
        if moment == self.moment and self.what not in AT_THE_END:
            getattr(self, self.what)(wire)

    def kill(self, wire: Wire) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(self, wire: Wire) -> None:
        wire.cut()

    def freeze(self, wire: Wire) -> None:
        time.sleep(SECONDS)

    def repeat(self, wire: Wire) -> None:
        """Send the same request once more, to another child."""
        threading.Thread(target=self.api.send_again, args=[self.request], daemon=True).start()
        time.sleep(0.1)

    def answer(self) -> Answer:
        stage = STAGES[self.request.path.strip("/")]
        late = LATE if stage.name in TIMED else None
        receiver = Receiver(self.connect, lost_after=late, patience=30, most_deaths=1000)
        given = stage, self.request.headers, self.request.raw
        if stage.name == ANSWERED_FIRST:
            body, status, headers = self.begin(receiver, given)
        else:
            body, status, headers = receiver.run(*given, work)
        if self.what == "drop":
            raise Hangup
        if self.what == "answer late":
            time.sleep(SECONDS)
        return Answer(status, body, headers)

    def begin(self, receiver: Receiver, given: tuple):
        answer, job = receiver.begin(*given)
        if job:
            threading.Thread(target=job.run, args=[work]).start()
        return answer


def work(job: Job) -> dict:
    time.sleep(0.01)
    job.write(EFFECT, [job.id])
    return {"effect": "made"}


class Handler(KeepAlive):
    def finish(self) -> None:
        with suppress(OSError):
            super().finish()


class Api(TCPServer):
    """One child: it serves one request after the other, and looks for lost ones in between."""

    timeout = 0.5  # seconds

    def __init__(self, dsn: str, listening: socket.socket):
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.dsn, self.api = listening, dsn, self
        self.closing = threading.Event()
        self.closing.set()  # every answer ends its connection
        self.receivers = [
            (Receiver(self.connect, lost_after=late, most_deaths=1000), stages)
            for late, stages in (
                (None, [one for one in STAGES.values() if one.name not in TIMED]),
                (LATE, [STAGES[name] for name in TIMED]),
            )
        ]

    def connect(self):
        return psycopg2.connect(self.dsn, connect_timeout=5)

    def next(self, job: str | None) -> tuple[int, str]:
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(NEXT, {"job": job})
            found = cursor.fetchone()
            connection.commit()
        return found or (0, "nothing")  # moments are numbered from 1

    def send_again(self, request: Request) -> None:
        host, port = self.socket.getsockname()
        url = f"http://{host}:{port}{request.path}"
        headers = {"Idempotency-Key": request.headers["Idempotency-Key"]}
        with suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, request.raw, headers), timeout=30)

    def arrived(self, request: Request) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass

    def answer(self, request: Request) -> Answer:
        try:
            return Planned(self, request).answer()
        except psycopg2.Error as error:
            return Answer(500, str(error).encode())

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def serve(self) -> None:
        looked = 0.0
        while True:
            self.handle_request()
            if time.monotonic() > looked + self.timeout:
                looked = time.monotonic()
                with suppress(psycopg2.Error):
                    for receiver, stages in self.receivers:
                        receiver.recover(*stages)


def main(number: int, children: int) -> None:
    listening = socket.socket(fileno=number)
    listening.settimeout(Api.timeout)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGKILL)

    for _ in range(children):
        fork(listening)
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        os.wait()
        fork(listening)


def fork(listening: socket.socket) -> None:
    if os.fork() == 0:
        try:
            Api(os.environ["DSN"], listening).serve()
        finally:
            os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
