"""What a pipeline is written with: tables, states, limits, and the call that a stage function gets.

stages.py, or the module that PIPELINE_MODULE names, is written with it.
"""

import functools
import importlib
import inspect
import shlex
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, Union
from urllib.parse import quote

import psycopg2
import psycopg2.extensions
import psycopg2.extras

import config
import db
import tracing
from logs import CONTROL
from stage_http import Answer as Answer
from stage_http import Interrupted, NoAnswer, StageApi, TimeIsUp, Unreachable

# --- tables and states ---------------------------------------------------------------------

# The name of a table goes into that of its trigger function, which PostgreSQL would cut.
LONGEST_NAME = 40


@dataclass(frozen=True)
class Table:
    """A table whose rows go through stages. Called with a step and a status, it is a key of
    PIPELINE; `jobs` needs none, its keys are plain tuples.

    Args:
        name: of the table, which is in the schema of jobs and has the columns current_step and
            status.
        id: the column that identifies a row, unique by itself.
        parent: a Table, or "jobs", and the column of this table that holds the parent's id.
        channel: where changes of its rows are announced; None: nowhere.
        tenant: the column with the tenant; None: tenant_id where there is one, else the parent's.
        priority: an integer column; of the due calls of a stage the highest is called first.
        run_after: a timestamptz column; the call of a row is due at that time, not before. Both
            are read when the row comes to a state.
        trace: a column with a `traceparent`, whose trace the calls of a row and of the rows below
            it belong to; None: they belong to a trace of their own.

    Raises:
        ValueError: one of them cannot be used.
    """

    name: str
    id: str
    parent: tuple[Union["Table", str], str] | None = None
    channel: str | None = None
    tenant: str | None = None
    priority: str | None = None
    run_after: str | None = None
    trace: str | None = None

    def __post_init__(self):
        if self.name == "jobs":  # what it has anyway
            object.__setattr__(self, "channel", self.channel or db.CHANNEL)
            object.__setattr__(self, "tenant", self.tenant or "tenant_id")
        for word in ("name", "id", "channel", "tenant", "priority", "run_after", "trace"):
            value = getattr(self, word)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"Table({self.name!r}): {word}={value!r}: allowed is a name")
        if not 0 < len(self.name.encode()) <= LONGEST_NAME:
            raise ValueError(f"Table({self.name!r}): its name may have {LONGEST_NAME} bytes")
        if self.channel is not None and not 0 < len(self.channel.encode()) < 64:
            raise ValueError(f"Table({self.name!r}): channel={self.channel!r} is no channel")
        if self.parent is not None and (
            not isinstance(self.parent, tuple)
            or len(self.parent) != 2
            or not (self.parent[0] == "jobs" or isinstance(self.parent[0], Table))
        ):
            raise ValueError(
                f"Table({self.name!r}): parent={self.parent!r}: allowed is ('jobs', COLUMN) or "
                "(TABLE, COLUMN), the column being the one here that holds the parent's id"
            )

    @property
    def ids(self) -> list[str]:
        """The columns that identify a row: its own id, and its parent's."""
        return [self.id, self.parent[1]] if self.parent else [self.id]

    @property
    def parent_column(self) -> str | None:
        """The column that holds the parent's id; None where there are no parents."""
        return self.parent[1] if self.parent else None

    def __repr__(self) -> str:  # as an error names it
        return f"Table({self.name!r})"

    def __call__(self, step: str, status: str) -> "State":
        """The state of a row."""
        return State(self, step, status)

    def every(self, step: str, status: str) -> "State":
        """All rows of a parent are in this state, and it has one at least: called once for the
        parent.

        Raises:
            ValueError: the table has no parent.
        """
        if self.parent is None:
            raise ValueError(f"Table({self.name!r}).every needs a parent")
        return State(self, step, status, every=True)


@dataclass(frozen=True)
class State:
    """A key of PIPELINE: a row of `table`, or every row of a parent, is in (step, status)."""

    table: Table
    step: str
    status: str
    every: bool = False

    def __repr__(self) -> str:  # as it is written in PIPELINE
        return f"{self.table}{'.every' * self.every}({self.step!r}, {self.status!r})"


JOBS = Table("jobs", id="job_id", channel=db.CHANNEL, tenant="tenant_id")


