"""Our adapter: python -m bench.queue_harness.adapter, started by the harness, once a replica.

A job of the harness is a row of `jobs` that is inserted in (overlay, done), the last state that
owes a call. Its work is one call of the stage API, which is served here: it takes JOB_WORK_MS and
commits (vlm_judge, done). The calls are made by `listener.py run`, a child of this process. It
ends with the adapter, however that ends.

Standard output has JSON lines: what is measured, and first a descriptor. Standard input may have
lines "ENQUEUE number": how many jobs to insert now. Its end, like SIGTERM, is the end of the run.
Standard error has the log.
"""

import asyncio
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from bench.pipeline import STEPS
from bench.stage_api import CONNECTIONS, Connection, StageApi
from bench.stats import percentile

ROOT = Path(__file__).parents[2]
LISTENER = [sys.executable, str(ROOT / "listener.py")]
MANIFEST = json.loads((Path(__file__).parent / "adapter.json").read_text())

WINDOW = 30.0  # seconds that a percentile looks back
REMEMBERED = 65536  # latencies at most, so that memory does not grow
DEPTH_EVERY = 0.2  # seconds
RETRY_AFTER = 0.5  # seconds to wait where the database cannot be reached
STOP_LIMIT = 4.0  # seconds for the calls under way; the harness kills after ten
PR_SET_PDEATHSIG = 1
UNCOMPILED = "PYTHONDONTWRITEBYTECODE"

# A call that was under way in a killed replica is made again after 15 s, the sum of the two.
LEASE = {"STAGE_TIMEOUT": "10", "LEASE_MARGIN": "5"}

ADD = """
INSERT INTO jobs (job_id, tenant_id, current_step, status)
SELECT job_id, 'bench', $2, 'done' FROM unnest($1::uuid[]) job_id
"""
MOVE = """
UPDATE jobs SET current_step = $2, updated_at = now()
WHERE job_id = $1 AND current_step = $3 AND status = 'done'
"""
DEPTH = "SELECT count(*) FROM stage_calls WHERE due_at <= now()"
# The errors of the pool while the server is away, is shutting down, or has ended the session.
DATABASE_ERRORS = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


@dataclass(frozen=True)
class Settings:
    """The environment variables that the harness sets."""

    database: str
    replica: int
    mode: str  # "fixed" or "depth-target"
    is_paced: bool  # the harness says on standard input how many jobs to insert, and when
    rate: float  # jobs a second
    rate_file: str | None  # has the rate of the moment
    depth: int  # jobs to keep waiting, in mode depth-target
    batch: int  # jobs an INSERT, at most
    tick: float  # seconds between two INSERTs
    workers: int
    work: float  # seconds
    sample: float  # seconds

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Settings":
        def number(name: str, default: float) -> float:
            return float(environ.get(name) or default)

        mode = environ.get("PRODUCER_MODE", "fixed")
        return cls(
            database=environ["DATABASE_URL"],
            replica=int(number("BENCH_INSTANCE_ID", 0)),
            mode=mode,
            is_paced=mode == "fixed" and environ.get("PRODUCER_PACING") == "harness",
            rate=number("PRODUCER_RATE", 800),
            rate_file=environ.get("PRODUCER_RATE_CONTROL_FILE"),
            depth=int(number("TARGET_DEPTH", 1000)),
            batch=int(number("PRODUCER_BATCH_MAX", 128)),
            tick=number("PRODUCER_BATCH_MS", 25) / 1000,
            workers=int(number("WORKER_COUNT", 32)),
            work=number("JOB_WORK_MS", 1) / 1000,
            sample=number("SAMPLE_EVERY_S", 5),
        )

    def current_rate(self) -> float:
        try:
            return float(Path(self.rate_file or "").read_text())
        except (OSError, ValueError):  # there is no file, or it is being written
            return self.rate


def new_job() -> uuid.UUID:
    """An id with the time at which the job was made: nanoseconds, then random bits."""
    return uuid.UUID(int=time.time_ns() << 64 | random.getrandbits(64))


def age_ms(job: str) -> float:
    return (time.time_ns() - (uuid.UUID(job).int >> 64)) / 1e6


