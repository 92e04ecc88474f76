"""Carries out the planned faults, each for its duration. A fault that is not possible at its time,
because of another one, is skipped and not recorded, unless it made others wait behind it.
"""

import heapq
import itertools
import threading
import time
from contextlib import suppress

import psycopg2

from chaos.faults import KINDS, NotNow, Target, World
from chaos.history import Fault
from chaos.plan import PlannedFault


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
        for plan in self.planned:
            if self.wait_until(began + plan.at):
                break
            self.begin(plan)
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

    def begin(self, plan: PlannedFault) -> None:
        target = Target("listener", [])
        context = KINDS[plan.kind](self.world, plan, target)
        began = time.time()
        try:
            context.__enter__()
        except (NotNow, ProcessLookupError, psycopg2.Error):
            if target.locked:
                self.record(f"{plan.kind}, given up", began, target)
            return
        until = time.monotonic() + plan.seconds
        heapq.heappush(self._ends, (until, next(self._order), plan, target, context, began))

    def end(self, fault: tuple) -> None:
        _, _, plan, target, context, began = fault
        with suppress(ProcessLookupError):
            context.__exit__(None, None, None)
        self.record(plan.kind, began, target)

    def record(self, kind: str, began: float, target: Target) -> None:
        given = vars(target) | {"ended": target.ended or time.time()}
        self.faults.append(Fault(kind, began=began, **given))
