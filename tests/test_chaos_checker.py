"""The checker of the chaos run: judges histories written by hand, with and without faults."""

import uuid
from dataclasses import replace

import pytest

from chaos import history
from chaos.checker import (
    AFTER_LEAVING,
    ATTEMPTS,
    EARLY,
    EFFECTS,
    JOINED,
    KEYS,
    LIMIT,
    LOST,
    OVERLAP,
    PROCESS,
    REPEATED,
    TURNS,
    check,
)
from chaos.deck import AWAY, SET_BACK
from chaos.history import (
    Claim,
    Debt,
    Effect,
    Exit,
    Fault,
    Gone,
    History,
    Hold,
    Join,
    Lease,
    Limit,
    Move,
    Post,
    Row,
)

TIMEOUT, LEASE = 2.0, 3.0
ONE, OTHER = "host-101-aaaaaa", "host-202-bbbbbb"
STAGES = {"img_gen": "vlm_analyze", "vlm_analyze": "yolo_detect"}


class Script(History):
    """A history of one job, written event by event; tests omit events, or write wrong ones."""

    def __init__(self):
        routes = {f"{step}/done": stage for step, stage in STAGES.items()}
        super().__init__(
            1, began=0, calm=90, ended=100, timeout=TIMEOUT, lease=LEASE, routes=routes
        )
        self.listeners = {ONE: 1, OTHER: 2}

    def move(self, at, step, status="done", debt=True):
        """The job changes its state in a transaction of its own; the call it owes then."""
        self.moves.append(Move("j", len(self.moves) + 1, at, step, status))
        tx = self.moves[-1].tx
        if self.debts and tx > 1:
            self.gone.append(Gone("j", self.debts[-1].call, tx))
        if debt and status == "done" and step in STAGES:
            self.debts.append(Debt("j", 1000 + tx, STAGES[step], tx))

    def claim(self, at, attempt=1, worker=ONE, call=None):
        call = call or self.debts[-1].call
        self.claims.append(Claim("j", call, attempt, worker, at, at + LEASE))
        stage = self.stage(self.claims[-1])
        self.leases.append(Lease("j", "t", call, attempt, stage, at, at, at + LEASE, None))

    def post(self, finished, status=200, sent=True, arrived=None, key=None):
        """The request of the latest claim; 0.1 s after it, if not said otherwise."""
        claim = self.claims[-1]
        self.posts.append(
            Post("j", self.stage(claim), self.listeners[claim.worker], key or f"key {claim.call}",
                 claim.attempt, arrived or claim.at + 0.1, finished, status, sent, "work")
        )  # fmt: skip
        key = self.posts[-1].key
        if status == 200 and key not in {effect.key for effect in self.effects}:
            self.effects.append(Effect(key, "j"))

    def row(self, finished, outcome="succeeded", http=None, claim=None, error=None):
        """What the database says of the latest claim."""
        claim = claim or self.claims[-1]
        if outcome == "succeeded":
            http = 200
            self.gone.append(Gone("j", claim.call, 900 + len(self.gone)))
        self.rows.append(
            Row("j", claim.call, claim.attempt, self.stage(claim), claim.worker, claim.at, finished,
                http, outcome, error)
        )  # fmt: skip

    def stage(self, claim):
        return next(debt.stage for debt in self.debts if debt.call == claim.call)

    def called(self, at, attempt=1, worker=ONE, seconds=0.3, outcome="succeeded", status=200):
        """A claim, its request, and its row."""
        self.claim(at, attempt, worker)
        self.post(at + seconds, status)
        self.row(at + seconds, outcome, None if outcome == "unknown" else status)

    def wait(self, job, arrived, claimed, tenant="t", step="img_gen", ended=0.1, **order):
        """The call of another job, which is claimed after its arrival."""
        tx = 1 + len(self.moves)
        self.moves.append(Move(job, tx, arrived, step, "done", **order))
        self.debts.append(Debt(job, 1000 + tx, STAGES[step], tx))
        self.claims.append(Claim(job, 1000 + tx, 1, ONE, claimed, claimed + LEASE))
        self.leases.append(Lease(job, tenant, 1000 + tx, 1, STAGES[step], claimed, claimed + 0.1,
                                 claimed + LEASE, ended and claimed + 0.1 + ended))  # fmt: skip

    def fault(self, kind, reach, began, ended=None, slots=(1, 2), pids=()):
        self.faults.append(Fault(kind, reach, began, ended or began, list(slots), list(pids)))

    def kill(self, at, worker=ONE, kind="kill -9 listener and workers", reach="listener"):
        pids, slots = [history.pid_of(worker)], [self.listeners[worker]]
        self.fault(kind, reach, at, slots=slots, pids=pids)


@pytest.fixture
def script():
    return Script()


def kinds(script):
    return {kind for kind, _ in check(script).findings}


# --- what is allowed -----------------------------------------------------------------------


def test_job_that_passes_two_stages_is_in_order(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.move(1.3, "vlm_analyze", "running")
    script.move(1.4, "vlm_analyze")
    script.called(1.41, worker=OTHER)
    verdict = check(script)
    assert verdict.findings == [] and not verdict.repeats
    # The first answer came after the job had moved on: nobody's fault.
    assert dict(verdict.overlaps) == {}


def test_refused_call_is_called_again(script):
    script.move(1, "img_gen")
    script.called(1.1, outcome="retry", status=500)
    script.called(1.5, attempt=2, outcome="held", status=503)
    script.called(2.9, attempt=3, outcome="failed", status=404)
    script.called(4, attempt=4)
    verdict = check(script)
    assert verdict.findings == []
    assert verdict.repeats == {
        "refused, 408, 425 or 5xx": 1,
        "refused, 429 or 503": 1,
        "given up, and retried by the operator": 1,
    }


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("retry", "not accepted: the connection broke"),
        ("failed", "given up without an answer, and retried by the operator"),
    ],
)
def test_call_whose_connection_broke_is_repeated_though_the_stage_may_still_work(
    outcome, reason, script
):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(3, status=200, sent=False)
    script.row(1.5, outcome, error="connection broke while waiting: reset")
    script.called(1.7, attempt=2)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == [reason]
    assert list(verdict.overlaps) == ["the connection of the first had broken"]