class Latencies:
    """Milliseconds of the last WINDOW seconds."""

    def __init__(self) -> None:
        self.seen: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)

    def add(self, job: str) -> None:
        self.seen.append((time.monotonic(), age_ms(job)))

    def percentiles(self) -> dict[str, float]:
        since = time.monotonic() - WINDOW
        values = [value for seen, value in self.seen if seen >= since]
        return {f"p{p}": percentile(values, p) if values else 0.0 for p in (50, 95, 99)}


class Work(StageApi):
    """The stage API. It commits once, at its end: a call that is cut short is made again."""

    def __init__(self, pool: asyncpg.Pool, seconds: float):
        super().__init__()
        self.pool, self.mode, self.delay = pool, "work", seconds
        self.claimed, self.ended, self.completed = Latencies(), Latencies(), 0

    async def work(self, column: str, job: str, number: int, stage: str, before: str) -> int:
        self.claimed.add(job)
        self.arrived.clear()
        await asyncio.sleep(self.delay)
        try:
            done = await self.pool.execute(MOVE, job, stage, before)
        except DATABASE_ERRORS:
            return 503
        if done == "UPDATE 1":
            self.completed += 1
            self.ended.add(job)
        return 200


class Producer:
    """Inserts jobs, as many as the harness offers."""

    def __init__(self, settings: Settings, pool: asyncpg.Pool):
        self.settings, self.pool = settings, pool
        self.inserted, self.depth = 0, 0
        self.orders: asyncio.Queue[int] = asyncio.Queue()

    async def run(self) -> None:
        async for number in self.offered():
            try:
                await self.pool.execute(ADD, [new_job() for _ in range(number)], STEPS[-1])
                self.inserted += number
            except DATABASE_ERRORS as error:
                say(f"{number} jobs not inserted: {error or type(error).__name__}")
                await asyncio.sleep(RETRY_AFTER)

    def offered(self) -> AsyncIterator[int]:
        if self.settings.mode == "depth-target":
            return self.missing()
        return self.told() if self.settings.is_paced else self.timed()

    async def listen(self) -> None:
        """Read standard input to its end."""
        lines = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(lines)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        async for line in lines:
            word, _, number = line.decode().partition(" ")
            if word == "ENQUEUE" and self.settings.is_paced:
                self.orders.put_nowait(int(number))

    async def told(self) -> AsyncIterator[int]:
        while True:
            yield await self.orders.get()

    async def timed(self) -> AsyncIterator[int]:
        """Job counts by the clock: a late INSERT is made up for by larger ones."""
        owed, since = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(self.settings.tick)
            now = time.monotonic()
            owed, since = owed + self.settings.current_rate() * (now - since), now
            while owed >= 1:
                number = min(int(owed), self.settings.batch)
                owed -= number
                yield number

    async def missing(self) -> AsyncIterator[int]:
        """Job counts that fill the queue up to the depth."""
        while True:
            await self.measure()
            missing = self.settings.depth - self.depth
            for begin in range(0, missing, self.settings.batch):
                yield min(self.settings.batch, missing - begin)
            await asyncio.sleep(self.settings.tick)

    async def measure(self) -> None:
        try:
            self.depth = await self.pool.fetchval(DEPTH)
        except DATABASE_ERRORS:
            await asyncio.sleep(RETRY_AFTER)

    async def watch(self) -> None:
        while True:
            await self.measure()
            await asyncio.sleep(DEPTH_EVERY)


class Report:
    """Prints what was measured every `sample` seconds, at multiples of them by the clock."""

    def __init__(self, settings: Settings, work: Work, producer: Producer):
        self.settings, self.work, self.producer = settings, work, producer

    async def run(self) -> None:
        every = self.settings.sample
        await asyncio.sleep(every - time.time() % every)
        before = self.counts()
        while True:
            await asyncio.sleep(every - time.time() % every)
            now = self.counts()
            for metric, value, window in self.measured(before, now):
                tell(kind="adapter", subject_kind="adapter", subject="", metric=metric,
                     value=round(value, 3), window_s=window)  # fmt: skip
            before = now

    def counts(self) -> tuple[float, int, int]:
        return time.monotonic(), self.producer.inserted, self.work.completed

    def measured(self, before: tuple, now: tuple) -> list[tuple[str, float, float]]:
        """Metric, value, and the seconds that it is about."""
        seconds, inserted, completed = (new - old for new, old in zip(now, before, strict=True))
        found = [
            (f"{name}_{p}_ms", value, WINDOW)
            for name, latencies in (("claim", self.work.claimed), ("end_to_end", self.work.ended))
            for p, value in latencies.percentiles().items()
        ]
        found.append(("enqueue_rate", inserted / seconds, self.settings.sample))
        found.append(("completion_rate", completed / seconds, self.settings.sample))
        if self.settings.replica == 0:  # of all replicas together: one of them tells it
            found.append(("queue_depth", self.producer.depth, 0))
            found.append(("producer_target_rate", self.settings.current_rate(), 0))
        return found


