"""Can the checkpoints fail? Each usual mistake is planted in the model and must be caught by the lowest-numbered
checkpoint that should catch it, and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.numpy import load

import headrace.model.attention
import headrace.model.block
import headrace.model.config
import headrace.model.decoder
import headrace.model.kv_cache
from headrace.client.wire.comparison import CheckpointResult
from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.model.fused_decoder import FusedDecoder
from headrace.model.hub import DEMO
from headrace.model.linear import Linear
from headrace.worker.engine.build import load_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.fidelity.diagnosis import likely_cause
from headrace.worker.fidelity.judge import judge
from headrace.worker.fidelity.references.float64 import Float64

PROMPT = [464, 2068, 7586, 21831, 11687, 625]
Plant = Callable[[pytest.MonkeyPatch, Engine], None]


@pytest.fixture(scope="module")
def arbiter() -> Float64:
    return Float64(DEMO)


@pytest.fixture
def engine() -> Engine:
    """A fresh one: mutations may change its weights."""
    return load_engine(Settings(model="demo"))


def rows(
    engine: Engine, arbiter: Float64
) -> tuple[list[CheckpointResult], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The verdicts, our tensors, and those of float64."""
    dump: dict[str, bytes] = {}
    fields = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "checkpoints": "all"}
    engine.submit(parse_request(fields), on_activations=dump.update)
    while engine.step():
        pass
    ours = {name: load(data)["tensor"] for name, data in dump.items()}
    exact = arbiter.trace(PROMPT)
    (margins,) = arbiter.margins([PROMPT], [ours["tokens"].tolist()])
    return judge(ours, exact, margins), ours, exact


def erf_gelu(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    fc = engine.runner.model.blocks[0].c_fc  # type: ignore[attr-defined]
    plain = Linear.of(fc.weight, fc.bias)
    replace_in_block_0(engine, c_fc=lambda x: F.gelu(plain(x)))


def unscaled_scores(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    patch.setattr(headrace.model.config.ModelConfig, "scale", 1.0)


def replace_in_block_0(engine: Engine, **parts: Any) -> None:
    model = engine.runner.model  # type: ignore[attr-defined]
    model.blocks[0] = dataclasses.replace(model.blocks[0], **parts)
    model.fused_decoder = FusedDecoder.of(model.blocks)


def transposed_qkv(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    linear = engine.runner.model.blocks[0].c_attn  # type: ignore[attr-defined]
    weight = linear.weight.reshape(linear.weight.shape[::-1]).T.contiguous()
    replace_in_block_0(engine, c_attn=Linear.of(weight, linear.bias))


def transposed_projection(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    linear = engine.runner.model.blocks[0].c_proj  # type: ignore[attr-defined]
    replace_in_block_0(engine, c_proj=Linear.of(linear.weight.T.contiguous(), linear.bias))


def cache_off_by_one(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Keys are written one row further than they belong."""
    attend = headrace.model.attention._Prefill.attend

    def shifted(self: Any, layer: int, q: Any, k: Any, v: Any, *rest: Any) -> None:
        attend(self, layer, q, k, v, *rest)
        keys = self.arena.k[layer][self.slot]
        keys[:, 1 : len(k) + 1] = k.transpose(0, 1)

    patch.setattr(headrace.model.attention._Prefill, "attend", shifted)
    patch.setattr(headrace.model.kv_cache.KVCache, "decode_kernel", lambda _: None)


def unbiased_variance(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(x.var(-1, keepdim=True, correction=1) + self.epsilon) * self.weight + self.bias

    patch.setattr(headrace.model.block.Norm, "__call__", norm)
    patch.setattr(engine.runner.model, "fused_decoder", None)  # type: ignore[attr-defined]  # it has its own norms


def positions_off_by_one(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    forward = headrace.model.decoder.Decoder.forward
    patch.setattr(headrace.model.decoder.Decoder, "forward", lambda self, t, p, *rest: forward(self, t, p + 1, *rest))


def untied_head(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    other = torch.randn(50257, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    patch.setattr(headrace.model.decoder.Decoder, "head", lambda self, hidden, _: self.ln_f(hidden) @ other.T)


def mask_off_by_one(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Every token also sees the next one."""
    attention = F.scaled_dot_product_attention

    def leaky(q: Any, k: Any, v: Any, *, attn_mask: Any, is_causal: bool = False, **rest: Any) -> Any:
        if is_causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        return attention(q, k, v, attn_mask=attn_mask, **rest)

    patch.setattr(headrace.model.attention.F, "scaled_dot_product_attention", leaky)
    patch.setattr(headrace.model.kv_cache.KVCache, "decode_kernel", lambda _: None)


MUTATIONS: list[tuple[Plant, int, str]] = [
    (positions_off_by_one, 1, "positions are off by one"),
    (unbiased_variance, 1, "variance is unbiased"),
    (transposed_qkv, 2, "transposed"),
    (cache_off_by_one, 3, "cache index is off by one"),
    (unscaled_scores, 4, "not scaled"),
    (mask_off_by_one, 5, "sees the next one"),
    (transposed_projection, 5, "transposed"),
    (erf_gelu, 6, "erf"),
    (untied_head, 8, "untied"),
]


def test_the_model_as_it_is_passes(engine: Engine, arbiter: Float64) -> None:
    compared, _, _ = rows(engine, arbiter)
    assert [row.number for row in compared] == list(range(1, 13))
    assert all(row.ok for row in compared)


@pytest.mark.parametrize(("plant", "number", "words"), MUTATIONS, ids=[m[0].__name__ for m in MUTATIONS])
def test_a_planted_mistake_is_caught_where_it_should_be_and_named(
    engine: Engine, arbiter: Float64, monkeypatch: pytest.MonkeyPatch, plant: Plant, number: int, words: str
) -> None:
    plant(monkeypatch, engine)
    compared, ours, exact = rows(engine, arbiter)
    failed = [row.number for row in compared if row.ok is False]
    assert failed
    assert failed[0] == number
    cause = likely_cause(number, ours, exact, arbiter, PROMPT)
    assert cause is not None
    assert words in cause
