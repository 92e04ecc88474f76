"""Which calls a listener claims: of which stages, how many of each, and when it looks again."""

import contextlib
import logging
import math
import time
from collections import Counter
from datetime import datetime, timedelta
from types import SimpleNamespace

import psycopg2
from psycopg2.errors import LockNotAvailable

import calls
import db
import ops
import pipeline
from calls import Turn, Wanted
from health import StageHealth
from one_by_one import is_table_locked
from ops.rows import locked, locked_limit
from pipeline import Call, Pool

log = logging.getLogger("listener")

# Stages of which no call can be claimed are asked for again after so many seconds.
UNCLAIMABLE_EVERY = 5.0
# Seconds from a claim that could not ask for everything until the next turn.
LEFT_AFTER = 1.0
# Claims skip calls that were due before the last claimed one (see Wanted), for so many seconds. A
# call whose transaction commits late therefore waits at most that long.
MARKED_FOR = 1.0
# A sweep also claims calls that were never tried and are not due yet. One that is claimed so long
# before it is due is a sign that the database's clock was set back. It may also have been recorded
# while the claim waited for a lock; clock.shorten_waits(), which runs next, then finds nothing.
EARLY = timedelta(seconds=1)
# A listener whose last claim is older than this (seconds) extends leases that run out.
LATELY = 5.0
# Seconds that others need to connect and to settle, on top of their delay, which may come twice.
RECONNECTING = 5.0


