"""Database connections, on which every wait has a deadline, but not while a stage function runs.
Driver errors are translated here: every one that makes a connection useless becomes ConnectionLost.
"""

import contextlib
import math
import random
import re
import select
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions
import psycopg2.extras

import config

CHANNEL = "job_state_changed"
# NOTIFY channel of our own commands: wakes listeners although no job has changed.
WAKE_CHANNEL = "job_state_listener_wake"
# NOTIFY channel of the triggers of tables with joins: a parent may have all of its rows.
JOIN_CHANNEL = "job_state_listener_join"
WAKE = f'NOTIFY "{WAKE_CHANNEL}"'
# A listener's application_name is this and its name, for pg_stat_activity and `status`.
LISTENER_APPLICATION = "job-state-listener run "
CALL_APPLICATION = "job-state-listener call "  # that of a call by hand, with its name

# No database call may block longer (seconds). A frozen server still acknowledges packets, so
# neither keepalives nor statement_timeout would end the wait.
DEADLINE = 10.0
STOP_DEADLINE = 3.0
# Seconds between two calls of `beat` while an answer is awaited.
BEAT_EVERY = 5.0
# Notifications that are kept at a time: 400,000 unread ones took 130 MB.
ENOUGH = 10_000
# Where more than FLOOD notifications have come while an answer is awaited, and the answer is not
# there after FLOODED_AFTER seconds, it will not come in time (see notifications.hear).
FLOOD, FLOODED_AFTER = 50_000, 1.0

# A dead server is noticed within about 7 s: on an idle connection by the keepalives, after a query
# that is not acknowledged only by tcp_user_timeout (milliseconds).
CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,  # the longest
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 1,
    "tcp_user_timeout": 7000,
}
# Whatever a DATABASE_URL that is shared with the application says.
ALWAYS = {"client_encoding": "UTF8", "target_session_attrs": "read-write"}

# Plans may not depend on when ANALYZE last ran.
PINNED = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
    "enable_indexscan": "on",
    "enable_indexonlyscan": "on",
    "enable_nestloop": "on",
    "plan_cache_mode": "force_generic_plan",
}
# Put before a person's query, and before one that reads all of jobs: it is planned as usual.
UNPINNED = "".join(f"SET LOCAL {name} = DEFAULT; " for name in PINNED)
# ALTER ROLE or ALTER DATABASE may have set any of these: what could end or cut our session, or
# change what it answers, is set here. Where a listener and the application would wait for each
# other, the listener gives way, as lock_timeout is shorter than deadlock_timeout. jit is off as
# PINNED inflates the cost of plans past jit_above_cost, up to PostgreSQL 17. With row_security off,
# a policy on jobs is an error; on, it would hide rows, which then look deleted.
SESSION = {
    "jit": "off",
    "default_transaction_isolation": "read committed",
    "row_security": "off",
    "statement_timeout": "8s",
    "lock_timeout": "500ms",
    "idle_in_transaction_session_timeout": "60s",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
}
# Further settings, by the server version that introduced them (PostgreSQL 14 is 140000). They
# switch limits of idle sessions and transactions off; statement_timeout bounds our transactions.
SINCE = {140000: {"idle_session_timeout": "0"}, 170000: {"transaction_timeout": "0"}}
# With `off`, a server that crashes may forget a commit that it has confirmed: a claim whose call
# was made, or a result that we have dropped since. All other values wait for the server's disk.
WAIT_FOR_DISK = """
SELECT set_config('synchronous_commit', 'on', {is_local})
WHERE current_setting('synchronous_commit') = 'off'; """
# Lets the server notice that a listener's host is gone; by default it does so after two hours. Not
# set behind a pooler, where the connection to the server is the pooler's.
PEER = {
    "tcp_keepalives_idle": "15s",
    "tcp_keepalives_interval": "5s",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}


class ConnectionLost(psycopg2.OperationalError):
    """The connection is of no more use: connect again.

    was_made: False where there never was one, so that no statement was sent.
    """

    was_made = True


