"""A procrastinate worker: an asynchronous task, as many at a time as are to be in flight.

From its documentation: `concurrency` for throughput (howto "Execute multiple jobs at the same
time"); "your pool will need to contain as many connections as your concurrency (plus one)"
for short jobs (discussions, "Mind the size of your PostgreSQL pool").
"""

import asyncio

import aiohttp
from procrastinate import App, PsycopgConnector

from bench.workers import DSN, IN_FLIGHT
from bench.workers.post import opened, post

pool = {"min_size": IN_FLIGHT + 1, "max_size": IN_FLIGHT + 1}
app = App(connector=PsycopgConnector(conninfo=DSN, **pool))
session: aiohttp.ClientSession


@app.task(name="call", queue="calls")
async def call(**owed: str) -> None:
    await post(session, **owed)


async def main() -> None:
    global session
    async with opened() as session, app.open_async():
        await app.run_worker_async(queues=["calls"], concurrency=IN_FLIGHT)


if __name__ == "__main__":
    asyncio.run(main())
