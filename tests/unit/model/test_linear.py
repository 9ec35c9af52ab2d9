"""Linear layers are batch-invariant; equal results for equal requests depend on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import headrace.model.linear
from headrace.model.activation_functions import FUNCTIONS, activate
from headrace.model.config import ACTIVATIONS
from headrace.model.kernels.onednn import OneDnnWeight, TorchWeight, packing_works
from headrace.model.kernels.row_range import RowRange, matmul_rows, measure_rows
from headrace.model.linear import Linear

COUNTS = [*range(1, 41), 63, 64, 65, *range(120, 137), 191, 192, 193, 255, 256, 257, 258, 300, 511, 512, 513, 700]

#: The functions as transformers' activations.py defines them.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear(inner: int, outer: int, *, gelu: bool = False) -> Linear:
    return Linear.of(normal(inner, outer), normal(outer), activation="gelu_tanh" if gelu else None)


@pytest.mark.parametrize(
    ("inner", "outer"), [(128, 384), (128, 128), (128, 512), (512, 128), (768, 2304), (768, 768), (3072, 768)]
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_a_row_has_the_same_bits_for_every_number_of_rows(
    inner: int, outer: int, threads: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headrace.model.linear, "fp32_works", lambda *_: False)
    monkeypatch.setattr(headrace.model.linear, "packing_works", lambda *_: packed)
    torch.set_num_threads(threads)
    product = linear(inner, outer, gelu=outer > inner)
    assert isinstance(product.gemm, OneDnnWeight if packed else TorchWeight)
    x = normal(700, inner)
    expected = product(x)
    wide = inner * outer > 512 * 512  # these take long: the first rows of every other number, the last of the others
    for i, count in enumerate(COUNTS):
        if not wide or i % 2:
            assert torch.equal(product(x[:count]), expected[:count]), f"{count} rows"
        if not wide or not i % 2:
            assert torch.equal(product(x[700 - count :]), expected[700 - count :]), f"the last {count} rows"


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 17, 200, 512, 3072, 40_000])
def test_an_activation_function_gives_a_row_the_same_bits_for_every_number_of_rows(
    name: str, dtype: torch.dtype, width: int
) -> None:
    torch.set_num_threads(2)
    rows = 70 if width <= 512 else 24  # more than are computed together
    x = normal(rows, width).to(dtype) * 3
    expected = activate(name, x)
    for count in [count for count in (1, 2, 3, 5, 10, 11, 23, 31, 64, 69) if count < rows]:
        assert torch.equal(activate(name, x[:count]), expected[:count]), f"{count} rows"
        assert torch.equal(activate(name, x[rows - count :]), expected[rows - count :]), f"the last {count} rows"


@pytest.mark.parametrize("width", [128, 768])
@pytest.mark.parametrize("ours", [True, False])
def test_the_head_has_the_same_bits_for_every_number_of_rows(
    width: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ours:
        monkeypatch.setattr(headrace.model.linear, "fp32_works", lambda *_: False)
    head = Linear.of(normal(50257, width).t())
    x = normal(200, width)
    expected = head(x)
    for count in (1, 2, 3, 16, 17, 33, 63, 64, 65, 127, 128, 129, 150, 200):
        assert torch.equal(head(x[:count]), expected[:count]), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("ours", [True, False])
def test_the_result_is_that_of_the_formula(
    dtype: torch.dtype, activation: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ours:
        monkeypatch.setattr(headrace.model.linear, "fp32_works", lambda *_: False)
        monkeypatch.setattr(headrace.model.linear, "bf16_amx_works", lambda *_: False)
    weight, bias, x = normal(64, 48), normal(48), normal(701, 64)
    product = Linear.of(weight.to(dtype), bias.to(dtype), activation=activation)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    expected = x.double() @ weight.double() + bias.double()
    sizes = x.double().abs() @ weight.double().abs() + bias.double().abs()
    # 64 products and the bias are summed in float32, in any order (Higham 2002, section 3.1), and rounded to the type;
    # twice, if the function is computed from what is rounded; no slope is above 1.13.
    single, unit = 2.0**-24, {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    allowed = 66 * single * sizes + unit * expected.abs()
    if activation is not None:
        expected = FORMULAS[activation](expected)
        allowed = 1.13 * allowed + 8 * single * sizes + unit * expected.abs()
    assert ((product(x).double() - expected).abs() <= allowed * 1.01).all()
    assert product(x).dtype == dtype
    assert torch.equal(product.weight, weight)
    assert product.bias is not None
    assert torch.equal(product.bias, bias)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 128, 129, 257, 1024, 1031])
def test_a_gemm_never_runs_outside_the_measured_range(count: int) -> None:
    seen = []

    def product(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows * 2

    x = torch.arange(count * 3, dtype=torch.float32).view(count, 3)
    assert torch.equal(matmul_rows(product, x, RowRange(16, 128)), x * 2)
    assert all(16 <= rows <= 128 for rows in seen)


def test_the_measured_range_is_the_true_range_of_the_gemm() -> None:
    """A GEMM whose last bits change below 17 rows, so that at least 24 rows are run, and above 320 rows."""

    def product(x: Tensor) -> Tensor:
        return x * (1.0 + 2.0**-20 * ((len(x) > 16) + (len(x) > 320)))

    assert measure_rows(product, 8, 8, torch.float32) == RowRange(24, 320)


def test_another_range_is_used_if_the_one_around_a_full_batch_is_too_narrow() -> None:
    def product(x: Tensor) -> Tensor:
        return x * (1.0 + 2.0**-20 * (60 < len(x) < 70))

    assert measure_rows(product, 8, 8, torch.float32) == RowRange(80, 512)


def test_if_all_numbers_of_rows_give_different_bits_all_are_allowed() -> None:
    assert measure_rows(lambda x: x * (1.0 + 2.0**-20 * len(x)), 8, 8, torch.float32) == RowRange()


def test_without_the_private_operators_torchs_public_ones_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> OneDnnWeight:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(OneDnnWeight, "of", gone)
    assert not packing_works.__wrapped__("cpu", torch.float32)
    assert not packing_works.__wrapped__("cuda", torch.bfloat16)
    assert not packing_works.__wrapped__("cpu", torch.float16)


def test_a_packed_gemm_with_wrong_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    call = OneDnnWeight.__call__
    monkeypatch.setattr(OneDnnWeight, "__call__", lambda self, x: call(self, x) + 1)
    assert not packing_works.__wrapped__("cpu", torch.float32)