# 40: serialization failure, deadlock; 55P03: lock not available; 57014: query cancelled.
TRY_AGAIN = ("40", "55P03", "57014")
# Seconds. A statement that took longer before it failed is not repeated: statement_timeout has
# ended it, and would again. One that a person has cancelled mostly failed sooner: it is repeated.
TRY_AGAIN_WITHIN = 4.0
# 08: connection; 25006: read-only, so a standby; 53300: too many clients; 57P0: going down;
# 0A000: a column of jobs has another type than when a statement was prepared.
LOST = ("08", "25006", "53300", "57P0", "0A000")


def wait_with_deadline(conn: "Connection") -> None:
    """psycopg2's wait callback: waits for `conn`, at most its `deadline`.

    A stop shortens the wait to STOP_DEADLINE. Raising is the only safe way out: closing the
    connection in here deadlocks.
    """
    stop, beat = getattr(conn, "stop", None), getattr(conn, "beat", None)  # other code has none
    allowed, began = getattr(conn, "deadline", DEADLINE), time.monotonic()
    counted_from = began
    while (state := conn.poll()) != psycopg2.extensions.POLL_OK:
        # Notifications arrive before the answer. Only the last are kept, as all mean "look now".
        if len(conn.notifies) > ENOUGH:
            conn.dropped = getattr(conn, "dropped", 0) + len(conn.notifies) - ENOUGH
            del conn.notifies[:-ENOUGH]
        now, watched = time.monotonic(), []
        if getattr(conn, "dropped", 0) > FLOOD and now - began > FLOODED_AFTER:
            raise ConnectionLost("the answer is behind a flood of notifications")
        if stop is not None and not stop.requested:
            watched = [stop]
        elif stop is not None and allowed > STOP_DEADLINE:
            allowed, counted_from = STOP_DEADLINE, now
        reading = [conn, *watched] if state == psycopg2.extensions.POLL_READ else watched
        writing = [conn] if state == psycopg2.extensions.POLL_WRITE else []
        left = counted_from + allowed - now
        if left <= 0:
            raise ConnectionLost(f"the database did not answer within {allowed:.0f} s")
        if beat is not None:
            beat()
        ready = select.select(reading, writing, [], min(left, BEAT_EVERY))
        if stop is not None and stop in ready[0]:
            stop.drain()


class Connection(psycopg2.extensions.connection):
    """A connection, with what waiting, pooling and preparing need to know of it."""

    # Sent before every statement behind a pooler, as settings of the session would reach others.
    prefix = ""
    # Seconds that a statement may take.
    deadline = DEADLINE
    # Signals: a stop `requested` shortens waits, and its file descriptor wakes them.
    stop = None
    # Called while an answer is awaited.
    beat: Callable[[], None] | None = None
    dropped = 0  # notifications that piled up before an answer, and were not kept

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.target = 0  # which of targets() it is connected to, by number
        self.prepared: dict[str, str] = {}  # by name: the EXECUTE of every prepared statement


def connect(
    settings: SimpleNamespace,
    name: str = "job-state-listener",
    pinned: bool = False,
    stop: Any = None,
    trying: Callable[[], None] = lambda: None,
    last: int | None = None,
    first: int | None = None,
) -> Connection:
    """An autocommit connection with a deadline on every call.

    Args:
        name: how pg_stat_activity shows it.
        pinned: for claiming and settling, whose plans are the same whatever the statistics.
        stop: shortens the wait for an answer once it is `requested`.
        trying: called before each host is tried, which takes CONNECTION["connect_timeout"] for
            each of its addresses.
        last: the target of a connection that was lost. It is tried last: a server may take
            connections and do no work.
        first: the target that is tried first.

    Raises:
        SettingsError: no database is configured.
        ConnectionLost: it cannot be reached, whatever the reason.
        psycopg2.Error: the server refuses a setting of the session.
    """
    config.require_database(settings)
    reasons = []
    for number, target in sorted(
        enumerate(targets(settings)), key=lambda one: (one[0] != first, one[0] == last)
    ):
        trying()
        try:
            conn = connect_to({"application_name": name} | options(target))
        except psycopg2.Error as error:
            reasons.append(" ".join(str(error).split()) + hint(settings, str(error)))
            continue
        conn.stop, conn.target = stop, number
        try:
            conn.autocommit = True
            prepare_session(conn, SESSION | PINNED if pinned else SESSION)
        except psycopg2.Error as error:
            conn.close()
            if not isinstance(error, ConnectionLost):
                raise
            reasons.append(str(error))
            continue
        return conn
    lost = ConnectionLost("; ".join(reasons))
    lost.was_made = False
    raise lost


