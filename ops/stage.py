"""The name of a stage on the command line."""

import difflib

import click
from click.shell_completion import CompletionItem

import pipeline


class StageName(click.ParamType):
    """A stage of PIPELINE, which is read only when a name is given."""

    name = "stage"

    def names(self) -> list[str]:
        return pipeline.stage_names()

    def convert(self, value: str, param, context) -> str:
        names = self.names()
        if value in names:
            return value
        lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(value.lower(), lower, 1)
        meant = f"did you mean {lower[near[0]]}? " if near else ""
        there = f"PIPELINE has {', '.join(names) or 'none'}"
        self.fail(f"{value!r} is no {self.name}: {meant}{there}", param, context)

    def shell_complete(self, context, param, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


class OwedStage(StageName):
    """Accepts any name but a blank: a stage that left PIPELINE may still be owed calls. Once there
    is a connection, chosen.require_stage() checks the name.
    """

    def convert(self, value: str, param, context) -> str:
        return value if value.strip() else super().convert(value, param, context)