def killed_in_a_call(script, accepted=True):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.5, sent=accepted)
    script.kill(1.3)
    script.claim(1.1 + LEASE, attempt=2, worker=OTHER)
    script.row(1.1 + LEASE, "lost", claim=script.claims[0])
    script.post(4.5)
    script.row(4.5)


@pytest.mark.parametrize(
    ("kind", "began", "ended", "found"),
    [
        ("restart database, fast", 0.5, 1.0, {REPEATED, ATTEMPTS}),
        ("restart database, fast", 1.2, 1.4, {REPEATED, ATTEMPTS}),
        ("restart database, fast", 1.6, 1.7, set()),
        ("drop database network", 1.2, 1.4, set()),  # waited for until the deadline
    ],
)
def test_lost_database_explains_a_lost_result_only_from_the_answer_on(
    kind, began, ended, found, script
):
    killed_in_a_call(script)
    script.faults.clear()
    script.fault(kind, "database", began, ended)
    script.row(4.6, claim=script.claims[0])
    assert kinds(script) == found


@pytest.mark.parametrize("excuse", [None, "killed", "never sent", "taken"])
def test_result_that_a_listener_forgets_while_the_database_is_away_is_found(excuse, script):
    killed_in_a_call(script)
    script.fault(AWAY, "database", 1.4, 4)
    if excuse != "killed":
        script.faults.pop(0)
    if excuse == "never sent":
        script.posts.pop(0)
    elif excuse == "taken":
        script.posts[0] = replace(script.posts[0], status=202)
    assert kinds(script) == (set() if excuse else {ATTEMPTS})


@pytest.mark.parametrize(
    ("began", "ended", "planned", "found"),
    [
        (1.2, 4.1, None, set()),
        (1.2, 2.7, None, {REPEATED, ATTEMPTS}),
        (2.7, 4.1, None, {REPEATED, ATTEMPTS}),
        (2.7, 4.1, "post, then compute in C", set()),  # there is a result only at the deadline
    ],
)
def test_frozen_listener_explains_a_lost_result_only_until_the_lease_is_over(
    began, ended, planned, found, script
):
    killed_in_a_call(script)
    script.mischief = {"j/vlm_analyze/1": planned}
    script.faults.clear()
    script.fault("freeze listener", "listener", began, ended, slots=[1])
    script.row(4.6, claim=script.claims[0])
    assert kinds(script) == found


@pytest.mark.parametrize(("accepted", "at"), [(True, 1.3), (False, 1.3), (False, 1.0)])
def test_call_that_was_killed_with_its_listener_is_repeated_after_its_lease(accepted, at, script):
    """The claim may have been under way to the database when that was killed."""
    killed_in_a_call(script, accepted)
    script.faults[0] = replace(script.faults[0], began=at, ended=at)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == [("" if accepted else "not ") + "accepted, all was killed"]


def test_call_whose_listener_alone_was_killed_is_repeated_where_no_answer_came(script):
    killed_in_a_call(script, accepted=False)
    script.faults.clear()
    script.kill(1.3, kind="kill -9 listener")
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == [
        "not accepted, the listener was killed, and no answer came in time"
    ]


def died_in_a_call(script, error):
    """The stage had accepted, the worker did not live to say so."""
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.3)
    script.row(1.4, "unknown", error=error)
    script.called(1.1 + LEASE, attempt=2)


def test_accepted_call_whose_worker_was_killed_is_repeated_after_its_lease(script):
    died_in_a_call(script, "its worker was killed by SIGKILL")
    script.kill(1.35, kind="kill -9 worker", reach="worker")
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == ["accepted, but the worker was killed"]


def test_accepted_call_whose_stage_function_never_returned_is_repeated_after_its_lease(script):
    died_in_a_call(script, "no answer within 2 s, so its worker was killed")
    script.mischief = {"j/vlm_analyze/1": "post, then compute in C"}
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == ["accepted, but the stage function never returned"]


@pytest.mark.parametrize(
    ("kind", "ended", "found"),
    [
        ("freeze listener and workers", 3.2, set()),
        ("freeze listener", 3.2, {REPEATED}),  # the worker has had the answer in time
        ("freeze worker", 2.0, {REPEATED}),
    ],
)
def test_accepted_call_is_without_an_answer_only_where_its_worker_was_frozen_in_time(
    kind, ended, found, script
):
    died_in_a_call(script, "no answer within 2 s, so its worker was killed")
    script.fault(kind, "listener", 1.2, ended, slots=[1])
    assert kinds(script) == found


