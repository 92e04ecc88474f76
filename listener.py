"""Job State Listener: hears that a job finished a stage and calls the next one.

This is its command line: `run` starts workers (worker.py), `call` runs one call in this process,
and the operator's commands come from ops/.
"""

import gc
import logging
import sys
from types import SimpleNamespace

import click
import psycopg2

import config
import db
import logs
import ops
import process
import stages
from heartbeat import Heartbeat
from process import Stop, Watch
from trigger import Trigger
from worker import HEARTBEAT_MARGIN, Worker, worker_name

log = logging.getLogger("listener")


def idle(settings: SimpleNamespace, stop: Stop) -> None:
    """Disabled: stay alive and do nothing, so that no container restarts in a circle."""
    log.warning("Job State Listener 비활성화됨: ENABLE_JOB_STATE_LISTENER=false, 대기만 함")
    heartbeat = Heartbeat(settings.HEARTBEAT_DIR, worker_name())
    while not stop.requested:
        heartbeat.beat("disabled by ENABLE_JOB_STATE_LISTENER=false", 2 * HEARTBEAT_MARGIN)
        stop.wait(HEARTBEAT_MARGIN)
    heartbeat.close()
    log.info("Job State Listener 중지됨")


# --- the command line ----------------------------------------------------------------------


@click.group(
    cls=ops.Commands, invoke_without_command=True, context_settings={"max_content_width": 100}
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Let a PostgreSQL table drive a pipeline of HTTP services.

    Without a command: run. Settings come from the environment and .env (see .env.example).

    \b
    Exit codes: 0 done or healthy; 1 a problem was found, the line says which;
    2 bad input or settings, or run cannot start; 3 the database cannot be reached.
    """
    if context.invoked_subcommand is None:
        context.invoke(run)


@cli.command()
@click.option(
    "--workers", type=click.IntRange(1, 256), help="Worker processes; default: LISTENER_WORKERS."
)
@click.option("--stage", "only", multiple=True, type=click.Choice(stages.stage_names()),
              help="Call only this stage; may be repeated.")  # fmt: skip
@click.option("--once", is_flag=True, help="Run what is due now, then exit.")
def run(workers: int | None = None, only: tuple[str, ...] = (), once: bool = False) -> None:
    """Listen, and call the next stage of every job that finishes one."""
    settings = config.settings()
    if settings.ENABLE_JOB_STATE_LISTENER:
        config.require_database(settings)
    logs.set_up(settings)

    def work(role: str, number: int = 1) -> int:
        stop = Stop(role)
        watch.number = number - 1
        try:
            if settings.ENABLE_JOB_STATE_LISTENER:
                Worker(settings, stop, list(only), once, watch).serve()
            else:
                idle(settings, stop)
            return 0
        except ops.Problem as problem:
            log.error("시작할 수 없음: %s", problem)
            return process.EXIT_CANNOT_START
        except psycopg2.Error as error:  # only --once gives up
            log.error("리스너 오류 발생: %s", " ".join(str(error).split()))
            away = isinstance(error, db.CONNECTION_LOST)
            return ops.EXIT_DATABASE_AWAY if away else ops.EXIT_PROBLEM

    count = workers or settings.LISTENER_WORKERS
    # What is there by now stays: a collection would go through all of it, and a worker's would
    # write to, and so copy, what it shares with the others.
    gc.freeze()
    watch = Watch(count)
    if count == 1:
        sys.exit(work("worker"))
    sys.exit(process.run_workers(count, lambda number: work("child", number), restart=not once))


@cli.command(short_help="Run the call that JOB_ID owes, now and in this process.")
@click.argument("job_id")
def call(job_id: str) -> None:
    """Run the call that JOB_ID owes, now and in this process; exit 0 only if it succeeded.

    To step through it: python -m pdb listener.py call JOB_ID. The claim keeps every worker
    away from it for STAGE_TIMEOUT + LEASE_MARGIN seconds. Neither a back-off nor a hold nor
    having been given up keeps it from being run.
    """
    from ops import steer  # as little as a worker does

    settings = config.settings()
    logs.set_up(settings)
    conn = db.connect(settings, "job-state-listener call", pinned=True)
    ops.require_installed(conn)
    trigger = Trigger(settings, worker_name())
    steer.make_due(conn, job_id)
    owed = trigger.next(conn, only=job_id)
    if owed is None:
        raise ops.Problem(steer.why_nothing_owed(conn, job_id))
    trigger.run(owed)
    outcome = trigger.results.unwritten[-1].outcome
    trigger.leave(conn)
    sys.exit(0 if outcome == "succeeded" else 1)


if __name__ == "__main__":
    ops.main(cli)