class Route(NamedTuple):
    """A state as the database knows it: what owes a call of a stage.

    table: whose row owes it; of a join, the parent's.
    join: the name of a join; "" for a row's own state.
    """

    table: str
    join: str
    step: str
    status: str

    def __str__(self) -> str:
        if self.join:
            return f"every {self.join}"
        state = f"({self.step}, {self.status})"
        return state if self.table == JOBS.name else f"{self.table} {state}"


def route_of(key: State | tuple[str, str]) -> Route:
    """A key of PIPELINE as the database knows it."""
    if not isinstance(key, State):
        return Route(JOBS.name, "", *key)
    if key.every:
        return Route(owner(key).name, join_name(key), key.step, key.status)
    return Route(key.table.name, "", key.step, key.status)


def owner(state: State) -> Table:
    """The table whose row owes the call: of a join, the parent's."""
    if not state.every or state.table.parent is None:
        return state.table
    parent = state.table.parent[0]
    return parent if isinstance(parent, Table) else JOBS


def join_name(state: State) -> str:
    return f"{state.table.name} ({state.step}, {state.status})"


def parent_name(table: Table) -> str | None:
    """The table of the parents; None where there are none."""
    parent = table.parent and table.parent[0]
    return parent.name if isinstance(parent, Table) else parent


# --- limits --------------------------------------------------------------------------------


LARGEST = 2**31 - 1  # of PostgreSQL's integer
LONGEST = config.TIMEOUTS[1]  # seconds
# Limits with the range of the setting that is their default.
AS_SETTINGS = (
    ("timeout", config.TIMEOUTS, (int, float)),
    ("max_attempts", config.ATTEMPTS, (int,)),
)
SLOWEST = 1e-6  # calls a minute: one in two years


def is_positive(value: Any, *kinds: type, most: float = LARGEST) -> bool:
    """Whether `value` is a number of these kinds, above 0 and at most `most`. True is none."""
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return is_number and 0 < value <= most


@dataclass(frozen=True)
class Pool:
    """Something that several stages share, such as a GPU: `@limits(pool=GPU)`.

    Args:
        name: of no stage.
        size: calls at once of all these stages together, over all listeners.
        linger: seconds for which it stays with a stage that has calls due, as that has loaded its
            model; then the next stage has its turn. None: they take turns.

    Raises:
        ValueError: one of them cannot be used.
    """

    name: str
    size: int = 1
    linger: float | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Pool({self.name!r}): allowed is a name")
        if not is_positive(self.size, int):
            allowed = f"1 to {LARGEST}"
            raise ValueError(f"Pool({self.name!r}): size={self.size!r}: allowed is {allowed}")
        if self.linger is not None and not is_positive(self.linger, int, float, most=LONGEST):
            allowed = f"up to {LONGEST} seconds"
            raise ValueError(f"Pool({self.name!r}): linger={self.linger!r}: allowed is {allowed}")


