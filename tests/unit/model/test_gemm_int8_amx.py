"""GEMM in int8 on AMX: exactly the formula, computed by torch in float64, and batch-invariant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model import load_model
from headrace.model.hub import DEMO, ModelError
from headrace.model.kernels.gemm_int8_amx import Int8Weight
from tests.instruction_sets import needs_amx_int8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rounded(x: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Each row, or column, as whole numbers from -127 to 127 times a scale, in float64; and what each may be off by.

    Float32 rounds the scale and the quotient: a number may go to either side if it is halfway between two whole ones,
    within four roundings of 127.
    """
    scale = x.double().abs().amax(dimension, keepdim=True) / 127
    whole = torch.where(scale > 0, x.double() / scale, 0.0)
    halfway = ((whole - whole.floor()) - 0.5).abs() < 127 * 4 * 2.0**-24
    return whole.round() * scale, halfway * scale


@needs_amx_int8
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize(("inner", "outer"), [(64, 1), (99, 31), (192, 32), (64, 50), (768, 2304), (3072, 768)])
def test_it_computes_the_formula(inner: int, outer: int, activation: str | None) -> None:
    weight, bias, x = normal(inner, outer), normal(outer), normal(300, inner).bfloat16()
    (rows, rows_off), (columns, columns_off) = rounded(x, 1), rounded(weight, 0)
    exact = rows @ columns + bias.double()
    sizes = rows.abs() @ columns.abs() + bias.double().abs()  # what rounding is in proportion to
    halfway = rows_off @ (columns.abs() + columns_off) + rows.abs() @ columns_off
    # Sums of whole numbers are exact; to make a number of one takes two scales and the bias, and GELU passes on up to
    # 1.13 of an error. GELU divides by a reciprocal of 14 bits; the result is rounded to bfloat16's 8 bits.
    bound = 1.2 * (halfway + 8 * 2.0**-24 * sizes)
    if activation:
        exact = F.gelu(exact, approximate="tanh")
    product = Int8Weight.of(weight, bias, activation)
    bound = bound + exact.abs() * (2.0**-8 + 2.0**-13 * bool(activation))
    for count in (1, 15, 16, 17, 33, 64, 300):
        found = product(x[:count])
        assert found.shape == (count, outer)
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact[:count]).abs() <= bound[:count]).all(), f"{count} rows"
    assert ((product.weight.double() - columns).abs() <= columns_off + 2.0**-22 * columns.abs()).all()


@needs_amx_int8
def test_whole_numbers_are_quantized_without_loss() -> None:
    whole = torch.randint(-127, 128, (40, 64), generator=torch.Generator().manual_seed(1)).bfloat16()
    whole[:, 0] = 127
    weight = torch.randint(-127, 128, (64, 96), generator=torch.Generator().manual_seed(2)).float()
    weight[0] = -127
    found = Int8Weight.of(weight, None)(whole)
    assert torch.equal(found, (whole.double() @ weight.double()).bfloat16())


@needs_amx_int8
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_for_every_number_of_rows_and_threads(threads: int) -> None:
    product, x = Int8Weight.of(normal(128, 200), None, "gelu_tanh"), normal(600, 128).bfloat16()
    torch.set_num_threads(2)
    expected = product(x)
    torch.set_num_threads(threads)
    for count in (*range(1, 35), 63, 64, 65, 511, 512, 513, 600):
        assert torch.equal(product(x[:count]), expected[:count]), f"{count} rows"
        assert torch.equal(product(x[600 - count :]), expected[600 - count :]), f"the last {count} rows"


@needs_amx_int8
def test_rows_may_have_any_stride_or_be_transposed() -> None:
    product, x = Int8Weight.of(normal(64, 96), None), normal(48, 256).bfloat16()
    expected = product(x[:, 64:128].contiguous())
    assert torch.equal(product(x[:, 64:128]), expected)
    assert torch.equal(product(x[:, 64:128].t().contiguous().t()), expected)


@needs_amx_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_are_visible(bad: float) -> None:
    product, x = Int8Weight.of(normal(64, 96), normal(96)), normal(40, 64).bfloat16()
    clean = product(x)
    broken = x.clone()
    broken[7, 3] = bad
    found = product(broken)
    assert not found[7].isfinite().any()
    assert torch.equal(found[:7], clean[:7])
    assert torch.equal(found[8:], clean[8:])


@needs_amx_int8
def test_rows_and_columns_of_zeros_give_the_bias() -> None:
    weight, bias, x = normal(64, 40), normal(40), normal(3, 64).bfloat16()
    weight[:, 5], x[1] = 0, 0
    found = Int8Weight.of(weight, bias)(x)
    assert torch.equal(found[1], bias.bfloat16())
    assert torch.equal(found[:, 5], bias[5].bfloat16().expand(3))


@needs_amx_int8
def test_rows_are_rounded_to_the_nearest_and_to_even_between_two() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, 3.0] + [0.0] * 58, [0.0] * 64]).bfloat16()
    found = Int8Weight.of(torch.eye(64), None)(x)  # each column is one of the whole numbers
    assert found[0, :6].tolist() == [127, 0, 2, 0, -2, 3]
    assert not found[1].any()


@needs_amx_int8
def test_the_model_in_int8_takes_a_quarter_of_the_memory_and_agrees_closely() -> None:
    exact, whole = load_model("demo", device="cpu", dtype="float32"), load_model("demo", device="cpu", dtype="int8")
    assert whole.gemm_backend == "int8"
    assert whole.dtype == torch.bfloat16
    assert exact.gemm_backend != "int8"
    block = whole.blocks[0].c_fc.gemm
    assert isinstance(block, Int8Weight)
    assert block.packed.nbytes * 4 == exact.blocks[0].c_fc.weight.nbytes
    tokens = torch.tensor([[(7919 * i) % 50257 for i in range(60)]])
    p, q = exact.logits(tokens)[0].log_softmax(-1), whole.logits(tokens)[0].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert 0 < divergence < 0.05


def test_int8_on_an_unsupported_machine_or_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("headrace.model.weights.int8_works", lambda _: False)
    with pytest.raises(ModelError, match=r"dtype 'int8' on cpu: it needs .* HEADRACE_DTYPE=bfloat16"):
        load_model("demo", device="cpu", dtype="int8")
    monkeypatch.setattr("headrace.model.weights.int8_works", lambda _: True)
    config = json.loads((DEMO / "config.json").read_text()) | {"n_inner": 70_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(DEMO / "model.safetensors")
    with pytest.raises(ModelError, match=r"n_inner is 70000; in int8 it must be at most 65536"):
        load_model(tmp_path, device="cpu", dtype="int8")