def options(target: dict[str, str]) -> dict[str, Any]:
    """For libpq: how one of targets() is connected to."""
    given, most = target.get("connect_timeout", ""), CONNECTION["connect_timeout"]
    seconds = min(int(given), most) if given.isdigit() else most
    return CONNECTION | target | ALWAYS | {"connect_timeout": seconds or most}


# What a server says when it refuses a login, and the settings to check. psycopg2 gives no SQLSTATE
# for an error of connecting, so the text decides.
LOGIN = {
    'authentication failed|no password supplied|role ".*" (does not exist|is not permitted)':
        "DB_USER and DB_PASSWORD",
    'database ".*" does not exist': "DB_NAME",
}  # fmt: skip


def hint(settings: SimpleNamespace, reason: str) -> str:
    """Advice to append to some of the reasons for which a server refuses."""
    if "session is read-only" in reason:
        # We do not override it: a database is closed to writes this way before it is moved.
        return " (a standby, or default_transaction_read_only is set for the role or the database)"
    quoted = not settings.DATABASE_URL and config.in_quotes(settings.DB_PASSWORD or "")
    if quoted and "authentication failed" in reason:
        return " (DB_PASSWORD has quotes around it, which `docker --env-file` keeps)"
    for refusal, names in LOGIN.items():
        if re.search(refusal, reason):
            return f" (look at {'DATABASE_URL' if settings.DATABASE_URL else names})"
    return ""


def targets(settings: SimpleNamespace) -> Iterator[dict[str, str]]:
    """Connection parameters for libpq: one dict for each host that is given."""
    target = {
        "host": settings.DB_HOST,
        "port": settings.DB_PORT,
        "dbname": settings.DB_NAME,
        "user": settings.DB_USER,
        "password": settings.DB_PASSWORD,
    }
    if settings.DATABASE_URL:
        target = psycopg2.extensions.parse_dsn(settings.DATABASE_URL)
    target = {name: str(value) for name, value in target.items() if value}
    lists = {name: target[name].split(",") for name in ("host", "hostaddr", "port")
             if name in target}  # fmt: skip
    count = max((len(lists[name]) for name in ("host", "hostaddr") if name in lists), default=1)
    if any(len(given) not in (1, count) for given in lists.values()):
        yield target  # libpq reports numbers of hosts and ports that do not match
        return
    for number in range(count):
        one = {name: given[number % len(given)] for name, given in lists.items()}
        yield target | one


# A wait callback is for all connections of a process, and COPY is refused while there is one. So
# workers have none, as their stage functions may have connections of their own.
psycopg2.extensions.set_wait_callback(wait_with_deadline)


@contextlib.contextmanager
def without_callback() -> Iterator[None]:
    """Within the `with`, libpq waits for the server itself, without our deadline."""
    before = psycopg2.extensions.get_wait_callback()
    psycopg2.extensions.set_wait_callback(None)
    try:
        yield
    finally:
        psycopg2.extensions.set_wait_callback(before)


def connect_to(options: dict[str, Any]) -> Connection:
    with without_callback():  # libpq keeps connect_timeout itself
        return psycopg2.connect(connection_factory=Connection, **options)


def prepare_session(conn: Connection, session: dict[str, str]) -> None:
    """Set the session up, in a way that also holds behind a pooler."""
    pooled = is_pooled(conn)
    for version, more in SINCE.items():
        if conn.info.server_version >= version:
            session = session | more
    setting = "SET LOCAL {} = '{}'; " if pooled else "SET {} = '{}'; "
    session = session if pooled else session | PEER
    commands = "".join(setting.format(name, value) for name, value in session.items())
    commands += WAIT_FOR_DISK.format(is_local=pooled)
    if pooled:
        conn.prefix = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; " + commands
    else:
        execute(conn, commands)


BACKEND_PID = "SELECT pg_catalog.pg_backend_pid()"


