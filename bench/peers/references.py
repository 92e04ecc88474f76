"""What the others are compared with: calls that are not recorded, and no trigger at all."""

from bench.database import Database
from bench.peers.base import Peer, Shape
from bench.pipeline import NOTIFY_ONLY


class Floor(Peer):
    """A bare select() loop that POSTs with `requests`."""

    name = "floor"
    kind = "floor"
    best = (Shape(1), Shape(2), Shape(4))

    def shape(self, in_flight: int) -> Shape:
        return Shape(in_flight, 1)

    def install(self, database: Database) -> None:
        database.execute(NOTIFY_ONLY)


class NoTrigger(Peer):
    """What the application's transactions cost without any queue."""

    name = "no trigger"
    kind = "trigger"
