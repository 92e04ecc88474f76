"""A text on the command line that must not be empty."""

import click


class Text(click.ParamType):
    """Refuses what `--error "$TEXT"` is where TEXT is not set: it would be in every error."""

    name = "text"

    def convert(self, value: str, param, context) -> str:
        if not value:
            self.fail("it is empty.", param, context)
        return value
