"""Carries out the planned faults, each for its duration. Where one is not possible at its time,
because of another, the next that is possible takes its place, and it comes as soon as it can.
"""

import heapq
import itertools
import threading
import time
from contextlib import suppress

import psycopg2

from chaos.deck import KINDS
from chaos.faults import NotNow, PlannedFault, Target, World
from chaos.history import Fault


class Nemesis:
    """run() follows the plan until `stop` is set, then ends what is still under way."""

    def __init__(self, world: World, planned: list[PlannedFault]):
        self.world, self.planned = world, planned
        self.faults: list[Fault] = []
        self.stop = threading.Event()
        self._order = itertools.count()
        self._ends: list[tuple] = []  # (time, number, plan, target, context, began)

    def run(self) -> None:
        began = time.monotonic()
        left = list(self.planned)
        for at in [plan.at for plan in self.planned]:
            if self.wait_until(began + at):
                break
            if begun := next((plan for plan in left if self.begin(plan)), None):
                left.remove(begun)
        while self._ends and not self.wait_until(self._ends[0][0]):
            pass
        while self._ends:
            self.end(heapq.heappop(self._ends))

    def wait_until(self, when: float) -> bool:
        """Sleep, ending the faults whose time is over; True when told to stop."""
        while True:
            while self._ends and self._ends[0][0] <= time.monotonic():
                self.end(heapq.heappop(self._ends))
            following = min([when, *(end[0] for end in self._ends[:1])])
            if self.stop.wait(max(0.0, following - time.monotonic())):
                return True
            if time.monotonic() >= when:
                return False

    def begin(self, plan: PlannedFault) -> bool:
        """Whether it began, or made others wait before it was given up."""
        target = Target("listener", [])
        context = KINDS[plan.kind].how(self.world, plan, target)
        began = time.time()
        try:
            context.__enter__()
        except (NotNow, ProcessLookupError, psycopg2.Error):
            if target.locked:
                self.record(f"{plan.kind}, given up", began, target)
            return bool(target.locked)
        until = time.monotonic() + plan.seconds
        heapq.heappush(self._ends, (until, next(self._order), plan, target, context, began))
        return True

    def end(self, fault: tuple) -> None:
        _, _, plan, target, context, began = fault
        with suppress(ProcessLookupError):
            context.__exit__(None, None, None)
        self.record(plan.kind, began, target)

    def record(self, kind: str, began: float, target: Target) -> None:
        given = vars(target) | {"ended": target.ended or time.time()}
        self.faults.append(Fault(kind, began=began, **given))
