"""The records of a run: moves of jobs, calls owed, claims, rows of stage_attempts, POSTs, faults.
They are written to JSON and read back without loss.

Times are seconds since the epoch on the one clock of the machine: the database's commit
timestamps, from which audit.py takes the steps of its clock, and time.time() in this process.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

TAKEN = 202  # the status of asynchronous stages; no other stage answers it


def pid_of(listener: str) -> int:
    """The process of a listener; its name is host-pid-random."""
    return int(listener.split("-")[-2])


@dataclass(frozen=True)
class Move:
    """A job's state after one transaction, or a variant's; no step where it was deleted.

    parent: the job of a variant. priority, run_after: of the row, where its table declares them.
    """

    job: str
    tx: int
    at: float  # when that transaction committed
    step: str | None
    status: str | None
    parent: str | None = None
    priority: int = 0
    run_after: float | None = None


@dataclass(frozen=True)
class Debt:
    """A call that the database trigger recorded, in the job's transaction."""

    job: str
    call: int
    stage: str
    tx: int


@dataclass(frozen=True)
class Join:
    """A call that a listener recorded for a job whose variants are all in place.

    looked: when the listener's transaction began; at: when it committed.
    """

    job: str
    call: int
    stage: str
    looked: float
    at: float


@dataclass(frozen=True)
class Gone:
    """A call was deleted from stage_calls."""

    job: str
    call: int
    tx: int


@dataclass(frozen=True)
class Claim:
    """A listener claimed attempt `attempt` of a call until `until`.

    released: when the claim was settled or given back; None: the job had moved on, or the next
    claim took it over.
    """

    job: str
    call: int
    attempt: int
    worker: str
    at: float
    until: float
    released: float | None = None


@dataclass(frozen=True)
class Lease:
    """A row of stage_leases.

    claimed: the time of its claim. began: when the claim was committed. ended: when the row was
    deleted; None: it still exists.
    """

    job: str
    tenant: str | None
    call: int
    attempt: int
    stage: str
    claimed: float
    began: float
    until: float
    ended: float | None


@dataclass(frozen=True)
class Limit:
    """A row of stage_limits: of a stage, or of a pool.

    stages: the stages whose calls count. most: calls at once. seconds: between two calls. linger:
    seconds that a pool stays with a stage. is_fair: tenants take turns. per_tenant: calls of one
    tenant at once.
    """

    name: str
    stages: list[str]
    most: int | None = None
    seconds: float | None = None
    linger: float | None = None
    is_fair: bool = False
    per_tenant: int | None = None


@dataclass(frozen=True)
class Hold:
    """From `at` on nobody was to call a stage until then; a success may have lifted it before."""

    stage: str
    at: float
    until: float


@dataclass(frozen=True)
class Effect:
    """The row that a stage has written for the request with this key."""

    key: str
    job: str


@dataclass(frozen=True)
class Row:
    """A row of stage_attempts."""

    job: str
    call: int
    attempt: int
    stage: str
    worker: str
    started: float
    finished: float
    http: int | None
    outcome: str
    error: str | None


@dataclass(frozen=True)
class Post:
    """A request as the stage API saw it.

    sent: whether the whole answer was written. status: None without an answer. job: None where the
    body did not arrive.
    """

    job: str | None
    stage: str
    slot: int
    key: str
    attempt: int
    arrived: float
    finished: float
    status: int | None
    sent: bool
    behaviour: str

    @property
    def accepted(self) -> bool:
        is_success = self.status is not None and 200 <= self.status < 300
        return self.sent and is_success and self.status != TAKEN

    @property
    def taken(self) -> bool:
        """Whether the stage answered 202 and then works."""
        return self.sent and self.status == TAKEN


@dataclass(frozen=True)
class Fault:
    """A fault of the nemesis. slots: the listeners it hit; pids: their processes, if not all.

    reach: what was broken for them: "worker", "listener", "database" or "stage". The values "clock"
        and "nothing" excuse no repeat.
    locked: from when to when it held or waited for the lock of a table, with everybody behind it.
    lost: from when to when transactions were committed that no longer exist.
    """

    kind: str
    reach: str
    began: float
    ended: float
    slots: list[int]
    pids: list[int] = field(default_factory=list)
    locked: list[tuple[float, float]] = field(default_factory=list)
    lost: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Exit:
    """A listener process ended. asked: after SIGTERM. ready: it had logged its name."""

    slot: int
    pid: int
    started: float
    at: float
    code: int
    asked: bool
    ready: bool


@dataclass(frozen=True)
class Listening:
    """A listener logged that it listens."""

    slot: int
    at: float


@dataclass
class History:
    """Everything about one run.

    timeout, lease: seconds that a call may take, and that it is nobody else's, as the listeners
    were told. routes: stage by "step/status"; joined: likewise, once all variants of a job are
    there. listeners: slot by name. rolled_back: jobs and variants whose call the application may
    have locked in a transaction that left no trace. owed: calls that were left at the end. orphans:
    results that a worker wrote, as its listener was gone. mischief: what a stage function was to
    do, by "job/stage/attempt".
    """

    seed: int
    began: float
    calm: float
    ended: float
    timeout: float
    lease: float
    routes: dict[str, str]
    joined: dict[str, str] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    rolled_back: list[str] = field(default_factory=list)
    owed: int = 0
    orphans: int = 0
    moves: list[Move] = field(default_factory=list)
    debts: list[Debt] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    gone: list[Gone] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    listening: list[Listening] = field(default_factory=list)
    listeners: dict[str, int] = field(default_factory=dict)
    mischief: dict[str, str] = field(default_factory=dict)
    bugs: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=0))


# By the names of the fields that hold a list of them.
RECORDS: dict[str, type] = {
    name: kind
    for name, hint in get_type_hints(History).items()
    for kind in get_args(hint)
    if is_dataclass(kind)
}


def read(path: Path) -> History:
    """Raises ValueError where the file holds no history."""
    try:
        said = json.loads(path.read_text())
        records = {name: [kind(**one) for one in said[name]] for name, kind in RECORDS.items()}
        names = {known.name for known in fields(History)}
        return History(**{name: said[name] for name in names} | records)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no history of a chaos run: {error!r}") from None
