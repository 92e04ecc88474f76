"""The pipeline of `python -m chaos once`: a stage for each way to use receiver/. A job goes through
one of them. PIPELINE is for the listener, STAGES for the stage API.
"""

from pipeline import Call
from receiver import Stage
from stage_http import Answer

LATE = 1.5  # seconds after which a request is taken for lost, where no lock tells


def locked(call: Call) -> Answer:
    return call.post("/locked")


def kept(call: Call) -> Answer:
    return call.post("/kept")


def timed(call: Call) -> Answer:
    return call.post("/timed")


def kept_timed(call: Call) -> Answer:
    return call.post("/kept_timed")


def answered_first(call: Call) -> Answer:
    return call.post("/answered_first")


FUNCTIONS = [locked, kept, timed, kept_timed, answered_first]
PIPELINE = {("new", function.__name__): function for function in FUNCTIONS}
STAGES = {
    name: Stage(name, after=("new", name), running=not name.startswith("kept"))
    for name in (function.__name__ for function in FUNCTIONS)
}
ANSWERED_FIRST = "answered_first"
TIMED = ("timed", "kept_timed")
