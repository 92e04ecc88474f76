"""`python listener.py` for a chaos run: python -m chaos.program run

The pipeline is that of the five stages and of the families, with limits added, and with stage
functions that misbehave as planned. CHAOS_SEED chooses the plan. CHAOS_CLOCK names a file with the
seconds by which the clock of this process is wrong.
"""

import functools
import itertools
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos import families, plan
from demo.five_stages import PIPELINE
from pipeline import Call, Pool, Table, limits
from stage_http import Answer

SEED = int(os.environ.get("CHAOS_SEED", "0"))
# The columns of both tables with the priority of a row, and its time. Every second seed has none of
# them and no rates, as calls are claimed by another statement where anything declares one.
ORDER = {"priority": "priority", "run_after": "run_after"} if SEED % 2 else {}
GPU = Pool("gpu", 5, linger=1.0 if ORDER else None)
LIMITS: dict[str, dict[str, Any]] = {
    "planner": {"max_running": 3},
    plan.ASYNCHRONOUS: {"asynchronous": True, "pool": GPU},
    "vlm_judge": {"pool": GPU},
    "ad_copy": {"max_running": 1},  # so that joins wait, and rows may leave meanwhile
}
if ORDER:
    LIMITS["vlm_analyze"] = {"per_tenant": 2, "max_running": 3}  # so that tenants wait
    LIMITS["yolo_detect"] = {"per_minute": 240}
    LIMITS["detect"] = {"fair": True, "max_running": 3}  # likewise


class Mischief(Exception):
    """Raised by a stage function as planned."""


def compute_in_c(_call: Call) -> None:
    """Block in C: no Python bytecode runs, so no signal handler and no other thread."""
    sum(itertools.repeat(1, 10**15))


def block(_call: Call) -> None:
    time.sleep(1000)


def exit_(_call: Call) -> None:
    os._exit(3)


def crash(_call: Call) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def raise_(_call: Call) -> None:
    raise Mischief("after the answer")


def fork(_call: Call) -> None:
    """Fork; the child returns from the stage function as well."""
    if child := os.fork():
        os.waitpid(child, 0)


BEFORE: dict[str, Callable[[Call], None]] = {
    "compute in C": compute_in_c,
    "block": block,
    "exit": exit_,
    "crash": crash,
}
AFTER: dict[str, Callable[[Call], None]] = {
    "post, then compute in C": compute_in_c,
    "post, then raise": raise_,
    "post, then fork": fork,
}


def mischievous(function: Callable[[Call], Answer]) -> Callable[[Call], Answer]:
    @functools.wraps(function)
    def stage(call: Call) -> Answer:
        planned = plan.mischief(SEED, call.key, call.stage, call.attempt)
        if planned in BEFORE:
            BEFORE[planned](call)
        answer = function(call)
        if planned in AFTER:
            AFTER[planned](call)
        return answer

    return limits(**LIMITS.get(function.__name__, {}))(stage)


def follow(clock: Path) -> None:
    """Set the clock of this process and its workers wrong by the seconds in the file `clock`."""
    with clock.open("rb") as file:
        wrong = mmap.mmap(file.fileno(), plan.CLOCK.size, prot=mmap.PROT_READ)
    right = time.time
    time.time = lambda: right() + plan.CLOCK.unpack(wrong)[0]
    time.time_ns = lambda: int(1e9 * time.time())


if __name__ == "__main__":
    if clock := os.environ.get("CHAOS_CLOCK"):
        follow(Path(clock))
    jobs = Table("jobs", id="job_id", **ORDER)
    routes = {jobs(*state): function for state, function in PIPELINE.items()}
    routes |= families.pipeline(ORDER)
    PIPELINE.clear()
    PIPELINE.update({state: mischievous(function) for state, function in routes.items()})
    import listener  # its options name the stages
    import ops

    ops.main(listener.cli)
