"""What the database has notified since a test last asked, and that it notified nothing more."""

import json
import select

import db


class Subscription:
    """Listens to a channel on a connection of its own; a context manager."""

    def __init__(self, database, channel: str = db.CHANNEL):
        self.database = database
        self.conn = database.connect()
        self.conn.cursor().execute(f'LISTEN "{channel}"; LISTEN marker')

    def payloads(self) -> list[str]:
        """Every payload since the last call of this method.

        Notifications arrive in the order of their commits: once our own marker has arrived, all
        that was committed before it has arrived, too.
        """
        self.database.rows("NOTIFY marker")
        received = []
        while True:
            assert select.select([self.conn], [], [], 60)[0], f"no marker after {received}"
            self.conn.poll()
            while self.conn.notifies:
                notification = self.conn.notifies.pop(0)
                if notification.channel == "marker":
                    return received
                received.append(notification.payload)

    def messages(self) -> list[dict]:
        """The same, read as JSON."""
        return [json.loads(payload) for payload in self.payloads()]

    def __enter__(self) -> "Subscription":
        return self

    def __exit__(self, *_: object) -> None:
        self.conn.close()
