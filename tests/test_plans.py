"""Plans: the same indexes with an empty, a full and a drained queue, whenever ANALYZE last ran."""

import re
from contextlib import closing
from uuid import uuid4

import psycopg2
import pytest
from claims import STAGES, claim, claim_many, connected, held, result, settle, wanted

import calls
import checks
import db
import history
import joins
import leftovers
import pipeline
import troubles
from calls import Result

pytestmark = pytest.mark.slow

QUIET = "".join(
    f"ALTER TABLE {table} SET (autovacuum_enabled = off);"
    for table in (
        "stage_calls",
        "stage_attempts",
        "stage_leases",
        "stage_looks",
        "stage_joins",
        "pipeline_stages",
        "jobs",
    )
)
# Fills the queue as the application's transactions would, but quicker.
FILL = """
SET session_replication_role = replica;
INSERT INTO jobs (job_id, current_step, status)
SELECT md5(n::text)::uuid, 'img_gen', 'done' FROM generate_series(1, 20000) AS n;
INSERT INTO stage_calls (job_id, current_step, status, stage)
SELECT job_id, current_step, status, (%s::text[])[1 + (hashtext(job_id::text) & 3)] FROM jobs;
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            outcome)
SELECT job_id, call_id, 1, stage, 'w', now(), now(), 'retry' FROM stage_calls;
INSERT INTO stage_looks (parent_id, join_of, arrived) SELECT job_id, 'every', true FROM jobs;
INSERT INTO stage_joins (parent_id, join_of, is_open) SELECT job_id, 'every', true FROM jobs
ON CONFLICT DO NOTHING;
RESET session_replication_role
"""
# How the queue came to be what it is: each step follows on the one before.
QUEUES = {
    "empty": "",
    "empty, then full": FILL,
    "full and analysed": "ANALYZE",
    "analysed when full, then drained": "DELETE FROM stage_calls; DELETE FROM jobs;"
    "DELETE FROM stage_looks; DELETE FROM stage_joins",
    "drained and vacuumed": "VACUUM ANALYZE",
    "vacuumed when empty, then full": FILL,
}
# Counters since some earlier moment; a test takes the difference of two readings.
READ = """
SELECT relname, seq_scan, idx_scan, idx_tup_fetch + seq_tup_read
FROM pg_stat_xact_user_tables WHERE schemaname = 'public'
"""


def explain(conn, statement: db.Statement | str, given: dict) -> str:
    """The plan of one statement, as this session runs it."""
    prepared = isinstance(statement, db.Statement)
    sql = conn.prepared[statement.name] if prepared else statement
    return "\n".join(row[0] for row in db.execute(conn, "EXPLAIN " + sql, given))


# Tables with few rows, which may be read in any way.
SMALL = ("pipeline_stages", "stage_limits", "stage_leases", "stage_totals", "stage_totals_mark")


def scans(plan: str) -> set[str]:
    """How our big tables are read: 'Index Scan using jobs_pkey on jobs'."""
    plan = plan.replace("Index Only Scan", "Index Scan").replace("Scan Backward", "Scan")
    found = re.findall(r"((?:Seq|Index|Heap|Tid) Scan (?:using \w+ )?on (\w+))", plan)
    return {scan for scan, table in found if table not in SMALL}


def parameters(database, conn) -> dict:
    """As of a turn that settles one call and claims others; only types matter to the planner."""
    job = database.value("SELECT coalesce(min(job_id::text), gen_random_uuid()::text) FROM jobs")
    now = str(database.value("SELECT now()"))
    results = [Result(job, 1, 1, "vlm_analyze", "w", now, "retry", delay=5.0)]
    both = dict.fromkeys(("results", "failures"), calls.as_json(conn, results))
    given = both | {
        "only": job,
        "only_call": 1,
        "only_after": 0,
        "free": 8,
        "worker": "w",
        "accepted": "{}",
        "accepted_at": "{}",
    }
    given |= calls.as_arrays(wanted(most=8, share=2)) | {"sweep": False, "asked_at": now}
    given |= {"job_id": job, "call_id": 1, "table": "jobs", "stage": "vlm_analyze"}
    given |= {"wake": db.WAKE_CHANNEL, "after": job, "parent_id": job, "join": "every"}
    return given | {
        "days": 30,
        "pruned_until": now,
        "unreadable": [],
        "batch": 100,
        "step": "x",
        "status": "y",
        "first": True,
        **history.BOUNDS,
    }


