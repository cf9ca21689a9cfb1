"""Draws panels side by side: JSON on standard input, an SVG as the result. Needs matplotlib and nothing of hostprobe's.

    python tests/bench/plot.py FILE.svg < PANELS

Each panel has `title`, which its x axis is called too, `y`, and `series`: each `name`, `x` and `y`.
"""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

PANEL_INCHES = (4.2, 3.2)
# The same figures give the same file; text stays text; the paper is white in a dark page too.
plt.rcParams.update({"svg.hashsalt": "hostprobe", "svg.fonttype": "none", "font.size": 9})


def main() -> None:
    """Reads, draws, writes."""
    panels = json.load(sys.stdin)
    columns = 2
    rows = -(-len(panels) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes.flat, strict=False):
        for series in panel["series"]:
            axis.plot(series["x"], series["y"], marker="o", markersize=3, label=series["name"] or None)
        axis.set_xlabel(panel["title"])
        axis.set_ylabel(panel["y"])
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        if any(series["name"] for series in panel["series"]):
            axis.legend(frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(sys.argv[1], format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
