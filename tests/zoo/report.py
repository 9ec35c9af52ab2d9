"""The zoo's table as Markdown, and the file that keeps it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.running import Row

#: The table as the last full run printed it.
FILE = Path(__file__).with_name("table.md")


def table(rows: Sequence[Row]) -> str:
    """One line for each directory: what it is, what was compared, and the largest difference."""
    lines = [
        "| directory | what it is | compared | texts | prompts | tokens | smallest gap | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        entry = row.entry
        compared = "WRONG" if row.faults else entry.compared
        numbers = [""] * 5
        if row.prompts:
            numbers = [f"{row.texts:,}", str(row.prompts), str(row.tokens), f"{row.gap:.2g}", f"{row.largest:.1e}"]
        lines.append(f"| `{entry.name}` | {entry.what} | {compared} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row]) -> None:
    """Keep the table, which docs/hooks.py puts where a page has `<!-- generated: zoo -->`."""
    FILE.write_text(table(rows) + "\n", encoding="utf-8")


def listed() -> list[str]:
    """The directories that the kept table has."""
    return re.findall(r"^\| `([a-z0-9-]+)` \|", FILE.read_text(encoding="utf-8"), re.MULTILINE)
