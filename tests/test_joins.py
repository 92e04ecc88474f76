"""Joins: a parent owes a call once every row that belongs to it is in the join's state."""

import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import commands
import psycopg2
import pytest
from claims import LEASE_OVER, all_connected, claim_many, connected, make_due, result, settle
from conftest import ROOT
from faults.test_claims import with_idle_worker
from psycopg2 import errors
from psycopg2.extensions import (
    ISOLATION_LEVEL_READ_COMMITTED,
    ISOLATION_LEVEL_REPEATABLE_READ,
    ISOLATION_LEVEL_SERIALIZABLE,
)
from raw_server import OK, in_turn
from test_upkeep import add_history
from variants import MOVE, PIPELINE, TABLE, VARIANTS, Variants, install, stage
from waiting import PATIENCE

import calls
import db
import history
import joins
import leftovers
import trigger
from demo.stage_server import Answer
from ops.install import apply
from pipeline import Table

JOIN = "jobs_variants (iou_eval, done)"
BAD = b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"
SLOWLY = b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\nRetry-After: 3600\r\n\r\n"
NEVER = b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def conn(variants):
    with connected(variants.database) as conn:
        yield conn


def claim_join(conn, stages=("ad_copy",)):
    """The one call that joins owe, after a look."""
    joins.look(conn)
    [row] = claim_many(conn, 1, stages=list(stages)).claimed
    return row


def joined(variants: Variants, count: int = 2) -> tuple[str, list[str]]:
    """A job whose variants are all in the join's state, and the ids of the variants."""
    job = variants.database.add_job("img_gen", "queued")
    ids = variants.add(job, count=count)
    variants.finish(*ids)
    return job, ids


# --- when it is owed -----------------------------------------------------------------------


def test_look_that_waits_for_a_rewrite_does_not_take_the_rows_for_missing(variants, conn):
    """Its snapshot is older than the rewrite, and sees an empty table."""
    job, _ = joined(variants)
    with variants.database.connect() as change, ThreadPoolExecutor() as pool:
        change.autocommit = False
        change.cursor().execute("ALTER TABLE jobs_variants ADD number serial")
        looking = pool.submit(joins.look, conn)
        variants.database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database())"
        )
        change.commit()
        looking.result()
    [call] = claim_many(conn, 1, stages=["ad_copy"]).claimed
    assert call.key == job


def test_join_is_owed_once_the_last_row_has_come(variants, conn):
    job = variants.database.add_job("img_gen", "queued")
    first, second = variants.add(job, count=2)
    variants.finish(first)
    joins.look(conn)
    assert variants.owed() == []
    variants.finish(second)
    row = claim_join(conn)
    assert (row.key, row.table_name, row.tenant_id, row.owed) == (job, "jobs", "tenant", True)
    settle(conn, result(row))
    assert not joins.look(conn)
    assert variants.owed() == []


PARTITIONED = """
ALTER TABLE jobs_variants RENAME TO before;
CREATE TABLE jobs_variants (LIKE before INCLUDING DEFAULTS, archived boolean DEFAULT false)
    PARTITION BY LIST (archived);
CREATE INDEX ON jobs_variants (job_variants_id);
CREATE INDEX ON jobs_variants (job_id);
CREATE TABLE present PARTITION OF jobs_variants FOR VALUES IN (false);
CREATE TABLE past PARTITION OF jobs_variants FOR VALUES IN (true);
"""


@pytest.mark.parametrize("read", ["as installed", "as found"])
def test_row_that_moves_to_another_partition_has_not_come(variants, conn, read):
    variants.database.rows(PARTITIONED)
    apply(conn)
    job, ids = joined(variants)
    settle(conn, result(claim_join(conn)))
    if read == "as found":  # by a dynamic statement
        variants.database.rows("DROP TRIGGER job_state_listener_change ON jobs_variants")
        variants.database.rows("ALTER TABLE jobs_variants ALTER status TYPE varchar(90)")
    variants.database.rows("UPDATE jobs_variants SET archived = true")
    joins.look(conn)
    assert variants.owed() == []
    variants.database.rows("UPDATE jobs_variants SET archived = false, status = 'queued';"
                           "UPDATE jobs_variants SET archived = true, status = 'done'")  # fmt: skip
    settle(conn, result(claim_join(conn)))
    again = "INSERT INTO jobs_variants VALUES (%s, %s, 'iou_eval', 'done', true)"
    delete = "DELETE FROM jobs_variants WHERE job_variants_id = %s"
    variants.database.rows(f"{delete}; {again}", ids[0], ids[0], job)  # made anew, at one go
    assert claim_join(conn).key == job


def test_row_that_is_born_in_the_state_counts_as_one_that_came(variants, conn):
    job = variants.database.add_job("img_gen", "queued")
    variants.add(job, "iou_eval", "done", count=3)
    assert claim_join(conn).key == job


def test_parent_without_rows_owes_nothing(variants, conn):
    job = variants.database.add_job("img_gen", "queued")
    [only] = variants.add(job)
    variants.delete(only)
    joins.look(conn)
    assert variants.owed() == []


def test_last_row_that_is_missing_may_be_deleted_or_given_away(variants, conn):
    jobs = [joined(variants)[0] for _ in range(2)]
    late = [variants.add(job)[0] for job in jobs]
    while joins.look(conn):
        pass
    assert [owed for owed in variants.owed() if owed[2] == "ad_copy"] == []
    variants.delete(late[0])
    variants.give(late[1], variants.database.add_job("img_gen", "queued"))
    joins.look(conn)
    assert variants.owed() == sorted(("jobs", job, "ad_copy") for job in jobs)


