"""The listeners that are connected, or that have a heartbeat on this host, and their calls."""

from types import SimpleNamespace
from typing import Any

import db
from heartbeat import ALIVE, Beat, heartbeats
from ops.table import clock
from pipeline import JSL

# What a listener is doing begins with this where the database has another PIPELINE than it.
OTHER_PIPELINE = "PIPELINE differs, restart it"
# It begins with this where the listener can claim no call of some stages, or where its looks at
# joins or at moves fail; then what cannot be done, and why, follows. OTHER_PIPELINE comes first.
NO_CALL = "no call can be "
# After OTHER_PIPELINE; then what is waited for.
STOPPING = "stopping: waits for "
# Follows "making calls".
ALL_BUSY = "all workers are busy"
# A time may follow, when all workers are busy: the listener has not asked again since then.
AS_OF = ", as of "
# It ends with this and the stages that get one call at a time, each followed by the reason.
ONE_CALL = "one call at a time, as "

# The sessions of listeners, or of calls by hand, in all databases of this server. PostgreSQL cuts
# an application_name at the length of an identifier. One without a schema belongs to a call by
# hand, to a listener behind a pooler, or to one that has just connected. Anybody can give a session
# such a name, so in this database its role must be one that may write to stage_calls, or become it.
SESSIONS = """
SELECT regexp_replace(s.said, '^[0-9]+/', '') AS listener,
       s.room - length(coalesce(substring(s.said from '^[0-9]+/'), '')) AS longest,
       s.datname = current_database()
           AND coalesce(substring(s.said from '^([0-9]+)/') = (
               SELECT relnamespace::text FROM pg_class WHERE oid = to_regclass('stage_calls')
           ), true) AS is_ours,
       extract(epoch FROM now() - s.backend_start)::float8 AS seconds,
       s.pid = pg_backend_pid() AS is_own
FROM (SELECT datname, pid, backend_start,
             substr(application_name, length(%(prefix)s) + 1) AS said,
             current_setting('max_identifier_length')::integer - length(%(prefix)s) AS room
      FROM pg_stat_activity AS a
      WHERE starts_with(application_name, %(prefix)s)
        AND (datname <> current_database() OR EXISTS (
            SELECT FROM pg_roles AS r
            WHERE pg_has_role(a.usesysid, r.oid, 'MEMBER')
              AND has_table_privilege(r.oid, to_regclass('stage_calls'), 'UPDATE')))) AS s
ORDER BY s.backend_start
"""

CALLS = """
SELECT worker AS listener, stage, job_id, call_id, coalesce(spent, attempt) AS attempt, started_at,
       leased_until, unanswered,
       extract(epoch FROM now() - started_at)::float8 AS seconds
FROM stage_leases
WHERE leased_until > now() AND NOT working  -- no listener waits for a call that was taken with 202
ORDER BY started_at
"""


def sessions(conn, application: str = db.LISTENER_APPLICATION) -> list:
    """The sessions of listeners that are connected to this server, or those of calls by hand."""
    return db.execute(conn, SESSIONS, {"prefix": application}).fetchall()


def connected(conn) -> int:
    """How many listeners are connected that work for these tables."""
    return sum(row.is_ours for row in sessions(conn))


def is_first(conn) -> bool:
    """Whether no listener is connected that was there before this one. A role that may not see when
    the sessions of other roles began takes itself for the first.
    """
    ours = [row for row in sessions(conn) if row.is_ours]
    return not ours or ours[0].is_own


def heartbeats_here(settings: SimpleNamespace) -> tuple[dict[str, Beat], str | None]:
    """The heartbeats on this host by their listeners, and why they cannot be read: they may belong
    to another user.
    """
    try:
        return {beat.listener: beat for beat in heartbeats(settings.HEARTBEAT_DIR)}, None
    except OSError as error:
        return {}, f"the heartbeats cannot be read: {error}"