def test_call_without_an_answer_in_time_is_repeated_after_its_lease(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(5.0)
    script.row(1.1 + TIMEOUT, "unknown")
    script.called(1.1 + LEASE, attempt=2, worker=OTHER)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == ["accepted, but too late"]
    assert list(verdict.overlaps) == ["the lease of the first had run out"]


def test_request_that_the_network_held_back_may_arrive_after_the_next_one(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(4.5, arrived=4.3, sent=False)
    script.row(1.1 + TIMEOUT, "unknown")
    script.called(1.1 + LEASE, attempt=2, worker=OTHER)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == ["not accepted: no answer in time"]


def test_result_that_could_not_be_written_is_repeated_after_its_lease(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.4)
    script.fault("restart database, fast", "database", 1.2, 6.0)
    script.claim(6.1, attempt=2, worker=OTHER)
    script.row(6.1, "lost", claim=script.claims[0])
    script.post(6.5)
    script.row(6.2, claim=script.claims[0])
    script.row(6.5)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == ["accepted, its result could not be written: no database"]


def test_job_that_left_before_the_claim_need_not_be_called(script):
    script.move(1, "img_gen")
    script.move(2, "img_gen", "paused")
    assert kinds(script) == set()


def test_claim_that_finds_the_job_gone_is_skipped(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.move(1.1, None, None)
    script.row(1.2, "skipped", error="the job has moved on: deleted")
    assert kinds(script) == set()


def test_claim_whose_answer_was_lost_is_given_back(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.claims[-1] = replace(script.claims[-1], released=1.2)
    script.called(1.3, attempt=2)
    assert kinds(script) == set()


def test_claim_whose_answer_was_lost_leaves_no_trace_where_the_job_moved_on(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.fault("terminate backend", "database", 1.1)
    script.move(1.2, "img_gen", "paused")
    assert kinds(script) == set()
    script.kill(3.0)
    assert kinds(script) == {ATTEMPTS}
    script.leases[-1] = replace(script.leases[-1], ended=1.3)
    assert kinds(script) == set()  # it was given back before the listener was killed


@pytest.mark.parametrize(("ended", "found"), [(1.3, {ATTEMPTS}), (1.2 + LEASE, set())])
@pytest.mark.parametrize("left", [8, None])
def test_claim_is_given_back_without_a_trace_only_where_its_call_was_gone(
    left, ended, found, script
):
    """The next attempt had taken the call over, once the lease had run out."""
    script.move(1, "img_gen")
    script.claim(1.1)
    script.fault("terminate backend", "database", 0.5)
    script.leases[-1] = replace(script.leases[-1], ended=ended)
    script.called(5, attempt=2)
    if left:
        script.move(left, "vlm_analyze", "running")
    assert kinds(script) == found


def test_calls_recorded_on_the_way_in_one_transaction_count_for_nothing(script):
    script.move(1, "img_gen", "paused")
    script.debts.append(Debt("j", 5, "vlm_analyze", script.moves[-1].tx))
    assert kinds(script) == set()


def test_given_up_call_of_a_deleted_job_is_dropped_without_a_claim(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.2, status=404)
    script.row(1.2, "failed", 404)
    script.move(2, None, None)
    script.gone[:] = [Gone("j", script.debts[0].call, 77)]  # by a worker, not by the deletion
    script.rows.append(replace(script.rows[0], attempt=2, outcome="skipped", http=None))
    script.rows[-1] = replace(script.rows[-1], finished=3.0)
    assert kinds(script) == set()


@pytest.mark.parametrize("began", [2.1, 1.999])
def test_job_called_away_during_a_call_is_called_at_its_new_place(began, script):
    """The transaction of the claim may have begun before the call came."""
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(3.0)
    script.row(3.0)
    script.move(2, "vlm_analyze")
    script.called(began, worker=OTHER)
    script.leases[-1] = replace(script.leases[-1], began=2.1)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.overlaps) == ["the job had moved on meanwhile"]


def test_processes_end_when_asked_or_killed(script):
    script.exits = [
        Exit(1, 101, 0, 50, 0, True, True),
        Exit(1, 102, 50, 50.1, -15, True, False),
        Exit(2, 202, 0, 50, -9, False, True),
    ]
    script.kill(50, worker=OTHER)
    assert kinds(script) == set()


# --- lost ----------------------------------------------------------------------------------


def test_arrival_without_a_call_is_lost(script):
    script.move(1, "img_gen", debt=False)
    script.move(2, "img_gen", "paused")
    assert kinds(script) == {LOST}


def test_arrival_that_owes_another_stage_is_lost(script):
    script.move(1, "img_gen")
    script.debts[0] = replace(script.debts[0], stage="yolo_detect")
    script.move(2, "img_gen", "paused")
    assert kinds(script) == {LOST}


def test_arrival_that_was_never_called_is_lost(script):
    script.move(1, "img_gen")
    assert kinds(script) == {LOST}


def test_arrival_that_was_only_refused_is_lost(script):
    script.move(1, "img_gen")
    script.called(1.1, outcome="failed", status=404)
    assert kinds(script) == {LOST}


def test_call_skipped_while_the_job_owed_it_is_lost(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.row(1.2, "skipped")
    script.move(8, "img_gen", "paused")
    assert kinds(script) == {LOST}


def test_call_dropped_without_an_acceptance_is_lost_though_the_job_moved_later(script):
    script.move(1, "img_gen")
    script.gone.append(Gone("j", script.debts[-1].call, 77))
    script.move(8, "img_gen", "paused")
    assert kinds(script) == {LOST}


def test_call_still_owed_at_the_end_is_lost(script):
    script.owed = 1
    assert kinds(script) == {LOST}


# --- repeated ------------------------------------------------------------------------------


def test_repeating_an_accepted_call_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.called(1.1 + LEASE, attempt=2, worker=OTHER)
    assert kinds(script) == {REPEATED}


def test_claim_at_the_moment_of_an_acceptance_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.called(1.41, attempt=2, worker=OTHER)
    assert kinds(script) == {REPEATED}


def test_late_acceptance_may_come_too_late_for_a_claim_of_that_moment(script):
    killed_in_a_call(script)
    script.row(4.09, claim=script.claims[0])
    assert kinds(script) == set()


@pytest.mark.parametrize(("at", "slot", "worker"), [(4.2, 1, ONE), (1.3, 2, ONE), (1.3, 1, OTHER)])
def test_kill_of_another_time_place_or_listener_explains_nothing(at, slot, worker, script):
    killed_in_a_call(script, accepted=False)
    pids = [history.pid_of(worker)]
    script.faults[0] = replace(script.faults[0], began=at, ended=at, slots=[slot], pids=pids)
    assert kinds(script) == {ATTEMPTS}


def test_worker_must_write_what_was_answered_though_its_listener_was_killed(script):
    killed_in_a_call(script)
    script.faults.clear()
    script.kill(1.3, kind="kill -9 listener")
    assert kinds(script) == {REPEATED, ATTEMPTS}


@pytest.mark.parametrize(
    "fault",
    [
        {},  # nothing was done to it
        {"kind": "kill -9 worker", "reach": "worker", "at": 4.0},
        {"kind": "kill -9 worker", "reach": "worker", "at": 1.35, "worker": OTHER},
    ],
)
def test_accepted_call_whose_worker_died_without_a_fault_is_found(fault, script):
    died_in_a_call(script, "its worker was killed by SIGKILL")
    if fault:
        script.kill(**fault)
    assert kinds(script) == {REPEATED, PROCESS}


def test_killed_worker_explains_no_call_but_its_own(script):
    died_in_a_call(script, "no answer within 2 s, so its worker was killed")
    script.kill(1.35, kind="kill -9 worker", reach="worker")
    assert kinds(script) == {REPEATED}


@pytest.mark.parametrize("planned", [None, "crash"])
def test_worker_that_crashes_though_nobody_planned_it_is_found(planned, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.row(1.2, "unknown", error="its worker was killed by SIGSEGV")
    script.called(1.1 + LEASE, attempt=2)
    script.mischief = {"j/vlm_analyze/1": planned}
    assert kinds(script) == (set() if planned else {PROCESS})


@pytest.mark.parametrize(("locked", "found"), [(2.0, set()), (0.5, {REPEATED, ATTEMPTS}),
                                               (0.0, {REPEATED, ATTEMPTS})])  # fmt: skip
def test_accepted_call_may_be_taken_for_lost_only_while_its_table_is_locked(locked, found, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.4)
    script.claim(1.1 + LEASE, attempt=2, worker=OTHER)
    script.row(1.1 + LEASE, "lost", claim=script.claims[0])
    script.post(4.5)
    script.row(4.5)
    script.row(4.6, claim=script.claims[0])
    if locked:
        script.fault("change columns of jobs, given up", "nothing", 1.3, 1.3 + locked)
        script.faults[-1].locked.append((1.3, 1.3 + locked))
    assert kinds(script) == found


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize(("lost", "is_judged"), [((1.2, 2.2), False), ((20, 21), True)])
def test_job_of_which_a_failover_lost_commits_only_has_to_come_through(
    lost, is_judged, arrived, script
):
    script.move(1, "img_gen")
    script.called(1.1)
    script.claims.clear()
    if not arrived:
        script.posts.clear()
    script.fault("fail over and lose commits", "database", lost[0], lost[1] + 1)
    script.faults[-1].lost.append(lost)
    assert bool(kinds(script)) == is_judged
    script.owed = 1
    assert LOST in kinds(script)


def test_accepted_call_taken_for_unknown_without_a_fault_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1, outcome="unknown")
    script.called(1.1 + LEASE, attempt=2)
    assert kinds(script) == {REPEATED}


def test_attempt_after_a_late_acceptance_was_written_is_found(script):
    killed_in_a_call(script)
    script.rows.pop()  # the second attempt was refused instead
    script.gone.clear()
    script.posts[-1] = replace(script.posts[-1], status=500)
    script.row(4.5, "retry", 500)
    script.row(4.4, claim=script.claims[0])  # the first worker lived after all
    script.called(6.0, attempt=3)
    assert kinds(script) == {REPEATED}


@pytest.mark.parametrize(("outcome", "status"), [("lost", None), ("unknown", None)])
def test_repeat_before_the_lease_ran_out_is_found(outcome, status, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(2.0, status=None, sent=False)
    script.row(2.5, outcome)
    script.kill(1.2)
    script.called(2.6, attempt=2, worker=OTHER)
    assert kinds(script) == {EARLY}


def test_operator_may_not_repeat_a_call_before_its_lease_ran_out(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(5.0, status=None, sent=False)
    script.row(1.1 + TIMEOUT, "failed")
    script.called(3.5, attempt=2, worker=OTHER)
    assert kinds(script) == {EARLY, OVERLAP}


def test_call_given_up_without_being_sent_may_be_retried_at_once(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.row(1.1, "failed", error="the worker was lost during every attempt")
    script.called(1.2, attempt=2)
    assert kinds(script) == set()


# --- at once, and too late -----------------------------------------------------------------


def test_two_requests_of_one_call_at_once_are_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(2.0)
    script.row(2.0, "retry", 500)
    script.posts[-1] = replace(script.posts[-1], status=500)
    script.called(1.5, attempt=2, worker=OTHER)
    assert OVERLAP in kinds(script)


def test_lease_that_is_shorter_than_promised_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.claims[-1] = replace(script.claims[-1], until=1.6)
    script.post(5.0)
    script.row(1.1 + TIMEOUT, "unknown")
    script.called(3.2, attempt=2, worker=OTHER)
    assert kinds(script) == {EARLY, OVERLAP}


def test_claim_of_a_call_that_is_under_way_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(2.0, status=500)
    script.row(2.0, "retry", 500)
    script.claim(1.9, attempt=2, worker=OTHER)
    script.post(2.5, arrived=2.1)
    script.row(2.5)
    assert EARLY in kinds(script)


@pytest.mark.parametrize("claimed", [1.5, 4.5])
def test_two_calls_of_one_job_at_once_are_found_where_it_had_not_left(claimed, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(6)
    script.row(6)
    script.move(5, "vlm_analyze")
    script.claim(claimed, worker=OTHER)
    script.post(5.5)
    script.row(5.5)
    assert kinds(script) == {OVERLAP}


@pytest.mark.parametrize("outcome", [None, "unknown", "retry"])
def test_same_stage_called_for_a_job_that_came_back_during_the_lease_is_found(outcome, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(3, status=500)
    if outcome:
        script.row(1.5, outcome)
    first = script.claims[-1]
    script.move(1.6, "img_gen", "paused")
    script.move(1.7, "img_gen")
    script.called(1.8, worker=OTHER)
    if not outcome:
        script.row(3, "retry", 500, claim=first)
    assert kinds(script) == (set() if outcome == "retry" else {OVERLAP, EARLY})


@pytest.mark.parametrize(
    ("outcome", "error", "found"),
    [
        ("lost", None, {EARLY}),
        ("unknown", None, {EARLY}),
        ("failed", None, {EARLY}),
        ("failed", "no answer (set failed by its stage)", set()),
    ],
)
def test_same_stage_called_for_a_job_that_came_back_though_its_lease_went_on_is_found(
    outcome, error, found, script
):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.3, status=None, sent=False)
    script.kill(1.2)
    script.row(1.4 if outcome != "lost" else 1.1 + LEASE, outcome, error=error)
    script.move(1.6, "img_gen", "paused")
    script.move(1.7, "img_gen")
    script.called(1.8, worker=OTHER)
    assert kinds(script) == found


def test_lease_that_was_ended_until_the_claim_was_committed_is_over(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.move(1.3, "img_gen", "paused")
    script.move(1.35, "img_gen")
    script.claim(1.39, worker=OTHER)
    script.leases[-1] = replace(script.leases[-1], began=1.42)
    script.post(1.7)
    script.row(1.7)
    assert kinds(script) == set()


def leases(*spans):
    """Of one stage; each is claimed, committed and at an end at these times."""
    return [
        Lease("j", "t", number, 1, "vlm_analyze", claimed, began, claimed + LEASE, ended)
        for number, (claimed, began, ended) in enumerate(spans)
    ]


def test_stage_that_is_full_is_not_called(script):
    script.limits = [Limit("gpu", ["vlm_analyze", "planner"], 2)]
    script.leases = leases((1, 1.1, 2.0), (1, 1.2, 5.0), (1.9, 2.1, None), (4.1, 4.2, None))
    script.leases[1] = replace(script.leases[1], stage="planner")
    verdict = check(script)
    assert verdict.findings == []
    assert verdict.met["took the last place"] == 3
    script.limits = [Limit("gpu", ["vlm_analyze", "planner"], 1)]
    assert kinds(script) == {LIMIT}
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 2)]
    assert kinds(script) == set()


def test_limit_is_exceeded_until_the_lease_has_ended_or_run_out(script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 1)]
    script.leases = leases((1, 1.1, None), (3.9, 4.0, None))
    assert kinds(script) == {LIMIT}
    script.leases = leases((1, 1.1, None), (4.0, 4.1, None))
    assert kinds(script) == set()


def test_lease_of_a_job_with_lost_commits_counts_for_a_limit(script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 1)]
    script.leases = leases((1, 1.1, 3.0), (1.5, 1.6, 3.0))
    script.leases[0] = replace(script.leases[0], job="k")
    script.posts.append(Post("k", "vlm_analyze", 1, "key", 1, 1.2, 1.3, 500, True, "refuse"))
    script.fault("fail over and lose commits", "database", 1.2, 3)
    script.faults[-1].lost.append((1.2, 2.2))
    assert kinds(script) == {LIMIT}


def test_tenant_that_is_full_is_not_called(script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], per_tenant=1)]
    script.leases = leases((1, 1.1, None), (2, 2.1, None))
    assert kinds(script) == {LIMIT}
    script.leases[1] = replace(script.leases[1], tenant="another")
    assert kinds(script) == set()


def test_stage_with_a_rate_is_not_called_too_soon(script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], seconds=0.5)]
    script.leases = leases((1, 1.1, 1.2), (1.5, 1.6, 1.7))
    assert kinds(script) == set()
    script.leases = leases((1, 1.1, 1.2), (1.4, 1.6, 1.7))
    assert kinds(script) == {LIMIT}


def test_call_claimed_after_the_job_left_is_found(script):
    script.move(1, "img_gen")
    script.move(2, "img_gen", "paused")
    script.called(2.1)
    assert kinds(script) == {AFTER_LEAVING}


# --- the order of calls --------------------------------------------------------------------


def is_out_of_turn(script):
    return TURNS in kinds(script)


@pytest.mark.parametrize(
    ("claimed", "priority", "found"),
    [
        ([2, 3], 7, False),
        ([2, 3, 4], 7, True),  # the last of another priority does not count
        ([2, 3, 4], 0, True),
        ([1, 3, 5], 0, False),  # one before it came, one together with it
    ],
)
def test_tenant_that_waits_while_another_has_its_turns_is_seen(claimed, priority, found, script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], is_fair=True)]
    for n, at in enumerate(claimed):
        script.wait(f"o{n}", 0.9, at, "o", priority=priority if n == 0 else 0)
    script.wait("j", 1.2, 5)
    assert is_out_of_turn(script) == found
    assert check(script).met["waited while other tenants had turns"] == 1
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 3)]
    assert not is_out_of_turn(script)


