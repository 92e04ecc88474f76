"""A DBOS worker: a workflow for each call, with the POST as its step.

From its documentation: what reaches outside is a step ("Steps"); `worker_concurrency` of what is in
flight, and an executor id of its own for each process ("Queues"). It polls, by default every
second; here every 10 ms, as one call in flight would otherwise be one call a second.
"""

import asyncio

import aiohttp
from dbos import DBOS

from bench.workers import DSN, IN_FLIGHT, NUMBER
from bench.workers.post import opened, post

session: aiohttp.ClientSession


@DBOS.step()
async def send(owed: dict[str, str]) -> None:
    await post(session, **owed)


@DBOS.workflow(name="call")
async def call(**owed: str) -> None:
    await send(owed)


async def main() -> None:
    global session
    DBOS(config={
        "name": "bench",
        "system_database_url": DSN,
        "executor_id": f"worker-{NUMBER}",
        "log_level": "WARNING",
    })  # fmt: skip
    async with opened() as session:
        DBOS.launch()
        await DBOS.register_queue_async(
            "calls", worker_concurrency=IN_FLIGHT, polling_interval_sec=0.01
        )
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
