"""The call itself, for the queues in Python: one POST on a kept-alive connection."""

import aiohttp

from bench.pipeline import ROUTES
from bench.workers import API, TIMEOUT


def opened() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT))


async def post(
    session: aiohttp.ClientSession, job_id: str, tenant_id: str, current_step: str, status: str
) -> None:
    body = {"job_id": job_id, "tenant_id": tenant_id}
    async with session.post(API + ROUTES[current_step, status], json=body) as answer:
        answer.raise_for_status()
        await answer.read()
