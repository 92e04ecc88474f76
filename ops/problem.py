"""The one exception of the operator's commands, and how they quote those of the driver."""

import re

from pipeline import JSL

# The command that solves most of these problems.
INSTALL = f"run `make trigger` ({JSL} install)"
# Follows INSTALL where PIPELINE is not that of the database: which one is newer is not known.
IF_NEWER = "if this PIPELINE is the newer one"
GRANTS = "see 'Roles and grants' in docs/INSTALLING.md"

# Names a table of ours in the server's error (in English) where row-level security hides its rows.
HIDDEN = re.compile(r'row-level security policy for table "((?:stage|pipeline)_\w+)"')


class Problem(Exception):
    """Something that a person has to solve; the message says what and which command to run."""


def first_line(error: Exception) -> str:
    """What a driver's error says, without the statement that it quotes."""
    return str(error).strip().split("\n")[0]


def mend_of(error: Exception) -> str:
    """What to do about a right that is missing."""
    hidden = HIDDEN.search(first_line(error))
    return f"ALTER TABLE {hidden[1]} DISABLE ROW LEVEL SECURITY" if hidden else GRANTS
