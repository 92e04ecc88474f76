"""An ear for the tests: what the database's bell said, and the silence after it."""

import json
import select

import db


class Bell:
    """Listens to a channel on a connection of its own; a context manager."""

    def __init__(self, database, channel: str = db.CHANNEL):
        self.database = database
        self.conn = database.connect()
        self.conn.cursor().execute(f'LISTEN "{channel}"; LISTEN silence')

    def payloads(self) -> list[str]:
        """Every payload since the last time, and there was no other.

        Notifications arrive in the order of their commits: once our own one is here, all that
        was committed before it has been heard.
        """
        self.database.rows("NOTIFY silence")
        heard = []
        while True:
            assert select.select([self.conn], [], [], 60)[0], f"no silence after {heard}"
            self.conn.poll()
            while self.conn.notifies:
                notification = self.conn.notifies.pop(0)
                if notification.channel == "silence":
                    return heard
                heard.append(notification.payload)

    def heard(self) -> list[dict]:
        return [json.loads(payload) for payload in self.payloads()]

    def __enter__(self) -> "Bell":
        return self

    def __exit__(self, *_: object) -> None:
        self.conn.close()
