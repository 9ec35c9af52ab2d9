"""Models for benchmarks: the released sizes with random weights, because speed does not depend on the weights."""

from __future__ import annotations

from pathlib import Path

#: Name -> layers, heads, width.
SHAPES = {"124M": (12, 12, 768), "355M": (24, 16, 1024)}
VOCABULARY = 50257


def random_model(shape: str, folder: Path) -> Path:
    """A model of a released size with random weights, which transformers writes if it does not exist yet."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if not (folder / "config.json").exists():
        layers, heads, width = SHAPES[shape]
        torch.manual_seed(0)
        config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def demo_model() -> Path:
    """The small trained model that comes with headrace."""
    from headrace.model.hub import DEMO

    return DEMO
