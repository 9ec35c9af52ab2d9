"""Reference models of Hugging Face transformers in float64, so that their rounding errors are negligible."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from headrace.model.hub import DEMO


@functools.cache
def demo_reference() -> GPT2LMHeadModel:
    """The bundled model as transformers reads it. Eager attention, because only that exposes its inner tensors."""
    return GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float64, attn_implementation="eager").eval()


def random_reference(seed: int = 0, **shape: Any) -> GPT2LMHeadModel:
    """A tiny model with random weights, biases and norms included, large enough that nothing cancels."""
    torch.manual_seed(seed)
    fields = {"n_layer": 2, "n_head": 3, "n_embd": 36, "n_positions": 40, "vocab_size": 91, **shape}
    config = GPT2Config(**fields, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.25)
    return model


def saved(model: GPT2LMHeadModel, folder: Path, **options: Any) -> Path:
    """`folder`, with the model in it as transformers writes it."""
    model.save_pretrained(folder, **options)
    return folder


def inner_tensors(model: GPT2LMHeadModel, token_ids: Tensor) -> dict[str, Tensor]:
    """The inner tensors of block 0, captured by hooks on transformers' modules. token_ids: [B, T]."""
    block = model.transformer.h[0]
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            caught[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    named = {
        "embeddings": model.transformer.drop,
        "ln_1": block.ln_1,
        "qkv": block.attn.c_attn,
        "attn": block.attn.c_proj,
        "mlp": block.mlp,
        "block_0": block,
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    with torch.inference_mode():
        caught["logits"] = model(token_ids).logits
    for handle in handles:
        handle.remove()
    heads = model.config.n_head
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in caught.pop("qkv").chunk(3, dim=-1))
    scores = q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3) / (model.config.n_embd // heads) ** 0.5
    return caught | {"q": q, "k": k, "v": v, "scores": scores}
