"""The guide's first design, written afresh from it: asyncpg hears the notification, the job's state
is checked once more, httpx calls the next stage. What is not heard or fails is gone.
"""

import asyncio
import json
import logging
import sys

import asyncpg
import httpx

from bench.pipeline import ROUTES
from bench.workers import API, DSN, TIMEOUT

log = logging.getLogger("first_design")
STATE = "SELECT current_step, status FROM jobs WHERE job_id = $1"
tasks: set[asyncio.Task] = set()


def heard(_conn, _pid, _channel, payload: str) -> None:
    """The callback may not wait, so every event becomes a task."""
    event = json.loads(payload)
    log.info("[LISTENER] Job 상태 변화 감지: %s", payload)
    task = asyncio.create_task(advance(event))
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def advance(event: dict[str, str]) -> None:
    """Call the stage that the job's state leads to, if it is still in that state."""
    state = event["current_step"], event["status"]
    if state not in ROUTES:
        return
    try:
        if await state_of(event["job_id"]) != state:
            log.info("Job 상태가 변경되어 스킵: %s", event["job_id"])
            return
        log.info("[TRIGGER] 파이프라인 단계 트리거: %s", event["job_id"])
        body = {"job_id": event["job_id"], "tenant_id": event["tenant_id"]}
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            answer = await client.post(API + ROUTES[state], json=body)
            answer.raise_for_status()
        log.info("파이프라인 단계 실행 성공: %s", event["job_id"])
    except Exception as error:
        log.error("파이프라인 단계 실행 실패: %s %r", event["job_id"], error)


async def state_of(job: str) -> tuple[str, str]:
    conn = await asyncpg.connect(DSN)
    try:
        return tuple(await conn.fetchrow(STATE, job))
    finally:
        await conn.close()


async def main() -> None:
    conn = await asyncpg.connect(DSN)
    await conn.add_listener("job_state_changed", heard)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(main())
