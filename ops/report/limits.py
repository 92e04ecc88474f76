"""What the stages declare: limits, and the pools that they share."""

from typing import Any

from ops.report.data import Report
from ops.report.markup import Markup, section, stage_name, table


def limits(report: Report) -> Markup:
    rows = [
        [stage_name(row.stage), row.max_running, row.pool,
         row.per_minute and f"{row.per_minute:g}", row.per_tenant, ", ".join(besides(row)) or None]
        for row in report.limits
    ]  # fmt: skip
    rows = [row for row in rows if any(row[1:])]
    header = ["~Stage", "#At once", "Pool", "#A minute", "#Of a tenant", "*Besides"]
    about = "What the stages declare: calls at once, begun in a minute, and at once of one tenant."
    return section("limits", "Limits", table(header, rows, about)) if rows else Markup("")


def besides(row: Any) -> list[str]:
    """What a stage declares that is no number, and how many of its calls are planned for later."""
    return [
        *(["asynchronous"] if row.asynchronous else []),
        *(["tenants take turns"] if row.fair else []),
        *(["highest priority first"] if row.by_priority else []),
        *([f"{row.planned:,} planned by run_after"] if row.planned else []),
    ]


def pools(report: Report) -> Markup:
    rows = [
        [row.name, f"{row.calling} of {row.size}", ", ".join(dict.fromkeys(row.stages)),
         row.stays_with]
        for row in report.pools
    ]  # fmt: skip
    header = ["Pool", "#Calls", "Stages that are called", "Stays with"]
    about = "What several stages share; with linger, the stage that it stays with."
    return section("pools", "Pools", table(header, rows, about)) if rows else Markup("")