BY_DUE = "Index Scan using stage_calls_due_idx on stage_calls"
BY_JOB = "Index Scan using stage_calls_pkey on stage_calls"
HISTORY = "Index Scan using stage_attempts_pkey on stage_attempts"
BY_TIME = "Index Scan using stage_attempts_finished_idx on stage_attempts"
LOOKS = "Index Scan using stage_looks_pkey on stage_looks"
JOINS = "Index Scan using stage_joins_pkey on stage_joins"
RESTS = history.RESTS.format(name="'jobs'", table="jobs", id="job_id", collate="")
PRUNE = history.PRUNE.format(rests=RESTS)
PLANS = {
    calls.PAY: {BY_JOB},
    calls.POSTPONE: {BY_JOB},
    calls.LIFT: set(),
    calls.HOLD: set(),
    calls.LOCK_LIMITS: set(),
    calls.CLAIM: {BY_DUE, BY_JOB, HISTORY},
    calls.CLAIM_BY_HAND: {BY_JOB, HISTORY},
    calls.NEXT_DUE: {BY_DUE},
    checks.SPENT_BEFORE: {HISTORY},
    joins.LOCK_JOINS: set(),
    joins.LOOK: {LOOKS, "Tid Scan on stage_looks", JOINS},
    joins.NOTE: {JOINS},
    leftovers.FORGET_PARENTS: {JOINS, BY_JOB, HISTORY},
    history.COUNT: {BY_TIME},
    PRUNE: {BY_TIME, "Tid Scan on stage_attempts", "Index Scan using jobs_pkey on jobs"},
}
READS = re.compile(r"Scan (?:Backward )?using stage_(?:calls|attempts)_\w+ on .*\n *(.*)")
# The claim reads on in the index from where the last one was, and no further than what is due.
SINCE = re.compile(r"Index Cond: \(\(stage = wanted.stage\) AND \(due_at >= wanted.since\)"
                   r" AND \(due_at < 'infinity'.*?\) AND \(due_at <= CASE")  # fmt: skip


def test_listener_reads_by_index_whatever_the_queue_was(each_database):
    each_database.rows(QUIET)
    with connected(each_database) as conn:
        db.prepare(conn, [one for one in PLANS if isinstance(one, db.Statement)])
        for queue, step in QUEUES.items():
            each_database.rows(step or "SELECT", *[STAGES] * step.count("%s"))
            given = parameters(each_database, conn)
            for statement, expected in PLANS.items():
                plan = explain(conn, statement, given)
                assert scans(plan) == expected, f"{queue}: {plan}"
                assert not re.search("Hash |Merge|JIT", plan), f"{queue}: {plan}"
                # A plan made while the queue was empty may not read a whole index.
                reads = READS.findall(plan)
                assert all(line.startswith("Index Cond") for line in reads), f"{queue}: {plan}"
            plan = explain(conn, calls.CLAIM, given)
            assert SINCE.search(plan), f"{queue}: {plan}"


def read_by(conn, act) -> dict[str, tuple[int, int, int]]:
    """For each table the sequential scans, index scans and rows that `act()` needs."""
    cursor, looks = conn.cursor(), []
    cursor.execute("BEGIN")
    for do in (None, act):
        if do:
            do()
        cursor.execute(READ)
        looks.append({name: counts for name, *counts in cursor})
    cursor.execute("ROLLBACK")
    before, after = looks
    return {
        table: tuple(n - m for n, m in zip(counts, before.get(table, (0, 0, 0)), strict=True))
        for table, counts in after.items()
    }


def rows_read(conn, act) -> dict[str, int]:
    return {table: rows for table, (_, _, rows) in read_by(conn, act).items()}


