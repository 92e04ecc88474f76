"""Alarms: problems that `status` found and a person has to act on, the most urgent first, each with
its reason and the command to type. This module does not use the database.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any, NamedTuple

import pipeline
from calls import may_be_retried
from heartbeat import ALIVE
from ops import waits
from ops.listeners import OTHER_PIPELINE, refused
from ops.problem import IF_NEWER, INSTALL
from ops.table import counted, duration, rate, readable

# Urgencies, the most urgent first: see Alarm.
EVERYTHING, STAGE, JOBS, INTENDED = range(4)

LATE = 300  # seconds that a call may have been due
FULL = 50  # per cent of the server's NOTIFY queue


class Alarm(NamedTuple):
    """Something that needs a person.

    Args:
        urgency: EVERYTHING (no stage is called), STAGE, JOBS (some jobs) or INTENDED (a pause).
        mend: the command to type; None where no command helps.
        kind: of `status`: "failed", "given_up", "stalled", "late", "held", …
    """

    urgency: int
    kind: str
    what: str
    reason: str | None = None
    mend: str | None = None
    stage: str | None = None


def alarms(state: dict[str, Any]) -> list[Alarm]:
    """The alarms in the result of status.look(): by urgency, then in the order of the pipeline."""
    found = list(of_everything(state))
    for row in state["stages"]:
        found += of_stage(row, state["at"])
    return sorted(found, key=lambda alarm: alarm.urgency)


def of_everything(state: dict[str, Any]) -> Iterator[Alarm]:
    """What concerns every stage."""
    if problem := state["triggers"]["problem"]:
        why, _, mend = problem.partition(" → ")
        what = "new calls may not be recorded"
        if state["triggers"]["misplaced"]:  # the triggers may go on recording them
            what = "jobs is misplaced"
        yield Alarm(EVERYTHING, "triggers", what, why, mend)
    if problem := state["database"]["schema_problem"]:
        yield Alarm(EVERYTHING, "schema", "program and database differ", problem)
    if problem := state["routes_problem"]:
        reason = f"{problem}; {INSTALL}, {IF_NEWER}"
        yield Alarm(EVERYTHING, "routes", "program and database have other routes", reason)
    listeners = state["listeners"]
    if not any(row["connected"] for row in listeners):
        alive = (
            f"{row['listener']}: {row['doing']}" for row in listeners if row["heartbeat"] == ALIVE
        )
        reason = "; ".join(alive)
        yield Alarm(EVERYTHING, "listener", "no listener is connected, nothing is called",
                    reason, waits.NOBODY.mend)  # fmt: skip
    for row in listeners:
        if row["heartbeat"] not in (None, ALIVE):
            yield Alarm(STAGE, "listener", f"listener {row['listener']} is {row['heartbeat']}",
                        row["doing"], f"{pipeline.JSL} check")  # fmt: skip
        elif OTHER_PIPELINE in row["doing"]:
            what = f"listener {row['listener']} has another PIPELINE than the database"
            yield Alarm(STAGE, "listener", what, "calls of new states wait until it is restarted")
    for said in refused(listeners):
        yield Alarm(STAGE, "refused", said, None, f"{pipeline.JSL} verify")
    if (percent := state["database"]["notification_queue_percent"]) >= FULL:
        reason = "when it is full, every transaction that changes a job fails"
        yield Alarm(EVERYTHING, "queue", f"the NOTIFY queue of the server is {percent} % full",
                    reason, f"{pipeline.JSL} verify")  # fmt: skip
    if problem := state["resting_problem"]:
        yield Alarm(JOBS, "resting", problem)
    if problem := state["heartbeat_problem"]:
        yield Alarm(JOBS, "heartbeats", problem)


def of_stage(row: dict[str, Any], at: datetime) -> Iterator[Alarm]:
    """What concerns one stage, or jobs of it; `at` is now."""
    stage = row["stage"]
    if row["position"] is None and row["owed"]:
        why = "wait 5 min: until then, listeners give such calls to a renamed stage"
        mend = f"{pipeline.JSL} cancel --stage {pipeline.in_shell(stage)}"
        if stage in pipeline.stage_names():
            why, mend = "this program's PIPELINE has it", f"{INSTALL}, {IF_NEWER}"
        owed = f"{counted(row['owed'], 'call')} owed to no stage of PIPELINE"
        yield Alarm(STAGE, "route", owed, why, mend, stage)
    if hold := waits.held(SimpleNamespace(**row)):
        reason = f"{readable(row['held_reason'])}; {counted(row['owed'], 'call')} owed"
        kind, urgency = ("paused", INTENDED) if row["paused"] else ("held", STAGE)
        what = f"paused by {row['held_by']}"
        if not row["paused"]:
            left = duration(max(0.0, (row["held_until"] - at).total_seconds()))
            what = f"held for {left} more by {row['held_by']}"
        yield Alarm(urgency, kind, what, reason, hold.mend, stage)
    elif row["position"] is not None and row["due"] and row["oldest_due_seconds"] > LATE:
        what = f"a call has been due for {duration(row['oldest_due_seconds'])}"
        mend = f"{pipeline.JSL} jobs --stage {stage}"
        yield Alarm(STAGE, "late", what, why_late(row), mend, stage)
    rows = called(row["tables"])
    if row["failed"]:
        what = f"{counted(row['failed'], rows)} set failed by the stage"
        mend = f"{pipeline.JSL} jobs --failed --stage {stage}"
        yield Alarm(JOBS, "failed", what, readable(row["failed_reason"]), mend, stage)
    if row["given_up"]:
        what = f"{counted(row['given_up'], 'call')} given up"
        # Not of a stage that left PIPELINE: nobody calls it.
        is_retried = row["position"] is not None and may_be_retried(row["last_error"])
        retry = f"{pipeline.JSL} retry --stage {stage}" if is_retried else None
        yield Alarm(JOBS, "given_up", what, readable(row["last_error"]), retry, stage)
    if row["stalled"]:
        what = f"{counted(row['stalled'], rows)} stalled"
        text = readable(row["stalled_reason"]) or ""
        reason, _, command = text.partition(f": {pipeline.JSL} ")
        mend = f"{pipeline.JSL} {command or f'jobs --stalled --stage {stage}'}"
        yield Alarm(JOBS, "stalled", what, reason, mend, stage)


def called(tables: Iterable[str]) -> str:
    """What a row of `tables` is called."""
    return "job" if {*tables} == {pipeline.JOBS.name} else "row"


def why_late(row: dict[str, Any]) -> str:
    """Why a call that is due is not made, as far as its stage tells."""
    if row["max_running"] and row["calling"] >= row["max_running"]:
        return f"the stage is at its limit of {counted(row['max_running'], 'call')} at once"
    if row["next_at"]:
        return f"the stage is at its rate of {rate(row['per_minute'])}"
    if row["retry_error"]:
        return f"last error: {readable(row['retry_error'])}"
    if not row["due"]:
        return "it is put off by listeners whose PIPELINE does not lead to it"
    return f"{counted(row['due'], 'call')} due, {row['calling']} under way"
