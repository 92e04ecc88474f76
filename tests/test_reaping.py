"""Processes that were left behind become no zombies, also where the listener is process 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from waiting import until

from demo.stage_server import Answer

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture(scope="module")
def as_process_1():
    """as_process_1(script): what it prints as process 1 of a namespace of its own."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("a pid namespace needs root")

    def run(script: str) -> str:
        command = [*UNSHARE, sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    return run


# A child that leaves a grandchild behind, which ends; and a child of ours that has ended.
START = """
import os, time
from signals import reap_orphans
ours = os.fork()
if ours == 0: os._exit(7)
child = os.fork()
if child == 0:
    for _ in range(3):
        if os.fork() == 0:
            os._exit(0)
    os._exit(0)
os.waitpid(child, 0)
found = []
while len(found) < 3:
    found += reap_orphans([ours])
"""


def test_orphans_of_process_1_are_reaped(as_process_1):
    assert as_process_1(START + "print(len(found), reap_orphans([ours]))") == "3 []\n"


def test_child_that_somebody_waits_for_is_left_alone(as_process_1):
    waited = "print(os.waitstatus_to_exitcode(os.waitpid(ours, 0)[1]))"
    assert as_process_1(START + waited) == "7\n"


def test_other_processes_reap_nothing():
    script = START.replace("while len(found) < 3:", "for _ in range(3):") + "print(found)"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_listener_that_is_process_1_has_no_zombies(database, api, listener, tmp_path):
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("a pid namespace needs root")
    leave, end = tmp_path / "leave.sh", tmp_path / "end"
    os.mkfifo(end)
    leave.write_text(f"#!/bin/sh\n(read -r _ < '{end}' &)\n")
    leave.chmod(0o755)
    api.on("vlm_judge", lambda _: Answer(422))
    process = listener(database, api=api, within=UNSHARE, ALERT_COMMAND=leave)
    database.add_job("overlay", "done")
    process.wait_for_line("실행 실패")
    program = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    children = Path(f"/proc/{program}/task/{program}/children")

    def only_workers() -> bool:
        return len(children.read_text().split()) == 4

    until(lambda: not only_workers(), "the alert")
    end.open("w").close()
    until(only_workers, "no process but the workers")
