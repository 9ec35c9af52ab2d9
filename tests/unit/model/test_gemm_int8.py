"""GEMM in int8 on vector units: exact integer sums, with the same bits on every instruction set."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.model import load_model
from headrace.model.kernels.epilogue import ADD_RESIDUAL, GELU_TANH, NOTHING, TANH, epilogue, vector_epilogue
from headrace.model.kernels.gemm_int8 import VectorInt8Weight
from headrace.model.kernels.gemm_int8_amx import MAX_WIDTH, Int8Weight
from headrace.model.kernels.isa import Isa, chosen, find
from headrace.model.kernels.ops import ARG
from headrace.model.kernels.program import Program
from headrace.model.kernels.target import compiling_for
from tests.guarded_memory import guarded
from tests.instruction_sets import needs_amx_int8, needs_avx2, needs_avx512, needs_vnni
from tests.unit.model.test_gemm_int8_amx import rounded
from tests.unit.model.test_rungs import numbers

#: SHA-256 of the results of `digest`; made by an AMD EPYC (Zen 4).
DIGEST = "356de1479186b8aea8d82d73ed5433d32a1127f2f378279a188ac1c32b4734ef"
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 125, 126, 127, 128, 129)


@pytest.fixture(
    params=[
        pytest.param("avx512_vnni", marks=needs_vnni),
        pytest.param("avx512", marks=needs_avx512),
        pytest.param("avx2", marks=needs_avx2),
        pytest.param("avx2 without AVX-VNNI", marks=needs_avx2),
    ]
)
def isa(request: pytest.FixtureRequest) -> Isa:
    found = find(request.param.split()[0])
    return dataclasses.replace(found, adds=()) if "without" in request.param else found


def weights(width: int, out: int, isa: Isa, activation: str | None = None) -> VectorInt8Weight:
    return VectorInt8Weight.of(numbers(width, out, seed=2), numbers(out, seed=3), activation, isa)


def rows_of(count: int, width: int) -> Tensor:
    return (3 * numbers(count, width)).bfloat16()


def digest(isa: Isa) -> str:
    parts = [
        weights(width, out, isa, activation)(rows_of(130, width)).view(torch.int16).numpy().tobytes()
        for width, out in ((64, 1), (192, 100), (768, 770), (3072, 48))
        for activation in (None, "gelu_tanh")
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_bits_are_those_of_another_machine(isa: Isa) -> None:
    assert digest(isa) == DIGEST


@needs_amx_int8
def test_the_tile_unit_has_the_same_bits() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VectorInt8Weight, "of", lambda *given: Int8Weight.of(*given[:3]))
        assert digest(find("amx")) == DIGEST


@needs_avx512
@pytest.mark.parametrize("then", [NOTHING, GELU_TANH, TANH, ADD_RESIDUAL])
@pytest.mark.parametrize(("columns", "bias_bytes"), [(32, 0), (20, 0), (20, 128)])
def test_the_epilogue_of_the_tile_unit_has_the_bits_of_all_others(then: int, columns: int, bias_bytes: int) -> None:
    """It runs without the tile unit. One column and one row have results that are denormal."""
    rows, generator = 40, torch.Generator().manual_seed(5)
    sums = torch.randint(-(2**24), 2**24, (rows, 32), generator=generator, dtype=torch.int32)
    column_scales, row_scales, bias = (numbers(n, seed=n).abs() * 1e-3 for n in (32, rows, 32 * rows))
    bias[3], column_scales[3], row_scales[2] = 0, 2.0**-120, 2.0**-30
    outs = [numbers(rows, 32, seed=9).bfloat16() for _ in range(2)]
    for out, ours in zip(outs, (True, False), strict=True):
        biases = bias.data_ptr(), bias_bytes
        given = (sums, rows, columns, out, 64, 0, 0, biases, column_scales, row_scales, then)
        finish_rows_of(tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in given), amx=ours)
    assert torch.equal(*(out.view(torch.int16) for out in outs))


def finish_rows_of(target: tuple[Any, ...], *, amx: bool) -> None:
    """Run the epilogue of the tile unit, or that of vector units, on all rows of a target."""
    from numba import cfunc, types

    spare = torch.zeros(32)
    place, rows, nothing = spare.data_ptr(), target[1], (0,) * len(ARG)
    assembled, vectors = epilogue(32, int8=True), vector_epilogue(32, bf16=True, int8=True)

    def run_amx() -> None:
        assembled(nothing, target, 0, rows, place)

    def run() -> None:
        vectors(target, place)

    with compiling_for(chosen()):
        cfunc(types.void(), nopython=True)(run_amx if amx else run).ctypes()


def test_a_row_has_the_same_bits_for_every_number_of_rows(isa: Isa) -> None:
    product, x = weights(192, 100, isa, "gelu_tanh"), rows_of(130, 192)
    expected = product(x)
    for count in ROWS:
        assert torch.equal(product(x[:count]), expected[:count]), f"{count} rows"
        assert torch.equal(product(x[130 - count :]), expected[130 - count :]), f"the last {count} rows"


@pytest.mark.parametrize(("inner", "outer"), [(1, 3), (64, 1), (99, 50), (768, 96)])
def test_it_computes_the_formula(isa: Isa, inner: int, outer: int) -> None:
    product, x = weights(inner, outer, isa), rows_of(40, inner)
    (rows, rows_off), (columns, columns_off) = rounded(x, 1), rounded(numbers(inner, outer, seed=2), 0)
    exact = rows @ columns + numbers(outer, seed=3).double()
    halfway = rows_off @ (columns.abs() + columns_off) + rows.abs() @ columns_off
    bound = 1.2 * (halfway + 8 * 2.0**-24 * (rows.abs() @ columns.abs() + 1)) + exact.abs() * 2.0**-8
    assert ((product(x).double() - exact).abs() <= bound).all()
    assert ((product.weight.double() - columns).abs() <= columns_off + 2.0**-22 * columns.abs()).all()


def test_the_largest_numbers_do_not_overflow(isa: Isa) -> None:
    for sign in (1, -1):
        weight, x = torch.full((MAX_WIDTH, 3), 127.0 * sign), torch.full((2, MAX_WIDTH), 127.0).bfloat16()
        expected = torch.full((2, 3), sign * 127.0 * 127 * MAX_WIDTH).bfloat16()
        assert torch.equal(VectorInt8Weight.of(weight, None, isa=isa)(x), expected)


def test_sums_that_could_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="has 65552 rows; it must have at most 65536"):
        VectorInt8Weight.of(torch.zeros(MAX_WIDTH + 16, 1), None, isa=find("avx2"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_are_visible(isa: Isa, bad: float) -> None:
    product, x = weights(64, 96, isa), rows_of(40, 64)
    clean = product(x)
    x[7, 3] = bad
    found = product(x)
    assert not found[7].isfinite().any()
    assert torch.equal(found[:7], clean[:7])
    assert torch.equal(found[8:], clean[8:])


def test_rows_and_columns_of_zeros_and_of_tiny_numbers_give_the_bias(isa: Isa) -> None:
    weight, bias, x = numbers(64, 40), numbers(40, seed=3), rows_of(3, 64)
    weight[:, 5], x[1], x[2] = 0, 0, 1e-39
    found = VectorInt8Weight.of(weight, bias, isa=isa)(x)
    assert torch.equal(found[1:], bias.bfloat16().expand(2, 40))
    assert torch.equal(found[:, 5], bias[5].bfloat16().expand(3))


@pytest.mark.parametrize("at_start", [False, True])
def test_no_memory_outside_of_the_buffers_is_touched(isa: Isa, at_start: bool) -> None:
    guard = functools.partial(guarded, at_start=at_start)
    for rows, width, out in ((1, 64, 50), (9, 35, 1), (130, 192, 96)):
        x, made = rows_of(rows, width), weights(width, out, isa, "gelu_tanh")
        expected, result, given = made(x), guard(torch.empty(rows, out, dtype=torch.bfloat16)), guard(x)
        parts = {name: guard(getattr(made, name)) for name in ("packed", "biases", "scales")}
        product = dataclasses.replace(made, **parts)
        program = Program(product.backend, rows, width)
        inner = guard(program._packed_rows), guard(program._scratch), guard(program._row_scales)
        program._arguments[[ARG.packed_rows, ARG.scratch, ARG.row_scales]] = [each.data_ptr() for each in inner]
        addresses = {"source": given.data_ptr(), "source_row_bytes": width * 2, "out": result.data_ptr()}
        op = product.op._replace(**addresses, out_row_bytes=out * 2)
        program.run(np.array([op], dtype=np.int64))
        assert torch.equal(result, expected)


@needs_avx2
def test_a_model_in_int8_runs_on_this_machine_and_agrees_closely() -> None:
    exact, whole = load_model("demo", device="cpu", dtype="float32"), load_model("demo", device="cpu", dtype="int8")
    assert whole.gemm_backend == "int8"
    assert whole.dtype == torch.bfloat16
    if chosen().name != "amx":
        assert isinstance(whole.blocks[0].c_fc.gemm, VectorInt8Weight)
    tokens = torch.tensor([[(7919 * i) % 50257 for i in range(60)]])
    p, q = exact.logits(tokens)[0].log_softmax(-1), whole.logits(tokens)[0].log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 0.05
