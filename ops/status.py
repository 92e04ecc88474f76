"""`status`: the calls and figures of every stage, what the listeners do, and what is wrong."""

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import click
import psycopg2

import config
import db
import pipeline
from calls import may_be_retried
from heartbeat import ALIVE
from ops import migrations
from ops.limits import LIMIT_FIELDS, limits
from ops.listeners import heartbeats_here, listeners, none_connected, refused
from ops.misplaced import misplaced
from ops.pools import pools
from ops.problem import IF_NEWER, INSTALL, Problem
from ops.resting import resting
from ops.routes import announced, difference, is_updates_only
from ops.screen import Screen
from ops.seconds import Seconds
from ops.table import (
    JSON,
    RED,
    YELLOW,
    Line,
    clipped,
    clock,
    duration,
    echo_json,
    echo_lines,
    is_terminal,
    plain,
    rate,
    table,
    width,
)
from ops.verify import QUEUE, Bad, check_triggers
from pipeline import JSL

STAGES = """
SELECT o.*, round(extract(epoch FROM now() - oldest_due_at))::bigint AS oldest_due_seconds,
       round(extract(epoch FROM next_retry_at - now()))::bigint AS next_retry_seconds,
       failures_last_hour / nullif(calls_last_hour, 0)::float8 AS failure_share
FROM pipeline_overview AS o
ORDER BY position NULLS LAST, stage
"""


# --- asking --------------------------------------------------------------------------------


def look(conn, settings: SimpleNamespace) -> dict[str, Any]:
    """All that status knows, as its JSON has it.

    Raises:
        Problem: the database's part is older than this program.
    """
    stages = [row._asdict() for row in db.execute(conn, STAGES)]
    version, refusal = migrations.version(conn), migrations.refusal(conn)
    if version < migrations.LATEST:
        raise Problem(refusal)
    for row in stages:
        row["held_until"] = "infinity" if row["paused"] else row["held_until"]
    declared = {row.stage: row._asdict() for row in limits(conn)}
    for row in stages:
        row |= {name: declared.get(row["stage"], {}).get(name) for name in LIMIT_FIELDS}
    resting_problem = add_resting(conn, stages)
    found = listeners(conn, settings)
    for row in stages:
        name = row["stage"]
        row["one_at_a_time"] = {one["listener"]: one["one_at_a_time"][name]
                                for one in found if name in one["one_at_a_time"]}  # fmt: skip
    misplacement = next((f"{what} → {mend}" for what, mend in misplaced(conn)), None)
    problem = misplacement or triggers_problem(conn, settings)
    return {
        "at": datetime.now().astimezone(),
        "error": None,
        "database": {
            "name": conn.info.dbname,
            "host": conn.info.host,
            "port": conn.info.port,
            "user": conn.info.user,
            "version": conn.info.server_version // 10000,
            "schema_version": version,
            "schema_problem": refusal,
            "updates_only": problem is None and is_updates_only(conn),
            "announced": announced(conn) if problem is None else None,
            "notification_queue_percent": db.execute(conn, QUEUE).fetchone()[0],
        },
        "triggers": {"ok": problem is None, "problem": problem, "misplaced": bool(misplacement)},
        "routes_problem": routes_problem(conn),
        "resting_problem": resting_problem,
        "oldest_due_seconds": max(
            (row["oldest_due_seconds"] for row in stages if row["due"]), default=None
        ),
        "calls_per_minute": round(sum(row["calls_last_hour"] for row in stages) / 60, 1),
        "stages": stages,
        "pools": [row._asdict() for row in pools(conn)],
        "listeners": found,
        "heartbeat_problem": heartbeats_here(settings)[1],
    }


def triggers_problem(conn, settings: SimpleNamespace) -> str | None:
    """What keeps the triggers from recording calls, and what to do about it, in the words of
    `verify`.
    """
    try:
        check_triggers(conn, settings)
    except Bad as bad:
        more = f"; {len(bad.others)} more" if bad.others else ""
        return f"{bad}{more} → {bad.mend}"
    return None


