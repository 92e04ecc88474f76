"""An Oban worker (Oban for Python), one worker class for all calls.

From its documentation, "Ready for Production": the pool of 1 to 10 connections that it comes with,
however many calls are in flight; uvloop, as `oban start` uses it.
"""

import asyncio

import aiohttp
import uvloop
from oban import Oban, worker

from bench.workers import DSN, IN_FLIGHT
from bench.workers.post import opened, post

session: aiohttp.ClientSession


@worker(queue="calls")
class Call:
    async def process(self, job) -> None:
        await post(session, **job.args)


async def main() -> None:
    global session
    async with opened() as session:
        pool = await Oban.create_pool(DSN)
        async with Oban(pool=pool, queues={"calls": IN_FLIGHT}):
            await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