@pytest.mark.parametrize(
    ("ended", "found"),
    [
        (None, False),
        (1.88, False),  # so late that the next claim may not have seen it
        (1.5, True),
    ],
)
def test_tenant_waits_though_it_has_its_turn_while_it_has_all_its_calls(ended, found, script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], is_fair=True, per_tenant=1)]
    script.wait("k", 0.5, 1, ended=ended)
    script.wait("a", 1.5, 3, "a")
    script.wait("b", 0.9, 4, "a")
    script.wait("j", 1.2, 5)
    assert is_out_of_turn(script) == found
    script.wait("l", 0.6, 2.7)  # a turn of its own tenant
    script.leases.sort(key=lambda lease: lease.began)
    assert not is_out_of_turn(script)


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ({"priority": 7}, True),
        ({"priority": 0}, False),
        ({"priority": 7, "run_after": 2.0}, False),
    ],
)
def test_call_of_a_lower_priority_that_is_made_first_is_seen(order, found, script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 2)]
    script.wait("low", 1, 2)
    script.wait("high", 1.5, 3, **order)
    assert is_out_of_turn(script) == found


@pytest.mark.parametrize("excuse", ["locked", "clock", "clock before", "at once", "not judged"])
def test_call_of_a_lower_priority_may_be_made_where_the_other_was_not_there(excuse, script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 2)]
    script.wait("low", 1, 2)
    script.wait("high", 1.5, 2 if excuse == "at once" else 3, priority=7)
    if excuse == "locked":
        script.rolled_back = ["high"]
    elif excuse == "not judged":  # what is left of a row of which commits are lost
        script.claims = [claim for claim in script.claims if claim.job != "low"]
        script.debts = [debt for debt in script.debts if debt.job != "low"]
    elif excuse == "clock":
        script.fault(SET_BACK, "clock", 2.5)
    elif excuse == "clock before":
        script.fault(SET_BACK, "clock", 0.3)
        assert is_out_of_turn(script)
        script.moves.append(Move("high", 99, 0.2, "img_gen", "queued"))  # its run_after is older
        script.moves.sort(key=lambda move: move.at)
    assert not is_out_of_turn(script)