def is_pooled(conn: Connection) -> bool:
    """Whether there is a pooler in between: it reports a made-up backend pid at connect."""
    return execute(conn, BACKEND_PID).fetchone()[0] != conn.info.backend_pid


def execute(
    conn: Connection,
    sql: str,
    params: dict[str, Any] | None = None,
    cursor_factory: type[psycopg2.extensions.cursor] = psycopg2.extras.NamedTupleCursor,
):
    """Run `sql` and return its cursor. Several statements in one are one transaction.

    Raises:
        ConnectionLost: connect again; whether the statement took effect is not known.
        psycopg2.Error: the statement's own fault; the connection is still good.
    """
    began, is_first = time.monotonic(), True
    while True:
        try:
            cursor = conn.cursor(cursor_factory=cursor_factory)
            cursor.execute(conn.prefix + sql, params)
            return cursor
        except psycopg2.Error as error:
            if is_lost(conn, error):
                raise ConnectionLost(" ".join(str(error).split())) from error
            is_soon = time.monotonic() - began <= TRY_AGAIN_WITHIN
            if not (is_first and is_soon and (error.pgcode or "").startswith(TRY_AGAIN)):
                raise
            is_first = False


PARTS_LIMIT = 2.0  # seconds: a locked table takes one, and the listener does nothing else meanwhile
# Seconds for all parts together, where asking for all at once took too long and somebody waits.
SLOW_PARTS_LIMIT = 10.0


def in_parts(
    conn: Connection, ask: Callable, *groups: Collection[str], all_parts: bool = False
) -> tuple[list, dict[str, psycopg2.Error]]:
    """What `ask(conn)` returns; where it fails, what `ask(conn, part)` returns for each part. So a
    table that is locked, or cannot be read, keeps no other waiting.

    Args:
        groups: of parts. Those of a group are asked in random order, so that each is asked at some
            time.
        all_parts: ask all, or as many as SLOW_PARTS_LIMIT allows where asking for all at once took
            too long. Else none after PARTS_LIMIT, nor after one that took too long.

    Returns:
        The answers; and the errors by part, or by "" where no part fails by itself and not all
        were asked. With `all_parts`, a part that was not asked has the error of all.
    """
    parts = [part for group in groups for part in random.sample([*group], len(group))]
    try:
        return [ask(conn)], {}
    except ConnectionLost:
        raise
    except psycopg2.Error as error:
        of_all = {"": error}
    is_slow = isinstance(of_all[""], psycopg2.errors.QueryCanceled)
    if is_slow and not all_parts:
        return [], of_all  # it took long enough
    answers, failed = [], dict[str, psycopg2.Error]()
    limit = math.inf if all_parts else PARTS_LIMIT
    until = time.monotonic() + (SLOW_PARTS_LIMIT if is_slow else limit)
    for number, part in enumerate(parts):
        # A part that is the only one has just taken too long.
        if time.monotonic() > until or (is_slow and len(parts) == 1):
            failed |= dict.fromkeys(parts[number:] if all_parts else [], of_all[""])
            break
        try:
            answers.append(ask(conn, part))
        except ConnectionLost:
            raise
        except psycopg2.Error as error:
            failed[part] = error
            if isinstance(error, psycopg2.errors.QueryCanceled) and not all_parts:
                break  # the next one may take as long
    if not failed and (not parts or len(answers) < len(parts)):
        failed = of_all  # no part failed by itself, but not all were asked
    return answers, failed


def reasons(failed: Mapping[str, psycopg2.Error]) -> str:
    """The errors of in_parts(), in one line, without the SQL that they quote."""
    texts = {part: str(error).strip().partition("\n")[0] for part, error in failed.items()}
    return "; ".join(f"{part}: {text}" if part else text for part, text in texts.items())


@dataclass(frozen=True)
class Statement:
    """A statement that a session prepares under its name."""

    name: str
    sql: str


PLACEHOLDER = re.compile(r"%\((\w+)\)s")


