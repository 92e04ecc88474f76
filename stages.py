"""The pipeline: which stage a state leads to, and how that stage's API is called.

To add a stage, write a function of one argument (a `Call`) that returns `call.post(...)`, give
its state a line in PIPELINE, and run `make trigger`. What it can bear stands above it:

    @limits(max_running=1, timeout=120, max_attempts=3)
    def vlm_analyze(call): ...
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import config
import db
from stage_http import Answer, StageApi


@dataclass(frozen=True)
class Limits:
    """What a stage can bear.

    Args:
        max_running: calls at once, counted over all workers and machines; None: no limit.
        timeout: seconds for a whole call; None: STAGE_TIMEOUT.
        max_attempts: then the call is given up; None: MAX_ATTEMPTS.
    """

    max_running: int | None = None
    timeout: float | None = None
    max_attempts: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} of a stage: allowed is more than 0, or None")


def limits(**given: Any) -> Callable:
    """Declare the Limits of the stage function below."""

    def declare(function: Callable) -> Callable:
        function.limits = Limits(**given)
        return function

    return declare


def vlm_analyze(call: "Call") -> Answer:
    """LLaVA Stage 1."""
    return call.post("/api/yh/llava/stage1/validate")


def yolo_detect(call: "Call") -> Answer:
    return call.post("/api/yh/yolo/detect")


def planner(call: "Call") -> Answer:
    return call.post("/api/yh/planner")


def overlay(call: "Call") -> Answer:
    return call.post("/api/yh/overlay")


def vlm_judge(call: "Call") -> Answer:
    """LLaVA Stage 2."""
    return call.post("/api/yh/llava/stage2/judge")


PIPELINE: dict[tuple[str, str], Callable[["Call"], Answer]] = {
    ("img_gen", "done"): vlm_analyze,
    ("vlm_analyze", "done"): yolo_detect,
    ("yolo_detect", "done"): planner,
    ("planner", "done"): overlay,
    ("overlay", "done"): vlm_judge,
}


def stage_names() -> list[str]:
    """The stages in the order of PIPELINE, each once."""
    return list(dict.fromkeys(function.__name__ for function in PIPELINE.values()))


def stage_limits(settings: SimpleNamespace) -> dict[str, Limits]:
    """The Limits of every stage; what it does not declare is as in `settings`."""
    declared = {f.__name__: getattr(f, "limits", Limits()) for f in PIPELINE.values()}
    return {
        stage: Limits(
            given.max_running,
            given.timeout or settings.STAGE_TIMEOUT,
            given.max_attempts or settings.MAX_ATTEMPTS,
        )
        for stage, given in declared.items()
    }


def timeouts(settings: SimpleNamespace) -> dict[str, float]:
    """Seconds for a whole call of every stage."""
    return {stage: given.timeout for stage, given in stage_limits(settings).items()}


def stage_apis(settings: SimpleNamespace) -> dict[str, StageApi]:
    """The API of every stage; those with the same base URL share one.

    Raises:
        SettingsError: a STAGE_API_URL_… names no stage.
    """
    names = {stage.upper(): stage for stage in stage_names()}
    for unknown in settings.STAGE_API_URLS.keys() - names.keys():
        allowed = " or ".join(config.STAGE_URL + name for name in names)
        raise config.SettingsError(
            f"{config.STAGE_URL}{unknown}: there is no such stage; allowed is {allowed}"
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
    """One call that a job owes: the argument of a stage function.

    The listener fills in what it claimed and sends it to a worker, which adds `api`, `settings`
    and `until`.
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
    key: str  # job_id as the database writes it
    leased_until: float  # trigger.boottime() at which others may take it over
    after_hold: bool = False  # its stage was held before
    limited: bool = False  # its stage has max_running
    api: StageApi | None = None
    settings: SimpleNamespace | None = None
    until: float = 0.0  # time.monotonic() by which the whole call must be over
    answer: Answer | None = None  # of the last POST

    def post(self, path: str, **fields: Any) -> Answer:
        """POST {"job_id", "tenant_id", **fields} to `path` of the stage API.

        Raises:
            Unreachable, Interrupted, NoAnswer: see there; a stage function lets them pass.
            TimeIsUp: the stage function used up its timeout before this; nothing was sent.
            ValueError: `path` does not begin with a slash, or a field is NaN or infinite.
        """
        if not path.startswith("/"):
            raise ValueError(f"the path of a stage begins with a slash: {path!r}")
        body = {"job_id": self.job_id, "tenant_id": self.tenant_id, **fields}
        headers = {
            # Not the id itself: a text id could smuggle a header.
            "Idempotency-Key": str(
                uuid.uuid5(uuid.NAMESPACE_OID, f"{self.job_id}/{self.stage}/{self.call_id}")
            ),
            "X-Attempt": str(self.attempt),
        }
        self.answer = None
        self.answer = self.api.post(path, body, headers, self.until)
        return self.answer

    def fetch_one(self, sql: str, **params: Any):
        """The one row that the body needs, as a named tuple; %(job_id)s and %(tenant_id)s are set.

        It is asked for on a read-only connection of its own, which is then closed.

        Raises:
            MissingValue: there is no such row, or a column of it is NULL.
            db.ConnectionLost: no database; a stage function lets it pass, and the call is due
                again without having spent an attempt.
            psycopg2.Error: the query's own fault.
        """
        given = {"job_id": self.job_id, "tenant_id": self.tenant_id, **params}
        rows = db.query(self.settings, sql, given)
        if not rows:
            raise MissingValue(f"no row for this job in: {' '.join(sql.split())}")
        missing = [name for name, value in rows[0]._asdict().items() if value is None]
        if missing:
            raise MissingValue(f"{', '.join(missing)} is NULL in: {' '.join(sql.split())}")
        return rows[0]


def claimed_call(row: Any, limits: Limits, listener: str, covered_until: float) -> Call:
    """The call of a claimed row (see calls.TAKE).

    Args:
        covered_until: trigger.boottime() at which the lease ends, but for the call's timeout.
    """
    return Call(
        job_id=row.job_id,
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
        leased_until=covered_until + limits.timeout,
        after_hold=row.after_hold,
        limited=limits.max_running is not None,
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