@pytest.mark.parametrize(("is_judged", "counted"), [(True, 1), (False, 0)])
def test_call_that_waits_for_a_higher_priority_is_counted(is_judged, counted, script):
    script.limits = [Limit("vlm_analyze", ["vlm_analyze"], 2)]
    script.wait("high", 1, 2, priority=7)
    script.wait("low", 1.5, 3)
    if not is_judged:
        script.debts = [debt for debt in script.debts if debt.job != "high"]
    assert check(script).met["waited while calls of a higher priority were made"] == counted


@pytest.mark.parametrize(("run_after", "found"), [(2.0, False), (2.1, True)])
def test_call_before_its_run_after_is_seen(run_after, found, script):
    script.wait("j", 1, 2, run_after=run_after)
    assert is_out_of_turn(script) == found
    script.fault(SET_BACK, "clock", 1.5)
    assert not is_out_of_turn(script)


@pytest.mark.parametrize(
    ("claimed", "came", "found"),
    [
        (2.5, 2.0, True),
        (3.1, 2.0, False),  # it has stayed for as long as it should
        (2.5, 2.48, False),  # nothing of the stage was due, as far as that claim could see
    ],
)
def test_pool_that_leaves_a_stage_with_calls_due_is_seen(claimed, came, found, script):
    left_with_a_call(script, claimed, came)
    assert is_out_of_turn(script) == found


