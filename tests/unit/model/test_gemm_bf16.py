"""GEMM in bfloat16 on vector units: correct, batch-invariant, and one set of bits for each kind."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model import load_model
from headrace.model.config import ACTIVATIONS
from headrace.model.kernels.gemm_bf16 import VectorBf16Weight, bf16_isa_works, bf16_works
from headrace.model.kernels.isa import NONE, Isa, chosen, find
from headrace.model.kernels.ops import ARG
from headrace.model.kernels.program import Program
from headrace.worker.engine.self_test import is_batch_invariant
from tests.guarded_memory import guarded
from tests.instruction_sets import needs_avx2, needs_avx512, needs_bf16
from tests.unit.model.gemm_checks import check_batch_invariance, check_nan_and_infinity, check_strides


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.fixture(
    params=[
        pytest.param("avx512_vnni", marks=needs_bf16),
        pytest.param("avx512", marks=needs_avx512),
        pytest.param("avx2", marks=needs_avx2),
    ]
)
def isa(request: pytest.FixtureRequest) -> Isa:
    return find(request.param)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize(("inner", "outer"), [(8, 1), (1, 3), (27, 47), (96, 48), (776, 200), (3072, 50)])
def test_it_computes_the_formula(isa: Isa, inner: int, outer: int, activation: str | None) -> None:
    """Sums in float32 have at most `inner` roundings, of partial sums below the sum of sizes; the result has one more.

    GELU has a slope below 1.13.
    """
    weight, bias, x = normal(inner, outer), normal(outer), normal(130, inner)
    exact = x.double() @ weight.double() + bias.double()
    sizes = x.double().abs() @ weight.double().abs() + bias.double().abs()
    bound = 1.13 * (inner + 2) * 2.0**-24 * sizes
    if activation:
        exact = F.gelu(exact, approximate="tanh")
        bound += 2.0**-20
    product = VectorBf16Weight.of(weight, bias, activation, isa)
    for count in (1, 2, 3, 5, 8, 9, 17, 64, 127, 130):
        found = product(x[:count])
        assert found.shape == (count, outer)
        assert found.dtype == torch.bfloat16
        error = (found.double() - exact[:count]).abs()
        assert (error <= (1 + 2.0**-8) * bound[:count] + 2.0**-8 * exact[:count].abs()).all(), f"{count} rows"
    assert torch.equal(product.weight, weight)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_for_every_number_of_rows_and_threads(isa: Isa, threads: int) -> None:
    product = VectorBf16Weight.of(normal(776, 100), None, "gelu_tanh", isa)
    check_batch_invariance(product, normal(130, 776), threads, range(1, 131))


@needs_avx512
def test_widened_weights_give_the_same_bits_with_avx512_and_avx2() -> None:
    weight, bias, x = normal(1543, 100), normal(100), normal(75, 1543)
    weight[3], x[:, 5] = 1e-39, 1e-39
    for activation in (None, *ACTIVATIONS):
        wide, narrow = (VectorBf16Weight.of(weight, bias, activation, find(name))(x) for name in ("avx512", "avx2"))
        assert torch.equal(wide, narrow)


@needs_bf16
def test_the_fingerprint_names_the_kind() -> None:
    names = [VectorBf16Weight.of(normal(8, 8), None, isa=find(each)).backend.fingerprint for each in KINDS]
    assert names == list(KINDS.values())


KINDS = {"avx512_vnni": "bf16-dot", "avx512": "bf16-fma", "avx2": "bf16-fma"}


def test_rows_may_have_any_stride_or_be_transposed(isa: Isa) -> None:
    check_strides(VectorBf16Weight.of(normal(64, 96), None, isa=isa), normal(48, 256))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_are_visible(isa: Isa, bad: float) -> None:
    check_nan_and_infinity(
        lambda activation: VectorBf16Weight.of(normal(64, 96), normal(96), activation, isa), normal(40, 64), bad
    )


@pytest.mark.parametrize("at_start", [False, True])
def test_no_memory_outside_of_the_buffers_is_touched(isa: Isa, at_start: bool) -> None:
    guard = functools.partial(guarded, at_start=at_start)
    for rows, width, out in ((1, 8, 50), (9, 27, 1), (130, 200, 96)):
        x, made = normal(rows, width), VectorBf16Weight.of(normal(width, out), normal(out), "gelu_tanh", isa)
        expected, result, given = made(x), guard(torch.empty(rows, out, dtype=torch.bfloat16)), guard(x)
        parts: dict[str, Any] = {name: guard(getattr(made, name)) for name in ("packed", "biases")}
        product = dataclasses.replace(made, **parts)
        program = Program(product.backend, rows, width)
        inner = guard(program._packed_rows), guard(program._scratch)
        program._arguments[[ARG.packed_rows, ARG.scratch]] = [each.data_ptr() for each in inner]
        addresses = {"source": given.data_ptr(), "source_row_bytes": width * 2, "out": result.data_ptr()}
        program.run(np.array([product.op._replace(**addresses, out_row_bytes=out * 2)], dtype=np.int64))
        assert torch.equal(result, expected)


def test_wrong_results_or_a_lack_of_instructions_leave_it_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = bf16_isa_works.__wrapped__
    assert not bf16_works("cuda", torch.bfloat16)
    assert not bf16_works("cpu", torch.float32)
    assert not fresh(find(NONE))
    call = VectorBf16Weight.__call__
    monkeypatch.setattr(VectorBf16Weight, "__call__", lambda self, x: call(self, x) + 1)
    assert not fresh(chosen())


@needs_avx2
def test_a_model_in_bfloat16_is_fused_and_batch_invariant() -> None:
    exact, model = (load_model("demo", device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert model.fused_decoder is not None
    assert model.gemm_backend in {"bf16-dot", "bf16-fma", "tiled"}
    assert is_batch_invariant(model)
    tokens = torch.tensor([[(7919 * i) % 50257 for i in range(60)]])
    p, q = exact.logits(tokens)[0].log_softmax(-1), model.logits(tokens)[0].log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 0.05
