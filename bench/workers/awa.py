"""An awa worker, one asynchronous task for all calls.

From its documentation, "Configuration": `max_workers` of what is in flight, `deadline_duration_ms`
of what a call may take, and the other defaults, which it advises for a single queue.
"""

import asyncio
from dataclasses import dataclass

import awa

from bench.workers import DSN, IN_FLIGHT, TIMEOUT
from bench.workers.post import opened, post


@dataclass
class Call:
    job_id: str
    tenant_id: str
    current_step: str
    status: str


async def main() -> None:
    client = awa.AsyncClient(DSN)
    async with opened() as session:

        @client.task(Call, kind="call", queue="calls")
        async def call(job) -> None:
            await post(session, **vars(job.args))

        queue = {"name": "calls", "max_workers": IN_FLIGHT, "deadline_duration_ms": 1000 * TIMEOUT}
        await client.start([queue])
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
