"""A text on the command line that must not be blank."""

from pathlib import Path

import click


class Text(click.ParamType):
    """Refuses what `--error "$TEXT"` is where TEXT is not set: it would be in every error. A blank
    is in nearly every one.
    """

    name = "text"

    def convert(self, value: str, param, context) -> str:
        if not value.strip():
            self.fail("it is blank.", param, context)
        return value


class OutFile(click.Path):
    """A file to write."""

    def __init__(self):
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value, param, context):
        return super().convert(Text().convert(value, param, context), param, context)
