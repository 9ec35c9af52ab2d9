"""Attention with fewer heads of keys and values than of queries, over windows, and with any head size.

The formula in float64 is the reference. One random sequence is computed whole, in chunks, and token by token beside
others, on the compiled path and on torch's.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.model.attention import CachedAttention, Chunk, DecodeGroup, PlainAttention
from headrace.model.config import ModelConfig
from headrace.model.kv_cache import KVCache

CPU = torch.device("cpu")
LENGTH = 320


def config_of(heads: int, kv_heads: int, size: int, window: int | None, **more: bool) -> ModelConfig:
    """Two layers: the first with all positions, the second with a window."""
    windows = () if window is None else (None, window)
    return ModelConfig(2, heads, heads * size, LENGTH, 100, n_kv_head=kv_heads, windows=windows, **more)


def inputs(config: ModelConfig, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v of `count` rows, as views of one tensor, like in a model."""
    heads = config.n_head + 2 * config.kv_heads
    qkv = torch.randn(count, heads, config.head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return list(qkv.split((config.n_head, config.kv_heads, config.kv_heads), 1))


def formula(config: ModelConfig, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, one head at a time. [T, H, D], [T, KV, D] twice -> [T, H, D]."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.empty_like(q)
    scale = 1 / math.sqrt(config.head_dim) if config.scaled_attention else 1
    scale /= layer + 1 if config.scaled_by_layer else 1
    window = config.windows[layer] if config.windows else None
    rows = torch.arange(len(q))
    back = rows[:, None] - rows  # how far a position lies before a row
    hidden = (back < 0) | (back >= (window or len(q)))
    for head in range(config.n_head):
        of = head * config.kv_heads // config.n_head
        scores = q[:, head] @ k[:, of].t() * scale
        out[:, head] = scores.masked_fill(hidden, -math.inf).softmax(1) @ v[:, of]
    return out


def cached(config: ModelConfig, layer: int, qkv: list[Tensor], chunks: list[int], neighbours: int = 0) -> Tensor:
    """A prompt in chunks, then its other rows one by one beside `neighbours` of other lengths. [T, H, D]"""
    q, k, v = qkv
    cache = KVCache(config, lengths=[LENGTH], dtype=q.dtype, device=CPU)
    cache.arenas[LENGTH].resize(1 + neighbours)
    out, start = [], 0
    for count in chunks:
        attend = CachedAttention.of(cache, groups=[], chunks=[Chunk(LENGTH, 0, start, count, 0)])
        out.append(attend(layer, *(x[start : start + count] for x in (q, k, v))))
        start += count
    for at in range(start, len(q)):
        others = inputs(config, neighbours, q.dtype, seed=at)
        rows = [torch.cat([mine[at : at + 1], other]) for mine, other in zip((q, k, v), others, strict=True)]
        slots, positions = list(range(1 + neighbours)), [at, *(7 * i + at % 5 for i in range(neighbours))]
        group = DecodeGroup(LENGTH, slots, positions, [1] * len(slots), 0)
        out.append(CachedAttention.of(cache, groups=[group], chunks=[])(layer, *rows)[:1])
    return torch.cat(out)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window"),
    [
        (4, 1, 16, None),
        (4, 2, 64, 1),
        (6, 3, 5, 7),
        (3, 3, 1, 20),
        (2, 1, 256, 130),
        (5, 1, 33, 4),
        (8, 8, 80, 150),
        (1, 1, 3, 300),
    ],
)
def test_each_row_attends_to_its_window_of_the_head_of_its_group(
    heads: int, kv_heads: int, size: int, window: int | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "torch":
        monkeypatch.setattr(KVCache, "decode_kernel", lambda _: None)
    config = config_of(heads, kv_heads, size, window)
    qkv = inputs(config, 300)
    for layer in range(2):
        expected = formula(config, layer, *qkv)
        whole = PlainAttention(config, 1, 300, CPU)(layer, *qkv)
        for found in (whole, cached(config, layer, qkv, [128, 128, 40]), cached(config, layer, qkv, [100, 20], 2)):
            assert (found.double() - expected).abs().max() < 1e-5, f"layer {layer}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3, 64])
def test_half_precision_attends_alike(dtype: torch.dtype, size: int) -> None:
    config = config_of(4, 2, size, 9)
    qkv = inputs(config, 150, dtype)
    for layer in range(2):
        found = cached(config, layer, qkv, [140], 1)
        assert (found.double() - formula(config, layer, *qkv)).abs().max() < 0.03


@pytest.mark.parametrize(("scaled", "by_layer"), [(True, True), (False, False), (False, True)])
def test_the_scale_is_that_of_the_layer(scaled: bool, by_layer: bool) -> None:
    config = config_of(2, 2, 8, None, scaled_attention=scaled, scaled_by_layer=by_layer)
    qkv = inputs(config, 140)
    for layer in range(2):
        expected = formula(config, layer, *qkv)
        for found in (PlainAttention(config, 1, 140, CPU)(layer, *qkv), cached(config, layer, qkv, [134])):
            assert (found.double() - expected).abs().max() < 1e-5


@settings(deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    size=st.sampled_from([1, 3, 16]),
    window=st.none() | st.integers(1, 200),
    chunks=st.lists(st.integers(1, 60), max_size=3),
    neighbours=st.integers(0, 3),
    threads=st.integers(1, 3),
)
def test_a_row_has_the_same_bits_beside_any_others(
    kv_heads: int,
    group: int,
    size: int,
    window: int | None,
    chunks: list[int],
    neighbours: int,
    threads: int,
) -> None:
    """Several threads write the keys of one group; and rows of a prompt are rows that decode."""
    config = config_of(kv_heads * group, kv_heads, size, window)
    qkv = inputs(config, sum(chunks) + 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cached(config, 1, qkv, chunks)
        torch.set_num_threads(threads)
        crowd = cached(config, 1, qkv, chunks, neighbours)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(crowd, alone)
    assert (alone.double() - formula(config, 1, *qkv)).abs().max() < 1e-5


def test_the_cache_holds_the_heads_of_keys_and_values_only() -> None:
    config = config_of(8, 1, 16, None)
    cache = KVCache(config, lengths=[64], dtype=torch.float32, device=CPU)
    cache.arenas[64].resize(2)
    assert [tuple(tensor.shape) for tensor in cache.arenas[64].k] == [(2, 1, 64, 16)] * 2
