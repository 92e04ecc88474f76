"""The one exception of the operator's commands."""

from pipeline import JSL

# What mends most of them.
INSTALL = f"run `make trigger` ({JSL} install)"
GRANTS = "see 'Roles and grants' in docs/INSTALLING.md"


class Problem(Exception):
    """Something a person has to mend; the message says what, and which command to run."""
