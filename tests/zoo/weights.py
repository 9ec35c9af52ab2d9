"""Models of the zoo: random weights that write varied text, saved as people save them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.zoo.vocabularies import read_json, write_json

Tensors = dict[str, torch.Tensor]


def randomize(model: torch.nn.Module, seed: str) -> None:
    """Give a model of transformers weights whose greedy tokens vary; the same ones for the same `seed`.

    Matrices keep the size of what passes through them. With transformers' own initial weights (deviation 0.02) a model
    repeats its last token, and all logits are nearly equal.
    """
    made = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        values = torch.randn(parameter.shape, generator=made)
        if "ln_" in name:
            values = values * 0.1 + (1 if name.endswith("weight") else 0)
        elif parameter.dim() == 1:
            values = values * 0.1
        elif "wte" in name or "wpe" in name or "lm_head" in name:
            values = values * 0.5 * min(1.0, math.sqrt(32 / parameter.shape[1]))
        else:
            values = values * (1.5 / math.sqrt(min(parameter.shape)))
        parameter.data.copy_(values)


def gpt2(folder: Path, vocab_size: int, *, dtype: torch.dtype = torch.float32, shard: str = "", **config: Any) -> Any:
    """Save a GPT-2 of transformers: two layers, two heads of 16 numbers, 64 positions, unless `config` says other."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
    return save(GPT2LMHeadModel(GPT2Config(**{**sizes, "vocab_size": vocab_size, **config})), folder, dtype, shard)


def gpt_bigcode(folder: Path, vocab_size: int, *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Save a GPT-BigCode of transformers."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128, "bos_token_id": None, "eos_token_id": None}
    return save(GPTBigCodeForCausalLM(GPTBigCodeConfig(**{**sizes, "vocab_size": vocab_size, **config})), folder, dtype)


def gpt_neo(folder: Path, vocab_size: int, *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Save a GPT-Neo of transformers: a global and a local layer twice over, with a window of 8."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {
        "num_layers": 4,
        "num_heads": 2,
        "hidden_size": 32,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return save(GPTNeoForCausalLM(GPTNeoConfig(**{**sizes, "vocab_size": vocab_size, **config})), folder, dtype)


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "") -> Any:
    """Save a model whose weights are a function of the folder's name. -> the model."""
    randomize(model, folder.name)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model


def rename(folder: Path, change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> None:
    """Store the tensors of a directory under other names."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **change: Any) -> None:
    """Change fields of config.json; None removes one."""
    raw = {**read_json(folder / "config.json"), **change}
    write_json(folder / "config.json", {key: value for key, value in raw.items() if value is not None})


def ends(folder: Path, *, config: Any = None, generation: Any = None, bos: int | None = None) -> None:
    """Write eos_token_id into config.json and generation_config.json; None leaves it out."""
    edit_config(folder, eos_token_id=config, bos_token_id=bos)
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        write_json(path, {"_from_model_config": False, "eos_token_id": generation, "bos_token_id": bos})