def test_row_that_has_come_may_be_given_to_a_parent_that_waits_for_none_else(variants, conn):
    _, [variant] = joined(variants, 1)
    other, _ = joined(variants, 1)
    for _ in range(2):
        settle(conn, result(claim_join(conn)))
    variants.give(variant, other)
    assert claim_join(conn).key == other


# --- commits that overlap ------------------------------------------------------------------

LEVELS = (
    ISOLATION_LEVEL_READ_COMMITTED,
    ISOLATION_LEVEL_REPEATABLE_READ,
    ISOLATION_LEVEL_SERIALIZABLE,
)
DELETE = "DELETE FROM jobs_variants WHERE job_variants_id = %s"
GIVE = "UPDATE jobs_variants SET job_id = %s WHERE job_variants_id = %s"
ADD = "INSERT INTO jobs_variants SELECT gen_random_uuid(), job_id, 'iou_eval', 'done'" \
      " FROM jobs_variants WHERE job_variants_id = %s"  # fmt: skip


class Application:
    """Moves the three rows of a parent at the same time, each in a transaction of its own."""

    def __init__(self, database, limbo: str):
        self.limbo = limbo
        self.conns = [psycopg2.connect(database.dsn) for _ in range(3)]

    def close(self) -> None:
        for conn in self.conns:
            conn.close()

    def move_all(self, parents: list[tuple]) -> None:
        with ThreadPoolExecutor(3) as pool:
            for rows, extra, chance in parents:
                self.move_rows(pool, rows, extra, chance)

    def move_rows(self, pool, rows: list[str], extra: str | None, chance: random.Random) -> None:
        """Move all rows before the first transaction commits; they commit in random order."""
        order = chance.sample(range(3), 3)
        moved, turns = threading.Barrier(3), [threading.Event() for _ in range(4)]
        turns[0].set()
        plans = [(chance.choice(LEVELS), chance.choice(WAYS)) for _ in rows]
        leave = chance.choice(LEAVING)

        def run(number: int) -> None:
            conn, mine = self.conns[number], order.index(number)
            level, way = plans[number]
            leaves = extra and mine == 1

            def transaction(way: Callable) -> None:
                with conn.cursor() as cursor:
                    way(cursor, rows[number])
                    if leaves:
                        leave(cursor, extra, self.limbo)

            def again() -> None:
                conn.rollback()
                conn.set_isolation_level(ISOLATION_LEVEL_READ_COMMITTED)
                transaction(move)

            conn.set_isolation_level(level)
            try:
                try:
                    transaction(way)
                except errors.SerializationFailure:  # again, as such an application does
                    again()
                moved.wait(PATIENCE)
                assert turns[mine].wait(PATIENCE)
                try:
                    conn.commit()
                except errors.SerializationFailure:
                    again()
                    conn.commit()
            except BaseException:
                moved.abort()
                raise
            finally:
                turns[mine + 1].set()

        list(pool.map(run, range(3)))


def be_deleted(cursor, row: str, _limbo: str) -> None:
    cursor.execute(DELETE, [row])


def be_given_away(cursor, row: str, limbo: str) -> None:
    cursor.execute(GIVE, [limbo, row])


def come_and_be_given_away(cursor, row: str, limbo: str) -> None:
    move(cursor, row)
    be_given_away(cursor, row, limbo)


LEAVING = (be_deleted, be_given_away, come_and_be_given_away)


def move(cursor, row: str) -> None:
    cursor.execute(MOVE, ["iou_eval", "done", row])


def roll_back_and_move(cursor, row: str) -> None:
    move(cursor, row)
    cursor.connection.rollback()
    move(cursor, row)


def move_behind_a_savepoint(cursor, row: str) -> None:
    cursor.execute("SAVEPOINT s")
    move(cursor, row)
    cursor.execute("ROLLBACK TO s")
    move(cursor, row)
    cursor.execute("RELEASE s")


def move_and_add(cursor, row: str) -> None:
    move(cursor, row)
    cursor.execute(ADD, [row])


WAYS = (move, roll_back_and_move, move_behind_a_savepoint, move_and_add)


def call_joins(conn, worker: str, over: threading.Event) -> Counter:
    """A listener's turns until nothing comes any more: how often each parent was called."""
    called, last = Counter(), False
    while not last:
        last = over.is_set()  # one more turn, as something may have come before that
        while (parents := joins.look(conn)) or (last and parents is None):
            pass
        turn = claim_many(conn, 4, worker, ["ad_copy"])
        assert all(row.owed for row in turn.claimed)
        called.update(row.key for row in turn.claimed)
        if turn.claimed:
            last = False
            settle(conn, *[result(row, worker=worker) for row in turn.claimed])
    return called


