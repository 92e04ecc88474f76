"""Receiving notifications: LISTEN, testing whether they arrive, reading and logging them."""

import contextlib
import json
import logging
import secrets
import select
import time
from types import SimpleNamespace

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import quote_ident

import db
import logs
import pipeline
from pipeline import Table

log = logging.getLogger("listener")


# Anybody who can connect can NOTIFY. Up to a burst, and then up to this many a second, are logged;
# more are only counted.
BURST, PER_SECOND = 10_000, 1000
OTHERS_BURST, OTHERS_PER_SECOND = 1000, 10
# With more than this burst and rate, the listener stops listening for DEAF_FOR seconds: every
# answer of the server would come after all the notifications.
FLOOD_PER_SECOND = 5000
DEAF_FOR = 60.0
# Characters taken from the connection at a time, whatever else waits in the socket.
ENOUGH_TEXT = 4_000_000
LONGEST_ID, LONGEST_WORD = 200, 100


def listen(conn: db.Connection) -> None:
    channels = [*channels_of_tables(), db.WAKE_CHANNEL]
    if pipeline.joins():
        channels.append(db.JOIN_CHANNEL)
    db.execute(conn, "; ".join(f"LISTEN {quote_ident(channel, conn)}" for channel in channels))


def channels_of_tables() -> dict[str, Table]:
    """The tables of the pipeline by the channel on which their changes are announced."""
    return {table.channel: table for table in pipeline.tables().values() if table.channel}


def followed_states() -> set[tuple[str, str, str]]:
    """Table, step and status of each state that a stage follows, for the row or for its parent."""
    rows = {
        (route.table, route.step, route.status) for route in pipeline.routes() if not route.join
    }
    return rows | {(key.table.name, key.step, key.status) for key in pipeline.joins().values()}


def can_hear(conn: db.Connection, settings: SimpleNamespace) -> bool:
    """Whether notifications arrive. Behind a pooler we send one and see. It is sent from a second
    connection, as a session always receives its own. Others that arrive meanwhile are dropped: the
    first look comes after this.
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
    heard, size = [], 0
    try:
        while True:
            conn.poll()
            heard += conn.notifies
            size += sum(len(notify.payload) for notify in conn.notifies)
            conn.notifies.clear()
            enough = len(heard) >= db.ENOUGH or size >= ENOUGH_TEXT
            if enough or not select.select([conn], [], [], 0)[0]:
                return heard
    except psycopg2.Error as error:
        raise db.ConnectionLost(" ".join(str(error).split())) from error


class Allowance:
    """So many at once, and then so many a second."""

    def __init__(self, burst: float, per_second: float):
        self.burst = self.left = burst
        self.per_second = per_second
        self.looked_at = time.monotonic()
        self.passed_over = 0

    def use(self, count: int = 1) -> bool:
        """Use up `count`; where not that many are left, False, and they count as passed over."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.looked_at) * self.per_second)
        self.looked_at = now
        if self.left < count:
            self.passed_over += count
            return False
        self.left -= count
        return True


