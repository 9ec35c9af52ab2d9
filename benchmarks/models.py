"""Models for benchmarks: the released sizes with random weights, because speed does not depend on the weights."""

from __future__ import annotations

from pathlib import Path

#: Name -> layers, heads, width, heads of keys and values.
SHAPES = {"124M": (12, 12, 768, 12), "355M": (24, 16, 1024, 16), "multi-query": (24, 16, 2048, 1)}
VOCABULARY = 50257


def random_model(shape: str, folder: Path) -> Path:
    """A model of this shape with random weights, which transformers writes if it does not exist yet.

    "multi-query" has the shape of StarCoder's smallest model, with GPT-2's vocabulary.
    """
    import torch
    import transformers

    if not (folder / "config.json").exists():
        layers, heads, width, shared = SHAPES[shape]
        torch.manual_seed(0)
        form = {"n_layer": layers, "n_head": heads, "n_embd": width}
        if shared == heads:
            transformers.GPT2LMHeadModel(transformers.GPT2Config(**form)).save_pretrained(folder)
        else:
            config = transformers.GPTBigCodeConfig(**form, multi_query=True)
            transformers.GPTBigCodeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def demo_model() -> Path:
    """The small trained model that comes with headrace."""
    from headrace.model.hub import DEMO

    return DEMO