def test_joins_whose_commits_overlap_in_every_order_are_called_once(each_variants):
    variants, database = each_variants, each_variants.database
    chance = random.Random(1)
    limbo = database.add_job("img_gen", "queued")
    [missing] = variants.add(limbo)
    parents = {}
    for _ in range(80):
        job = database.add_job("img_gen", "queued")
        rows = variants.add(job, "yolo_detect", "queued", 3)
        extra = variants.add(job, "yolo_detect", "queued")[0] if chance.random() < 0.3 else None
        parents[job] = (rows, extra, random.Random(chance.random()))
    over = threading.Event()
    mine = [list(parents.values())[n::4] for n in range(4)]
    with ThreadPoolExecutor(6) as pool, ExitStack() as stack:
        applications = [stack.enter_context(closing(Application(database, limbo))) for _ in mine]
        conns = dict(zip("ab", stack.enter_context(all_connected(database, 2)), strict=True))
        stack.callback(over.set)
        listeners = [pool.submit(call_joins, conns[name], name, over) for name in conns]
        list(pool.map(Application.move_all, applications, mine))
        over.set()
        called = sum((each.result() for each in listeners), Counter())
    assert called == dict.fromkeys(parents, 1)
    # The rows that were given away wait for the one that is missing there.
    variants.delete(missing)
    with connected(database) as conn:
        left = database.value("SELECT count(*) FROM jobs_variants WHERE job_id = %s"
                              " AND current_step <> 'iou_eval'", limbo)  # fmt: skip
        database.rows("DELETE FROM jobs_variants WHERE job_id = %s"
                      " AND current_step <> 'iou_eval'", limbo)  # fmt: skip
        assert left and claim_join(conn).key == limbo


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_join_is_seen_by_a_look_between_any_two_commits(variants, conn, order):
    """Looks after every commit: nothing is owed before the last one."""
    job = variants.database.add_job("img_gen", "queued")
    rows = variants.add(job, count=3)
    applications = [psycopg2.connect(variants.database.dsn) for _ in rows]
    for application, row in zip(applications, rows, strict=True):
        move(application.cursor(), row)
        assert joins.look(conn) == 0
    for number in order:
        assert variants.owed() == []
        applications[number].commit()
        assert joins.look(conn) == 1
    assert variants.owed() == [("jobs", job, "ad_copy")]
    for application in applications:
        application.close()


def test_nobody_waits_for_a_transaction_that_holds_a_row_and_its_parent(variants, conn):
    job = variants.database.add_job("img_gen", "queued")
    first, second, third = variants.add(job, count=3)
    variants.finish(third)
    with closing(psycopg2.connect(variants.database.dsn)) as held:
        held.cursor().execute("UPDATE jobs SET updated_at = now() WHERE job_id = %s", [job])
        move(held.cursor(), first)
        for way in WAYS:
            with closing(psycopg2.connect(variants.database.dsn)) as other:
                other.cursor().execute("SET lock_timeout = '5s'")
                other.commit()
                way(other.cursor(), second)
                other.rollback()
        variants.finish(second)
        assert joins.look(conn) == 1
        held.commit()
        held.cursor().execute("SELECT FROM jobs WHERE job_id = %s FOR UPDATE", [job])
        assert claim_join(conn).owed


# --- who looks -----------------------------------------------------------------------------


def test_looks_that_come_after_the_lock_are_taken_by_whoever_has_it(variants, conn):
    """If two listeners took looks at once, neither would know of those that the other took."""
    with connected(variants.database) as other:
        db.execute(other, "BEGIN;" + joins.LOCK_JOINS.sql)
        job, _ = joined(variants)
        assert joins.look(conn) is None
        assert variants.owed() == []
        db.execute(other, "COMMIT")
    assert joins.look(conn) == 1
    assert variants.owed() == [("jobs", job, "ad_copy")]


@pytest.fixture
def api_of_variants(api):
    for name in ("vlm_analyze", "yolo_detect", "iou_eval", "ad_copy", "instagram"):
        api.on(f"/{name}", lambda _: Answer(200))
    return api


@pytest.fixture
def start(listener, variants, api_of_variants):
    """start(*args, **settings): a listener with the pipeline of variants.py."""

    def start(*args, **settings):
        given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "variants"} | settings
        return listener(variants.database, *args, api=api_of_variants, **given)

    return start


def called(api, path: str) -> list[str]:
    return [request.job_id for request in api.calls() if request.path == path]


def test_two_listeners_call_once_what_rows_of_many_parents_owe(variants, api, start):
    for process in [start(), start()]:
        process.wait_for_line("LISTEN 'job_variant_state_changed' 시작")
    jobs = [joined(variants, 3)[0] for _ in range(20)]
    api.wait_for(lambda api: set(called(api, "/ad_copy")) == set(jobs))
    variants.database.wait_for("SELECT count(*) = 0 FROM stage_calls")
    assert sorted(called(api, "/ad_copy")) == sorted(jobs)


def test_other_calls_go_on_while_a_listener_that_looks_is_frozen(variants, api, start):
    with connected(variants.database) as other:
        db.execute(other, "BEGIN;" + joins.LOCK_JOINS.sql)
        start(SWEEP_INTERVAL=1)
        joined(variants)
        job = variants.database.add_job("ad_copy", "done")
        api.wait_for(lambda api: called(api, "/instagram") == [job])
        assert called(api, "/ad_copy") == []
        db.execute(other, "COMMIT")
    api.wait_for(lambda api: called(api, "/ad_copy"))


def test_look_that_fails_is_one_line_and_keeps_no_other_call(variants, api, start):
    process = start()
    process.wait_for_line("LISTEN 'job_variant_state_changed' 시작")
    variants.database.rows("ALTER FUNCTION stage_join_is_complete RENAME TO gone")
    job, _ = joined(variants)
    process.wait_for_line("조인 확인 실패")
    other = variants.database.add_job("ad_copy", "done")
    api.wait_for(lambda api: called(api, "/instagram") == [other])
    variants.database.rows("ALTER FUNCTION gone RENAME TO stage_join_is_complete")
    api.wait_for(lambda api: called(api, "/ad_copy") == [job])
    assert "재연결" not in process.output