def routes_problem(conn) -> str | None:
    """How PIPELINE differs from the database's copy of it; None where it does not."""
    found = difference(conn)
    return f"routes differ ({len(found)}): {found[0]}" if found else None


def add_resting(conn, stages: list[dict[str, Any]]) -> str | None:
    """Add to each stage how many of its rows are failed or stalled.

    Returns:
        What of that is not known, and why; None where all is.
    """
    found = resting(conn)
    for row in stages:
        for kind in ("failed", "stalled"):
            row[kind], row[f"{kind}_reason"] = found.of(row["stage"], kind)
    return found.problem


# --- showing -------------------------------------------------------------------------------

HEADER = ["stage", "owed", "calling", "retry", "given\nup", "oldest\ndue", "calls\n/hour",
          "failed", "p50", "p95"]  # fmt: skip
# By kind of problem: the command that shows its rows.
HINTS = {
    "given_up": f"given up: {JSL} jobs --given-up, then retry JOB_ID",
    "failed": f"failed: {JSL} jobs --failed, then job ID for the way back",
    "stalled": f"stalled: {JSL} jobs --stalled",
}
# By what the triggers announce, where that is not every change.
ANNOUNCED = {
    "owed": "only changes that owe a call are announced (install --notify-owed)",
    "nothing": "nothing is announced (install --no-notify): listeners look every POLL_INTERVAL",
}
LONGEST_LISTENER = 21
MOST_CALLS = 10  # of one listener
COLUMNS = 80  # of the table of stages where the output goes to no terminal that has its own


def lines(found: dict[str, Any]) -> Iterator[Line]:
    """The result of look() as lines; only a terminal cuts them."""
    base = found["database"]
    where = f"{base['name']} on {base['host']}:{base['port']} as {base['user']}"
    yield f"{where}, schema {base['schema_version']}, {clock(found['at'])}", 0
    yield summary(found), 0
    if base["updates_only"]:
        yield "a row that is inserted owes no call (install --no-insert)", 0
    if said := ANNOUNCED.get(base["announced"]):
        yield said, 0
    no_call = [f"{clipped(said, 180)} → {JSL} verify" for said in refused(found["listeners"])]
    problems = found["error"], base["schema_problem"], found["triggers"]["problem"], *no_call
    for problem in filter(None, (*problems, found["resting_problem"])):
        what, *mend = plain(problem).split(" → ")
        yield f"PROBLEM  {what}", RED
        yield from ((f"       → {each}", RED) for each in mend)
    if problem := found["routes_problem"]:
        yield f"PROBLEM  {plain(problem)}", RED
        yield f"       → {INSTALL}, {IF_NEWER}", RED
    yield from ((line, 0) for line in stage_lines(found["stages"]))
    longest = max((len(row["stage"]) for row in found["stages"]), default=0)
    for row in found["stages"]:
        for text, colour in notes(row):
            yield f"{row['stage']:{longest}}  {text}", colour
    yield from ((pool_line(row), 0) for row in found["pools"])
    for kind, hint in HINTS.items():
        # No retry helps where a stage left PIPELINE, or has accepted the call: notes() says so.
        if any(row[kind] for row in found["stages"] if row["position"] is not None
               and (kind != "given_up" or may_be_retried(row["last_error"]))):  # fmt: skip
            yield hint, 0
    yield from listener_lines(found["listeners"])
    if problem := found["heartbeat_problem"]:
        yield plain(problem), YELLOW


def summary(found: dict[str, Any]) -> str:
    oldest, base = found["oldest_due_seconds"], found["database"]
    counts = [row[kind] for row in found["stages"] for kind in HINTS]  # None: not known
    stuck = sum(filter(None, counts))
    due = "no call is due" if None in counts else "nothing is due"
    due = f"{stuck} need{'s' * (stuck == 1)} a person" if stuck else due
    due = due if oldest is None else f"oldest due {duration(oldest)}"
    queue = f"NOTIFY queue {base['notification_queue_percent']}%"
    triggers = "triggers on" if found["triggers"]["ok"] else "triggers BROKEN"
    triggers = "jobs MISPLACED" if found["triggers"]["misplaced"] else triggers
    version = f"PostgreSQL {base['version']}"
    return ", ".join([due, f"{found['calls_per_minute']:g} calls/min", version, queue, triggers])


