"""`test-job`: sends a job of its own through the pipeline and watches it go."""

import secrets
import time
import uuid
from collections.abc import Iterator

import click
import psycopg2

import config
import db
import pipeline
from ops.listeners import connected
from ops.problem import Problem
from ops.routes import require_installed
from ops.table import plain

LOOK_EVERY = 0.2  # seconds
WIDTH = 30

ID_COLUMN = """
SELECT typname AS type, atthasdef OR attidentity <> '' AS given
FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = to_regclass('jobs') AND attname = 'job_id'
"""
MAKE = """
INSERT INTO jobs (job_id, tenant_id, current_step, status)
VALUES (%(job_id)s, %(tenant)s, %(step)s, 'queued') RETURNING job_id
"""
MAKE_WITH_DEFAULT = """
INSERT INTO jobs (tenant_id, current_step, status)
VALUES (%(tenant)s, %(step)s, 'queued') RETURNING job_id
"""
FINISH = """
UPDATE jobs SET current_step = %(step)s, status = %(status)s WHERE job_id = %(job_id)s
"""
CLEAN = """
DELETE FROM jobs WHERE job_id = %(job_id)s;
DELETE FROM stage_calls WHERE job_id = %(job_id)s;
DELETE FROM stage_attempts WHERE job_id = %(job_id)s;
"""

# Where the job is, what it owes, and the first and the last attempt of every stage so far.
PROGRESS = """
SELECT j.current_step::text AS step, j.status::text, c.due_at = 'infinity' AS given_up,
       c.last_error, extract(epoch FROM now())::float8 AS now,
       (SELECT json_object_agg(stage, json_build_array(called, accepted, attempts))
        FROM (SELECT stage, extract(epoch FROM min(started_at)) AS called, count(*) AS attempts,
                     extract(epoch FROM max(finished_at)
                                        FILTER (WHERE outcome = 'succeeded')) AS accepted
              FROM stage_attempts WHERE job_id = %(job_id)s GROUP BY stage) AS a) AS attempts
FROM (VALUES (1)) AS always
LEFT JOIN jobs AS j ON j.job_id = %(job_id)s
LEFT JOIN stage_calls AS c ON c.job_id = %(job_id)s
"""

HELD = """
SELECT held_by, held_reason FROM pipeline_overview WHERE stage = %(stage)s AND held_until > now()
"""


@click.command("test-job", short_help="Send a job of its own through the pipeline and watch it.")
@click.option("--tenant", default="test_tenant", show_default=True, help="Its tenant_id.")
@click.option("--timeout", type=click.FloatRange(min=0.1), metavar="SECONDS",
              help="For one stage; default: the timeout of that stage.")  # fmt: skip
@click.option("--clean", is_flag=True, help="Delete the job and its history at the end.")
def test_job(tenant: str, timeout: float | None, clean: bool) -> None:
    """Make a test job, finish its first step, and follow it through every stage.

    Exit 0 if it gets through; 1 if it stalls: the line says at which stage and what to look at.
    """
    settings = config.settings()
    conn = db.connect(settings, "job-state-listener test-job")
    require_installed(conn)
    if not connected(conn):
        raise Problem("no listener is connected: start python listener.py")
    first, names = route()
    job_id = make(conn, tenant, first)
    click.echo(plain(f"job {job_id}: ({first[0]}, {first[1]}), tenant {tenant}"))
    limits = pipeline.timeouts(settings)
    if timeout:
        limits = dict.fromkeys(limits, timeout)
    try:
        seconds = follow(conn, job_id, names, limits)
        click.echo(f"passed: {len(names)} stages in {seconds:.1f} s")
    finally:
        if clean:
            db.execute(conn, CLEAN, {"job_id": job_id})
            click.echo(f"job {job_id} and its history are deleted")


def route() -> tuple[tuple[str, str], list[str]]:
    """The state that PIPELINE begins with, and the stages that follow from it."""
    first = state = next(iter(pipeline.pipeline()))
    names: list[str] = []
    while state in pipeline.pipeline() and pipeline.pipeline()[state].__name__ not in names:
        names.append(pipeline.pipeline()[state].__name__)
        state = (names[-1], "done")
    return first, names


