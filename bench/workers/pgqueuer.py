"""A pgqueuer worker, one asynchronous entrypoint for all calls.

From its documentation, "Performance Tuning": a direct asyncpg connection for the queue manager,
a `batch_size` that grows with the jobs in flight, and `pgq autovac` (see bench/peers/python.py).
On uvloop, as `pgq run` is.
"""

import asyncio
import json
import signal

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job

from bench.workers import DSN, IN_FLIGHT
from bench.workers.post import opened, post


async def main() -> None:
    queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect(DSN)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queuer.shutdown.set)
    async with opened() as session:
        # A limit of its own (`concurrency_limit`) is kept in SQL: correct, and a tenth as fast.
        room = asyncio.Semaphore(IN_FLIGHT)

        @queuer.entrypoint("call")
        async def call(job: Job) -> None:
            async with room:
                await post(session, **json.loads(job.payload))

        await queuer.run(batch_size=max(10, IN_FLIGHT))


if __name__ == "__main__":
    uvloop.run(main())
