"""`listener.py` with a stage function of the test's own, for the `program` of a listener."""

from pathlib import Path
from textwrap import indent

from conftest import ROOT

from demo import five_stages

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import os, re, signal, subprocess, threading, time
import listener, ops, pipeline, workers
from demo import five_stages

@pipeline.limits(timeout={timeout})
def vlm_judge(call):
{body}

five_stages.PIPELINE["overlay", "done"] = vlm_judge
{more}
ops.main(listener.cli)
"""
# For pdb, at the body of vlm_judge.
BREAK = f"break demo/five_stages.py:{five_stages.vlm_judge.__code__.co_firstlineno + 1}"
POST = 'return call.post("/api/yh/llava/stage2/judge")'
# Blocks in C: no signal handler of Python runs, so nothing but SIGKILL ends it early.
COMPUTE = 're.match("(a+)+$", "a" * 64 + "b")'


def program(directory: Path, body: str, timeout: float | None = None, more: str = "") -> Path:
    """A script that runs the listener with this body and timeout of vlm_judge, after `more`."""
    path = directory / "with_stage_function.py"
    body = indent(body, "    ")
    path.write_text(PROGRAM.format(root=str(ROOT), body=body, timeout=timeout, more=more))
    return path
