"""The kinds of faults, and the seeded plan of which come when."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import db
from chaos import faults
from chaos.faults import PlannedFault
from chaos.plan import LEASE

SET_BACK = "set the clock of the database back"
AWAY = "restart database after a minute"
AWAY_EVERY = 300.0  # seconds from the beginning of one to that of the next, at least


class Kind(NamedTuple):
    """how: see faults.py. cards: how many of it are in the deck. shortest, longest: seconds."""

    how: Callable[..., faults.Context]
    cards: int
    shortest: float = 0.0
    longest: float = 0.0


# Each kind has a card. It has two where it hits one listener, worker or network, or is often given
# up for a lock. A change of tables has one for each of its statements.
KINDS = {
    "kill -9 worker": Kind(faults.kill_worker, 2),
    "kill -9 listener": Kind(faults.kill_listener, 2),
    "kill -9 listener and workers": Kind(faults.kill_all, 2),
    "SIGTERM": Kind(faults.terminate, 2),
    "freeze worker": Kind(faults.freeze_worker, 2, 0.2, 1.5),
    "freeze worker beyond its lease": Kind(faults.freeze_worker, 2, LEASE + 0.5, LEASE + 4),
    "freeze listener": Kind(faults.freeze_listener, 2, 0.2, 1.5),
    "freeze listener beyond its leases": Kind(faults.freeze_listener, 2, LEASE + 0.5, LEASE + 4),
    "freeze listener between claim and call": Kind(faults.freeze_between, 2, 0.5, LEASE + 2),
    "freeze listener and workers": Kind(faults.freeze_all, 2, 0.5, LEASE + 4),
    "terminate backend": Kind(faults.terminate_backend, 2),
    "terminate all backends": Kind(faults.terminate_backends, 1),
    "kill -9 backend": Kind(faults.kill_backend, 1),
    "freeze backend": Kind(faults.freeze_backend, 2, 0.5, LEASE + 2),
    "freeze backend beyond the deadline": Kind(
        faults.freeze_backend, 1, db.DEADLINE + 1, db.DEADLINE + 3
    ),
    "restart database, fast": Kind(faults.restart_database("fast"), 1, 0.1, 2.5),
    "restart database, immediate": Kind(faults.restart_database("immediate"), 1, 0.1, 2.5),
    AWAY: Kind(faults.restart_database("immediate"), 1, 60.0, 90.0),
    "stall database network": Kind(faults.network("database", "stall"), 2, 0.5, LEASE + 3),
    "hold the connections to the database": Kind(
        faults.network("database", "hold"), 2, db.DEADLINE + 1, db.DEADLINE + 6
    ),
    "hold what gives claims back": Kind(
        faults.hold_giving_back, 2, db.DEADLINE + 3, db.DEADLINE + 8
    ),
    "drop database network": Kind(faults.network("database", "drop"), 2, 2.0, 8.0),
    "cut database network": Kind(faults.network("database", "cut"), 2),
    "stall stage network": Kind(faults.network("stage", "stall"), 2, 0.5, LEASE + 1),
    "drop stage network": Kind(faults.network("stage", "drop"), 2, 0.5, 4.0),
    "cut stage network": Kind(faults.network("stage", "cut"), 2),
    "restart stage API": Kind(faults.restart_api, 1, 0.1, 3.0),
    "switch over to the standby": Kind(faults.switch_over, 1, 0.0, 2.0),
    "fail over from a crashed primary": Kind(faults.crash, 1, 0.0, 2.0),
    "fail over and lose commits": Kind(faults.lose_commits, 1, 0.0, 2.0),
    "malformed notifications": Kind(faults.garbage, 1),
    "change columns of jobs": Kind(faults.change_columns, len(faults.COLUMNS), 0.2, 3.0),
    "rewrite tables": Kind(faults.rewrite_tables, len(faults.REWRITES)),
    "install": Kind(faults.install, 2),
    "install without NOTIFY": Kind(faults.install_silent, 2, 1.0, 5.0),
    "step the clock of a listener": Kind(faults.step_clock, 2, 1.0, 10.0),
    SET_BACK: Kind(faults.set_back, 1),
}


def planned(seed: int, seconds: float) -> list[PlannedFault]:
    """One fault after the other, with one to four seconds from start to start."""
    chance = random.Random(f"{seed}/faults")
    found, at, away_at, cards = [], 2.0, 0.0, dealt(chance)
    while at < seconds:
        kind = next(cards)
        if kind == AWAY:
            if at < away_at:
                continue
            away_at = at + AWAY_EVERY
        duration = chance.uniform(KINDS[kind].shortest, KINDS[kind].longest)
        found.append(PlannedFault(at, kind, duration, chance.randrange(1000)))
        at += chance.uniform(1.0, 4.0)
    return found


def dealt(chance: random.Random) -> Iterator[str]:
    """One kind after the other without end: the deck is dealt, then shuffled anew."""
    deck = [name for name, kind in KINDS.items() for _ in range(kind.cards)]
    while True:
        chance.shuffle(deck)
        yield from deck
