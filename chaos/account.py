"""The account of a run: each arrival of a job in a state of PIPELINE with the call that it owed,
the attempts of that call, and for each attempt its claim, rows in stage_attempts and requests.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from chaos.deck import SET_BACK
from chaos.history import Claim, Fault, History, Lease, Move, Post, Row, pid_of
from ops.rules import UNANSWERED

ROUNDING = 0.001  # seconds
# Seconds that the transaction which inserts a row may take: the times in the row are of its begin.
INSERTED = 1.0


@dataclass
class Try:
    """One attempt of a call. leased_until: what the database wrote, or should have written."""

    number: int
    claim: Claim
    leased_until: float
    rows: list[Row] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)

    @property
    def outcomes(self) -> set[str]:
        return {row.outcome for row in self.rows}

    @property
    def accepted(self) -> bool:
        """Whether the stage wrote a whole 2xx answer; it may not have arrived."""
        return any(post.accepted for post in self.posts)

    @property
    def taken(self) -> bool:
        """Whether the stage wrote a whole 202 answer."""
        return any(post.taken for post in self.posts)

    def open_until(self, post: Post) -> float:
        """When the stage was done with a request, as far as a listener can know: after a 202 that
        is when the row moved on, or when the lease ended."""
        if not post.taken:
            return post.finished
        ended = [row.finished for row in self.rows if row.outcome not in UNANSWERED]
        return max(post.finished, min([*ended, self.leased_until]))

    @property
    def claimed(self) -> float:
        return self.claim.at

    @property
    def http(self) -> int | None:
        return next((row.http for row in self.rows if row.http), None)

    @property
    def error(self) -> str:
        """The errors of its rows in stage_attempts, joined."""
        return " ".join(row.error or "" for row in self.rows)


@dataclass
class Call:
    """An arrival and what it owed. number: None where no call was recorded."""

    job: str
    stage: str
    arrived: float
    due: float  # at first: when it arrived, or at the run_after of its row
    left: float | None  # when the job moved on, or a variant of a join was missing; None: never
    number: int | None = None
    priority: int = 0
    is_join: bool = False
    moved_on: float | None = None  # of a join: when its job left the state of the first attempt
    dropped: bool = False  # removed from stage_calls although the job had not moved
    forgotten: bool = False  # given up, then skipped without a claim, as its job was deleted
    tries: dict[int, Try] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"call {self.number} of {self.stage} for job {self.job}"

    def posted(self) -> list[tuple[Try, Post]]:
        """Its requests, each with its attempt, in the order of the claims. They may arrive in
        another order, as the network may hold one back."""
        ordered = sorted(self.tries.values(), key=lambda one: one.number)
        return [(one, post) for one in ordered for post in one.posts]


class Account:
    """A History arranged by calls and attempts; nothing is judged here.

    stray: a line for each debt, claim, row and request that belongs to no call.
    """

    def __init__(self, history: History):
        self.history = history
        self.stray: list[str] = []
        self.calls: list[Call] = []
        self._by_number: dict[tuple[str, int], Call] = {}
        self._latest: dict[str, Call] = {}  # the last call of a join, by job
        self._leases = {(lease.call, lease.attempt): lease for lease in history.leases}
        self._moved = {(move.job, move.tx) for move in history.moves}
        self._inserted: dict[str, float] = {}  # when the row was, by job
        self.families = Families(history)
        self.read_arrivals()
        self.read_joins()
        self.read_gone()
        self.read_claims()
        self.read_moves_of_families()
        self.read_posts()

    def read_arrivals(self) -> None:
        debts = {(debt.job, debt.tx): debt for debt in self.history.debts}
        moves = defaultdict(list)
        for move in self.history.moves:
            moves[move.job].append(move)
        for job, mine in moves.items():
            self._inserted[job] = mine[0].at
            for move, following in zip(mine, [*mine[1:], None], strict=True):
                stage = self.history.routes.get(f"{move.step}/{move.status}")
                if stage is None:
                    continue
                left = following.at if following else None
                due = max(move.at, move.run_after or 0.0)
                call = Call(job, stage, move.at, due, left, priority=move.priority)
                self.calls.append(call)
                debt = debts.pop((job, move.tx), None)
                if debt and debt.stage == stage:
                    call.number = debt.call
                    self._by_number[job, debt.call] = call
        # A debt that ended in the transaction in which it was recorded was never visible.
        self.stray += [f"{debt} was recorded though no job arrived"
                       for of, debt in debts.items() if of not in self._moved]  # fmt: skip

    def read_joins(self) -> None:
        """A join's call is owed until a variant leaves, the job moves on or is deleted, or it is
        recorded anew.
        """
        for joined in self.history.joins:
            before = self._latest.get(joined.job)
            if before is not None:
                before.left = min(before.left or joined.at, joined.at)
            at, left = joined.at, self.families.left(joined.job, joined.at)
            call = Call(joined.job, joined.stage, at, at, left, joined.call, is_join=True)
            self.calls.append(call)
            self._latest[joined.job] = self._by_number[joined.job, joined.call] = call

    def read_gone(self) -> None:
        for gone in self.history.gone:
            call = self._by_number.get((gone.job, gone.call))
            if call and (gone.job, gone.tx) not in self._moved:
                call.dropped = True

    def read_claims(self) -> None:
        for claim in self.history.claims:
            if call := self._by_number.get((claim.job, claim.call)):
                promised = claim.at + self.history.lease - ROUNDING
                until = max(claim.until, promised)
                call.tries[claim.attempt] = Try(claim.attempt, claim, until)
            else:
                self.stray.append(f"{claim} is of no call")
        for row in self.history.rows:
            call = self._by_number.get((row.job, row.call))
            if call and row.attempt in call.tries:
                call.tries[row.attempt].rows.append(row)
            elif call and row.outcome == "skipped":
                call.forgotten = True
            else:
                self.stray.append(f"{row} is of no claim")

    def read_moves_of_families(self) -> None:
        """A join's call is repeated only while the job is in the state that it had at the first
        attempt; after `retry` of a given-up call, in the state at the first attempt since."""
        for call in (call for call in self.calls if call.is_join):
            ended = max((n for n, one in call.tries.items() if "failed" in one.outcomes), default=0)
            later = [one for n, one in sorted(call.tries.items()) if n > ended]
            counted = [one for one in later if one.outcomes - {"held"}]
            if not counted:
                continue
            noted, _ = self.families.place(call.job, counted[0].claim.at)
            for one in later[later.index(counted[0]) + 1 :]:
                where, since = self.families.place(call.job, one.claim.at)
                if where != noted:
                    call.moved_on = since
                    call.left = since if call.left is None else min(call.left, since)
                    break

    def read_posts(self) -> None:
        """Assign requests by their body and time, not by their key, which is checked later."""
        claimed = defaultdict(list)
        for call in self.calls:
            for one in call.tries.values():
                slot = self.history.listeners.get(one.claim.worker)
                claimed[call.job, call.stage, one.number, slot].append(one)
        for post in self.history.posts:
            if post.job is None and self.was_cut(post):
                continue
            mine = claimed[post.job, post.stage, post.attempt, post.slot]
            before = [one for one in mine if one.claim.at <= post.arrived]
            latest_first = sorted(before, key=lambda one: -one.claim.at)
            free = [one for one in latest_first if not one.posts]
            if chosen := (free or latest_first)[:1]:
                chosen[0].posts.append(post)
            else:
                self.stray.append(f"{post} was sent without a claim")

    def was_cut(self, post: Post) -> bool:
        """Whether the network, or the death of its sender, may have cut the request."""
        return any(
            fault.reach in ("stage", "worker", "listener")
            and post.slot in fault.slots
            and fault.began <= post.finished
            and fault.ended >= post.arrived - self.history.timeout
            for fault in self.history.faults
        )

    def lease(self, call: Call, one: Try) -> Lease | None:
        return self._leases.get((call.number, one.number))

    def call_of(self, lease: Lease) -> Call | None:
        return self._by_number.get((lease.job, lease.call))

    def priority(self, lease: Lease) -> float:
        """Of its call; infinity where that is not judged."""
        call = self.call_of(lease)
        return call.priority if call else math.inf

    def committed(self, call: Call, one: Try) -> float:
        """When the claim of an attempt was committed; its own time is that of its transaction's
        beginning, which may be before the call came.
        """
        lease = self.lease(call, one)
        return lease.began if lease else one.claimed

    def lease_ended(self, call: Call, one: Try) -> float:
        """When the lease of an attempt was ended; without that, when it ran out."""
        lease = self.lease(call, one)
        return lease.ended if lease and lease.ended is not None else one.leased_until

    def mischief(self, call: Call, one: Try) -> str | None:
        """The planned misbehaviour of the stage function in this attempt."""
        return self.history.mischief.get(f"{call.job}/{call.stage}/{one.number}")

    def faults(self, listener: str, began: float, ended: float, *reach: str) -> list[Fault]:
        """The faults between two moments that hit `listener` or what it needs.

        A fault of one of its workers counts, whichever call that worker was making.
        """
        slot, pid = self.history.listeners.get(listener), pid_of(listener)
        return [
            fault
            for fault in self.history.faults
            if (not reach or fault.reach in reach)
            and slot in fault.slots
            and (not fault.pids or pid in fault.pids)
            and fault.began <= ended
            and fault.ended >= began
        ]

    def was_set_back(self, call: Call, until: float) -> bool:
        """Whether the clock of the database was set back between the insertion of the row of a call
        and a moment: the call, or the run_after of its row, is then due a day later.
        """
        since = self._inserted.get(call.job, call.arrived) - INSERTED
        return any(f.kind == SET_BACK and since <= f.ended and f.began <= until
                   for f in self.history.faults)  # fmt: skip

    def locked(self, began: float, ended: float) -> list[tuple[Fault, float]]:
        """The changes of tables and installs that held or waited for the lock of a table between
        two moments, each with how many seconds of them.
        """
        return [
            (fault, min(until, ended) - max(since, began))
            for fault in self.history.faults
            for since, until in fault.locked
            if since <= ended and until >= began
        ]


class Families:
    """The states of each job's variants after each transaction.

    arrivals: when a variant arrived in the state of the join.
    """

    def __init__(self, history: History):
        self.arrivals: dict[str, list[float]] = defaultdict(list)
        self.moves: dict[str, list[Move]] = defaultdict(list)  # of the job itself
        self.deleted: dict[str, float] = {}
        self._complete: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        variants: dict[str, dict[str, bool]] = defaultdict(dict)
        for move in history.moves:
            if move.parent is None:
                self.moves[move.job].append(move)
                if move.step is None:
                    self.deleted[move.job] = move.at
                continue
            mine = variants[move.parent]
            is_there = f"{move.step}/{move.status}" in history.joined
            if move.step is None:
                mine.pop(move.job, None)
            else:
                mine[move.job] = is_there
            if is_there:
                self.arrivals[move.parent].append(move.at)
            self._complete[move.parent].append((move.at, bool(mine) and all(mine.values())))

    def left(self, job: str, at: float) -> float | None:
        """When a variant was missing again, or the job was deleted, after the last moment before
        `at` when all variants were in place. The result may be before `at`, as a look sees an older
        state than the one at its commit.
        """
        states = self._complete[job]
        since = max((when for when, complete in states if complete and when <= at), default=at)
        found = [when for when, complete in states if when > since and not complete]
        return min([*found, *([self.deleted[job]] if job in self.deleted else [])], default=None)

    def place(self, job: str, when: float) -> tuple[tuple, float]:
        """The state of the job at that moment, and since when."""
        before = [move for move in self.moves[job] if move.at <= when]
        return ((before[-1].step, before[-1].status), before[-1].at) if before else ((), when)

    def was_complete(self, job: str, since: float, until: float) -> bool:
        """Whether all variants were in place at some moment between the two."""
        states = self._complete[job]
        for n, (at, complete) in enumerate(states):
            ended = states[n + 1][0] if n + 1 < len(states) else float("inf")
            if complete and at <= until and ended >= since:
                return True
        return False

    def complete_since(self) -> dict[str, float]:
        """The jobs that were complete at the end, and when their last variant arrived."""
        return {job: self.arrivals[job][-1] for job, states in self._complete.items()
                if states[-1][1] and job not in self.deleted}  # fmt: skip