class Claiming:
    """What to claim, and when. All times are by time.monotonic().

    limits: of every stage.
    order: the stages that are called, the one whose turn it is first.
    unclaimable: by stage, why no call of it can be claimed. Only a sweep asks for these.
    undone_at: when that was last seen, by the clock of this machine.
    limit_locked: the stages whose last claim waited too long for the row of a limit.
    claim_at: when to claim calls that are due.
    sweep_at: when to claim and also look for what nobody has announced.
    due_at: when the next call will be due; in the past: not known, so the next turn that leaves a
        worker idle asks.
    claimed_at: when a claim last succeeded.
    others_need: seconds that other listeners need to connect and to settle what they know.
    """

    def __init__(self, settings: SimpleNamespace, health: StageHealth, only: tuple[str, ...]):
        self.health = health
        self.limits = pipeline.full_limits(settings)
        self.order = [stage for stage in self.limits if not only or stage in only]
        self.unclaimable: dict[str, str] = {}
        self.undone_at: datetime | None = None
        self.limit_locked: set[str] = set()
        self.claim_at = self.sweep_at = self.due_at = 0.0
        self.claimed_at = -math.inf
        self.others_need = 2 * settings.JOB_STATE_LISTENER_RECONNECT_DELAY + RECONNECTING

        self.began = 0.0  # when this turn began to claim
        self.is_to_ask = False  # whether the database is to be asked when the next call is due
        self.asked_at: datetime | None = None  # the database's time of the last claim
        self.was_full = False  # whether the last turn left no worker idle
        self.marks: dict[str, datetime] = {}  # by stage: when the last claimed call was due
        self.marked_at = 0.0  # when `marks` were last dropped
        self.is_ordered = pipeline.is_ordered()

    @property
    def extend_by(self) -> float:
        """Seconds by which leases that run out are extended: see calls.EXTEND; 0: they are not."""
        return self.others_need if time.monotonic() - self.claimed_at >= LATELY else 0.0

    # --- what to claim ---

    def wanted(self, free: int, under_way: list[Call], sweep: bool) -> list[list[Wanted]]:
        """The claims of a turn: of each, its stages, the one whose turn it is first, and how many
        calls of each. No claim has two stages of a pool: both would take its free places.
        """
        self.began = time.monotonic()
        if sweep or self.began - self.marked_at > MARKED_FOR:
            self.marks, self.marked_at = {}, self.began
        if not free:
            return [[]]
        used = Counter(self.limits[call.stage].pool for call in under_way)
        claims: list[list[Wanted]] = [[]]
        pools: set[Pool] = set()  # of the last claim
        for stage in self.order:
            if stage in self.unclaimable and not sweep:
                continue
            limits = self.limits[stage]
            if limits.pool and used[limits.pool] >= limits.pool.size:
                continue
            most = self.health.most(stage, free, under_way)
            if not most:
                continue
            if limits.pool in pools:
                claims.append([])
                pools = set()
            if limits.pool:
                pools.add(limits.pool)
            share = math.ceil(free / len(self.order))
            claims[-1].append(Wanted(stage, limits.lease, most, share, limits.is_limited,
                                     self.marks.get(stage), self.is_ordered,
                                     waits=self.may_wait(stage)))  # fmt: skip
        return claims

    def may_wait(self, stage: str) -> bool:
        """Whether a claim of `stage` may wait for a lock. One that could not be claimed does not
        keep the others waiting again. But the row of a limit may be locked all the time, by each of
        the other listeners for a moment: without waiting, a claim might never get it.
        """
        return stage not in self.unclaimable or stage in self.limit_locked

    def put_last(self, stage: str) -> None:
        """Move this stage to the end of `order`, as one of its calls was claimed."""
        self.order.remove(stage)
        self.order.append(stage)

    def put_first(self, claims: list[list[Wanted]]) -> None:
        """Move the stages of claims that could not be made to the beginning of `order`."""
        left = {wanted.stage for claim in claims for wanted in claim}
        self.order.sort(key=lambda stage: stage not in left)

    # --- what cannot be claimed ---

    def note_unclaimable(self, conn: db.Connection, turn: Turn) -> None:
        """Remember the stages of which no call can be claimed: only a sweep asks for them again, so
        that they do not keep the others waiting. A stage whose limit has a locked row is one of
        them after two turns in a row.
        """
        before = self.unclaimable
        twice = {stage: error for stage, error in turn.limit_locked.items()
                 if stage in before or stage in self.limit_locked}  # fmt: skip
        self.limit_locked = self.limit_locked - turn.asked | turn.limit_locked.keys()
        self.unclaimable = {s: why for s, why in before.items() if s not in turn.asked}
        for stage, error in (turn.unclaimable | twice).items():
            why = self.unclaimable[stage] = why_unclaimable(conn, stage, error)
            self.undone_at = datetime.now()
            if why != before.get(stage):
                log.error("단계의 호출을 가져올 수 없음 (%.0f초마다 다시 시도): stage=%s %s",
                          UNCLAIMABLE_EVERY, stage, why)  # fmt: skip

    def is_logged(self, error: psycopg2.Error) -> bool:
        """Whether the reason why a claim failed needs no further line of the log: it has one, or a
        table is still locked.
        """
        still_locked = isinstance(error, LockNotAvailable) and bool(self.unclaimable)
        return still_locked or ops.first_line(error) in self.unclaimable.values()

    def error_of_all_stages(self, turn: Turn) -> psycopg2.Error | None:
        """The error where no call of any stage can be claimed, and a new connection may help; None
        where all tables are only locked, for which it does not.
        """
        refused = [error for error in turn.unclaimable.values()
                   if not isinstance(error, LockNotAvailable)]  # fmt: skip
        return refused[0] if refused and self.is_none_claimable else None

    @property
    def is_none_claimable(self) -> bool:
        """Whether no call of any stage can be claimed."""
        return 0 < len(self.unclaimable) == len(self.order)

    @property
    def undone(self) -> str:
        """Of which stages no call can be claimed, and why, "" where there are none; in the order of
        the pipeline, so that all listeners say the same.
        """
        stages: dict[str, list[str]] = {}
        for stage in self.limits:
            if stage in self.unclaimable:
                stages.setdefault(self.unclaimable[stage], []).append(stage)
        said = (f"{', '.join(names)}: {why}" for why, names in stages.items())
        return f"claimed of {'; '.join(said)}" if stages else ""

    # --- when to look again ---

    def plan(self, conn: db.Connection, turn: Turn, free: int, swept: float | None) -> bool:
        """Say when to look again, after a turn that had `free` idle workers; and wake the other
        listeners where a pool may have more places.

        Args:
            swept: seconds until the next sweep, where this turn was one.

        Returns:
            Whether it asked for everything, and found nothing to claim.
        """
        now = time.monotonic()
        if swept is not None:
            self.sweep_at, self.due_at = now + swept, 0.0
        if self.unclaimable:
            self.sweep_at = min(self.sweep_at, now + UNCLAIMABLE_EVERY)
        places = [row.stage for row in turn.claimed if self.leaves_places(row.stage)]
        if places:
            calls.wake_waiting(conn, places)
        is_full = len(turn.claimed) >= free
        may_be_more = bool(is_full or self.marks or places)
        if not is_full:
            self.marks = {}  # the next claim also finds what is before them
        elif self.was_full and swept is None:  # there is a queue: begin where this claim ended
            self.marks |= {row.stage: row.was_due_at for row in turn.claimed}
        self.was_full = is_full
        if may_be_more:
            self.claim_at = 0.0  # as soon as a worker is idle
            return False
        self.plan_next_due(turn, now)
        return not (turn.claimed or turn.is_partial)

    def plan_next_due(self, turn: Turn, now: float) -> None:
        """Claim again when the next call will be due; where that is not known, ask_when() asks."""
        self.claim_at = self.due_at if now < self.due_at else math.inf
        if turn.is_partial:
            self.claim_at = min(self.claim_at, self.began + LEFT_AFTER)
        # A new call may have to wait for its time, or for a rate.
        self.is_to_ask = self.is_ordered or now >= self.due_at
        self.asked_at = turn.asked_at

    def leaves_places(self, stage: str) -> bool:
        """Whether the pool of a claimed call may have more places for its stage, as it may have
        stayed with another stage until this claim.
        """
        pool = self.limits[stage].pool
        return pool is not None and pool.linger is not None and pool.size > 1

    def ask_when(self, conn: db.Connection) -> None:
        """Ask when the next call will be due, where a claim found less than there are workers."""
        if not self.is_to_ask:
            return
        seconds = calls.next_due(conn, self.order, self.asked_at)
        self.due_at = math.inf if seconds is None else time.monotonic() + seconds
        self.claim_at, self.is_to_ask = min(self.claim_at, self.due_at), False


def is_clock_set_back(turn: Turn) -> bool:
    """Whether a sweep has claimed a call long before it was due, by the database's clock."""
    asked_at = turn.asked_at
    return asked_at is not None and any(row.was_due_at > asked_at + EARLY for row in turn.claimed)


def why_unclaimable(conn: db.Connection, stage: str, error: psycopg2.Error) -> str:
    """Why no call of a stage can be claimed; of what is locked, who has locked it."""
    tables = [route.table for route, function in pipeline.routes().items()
              if function.__name__ == stage]  # fmt: skip
    if isinstance(error, LockNotAvailable):
        with contextlib.suppress(psycopg2.Error):  # calls that were claimed meanwhile are made
            if is_table_locked(error):
                return locked(conn, *tables)
            if "stage_limits" in (error.diag.context or ""):
                return locked_limit(conn)
            return locked(conn)  # one of our tables
    return ops.first_line(error)
