"""Model directories whose weights are replaced while workers run."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from headrace.model.hub import DEMO

#: A tensor whose rows are reversed in the other weights.
CHANGED = "transformer.wte.weight"


class ModelDirectory:
    """A copy of the demo model. Its weights are float32, the type that computes them, so that they could be mapped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / "model.safetensors"
        #: Whether the file has other bytes than at the beginning.
        self.replaced = False
        #: How often the file was written: a worker that starts meanwhile may refuse what it finds.
        self.writes = 0
        shutil.copytree(DEMO, directory)
        directory.chmod(0o700)
        tensors = {name: tensor.float() for name, tensor in load_file(self._file).items()}
        save_file(tensors, self._file)
        self._right = self._file.read_bytes()
        save_file({**tensors, CHANGED: torch.flip(tensors[CHANGED], [0])}, self._file)
        self._other = self._file.read_bytes()
        self.restore()

    def replace(self, salt: int) -> None:
        """Overwrite the file in place, as `cp` does, cut it, or put another file in its place."""
        self.replaced = True
        self.writes += 1
        match random.Random(f"weights {salt}").choice(("overwrite", "cut", "rename")):
            case "overwrite":
                self._write(self._other)
            case "cut":
                os.truncate(self._file, len(self._right) // 2)
            case _:
                beside = self._file.with_suffix(".new")
                beside.write_bytes(self._other)
                beside.rename(self._file)

    def restore(self) -> None:
        self.writes += 1
        self._write(self._right)
        self.replaced = False

    def _write(self, content: bytes) -> None:
        """Write into the same file, which a process may have mapped."""
        with self._file.open("r+b") as file:
            file.write(content)
            file.truncate()
