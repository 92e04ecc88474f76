"""A pgqueuer worker, one asynchronous entrypoint for all calls.

From its documentation, "Performance Tuning": a direct asyncpg connection for the queue manager,
a `batch_size` that grows with the jobs in flight, and `pgq autovac` (see bench/peers/pgqueuer.py).
On uvloop, as `pgq run` is.
"""

import asyncio
import json
import signal

import aiohttp
import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job

from bench.pipeline import ROUTES
from bench.workers import API, DSN, IN_FLIGHT, TIMEOUT


async def main() -> None:
    queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect(DSN)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queuer.shutdown.set)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        # A limit of its own (`concurrency_limit`) is kept in SQL: correct, and a tenth as fast.
        room = asyncio.Semaphore(IN_FLIGHT)

        @queuer.entrypoint("call")
        async def call(job: Job) -> None:
            owed = json.loads(job.payload)
            path = ROUTES[owed["current_step"], owed["status"]]
            body = {"job_id": owed["job_id"], "tenant_id": owed["tenant_id"]}
            async with room, session.post(API + path, json=body) as answer:
                answer.raise_for_status()
                await answer.read()

        await queuer.run(batch_size=max(10, IN_FLIGHT))


if __name__ == "__main__":
    uvloop.run(main())
