"""The results of `tests.bench.curves` as two SVG files: all that is drawn is in the lines, and nothing else decides.

Must not know: models, how anything was measured. The latest run of the file is drawn, its medians. Run it from the
repository root:

    python -m tests.bench.curves_plot docs/results/curves-cpu.jsonl docs/results
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
"""Plot → series → x and milliseconds, ascending."""

PANEL_WIDTH, HEIGHT = 430, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 410, 40, 290
"""Where a panel's axes end, in pixels of it."""
COLOURS = ("#0072b2", "#d55e00", "#009e73")
"""Okabe and Ito's: told apart whatever colours one sees."""


@dataclass(frozen=True)
class Panel:
    """Axes for one plot of the results.

    Attributes:
        ticks: of x, ascending; the first and the last are its ends.
        doubling: equal distances along x are equal factors.
    """

    plot: str
    title: str
    x_label: str
    ticks: tuple[int, ...]
    doubling: bool

    def across(self, x: float) -> float:
        """Pixels from the panel's left."""
        first, last, here = (math.log2(one) if self.doubling else one for one in (self.ticks[0], self.ticks[-1], x))
        return LEFT + (RIGHT - LEFT) * (here - first) / (last - first)


FILES = {
    "cost-live.svg": (
        Panel("live", "A step, as live rows and their ranks grow", "live rows", (0, 8, 16, 24, 32), doubling=False),
    ),
    "cost-registered.svg": (
        Panel("registered", "Eight rows, beside more adapters", "registered adapters", (8, 64, 256, 1000), True),
        Panel("largest rank", "Eight rows, beside larger ranks", "largest registered rank", (8, 16, 64, 128), True),
    ),
}


def read(path: Path) -> Curves:
    """The medians of the file's latest run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        if line["utc"] == lines[-1]["utc"]:
            point = line["point"]
            series = found.setdefault(point["plot"], {}).setdefault(point["series"], [])
            series.append((point["x"], line["times"]["median_ms"]))
    return {plot: {name: sorted(series) for name, series in of.items()} for plot, of in found.items()}


def draw(panels: Sequence[Panel], curves: Curves) -> str:
    """An SVG with the panels side by side, their milliseconds to one scale from zero."""
    most_ms = max(ms for panel in panels for series in curves[panel.plot].values() for _, ms in series)
    step_ms = _step(most_ms)
    top_ms = step_ms * math.ceil(most_ms / step_ms)
    width = PANEL_WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({PANEL_WIDTH * number} 0)">')
        parts += _axes(panel, top_ms, step_ms)
        for place, (name, series) in enumerate(curves[panel.plot].items()):
            parts += _series(panel, name, series, top_ms, place)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _step(most_ms: float) -> float:
    """The least of 1, 2, 5, 10, 20, … that makes at most five steps of it."""
    size = 10.0 ** math.floor(math.log10(most_ms / 5))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor * 5 >= most_ms)


def _down(ms: float, top_ms: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * ms / top_ms


def _axes(panel: Panel, top_ms: float, step_ms: float) -> list[str]:
    middle = (LEFT + RIGHT) / 2
    parts = [_text(middle, 22, panel.title, "middle", ' font-size="14"')]
    for number in range(round(top_ms / step_ms) + 1):
        y = _down(number * step_ms, top_ms)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{number * step_ms:g}", "end"))
    for tick in panel.ticks:
        x = panel.across(tick)
        parts.append(f'<path d="M{x:.1f} {BOTTOM}v5" stroke="#222222"/>')
        parts.append(_text(x, BOTTOM + 18, f"{tick:,}", "middle"))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" stroke="#222222" fill="none"/>')
    parts.append(_text(middle, BOTTOM + 36, panel.x_label, "middle"))
    across = (TOP + BOTTOM) / 2
    parts.append(_text(16, across, "ms per step, median", "middle", f' transform="rotate(-90 16 {across:g})"'))
    return parts


def _series(panel: Panel, name: str, series: Sequence[tuple[int, float]], top_ms: float, place: int) -> list[str]:
    """The line, its markers, and its line of the legend."""
    colour, legend_y = COLOURS[place], BOTTOM + 58 + 18 * place
    at = [(panel.across(x), _down(ms, top_ms)) for x, ms in series]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts = [f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for (x, y), (value, ms) in zip(at, series, strict=True):
        said = escape(f"{name}: {value:,}, {ms:.1f} ms")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{said}</title></circle>')
    parts.append(f'<path d="M{LEFT} {legend_y - 4}h24" stroke="{colour}" stroke-width="2"/>')
    parts.append(_text(LEFT + 32, legend_y, name, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON lines")
    parser.add_argument("out", type=Path, help="folder of the SVG files, which are written anew")
    options = parser.parse_args(arguments)
    curves = read(options.results)
    for name, panels in FILES.items():
        (options.out / name).write_text(draw(panels, curves))


if __name__ == "__main__":
    main()
