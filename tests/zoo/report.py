"""The zoo's table as Markdown, and its place in the docs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.running import Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "your-own-model.md"
MARKED = re.compile(r"(<!-- zoo: .*?-->\n)(.*?)(<!-- end of zoo -->)", re.DOTALL)


def table(rows: Sequence[Row]) -> str:
    """One line for each directory: what it is, what was compared, and the largest difference."""
    lines = [
        "| directory | what it is | compared | prompts | tokens | smallest gap | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        entry = row.entry
        compared = "WRONG" if row.faults else entry.compared
        numbers = ["", "", "", ""]
        if row.prompts:
            numbers = [str(row.prompts), str(row.tokens), f"{row.gap:.2g}", f"{row.largest:.1e}"]
        lines.append(f"| `{entry.name}` | {entry.what} | {compared} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row]) -> None:
    """Put the table at its marked place in the docs."""
    text = DOCUMENT.read_text(encoding="utf-8")
    made, count = MARKED.subn(lambda m: f"{m[1]}\n{table(rows)}\n\n{m[3]}", text)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has no place for the table")
    DOCUMENT.write_text(made, encoding="utf-8")


def listed() -> list[str]:
    """The directories that the table in the docs has."""
    found = MARKED.search(DOCUMENT.read_text(encoding="utf-8"))
    return [] if found is None else re.findall(r"^\| `([a-z0-9-]+)` \|", found[2], re.MULTILINE)