def test_once_ends_though_rows_change_after_a_look_that_failed(variants, caller, monkeypatch):
    calling = caller("http://127.0.0.1:1")
    listener = with_idle_worker(calling.listener)
    listener.once = listener.join_look.once = True
    variants.database.rows("ALTER FUNCTION stage_join_is_complete RENAME TO gone")
    joined(variants)
    assert listener.settle_and_claim(calling.conn) == [] and listener.join_look.failure
    assert listener.finished()
    monkeypatch.setattr(listener.hearing, "hear", lambda _: {db.JOIN_CHANNEL})
    listener.hear(calling.conn)
    assert listener.finished()
    listener.join_look.failure = None
    listener.hear(calling.conn)
    assert not listener.finished()


def test_once_makes_the_call_of_a_join_whose_table_can_be_read_again(variants, caller):
    calling = caller("http://127.0.0.1:1")
    listener = with_idle_worker(calling.listener)
    listener.once = listener.join_look.once = True
    variants.database.rows("ALTER FUNCTION stage_join_is_complete RENAME TO gone")
    job, _ = joined(variants)
    assert listener.settle_and_claim(calling.conn) == [] and listener.join_look.failure
    variants.database.rows("ALTER FUNCTION gone RENAME TO stage_join_is_complete")
    listener.claiming.sweep_at = listener.join_look.rests_until = 0.0
    [call] = listener.settle_and_claim(calling.conn)
    assert (call.job_id, listener.join_look.failure) == (job, None)


STALLED = "SELECT stage FROM stalled_jobs()"
A_DAY_AGO = (
    "UPDATE jobs SET updated_at = updated_at - interval '1 day';"
    "UPDATE stage_joins SET recorded_at = recorded_at - interval '1 day';"
    "UPDATE stage_attempts SET started_at = started_at - interval '1 day',"
    " finished_at = finished_at - interval '1 day'"
)


@pytest.mark.parametrize(
    ("last", "is_changed", "found"),
    [
        (("instagram", "done"), True, []),
        (("instagram", "done"), False, [("ad_copy",)]),
        (("vlm_analyze", "done"), True, [("ad_copy",)]),
        (("hold", "x"), True, [("ad_copy",)]),
    ],
)
def test_parent_that_is_called_again_is_through_where_it_changed_to_the_state_of_a_later_stage(
    variants, conn, caller, accepting, last, is_changed, found
):
    job, [first, _] = joined(variants)
    calling = caller(accepting.url)
    for _ in range(2):
        variants.move(first, "img_gen", "running")
        variants.finish(first)
        joins.look(conn)
        assert calling.call_again().stage == "ad_copy"
        variants.database.move(job, *last)
    at = "clock_timestamp()" if is_changed else "created_at"
    variants.database.rows(f"UPDATE jobs SET updated_at = {at}; {A_DAY_AGO}")
    assert variants.database.rows(STALLED) == found


@pytest.mark.parametrize("is_pruned", [False, True])
def test_parent_that_is_called_again_is_through_where_it_comes_back_after_a_later_stage(
    variants, conn, caller, accepting, is_pruned
):
    job, [first, _] = joined(variants)
    calling = caller(accepting.url)
    for _ in range(2):
        variants.move(first, "img_gen", "running")
        variants.finish(first)
        joins.look(conn)
        assert calling.call_again().stage == "ad_copy"
        variants.database.rows(A_DAY_AGO)
        assert variants.database.rows(STALLED) == [("ad_copy",)]
        variants.database.move(job, "ad_copy", "done")
        assert calling.call_again().stage == "instagram"
        variants.database.move(job, "completed", "yes")
    if is_pruned:
        leftovers.forget_parents(conn)
        variants.database.rows("DELETE FROM stage_attempts")
    variants.database.rows(A_DAY_AGO)
    assert variants.database.rows(STALLED) == []


def test_parent_whose_own_call_was_cancelled_after_that_of_its_join_counts_as_stalled(
    variants, conn, caller, accepting
):
    job, _ = joined(variants)
    joins.look(conn)
    variants.database.move(job, "img_gen", "done")
    paused = "UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'vlm_analyze'"
    variants.database.rows(paused)
    assert caller(accepting.url).call().stage == "ad_copy"
    cancel = "cancel", "--stage", "vlm_analyze", "--yes"
    assert commands.run_here(variants.database.environ, *cancel).code == 0
    variants.database.rows(A_DAY_AGO)
    leftovers.forget_parents(conn)
    assert variants.database.rows(STALLED) == [("ad_copy",)]


def test_parent_that_was_called_for_its_own_state_before_its_join_counts_as_stalled(
    variants, conn, caller, accepting
):
    job, _ = joined(variants)
    assert joins.look(conn) == 1
    variants.database.move(job, "ad_copy", "done")
    calling = caller(accepting.url)
    assert calling.run(calling.claim(only=job)).stage == "instagram"
    variants.database.move(job, "completed", "yes")
    assert calling.call_again().stage == "ad_copy"
    variants.database.rows(A_DAY_AGO)
    leftovers.forget_parents(conn)
    assert variants.database.rows(STALLED) == [("ad_copy",)]