@dataclass(frozen=True)
class Limits:
    """What a stage can bear.

    Args:
        max_running: calls at once, counted over all listeners; None: no limit.
        timeout: seconds for a whole call; None: STAGE_TIMEOUT.
        max_attempts: then the call is given up; None: MAX_ATTEMPTS.
        asynchronous: 202 means that the stage has taken the call and works on it. Its worker is
            idle at once; the call keeps its place and its lease until the row moves on, to neither
            the state that owes the call nor (stage, 'running'), or until the timeout is over.
        pool: a Pool that its calls share with those of other stages.
        per_minute: calls that may begin in a minute, over all listeners, at even
            distances.
        fair: the tenants that have calls due take turns.
        per_tenant: calls at once of one tenant, over all listeners; tenants take turns.
    """

    max_running: int | None = None
    timeout: float | None = None
    max_attempts: int | None = None
    asynchronous: bool = False
    pool: Pool | None = None
    per_minute: float | None = None
    fair: bool = False
    per_tenant: int | None = None

    def __post_init__(self):
        for name in ("max_running", "per_tenant"):
            value = getattr(self, name)
            if value is not None and not is_positive(value, int):
                allowed = f"a whole number above 0, up to {LARGEST}, or None"
                raise ValueError(f"{name}={value!r} of a stage: allowed is {allowed}")
        for name, (least, most), kinds in AS_SETTINGS:
            value = getattr(self, name)
            if value is not None and not (is_positive(value, *kinds, most=most) and value >= least):
                allowed = f"a {'' if float in kinds else 'whole '}number from {least} to {most}"
                raise ValueError(f"{name}={value!r} of a stage: allowed is {allowed}, or None")
        rate = self.per_minute
        if rate is not None and not (is_positive(rate, int, float) and rate > SLOWEST):
            allowed = f"a number above {SLOWEST:f}, or None"
            raise ValueError(f"per_minute={rate!r} of a stage: allowed is {allowed}")
        for name in ("asynchronous", "fair"):
            if not isinstance(getattr(self, name), bool):
                given = getattr(self, name)
                raise ValueError(f"{name}={given!r} of a stage: allowed is True or False")
        if self.pool is not None and not isinstance(self.pool, Pool):
            raise ValueError(f"pool={self.pool!r}: a stage has one Pool, or None")

    @property
    def is_limited(self) -> bool:
        """Whether calls of other listeners count."""
        return any((self.max_running, self.pool, self.per_minute, self.is_fair))

    @property
    def is_fair(self) -> bool:
        """Whether tenants take turns."""
        return self.fair or self.per_tenant is not None

    @property
    def is_ordered(self) -> bool:
        """Whether a claim must know which calls began before it, and when."""
        return bool(self.per_minute or self.is_fair or (self.pool and self.pool.linger))


@dataclass(frozen=True)
class FullLimits(Limits):
    """Limits where what is not declared is as in the settings."""

    timeout: float = 600
    max_attempts: int = 1
    lease: float = 630  # seconds for which nobody else may take a call that was claimed


Function = TypeVar("Function", bound=Callable)


def limits(
    *,
    max_running: int | None = None,
    timeout: float | None = None,
    max_attempts: int | None = None,
    asynchronous: bool = False,
    pool: Pool | None = None,
    per_minute: float | None = None,
    fair: bool = False,
    per_tenant: int | None = None,
) -> Callable[[Function], Function]:
    """Declare the Limits of the stage function below.

    Raises:
        ValueError: one of them cannot be used, or the function has some already.
    """
    declared = Limits(max_running, timeout, max_attempts, asynchronous, pool, per_minute, fair,
                      per_tenant)  # fmt: skip

    def declare(function: Function) -> Function:
        if hasattr(function, "limits"):
            raise ValueError(f"{function.__name__} has two @limits: give all of them in one")
        function.limits = declared  # type: ignore[attr-defined]  # a function may have any
        return function

    return declare


# --- the pipeline in use -------------------------------------------------------------------


@functools.cache
def module():
    """The module with PIPELINE, which PIPELINE_MODULE names.

    Raises:
        SettingsError: there is none, or it cannot be used.
    """
    name = config.settings().PIPELINE_MODULE
    try:
        found = importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise config.SettingsError(
                f"PIPELINE_MODULE={name}: there is no such module; allowed is one that Python finds"
                " beside listener.py, such as stages"
            ) from None
        raise config.SettingsError(
            f"{name} cannot be imported: {type(error).__name__}: {error}{line_in(name, error)}"
        ) from error
    if not hasattr(found, "PIPELINE"):
        raise config.SettingsError(f"PIPELINE_MODULE={name}: it has no PIPELINE")
    try:
        check(found.PIPELINE)
    except ValueError as error:
        raise config.SettingsError(f"PIPELINE of {name}: {error}") from None
    return found


def line_in(name: str, error: Exception) -> str:
    """Where module `name` has raised `error`: its file and line, in brackets; "" where it was not
    run. A SyntaxError says it itself.
    """
    lines = [f" ({Path(frame.f_code.co_filename).name}, line {line})"
             for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_globals.get("__name__") == name]  # fmt: skip
    return lines[-1] if lines else ""


def file() -> str:
    """The file of that module, as seen from listener.py."""
    return module().__name__.replace(".", "/") + ".py"


