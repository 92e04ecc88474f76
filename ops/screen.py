"""Draws a picture again and again: in place on a terminal, else one below the other."""

import os
import shutil
import signal
import sys
from collections.abc import Iterable

import click

from ops.table import Line, fitted, is_terminal

# The alternate screen, without a cursor. Lines are erased before they are written: behind a
# line that fills its row, some terminals would erase its last letter.
ENTER, LEAVE = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"
HOME, ERASE_LINE, ERASE_BELOW = "\033[H", "\033[K", "\033[J"


class Screen:
    """Where pictures are drawn, until Ctrl-C or SIGTERM ends the `with` as KeyboardInterrupt.

    However it ends, the terminal is as it was before, with the last picture on it.
    """

    def __init__(self) -> None:
        self.in_place = is_terminal() and os.environ.get("TERM") not in (None, "", "dumb")
        self.last: list[str] = []

    def __enter__(self) -> "Screen":
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def draw(self, lines: Iterable[Line]) -> None:
        before, self.last = self.last, fitted(lines)
        if not self.in_place:
            click.echo("\n".join(["", *self.last] if before else self.last))
            return
        if not before:
            signal.signal(signal.SIGTSTP, self.suspend)
            write(ENTER)
        rows = shutil.get_terminal_size().lines
        shown = self.last[:rows]
        if len(self.last) > rows:
            shown[-1] = f"… {len(self.last) - rows + 1} lines more than this terminal has"
        rest = "\n" + ERASE_BELOW if len(shown) < rows else ""
        write(HOME + "\n".join(ERASE_LINE + line for line in shown) + rest)

    def suspend(self, *_: object) -> None:
        """Ctrl-Z: give the normal screen back to the shell, stop, and draw again when continued."""
        write(LEAVE)
        os.kill(os.getpid(), signal.SIGSTOP)
        write(ENTER)

    def __exit__(self, *_: object) -> None:
        if self.in_place and self.last:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt this
            write(LEAVE)
            click.echo("\n".join(self.last), color=True)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