# The routes of retries come after the join, but their stages do not.
RETRIED_LAST = PIPELINE | {
    ("vlm_analyze", "failed"): PIPELINE["img_gen", "done"],
    ("ad_copy", "failed"): PIPELINE[VARIANTS.every("iou_eval", "done")],
}


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (("instagram", "done"), []),
        (("ad_copy", "done"), []),
        (("ad_copy", "waiting"), [("ad_copy",)]),
        (("vlm_analyze", "done"), [("ad_copy",)]),
    ],
)
def test_parent_at_a_stage_that_comes_after_its_join_is_through(
    database, use_pipeline, caller, accepting, state, found
):
    routes = {route: to for route, to in RETRIED_LAST.items() if route != ("ad_copy", "done")}
    use_pipeline(routes | {("instagram", "ready"): stage("instagram")})
    variants = install(database, TABLE)
    job, _ = joined(variants)
    database.move(job, *state)
    calling = caller(accepting.url)
    joins.look(calling.conn)
    assert calling.call().outcome == "succeeded"
    database.rows("UPDATE jobs SET updated_at = clock_timestamp();" + A_DAY_AGO)
    assert database.rows(STALLED) == found


@pytest.mark.parametrize("answer", [NEVER, BAD])
@pytest.mark.parametrize("status", ["running", "failed"])
def test_call_is_repeated_where_the_parent_was_sent_back_from_its_stage(
    variants, conn, caller, serve, answer, status
):
    job, _ = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(answer, OK)).url)
    calling.call()
    variants.database.move(job, "ad_copy", status)
    variants.database.move(job, "img_gen", "queued")
    variants.database.rows(LEASE_OVER)
    assert calling.call_again().outcome == "succeeded"


def test_run_once_ends_after_the_last_look(variants, api_of_variants, run_command):
    """More parents than one look takes, the complete one among the last."""
    variants.database.rows(MANY, 1500)
    job, _ = joined(variants)
    given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "variants"}
    variants.database.rows("UPDATE stage_looks SET parent_id = parent_id")
    assert run_command(variants.database, "run", "--once", api=api_of_variants, **given).code == 0
    assert called(api_of_variants, "/ad_copy") == [job]
    assert variants.database.value("SELECT count(*) FROM stage_looks") == 0


def test_run_once_makes_the_other_calls_though_a_look_fails_and_exits_1(
    variants, api_of_variants, run_command
):
    joined(variants)
    other = variants.database.add_job("ad_copy", "done")
    given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "variants"}
    variants.database.rows("ALTER TABLE jobs_variants RENAME status TO s")
    done = run_command(variants.database, "run", "--once", api=api_of_variants, **given)
    assert done.code == 1
    assert called(api_of_variants, "/instagram") == [other]


MANY = """
WITH parents AS (
    INSERT INTO jobs (job_id, current_step, status)
    SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 'img_gen', 'queued'
    FROM generate_series(1, %s) AS n RETURNING job_id
)
INSERT INTO jobs_variants (job_id, current_step, status)
SELECT job_id, step, 'done' FROM parents, unnest(ARRAY['iou_eval', 'gone']) AS step
"""


def test_look_wakes_the_listeners_that_may_call_what_it_records(variants, conn):
    with closing(variants.database.connect()) as ear:
        ear.cursor().execute(f'LISTEN "{db.WAKE_CHANNEL}"')
        variants.finish(variants.add(variants.database.add_job("x"), count=2)[0])
        joins.look(conn)
        ear.poll()
        assert ear.notifies == []
        joined(variants)
        joins.look(conn)
        ear.cursor().execute("SELECT")
        assert [heard.channel for heard in ear.notifies] == [db.WAKE_CHANNEL]


@pytest.mark.slow
def test_looks_of_a_day_without_a_listener_are_taken_in_batches(variants, conn):
    database = variants.database
    database.rows("SET session_replication_role = replica")
    database.rows("INSERT INTO jobs (job_id, current_step, status) SELECT md5(n::text)::uuid,"
                  " 'img_gen', 'queued' FROM generate_series(1, 33000) AS n")  # fmt: skip
    database.rows("INSERT INTO jobs_variants SELECT gen_random_uuid(), job_id, 'iou_eval', 'done'"
                  " FROM jobs, generate_series(1, 3)")  # fmt: skip
    database.rows("INSERT INTO stage_looks (parent_id, join_of, arrived)"
                  " SELECT job_id, %s, true FROM jobs_variants", JOIN)  # fmt: skip
    looks = [parents for parents in iter(lambda: joins.look(conn), 0)]
    assert (max(looks), sum(looks)) == (1000, 33000)
    assert database.value("SELECT count(*) FROM stage_calls WHERE stage = 'ad_copy'") == 33000


# --- what the parent owes beside it --------------------------------------------------------


def test_what_the_parent_owes_itself_and_its_join_do_not_touch_each_other(variants, conn):
    job, _ = joined(variants)
    joins.look(conn)
    variants.database.move(job, "img_gen", "done")
    assert variants.owed() == [("jobs", job, "ad_copy"), ("jobs", job, "vlm_analyze")]
    rows = claim_many(conn, 2, stages=["ad_copy", "vlm_analyze"]).claimed
    assert {row.stage for row in rows if row.owed} == {"ad_copy", "vlm_analyze"}
    settle(conn, *[result(row) for row in rows if row.stage == "vlm_analyze"])
    assert variants.owed() == [("jobs", job, "ad_copy")]
    variants.database.move(job, "vlm_analyze", "running")
    variants.database.move(job, "cancelled", "cancelled")
    assert variants.owed() == [("jobs", job, "ad_copy")]
    settle(conn, *[result(row) for row in rows if row.stage == "ad_copy"])
    assert variants.owed() == []