def check(pipeline: Any) -> None:
    """Raises ValueError where `pipeline` is no PIPELINE."""
    if not isinstance(pipeline, dict) or not pipeline:
        empty = ", and it is empty" if pipeline == {} else ""
        raise ValueError(f"it must be a dict of states and stage functions{empty}")
    declared: dict[str, Table] = {}
    found: set[Route] = set()
    for key, function in pipeline.items():
        if not callable(function) or not hasattr(function, "__name__"):
            kind = type(function).__name__
            raise ValueError(f"{key!r}: allowed is a function (`def`), not a value of type {kind}")
        check_function(function)
        state = (key.step, key.status) if isinstance(key, State) else key
        words = state if isinstance(state, tuple) else ()
        if len(words) != 2 or not all(isinstance(word, str) and word for word in words):
            raise ValueError(
                f"{key!r} is no state: allowed is (STEP, STATUS) or TABLE(STEP, STATUS)"
            )
        for table in chain_of(key):
            if declared.setdefault(table.name, table) != table:
                raise ValueError(f"table {table.name} is declared in two ways")
            if table.name == JOBS.name and table.parent:
                raise ValueError("table jobs cannot have a parent")
            if table.name == JOBS.name and table.id != JOBS.id:
                raise ValueError(f"table jobs: id={table.id!r}: allowed is {JOBS.id!r}")
        if (route := route_of(key)) in found:
            raise ValueError(f"{route} is there twice: with a Table, and as a plain tuple")
        found.add(route)
    check_names(pipeline)
    check_pools(pipeline)


def check_function(function: Callable) -> None:
    """Raises ValueError where it cannot be a stage function."""
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"{name}: allowed is `def`, not `async def`")
    if inspect.isgeneratorfunction(function):
        raise ValueError(f"{name}: a stage function returns its answer, and does not `yield`")
    try:
        inspect.signature(function, follow_wrapped=False).bind(None)
    except TypeError:
        raise ValueError(f"{name}: a stage function takes one argument, the call") from None


def check_names(pipeline: dict[Any, Callable]) -> None:
    """Raises ValueError where two stages cannot be told apart by their names."""
    functions: dict[tuple[str, str], Callable] = {}
    names: dict[str, str] = {}
    for key, function in pipeline.items():
        name, table = function.__name__, route_of(key).table
        function = inspect.unwrap(function)  # it may have been decorated for each of its states
        if functions.setdefault((table, name), function) != function:
            hint = "a decorator keeps it with functools.wraps"
            raise ValueError(f"two functions of {table} are called {name}: a stage needs a name of"
                             f" its own ({hint})")  # fmt: skip
        if (other := names.setdefault(name.upper(), name)) != name:
            both = config.STAGE_URL + name.upper()
            raise ValueError(f"{other} and {name} differ by case alone: {both} would be of both")


def check_pools(pipeline: dict[Any, Callable]) -> None:
    """Raises ValueError where two limits would have one name."""
    functions: dict[str, Callable] = {}
    pools: dict[str, Pool] = {}
    for function in pipeline.values():
        declared = limits_of(functions.setdefault(function.__name__, function))
        if limits_of(function) != declared:
            raise ValueError(f"the limits of {function.__name__} are declared in two ways")
        pool = declared.pool
        if pool and pools.setdefault(pool.name, pool) != pool:
            raise ValueError(f"Pool({pool.name!r}) is declared in two ways")
    for name in pools.keys() & functions.keys():
        raise ValueError(f"Pool({name!r}) has the name of a stage")


def chain_of(key: Any) -> list[Table]:
    """The table of a key, its parent, and so on; none for a plain tuple."""
    found: list[Table] = []
    table: Any = key.table if isinstance(key, State) else None
    while isinstance(table, Table):
        found.append(table)
        table = table.parent and table.parent[0]
    return found


def pipeline() -> dict[Any, Callable]:
    """PIPELINE of the module in use."""
    return module().PIPELINE


def routes() -> dict[Route, Callable]:
    """Which stage function follows from what."""
    return {route_of(key): function for key, function in pipeline().items()}


def tables() -> dict[str, Table]:
    """The tables whose rows go through stages, by name; always with jobs, and that first."""
    found = {JOBS.name: JOBS}
    for key in pipeline():
        found |= {table.name: table for table in reversed(chain_of(key))}
    return found