def listeners(conn, settings: SimpleNamespace) -> list[dict[str, Any]]:
    """Every listener that is connected, has calls under way, or a heartbeat on this host, and every
    call by hand; not those that work in another database or for another schema of this one.
    """
    beats, _ = heartbeats_here(settings)
    calls = [row._asdict() for row in db.execute(conn, CALLS)]
    names = dict.fromkeys([*beats, *(call["listener"] for call in calls)])
    since = {}
    for row in sessions(conn):
        # Names that are cut may be alike: each session takes one that no other has taken.
        fitting = (n for n in names if n not in since and n[: row.longest] == row.listener)
        name = next(fitting, row.listener)
        if row.is_ours:
            since[name] = row.seconds
        elif not any(call["listener"] == name for call in calls):
            beats.pop(name, None)
            names.pop(name, None)
    hands = sessions(conn, db.CALL_APPLICATION)
    found = []
    for name in sorted(names | since):
        beat, ours = beats.get(name), [call for call in calls if call["listener"] == name]
        is_listener = beat is not None or name in since
        hand = next((row for row in hands if name[: row.longest] == row.listener
                     and not is_listener), None)  # fmt: skip
        found.append(
            {
                "listener": name,
                "connected": name in since,
                "heartbeat": beat and beat.state,
                "seconds": beat.seconds if beat else since.get(name, hand and hand.seconds),
                "doing": "a call by hand" if hand else doing(beat, name in since, ours),
                "one_at_a_time": one_at_a_time(beat),
                "takes_none": takes_none(beat),
                "calls": ours,
            }
        )
    return found


def none_connected(found: list[dict[str, Any]]) -> str | None:
    """That none of listeners() is connected, and what to do; None where one is."""
    if any(row["connected"] for row in found):
        return None
    if any(row["heartbeat"] == ALIVE for row in found):
        return f"no listener is connected, though one is running: {JSL} check says what it is doing"
    return f"no listener is connected: start {JSL}"


def refused(found: list[dict[str, Any]]) -> list[str]:
    """What listeners() has said of calls that cannot be claimed, recorded or ended, each once."""
    parted = (row["doing"].partition(NO_CALL) for row in found if row["heartbeat"] == ALIVE)
    said = sorted(NO_CALL + what for _, begins, what in parted if begins)
    return list({what.partition(AS_OF)[0]: what for what in said}.values())


def one_at_a_time(beat: Beat | None) -> dict[str, str]:
    """The stages of which this listener makes one call at a time, and why; a heartbeat names them
    while that call is under way.
    """
    if beat is None or beat.state != ALIVE or ONE_CALL not in beat.doing:
        return {}
    said = beat.doing.partition(ONE_CALL)[2].split(", ")
    return {stage: why for stage, _, why in (one.partition(" ") for one in said)}


def takes_none(beat: Beat | None) -> str | None:
    """Why this listener takes no call just now; None: it may take one, or that is not known."""
    said = beat.doing if beat and beat.state == ALIVE else ""
    why = {OTHER_PIPELINE: OTHER_PIPELINE, STOPPING: "it is stopping", ALL_BUSY: ALL_BUSY}
    return next((words for part, words in why.items() if part in said), None)


def doing(beat: Beat | None, is_connected: bool, calls: list[dict[str, Any]]) -> str:
    """What a listener is doing. Its calls go on even if it is frozen, gone or not connected."""
    text = beat.doing if beat else "connected" if is_connected else "not connected"
    under_way = sum(not call["unanswered"] for call in calls)
    if under_way and not (beat and STOPPING in beat.doing):
        text = f"{under_way} call{'s' * (under_way > 1)} under way"
        text += ", not connected" * (not is_connected)
        if beat and beat.doing.startswith(OTHER_PIPELINE):
            text = f"{OTHER_PIPELINE}; {text}"
        if beat and NO_CALL in beat.doing:
            text += f"; {NO_CALL}{beat.doing.partition(NO_CALL)[2]}"
    if calls and not is_connected:
        text += f"; the last lease ends {clock(max(call['leased_until'] for call in calls))}"
    return text if beat is None or beat.state == ALIVE else f"{beat.state}: {text}"