def test_two_joins_of_one_parent_are_two_calls(database, use_pipeline):
    use_pipeline(PIPELINE | {VARIANTS.every("upscale", "done"): stage("notify")})
    variants = install(database, TABLE)
    job, rows = joined(variants)
    with connected(database) as conn:
        settle(conn, result(claim_join(conn, ["ad_copy", "notify"])))
        for row in rows:
            variants.move(row, "upscale", "done")
        assert claim_join(conn, ["ad_copy", "notify"]).stage == "notify"
        variants.finish(*rows)
        again = claim_join(conn, ["ad_copy", "notify"])
        assert (again.stage, again.key) == ("ad_copy", job)
    assert len(variants.owed()) == 2


# --- when it is called again, and when it is not -------------------------------------------


def test_call_without_an_answer_is_not_repeated_once_the_parent_has_moved(
    variants, conn, caller, serve
):
    job, _ = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(NEVER, OK)).url)
    assert calling.call().outcome == "unknown"
    variants.database.move(job, "ad_copy", "running")
    variants.database.rows(LEASE_OVER)
    assert calling.claim() is None
    assert variants.database.attempts(job)[-1].error == "the job has moved on: (ad_copy, running)"
    assert not joins.look(conn) and variants.owed() == []


def test_call_whose_first_claim_was_lost_is_not_repeated_once_the_parent_has_moved(
    variants, conn, caller, serve
):
    """A listener that ends right after its claim has not noted where the parent was."""
    job, _ = joined(variants)
    assert claim_join(conn).attempt == 1
    variants.database.rows(LEASE_OVER)
    calling = caller(serve(in_turn(NEVER, OK)).url)
    assert calling.call().outcome == "unknown"
    variants.database.move(job, "ad_copy", "running")
    variants.database.rows(LEASE_OVER)
    assert calling.claim() is None
    assert variants.database.attempts(job)[-1].error == "the job has moved on: (ad_copy, running)"


@pytest.mark.parametrize("answer", [NEVER, BAD])
def test_call_is_repeated_while_the_parent_is_where_it_was(variants, conn, caller, serve, answer):
    job, _ = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(answer, OK)).url)
    assert calling.call().outcome in ("unknown", "retry")
    variants.database.rows(LEASE_OVER)
    assert calling.call_again().outcome == "succeeded"
    assert len(variants.database.attempts(job)) == 2 and variants.owed() == []


def test_refused_call_is_given_up_and_not_forgotten_where_the_parent_went_its_own_way(
    variants, conn, caller, serve
):
    job, _ = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(BAD, OK)).url)
    assert calling.call().outcome == "retry"
    variants.database.move(job, "vlm_analyze", "running")
    variants.database.rows("UPDATE stage_calls SET due_at = now()")
    assert calling.claim() is None
    calling.settle()
    error = "refused, and the job is at (vlm_analyze, running) since"
    assert variants.database.attempts(job)[-1].error == error
    assert variants.database.owed(job).given_up
    make_due(conn, job)
    assert calling.call().outcome == "succeeded"


def test_refused_call_is_over_where_its_stage_has_set_the_parent_to_failed_and_another_follows(
    variants, use_pipeline, caller, serve
):
    use_pipeline(PIPELINE | {("ad_copy", "failed"): stage("cleanup")})
    with connected(variants.database) as conn:
        apply(conn)
        job, _ = joined(variants)
        joins.look(conn)
    page = b"HTTP/1.1 500 No\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000
    calling = caller(serve(in_turn(page)).url)
    call = calling.claim()
    variants.database.move(job, "ad_copy", "failed")
    calling.run(call)
    calling.settle()
    variants.database.move(job, "cleanup", "done")
    variants.database.rows("UPDATE stage_calls SET due_at = now()")
    assert calling.claim() is None
    calling.settle()
    assert [row.outcome for row in variants.database.attempts(job)] == ["retry", "skipped"]
    assert variants.owed() == []


def test_refused_call_whose_lost_attempt_was_accepted_after_all_is_over(
    variants, conn, caller, serve
):
    job, _ = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(BAD)).url)
    lost = calling.claim()
    variants.database.rows(LEASE_OVER)
    assert calling.call().outcome == "retry"
    calling.listener.keep(lost, trigger.result(lost, "succeeded"))
    calling.settle()
    variants.database.move(job, "vlm_analyze", "running")
    variants.database.rows("UPDATE stage_calls SET due_at = now()")
    assert calling.claim() is None
    calling.settle()
    assert variants.database.attempts(job)[-1].outcome == "skipped"
    assert variants.database.owed(job) is None


def test_call_of_a_held_stage_does_not_care_where_the_parent_has_gone(
    variants, conn, caller, serve
):
    job, _ = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(SLOWLY, OK)).url)
    assert calling.call().outcome == "held"
    variants.database.move(job, "vlm_analyze", "running")
    assert calling.claim() is None
    assert calling.call_again().outcome == "succeeded"


def test_row_that_is_done_again_after_the_call_makes_a_new_one(variants, conn):
    _, [first, _] = joined(variants)
    before = claim_join(conn)
    settle(conn, result(before))
    variants.move(first, "img_gen", "running")
    assert not joins.look(conn)
    variants.finish(first)
    after = claim_join(conn)
    assert after.call_id != before.call_id and after.attempt == 1