def joins() -> dict[str, State]:
    """The joins by name."""
    keys = (key for key in pipeline() if isinstance(key, State) and key.every)
    return {join_name(key): key for key in keys}


def stage_names() -> list[str]:
    """The stages in the order of PIPELINE, each once."""
    return list(dict.fromkeys(function.__name__ for function in pipeline().values()))


def limits_of(function: Callable) -> Limits:
    """What its stage can bear, as far as it is declared."""
    return getattr(function, "limits", Limits())


@dataclass(frozen=True)
class SharedLimit:
    """A row of stage_limits: what counts over all listeners."""

    name: str
    stages: list[str]
    max_running: int | None
    seconds: float | None  # between two calls
    linger: float | None = None
    is_fair: bool = False
    per_tenant: int | None = None


def shared_limits() -> list[SharedLimit]:
    """The limits that count over all listeners: of each stage, and of each pool."""
    stages = {function.__name__: limits_of(function) for function in pipeline().values()}
    found = [
        SharedLimit(name, [name], of.max_running, of.per_minute and 60 / of.per_minute,
                    is_fair=of.is_fair, per_tenant=of.per_tenant)
        for name, of in stages.items()
        if of.max_running or of.per_minute or of.is_fair
    ]  # fmt: skip
    for pool in pools().values():
        members = sorted(name for name, of in stages.items() if of.pool == pool)
        found.append(SharedLimit(pool.name, members, pool.size, None, pool.linger))
    return found


def pools() -> dict[str, Pool]:
    """The pools by name."""
    found = (limits_of(function).pool for function in pipeline().values())
    return {pool.name: pool for pool in found if pool}


def pool_name(function: Callable) -> str | None:
    pool = limits_of(function).pool
    return pool.name if pool else None


def is_ordered() -> bool:
    """Whether calls may be made in another order than that in which they are due, or at a rate."""
    return any(limits_of(function).is_ordered for function in pipeline().values()) or any(
        table.priority or table.run_after for table in tables().values()
    )


def asynchronous_stages() -> set[str]:
    """The names of the stages that are asynchronous."""
    return {f.__name__ for f in pipeline().values() if limits_of(f).asynchronous}


def is_asynchronous() -> bool:
    """Whether any stage is."""
    return bool(asynchronous_stages())


def stages_of_routes() -> dict[Route, tuple[str, int | None]]:
    """What leads where, and how many of it may run at once."""
    return {route: (f.__name__, limits_of(f).max_running) for route, f in routes().items()}


# --- what a person types -------------------------------------------------------------------

# How this program is started by hand in its folder, also in the container: with the packages of
# .venv, whether that is activated or not.
JSL = "./jsl"


def typed(command: str, table: str, key: str, *options: str, with_table: bool | None = None) -> str:
    """The command line that does `command` to a row.

    Args:
        with_table: name the table; None: where there are several, as the id may be in each.
    """
    if with_table is None:
        with_table = len({*tables(), table}) > 1
    named = ["--table", table] if with_table else []
    dashes = ["--"] if key.startswith("--") else []
    words = [command, *named, *options, *dashes, key]
    return " ".join([JSL, *map(in_shell, words)])


def in_shell(word: str) -> str:
    """`word` in the quotes that it needs. Control characters are escaped when a line is printed, so
    a word with one is written as $'…', which bash and zsh read.
    """
    if word == word.translate(CONTROL):
        return shlex.quote(word)
    quoted = escaped(word).replace("'", "\\'")
    return f"$'{quoted}'"


def in_sql(value: str) -> str:
    """The same for SQL."""
    quoted = value.replace("'", "''")
    return f"'{quoted}'" if value == value.translate(CONTROL) else f"E'{escaped(quoted)}'"


def escaped(text: str) -> str:
    """`text` with backslashes doubled and control characters as bytes: \\x0a."""
    as_bytes = {code: "".join(f"\\x{byte:02x}" for byte in chr(code).encode()) for code in CONTROL}
    return text.replace("\\", "\\\\").translate(as_bytes)


def name_in_sql(name: str) -> str:
    """`name` in quotes, as it may be a reserved word; the names of our own JOBS are none."""
    return name if name in (JOBS.name, JOBS.id) else '"' + name.replace('"', '""') + '"'


