"""A model of claim, settle, move on, expire, hold, pause, retry and cancel, held against the real
SQL in any order, with several listeners and a clock that the test moves.
"""

import itertools

import pytest
from claims import claim_many, connected, let_pass, make_due, result, set_clock_back, settle
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
import clock
from ops.chosen import Chosen
from ops.pause import PAUSE, RESUME
from ops.steer import CANCEL

ROUTED = {
    ("img_gen", "done"): "vlm_analyze",
    ("vlm_analyze", "done"): "yolo_detect",
    ("yolo_detect", "done"): "planner",
}
STATES = [*ROUTED, ("vlm_analyze", "running"), ("planner", "failed")]
LIMITED, LIMIT = "vlm_analyze", 2
STAGES = list(ROUTED.values())
LEASE = 100
LISTENERS = ["a", "b", "c"]
DETAILS = {
    "succeeded": {},
    "retry": {"delay": 20.0},
    "unknown": {"delay": 0.0, "after_lease": True},
    "failed": {},
    "held": {"delay": 1.0, "free": True, "hold": True},
}


class Pipeline(RuleBasedStateMachine):
    """Jobs as the application moves them, beside what the listeners hold and have been told."""

    def __init__(self, database, conns):
        super().__init__()
        self.database, self.conns = database, conns
        self.states: dict[str, tuple[str, str]] = {}
        self.paid: set[str] = set()  # owe nothing, although they rest in a routed state
        # What each listener has claimed and not settled; claims that were taken for lost.
        self.held: dict[str, list] = {name: [] for name in LISTENERS}
        self.late: list[tuple[str, object]] = []
        self.unanswered: list = []  # claims whose lease outlasts their result
        self.accepted: set[tuple] = set()  # (job, call) of which an attempt succeeded
        self.seen: set[tuple] = set()  # (job, call, attempt) that was handed out
        self.paused: set[str] = set()

    jobs = Bundle("jobs")

    @initialize()
    def empty(self):
        self.database.emptied()
        self.database.rows("DELETE FROM stage_limits")
        self.database.rows(
            "INSERT INTO stage_limits VALUES (%s, ARRAY[%s], %s)", LIMITED, LIMITED, LIMIT
        )

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

    # --- the listeners ---

    @rule(
        name=st.sampled_from(LISTENERS),
        free=st.integers(1, 4),
        outcomes=st.lists(st.sampled_from(sorted(DETAILS)), max_size=4),
        sweep=st.booleans(),
    )
    def turn(self, name, free, outcomes, sweep):
        """Settle some of what is in hand, and claim as much as there is room for, at once."""
        ended = list(zip(self.held[name], outcomes, strict=False))
        self.held[name] = self.held[name][len(ended) :]
        self.unanswered += [row for row, outcome in ended if outcome == "unknown"]
        results = [self.told(row, name, outcome) for row, outcome in ended]
        before = [self.database.owed(row.job_id) for row, _ in ended]
        stages = sorted(STAGES, key=lambda stage: stage == LIMITED)
        turn = claim_many(self.conns[name], free, name, stages, results, LEASE, sweep, share=1)
        self.after_results(name, ended, before, [row.job_id for row in turn.claimed])
        assert turn.locked == [] and len(turn.claimed) <= free
        for row in turn.claimed:
            self.claimed(name, row)

    def claimed(self, name, row):
        job, attempt = row.key, (row.job_id, row.call_id, row.attempt)
        assert attempt not in self.seen and row.stage not in self.paused
        assert row.accepted == ((row.job_id, row.call_id) in self.accepted)
        assert row.owed == (self.states.get(job) == (row.current_step, row.status))
        under_way = [*itertools.chain(*self.held.values()), *self.unanswered]
        assert (row.job_id, row.stage) not in [(r.job_id, r.stage) for r in under_way]
        self.seen.add(attempt)
        if row.owed and not row.accepted:
            self.held[name].append(row)
            return
        assert settle(self.conns[name], result(row, "skipped", name))
        if row.accepted and job in self.states:
            self.paid.add(job)

    @rule(name=st.sampled_from(LISTENERS))
    def give_back(self, name):
        """The answer of a claim was lost with the connection; what is in hand is kept."""
        keep = [(row.call_id, row.attempt) for row in self.held[name]]
        keep += [(row.call_id, row.attempt) for who, row in self.late if who == name]
        assert calls.give_back(self.conns[name], name, keep).locked == 0

    @rule(outcome=st.sampled_from(sorted(DETAILS)))
    def settle_late(self, outcome):
        if self.late:
            name, row = self.late.pop()
            before = self.database.owed(row.job_id)
            assert settle(self.conns[name], self.told(row, name, outcome))
            self.after_results(name, [(row, outcome)], [before], [])

    def told(self, row, name, outcome):
        return result(row, outcome, name, error="error", **DETAILS[outcome])

    def after_results(self, name, ended, before, claimed):
        for (row, outcome), call in zip(ended, before, strict=True):
            mine = call and (call.call_id, call.attempts, call.worker) == (
                row.call_id, row.attempt, name)  # fmt: skip
            if outcome == "succeeded":
                self.accepted.add((row.job_id, row.call_id))
            if mine and outcome == "succeeded":
                self.paid.add(row.key)
            elif not mine and row.job_id not in claimed:  # a late result changes no call
                assert self.database.owed(row.job_id) == call

    @rule(seconds=st.sampled_from([5, 30, LEASE + 1]))
    def wait(self, seconds):
        let_pass(self.database, seconds)
        if seconds > LEASE:
            self.late += [(name, row) for name, rows in self.held.items() for row in rows]
            self.held = {name: [] for name in LISTENERS}
            self.unanswered.clear()

    @rule(seconds=st.sampled_from([5, 3600]))
    def set_back(self, seconds):
        """After that, what is under way is over when `wait` says so."""
        set_clock_back(self.database, seconds)
        clock.shorten_waits(self.conns["a"])

    @rule()
    def reap(self):
        calls.reap(self.conns["a"])

    # --- the operator ---

    @rule()
    def retry_all(self):
        make_due(self.conns["a"])

    @rule(job=jobs)
    def cancel(self, job):
        given = Chosen(job, "jobs").params | {"by": "operator", "reason": "test"}
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
        assert self.database.value(running, LIMITED) <= LIMIT

    @invariant()
    def every_attempt_is_under_way_or_in_the_history(self):
        attempts = "SELECT job_id, call_id, attempt FROM stage_attempts"
        known = self.database.rows(f"{attempts} UNION {attempts.replace('attempts', 'leases')}")
        assert self.seen <= {tuple(row) for row in known}


@pytest.fixture
def conns(shared_database):
    """A connection of every listener."""
    with (
        connected(shared_database) as a,
        connected(shared_database) as b,
        connected(shared_database) as c,
    ):
        yield {"a": a, "b": b, "c": c}


def test_model_and_database_agree_whatever_happens(shared_database, conns):
    chosen = settings(fuzzed(15), stateful_step_count=40)
    run_state_machine_as_test(lambda: Pipeline(shared_database, conns), settings=chosen)
