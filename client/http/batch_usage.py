"""Rows and tokens of a batch, counted in its output files."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from pathlib import Path
from typing import Any

from headrace.client.batch.row_file import RowFile
from headrace.client.wire.results import Usage


def count_rows(path: Path) -> tuple[int, dict[str, Any]]:
    """The number of rows in an output file, and OpenAI's usage object: the tokens of all rows."""
    output = RowFile(path)
    deque(output.scan(), 0)
    output.repair(without_failures=False)  # a crash may have left an incomplete last line
    rows, total = 0, Usage.of(0, 0)
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            response = json.loads(line)["response"]
            rows += 1
            if usage := (response or {}).get("body", {}).get("usage"):  # a row that failed has none
                total = Usage.total((total, Usage(**usage)))
    return rows, {
        "input_tokens": total.prompt_tokens,
        "input_tokens_details": {"cached_tokens": total.cached_tokens},
        "output_tokens": total.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": total.total_tokens,
    }
