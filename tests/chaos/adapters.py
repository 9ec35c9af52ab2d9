"""The LoRA adapters of a run: more than fit into the memory for them, and one whose file is cut short."""

from __future__ import annotations

import os
from pathlib import Path

from tests.adapter_files import write_adapter

#: Name -> rank.
RANKS = {"river": 2, "mill": 4, "stone": 8, "sky": 16}
#: An adapter whose jobs fail with `adapter_failed`.
BROKEN = "broken"
NAMES = (*RANKS, BROKEN)
#: Memory for adapters: not enough for all at the same time.
ADAPTER_BYTES = 1_700_000


def write_adapters(directory: Path) -> Path:
    """Write all adapters into a directory, as HEADRACE_ADAPTERS_DIR names it."""
    for seed, (name, rank) in enumerate(RANKS.items()):
        write_adapter(directory / name, seed, rank=rank)
    file = write_adapter(directory / BROKEN, len(RANKS)) / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return directory
