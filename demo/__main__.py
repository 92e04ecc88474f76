"""Five jobs run through all stages on this machine: a real PostgreSQL, the real listener with two
workers, and a stand-in stage API. `make demo` or `python -m demo`; it ends and tidies up by itself.
`make demo PIPELINE=variants` or `python -m demo variants` runs a pipeline of examples/ instead.
"""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing, suppress

import psycopg2
from psycopg2.extensions import connection as Connection

import config
from demo import example, jobs
from demo.jobs import JOBS, TENANT
from demo.stage_api import DELAYS, StageApi, database_from_environment
from demo.stage_examples import EXAMPLES
from demo.stage_server import Answer, Request
from demo.start import environment, own_database, tell_server
from demo.terminal import Ended, Listener, headline, one_line, paint, run_command, show, signals

BORN_DONE = JOBS[2]  # inserted as done; the others are inserted as queued and then updated
TIME_LIMIT = 50  # seconds for all jobs
HICCUP = "planner"  # answers 503 once
THROUGH = "vlm_judge, done"


def run(stack: ExitStack) -> None:
    """The demo, step by step. What must be undone goes on `stack`. Raises Ended."""
    require_five_stages()
    dsn = given = database_from_environment()
    if given:
        headline("① Database: yours, the one that DB_HOST or DATABASE_URL names")
        show(
            f"The demo's own jobs, of tenant {TENANT}, are all it touches, and removed at the end."
        )
    else:
        headline("① Database: a PostgreSQL of its own, in a temporary directory")
        dsn = own_database(stack)
    connection = stack.enter_context(closing(psycopg2.connect(dsn, connect_timeout=5)))
    connection.autocommit = True
    tell_server(connection)
    jobs.check_database(connection)
    stack.callback(jobs.forget, connection)

    hiccups = [Answer(503, headers={"Retry-After": "1"})]
    api = StageApi(dsn, delay=lambda stage: DELAYS[stage] * random.uniform(0.8, 1.2))
    for stage in DELAYS:
        api.on(stage, lambda request: gatekeeper(request, hiccups))
    stack.enter_context(api)
    headline(f"② Stage API: a stand-in on {api.url}; its {HICCUP} will answer 503 once")

    settings = environment(stack, dsn, api.url, PIPELINE_MODULE="stages")
    headline("③ Tables and triggers: python listener.py install")
    run_command("install", settings)

    headline(f"④ Listener: python listener.py run --workers 2, and {len(JOBS)} jobs arrive (▸)")
    show("Its log, with dates and job ids shortened:")
    listener = Listener(settings, workers=2)
    stack.callback(listener.close)
    watch(connection, api, listener)

    headline("⑤ All jobs are through, so the listener is told to stop")
    listener.close()
    report(connection, api)
    if given:
        print("Tables and triggers stay; `python listener.py uninstall` removes them.")
    else:
        print(
            "Next: name your database in .env, then `make trigger` and `make run`; see README.md."
        )


def require_five_stages() -> None:
    """Raises Ended where stages.py is no longer the guide's, which is all that the stand-in runs
    here.
    """
    try:
        found = [
            function.__name__ for function in importlib.import_module("stages").PIPELINE.values()
        ]
    except Exception as error:
        raise Ended(f"stages.py cannot be used: {one_line(error)}") from None
    if found != list(DELAYS):
        names = " or ".join(f"make demo PIPELINE={name}" for name in EXAMPLES)
        raise Ended(f"this demo runs the guide's five stages, and stages.py has others: {names}")


def gatekeeper(request: Request, hiccups: list[Answer]) -> Answer | None:
    if request.tenant_id != TENANT:
        return Answer(503, headers={"Retry-After": "5"})  # costs that job nothing
    with suppress(IndexError):
        return hiccups.pop() if request.stage == HICCUP else None


def watch(connection: Connection, api: StageApi, listener: Listener) -> None:
    """Let a job arrive every second, and show what the listener does until all are through."""
    script = []
    for second, job in enumerate(JOBS, 1):
        status = "done" if job == BORN_DONE else "queued"
        script.append((second, jobs.insert, (connection, job, status)))
        if status == "queued":
            script.append((second + 0.5, jobs.release, (connection, job)))
    began, waiting = time.monotonic(), JOBS
    while waiting:
        elapsed = time.monotonic() - began
        while script and script[0][0] <= elapsed:
            _, action, arguments = script.pop(0)
            action(*arguments)
        exit_code = listener.show(0.25)
        states = jobs.states(connection)
        waiting = [job for job in JOBS if states.get(job) != THROUGH]
        if signals:
            raise Ended
        if exit_code is not None:
            raise Ended(f"the listener ended with exit code {exit_code}")
        if any(request.tenant_id != TENANT for request in api.requests):
            raise Ended("a job that is not the demo's came due; it was put off and stays owed")
        if elapsed > TIME_LIMIT:
            where = ", ".join(f"{job[:8]} in ({states.get(job)})" for job in waiting)
            raise Ended(f"not through after {TIME_LIMIT} s: {where}")


def report(connection: Connection, api: StageApi) -> None:
    """The table and the verdict. Raises Ended where a stage was not called exactly once."""
    attempts, states = jobs.attempts(connection), jobs.states(connection)
    headline(f"{'job':9} {'state':15}" + "".join(f"{s:>12}" for s in (*DELAYS, "total")))
    for job in JOBS:
        mine = [attempt[1:] for attempt in attempts if attempt[0] == job]
        cells = [cell([a[1:] for a in mine if a[0] == stage]) for stage in DELAYS]
        total = max((a[-1] for a in mine), default=jobs.arrived[job]) - jobs.arrived[job]
        print(f"{job[:8]}  {states[job]:15}{''.join(cells)}{total:10.1f} s")
    print("* put off by the 503, then called again. The total includes waiting for a free worker.")

    accepted = sorted((r.job_id, r.stage) for r in api.requests if r.status == 200)
    if accepted != sorted((job, stage) for job in JOBS for stage in DELAYS):
        raise Ended(f"every job should pass every stage once; accepted calls: {len(accepted)}")
    headline(f"✓ {len(JOBS)} jobs went through {len(DELAYS)} stages, and no stage ran twice")


def cell(attempts: list[tuple]) -> str:
    """How long a job was in a stage; `attempts` are (outcome, seconds, finished at)."""
    seconds = sum(attempt[1] for attempt in attempts if attempt[0] == "succeeded")
    return f"{seconds:9.1f} s{'*' if len(attempts) > 1 else ' '}"


def main() -> int:
    names = sys.argv[1:]
    if names[1:] or set(names) - EXAMPLES.keys():
        allowed = " or ".join(EXAMPLES)
        print(f"demo: there is no pipeline {' '.join(names)}; allowed is {allowed}, or none")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: signals.append(number))
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    failures = (Ended, config.SettingsError, psycopg2.Error, subprocess.SubprocessError)
    try:
        with ExitStack() as stack:
            if names:
                example.run(stack, names[0])
            else:
                run(stack)
        return 0
    except BrokenPipeError:  # nobody reads any more, as with `make demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*failures, OSError, RuntimeError) as error:
        if signals:
            print(f"\nStopped by {signal.Signals(signals[0]).name}; nothing is left running.")
            return 128 + signals[0]
        print(paint(f"\n✗ {one_line(error)}", 31))
        return 1


if __name__ == "__main__":
    sys.exit(main())
