"""An awa worker, one asynchronous task for all calls.

From its documentation, "Configuration": `max_workers` of what is in flight, `deadline_duration_ms`
of what a call may take, and the other defaults, which it advises for a single queue.
"""

import asyncio
from dataclasses import dataclass

import aiohttp
import awa

from bench.pipeline import ROUTES
from bench.workers import API, DSN, IN_FLIGHT, TIMEOUT


@dataclass
class Call:
    job_id: str
    tenant_id: str
    current_step: str
    status: str


async def main() -> None:
    client = awa.AsyncClient(DSN)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        @client.task(Call, kind="call", queue="calls")
        async def call(job) -> None:
            owed = job.args
            body = {"job_id": owed.job_id, "tenant_id": owed.tenant_id}
            path = ROUTES[owed.current_step, owed.status]
            async with session.post(API + path, json=body) as answer:
                answer.raise_for_status()
                await answer.read()

        queue = {"name": "calls", "max_workers": IN_FLIGHT, "deadline_duration_ms": 1000 * TIMEOUT}
        await client.start([queue])
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