def stage_lines(stages: list[dict[str, Any]]) -> Iterator[str]:
    """The stages as a table; where their rows are of several tables, below the name of each."""
    columns = shutil.get_terminal_size().columns if is_terminal() else COLUMNS
    cells = [stage_cells(row) for row in stages]
    lines = table(HEADER, cells, right=HEADER[1:]).split("\n")
    if (over := max(map(width, lines)) - columns) > 0:
        longest = max(len(row["stage"]) for row in stages)
        for row in cells:
            row[0] = shortened(row[0], max(longest - over, 8))
        lines = table(HEADER, cells, right=HEADER[1:]).split("\n")
    shown = iter(lines)
    yield from itertools.islice(shown, len(lines) - len(stages))
    names = [", ".join(row["tables"]) for row in stages]
    for place, (name, line) in enumerate(zip(names, shown, strict=True)):
        if len(set(names)) > 1 and names[place - 1 : place] != [name]:
            yield f"{name}:"
        yield line


def shortened(name: str, longest: int) -> str:
    """`name` without its middle; names that begin alike are told apart by their ends."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - half]}…{name[-half:]}"


def stage_cells(row: dict[str, Any]) -> list[Any]:
    limit, share = row["max_running"], row["failure_share"]
    return [
        row["stage"],
        row["owed"],
        f"{row['calling']}/{limit}" if limit else row["calling"],
        row["retrying"],
        row["given_up"],
        duration(row["oldest_due_seconds"]),
        row["calls_last_hour"],
        "-" if share is None else f"{share:.0%}",
        duration(row["p50_seconds"]),
        duration(row["p95_seconds"]),
    ]


def notes(row: dict[str, Any]) -> Iterator[Line]:
    """What there is to say about a stage beyond its numbers."""
    if row["position"] is None and row["owed"]:
        # Before that, a listener gives calls whose state leads to another stage to that one.
        named = pipeline.in_shell(row["stage"])
        said = f"not in PIPELINE; if this stays for 5 min: {JSL} cancel --stage {named}"
        if row["stage"] in pipeline.stage_names():
            said = f"not in the database's PIPELINE: {INSTALL}, {IF_NEWER}"
        yield said, RED
    parts = [f"{row['working']} taken and worked on"] if row["working"] else []
    if row["retrying"]:
        seconds = row["next_retry_seconds"]
        parts.append(f"next retry {'in ' + duration(seconds) if seconds > 0 else 'due'}")
    if row["paused"]:
        parts.append(f"paused by {row['held_by']}: {row['held_reason']}")
    elif row["held_until"]:
        until = clock(row["held_until"])
        parts.append(f"held until {until} by {row['held_by']}: {row['held_reason']}")
    elif row["retry_error"]:
        parts.append(f"last error: {row['retry_error']}")
    if parts:
        yield plain("; ".join(parts)), YELLOW if row["held_until"] else 0
    for listener, why in row["one_at_a_time"].items():
        yield plain(f"{why}, so {listener} makes one call of it at a time"), 0
    yield from ((plain(words), 0) for words in limit_words(row))
    if row["planned"]:
        first = f"the first for {clock(row['planned_at'])}"
        yield f"{row['planned']:,} planned by run_after, {first}", 0
    if row["given_up"]:
        yield plain(f"given up: {row['last_error']}"), RED
    for kind in ("failed", "stalled"):
        if count := row[kind]:
            rows = "row is" if count == 1 else "rows are"
            yield plain(f"{count} {rows} {kind}: {row[f'{kind}_reason']}"), RED


def limit_words(row: dict[str, Any]) -> Iterator[str]:
    """What a stage declares, but for max_running and its pool."""
    if row["per_minute"]:
        begins = f"at {clock(row['next_at'])}" if row["next_at"] else "now"
        yield f"{rate(row['per_minute'])}, the next may begin {begins}"
    words = ["asynchronous"] if row["asynchronous"] else []
    words += ["highest priority first"] if row["by_priority"] else []
    if row["fair"]:
        most = f", at most {row['per_tenant']} at once of each" if row["per_tenant"] else ""
        last = f"; the last was {row['last_tenant']}" if row["last_tenant"] else ""
        words.append(f"tenants take turns{most}{last}")
    if words:
        yield ", ".join(words)


def pool_line(row: dict[str, Any]) -> str:
    text = f"pool {row['name']}: {row['calling']}/{row['size']}"
    if row["stages"]:
        text += f", {', '.join(dict.fromkeys(row['stages']))}"
    if row["stays_with"]:
        text += f"; stays with {row['stays_with']} until {clock(row['stays_until'])}"
    return plain(text)


def listener_lines(found: list[dict[str, Any]]) -> Iterator[Line]:
    """A line for each listener, and below it one for each of its oldest calls."""
    if nobody := none_connected(found):
        yield nobody, YELLOW
    if not found:
        return
    cells = []
    for row in found:
        name = row["listener"]  # cut at its beginning: names of one host differ at their ends
        if len(name) > LONGEST_LISTENER:
            name = "…" + name[1 - LONGEST_LISTENER :]
        cells.append([name, duration(row["seconds"] and round(row["seconds"])), row["doing"]])
    header, *shown = table(["listener", "since", "doing"], cells, right=["since"]).split("\n")
    yield header, 0
    for row, line in zip(found, shown, strict=True):
        yield line, 0 if row["heartbeat"] in (None, ALIVE) else RED
        yield from ((text, 0) for text in call_lines(row["calls"]))


def call_lines(calls: list[dict[str, Any]]) -> Iterator[str]:
    for call in calls[:MOST_CALLS]:
        unanswered = "  no answer" * call["unanswered"]
        about = plain(f"{call['stage']} {call['job_id']}")
        yield f"{duration(round(call['seconds'])):>8}  {about}{unanswered}"
    if len(calls) > MOST_CALLS:
        yield f"{'':8}  and {len(calls) - MOST_CALLS} more"


# --- the command ---------------------------------------------------------------------------


@click.command(short_help="What every stage owes, and what the listeners are doing.")
@JSON
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option("--interval", type=Seconds(0.1), metavar="SECONDS",
              help="Between two looks of --watch; default: 2.")  # fmt: skip
def status(as_json: bool, watch: bool, interval: float | None) -> None:
    """What every stage owes, calls, retries and gave up, and what the listeners are doing.

    calls/min, calls/hour, failed, p50 and p95 are those of the last hour; p50 and p95 of accepted
    calls. The lines below the stages say what retries, what was given up, and which rows are failed
    (set so by their stage) or stalled.
    """
    if interval and not watch:
        raise click.UsageError("--interval needs --watch.", click.get_current_context())
    looks = looking(config.settings(), interval or 2.0)
    if not watch:
        found = next(looks)
        echo_json(found) if as_json else echo_lines(lines(found))
        return
    with contextlib.suppress(KeyboardInterrupt), Screen() as screen:
        for found in looks:
            echo_json(found) if as_json else screen.draw(lines(found))


def looking(settings: SimpleNamespace, interval: float) -> Iterator[dict[str, Any]]:
    """Yield the result of look() every `interval` seconds.

    Where the database is lost after the first one, yields that once more, with an "error".
    """
    name = "job-state-listener status"
    conn: db.Connection | None = db.connect(settings, name)
    found = look(conn, settings)
    while True:
        yield found
        time.sleep(interval)
        try:
            conn = conn or db.connect(settings, name)
            found = look(conn, settings)
        except psycopg2.Error as error:
            reason = config.redactor(settings)(" ".join(str(error).split()))
            lost = isinstance(error, db.ConnectionLost)
            conn = None if lost else conn
            away = "the database is away" if lost else "the database refused"
            found |= {"error": f"{away}, trying again: {reason}"}
