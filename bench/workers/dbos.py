"""A DBOS worker: a workflow for each call, with the POST as its step.

From its documentation: what reaches outside is a step ("Steps"); `worker_concurrency` of what is in
flight, and an executor id of its own for each process ("Queues"). It polls, by default every
second; here every 10 ms, as one call in flight would otherwise be one call a second.
"""

import asyncio

import aiohttp
from dbos import DBOS

from bench.pipeline import ROUTES
from bench.workers import API, DSN, IN_FLIGHT, NUMBER, TIMEOUT

session: aiohttp.ClientSession


@DBOS.step()
async def post(path: str, body: dict[str, str]) -> None:
    async with session.post(API + path, json=body) as answer:
        answer.raise_for_status()
        await answer.read()


@DBOS.workflow(name="call")
async def call(job_id: str, tenant_id: str, current_step: str, status: str) -> None:
    await post(ROUTES[current_step, status], {"job_id": job_id, "tenant_id": tenant_id})


async def main() -> None:
    global session
    DBOS(config={
        "name": "bench",
        "system_database_url": DSN,
        "executor_id": f"worker-{NUMBER}",
        "log_level": "WARNING",
    })  # fmt: skip
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        DBOS.launch()
        await DBOS.register_queue_async(
            "calls", worker_concurrency=IN_FLIGHT, polling_interval_sec=0.01
        )
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