def run(
    conn: Connection,
    statements: Sequence[Statement],
    params: dict[str, Any],
    cursor_factory: type[psycopg2.extensions.cursor] = psycopg2.extras.NamedTupleCursor,
):
    """Run `statements` as one transaction and return the cursor of the last.

    A session prepares each once, as planning a claim costs more than running it. Not behind a
    pooler, where the next transaction may have another session.
    """
    if conn.prefix:
        return execute(conn, ";".join(one.sql for one in statements), params, cursor_factory)
    if new := [one for one in statements if one.name not in conn.prepared]:
        prepare(conn, new)
    sql = ";".join(conn.prepared[one.name] for one in statements)
    return execute(conn, sql, params, cursor_factory)


def prepare(conn: Connection, statements: Sequence[Statement]) -> None:
    """PREPARE `statements`; conn.prepared has the EXECUTE of each.

    Each takes a round trip of its own, so that those before one that fails stay prepared. The
    server infers the types of parameters from their use.
    """
    for one in statements:
        given = list(dict.fromkeys(PLACEHOLDER.findall(one.sql)))
        number = {name: f"${position}" for position, name in enumerate(given, 1)}
        execute(conn, f"PREPARE {one.name} AS {one.sql % number}")
        arguments = ", ".join(f"%({name})s" for name in given)
        conn.prepared[one.name] = f"EXECUTE {one.name}" + (f"({arguments})" if given else "")


def is_lost(conn: Connection, error: psycopg2.Error) -> bool:
    """Whether `error` ends the connection (seen with psycopg2 2.9, libpq 17).

    OperationalError alone is the wrong test: a deadlock is one on a healthy connection, while
    a lost one also raises InterfaceError or a bare DatabaseError.
    """
    if conn.closed or isinstance(error, psycopg2.InterfaceError):
        return True
    if error.pgcode is None:
        return isinstance(error, psycopg2.OperationalError) or type(error) is psycopg2.DatabaseError
    return error.pgcode.startswith(LOST)


# Puts the oid of the schema between the prefix and the name, as a database may have several
# installations. Not done behind a pooler, which gives the session to other clients, too.
NAME_SESSION = """
SELECT set_config('application_name', %(prefix)s || relnamespace || '/' || %(name)s, false)
FROM pg_class WHERE oid = to_regclass('stage_calls')
"""


def name_session(conn: Connection, listener: str) -> None:
    """Put the schema of this listener into its application_name, for `status`."""
    if not conn.prefix:
        execute(conn, NAME_SESSION, {"prefix": LISTENER_APPLICATION, "name": listener})


# A commit that waits for a synchronous standby does not notice that its client is gone. So each
# connection that we give up leaves a session that keeps its locks, until the server takes no more
# connections. Such sessions of listeners are ended here. Their commit becomes visible, but may not
# have reached the standby.
WAITING = """
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event = 'SyncRep'
  AND query_start < now() - make_interval(secs => %(deadline)s)
"""
END_WAITING = f"""
SELECT count(*) AS waiting,
       count(CASE WHEN usename = current_user AND application_name LIKE 'job-state-listener%%'
                  THEN pg_terminate_backend(pid) END) AS ended
{WAITING}"""


def end_waiting(conn: Connection) -> int:
    """End sessions that are left of connections which were given up.

    Returns:
        How many sessions have been waiting for a standby, as far as our role can see.
    """
    return execute(conn, END_WAITING, {"deadline": DEADLINE}).fetchone().waiting


# --- what a stage function asks ------------------------------------------------------------

# Set after connecting: as an option of the connection it would defeat target_session_attrs.
READ_ONLY = "SET TRANSACTION READ ONLY; "


def query(
    settings: SimpleNamespace,
    sql: str,
    params: dict[str, Any] | None = None,
    first: int | None = None,
    cursor_factory: type[psycopg2.extensions.cursor] = psycopg2.extras.NamedTupleCursor,
) -> list:
    """The rows of a read-only query on a connection of its own.

    Args:
        first: see connect().

    Raises:
        ConnectionLost: the database cannot be reached. Not raised where the query itself loses the
            connection: a call whose query always does so has to be given up some time.
        psycopg2.Error: the query's own fault.
    """
    with contextlib.closing(connect(settings, "job-state-listener lookup", first=first)) as conn:
        try:
            return execute(conn, READ_ONLY + sql, params, cursor_factory).fetchall()
        except ConnectionLost as lost:
            raise lost.__cause__ or lost from None
