"""Jobs run through all stages on this machine: a real PostgreSQL, the real listener, and a stage
API that only pretends. `make demo` or `python -m demo`; it ends and tidies up by itself.
`make demo PIPELINE=variants` or `python -m demo variants` runs a pipeline of examples/ instead.
"""

import packages  # noqa: F401 (says what to run where a package is missing)

# isort: split

import argparse
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psycopg2

import config
from demo.play import play, report_file
from demo.stage_examples import EXAMPLES
from demo.terminal import Ended, one_line, paint, signals, take_signals


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("make demo", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"a pipeline: {' or '.join(EXAMPLES)}")
    parser.add_argument("--log", action="store_true", help="show the listener's log, not a board")
    parser.add_argument("--report", metavar="FILE", help="where to write the report")
    given = parser.parse_args()
    if given.name and given.name not in EXAMPLES:
        allowed = " or ".join(EXAMPLES)
        print(f"demo: there is no pipeline {given.name}; allowed is {allowed}, or none")
        sys.exit(2)
    if given.report and not (folder := Path(given.report).absolute().parent).is_dir():
        print(f"demo: there is no directory {folder} to write a report in")
        sys.exit(2)
    return given


def main() -> int:
    given = arguments()
    take_signals()
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    failures = (Ended, config.SettingsError, psycopg2.Error, subprocess.SubprocessError)
    try:
        with ExitStack() as stack:
            play(stack, given.name, given.log, report_file(given.report))
        return 0
    except BrokenPipeError:  # the reader has ended, as with `make demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*failures, OSError, RuntimeError) as error:
        if signals:
            print(f"\nStopped by {signal.Signals(signals[0]).name}; nothing is left running.")
            return 128 + signals[0]
        print(paint(f"\n✗ {one_line(error)}", 31))
        return 1


if __name__ == "__main__":
    sys.exit(main())
