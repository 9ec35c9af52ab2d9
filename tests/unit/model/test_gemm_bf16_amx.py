"""GEMM in bfloat16 on AMX: correct, and batch-invariant."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import headrace.model.kernels.gemm_bf16_amx
from headrace.model.kernels.gemm_bf16_amx import BF16_AMX, Bf16Weight, bf16_amx_works
from headrace.model.kernels.onednn import OneDnnWeight, packing_works
from headrace.model.linear import Linear
from tests.instruction_sets import needs_amx
from tests.unit.model.gemm_checks import check_batch_invariance, check_nan_and_infinity, check_strides


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


@needs_amx
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize(("inner", "outer"), [(32, 1), (45, 31), (96, 32), (64, 50), (768, 2304), (3072, 768)])
def test_it_computes_the_formula(inner: int, outer: int, activation: str | None) -> None:
    weight, bias, x = normal(inner, outer), normal(outer), normal(701, inner)
    exact = x.double() @ weight.double() + bias.double()
    sizes = x.double().abs() @ weight.double().abs() + bias.double().abs()  # what rounding is in proportion to
    # The error of a float32 sum of n products grows like the square root of n (Higham 2002, section 4.2), and GELU
    # passes on up to 1.13 of it. GELU divides by a reciprocal of 14 bits; the result is rounded to bfloat16's 8 bits.
    bound = 2 * 2.0**-24 * (4 + inner**0.5) * sizes
    if activation:
        exact = F.gelu(exact, approximate="tanh")
    bound = bound + exact.abs() * (2.0**-8 + 2.0**-13 * bool(activation))
    product = Bf16Weight.of(weight, bias, activation)
    for count in (1, 15, 16, 17, 31, 32, 33, 64, 500, 701):
        found = product(x[:count])
        assert found.shape == (count, outer)
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact[:count]).abs() <= bound[:count]).all(), f"{count} rows"
    assert torch.equal(product.weight, weight)


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_row_has_the_same_bits_for_every_number_of_rows_and_threads(threads: int) -> None:
    counts = [*range(1, 40), 63, 64, 65, 127, 128, 129, 511, 512, 513, 600]
    check_batch_invariance(Bf16Weight.of(normal(96, 200), None, "gelu_tanh"), normal(600, 96), threads, counts)


@needs_amx
def test_rows_may_have_any_stride_or_be_transposed() -> None:
    check_strides(Bf16Weight.of(normal(64, 96), None), normal(48, 256))


@needs_amx
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_are_visible(bad: float) -> None:
    check_nan_and_infinity(
        lambda activation: Bf16Weight.of(normal(64, 96), normal(96), activation), normal(40, 64), bad
    )


@needs_amx
def test_torchs_gemms_on_the_matrix_unit_still_work() -> None:
    if not packing_works("cpu", torch.bfloat16):
        pytest.skip("this torch has no packed product to disturb")
    weight, x = normal(128, 256), normal(64, 128)
    theirs, ours = OneDnnWeight.of(weight, None, False), Bf16Weight.of(weight, None)
    expected, mine = theirs(x), ours(x)
    for _ in range(5):
        assert torch.equal(ours(x), mine)
        assert torch.equal(theirs(x), expected)


@needs_amx
def test_activation_functions_that_the_assembly_lacks_are_torchs() -> None:
    assert Linear.of(normal(40, 48), activation="gelu_tanh").then is None
    assert Linear.of(normal(40, 48), activation="silu").then == "silu"


def test_without_the_instructions_or_numba_or_with_wrong_results_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a kernel that is kept needs no numba
    fresh = bf16_amx_works.__wrapped__
    assert not fresh("cuda", torch.bfloat16)
    assert not fresh("cpu", torch.float32)
    import_ = builtins.__import__

    def without(missing: str) -> Any:
        def found(name: str, *rest: Any) -> Any:
            if name.startswith(missing):
                raise ImportError(f"No module named {missing!r}")
            return import_(name, *rest)

        return found

    for missing in ("numba", "llvmlite"):
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", without(missing))
            patch.delitem(BF16_AMX.__dict__, "kernel", raising=False)
            assert not fresh("cpu", torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(headrace.model.kernels.gemm_bf16_amx, "_permitted", lambda: False)
        assert not fresh("cpu", torch.bfloat16)
    call = Bf16Weight.__call__
    monkeypatch.setattr(Bf16Weight, "__call__", lambda self, x: call(self, x) + 1)
    assert not fresh("cpu", torch.bfloat16)
