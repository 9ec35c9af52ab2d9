"""The model card of the bundled model."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_model_card_matches_the_bundled_model() -> None:
    demo = ROOT / "model" / "demo"
    card = (demo / "README.md").read_text()
    weights = (demo / "model.safetensors").read_bytes()
    shape = json.loads((demo / "config.json").read_text())
    assert hashlib.sha256(weights).hexdigest() in card
    assert f"{len(weights):,} bytes" in card
    for name in ("n_embd", "n_layer", "n_head"):
        assert f"`{name}` {shape[name]}" in card
    assert f"{shape['n_positions']:,}" in card
    assert f"{shape['vocab_size']:,}" in card
    assert len(re.findall(r"^\| .* \| .* \| \d{4} \|$", card, re.MULTILINE)) == 14