def now_text() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def tell(**record: Any) -> None:
    replica = int(os.environ.get("BENCH_INSTANCE_ID") or 0)
    told = {"t": now_text(), "system": MANIFEST["system"], "instance_id": replica}
    print(json.dumps(told | record), flush=True)


def say(text: str) -> None:
    print(f"[{MANIFEST['system']}] {text}", file=sys.stderr, flush=True)


def describe() -> None:
    named = {name: MANIFEST[name] for name in ("event_tables", "event_indexes", "extensions")}
    told = {"version": "working tree", "schema_version": "as installed", "started_at": now_text()}
    tell(kind="descriptor", **named, **told, db_name=MANIFEST["db_name"])


def environment(settings: Settings, api: str, directory: str) -> dict[str, str]:
    """What the listener runs with; a `.env` in the directory keeps anybody's own out."""
    (Path(directory) / ".env").touch()
    told = {"DATABASE_URL": settings.database, "PIPELINE_MODULE": "demo.five_stages"}
    told |= {"STAGE_API_URL": api, "LISTENER_WORKERS": str(settings.workers), **LEASE}
    told |= {"LOG_LEVEL": "WARNING", "HEARTBEAT_DIR": directory}
    # A listener that has to compile every module anew starts late.
    return {name: os.environ[name] for name in os.environ if name != UNCOMPILED} | told


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


async def run(settings: Settings, directory: str) -> int:
    """Until the end of the run; the exit code. Where the listener ends by itself, 1."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    pool = await asyncpg.create_pool(settings.database, min_size=0, max_size=CONNECTIONS)
    work = Work(pool, settings.work)
    server = await loop.create_server(lambda: Connection(work), "127.0.0.1", 0, backlog=2048)
    api = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    listener = subprocess.Popen(
        [*LISTENER, "run"], cwd=directory, env=environment(settings, api, directory),
        stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=end_with_parent,
    )  # fmt: skip
    producer = Producer(settings, pool)
    parts: list[Coroutine] = [producer.run(), Report(settings, work, producer).run()]
    if settings.replica == 0 and settings.mode == "fixed":
        parts.append(producer.watch())
    parts += [stopped.wait(), producer.listen()]  # which end with the run
    tasks = [asyncio.ensure_future(part) for part in parts]
    ended = loop.run_in_executor(None, listener.wait)
    describe()
    await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
    failed = [task for task in tasks if task.done() and task.exception()]
    for task in failed:
        say(f"ended by {task.exception()!r}")
    if ended.done():
        say(f"the listener ended with exit code {ended.result()}")
    code = 1 if failed or ended.done() else 0
    for task in tasks:
        task.cancel()
    if not ended.done():
        listener.terminate()
        await asyncio.wait([ended], timeout=STOP_LIMIT)
        listener.kill()
    pool.terminate()
    return code


def main() -> int:
    if "DATABASE_URL" not in os.environ:
        say("error: DATABASE_URL is not set; the harness sets it: python -m bench.queue_harness")
        return 2
    settings = Settings.of(os.environ)
    with tempfile.TemporaryDirectory(prefix="queue-harness-") as directory:
        environ = environment(settings, "http://127.0.0.1", directory)
        install = subprocess.run([*LISTENER, "install"], cwd=directory, env=environ,
                                 stdout=subprocess.DEVNULL)  # fmt: skip
        return install.returncode or uvloop.run(run(settings, directory))


if __name__ == "__main__":
    raise SystemExit(main())
