"""`test-job`: inserts a test job and follows it through the pipeline."""

import contextlib
import secrets
import signal
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import click
import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_INERROR, quote_ident

import config
import db
import history
import pipeline
from ops.follow import Follower, Look, named, rows_of
from ops.listeners import listeners, none_connected
from ops.problem import Problem, first_line
from ops.routes import require_installed
from ops.seconds import Seconds
from ops.table import counted, plain
from ops.text import Text
from signals import STOPPING

TENANT = "test_tenant"
APPLICATION = "job-state-listener test-job"

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
MADE = """
SELECT current_step::text AS step, status::text, tenant_id::text AS tenant
FROM jobs WHERE job_id = %(job_id)s
"""


@click.command("test-job", short_help="Send a job of its own through the pipeline and watch it.")
@click.option("--tenant", type=Text(), metavar="TENANT",
              help=f"Its tenant_id. Default: {TENANT}, or as example_job decides.")  # fmt: skip
@click.option("--timeout", type=Seconds(0.1), metavar="SECONDS",
              help="For one stage; default: the timeout of that stage.")  # fmt: skip
@click.option("--clean", is_flag=True,
              help="Delete the job, its rows and their history at the end.")  # fmt: skip
def test_job(tenant: str | None, timeout: float | None, clean: bool) -> None:
    """Make a test job, and follow it and its rows in other tables through every stage.

    Where jobs has columns or foreign keys that need more, write example_job(conn) beside
    PIPELINE: it inserts a job and its rows in the state that PIPELINE begins with, and returns
    the job's id.

    Exit 0 if it gets through; 1 if it stalls: the line says at which stage and what to look at.
    """
    settings = config.settings()
    example_job = getattr(pipeline.module(), "example_job", None)
    if example_job is not None and tenant is not None:
        raise click.UsageError("--tenant: example_job says which tenant the job is of")
    conn = db.connect(settings, APPLICATION)
    require_installed(conn)
    if nobody := none_connected(listeners(conn, settings)):
        raise Problem(nobody)
    if clean:
        stop_as_by_ctrl_c()
    limits = pipeline.timeouts(settings)
    if timeout:
        limits = dict.fromkeys(limits, timeout)
    made: list[str] = []  # the job's id, as soon as there is one
    seen: dict = {}
    try:
        if example_job is not None:
            make_by(example_job, settings, made)
        else:
            make(conn, tenant or TENANT, made)
        follower = Follower(conn, made[0], limits, stays=not clean)
        seen = follower.first
        click.echo(follower.follow())
    finally:
        if clean and made:
            for number in STOPPING:  # several may come at once
                signal.signal(number, signal.SIG_IGN)
            # Ctrl-C during a statement has closed the connection.
            conn = db.connect(settings, APPLICATION) if conn.closed else conn
            remove(conn, made[0], list(seen))


