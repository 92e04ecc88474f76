"""The one exception of the operator's commands."""


class Problem(Exception):
    """Something a person has to mend; the message says what, and which command to run."""