def test_claim_reads_a_handful_of_rows_of_a_full_queue(each_database):
    each_database.rows(QUIET + "ANALYZE;" + FILL, STAGES)
    with connected(each_database) as conn:
        ended = [result(row) for row in claim_many(conn, 8, share=2).claimed]
        read = rows_read(conn, lambda: claim_many(conn, 8, results=ended, share=2))
        # Settled, found, taken: each call a few times, whatever the queue holds.
        assert 0 < read["stage_calls"] <= 8 * len(ended)
        assert read["jobs"] == 8


def test_held_stages_cost_nothing_however_many_calls_they_have(each_database):
    each_database.rows(QUIET + FILL, STAGES)
    each_database.rows("UPDATE stage_calls SET stage = 'vlm_analyze'")
    with connected(each_database) as conn:
        settle(conn, held(claim(conn), retry_after=60))
        # What is read is the next due call of every stage, to know when to look again.
        assert rows_read(conn, lambda: claim(conn))["stage_calls"] <= len(STAGES)


def test_a_batch_of_upkeep_reads_no_more_than_it_checks(each_database):
    each_database.rows(QUIET + FILL, STAGES)
    each_database.rows("UPDATE stage_attempts SET finished_at = now() - random() * interval '1 h'")
    each_database.rows("UPDATE stage_calls SET due_at = 'infinity' WHERE job_id::text < '03'")
    given_up = each_database.value("SELECT count(*) FROM stage_calls WHERE due_at = 'infinity'")
    each_database.rows("VACUUM stage_attempts, stage_calls")
    with connected(each_database) as conn:
        read = read_by(conn, lambda: troubles.newly_failed(conn, batch=100))
        assert read["jobs"][0] == 0 and read["jobs"][2] <= 100
        assert read["stage_attempts"][0] == 0 and read["stage_attempts"][2] <= 300
        read = read_by(conn, lambda: leftovers.forget_deleted(conn, "w", batch=10))
        assert read["jobs"][0] == 0 and read["jobs"][2] <= 10
        assert read["stage_calls"][0] == 0 and read["stage_calls"][2] <= given_up + 30


# --- the database trigger ------------------------------------------------------------------


@pytest.fixture
def application(each_database):
    """A session that has planned the trigger's statements for good while nothing was owed."""
    each_database.rows(QUIET + "ANALYZE")
    job = each_database.add_job("img_gen", "queued")
    with closing(each_database.connect()) as conn:
        cursor = conn.cursor()
        for number in range(20):  # from the sixth on, plpgsql may keep one plan for all
            status = "running" if number % 2 else "done"
            cursor.execute("UPDATE jobs SET status = %s WHERE job_id = %s", [status, job])
        cursor.execute("ANALYZE; INSERT INTO jobs (current_step, status) VALUES ('x', 'y')")
        each_database.rows(FILL, STAGES)
        yield conn, job


MOVES = """
UPDATE jobs SET status = 'done' WHERE job_id = %(job)s;
UPDATE jobs SET status = 'running' WHERE job_id = %(job)s;
INSERT INTO jobs (current_step, status) VALUES ('img_gen', 'done')
"""


def explained(conn, job: str) -> list[str] | None:
    """The plans of the trigger's statements; None where the server has no auto_explain."""
    cursor = conn.cursor()
    try:
        cursor.execute("LOAD 'auto_explain'")
    except psycopg2.errors.UndefinedFile:
        return None
    cursor.execute("SET auto_explain.log_min_duration = 0; SET client_min_messages = log")
    cursor.execute("SET auto_explain.log_nested_statements = on")
    cursor.execute(MOVES, {"job": job})
    cursor.execute("SET auto_explain.log_min_duration = -1; RESET client_min_messages")
    return [plan for plan in conn.notices if re.search("on (stage_calls|pipeline_stages)", plan)]


