"""Makes a Markdown report: ours against the floor and the best peer, then a table per workload."""

from dataclasses import dataclass, field

from bench.stats import Metric, Spread, best, ratio

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

    def spread(self, peer: str, metric: Metric) -> Spread | None:
        values = self.values.get(peer, {}).get(metric.name)
        return Spread.of(values) if values else None

    def medians(self, metric: Metric) -> dict[str, float]:
        spreads = {peer: self.spread(peer, metric) for peer in self.values}
        return {peer: spread.median for peer, spread in spreads.items() if spread}

    def failed(self, peer: str) -> bool:
        """Whether it lost calls: then its figures are not to be compared with."""
        return any(self.values.get(peer, {}).get("lost", [0]))

    def best_peer(self, metric: Metric) -> str | None:
        peers = {
            name: median
            for name, median in self.medians(metric).items()
            if self.kinds[name] == "peer" and not self.failed(name)
        }
        return best(peers, metric.better)


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
        floor, peer = medians.get(FLOOR), table.best_peer(metric)
        rows.append([
            named(table, metric),
            number(medians[OURS], metric),
            number(floor, metric),
            f"{number(medians[peer], metric)} {peer}" if peer else "–",
            quotient(medians[OURS], floor),
            quotient(medians[OURS], medians[peer] if peer else None),
        ])  # fmt: skip
    return rows


def named(table: Table, metric: Metric) -> str:
    name = " ".join(filter(None, [table.workload, f"({table.variant})" * bool(table.variant)]))
    arrow = "↓" if metric.better == "lower" else "↑"
    return f"{name}: {metric.name}{', ' * bool(metric.unit)}{metric.unit} {arrow}"


def details(table: Table) -> str:
    """Every peer's figures: medians, and the range of the repetitions."""
    title = table.title + (f" — {table.variant}" if table.variant else "")
    header = [""] + [
        metric.name + (f", {metric.unit}" if metric.unit else "") for metric in table.metrics
    ]
    rows = []
    for peer in table.values:
        spreads = [table.spread(peer, metric) for metric in table.metrics]
        cells = [
            spread.text(metric.digits) if spread else "–"
            for spread, metric in zip(spreads, table.metrics, strict=True)
        ]
        rows.append([peer + " (lost calls)" * table.failed(peer), *cells])
    text = f"## {table.workload}: {title}\n\n" + grid(header, rows)
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


def number(value: float | None, metric: Metric) -> str:
    return "–" if value is None else f"{value:,.{metric.digits}f}"


def quotient(ours: float, other: float | None) -> str:
    value = ratio(ours, other or 0)
    return "–" if value is None else f"{value:.2f}"
