"""The table of a run for the docs: `python -m benchmarks.tables figures.json`.

docs/hooks.py puts those of the runs in benchmarks/machines into the page *Benchmarks*.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MACHINES = Path(__file__).parent / "machines"
#: Name of a workload -> the heading of its column.
COLUMNS = {
    "ragged": "64 prompts, 16 to 96 new tokens",
    "uniform": "64 prompts, 64 new",
    "one row": "one prompt, 64 new",
    "short": "256 short prompts, 4 new",
    "long": "64 long prompts, 32 new",
}


def table(report: Mapping[str, Any]) -> str:
    """Conditions, tokens per second of every contender, and our ratios and shares of the limit, as Markdown."""
    about, figures = report["conditions"], report["figures"]
    kinds = [name for name in COLUMNS if any(figure["workload"] == name for figure in figures)]
    software = f"torch {about['versions']['torch']}, {about['date'][:10]}, commit {about['commit'][:7]}"
    machine = f"{about['cpu']}, instruction set `{about['rung']}`, {about['threads']} threads"
    conditions = f"{machine}, {software}, shape {figures[0]['shape']}."
    lines = [conditions, "", _row(["", *(COLUMNS[kind] for kind in kinds)]), "|---" * (len(kinds) + 1) + "|"]
    names = dict.fromkeys(name for figure in figures for name in figure["contenders"])
    for name in sorted(names, key=lambda name: (not name.startswith("headrace"), name)):
        lines.append(_row([name, *(_rate(figures, kind, name) for kind in kinds)]))
    for precision in dict.fromkeys(precision for figure in figures for precision in figure["ours"]):
        label = f"**headrace {precision}**: times the best peer; share of the limit"
        lines.append(_row([label, *(_ratio(figures, kind, precision) for kind in kinds)]))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(figures: Sequence[Mapping[str, Any]], kind: str, name: str) -> str:
    """New tokens per second; where a peer was stopped, what it stays below."""
    found = [
        figure["contenders"][name] for figure in figures if figure["workload"] == kind and name in figure["contenders"]
    ]
    if not found:
        return "not measured"
    if found[0]["tokens_per_s"]:
        return f"{found[0]['tokens_per_s']:,.0f}"
    return "stopped" if "took over" in found[0]["out"] else "cannot run"


def _ratio(figures: Sequence[Mapping[str, Any]], kind: str, precision: str) -> str:
    found = [
        figure["ours"][precision] for figure in figures if figure["workload"] == kind and precision in figure["ours"]
    ]
    if not found:
        return "not measured"
    ratio = f"{found[0]['ratio']:.2f}; " if found[0]["ratio"] else ""
    return f"{ratio}{found[0]['share_of_limit']:.0%}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table(json.loads(Path(name).read_text())) for name in sys.argv[1:]))
