"""References that do not record what is owed: a lower bound of the cost."""

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import NOTIFY_ONLY


class Floor(Peer):
    """A bare select() loop that POSTs with `requests`."""

    name = "floor"
    worker = "floor"
    kind = "reference"
    keeps_debts = False
    best = (Shape(1), Shape(2), Shape(4))

    def shape(self, in_flight: int) -> Shape:
        return Shape(in_flight, 1)

    def install(self, database: Database) -> None:
        database.execute(NOTIFY_ONLY)


class NoTrigger(Floor):
    """No trigger at all: what the application's transactions cost without any queue."""

    name = "no trigger"
    calls = False

    def install(self, database: Database) -> None:
        pass