def stop_as_by_ctrl_c() -> None:
    """Let other signals that stop a program raise KeyboardInterrupt as well."""
    for number in STOPPING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def unstopped() -> Iterator[None]:
    """Have signals that stop a program wait for the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def announce(job_id: str, made) -> None:
    click.echo(plain(f"job {job_id}: ({made.step}, {made.status}), tenant {made.tenant}"))


def make(conn, tenant: str, ids: list[str]) -> None:
    """Insert a job, add its id to `ids`, and finish its first step."""
    first = pipeline.route_of(next(iter(pipeline.pipeline())))
    if first.table != pipeline.JOBS.name or first.join:
        raise Problem(f"PIPELINE begins with {first}: test-job needs a function example_job(conn) "
                      f"in {pipeline.module().__name__}, see docs/STAGES.md")  # fmt: skip
    column = db.execute(conn, ID_COLUMN).fetchone()
    if column is None:
        raise Problem(f"jobs has no column job_id: {pipeline.JSL} verify")
    given: dict[str, Any] = {"tenant": tenant, "step": first.step, "status": first.status}
    if not column.given:
        number = -1 - secrets.randbelow(2**15 - 1)  # negative: no application uses such ids
        fitting = {"uuid": str(uuid.uuid4()), "int8": number, "int4": number, "int2": number}
        given["job_id"] = fitting.get(column.type, f"test-job-{secrets.token_hex(6)}")
    try:
        with unstopped():
            made = db.execute(conn, MAKE_WITH_DEFAULT if column.given else MAKE, given).fetchone()
            ids.append(str(made.job_id))
        given["job_id"] = made.job_id
        db.execute(conn, FINISH, given)
    except (psycopg2.IntegrityError, psycopg2.DataError) as error:
        raise Problem(f"jobs takes no test job: {first_line(error)}; write example_job(conn) in "
                      f"{pipeline.module().__name__}, see docs/STAGES.md") from None  # fmt: skip
    announce(made.job_id, SimpleNamespace(**given))


def make_by(example_job: Callable, settings: SimpleNamespace, ids: list[str]) -> None:
    """Run example_job, commit, and add the id of its job to `ids`.

    Raises:
        Problem: example_job failed, or no stage would be called for its rows. Its changes are
            rolled back, unless it committed them itself.
    """
    where = f"example_job of {pipeline.module().__name__}"
    with contextlib.closing(db.connect(settings, APPLICATION)) as conn:
        conn.autocommit = False
        try:
            job_id = example_job(conn)
            made = require_usable(conn, where, job_id)
            with unstopped():
                conn.commit()
                ids.append(str(job_id))
        except Problem:
            raise
        except psycopg2.Error as error:
            if db.is_lost(conn, error):
                raise Problem(f"{where} has lost or closed its connection") from None
            raise Problem(f"{where}: {first_line(error)}") from None
        except Exception as error:
            raise Problem(f"{where}: {type(error).__name__}: {error}") from None
    announce(job_id, made)


def require_usable(conn, where: str, job_id):
    """Find the job that example_job has made. Raises Problem where no stage would be called."""
    if conn.closed:
        raise Problem(f"{where} has closed its connection, which test-job commits")
    if conn.info.transaction_status == TRANSACTION_STATUS_INERROR:
        raise Problem(f"{where} has left its transaction failed: let the error pass")
    if job_id is None:
        raise Problem(f"{where} returned None: it must return the job's id")
    made = db.execute(conn, MADE, {"job_id": str(job_id)}).fetchone()
    if made is None:
        raise Problem(f"{where} returned {job_id}, and there is no such job")
    if not Look(conn, str(job_id)).ahead:
        first = pipeline.route_of(next(iter(pipeline.pipeline())))
        raise Problem(f"{where} left job {job_id} in ({made.step}, {made.status}), from where no "
                      f"stage is called: insert its rows in {first}")  # fmt: skip
    return made


DELETE = "DELETE FROM {table} WHERE {id} = %(key)s"

# Includes the rows that the deletion of the job itself has recorded. Attempts that no listener has
# counted yet are counted here, as a counter of `metrics` must not fall.
FORGET = f"""
DELETE FROM stage_calls WHERE job_id IN %(keys)s AND (table_name, job_id) IN %(rows)s;
WITH mark AS (
    SELECT counted_until FROM stage_totals_mark FOR UPDATE
), gone AS (
    DELETE FROM stage_attempts WHERE job_id IN %(keys)s AND (table_name, job_id) IN %(rows)s
    RETURNING stage, outcome, started_at, finished_at
), uncounted AS (
    SELECT * FROM gone WHERE finished_at > (SELECT counted_until FROM mark)
)
{history.ADD_TOTALS.format(rows="uncounted")}
"""
FORGET_JOINS = """
DELETE FROM stage_looks WHERE (parent_id, join_of) IN %(joins)s;
DELETE FROM stage_joins WHERE (parent_id, join_of) IN %(joins)s
"""


def remove(conn, job_id: str, seen: list) -> None:
    """Delete the job, its rows in other tables, and their history; also the history of rows that
    were `seen` earlier and are gone.

    Raises:
        Problem: a row of another table stands in the way.
    """
    rows = rows_of(conn, job_id)
    fill_in = conn.cursor().mogrify
    script = []
    for row in reversed(rows):  # children first
        names = {"table": row.table, "id": pipeline.tables()[row.table].id}
        sql = DELETE.format(**{name: quote_ident(text, conn) for name, text in names.items()})
        script.append(fill_in(sql, {"key": row.key}).decode())
    if rows := list(dict.fromkeys([*rows, *seen])):
        script.append(fill_in(FORGET, named(rows) | history.BOUNDS).decode())
        joins = tuple((row.key, join) for row in rows for join, key in pipeline.joins().items()
                      if pipeline.parent_name(key.table) == row.table)  # fmt: skip
        if joins:
            script.append(fill_in(FORGET_JOINS, {"joins": joins}).decode())
    try:
        db.execute(conn, ";".join(script))
    except psycopg2.IntegrityError as error:
        stall = error.__context__
        text = (f"job {job_id} cannot be deleted: {first_line(error)}; "
                "those rows could go with it: ON DELETE CASCADE")  # fmt: skip
        raise Problem(f"{stall}; {text}" if isinstance(stall, Problem) else text) from None
    what = f"job {job_id} and its history are deleted"
    if len(rows) > 1:
        what = (
            f"job {job_id}, its {counted(len(rows) - 1, 'row')} in other tables and their history "
            "are deleted"
        )
    click.echo(plain(what))
