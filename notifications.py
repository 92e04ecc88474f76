"""Hearing what the database announces: LISTEN, whether anything would arrive, all that has, and
the lines that the log has of it.
"""

import contextlib
import json
import logging
import secrets
import select
from types import SimpleNamespace

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import quote_ident

import db
import logs
import pipeline
from pipeline import Route, Table

log = logging.getLogger("listener")


def listen(conn: db.Connection) -> None:
    channels = [*channels_of_tables(), db.WAKE_CHANNEL, db.JOIN_CHANNEL]
    execute = "; ".join(f"LISTEN {quote_ident(channel, conn)}" for channel in channels)
    db.execute(conn, execute)


def channels_of_tables() -> dict[str, Table]:
    """Where the tables of the pipeline announce changes, and which of them does."""
    return {table.channel: table for table in pipeline.tables().values() if table.channel}


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


class Hearing:
    """What a listener hears. It only means "look now": nothing depends on its words."""

    def __init__(self, settings: SimpleNamespace):
        self.settings = settings
        self.is_told = True  # else the listener looks every POLL_INTERVAL
        self.listens_lost = 0  # connections that ended with their LISTEN, one after the other
        self.heard: list[psycopg2.extensions.Notify] = []  # and not logged yet

    def listen(self, conn: db.Connection, silent: bool) -> None:
        """LISTEN on a new connection, and say once where no change would be heard.

        A queue that cannot be read makes LISTEN fail (58P01), or end the session (seen on 15
        and 18): after two such ends a connection does without.

        Args:
            silent: the triggers ring no bell (`install --no-notify`).
        """
        is_told, why = False, "트랜잭션 풀러?"
        if self.listens_lost < 2:
            self.listens_lost += 1
            try:
                if is_told := can_hear(conn, self.settings):
                    listen(conn)
            except db.CONNECTION_LOST:
                raise
            except psycopg2.Error as error:
                why = " ".join(str(error).split())
            self.listens_lost = 0
        else:
            self.listens_lost, why = 1, "LISTEN이 연결을 끊음"
        if is_told and silent:  # an operator's word is heard all the same
            is_told, why = False, "install --no-notify"
        if is_told:
            for channel in channels_of_tables():
                log.info("LISTEN '%s' 시작", channel)
        elif self.is_told:
            seconds = self.settings.POLL_INTERVAL
            log.warning("알림이 전달되지 않음 (%s): LISTEN 대신 %g초마다 확인", why, seconds)
        self.is_told = is_told

    def hear(self, conn: db.Connection) -> set[str]:
        """Take what has been announced, to be logged by `log`; the channels that it came on."""
        heard = hear(conn)
        self.heard += heard
        return {notification.channel for notification in heard}

    def log(self) -> None:
        """Log what was heard."""
        heard, self.heard = self.heard, []
        tables = channels_of_tables() if heard else {}
        for notification in heard:
            if table := tables.get(notification.channel):
                log_change(notification.payload, table)
            elif notification.payload:  # what an operator did, in words
                log.warning("운영자: %.500s", notification.payload)


def log_change(payload: str, table: Table) -> None:
    """One line for a row's change of state; INFO where a stage follows."""
    try:
        said = json.loads(payload)
        step, status = said["current_step"], said["status"]
        ids = logs.ids({name: said[name] for name in table.ids})
        level = logging.INFO if is_routed(table, step, status) else logging.DEBUG
        log.log(
            level,
            "[LISTENER] Job 상태 변화 감지: %s current_step=%s status=%s",
            *(ids, step, status),
            extra=logs.about(job=said[table.ids[-1]], current_step=step, status=status),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        log.warning("알 수 없는 알림 무시: %.200s", payload)


def is_routed(table: Table, step: str, status: str) -> bool:
    """Whether a stage follows from a state of a row."""
    joins = (key for key in pipeline.joins().values() if key.table == table)
    return Route(table.name, "", step, status) in pipeline.routes() or any(
        (key.step, key.status) == (step, status) for key in joins
    )
