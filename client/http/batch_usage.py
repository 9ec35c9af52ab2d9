"""Rows and tokens of a batch, counted in its output files."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from pathlib import Path
from typing import Any

from headrace.client.batch.row_file import RowFile


def count_rows(path: Path) -> tuple[int, dict[str, Any]]:
    """The number of rows in an output file, and OpenAI's usage object: the tokens of all rows."""
    output = RowFile(path)
    deque(output.scan(), 0)
    output.repair(without_failures=False)  # a crash may have left an incomplete last line
    rows, totals = 0, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            response = json.loads(line)["response"]
            rows += 1
            for name in totals:
                usage = (response or {}).get("body", {}).get("usage") or {}  # a row that failed has none
                totals[name] += usage.get(name, 0)
    return rows, {
        "input_tokens": totals["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": totals["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": totals["total_tokens"],
    }
