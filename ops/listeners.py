"""Who is there: the listeners that are connected, or that have a heartbeat, and their calls."""

from types import SimpleNamespace
from typing import Any

import db
from heartbeat import ALIVE, Beat, heartbeats
from ops.table import clock

# An application_name is cut where an identifier would be.
SESSIONS = """
SELECT substr(application_name, length(%(prefix)s) + 1) AS listener,
       current_setting('max_identifier_length')::integer - length(%(prefix)s) AS longest,
       extract(epoch FROM now() - backend_start)::float8 AS seconds
FROM pg_stat_activity
WHERE datname = current_database() AND starts_with(application_name, %(prefix)s)
ORDER BY backend_start
"""

CALLS = """
SELECT worker AS listener, stage, job_id, call_id, attempt, started_at, leased_until, unanswered,
       extract(epoch FROM now() - started_at)::float8 AS seconds
FROM stage_leases
WHERE leased_until > now()
ORDER BY started_at
"""


def connected(conn) -> dict[str, float]:
    """The listeners that are connected: the beginning of each name, and for how many seconds."""
    given = {"prefix": db.LISTENER_APPLICATION}
    return {row.listener: row.seconds for row in db.execute(conn, SESSIONS, given)}


def listeners(conn, settings: SimpleNamespace) -> list[dict[str, Any]]:
    """Every listener that is connected, has calls under way, or a heartbeat on this host."""
    beats = {beat.listener: beat for beat in heartbeats(settings.HEARTBEAT_DIR)}
    sessions = db.execute(conn, SESSIONS, {"prefix": db.LISTENER_APPLICATION}).fetchall()
    calls = [row._asdict() for row in db.execute(conn, CALLS)]
    names = dict.fromkeys([*beats, *(call["listener"] for call in calls)])
    cut = {name: name[: sessions[0].longest] if sessions else name for name in names}
    names |= {row.listener: None for row in sessions if row.listener not in cut.values()}
    since = {row.listener: row.seconds for row in sessions}
    found = []
    for name in sorted(names):
        session, beat = since.get(cut.get(name, name)), beats.get(name)
        ours = [call for call in calls if call["listener"] == name]
        found.append(
            {
                "listener": name,
                "connected": session is not None,
                "heartbeat": beat and beat.state,
                "seconds": beat.seconds if beat else session,
                "doing": doing(beat, session is not None, ours),
                "calls": ours,
            }
        )
    return found


def doing(beat: Beat | None, is_connected: bool, calls: list[dict[str, Any]]) -> str:
    """What a listener is doing; its calls go on though it is frozen, gone or not connected."""
    text = beat.doing if beat else "connected" if is_connected else "not connected"
    if under_way := sum(not call["unanswered"] for call in calls):
        text = f"{under_way} call{'s' * (under_way > 1)} under way"
        text += ", not connected" * (not is_connected)
    if calls and not is_connected:
        text += f"; the last lease ends {clock(max(call['leased_until'] for call in calls))}"
    return text if beat is None or beat.state == ALIVE else f"{beat.state}: {text}"