def make(conn, tenant: str, first: tuple[str, str]):
    """Insert the job and finish its first step; its id."""
    column = db.execute(conn, ID_COLUMN).fetchone()
    given = {"tenant": tenant, "step": first[0], "status": first[1]}
    if not column.given:
        number = -1 - secrets.randbelow(2**15 - 1)  # no application counts backwards
        ids = {"uuid": str(uuid.uuid4()), "int8": number, "int4": number, "int2": number}
        given["job_id"] = ids.get(column.type, f"test-job-{secrets.token_hex(6)}")
    try:
        made = db.execute(conn, MAKE_WITH_DEFAULT if column.given else MAKE, given).fetchone()
        given["job_id"] = made.job_id
        db.execute(conn, FINISH, given)
    except (psycopg2.IntegrityError, psycopg2.DataError) as error:
        reason = str(error).splitlines()[0]
        raise Problem(f"jobs takes no test job: {reason}; send one by your own means") from None
    return made.job_id


def follow(conn, job_id, names: list[str], limits: dict[str, float]) -> float:
    """Print every hop as it ends; the seconds for all of them.

    Raises:
        Problem: the job stalls.
    """
    bar = Bar(len(names))
    began = since = db.execute(conn, PROGRESS, {"job_id": job_id}).fetchone().now
    for number, stage in enumerate(names):
        for row in looks(conn, job_id):
            called, accepted, attempts = (row.attempts or {}).get(stage, (None, None, 0))
            # Done is what the job says: some stages answer first, others commit first.
            if accepted and (row.step, row.status) != before(names, number):
                break
            bar.show(number, f"{stage} {row.now - since:.0f} s")
            if why := stalled(conn, row, stage, row.now - since > limits[stage], attempts):
                bar.clear()
                raise Problem(f"job {job_id} stalls at {stage}: {why}; "
                              f"look with python listener.py job {job_id}")  # fmt: skip
        bar.clear()
        tries = f", {attempts} attempts" if attempts > 1 else ""
        click.echo(f"  {stage:15} waited {max(0.0, called - since):6.2f} s, "
                   f"took {accepted - called:6.2f} s{tries}")  # fmt: skip
        since = accepted
    return since - began


def looks(conn, job_id) -> Iterator:
    """How the job stands, again and again."""
    while True:
        yield db.execute(conn, PROGRESS, {"job_id": job_id}).fetchone()
        time.sleep(LOOK_EVERY)


def before(names: list[str], number: int) -> tuple[str, str]:
    """The state that leads to the stage of this number."""
    return (names[number - 1], "done") if number else next(iter(pipeline.pipeline()))


def stalled(conn, row, stage: str, late: bool, attempts: int) -> str | None:
    """Why the job gets no further, as far as one can tell; None while it may."""
    if row.step is None:
        return "the job was deleted"
    if row.given_up:
        return f"given up: {plain(row.last_error)}"
    if (row.step, row.status) == (stage, "failed"):
        return "the stage set it to failed"
    if not late:
        return None
    if held := db.execute(conn, HELD, {"stage": stage}).fetchone():
        return f"held by {plain(held.held_by)}: {plain(held.held_reason)}"
    if (row.step, row.status) == (stage, "running"):
        return "it is still running"
    if row.last_error:
        return plain(row.last_error)
    return "accepted, but the job has not changed" if attempts else "it was not called"


class Bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, length: int):
        self.length = length
        self.terminal = click.get_text_stream("stdout").isatty()

    def show(self, done: int, text: str) -> None:
        filled = WIDTH * done // self.length
        bar = "#" * filled + "-" * (WIDTH - filled)
        self.write(f"\r\033[K[{bar}] {done}/{self.length} {text}")

    def clear(self) -> None:
        self.write("\r\033[K")

    def write(self, text: str) -> None:
        if self.terminal:
            click.echo(text, nl=False)
