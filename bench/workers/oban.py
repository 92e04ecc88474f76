"""An Oban worker (Oban for Python), one worker class for all calls.

From its documentation, "Ready for Production": the pool of 1 to 10 connections that it comes with,
however many calls are in flight; uvloop, as `oban start` uses it.
"""

import asyncio

import aiohttp
import uvloop
from oban import Oban, worker

from bench.pipeline import ROUTES
from bench.workers import API, DSN, IN_FLIGHT, TIMEOUT

session: aiohttp.ClientSession


@worker(queue="calls")
class Call:
    async def process(self, job) -> None:
        owed = job.args
        path = ROUTES[owed["current_step"], owed["status"]]
        body = {"job_id": owed["job_id"], "tenant_id": owed["tenant_id"]}
        async with session.post(API + path, json=body) as answer:
            answer.raise_for_status()
            await answer.read()


async def main() -> None:
    global session
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        pool = await Oban.create_pool(DSN)
        async with Oban(pool=pool, queues={"calls": IN_FLIGHT}):
            await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