class Hearing:
    """The notifications of a listener. Each only means "look now": its text has no effect."""

    def __init__(self, settings: SimpleNamespace):
        self.settings = settings
        self.tables = channels_of_tables()
        self.followed = followed_states()
        self.is_notified = True  # else the listener looks every POLL_INTERVAL
        self.silent = False  # the triggers do not notify
        self.listens_lost = 0  # connections that ended with their LISTEN, one after the other
        self.heard: list[psycopg2.extensions.Notify] = []  # and not logged yet
        self.changes = Allowance(BURST, PER_SECOND)
        self.others = Allowance(OTHERS_BURST, OTHERS_PER_SECOND)  # words, and what is not known
        self.pace = Allowance(db.FLOOD, FLOOD_PER_SECOND)
        self.told_at = 0.0  # time.monotonic() at which passed over ones were told last
        self.conn: db.Connection | None = None  # the last one
        self.deaf_until: float | None = None  # time.monotonic(), after a flood

    def listen(self, conn: db.Connection, silent: bool) -> None:
        """LISTEN on a new connection, and say once where no change would be heard.

        A queue that cannot be read makes LISTEN fail (58P01), or end the session (seen on 15
        and 18): after two such ends a connection does without.

        Args:
            silent: the triggers do not notify (`install --no-notify`).
        """
        is_notified, why, self.deaf_until, self.silent = False, "트랜잭션 풀러?", None, silent
        if self.conn is not None and self.conn.dropped > db.FLOOD:
            self.conn = None
            self.do_without()
            return
        self.conn = conn
        if self.listens_lost < 2:
            self.listens_lost += 1
            try:
                if can_hear(conn, self.settings):
                    listen(conn)
                    is_notified = True
            except db.ConnectionLost:
                raise
            except psycopg2.Error as error:
                why = " ".join(str(error).split())
            self.listens_lost = 0
        else:
            self.listens_lost, why = 1, "LISTEN이 연결을 끊음"
        if is_notified and silent:  # an operator's word is heard all the same
            is_notified, why = False, "install --no-notify"
        if is_notified:
            for channel in channels_of_tables():
                log.info("LISTEN '%s' 시작", channel)
        elif self.is_notified:
            seconds = self.settings.POLL_INTERVAL
            log.warning("NOTIFY가 전달되지 않음 (%s): LISTEN 대신 %g초마다 확인", why, seconds)
        self.is_notified = is_notified

    def hear(self, conn: db.Connection) -> set[str]:
        """Take what has been announced, to be logged by `log`; the channels that it came on."""
        heard = hear(conn)
        self.heard += heard
        everything = {db.CHANNEL, db.WAKE_CHANNEL, db.JOIN_CHANNEL}
        now, dropped, conn.dropped = time.monotonic(), conn.dropped, 0
        count = len(heard) + dropped
        if self.deaf_until is None and not self.pace.use(count):
            db.execute(conn, "UNLISTEN *")
            self.do_without()
        elif self.deaf_until is not None and now >= self.deaf_until:
            listen(conn)
            self.is_notified, self.deaf_until, self.pace.left = not self.silent, None, db.FLOOD
            log.info("LISTEN '%s' 시작", db.CHANNEL)
            return everything  # may have come meanwhile
        return everything if dropped else {notification.channel for notification in heard}

    def do_without(self) -> None:
        """After a flood: stop listening and poll every POLL_INTERVAL for a while."""
        self.is_notified, self.deaf_until = False, time.monotonic() + DEAF_FOR
        log.warning("NOTIFY가 너무 많음: %.0f초 동안 LISTEN 대신 %g초마다 확인",
                    DEAF_FOR, self.settings.POLL_INTERVAL)  # fmt: skip

    def log(self) -> None:
        """Log what was heard, as far as it is allowed: nobody knows who sent it."""
        heard, self.heard = self.heard, []
        for notification in heard:
            if table := self.tables.get(notification.channel):
                if not self.changes.use() or self.log_change(notification.payload, table):
                    continue
                if self.others.use():
                    log.warning("알 수 없는 NOTIFY 무시: %.200s", notification.payload)
            elif notification.payload and self.others.use():
                # Sent by `pause` and `resume`, or by anybody.
                log.info("NOTIFY로 온 메시지 (누구나 보낼 수 있음, 서버 프로세스 %d): %.500s",
                         notification.pid, notification.payload)  # fmt: skip
        self.tell_passed_over()

    def log_change(self, payload: str, table: Table) -> bool:
        """One line for a row's change of state, INFO where a stage follows; whether it is one."""
        try:
            said = json.loads(payload)
            step, status = said["current_step"], said["status"]
            level = logging.INFO if (table.name, step, status) in self.followed else logging.DEBUG
            ids = {name: cut(said[name], LONGEST_ID) for name in table.ids}
            if log.isEnabledFor(level):
                step, status = cut(step, LONGEST_WORD), cut(status, LONGEST_WORD)
                extra = logs.about(job=ids[table.ids[-1]], current_step=step, status=status)
                log.log(level, "[LISTENER] Job 상태 변화 감지: %s current_step=%s status=%s",
                        logs.ids(ids), step, status, extra=extra)  # fmt: skip
            return True
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    def tell_passed_over(self) -> None:
        """Log, at most once a second, how many notifications were not logged."""
        count = self.changes.passed_over + self.others.passed_over
        if count and time.monotonic() - self.told_at >= 1.0:
            log.warning("NOTIFY %d건은 로그에 남기지 않음: 너무 많음", count)
            self.told_at = time.monotonic()
            self.changes.passed_over = self.others.passed_over = 0


def cut(value: object, longest: int) -> object:
    """A number, or the beginning of a text."""
    return value if isinstance(value, int) else str(value)[:longest]