def test_row_that_is_done_again_during_the_call_is_called_after_it(variants, conn):
    _, [first, _] = joined(variants)
    before = claim_join(conn)
    variants.move(first, "img_gen", "running")
    variants.finish(first)
    joins.look(conn)
    assert claim_many(conn, 1, stages=["ad_copy"]).claimed == []
    settle(conn, result(before))
    [after] = claim_many(conn, 1, stages=["ad_copy"]).claimed
    assert after.call_id != before.call_id and after.owed


def test_row_that_is_deleted_after_the_call_makes_none(variants, conn):
    job, [first, _] = joined(variants)
    settle(conn, result(claim_join(conn)))
    variants.delete(first)
    [late] = variants.add(job)
    variants.delete(late)
    joins.look(conn)
    assert variants.owed() == []


def test_table_that_cannot_be_read_keeps_no_other_from_being_pruned(variants, conn, caplog):
    database = variants.database
    [rests] = variants.add(database.add_job("x"), "img_gen", "done")
    add_history(database, 3, days=40)
    database.rows(
        "INSERT INTO stage_attempts (job_id, table_name, call_id, attempt, stage, worker,"
        "                            started_at, finished_at, outcome)"
        " SELECT %s, 'jobs_variants', 1, 1, 'yolo_detect', 'w', at, at, 'succeeded'"
        " FROM (SELECT now() - interval '41 days' AS at) AS t;"
        "ALTER TABLE jobs_variants RENAME status TO state",
        rests,
    )
    history.count(conn)
    assert history.prune(conn, 30).pruned == 3
    assert database.value("SELECT job_id::text FROM stage_attempts") == rests
    assert "prune: jobs_variants: column r.status does not exist" in caplog.text


@pytest.mark.parametrize(("outcome", "pruned"), [("cancelled", 0), ("retry", 1)])
def test_cancelled_call_of_a_join_is_kept_in_the_history(variants, conn, outcome, pruned):
    joined(variants)
    variants.database.rows(
        "INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at,"
        " finished_at, outcome) SELECT job_id, 1, 1, 'ad_copy', 'kim', at, at, %s"
        " FROM jobs, LATERAL (SELECT now() - interval '40 days' AS at) AS t",
        outcome,
    )
    assert history.count(conn) == 1 and history.prune(conn, 30).pruned == pruned


def test_parent_is_neither_stalled_nor_owing_once_its_history_is_pruned(
    variants, conn, caller, serve
):
    job, _ = joined(variants)
    joins.look(conn)
    caller(serve(in_turn(OK)).url).call()
    variants.database.move(job, "instagram", "done")
    variants.database.rows("DELETE FROM stage_attempts")
    variants.database.rows(
        "UPDATE jobs SET updated_at = now() - interval '60 days';"
        "UPDATE stage_joins SET recorded_at = now() - interval '60 days'"
    )
    assert variants.database.rows("SELECT * FROM resting_rows() WHERE table_name = 'jobs'") == []
    assert not joins.look(conn) and variants.owed() == []


@pytest.mark.parametrize("comes_back", [True, False])
def test_row_that_leaves_before_the_claim_takes_the_call_with_it(
    variants, conn, caller, accepting, comes_back
):
    job, [first, _] = joined(variants)
    joins.look(conn)
    calling = caller(accepting.url)
    variants.move(first, "yolo_detect", "running")
    assert calling.claim() is None
    assert (
        variants.database.attempts(job)[-1].error
        == f"the job has moved on: not every row is in {JOIN}"
    )
    joins.look(conn)
    assert variants.owed() == []
    variants.finish(first) if comes_back else variants.delete(first)
    joins.look(conn)
    assert calling.call().outcome == "succeeded"
    assert not joins.look(conn) and variants.owed() == []


def test_row_that_is_done_again_before_the_claim_makes_one_call(variants, conn, caller, accepting):
    job, [first, _] = joined(variants)
    joins.look(conn)
    calling = caller(accepting.url)
    variants.move(first, "yolo_detect", "running")
    variants.finish(first)  # and nobody has looked yet
    assert calling.claim() is None
    assert "looked at anew" in variants.database.attempts(job)[-1].error
    joins.look(conn)
    assert calling.call().outcome == "succeeded"
    assert not joins.look(conn) and variants.owed() == []


def test_look_that_comes_late_over_a_lost_connection_makes_no_second_call(variants, conn):
    _, [first, _] = joined(variants)
    row = claim_join(conn)
    variants.move(first, "yolo_detect", "running")
    # Its listener asks for a look, as the call is not to be made, and loses the connection.
    assert calls.give_back(conn, "w", []).given_back == 1
    variants.finish(first)
    settle(conn, result(claim_join(conn)))
    joins.reopen(conn, row, "w")
    assert not joins.look(conn) and variants.owed() == []


def test_row_that_leaves_during_a_call_that_fails_has_it_called_when_it_is_back(
    variants, conn, caller, serve
):
    _, [first, _] = joined(variants)
    joins.look(conn)
    calling = caller(serve(in_turn(BAD, OK)).url)
    calling.call()
    variants.move(first, "yolo_detect", "running")
    variants.database.rows("UPDATE stage_calls SET due_at = now()")
    assert calling.claim() is None
    variants.finish(first)
    joins.look(conn)
    assert calling.call().outcome == "succeeded"


