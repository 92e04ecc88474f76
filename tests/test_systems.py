"""Other systems: it runs without what only Linux has, or says in one line that it does not."""

import pytest
from conftest import PROGRAM
from waiting import wait_until_idle

WITHOUT = """
import os, runpy, socket, sys, time
for module, names in {names!r}.items():
    for name in names:
        delattr(sys.modules[module], name)
sys.path.insert(0, {directory!r})
runpy.run_path({program!r}, run_name="__main__")
"""
# Names that we use and macOS does not have.
ONLY_LINUX = {
    "os": ["memfd_create", "pidfd_open", "eventfd"],
    "time": ["CLOCK_BOOTTIME"],
    "socket": ["TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL"],
}

# Run by `env`, the program starts in a new interpreter, which has nothing imported yet.
COLD = ("env",)


@pytest.fixture
def without(tmp_path):
    """without(names): a program that is listener.py on a system that has not these names."""

    def write(names: dict):
        file = tmp_path / "without.py"
        paths = {"directory": str(PROGRAM.parent), "program": str(PROGRAM)}
        file.write_text(WITHOUT.format(names=names, **paths))
        return file

    return write


def test_listener_works_without_what_only_linux_has(database, api, listener, tmp_path, without):
    process = listener(database, api=api, program=without(ONLY_LINUX), within=COLD)
    wait_until_idle(tmp_path)
    database.add_job("overlay", "done")
    database.wait_for("SELECT status = 'done' FROM jobs WHERE current_step = 'vlm_judge'")
    check = listener(database, "check", program=without(ONLY_LINUX), within=COLD)
    assert check.wait() == 0 and "1 listener alive" in check.output
    assert process.stop() == 0 and "Traceback" not in process.output


@pytest.mark.parametrize(
    ("name", "command"),
    [("waitid", "run"), *(("fork", name) for name in ("run", "check", "install", "--help"))],
)
def test_system_that_lacks_what_we_need_gets_one_line(database, listener, without, command, name):
    process = listener(database, command, program=without({"os": [name]}), within=COLD)
    assert process.wait() == 2
    [line] = process.lines
    assert line.startswith("error: this runs on Linux, and for development on macOS with Python")