def left_with_a_call(script, claimed=2.5, came=2.0, step="vlm_analyze"):
    """A pool makes a call of one stage, then of another, while one more came for the first."""
    script.limits = [Limit("gpu", ["vlm_analyze", "yolo_detect"], 5, linger=2.0)]
    script.wait("a", 0.5, 1)
    script.wait("b", 1.5, claimed, step=step)
    script.wait("c", came, 6)


@pytest.mark.parametrize(
    ("at", "until", "held"), [(2.4, 3.4, True), (1, 2.4, False), (2.7, 4, False)]
)
def test_pool_leaves_a_stage_that_is_held(at, until, held, script):
    left_with_a_call(script)
    script.holds = [Hold("vlm_analyze", at, until)]
    assert is_out_of_turn(script) != held


@pytest.mark.parametrize("excuse", ["left", "clock", "same stage"])
def test_pool_leaves_a_stage_whose_call_was_not_to_be_made(excuse, script):
    left_with_a_call(script, step="img_gen" if excuse == "same stage" else "vlm_analyze")
    if excuse == "left":
        script.moves.append(Move("c", 99, 2.3, "img_gen", "paused"))
    elif excuse == "clock":
        script.fault(SET_BACK, "clock", 2.3)
    assert not is_out_of_turn(script)


def test_pool_that_comes_back_to_a_stage_stays_again(script):
    left_with_a_call(script, claimed=3.1, came=2.0)
    script.wait("d", 3.0, 7, step="vlm_analyze")
    script.leases[2] = replace(script.leases[2], claimed=4, began=4.1)
    assert is_out_of_turn(script)


# --- taken with 202 ------------------------------------------------------------------------


def taken(script, outcome="succeeded", moved=2.0, status="done", ended=None):
    """A call that its stage has taken, and what the row does then."""
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.3, status=202)
    if moved:
        script.move(moved, "vlm_analyze", status, debt=False)
    finished = ended or moved
    script.row(finished, outcome, claim=script.claims[-1])
    script.rows[-1] = replace(script.rows[-1], http=202)
    script.leases[0] = replace(script.leases[0], ended=finished + 0.1)


def test_taken_call_is_over_when_its_row_moves_on(script):
    taken(script, status="paused")
    assert check(script).findings == []


def test_taken_call_is_over_when_its_row_leaves_and_comes_back_in_one_transaction(script):
    taken(script, moved=1.35, status="running", ended=1.4)
    assert kinds(script) == {ATTEMPTS}
    script.move(1.45, "vlm_analyze", "running", debt=False)
    assert kinds(script) == set()


def test_taken_call_that_is_never_finished_is_repeated_after_its_lease(script):
    taken(script, "unknown", moved=None, ended=1.2 + LEASE)
    script.called(1.3 + LEASE, attempt=2)
    verdict = check(script)
    assert verdict.findings == []
    assert list(verdict.repeats) == ["taken with 202, and not finished while its lease lasted"]


def test_taken_call_that_is_repeated_while_its_stage_works_is_found(script):
    taken(script, "unknown", moved=None, ended=2)
    script.called(2.5, attempt=2)
    assert kinds(script) == {EARLY, OVERLAP, ATTEMPTS}


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("succeeded", "running"),
        ("succeeded", "failed"),
        ("failed", "paused"),
        ("skipped", "paused"),
    ],
)
def test_taken_call_is_recorded_as_what_its_row_says(outcome, status, script):
    taken(script, outcome, status=status)
    assert kinds(script) == {ATTEMPTS}


# --- effects -------------------------------------------------------------------------------


def test_second_effect_of_a_key_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.effects *= 2
    assert kinds(script) == {EFFECTS}


