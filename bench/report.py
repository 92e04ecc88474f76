"""Makes a Markdown report: ours against the floor and the best peer, then a table per workload."""

import statistics
from dataclasses import dataclass, field

from bench.stats import Metric

OURS, FLOOR = "ours", "floor"


@dataclass
class Table:
    """One workload in one variant: the values of each peer by metric."""

    workload: str
    title: str
    variant: str
    metrics: tuple[Metric, ...]
    kinds: dict[str, str] = field(default_factory=dict)  # peer: its kind
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # peer: metric: values
    failures: dict[str, str] = field(default_factory=dict)  # peer: why it has no or fewer values

    def add(self, peer: str, kind: str, numbers: dict[str, float]) -> None:
        self.kinds[peer] = kind
        for metric, value in numbers.items():
            self.values.setdefault(peer, {}).setdefault(metric, []).append(value)

    def medians(self, metric: Metric) -> dict[str, float]:
        found = {peer: values.get(metric.name) for peer, values in self.values.items()}
        return {peer: statistics.median(values) for peer, values in found.items() if values}

    def failed(self, peer: str) -> bool:
        """Whether it lost calls: then its figures are not to be compared with."""
        return any(self.values.get(peer, {}).get("lost", [0]))

    def best_peer(self, metric: Metric) -> str | None:
        medians = self.medians(metric)
        peers = [name for name in medians if self.kinds[name] == "peer" and not self.failed(name)]
        best = min if metric.better == "lower" else max
        return best(peers, key=medians.__getitem__, default=None)


def markdown(tables: list[Table], facts: dict[str, dict[str, str]], notes: list[str]) -> str:
    """The whole report."""
    parts = ["# Benchmark"]
    for heading, values in facts.items():
        parts.append(f"## {heading}\n\n" + "\n".join(f"- {k}: {v}" for k, v in values.items()))
    if rows := [row for table in tables for row in summary_rows(table)]:
        header = ["", "ours", "floor", "best peer", "ours / floor", "ours / best peer"]
        parts.append("## Ours against floor and best peer\n\n" + grid(header, rows))
    parts += [details(table) for table in tables]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def summary_rows(table: Table) -> list[list[str]]:
    """A row for each headline metric that ours has."""
    rows = []
    for metric in table.metrics:
        medians = table.medians(metric)
        if not metric.headline or OURS not in medians:
            continue
        ours, floor, name = medians[OURS], medians.get(FLOOR), table.best_peer(metric)
        peer = medians[name] if name else None
        variant = f" ({table.variant})" if table.variant else ""
        rows.append([
            f"{table.workload}{variant}: {metric} {'↓' if metric.better == 'lower' else '↑'}",
            number(ours, metric.digits),
            number(floor, metric.digits),
            f"{number(peer, metric.digits)} {name}" if name else "–",
            number(ours / floor if floor else None),
            number(ours / peer if peer else None),
        ])  # fmt: skip
    return rows


def details(table: Table) -> str:
    """Every peer's figures: medians, and the range of the repetitions."""
    title = table.title + (f" — {table.variant}" if table.variant else "")
    rows = [
        [
            peer + " (lost calls)" * table.failed(peer),
            *(spread(values.get(metric.name, []), metric.digits) for metric in table.metrics),
        ]
        for peer, values in table.values.items()
    ]
    text = f"## {table.workload}: {title}\n\n" + grid(["", *map(str, table.metrics)], rows)
    for peer, why in table.failures.items():
        text += f"\n\n{peer}: {' '.join(why.split())[:300]}"
    return text


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned for those who read it as text."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def spread(values: list[float], digits: int) -> str:
    """The median, and the range where there is more than one value."""
    median = number(statistics.median(values) if values else None, digits)
    if len(values) < 2:
        return median
    return f"{median} ({number(min(values), digits)}–{number(max(values), digits)})"
