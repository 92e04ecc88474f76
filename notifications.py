"""Hearing what the database announces: LISTEN, whether anything would arrive, and all that has."""

import contextlib
import secrets
import select
from types import SimpleNamespace

import psycopg2
import psycopg2.extensions

import db

LISTEN = f'LISTEN "{db.CHANNEL}"; LISTEN "{db.WAKE_CHANNEL}"'


def listen(conn: db.Connection) -> None:
    db.execute(conn, LISTEN)
    conn.listens = True


def unlisten(conn: db.Connection) -> None:
    db.execute(conn, "UNLISTEN *")
    conn.listens = False


def can_hear(conn: db.Connection, settings: SimpleNamespace) -> bool:
    """Whether notifications arrive. Behind a pooler a bell of our own is rung, from a second
    connection: our own session would always hear it.
    """
    if not conn.prefix:
        return True
    channel = f"job_state_listener_{secrets.token_hex(8)}"
    db.execute(conn, f'LISTEN "{channel}"')
    with contextlib.closing(db.connect(settings)) as other:
        db.execute(other, f'NOTIFY "{channel}"')
    select.select([conn], [], [], 1.0)
    heard = any(notify.channel == channel for notify in hear(conn))
    db.execute(conn, f'UNLISTEN "{channel}"')
    return heard


def hear(conn: db.Connection) -> list[psycopg2.extensions.Notify]:
    """Take every notification that has arrived: from the socket, or read by an earlier execute.

    One poll may deliver only part of a burst, and the first poll after the backend died
    returns normally: so poll until the socket has nothing more to say.

    Raises:
        ConnectionLost
    """
    heard = []
    try:
        while True:
            conn.poll()
            heard += conn.notifies
            conn.notifies.clear()
            if len(heard) >= db.ENOUGH or not select.select([conn], [], [], 0)[0]:
                return heard
    except psycopg2.Error as error:
        raise db.ConnectionLost(" ".join(str(error).split())) from error
