"""The compiled attention of decoding rows: correct, and batch-invariant."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headrace.model.kernels.attention
import headrace.model.kernels.openmp
from headrace.model.kernels.attention import DecodeKernel, DecodeRows, LayerRules, decode_kernel, kernel_for

POSITIONS = 96
RULES = LayerRules.of([0.3], [None])
#: Widths that fill half of a vector and several.
WAYS = [(8, torch.float32), (64, torch.float32), (64, torch.bfloat16)]


def kernel(width: int, dtype: torch.dtype) -> DecodeKernel:
    made = decode_kernel(width, dtype, "cpu")
    assert made is not None, "the kernel cannot be compiled here"
    return made


class Case:
    """R rows, each with its own cache. cache: [k/v, R, H, positions, D]; qkv: [R, q/k/v, H, D]."""

    def __init__(self, lengths: list[int], *, heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.cache = torch.randn(2, len(lengths), heads, POSITIONS, width, generator=generator).to(dtype)
        self.qkv = torch.randn(len(lengths), 3, heads, width, generator=generator).to(dtype)

    def run(self, rows: list[int]) -> Tensor:
        """Attention of these rows together. [rows, H, D]"""
        _, _, heads, _, width = self.cache.shape
        row_bytes = self.cache.stride(1) * self.cache.itemsize
        k, v = (np.array([[tensor.data_ptr() + row * row_bytes for row in rows]]) for tensor in self.cache)
        lengths = np.array([self.lengths[row] for row in rows])
        qkv = self.qkv[rows]
        out = torch.full((len(rows), heads, width), 7.0, dtype=self.cache.dtype)
        counts = np.ones(len(rows), dtype=np.int64)
        where = DecodeRows.of(k, v, np.full(len(rows), self.cache.stride(2)), lengths, counts, heads)
        kernel(width, self.cache.dtype)(0, qkv[:, 0], qkv[:, 1], qkv[:, 2], out, where, RULES)
        return out

    def expected(self, row: int) -> Tensor:
        """The formula in float64, with the new key and value in place. [H, D]"""
        length = self.lengths[row]
        q, new_k, new_v = self.qkv[row].double()
        k, v = self.cache[:, row, :, :length].double()
        k[:, -1], v[:, -1] = new_k, new_v
        weights = (k @ q[:, :, None] * 0.3).softmax(1)  # [H, length, 1]
        return (weights * v).sum(1)

    def allowed(self, row: int, expected: Tensor) -> Tensor:
        """How far rounding may take a row from the formula, typically times eight. [H, D]

        A sum of n terms is off by about sqrt(n) roundings of the root of the sum of their squares; a score that is off
        by e changes its share by a factor of 1 + e.
        """
        length, width, single = self.lengths[row], self.cache.shape[-1], 2.0**-24
        unit = single if self.cache.dtype == torch.float32 else 2.0**-8
        q, k, v = self.qkv[row, 0].double(), self.cache[0, row].double(), self.cache[1, row].double()
        score = single * (width**0.5 * 0.3 * (k.square() @ q.square()[:, :, None]).amax().sqrt() + 4)
        return 8 * (score + single * length**0.5) * v.abs().amax() * torch.ones_like(expected) + unit * expected.abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 8, 64])
def test_it_computes_the_formula_and_keeps_the_new_key_and_value(width: int, dtype: torch.dtype) -> None:
    case = Case([1, 2, 31, 32, 33, POSITIONS], heads=3, width=width, dtype=dtype)
    before = case.cache.clone()
    out = case.run(list(range(6)))
    for row, length in enumerate(case.lengths):
        expected = case.expected(row)
        assert ((out[row].double() - expected).abs() <= case.allowed(row, expected)).all(), f"row {row}"
        before[:, row, :, length - 1] = case.qkv[row, 1:]
    assert torch.equal(case.cache, before), "something else was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("longest", [95, 96])
def test_attention_is_batch_invariant(dtype: torch.dtype, threads: int, width: int, longest: int) -> None:
    lengths = [5, 80, 17, longest, 1, 15, 47]
    case = Case(lengths, heads=4, width=width, dtype=dtype)
    torch.set_num_threads(1)
    alone = [case.run([row])[0] for row in range(len(lengths))]
    torch.set_num_threads(threads)
    for rows in ([0, 1, 2, 3, 4, 5, 6], [6, 3, 1], [2, 4], [5]):
        for row, out in zip(rows, case.run(rows), strict=True):
            assert torch.equal(out, alone[row]), (row, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiling_process_computes_the_same_bits_as_those_that_load_from_the_cache(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = Case([5, 80, 17, 96, 1, 40, 41], heads=4, width=64, dtype=dtype)
    outs = []
    for _ in range(2):
        kernel_for.cache_clear()
        outs.append(case.run(list(range(7))))
    assert len(list(tmp_path.glob("headrace/*.kernel"))) == 1
    assert torch.equal(*outs)


@pytest.mark.parametrize(("width", "dtype"), WAYS)
def test_a_broken_row_is_nan_and_its_neighbours_are_not(width: int, dtype: torch.dtype) -> None:
    for broken in (float("nan"), float("inf")):
        case = Case([20, 20, 20], heads=2, width=width, dtype=dtype)
        case.cache[0, 1, 1, 3, 5] = broken
        out = case.run([0, 1, 2])
        assert out[1, 1].isnan().all()
        assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize(("width", "dtype"), WAYS)
@pytest.mark.parametrize("length", [3, 40])
def test_scores_far_apart_do_not_overflow(width: int, dtype: torch.dtype, length: int) -> None:
    case = Case([length], heads=1, width=width, dtype=dtype)
    case.cache[0, 0, 0, :2] = torch.tensor([[500.0], [-500.0]])
    case.qkv[0, 0] = 1.0
    assert torch.allclose(case.run([0])[0], case.cache[1, 0, :, 0], atol=1e-6)


def test_heads_are_partitioned_by_the_positions_they_read() -> None:
    torch.set_num_threads(2)
    zeros = np.zeros((1, 3))
    where = DecodeRows.of(zeros, zeros, np.zeros(3), np.array([10, 10, 40]), np.array([1, 1, 1]), 2)
    assert where.partitions.tolist() == [0, 4, 6]  # 20 + 20 + 80 positions: halves of 60 meet inside the last row
    where = DecodeRows.of(zeros, zeros, np.zeros(3), np.array([10, 10, 10]), np.array([4, 1, 1]), 2)
    assert where.partitions.tolist() == [0, 1, 6]  # 80 + 20 + 20: the second half begins inside the first slot
    assert (where.first.tolist(), where.longest) == ([0, 4, 5], 13)
    torch.set_num_threads(1)
    one = np.ones(1, dtype=np.int64)
    assert DecodeRows.of(zeros[:, :1], zeros[:, :1], np.zeros(1), 9 * one, one, 12).partitions.tolist() == [0, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [16, 64])
def test_rows_of_one_slot_have_the_same_bits_as_one_by_one(dtype: torch.dtype, threads: int, width: int) -> None:
    counts, lengths, heads = np.array([1, 4, 2]), np.array([40, 14, 1]), 4
    one_by_one, at_once = (Case([0] * 7, heads=heads, width=width, dtype=dtype) for _ in range(2))

    def run(case: Case, slots: list[int], lengths: Any, counts: Any, rows: list[int]) -> Tensor:
        starts = np.array(slots) * case.cache.stride(1) * case.cache.itemsize
        k, v = ((tensor.data_ptr() + starts)[None] for tensor in case.cache)
        out, qkv = torch.empty(len(rows), heads, width, dtype=dtype), case.qkv[rows]
        places = DecodeRows.of(k, v, np.full(len(slots), case.cache.stride(2)), lengths, counts, heads)
        kernel(width, dtype)(0, qkv[:, 0], qkv[:, 1], qkv[:, 2], out, places, RULES)
        return out

    torch.set_num_threads(1)
    expected: list[Tensor] = []
    row = 0
    for slot, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        for i in range(count):
            expected.append(run(one_by_one, [slot], np.array([length + i]), np.array([1]), [row + i])[0])
        row += count
    torch.set_num_threads(threads)
    assert torch.equal(run(at_once, [0, 1, 2], lengths, counts, list(range(7))), torch.stack(expected))
    assert torch.equal(at_once.cache, one_by_one.cache)


def test_heads_that_are_not_contiguous_are_refused() -> None:
    case = Case([4], heads=2, width=8, dtype=torch.float32)
    case.qkv = case.qkv.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="heads must be contiguous"):
        case.run([0])


def test_unsupported_types_use_torch() -> None:
    assert decode_kernel(64, torch.float16, "cpu") is None
    assert decode_kernel(64, torch.bfloat16, "cuda") is None


def test_without_numba_or_openmp_or_with_wrong_results_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a kernel that is kept needs no numba
    import_ = builtins.__import__

    def no_numba(name: str, *rest: Any) -> Any:
        if name == "numba":
            raise ImportError("No module named 'numba'")
        return import_(name, *rest)

    def fresh(width: int, dtype: torch.dtype, device: str) -> DecodeKernel | None:
        kernel_for.cache_clear()
        return decode_kernel(width, dtype, device)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_numba)
        assert fresh(8, torch.float32, "cpu") is None
    with monkeypatch.context() as patch:
        patch.setattr(headrace.model.kernels.openmp.Path, "read_text", lambda *_, **__: "")
        patch.setattr(headrace.model.kernels.attention, "team", headrace.model.kernels.openmp.team.__wrapped__)
        assert fresh(8, torch.float32, "cpu") is None
    call = DecodeKernel.__call__
    monkeypatch.setattr(DecodeKernel, "__call__", lambda self, *a: (call(self, *a), a[4].add_(1))[0])
    assert fresh(8, torch.float32, "cpu") is None