# For a person, who sees what it does. Typed again, or after the row has moved on, it does nothing.
SEND_BACK = "UPDATE {table} SET current_step = {step}, status = {status} WHERE {id} = {key}"
ONLY_AT = " AND (current_step, status) = ({at_step}, {at_status})"


def sent_back(table: str, key: str, stage: str, at: tuple[str | None, str | None]) -> str:
    """The SQL that brings a row back from the state that it is `at` to that from which `stage` is
    called; the rows of a join stay in theirs, so there it is the command that records its call
    again.
    """
    for route, function in routes().items():
        if function.__name__ == stage and route.table == table and not route.join:
            words = {"step": route.step, "status": route.status, "key": key,
                     "at_step": at[0] or "", "at_status": at[1] or ""}  # fmt: skip
            values = {name: in_sql(word) for name, word in words.items()}
            id_ = name_in_sql(tables()[table].id)
            sql = SEND_BACK + ONLY_AT * (None not in at)
            return sql.format(table=name_in_sql(table), id=id_, **values)
    return typed("again", table, key, "--stage", stage)


def full_limits(settings: SimpleNamespace) -> dict[str, FullLimits]:
    """The Limits of every stage; what it does not declare is as in `settings`."""
    found = {}
    for function in pipeline().values():
        given = limits_of(function)
        timeout = given.timeout or settings.STAGE_TIMEOUT
        full = {"timeout": timeout, "lease": timeout + settings.LEASE_MARGIN,
                "max_attempts": given.max_attempts or settings.MAX_ATTEMPTS}  # fmt: skip
        found[function.__name__] = FullLimits(**vars(given) | full)
    return found


def timeouts(settings: SimpleNamespace) -> dict[str, float]:
    """Seconds for a whole call of every stage."""
    return {stage: given.timeout for stage, given in full_limits(settings).items()}


def stage_apis(settings: SimpleNamespace) -> dict[str, StageApi]:
    """The API of every stage; those with the same base URL share one.

    Raises:
        SettingsError: a STAGE_API_URL_… names no stage.
    """
    names = {stage.upper(): stage for stage in stage_names()}
    for unknown in settings.STAGE_API_URLS.keys() - names.keys():
        allowed = " or ".join(config.STAGE_URL + name for name in names)
        where = settings.READ_FROM.get(config.STAGE_URL + unknown, "the settings")
        raise config.SettingsError(
            f"{config.STAGE_URL}{unknown}: {file()} has no such stage: remove it from {where}, or "
            f"rename it; allowed is {allowed}"
        )
    urls = {
        stage: settings.STAGE_API_URLS.get(name, settings.STAGE_API_URL)
        for name, stage in names.items()
    }
    apis = {url: StageApi(settings, url) for url in urls.values()}
    return {stage: apis[url] for stage, url in urls.items()}


# --- what a stage function works with ------------------------------------------------------