def test_trigger_planned_when_empty_reads_by_index_when_full(each_database, application):
    conn, job = application
    plans = explained(conn, job)
    if plans is not None:
        assert not any(re.search("Seq Scan|Sort|JIT", plan) for plan in plans), plans
        indexes = [re.search(r"(?:using|Arbiter Indexes:) (\w+)", plan)[1] for plan in plans]
        # Coming, where an open call is in the way; going; born.
        assert indexes == ["stage_calls_pkey"] * 4, plans
    for _ in ("full", "drained"):
        read = read_by(conn, lambda: conn.cursor().execute(MOVES, {"job": job}))
        sequential, _, rows = read["stage_calls"]
        assert (sequential, rows <= 5) == (0, True)
        assert read.get("pipeline_stages", (0, 0, 0)) == (0, 0, 0)
        each_database.rows("DELETE FROM stage_calls")


def test_look_for_stalled_jobs_reads_each_row_a_few_times(each_database):
    """Planned while there was one job, and 20,000 are there now."""
    each_database.add_job("img_gen", "running")
    for table in ("jobs", "stage_attempts", "stage_calls"):
        each_database.rows(f"VACUUM ANALYZE {table}")
    with connected(each_database) as conn:
        troubles.newly_stalled(conn)
        each_database.rows(FILL, STAGES)
        read = rows_read(conn, lambda: troubles.newly_stalled(conn))
    assert max(read["jobs"], read["stage_attempts"]) <= 5 * 20_000


# --- joins ---------------------------------------------------------------------------------


def test_look_at_one_parent_reads_its_rows_alone(variants):
    """Planned while there was nothing, and with 20,000 rows of others there now."""
    database = variants.database
    database.rows(QUIET + "ANALYZE")
    with connected(database) as conn:
        joins.look(conn)
        database.rows(FILL, STAGES)
        database.rows("SET session_replication_role = replica; DELETE FROM stage_looks;"
                      "INSERT INTO jobs_variants SELECT gen_random_uuid(), job_id, 'iou_eval',"
                      " 'done' FROM jobs; RESET session_replication_role")  # fmt: skip
        variants.finish(*variants.add(database.add_job("x"), count=3))
        read = read_by(conn, lambda: joins.look(conn))
        assert database.value("SELECT count(*) FROM stage_looks") == 3  # rolled back
    for table in ("jobs", "jobs_variants", "stage_calls", "stage_joins", "stage_looks"):
        sequential, _, rows = read[table]
        assert (sequential, rows <= 20) == (0, True), (table, read[table])


SOME = "SELECT job_variants_id::text FROM jobs_variants OFFSET 15000 LIMIT 4"


def test_row_and_its_parent_are_read_by_their_ids(variants):
    """For the parent's tenant; planned while there was one of each, and 20,000 are there now."""
    database = variants.database
    [first] = variants.add(database.add_job("x"))
    for table in ("jobs", "jobs_variants"):
        database.rows(f"VACUUM ANALYZE {table}")
    ask = "SELECT tenant_id FROM stage_call_row('jobs_variants', '', %(id)s)"
    with connected(database) as conn:
        db.execute(conn, ask, {"id": first})
        database.rows(FILL, STAGES)
        database.rows("INSERT INTO jobs_variants"
                      " SELECT gen_random_uuid(), job_id, 'x', 'x' FROM jobs")  # fmt: skip
        for row in database.rows(SOME):
            read = read_by(conn, lambda row=row: db.execute(conn, ask, {"id": row[0]}))
            assert (read["jobs"][2], read["jobs_variants"][2]) == (1, 1)


LOCKS = """
SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND relation = 'pg_class'::regclass
"""


def test_catalog_is_read_only_for_rows_that_are_gone(variants):
    """A claim asks where each of its rows is."""
    job = variants.database.add_job("x")
    [row] = variants.add(job)
    [join] = pipeline.joins()
    asks = {
        "stage_call_row('jobs', '', %(id)s)": job,
        "stage_call_row('jobs_variants', '', %(id)s)": row,
        f"stage_join_is_complete('{join}', %(id)s)": job,
    }
    with connected(variants.database) as conn:
        for ask, there in asks.items():
            for key, locks in ((there, 0), (str(uuid4()), 1)):
                cursor = db.execute(conn, f"SELECT {ask}; {LOCKS}", {"id": key})
                assert cursor.fetchone()[0] == locks, ask
