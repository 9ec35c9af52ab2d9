"""GEMM in float32: correct, batch-invariant, and with the same bits on every instruction set."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.config import ACTIVATIONS
from headrace.model.kernels.gemm_blocks import KC
from headrace.model.kernels.gemm_fp32 import KU, Fp32Weight, fp32_backend, fp32_isa_works, fp32_works
from headrace.model.kernels.isa import NONE, Isa, chosen, find
from tests.instruction_sets import needs_avx2, needs_avx512
from tests.unit.model.gemm_checks import EXACT, check_batch_invariance, check_nan_and_infinity, check_strides


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(params=[pytest.param("avx512", marks=needs_avx512), pytest.param("avx2", marks=needs_avx2)])
def isa(request: pytest.FixtureRequest) -> Isa:
    return find(request.param)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize(
    ("inner", "outer"), [(4, 1), (1, 3), (33, 47), (96, 48), (64, 50), (100, 200), (388, 96), (768, 2304), (3072, 768)]
)
def test_it_computes_the_formula(isa: Isa, inner: int, outer: int, activation: str | None) -> None:
    weight, bias, x = normal(inner, outer), normal(outer), normal(301, inner)
    exact = x.double() @ weight.double() + bias.double()
    sizes = x.double().abs() @ weight.double().abs() + bias.double().abs()  # rounding errors are proportional to this
    if activation:
        exact = F.gelu(exact, approximate="tanh")
    product = Fp32Weight.of(weight, bias, activation, isa)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 64, 127, 128, 129, 301):
        found = product(x[:count])
        assert found.shape == (count, outer)
        assert found.dtype == torch.float32
        error = (found.double() - exact[:count]).abs() / sizes[:count]
        assert error.max() < 2.0**-24 * 4 * (1 + inner**0.5 / 4), f"{count} rows"
    assert torch.equal(product.weight, weight)


def test_its_mean_error_is_that_of_short_sums(isa: Isa) -> None:
    """A sum of n products of normal numbers rounds n times.

    The root mean square of each error is at most u/sqrt(3) of the partial sum. The k-th partial sum has variance k, so
    the mean square error is u**2 * n**2 / 6. A sum in parts of c rows has the errors of its n/c parts and of adding
    them.
    """
    inner, part, u = 3072, KC * KU, 2.0**-24
    weight, x = normal(inner, 768), normal(64, inner)
    error = Fp32Weight.of(weight, None, isa=isa)(x).double() - x.double() @ weight.double()
    parts = inner / part
    assert error.square().mean() < u**2 * (inner * part / 6 + part * parts * (parts + 1) / 6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions_are_exact_from_the_smallest_to_the_largest(isa: Isa, activation: str) -> None:
    sizes = torch.cat([torch.logspace(-30, 4, 2000), torch.linspace(0, 14, 4000)])
    x = torch.cat([sizes, -sizes, torch.tensor([0.0, torch.inf])])[:, None]
    found = Fp32Weight.of(torch.ones(1, 1), None, activation, isa)(x)[:, 0].double()
    function, units, vanishing = EXACT[activation]
    exact = function(x[:, 0].double())
    assert torch.equal(found.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    error, bound = (found - exact).abs()[finite], units * 2.0**-24 * exact.abs()[finite] + vanishing
    assert (error <= bound).all(), f"{(error / exact.abs()[finite] * 2**24).nan_to_num().max():.1f} units"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_for_every_number_of_rows_and_threads(isa: Isa, threads: int) -> None:
    counts = [*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 600]
    check_batch_invariance(Fp32Weight.of(normal(500, 200), None, "gelu_tanh", isa), normal(600, 500), threads, counts)


def test_rows_may_have_any_stride_or_be_transposed(isa: Isa) -> None:
    check_strides(Fp32Weight.of(normal(64, 96), None, isa=isa), normal(48, 256))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_are_visible(isa: Isa, bad: float) -> None:
    check_nan_and_infinity(
        lambda activation: Fp32Weight.of(normal(64, 96), normal(96), activation, isa), normal(40, 64), bad
    )


def test_without_the_instructions_or_numba_or_with_wrong_results_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a kernel that is kept needs no numba
    fresh = fp32_isa_works.__wrapped__
    assert not fp32_works("cuda", torch.float32)
    assert not fp32_works("cpu", torch.bfloat16)
    assert not fresh(find(NONE))
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
            patch.delitem(fp32_backend(chosen()).__dict__, "kernel", raising=False)
            assert not fresh(chosen())
    call = Fp32Weight.__call__
    monkeypatch.setattr(Fp32Weight, "__call__", lambda self, x: call(self, x) + 1)
    assert not fresh(chosen())
