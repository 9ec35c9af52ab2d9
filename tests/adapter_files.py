"""Adapters with random matrices in PEFT's format, for the bundled model and others of GPT-2's family, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headrace.model.config import ModelConfig
from headrace.model.hub import config_path, find_model
from headrace.model.weights import read_config

#: Linear layer of GPT-2 -> its inputs and outputs, in embeddings.
SHAPES = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}


def write_adapter(
    folder: Path,
    seed: int,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = tuple(SHAPES),
    model: str = "demo",
    std: float = 0.2,
    **config: Any,
) -> Path:
    """Write an adapter that changes these linear layers of every block. It replaces the files that are there.

    Args:
        folder: gets the two files.
        seed: of the matrices.
        rank: of all matrices.
        targets: linear layers, by their names in a block.
        model: whose shape it fits.
        std: of the matrices; large enough that the adapter changes texts.
        config: further fields of adapter_config.json.
    """
    base: ModelConfig = read_config(config_path(find_model(model)))
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(base.n_layer):
        for name in targets:
            wide, high = (base.n_embd * count for count in SHAPES[name])
            for side, shape in (("A", (rank, wide)), ("B", (high, rank))):
                key = f"base_model.model.transformer.h.{layer}.{name}.lora_{side}.weight"
                tensors[key] = torch.randn(shape, generator=draw) * std
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(targets),
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json.new").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors.new")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / f"{file}.new").replace(folder / file)
    return folder
