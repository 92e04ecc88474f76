"""A procrastinate worker: an asynchronous task, as many at a time as are to be in flight.

From its documentation: `concurrency` for throughput (howto "Execute multiple jobs at the same
time"); "your pool will need to contain as many connections as your concurrency (plus one)"
for short jobs (discussions, "Mind the size of your PostgreSQL pool").
"""

import asyncio

import aiohttp
from procrastinate import App, PsycopgConnector

from bench.pipeline import ROUTES
from bench.workers import API, DSN, IN_FLIGHT, TIMEOUT

pool = {"min_size": IN_FLIGHT + 1, "max_size": IN_FLIGHT + 1}
app = App(connector=PsycopgConnector(conninfo=DSN, **pool))
session: aiohttp.ClientSession


@app.task(name="call", queue="calls")
async def call(job_id: str, tenant_id: str, current_step: str, status: str) -> None:
    body = {"job_id": job_id, "tenant_id": tenant_id}
    async with session.post(API + ROUTES[current_step, status], json=body) as answer:
        answer.raise_for_status()
        await answer.read()


async def main() -> None:
    global session
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session, app.open_async():
        await app.run_worker_async(queues=["calls"], concurrency=IN_FLIGHT)


if __name__ == "__main__":
    asyncio.run(main())
