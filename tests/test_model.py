"""A model of claim, settle, move on, expire, hold, pause, retry and cancel, held against the real
SQL in any order, with several workers and a clock that the test moves.
"""

import pytest
import settling
from claims import connected, result
from fuzzing import fuzzed
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import calls
import upkeep
from ops.steer import CANCEL, PAUSE, RESUME, make_due

ROUTED = {
    ("img_gen", "done"): "vlm_analyze",
    ("vlm_analyze", "done"): "yolo_detect",
    ("yolo_detect", "done"): "planner",
}
STATES = [*ROUTED, ("vlm_analyze", "running"), ("planner", "failed")]
LIMITED, SLOTS = "vlm_analyze", 2
STAGES = list(ROUTED.values())
LEASE = 100
WORKERS = ["a", "b", "c"]
DETAILS = {
    "succeeded": {},
    "retry": {"delay": 20.0},
    "unknown": {"delay": 0.0, "after_lease": True},
    "failed": {},
    "held": {"delay": 1.0, "free": True, "hold": True},
}
# All that the database knows of time; what never ends or never began stays.
CLOCKS = {
    "stage_calls": ["due_at", "started_at"],
    "stage_leases": ["leased_until", "started_at"],
    "stage_slots": ["leased_until"],
    "pipeline_stages": ["held_until"],
    "stage_attempts": ["started_at", "finished_at"],
}


