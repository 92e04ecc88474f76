"""The stage API of the benchmark: python -m bench.stage_api ADDRESS prints its port and serves.

One asyncio process that reads just as much HTTP as is needed, moves the job as a real stage does
(running, work, done, answer), and remembers when what arrived. Three ways of working:

    answer  200 at once; the job is not touched
    work    (stage, running) and (stage, done), a commit each, `delay` seconds apart
    accept  the same as an asynchronous stage: 202 after the first. Counted is the end of the work.
"""

import asyncio
import gc
import json
import os
import re
import sys
import time
from contextlib import suppress

import asyncpg
import uvloop

from bench.pipeline import CHILD_STAGES, JOB_STAGES, ROUTES, STAGES

CONNECTIONS = 16
NAME = {"application_name": "bench"}
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
STAGE_OF = {
    path: (number, STAGES[number], step) for number, ((step, _), path) in enumerate(ROUTES.items())
}
LONGER = ["img_gen", *CHILD_STAGES, *JOB_STAGES]
STAGE_OF |= {f"/{stage}": (n, stage, LONGER[n]) for n, stage in enumerate(LONGER[1:])}
# The table by the name of its id column.
TABLES = {"job_id": "jobs", "job_variants_id": "jobs_variants"}
TAKE = {
    column: f"""
UPDATE {table} SET current_step = $2, status = 'running', updated_at = now()
WHERE {column} = $1 AND current_step = $3 AND status = 'done'
"""
    for column, table in TABLES.items()
}
FINISH = {
    column: f"""
UPDATE {table} SET status = 'done', updated_at = now()
WHERE {column} = $1 AND current_step = $2 AND status = 'running'
"""
    for column, table in TABLES.items()
}


class StageApi:
    """What the connections share. Times are those of time.monotonic()."""

    def __init__(self):
        self.idle: asyncio.LifoQueue[asyncpg.Connection] = asyncio.LifoQueue()
        self.tasks: set[asyncio.Task] = set()
        self.wanted, self.enough = 0, asyncio.Event()  # so many answers
        self.reset("answer", 0.0)

    def reset(self, mode: str, delay: float) -> None:
        self.mode, self.delay = mode, delay
        self.arrived: list[tuple[float, str, int]] = []  # time, job, stage
        self.done: list[tuple[float, str, int]] = []  # time of the commit, job, stage
        self.answered = 0

    async def connect(self, dsn: str) -> None:
        for _ in range(CONNECTIONS):
            self.idle.put_nowait(await asyncpg.connect(dsn, server_settings=NAME))

    async def execute(self, sql: str, *values: str) -> str:
        conn = await self.idle.get()
        try:
            return await conn.execute(sql, *values)
        finally:
            self.idle.put_nowait(conn)

    def begin(self, task) -> None:
        task = asyncio.ensure_future(task)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def work(self, column: str, job: str, number: int, stage: str, before: str) -> int:
        """Run a stage on a row that is in the state before it; the HTTP status."""
        if await self.execute(TAKE[column], job, stage, before) != "UPDATE 1":
            return 409
        if self.mode == "accept":
            self.begin(self.finish_later(column, job, number, stage))
            return 202
        if self.delay:
            await asyncio.sleep(self.delay)
        await self.finish(column, job, number, stage)
        return 200

    async def finish(self, column: str, job: str, number: int, stage: str) -> None:
        await self.execute(FINISH[column], job, stage)
        self.done.append((time.monotonic(), job, number))

    async def finish_later(self, *work) -> None:
        await asyncio.sleep(self.delay)
        await self.finish(*work)
        self.count()

    def count(self) -> None:
        self.answered += 1
        if self.answered >= self.wanted:
            self.enough.set()

    async def control(self, path: str, body: dict) -> dict:
        """Carry out a request of the harness."""
        if path == "/bench/connect":
            await self.connect(body["dsn"])
        elif path == "/bench/disconnect":
            while not self.idle.empty():
                await self.idle.get_nowait().close()
        elif path == "/bench/reset":
            self.reset(body["mode"], body["delay"])
            gc.collect()
        elif path == "/bench/record":
            return {"arrived": self.arrived, "done": self.done}
        elif path == "/bench/wait":
            await self.wait_for(body["answered"], body["seconds"])
        return {"answered": self.answered}

    async def wait_for(self, answered: int, seconds: float) -> None:
        self.wanted = answered
        self.enough.clear()
        if self.answered < answered:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.enough.wait(), seconds)


class Connection(asyncio.Protocol):
    """A kept-alive connection, with one request at a time, which may arrive in any pieces."""

    def __init__(self, api: StageApi):
        self.api, self.buffer = api, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end]
        length = LENGTH.search(head)
        total = end + 4 + (int(length[1]) if length else 0)
        if len(self.buffer) < total:
            return
        body, self.buffer = self.buffer[end + 4 : total], self.buffer[total:]
        self.request(head.split(b" ", 2)[1].decode(), json.loads(body or b"{}"))

    def request(self, path: str, body: dict) -> None:
        if path not in STAGE_OF:
            self.api.begin(self.answer_control(path, body))
            return
        number, stage, before = STAGE_OF[path]
        column = "job_variants_id" if "job_variants_id" in body else "job_id"
        self.api.arrived.append((time.monotonic(), body[column], number))
        if self.api.mode == "answer":
            self.send(200, b'{"status": "done"}')
            self.api.count()
        else:
            self.api.begin(self.answer_work(column, body[column], number, stage, before))

    async def answer_work(self, *work) -> None:
        status = await self.api.work(*work)
        self.send(status, b'{"error": "not its turn"}' if status == 409 else b'{"status": "done"}')
        if status != 202:
            self.api.count()

    async def answer_control(self, path: str, body: dict) -> None:
        self.send(200, json.dumps(await self.api.control(path, body)).encode())

    def send(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def serve() -> None:
    api = StageApi()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(api), sys.argv[1], 0, backlog=2048
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    # Standard input is closed when the harness ends, however it ends.
    asyncio.get_running_loop().add_reader(0, os._exit, 0)
    gc.freeze()
    gc.disable()  # only between two measurements
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
