"""`listener.py` with a stage function of the test's own, for the `program` of a listener."""

from pathlib import Path
from textwrap import indent

from conftest import ROOT

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import os, re, signal, subprocess, threading, time
import listener, ops, pipeline, stages, workers

@pipeline.limits(timeout={timeout})
def vlm_judge(call):
{body}

stages.PIPELINE["overlay", "done"] = vlm_judge
{more}
ops.main(listener.cli)
"""
POST = 'return call.post("/api/yh/llava/stage2/judge")'
# Nothing in Python ends this before its time.
COMPUTE = 're.match("(a+)+$", "a" * 64 + "b")'


def program(directory: Path, body: str, timeout: float | None = None, more: str = "") -> Path:
    """A listener whose vlm_judge has this body and this timeout; `more` is run before it starts."""
    path = directory / "with_stage_function.py"
    body = indent(body, "    ")
    path.write_text(PROGRAM.format(root=str(ROOT), body=body, timeout=timeout, more=more))
    return path