class Pipeline(RuleBasedStateMachine):
    """Jobs as the application moves them, beside what the workers hold and have been told."""

    def __init__(self, database, conns):
        super().__init__()
        self.database, self.conns = database, conns
        self.states: dict[str, tuple[str, str]] = {}
        self.paid: set[str] = set()  # owe nothing, although they rest in a routed state
        self.held: dict[str, object] = {}  # what each worker has claimed and not settled
        self.late: list[tuple[str, object]] = []  # claims whose worker was taken for lost
        self.accepted: set[tuple] = set()  # (job, call) of which an attempt succeeded
        self.seen: set[tuple] = set()  # (job, call, attempt) that was handed out
        self.paused: set[str] = set()

    jobs = Bundle("jobs")

    @initialize()
    def empty(self):
        self.database.emptied()
        self.database.rows("INSERT INTO stage_slots SELECT %s, generate_series(1, %s)",
                           LIMITED, SLOTS)  # fmt: skip

    # --- the application ---

    @rule(target=jobs, state=st.sampled_from(STATES))
    def add(self, state):
        job = self.database.add_job(*state)
        self.states[job] = state
        return job

    @rule(job=jobs, state=st.sampled_from(STATES))
    def move(self, job, state):
        if job in self.states and self.states[job] != state:
            self.database.move(job, *state)
            self.states[job] = state
            self.paid.discard(job)

    @rule(job=jobs)
    def roll_back(self, job):
        if job in self.states:
            update = "UPDATE jobs SET status = 'else' WHERE job_id = %s"
            with self.database.connect() as conn:
                conn.autocommit = False
                conn.cursor().execute(update, [job])
                conn.rollback()

    @rule(job=jobs)
    def delete(self, job):
        if self.states.pop(job, None):
            self.database.rows("DELETE FROM jobs WHERE job_id = %s", job)
            self.paid.discard(job)

    # --- the workers ---

    @rule(worker=st.sampled_from(WORKERS))
    def claim(self, worker):
        if worker in self.held:
            return
        conn = self.conns[worker]
        row = calls.claim(conn, leases=dict.fromkeys(STAGES, LEASE), worker=worker)
        if row.call_id is None:
            return
        job, attempt = str(row.job_id), (row.job_id, row.call_id, row.attempt)
        assert attempt not in self.seen and row.stage not in self.paused
        assert row.accepted == ((row.job_id, row.call_id) in self.accepted)
        assert row.owed == (self.states.get(job) == (row.current_step, row.status))
        assert row.limited == (row.stage == LIMITED)
        holding = [r for r in self.held.values() if r.job_id == row.job_id]
        assert all(r.call_id != row.call_id for r in holding), "two workers at one call"
        self.seen.add(attempt)
        if row.owed and not row.accepted:
            self.held[worker] = row
            return
        assert settling.settle(conn, result(row, "skipped", worker))
        if row.accepted and job in self.states:
            self.paid.add(job)

    @rule(worker=st.sampled_from(WORKERS), outcome=st.sampled_from(sorted(DETAILS)))
    def settle(self, worker, outcome):
        if row := self.held.pop(worker, None):
            self.write(row, worker, outcome)

    @rule(outcome=st.sampled_from(sorted(DETAILS)))
    def settle_late(self, outcome):
        if self.late:
            worker, row = self.late.pop()
            self.write(row, worker, outcome)

    def write(self, row, worker, outcome):
        before = self.database.owed(row.job_id)
        mine = before and (before.call_id, before.attempts, before.worker) == (
            row.call_id, row.attempt, worker)  # fmt: skip
        told = result(row, outcome, worker, error="error", **DETAILS[outcome])
        assert settling.settle(self.conns[worker], told)
        if outcome == "succeeded":
            self.accepted.add((row.job_id, row.call_id))
        if not mine:  # a late result changes no call
            assert self.database.owed(row.job_id) == before
        elif outcome == "succeeded":
            self.paid.add(str(row.job_id))

    @rule(seconds=st.sampled_from([5, 30, LEASE + 1]))
    def wait(self, seconds):
        for table, columns in CLOCKS.items():
            moved = ", ".join(f"{c} = {c} - make_interval(secs => {seconds})" for c in columns)
            self.database.rows(f"UPDATE {table} SET {moved}")
        if seconds > LEASE:
            self.late += self.held.items()
            self.held.clear()

    @rule()
    def reap(self):
        upkeep.reap(self.conns["a"])

    # --- the operator ---

    @rule()
    def retry_all(self):
        make_due(self.conns["a"], all_=True)

    @rule(job=jobs)
    def cancel(self, job):
        given = {"job_id": job, "by": "operator", "reason": "test"}
        with self.database.conn.cursor() as cursor:
            cursor.execute(CANCEL, given)
            if cursor.fetchone() and job in self.states:
                self.paid.add(job)

    @rule(stage=st.sampled_from(STAGES))
    def pause(self, stage):
        given = {"stage": stage, "reason": "test", "by": "operator"}
        self.database.conn.cursor().execute(PAUSE, given)
        self.paused.add(stage)

    @rule(stage=st.sampled_from(STAGES))
    def resume(self, stage):
        self.database.conn.cursor().execute(RESUME, {"stage": stage})
        self.paused.discard(stage)

    # --- what holds after every step ---

    @invariant()
    def every_debt_is_recorded(self):
        owed = {str(r.job_id): r for r in self.database.rows("SELECT * FROM stage_calls")}
        for job, state in self.states.items():
            if state not in ROUTED or job in self.paid:
                assert job not in owed, f"{job} owes what it should not"
            else:
                call = owed[job]
                assert (call.current_step, call.status) == state
                assert call.stage == ROUTED[state]

    @invariant()
    def no_limit_is_exceeded(self):
        running = "SELECT count(*) FROM stage_leases WHERE stage = %s AND leased_until > now()"
        assert self.database.value(running, LIMITED) <= SLOTS

    @invariant()
    def every_attempt_is_under_way_or_in_the_history(self):
        attempts = "SELECT job_id, call_id, attempt FROM stage_attempts"
        known = self.database.rows(f"{attempts} UNION {attempts.replace('attempts', 'leases')}")
        assert self.seen <= {tuple(row) for row in known}


@pytest.fixture
def conns(shared_database):
    """A connection of every worker."""
    with (
        connected(shared_database) as a,
        connected(shared_database) as b,
        connected(shared_database) as c,
    ):
        yield {"a": a, "b": b, "c": c}


def test_model_and_database_agree_whatever_happens(shared_database, conns):
    chosen = settings(fuzzed(15), stateful_step_count=40)
    run_state_machine_as_test(lambda: Pipeline(shared_database, conns), settings=chosen)
