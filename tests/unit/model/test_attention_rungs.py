"""Attention on every instruction set: the same bits, nothing outside its buffers, and code for other processors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.model.kernels import isa
from headrace.model.kernels.attention import DecodeRows, LayerRules, decode_kernel
from headrace.model.kernels.attention_rows import Head, query, scores, softmax, tile_rows, weighted_sums
from headrace.model.kernels.target import compile_module, target_machine
from headrace.model.kernels.vector_function import vector_module
from tests.guarded_memory import guarded
from tests.instruction_sets import needs_avx2

#: Positions before a slot's rows, and rows: decoding rows, drafts, and prompts that end where the slot does.
SLOTS = ((0, 1), (63, 1), (20, 3), (0, 64), (57, 7))


def run(
    width: int, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None, keep: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attention of the rows of SLOTS, each slot with memory of its own for exactly 64 positions."""
    generator = torch.Generator().manual_seed(4)
    count = sum(rows for _, rows in SLOTS)

    def numbers(*shape: int) -> Tensor:
        return keep((torch.randint(-512, 513, shape, generator=generator) / 256).to(dtype))

    caches = [[numbers(kv_heads, 64, width) for _ in SLOTS] for _ in range(2)]
    q, k, v = numbers(count, heads, width), *(numbers(count, kv_heads, width) for _ in range(2))
    out = keep(torch.zeros(count, heads, width, dtype=dtype))
    where = DecodeRows.of(
        *(np.array([[cache.data_ptr() for cache in each]]) for each in caches),
        np.full(len(SLOTS), 64 * width),
        lengths=np.array([start + 1 for start, _ in SLOTS]),
        counts=np.array([rows for _, rows in SLOTS]),
        heads=heads,
    )
    kernel = decode_kernel(width, dtype, "cpu")
    assert kernel is not None
    kernel(0, q, k, v, out, where, LayerRules.of([0.2], [window]))
    return out.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize(("kv_heads", "window"), [(4, None), (1, None), (4, 21)])
def test_nothing_outside_the_buffers_is_read_or_written(
    dtype: torch.dtype, at_start: bool, kv_heads: int, window: int | None
) -> None:
    expected = run(64, dtype, 4, kv_heads, window, torch.Tensor.clone)
    guard = functools.partial(guarded, at_start=at_start)
    assert torch.equal(run(64, dtype, 4, kv_heads, window, guard), expected)


@needs_avx2
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_odd_heads_have_the_same_bits_on_the_best_and_on_the_last_instruction_set(kv_heads: int) -> None:
    found = []
    for rung in (isa.AUTO, isa.available()[-1].name):
        isa.use(rung)
        try:
            found.append(run(57, torch.bfloat16, 4, kv_heads, None, torch.Tensor.clone))
        finally:
            isa.use(isa.AUTO)
    assert torch.equal(*found)


@pytest.mark.parametrize("rung", [each for each in isa.LADDER if each.mr], ids=lambda each: each.name)
@pytest.mark.parametrize("head", [Head(64, True), Head(57, False)], ids=["64 bfloat16", "57 float32"])
def test_it_compiles_for_every_processor(rung: isa.Isa, head: Head) -> None:
    rows = tile_rows(rung)
    functions = [query(head), scores(head, rows, rung), softmax(), weighted_sums(head, rows, rung)]
    text = target_machine(rung, jit=False).emit_assembly(
        compile_module(vector_module(functions), target_machine(rung, jit=False))
    )
    fused = {"x86_64": "vfmadd", "aarch64": "fmla"}[rung.architecture]
    assert fused in text
    assert "exp" not in [line.split()[-1] for line in text.splitlines() if line.strip().startswith(("call", "bl"))]
