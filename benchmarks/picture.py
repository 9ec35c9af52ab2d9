"""Draw the figures of a run as bars: `python -m benchmarks.picture figures.json figures.png`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS_COLOUR = "#c2410c"
#: Peer -> its grey; a precision below the run's own is drawn lighter.
GREYS = {
    "llama.cpp": "#4b5563",
    "ctranslate2": "#6b7280",
    "transformers": "#9ca3af",
    "transformers-continuous": "#c3c8d0",
}
_INK = "#1f2937"


def bars(figure: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Label, tokens per second and colour of each contender that was measured, the fastest peer first after ours."""
    found = []
    for name, standing in figure["contenders"].items():
        peer, _, precision = name.rpartition(" ")
        if standing["tokens_per_s"]:
            label = peer if precision == figure["dtype"] else f"{peer} {precision}"
            found.append((label, float(standing["tokens_per_s"]), GREYS.get(peer, OURS_COLOUR)))
    return sorted(found, key=lambda bar: (bar[2] != OURS_COLOUR, -bar[1]))


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with a row of bars for each workload and a column for each precision.

    Args:
        report: the JSON that `benchmarks.throughput --output` writes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figures = report["figures"]
    dtypes = list(dict.fromkeys(figure["dtype"] for figure in figures))
    workloads = list(dict.fromkeys((figure["shape"], figure["workload"]) for figure in figures))
    heights = [
        max(len(bars(f)) for f in figures if (f["shape"], f["workload"]) == workload) + 1.6 for workload in workloads
    ]
    canvas, grid = pyplot.subplots(
        len(workloads),
        len(dtypes),
        figsize=(5.2 * len(dtypes), 0.24 * sum(heights) + 0.7),
        squeeze=False,
        height_ratios=heights,
        facecolor="white",
    )
    for axes in grid.flat:
        axes.axis("off")
    for figure in figures:
        row = workloads.index((figure["shape"], figure["workload"]))
        _panel(grid[row][dtypes.index(figure["dtype"])], figure, heights[row])
    canvas.suptitle(_title(report), fontsize=11, color=_INK, x=0.01, ha="left")
    canvas.tight_layout(rect=(0, 0, 1, 0.985))
    canvas.savefig(path, dpi=150, facecolor="white")
    pyplot.close(canvas)


def _title(report: Mapping[str, Any]) -> str:
    shapes = "/".join(dict.fromkeys(figure["shape"] for figure in report["figures"]))
    threads = report["conditions"]["threads"]
    return f"GPT-2 {shapes}, new tokens per second, {threads} thread{'s' if threads > 1 else ''}"


def _panel(axes: Any, figure: Mapping[str, Any], height: float) -> None:
    shown = bars(figure)
    fastest = max(value for _, value, _ in shown)
    axes.set_xlim(-0.62 * fastest, 1.2 * fastest)
    axes.set_ylim(height - 0.9, -1.0)
    axes.text(-0.6 * fastest, -0.75, f"{figure['workload']}, {figure['dtype']}", fontsize=10, color=_INK, weight="bold")
    for position, (label, value, colour) in enumerate(shown):
        ours = colour == OURS_COLOUR
        text = {
            "va": "center",
            "fontsize": 9,
            "color": OURS_COLOUR if ours else _INK,
            "weight": "bold" if ours else None,
        }
        axes.barh(position, value, height=0.74, color=colour)
        axes.text(-0.02 * fastest, position, label, ha="right", **text)
        axes.text(value + 0.02 * fastest, position, f"{value:,.0f}", ha="left", **text)


def main() -> None:
    source, target = (Path(word) for word in sys.argv[1:3])
    draw(json.loads(source.read_text()), target)


if __name__ == "__main__":
    main()