@dataclass
class Call:
    """One call that a row owes: the argument of a stage function.

    The listener fills in what it claimed and sends it to a worker, which adds `api`, `settings`
    and `until`. `job_id` is the row's id, or its parent's where the row has one; `ids` are both,
    by the names of their columns.
    """

    job_id: Any
    tenant_id: Any
    current_step: str
    status: str
    stage: str
    call_id: int
    attempt: int
    spent: int  # attempts that count towards max_attempts, this one included
    max_attempts: int
    timeout: float  # seconds for the whole call
    started_at: str  # the database's time of the claim
    listener: str  # who claimed it
    key: str  # the row's id as the database writes it
    leased_until: float  # trigger.boottime() at which others may take it over
    table: str = JOBS.name
    join: str = ""
    ids: dict[str, Any] = field(default_factory=dict)
    after_hold: bool = False  # its stage was held before
    limited: bool = False  # its stage has limits over all listeners
    asynchronous: bool = False  # 202 means that its stage works on it
    target: int | None = None  # which of db.targets() the listener works on
    recorded_at: float | None = None  # seconds since 1970
    # The worker's own, with passwords and tokens: print(call) must not show them.
    api: StageApi = field(default=None, repr=False)  # type: ignore[assignment]
    settings: SimpleNamespace = field(default=None, repr=False)  # type: ignore[assignment]
    until: float = 0.0  # time.monotonic() by which the whole call must be over
    # Of the last POST; where that was not sent, of the one before, unless that was accepted.
    answer: Answer | None = None
    # Why the call counts as unanswered: the error of the last POST, or of an earlier one that may
    # still run, as after a 502; see no_answer.
    unanswered: BaseException | None = None
    # Two bytes shared with the listener: the status of the last POST.
    shared_status: Any = field(default=None, repr=False)

    def __post_init__(self):
        self.ids = self.ids or {JOBS.id: self.job_id}

    @property
    def route(self) -> Route:
        return Route(self.table, self.join, self.current_step, self.status)

    def post(self, path: str, /, **fields: Any) -> Answer:
        """POST {"job_id", "tenant_id", **fields} to `path` of the stage API.

        Where the row of another table owes the call, its own id comes first, under the name of
        its column.

        Raises:
            Unreachable, Interrupted, NoAnswer: see there; a stage function lets them pass.
            TimeIsUp: the stage function used up its timeout before this; nothing was sent.
            ValueError: `path` does not begin with a slash, or a field is NaN or infinite.
            TypeError: a field is of a type, such as bytes, set or a generator, for which JSON has
                nothing, and which has no text of its own.
        """
        if not path.startswith("/"):
            raise ValueError(f"the path of a stage begins with a slash: {path!r}")
        body = {**self.ids, "tenant_id": self.tenant_id, **fields}
        headers = {
            # Not the id itself: a text id could smuggle a header.
            "Idempotency-Key": str(
                uuid.uuid5(uuid.NAMESPACE_OID, f"{self.key}/{self.stage}/{self.call_id}")
            ),
            "X-Attempt": str(self.attempt),
            "traceparent": self.traceparent,
        }
        before, self.answer = self.answer, None
        if before is not None and before.may_run:
            self.unanswered = NoAnswer(before.error, before.status)
        self.tell_listener(0)
        try:
            self.answer = self.api.post(path, body, headers, self.until)
        except (Unreachable, TimeIsUp, TypeError, ValueError) as error:
            # Nothing was sent, so the outcome of the previous POST counts; but an accepted one does
            # not, as the stage function needs both.
            if before is not None and before.status >= 300:
                self.answer = before
            elif isinstance(error, Unreachable):
                self.unanswered = self.unanswered or error
            raise
        except Interrupted as error:
            self.unanswered = self.no_answer or error
            raise
        except BaseException as error:  # also of a signal handler, while it waits
            is_known = isinstance(error, NoAnswer)
            self.unanswered = error if is_known else NoAnswer(f"{type(error).__name__}: {error}")
            raise
        self.unanswered = None if self.answer.status < 300 else self.no_answer
        self.tell_listener(self.answer.status)
        return self.answer

    @property
    def no_answer(self) -> NoAnswer | None:
        """Of a POST that may still run, as no later one was accepted; None: there is none."""
        return self.unanswered if isinstance(self.unanswered, NoAnswer) else None

    def tell_listener(self, status: int) -> None:
        """Let the listener know the answer, should this process not live to return it."""
        if self.shared_status is not None:
            self.shared_status[:2] = status.to_bytes(2, "big")

    @property
    def traceparent(self) -> str:
        """The header by which the stage API's spans become children of this attempt's; for a
        stage function that sends a request of its own.
        """
        parent_key = None if self.job_id is None else str(self.job_id)
        trace = trace_of(self.table, self.key, parent_key, self.look_up)
        return trace.traceparent(tracing.span_id(self.key, self.call_id, self.attempt))

    def look_up(self, sql: str, params: dict[str, Any]) -> list:
        """As `query`, for data that a call can do without."""
        try:
            return db.query(self.settings, sql, params, self.target)
        except psycopg2.Error:
            return []

    def fetch_one(self, sql: str, **params: Any):
        """The one row that the body needs, as a named tuple; %(job_id)s and %(tenant_id)s are set,
        and the row's own id under the name of its column.

        It is asked for on a read-only connection of its own, which is then closed.

        Raises:
            MissingValue: there is no such row, or a column of it is NULL.
            db.ConnectionLost: no database; a stage function lets it pass, and the call is due
                again without having spent an attempt.
            psycopg2.Error: the query's own fault.
            ValueError: two columns have one name, or one that is a keyword of Python.
        """
        rows = self.query(sql, params)
        if not rows:
            raise MissingValue(f"no row for this job in: {' '.join(sql.split())}")
        missing = [name for name, value in rows[0]._asdict().items() if value is None]
        if missing:
            raise MissingValue(f"{', '.join(missing)} is NULL in: {' '.join(sql.split())}")
        return rows[0]

    def fetch_value(self, sql: str, **params: Any) -> Any:
        """A value that the body can do without: the first column of the first row; None where
        there is no row, or it is NULL. Asked for as `fetch_one`; its name does not matter.
        """
        rows = self.query(sql, params, psycopg2.extensions.cursor)
        return rows[0][0] if rows else None

    @property
    def values(self) -> dict[str, Any]:
        """What every query is given."""
        return {"job_id": self.job_id, **self.ids, "tenant_id": self.tenant_id}

    def query(
        self, sql: str, params: dict[str, Any], cursor: type = psycopg2.extras.NamedTupleCursor
    ) -> list:
        given = self.values | params
        return db.query(self.settings, sql, given, self.target, cursor)