def test_accepted_request_without_its_effect_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.effects.clear()
    assert kinds(script) == {EFFECTS}
    script.posts[0] = replace(script.posts[0], behaviour="accept and forget")
    assert kinds(script) == set()


# --- attempts ------------------------------------------------------------------------------


def test_request_without_a_claim_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.posts.append(replace(script.posts[0], attempt=7, arrived=5, finished=5.1))
    assert kinds(script) == {ATTEMPTS}


@pytest.mark.parametrize("fault", ["network", "kill"])
def test_request_without_a_body_is_found_unless_something_cut_it(fault, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.2, status=400, sent=False)
    script.row(1.2, "retry")
    script.called(1.3, attempt=2)
    script.posts[0] = replace(script.posts[0], job=None)
    assert kinds(script) == {ATTEMPTS}
    if fault == "kill":
        script.kill(1.15)
    else:
        script.fault("drop stage network", "stage", 1, 3)
    assert kinds(script) == set()


def test_request_sent_twice_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.posts.append(replace(script.posts[0], arrived=5, finished=5.1))
    assert kinds(script) == {ATTEMPTS}


def test_request_without_a_row_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.4)
    script.move(2, "vlm_analyze", "running")
    assert kinds(script) == {ATTEMPTS}


def test_request_before_its_claim_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.posts[0] = replace(script.posts[0], arrived=1.0)
    assert kinds(script) == {ATTEMPTS}


def test_attempt_of_a_killed_listener_is_in_the_history_where_the_job_stayed(script):
    killed_in_a_call(script)
    script.rows = [row for row in script.rows if row.outcome != "lost"]
    assert kinds(script) == {ATTEMPTS}


