"""`python listener.py` for a chaos run: python -m chaos.program run

The pipeline is the product's own and that of the families, but for a limit, and for the mischief
that the plan has its stage functions do. CHAOS_SEED says which plan.
"""

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable

from chaos import families, plan
from demo.five_stages import PIPELINE
from pipeline import Call, limits
from stage_http import Answer

SEED = int(os.environ.get("CHAOS_SEED", "0"))
LIMITED = {"planner": 3}  # max_running


class Mischief(Exception):
    """What a stage function raises as planned."""


def compute_in_c(_call: Call) -> None:
    """No Python bytecode runs, and so no signal handler, and no other thread."""
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
    """The child comes back from the stage function as well."""
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

    return limits(max_running=LIMITED.get(function.__name__))(stage)


if __name__ == "__main__":
    PIPELINE.update(families.PIPELINE)
    PIPELINE.update({state: mischievous(function) for state, function in PIPELINE.items()})
    import listener  # its options name the stages
    import ops

    ops.main(listener.cli)
