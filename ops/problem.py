"""The one exception of the operator's commands, and how they quote those of the driver."""

from pipeline import JSL

# The command that solves most of these problems.
INSTALL = f"run `make trigger` ({JSL} install)"
# Follows INSTALL where PIPELINE is not that of the database: which one is newer is not known.
IF_NEWER = "if this PIPELINE is the newer one"
GRANTS = "see 'Roles and grants' in docs/INSTALLING.md"


class Problem(Exception):
    """Something that a person has to solve; the message says what and which command to run."""


def first_line(error: Exception) -> str:
    """What a driver's error says, without the statement that it quotes."""
    return str(error).strip().split("\n")[0]