def test_claim_of_a_killed_listener_is_in_the_history_though_it_was_never_sent(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.kill(1.15)
    script.move(1.4, "vlm_analyze", "running")
    assert kinds(script) == {ATTEMPTS}


def test_claim_that_came_to_nothing_without_a_fault_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.called(1.3, attempt=2)
    assert kinds(script) == {ATTEMPTS}


def test_claim_that_was_given_back_though_it_was_sent_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.claims[-1] = replace(script.claims[-1], released=1.5)
    script.post(1.4, status=500)
    script.fault("terminate backend", "database", 1.1)
    script.called(1.6, attempt=2)
    assert ATTEMPTS in kinds(script)


def test_request_without_a_lease_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.leases.clear()
    assert kinds(script) == {ATTEMPTS}


@pytest.mark.parametrize(("ended", "found"), [(1.1 + LEASE, set()), (3.5, {ATTEMPTS})])
@pytest.mark.parametrize("outcome", [None, "unknown"])
def test_lease_that_is_ended_without_an_answer_before_it_ran_out_is_found(
    outcome, ended, found, script
):
    killed_in_a_call(script, accepted=False)
    if outcome:
        script.row(1.1 + TIMEOUT, outcome, claim=script.claims[0])
    script.leases[0] = replace(script.leases[0], ended=ended)
    assert kinds(script) == found


def test_answer_ends_the_lease_of_its_call(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.leases[0] = replace(script.leases[0], ended=1.45)
    assert kinds(script) == set()


def test_row_without_a_claim_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.rows.append(replace(script.rows[0], attempt=2))
    assert kinds(script) == {ATTEMPTS}


@pytest.mark.parametrize(("outcome", "status"), [("succeeded", None), ("retry", 500)])
def test_answer_without_a_request_is_found(outcome, status, script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.row(1.4, outcome, status)
    script.called(1.6, attempt=2)
    assert ATTEMPTS in kinds(script)


def test_acceptance_of_an_answer_that_was_cut_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.4, sent=False)
    script.row(1.4)
    assert kinds(script) == {ATTEMPTS}


def test_other_status_than_was_answered_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.posts[0] = replace(script.posts[0], status=201)
    assert kinds(script) == {ATTEMPTS}


def test_skipped_call_that_was_sent_is_found(script):
    script.move(1, "img_gen")
    script.claim(1.1)
    script.post(1.4)
    script.move(1.2, "img_gen", "paused")
    script.row(1.4, "skipped")
    assert kinds(script) == {ATTEMPTS}


def test_call_recorded_though_no_job_arrived_is_found(script):
    script.debts.append(Debt("j", 5, "vlm_analyze", 99))
    assert kinds(script) == {ATTEMPTS}


# --- keys, processes, files ----------------------------------------------------------------


def test_two_keys_for_one_call_are_found(script):
    script.move(1, "img_gen")
    script.called(1.1, outcome="retry", status=500)
    script.called(1.5, attempt=2)
    script.posts[0] = replace(script.posts[0], key="another")
    assert kinds(script) == {KEYS}


def test_one_key_for_two_calls_is_found(script):
    script.move(1, "img_gen")
    script.called(1.1)
    script.move(2, "img_gen", "paused")
    script.move(3, "img_gen")
    script.called(3.1)
    assert kinds(script) == set()
    script.posts[1] = replace(script.posts[1], key=script.posts[0].key)
    assert kinds(script) == {KEYS}


@pytest.mark.parametrize(
    ("code", "asked"), [(1, True), (0, False), (-11, False), (-15, True), (-15, False)]
)
def test_process_that_ends_unasked_or_badly_is_found(code, asked, script):
    script.exits = [Exit(1, 101, 0, 50, code, asked, True)]
    assert kinds(script) == {PROCESS}


@pytest.mark.parametrize(
    "change", [{"began": 49}, {"began": 61}, {"slots": [1]}, {"reach": "database"}, {"kind": "x"}]
)
def test_process_killed_at_another_time_or_place_is_found(change, script):
    script.exits = [Exit(2, 202, 50, 60, -9, False, True)]
    script.kill(55, worker=OTHER)
    assert kinds(script) == set()
    script.faults[0] = replace(script.faults[0], **change)
    assert kinds(script) == {PROCESS}


def test_traceback_is_found(script):
    script.bugs = ["listener 1: KeyError: 'x'"]
    assert kinds(script) == {PROCESS}


def test_history_is_read_as_it_was_written(script, tmp_path):
    killed_in_a_call(script)
    script.write(tmp_path / "history.json")
    again = history.read(tmp_path / "history.json")
    assert vars(again) == vars(script)
    assert check(again) == check(script)


def test_file_that_is_no_history_is_refused_by_name(tmp_path):
    file = tmp_path / f"{uuid.uuid4()}.json"
    file.write_text('{"seed": 1}')
    with pytest.raises(ValueError, match=file.name):
        history.read(file)


# --- joins ---------------------------------------------------------------------------------


class Family(Script):
    """A history of a job, its variants, and the calls that their join owed."""

    def __init__(self):
        super().__init__()
        self.joined = {"detect/done": "ad_copy"}

    def variant(self, at, name, step="detect", status="done"):
        tx = 1 + len(self.moves)
        self.moves.append(Move(name, tx, at, step, status, parent="j"))

    def record(self, at):
        """A listener has looked, and found all variants there."""
        self.joins.append(Join("j", 2000 + len(self.joins), "ad_copy", at - 0.01, at))

    def claim(self, at, attempt=1, worker=ONE, call=None):
        super().claim(at, attempt, worker, call or self.joins[-1].call)

    def stage(self, claim):
        return "ad_copy"


@pytest.fixture
def family():
    """Two variants, one after the other, and the call that follows."""
    made = Family()
    made.variant(1, "a", "cut", "running")
    made.variant(1, "b", "cut", "running")
    made.variant(2, "a")
    made.variant(3, "b")
    made.record(3.1)
    made.called(3.2)
    return made


def test_join_that_is_called_once_is_in_order(family):
    assert kinds(family) == set()


def test_join_that_nobody_recorded_is_lost(family):
    family.variant(5, "b", "cut", "running")
    family.variant(6, "b")
    assert kinds(family) == {LOST}
    family.record(6.1)
    assert kinds(family) == {LOST}
    family.called(6.2)
    assert kinds(family) == set()


def test_job_that_was_deleted_owes_nothing(family):
    family.variant(5, "b", "cut", "running")
    family.variant(6, "b")
    family.moves.append(Move("j", 99, 6.1, None, None))
    assert kinds(family) == set()


def test_join_recorded_while_a_variant_is_missing_is_seen(family):
    family.variant(5, "b", "cut", "running")
    family.record(5.5)
    family.called(5.6)
    assert JOINED in kinds(family)


def test_join_recorded_twice_for_one_arrival_is_seen(family):
    family.record(4)
    family.called(4.1)
    assert kinds(family) == {JOINED}


def test_join_may_be_recorded_again_once_its_call_was_skipped(family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.variant(4.7, "a", "cut", "running")
    family.claim(4.8)
    family.row(4.9, "skipped")
    family.variant(5, "a", None, None)
    family.record(5.1)
    family.called(5.2)
    assert kinds(family) == set()


@pytest.mark.parametrize("is_made", [True, False])
def test_join_skipped_for_a_look_is_lost_unless_it_is_recorded_anew(family, is_made):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.claim(4.8)
    family.row(4.9, "skipped", error="rows of the join have changed: it is looked at anew")
    if is_made:
        family.record(5)
        family.called(5.1)
    assert kinds(family) == (set() if is_made else {LOST})


def test_join_skipped_while_all_variants_are_there_is_lost(family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.claim(4.8)
    family.row(4.9, "skipped")
    assert kinds(family) == {LOST}


def test_join_called_again_after_the_job_has_moved_on_is_seen(family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.claim(4.7)
    family.moves.append(Move("j", 99, 4.8, "ad_copy", "running"))
    family.row(4.7 + TIMEOUT, "unknown")
    family.called(4.7 + LEASE, attempt=2)
    assert AFTER_LEAVING in kinds(family)


@pytest.mark.parametrize(("deleted", "found"), [(True, set()), (False, {AFTER_LEAVING})])
def test_join_is_called_again_only_once_the_missing_variant_is_gone(deleted, found, family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.claim(4.7)
    family.variant(4.8, "c", "cut", "done")
    family.row(4.7 + TIMEOUT, "unknown")
    if deleted:
        family.variant(5, "c", None, None)
    family.called(4.7 + LEASE, attempt=2)
    assert kinds(family) == found


@pytest.mark.parametrize("attempt", [1, 2])
def test_join_called_while_a_variant_is_missing_is_seen(attempt, family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    if attempt == 2:
        family.called(4.7, outcome="retry", status=500)
    family.variant(5.1, "a", "cut", "paused")
    family.called(6, attempt=attempt)
    assert kinds(family) == {AFTER_LEAVING}


@pytest.mark.parametrize(("committed", "found"), [(6.2, set()), (6.0, {AFTER_LEAVING})])
def test_variant_may_come_back_until_the_claim_is_committed(committed, found, family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.variant(5.1, "a", "cut", "paused")
    family.variant(6.1, "a", None, None)
    family.called(6)
    family.leases[-1] = replace(family.leases[-1], began=committed)
    assert kinds(family) == found


def test_accepted_join_that_is_repeated_is_seen(family):
    family.called(8, attempt=2)
    assert REPEATED in kinds(family)


def test_join_whose_stage_set_the_job_failed_may_be_retried_by_the_operator(family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.record(4.6)
    family.claim(4.7)
    family.moves.append(Move("j", 99, 4.8, "ad_copy", "failed"))
    family.post(4.9, status=500)
    family.row(5, "failed", 500)
    family.called(6, attempt=2)
    assert kinds(family) == set()


def test_variant_that_is_added_between_a_look_and_its_commit_has_the_call_skipped(family):
    family.variant(4, "b", "cut", "running")
    family.variant(4.5, "b")
    family.variant(4.595, "c", "cut", "done")
    family.record(4.6)
    family.claim(4.7)
    family.row(4.8, "skipped")
    assert kinds(family) == set()
