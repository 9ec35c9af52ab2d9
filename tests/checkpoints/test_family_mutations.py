"""Mistakes that are possible in other families than GPT-2: each is planted, caught by a checkpoint, and named.

Most are planted by giving our decoder the same weights with another config.json than float64.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import headrace.model.families.gpt_bigcode
from headrace.model import Decoder, load_model
from headrace.model.attention import CachedAttention
from headrace.model.config import ModelConfig
from headrace.model.families.base import transposed
from headrace.model.weights import expected_shapes
from headrace.worker.fidelity.diagnosis import likely_cause
from headrace.worker.fidelity.judge import judge
from headrace.worker.fidelity.references.float64 import Float64
from headrace.worker.fidelity.references.shape import read_shape
from tests.checkpoints.test_families import TOKENS, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def verdict(model: Decoder, arbiter: Float64) -> tuple[int | None, str]:
    """The first checkpoint that fails, and its likely cause."""
    ours = {name: tensor[0].numpy() for name, tensor in model.trace(torch.tensor([TOKENS])).items()}
    exact = arbiter.trace(TOKENS)
    failed = [row.number for row in judge(ours, exact, None, job=False) if row.ok is False]
    return (failed[0], likely_cause(failed[0], ours, exact, arbiter, TOKENS) or "") if failed else (None, "")


@pytest.mark.parametrize(
    ("case", "fields", "number", "words"),
    [
        ("gpt_neo", {"window_size": 5}, 8, "a token attends to 5 positions instead of 4"),
        ("gpt_neo", {"window_size": 3}, 8, "a token attends to 3 positions instead of 4"),
        ("gpt_neo, local first", {"window_size": 5}, 5, "a token attends to 5 positions instead of 4"),
        ("gpt_neo, local first", {"window_size": 40}, 5, "the window is missing"),
        ("gpt_neo", {"attention_types": [[["local", "global"], 2]], "attention_layers": None}, 5, "another layer"),
        ("gpt_bigcode", {"scale_attn_weights": False}, 4, "not scaled by 1/sqrt"),
        ("unscaled", {"scale_attn_weights": True}, 4, "this model's are not scaled"),
        ("scaled by layer", {"scale_attn_by_inverse_layer_idx": False}, 8, "not divided by the number of the layer"),
        ("gpt_bigcode", {"activation_function": "gelu"}, 6, "GELU with erf (gelu); this model's is GELU in the tanh"),
        ("gelu", {"activation_function": "gelu_new"}, 6, "tanh form (gelu_new); this model's is GELU with erf"),
        ("relu", {"activation_function": "silu"}, 6, "SiLU; this model's is ReLU"),
    ],
)
def test_a_wrong_option_is_caught_and_named(
    case: str, fields: dict[str, Any], number: int, words: str, folder: Path, tmp_path: Path
) -> None:
    right = made(case, folder)
    shutil.copy(right / "model.safetensors", tmp_path)
    raw = json.loads((right / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found, cause = verdict(load_model(tmp_path, device="cpu", dtype="float32"), Float64(right))
    assert (found, words in cause) == (number, True), cause


def test_heads_that_are_stored_together_and_read_as_thirds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = made("gpt_bigcode without multi_query", folder)
    monkeypatch.setattr(headrace.model.families.gpt_bigcode, "_heads_apart", lambda _: transposed)
    found, cause = verdict(load_model(right, device="cpu", dtype="float32"), Float64(right))
    assert found == 2
    assert "read as thirds" in cause


def grouped(folder: Path) -> tuple[Decoder, Float64]:
    """Four query heads and two heads of keys and values, as no family of ours has them."""
    config = ModelConfig(2, 4, 32, n_positions=40, vocab_size=91, n_kv_head=2)
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in expected_shapes(config).items()}
    save_file(weights, folder / "model.safetensors")
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 40, "vocab_size": 91}
    (folder / "config.json").write_text(json.dumps(sizes))
    shape = dataclasses.replace(read_shape(folder), kv_heads=2)
    return Decoder(config, weights), Float64(folder, shape)


def test_query_heads_that_read_the_wrong_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arbiter = grouped(tmp_path)
    assert verdict(model, arbiter) == (None, "")
    attend, order = CachedAttention.__call__, np.array([0, 2, 1, 3])  # head h reads h % 2 instead of h // 2

    def wrong(self: CachedAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self, layer, q[:, order].contiguous(), k, v)[:, order]

    monkeypatch.setattr(CachedAttention, "__call__", wrong)
    found, cause = verdict(model, arbiter)
    assert found == 5
    assert "wrong group" in cause


def test_keys_and_values_that_are_exchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = made("gpt_bigcode", folder)
    model = load_model(right, device="cpu", dtype="float32")
    heads = type(model.blocks[0]).heads

    def exchanged(self: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads(self, qkv)
        return q, v, k

    monkeypatch.setattr(type(model.blocks[0]), "heads", exchanged)
    found, cause = verdict(model, Float64(right))
    assert found == 2
    assert cause == "keys and values are exchanged"