VALUE = "SELECT {}::text FROM {} WHERE {} = %(key)s"
Ask = Callable[[str, dict[str, Any]], list]  # (SQL, parameters) → rows


def trace_of(name: str, key: str, parent_key: str | None, ask: Ask) -> tracing.Trace:
    """The trace of a row's calls: from its declared column, from its parent's, and so on; else made
    from the id of the row at the top.

    Args:
        name: of the row's table.
        parent_key: the id of its parent, where the table has one; None: it is not known.
        ask: gives the rows of a query; not called where no column is declared, unless the parent
            has a parent itself.
    """
    table = tables().get(name)
    if table and table.trace and (found := tracing.read(value_of(table, table.trace, key, ask))):
        return found
    above = tables().get(parent_name(table) or "") if table else None
    if above is None or parent_key is None:
        return tracing.made(name, key)
    column = above.parent_column
    next_key = value_of(above, column, parent_key, ask) if column else None
    return trace_of(above.name, parent_key, next_key, ask)


def value_of(table: Table, column: str, key: str, ask: Ask) -> str | None:
    """A column of a row as text; None where there is no such row."""
    names = [column, table.name, table.id]
    quoted = ('"' + name.replace('"', '""').replace("%", "%%") + '"' for name in names)
    rows = ask(VALUE.format(*quoted), {"key": key})
    return rows[0][0] if rows else None


def claimed_call(
    row: Any, limits: FullLimits, listener: str, leased_from: float, target: int | None = None
) -> Call:
    """The call of a claimed row (see calls.CLAIM_DUE).

    Args:
        leased_from: trigger.boottime() before the claim was sent.
        target: of the connection that claimed it; see Call.
    """
    table = tables().get(row.table_name) or Table(row.table_name, id="id")
    ids = dict(zip(table.ids, (row.job_id, row.parent_id), strict=False))
    return Call(
        job_id=row.job_id if table.parent is None else row.parent_id,
        tenant_id=row.tenant_id,
        current_step=row.current_step,
        status=row.status,
        stage=row.stage,
        call_id=row.call_id,
        attempt=row.attempt,
        spent=row.spent,
        max_attempts=limits.max_attempts,
        timeout=limits.timeout,
        started_at=row.started_at,
        listener=listener,
        key=row.key,
        leased_until=leased_from + limits.lease,
        target=target,
        recorded_at=row.recorded_at,
        table=row.table_name,
        join=row.join_of,
        ids=ids,
        after_hold=row.after_hold,
        limited=limits.is_limited,
        asynchronous=limits.asynchronous,
    )


class MissingValue(LookupError):
    """What a stage needs is not in the database."""


def quoted(value: Any) -> str:
    """`value` as one segment of a path: call.post(f"/api/jobs/{quoted(call.job_id)}/run").

    Raises:
        ValueError: it is empty, "." or "..", which no quoting keeps from changing the path.
    """
    text = str(value)
    if text in ("", ".", ".."):
        raise ValueError(f"{text!r} cannot be part of a path")
    return quote(text, safe="")
