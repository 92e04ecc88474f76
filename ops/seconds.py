"""A number of seconds on the command line."""

import math

import click

YEAR = 365 * 86400


class Seconds(click.FloatRange):
    """From `shortest` to a year, as time.sleep() refuses much more. Unlike FloatRange, not nan."""

    name = "number of seconds"

    def __init__(self, shortest: float):
        super().__init__(min=shortest, max=YEAR)

    def convert(self, value, param, context) -> float:
        seconds = super().convert(value, param, context)
        if math.isnan(seconds):
            self.fail(f"nan is not a valid {self.name}.", param, context)
        return seconds