def test_deleted_parent_is_skipped_and_forgotten(variants, conn, caller, accepting):
    job, _ = joined(variants)
    living, _ = joined(variants)
    joins.look(conn)
    variants.database.rows("DELETE FROM jobs WHERE job_id = %s", job)
    calling = caller(accepting.url)
    assert calling.call().job_id == living
    assert calling.claim() is None
    assert variants.database.attempts(job)[-1].error == "the job has moved on: deleted"
    assert leftovers.forget_parents(conn, batch=1000) is None
    known = variants.database.rows("SELECT parent_id::text FROM stage_joins")
    assert [row.parent_id for row in known] == [living]


def test_deleted_parents_are_found_a_batch_at_a_time(variants, conn):
    for _ in range(7):
        joined(variants, 1)
    joins.look(conn)
    variants.database.rows("DELETE FROM jobs")
    after, batches = leftovers.forget_parents(conn, batch=3), 1
    while after is not None:
        after, batches = leftovers.forget_parents(conn, after, batch=3), batches + 1
    assert variants.database.value("SELECT count(*) FROM stage_joins") == 0
    assert batches <= 4


# --- further down --------------------------------------------------------------------------

CROPS = Table("crops", id="crop_id", parent=(VARIANTS, "variant_id"))
CROPS_TABLE = """
CREATE TABLE crops (
    crop_id      uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    variant_id   uuid NOT NULL REFERENCES jobs_variants ON DELETE CASCADE,
    current_step text,
    status       text
);
CREATE INDEX ON crops (variant_id);
"""
THREE_LEVELS = {
    ("img_gen", "done"): stage("vlm_analyze"),
    CROPS("cut", "done"): stage("sharpen"),
    CROPS.every("sharpen", "done"): stage("yolo_detect"),
    VARIANTS.every("yolo_detect", "done"): stage("ad_copy"),
}


def test_rows_of_rows_are_joined_for_their_parent_and_that_for_its_own(
    database, use_pipeline, caller, accepting
):
    use_pipeline(THREE_LEVELS)
    variants = install(database, TABLE, CROPS_TABLE)
    job = database.add_job("img_gen", "queued")
    [variant] = variants.add(job)
    [crop] = database.rows("INSERT INTO crops VALUES (DEFAULT, %s, 'cut', 'done')"
                           " RETURNING crop_id::text", variant)  # fmt: skip
    calling = caller(accepting.url)
    for table, step in (("crops", "sharpen"), ("jobs_variants", "yolo_detect")):
        joins.look(calling.conn)
        calling.run(calling.claim())
        calling.settle()
        database.rows(f"UPDATE {table} SET current_step = %s, status = 'done'", step)
    joins.look(calling.conn)
    calling.run(calling.claim())
    bodies = [json.loads(request.body) for request in accepting.requests]
    assert bodies == [
        {"crop_id": crop.crop_id, "variant_id": variant, "tenant_id": "tenant"},
        {"job_variants_id": variant, "job_id": job, "tenant_id": "tenant"},
        {"job_id": job, "tenant_id": "tenant"},
    ]


# --- whose tenant --------------------------------------------------------------------------

CUT = "INSERT INTO crops SELECT gen_random_uuid(), job_variants_id, %s, 'done' FROM jobs_variants"


@pytest.mark.parametrize("is_seen", [True, False])
def test_stalled_row_whose_own_rows_are_joined_has_the_tenant_of_its_parent(
    database, use_pipeline, caller, accepting, is_seen
):
    use_pipeline(THREE_LEVELS)
    variants = install(database, TABLE, CROPS_TABLE)
    variants.add(database.add_job("x"))
    database.rows(f"{CUT}; {CUT}", "sharpen", "sharpen" if is_seen else "x")
    calling = caller(accepting.url)
    joins.look(calling.conn)
    if is_seen:
        calling.run(calling.claim())
        calling.settle()
        database.rows(A_DAY_AGO)
    else:
        database.rows("SET session_replication_role = replica")
        database.rows("UPDATE crops SET current_step = 'sharpen'")
    found = "SELECT stage, tenant_id FROM resting_rows()"
    assert database.rows(found) == [("yolo_detect", "tenant")]


def test_row_of_a_row_is_found_by_the_tenant_of_the_job_above(database, use_pipeline, tmp_path):
    use_pipeline(THREE_LEVELS)
    variants = install(database, TABLE, CROPS_TABLE)
    variants.add(database.add_job("x"))
    database.rows("SET session_replication_role = replica")
    database.rows(CUT, "cut")
    environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    for given in (["--stalled"], ["--table", "crops"]):
        done = commands.run_here(environ, "jobs", "--json", "--tenant", "tenant", *given)
        [crop] = json.loads(done.out)["jobs"]
        assert (crop["table_name"], crop["tenant_id"]) == ("crops", "tenant")


def test_row_with_a_tenant_of_its_own_is_called_with_it_and_found_by_it(
    database, use_pipeline, tmp_path
):
    use_pipeline(PIPELINE)
    install(database, TABLE, "ALTER TABLE jobs_variants ADD tenant_id text")
    job = database.add_job("img_gen", "queued")
    database.rows("INSERT INTO jobs_variants (job_id, current_step, status, tenant_id)"
                  " VALUES (%s, 'img_gen', 'done', 'its own')", job)  # fmt: skip
    with connected(database) as conn:
        [row] = claim_many(conn, 1, stages=["yolo_detect"]).claimed
    assert (row.tenant_id, row.parent_id) == ("its own", job)
    environ = database.environ | {"HEARTBEAT_DIR": str(tmp_path)}
    done = commands.run_here(environ, "jobs", "--json", "--tenant", "its own")
    assert [found["tenant_id"] for found in json.loads(done.out)["jobs"]] == ["its own"]
