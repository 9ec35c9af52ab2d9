"""How rows are packed for the tile unit, computed without it: any width, filled up with zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from headrace.model.kernels import gemm_bf16_amx, gemm_int8_amx
from headrace.model.kernels.isa import find
from headrace.model.kernels.ops import ARG, ARG_WORDS, OP, OP_WORDS
from headrace.model.kernels.target import compiling_for
from tests.instruction_sets import needs_avx512

ROWS = 21
Bytes = npt.NDArray[np.uint8]


def packed(pack: Any, x: Tensor, ku: int) -> tuple[Bytes, Bytes, npt.NDArray[np.float32]]:
    """The packed rows, 64 bytes for each step; the rows that fill up the last tile; and the scales of the rows."""
    from numba import njit

    width, steps, panels = x.shape[1], -(-x.shape[1] // ku), -(-ROWS // 16)
    memory, scales = np.full(panels * steps * 1024, 0xAA, np.uint8), np.zeros(ROWS, np.float32)
    op, program = np.zeros(OP_WORDS, np.int64), np.zeros(ARG_WORDS, np.int64)
    op[[OP.width, OP.k_steps]] = width, steps
    program[[ARG.packed_rows, ARG.row_scales]] = memory.ctypes.data, scales.ctypes.data

    def pack_rows(program: Any, op: Any, source: int, row_bytes: int, count: int) -> None:
        for row in range(count):
            pack(program, op, row, source + row * row_bytes if row < ROWS else 0)

    with compiling_for(find("avx512")):
        njit(pack_rows)(program, op, x.data_ptr(), 2 * width, 16 * panels)
    rows = memory.reshape(panels, steps, 16, 64).transpose(0, 2, 1, 3).reshape(16 * panels, steps * 64)
    return rows[:ROWS], rows[ROWS:], scales


@needs_avx512
@pytest.mark.parametrize("width", [1, 31, 45, 64, 75, 160])
def test_rows_of_every_width_are_filled_up_with_zeros(width: int) -> None:
    x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    found, rest, _ = packed(gemm_bf16_amx._pack(), x, gemm_bf16_amx.KU)
    expected = np.zeros(found.view(np.int16).shape, np.int16)
    expected[:, :width] = x.view(torch.int16).numpy()
    assert np.array_equal(found.view(np.int16), expected)
    assert not rest.any()

    found, rest, scales = packed(gemm_int8_amx._pack(), x, gemm_int8_amx.KU)
    numbers = x.float().numpy()
    largest = np.abs(numbers).max(axis=1)
    whole = np.zeros(found.shape, np.int8)
    whole[:, :width] = np.rint(numbers * (np.float32(127) / largest)[:, None])
    assert np.array_equal(found.view(np.int8), whole)
    assert np.array_equal(scales, largest / np.float32(127))
    assert not rest.any()
