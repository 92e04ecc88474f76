"""Imported before anything else: one line and exit 2 where Python is too old or a package missing.

Python 3.8 must be able to read this file and those that import it.
"""

import importlib
import os
import sys

NEEDED = ("click", "dotenv", "psycopg2", "requests")
OLDEST = (3, 10)
HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")


def require(names, what_to_run):
    """Import these modules, or end the program with what to run."""
    if sys.version_info < OLDEST:
        found, needed = (".".join(map(str, v[:2])) for v in (sys.version_info, OLDEST))
        stop(f"this is Python {found}, and {needed} or newer is needed", what_to_run)
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            stop(str(error), what_to_run)


def stop(why, what_to_run):
    sys.stderr.write(f"error: {why}: {what_to_run()}\n")
    sys.exit(2)


def set_up():
    if os.access(os.path.join(VENV, "bin", "python"), os.X_OK) and not is_ours():
        jsl = os.path.relpath(os.path.join(HERE, "jsl"))
        jsl = jsl if os.sep in jsl else os.path.join(".", jsl)
        return (
            f"the packages are in .venv, so type {jsl} instead of python listener.py, "
            "or .venv/bin/python instead of python"
        )
    python = "python3" if sys.version_info >= OLDEST else "python3.10"
    by_hand = f"{python} -m venv --clear .venv && .venv/bin/pip install -r requirements.txt"
    return f"run `make setup`, or `{by_hand}`, in {HERE}; then ./jsl"


def is_ours():
    """Whether this is the Python of .venv."""
    return os.path.realpath(sys.prefix) == os.path.realpath(VENV)


require(NEEDED, set_up)
