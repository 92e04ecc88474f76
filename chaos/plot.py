"""Draws series as an SVG with a small chart for each, two in a row."""

from collections.abc import Sequence
from html import escape

from chaos.trend import Series

WIDTH, HEIGHT = 420, 130  # of a chart
LEFT, TOP, GAP = 70, 34, 24
CALM, GROWING, UNJUDGED = "#1b7f4d", "#c0392b", "#777777"

STYLE = (
    "text{font:12px sans-serif;fill:#333}.t{font-weight:bold}.e{text-anchor:end}"
    "rect{fill:#fafafa;stroke:#ddd}polyline{fill:none;stroke-width:1.5}"
)


def svg(title: str, seconds: Sequence[float], series: Sequence[Series]) -> str:
    """The whole picture. seconds: when the values were taken, the first one being 0."""
    rows = -(-len(series) // 2)
    width, height = 2 * (LEFT + WIDTH + GAP), TOP + rows * (HEIGHT + TOP + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f"<style>{STYLE}</style>",
        text(LEFT, 20, title, "t"),
    ]
    for n, one in enumerate(series):
        x = LEFT + n % 2 * (LEFT + WIDTH + GAP)
        y = 2 * TOP + n // 2 * (HEIGHT + TOP + GAP)
        parts += chart(x, y, seconds, one)
    return "\n".join([*parts, "</svg>", ""])


def chart(x: float, y: float, seconds: Sequence[float], series: Series) -> list[str]:
    highest = max(series.values) * 1.1 or 1.0
    longest = seconds[-1] or 1.0
    points = " ".join(
        f"{x + WIDTH * second / longest:.1f},{y + HEIGHT * (1 - value / highest):.1f}"
        for second, value in zip(seconds, series.values, strict=True)
    )
    colour = GROWING if series.grows else UNJUDGED if series.allowed is None else CALM
    return [
        text(x, y - 8, f"{series.name}, {series.unit}"),
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<polyline points="{points}" stroke="{colour}"/>',
        text(x - 6, y + 10, f"{highest:.4g}", "e"),
        text(x - 6, y + HEIGHT, "0", "e"),
        text(x + WIDTH, y + HEIGHT + 15, f"{longest / 60:.3g} min", "e"),
    ]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{of}>{escape(words)}</text>'
