"""A plot of CPU time per call, as SVG written by hand."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from scripts.bench.results import Measured
from scripts.bench.stand import FLOOR
from scripts.bench.stats import Spread, shown, spread

_WIDTH, _LEFT, _RIGHT = 760, 110, 190
_BAR, _GAP, _TOP = 16, 14, 44
_COLOURS = ("#8a94a6", "#1f6feb", "#d29922", "#8250df", "#2da44e")
_STYLE = "font-family='system-ui, sans-serif' font-size='12' fill='#24292f'"


def draw(scenarios: Sequence[Measured], figure: str = "cpu_ms", title: str = "CPU ms per call") -> str:
    """Return an SVG with a bar for each side of each scenario that has the floor: the median, with a line from least to most."""
    groups = [
        (scenario.name, {side: spread(of[figure]) for side, of in scenario.sides.items() if of.get(figure)})
        for scenario in scenarios
        if FLOOR in scenario.sides
    ]
    groups = [(name, bars) for name, bars in groups if bars]
    sides = list(dict.fromkeys(side for _, bars in groups for side in bars))
    most = max((bar.most for _, bars in groups for bar in bars.values()), default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    parts, y = [], _TOP
    for name, bars in groups:
        parts.append(_text(_LEFT - 8, y + _BAR * len(bars) / 2 + 4, name, anchor="end"))
        for side, bar in bars.items():
            parts += _bar(y, bar, scale, _COLOURS[sides.index(side) % len(_COLOURS)])
            y += _BAR
        y += _GAP
    legend = _legend(sides)
    height = y + 8
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}'>",
            f"<rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>",
            _text(12, 24, f"{title}: median, least to most"),
            *legend,
            *parts,
            "</svg>\n",
        ]
    )


def _bar(y: float, bar: Spread, scale: float, colour: str) -> list[str]:
    middle = y + _BAR / 2
    least, most = (_LEFT + value * scale for value in (bar.least, bar.most))
    return [
        f"<rect x='{_LEFT}' y='{y + 1}' width='{bar.median * scale:.1f}' height='{_BAR - 2}' fill='{colour}'/>",
        f"<path d='M{least:.1f} {middle}H{most:.1f}' stroke='#24292f' stroke-width='1.5'/>",
        _text(most + 6, middle + 4, f"{shown(bar.median)} ({shown(bar.least)}…{shown(bar.most)})"),
    ]


def _legend(sides: Sequence[str]) -> list[str]:
    parts, x = [], _WIDTH - _RIGHT - 40
    for number, side in enumerate(sides):
        parts.append(
            f"<rect x='{x}' y='14' width='10' height='10' fill='{_COLOURS[number % len(_COLOURS)]}'/>"
        )
        parts.append(_text(x + 14, 23, side))
        x += 24 + 8 * len(side)
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_STYLE}>{escape(text)}</text>"
