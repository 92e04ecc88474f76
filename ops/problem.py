"""The one exception of the operator's commands."""

from pipeline import JSL

# The command that solves most of these problems.
INSTALL = f"run `make trigger` ({JSL} install)"
GRANTS = "see 'Roles and grants' in docs/INSTALLING.md"


class Problem(Exception):
    """Something that a person has to solve; the message says what and which command to run."""
