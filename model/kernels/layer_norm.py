"""Layer norm of one row, for compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.model.kernels.intrinsics import FAST_MATH, cast, round_to_bfloat16
from headrace.model.kernels.ops import OP


def layer_norm(ku: int, *, bf16: bool) -> Any:
    """Build norm(op, row, source, target) -> target: biased variance, epsilon inside the root.

    `source` and `target` are addresses of a row. The result has the type of the row; a second copy is written to the
    op's `normed_out` if that is set.
    """
    import numba
    from numba import carray, types

    elements = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.float32))
    floats, real = cast(types.int64, types.CPointer(types.float32)), cast(types.int64, types.float64)
    value, rounded, itemsize = cast(types.uint32, types.float32), round_to_bfloat16(), 2 if bf16 else 4

    @numba.njit(inline="always")
    def read(x: Any) -> Any:
        return value(np.uint32(x) << np.uint32(16)) if bf16 else x

    @numba.njit(inline="always")
    def store(x: Any) -> Any:
        return rounded(x) if bf16 else x

    @numba.njit(fastmath=FAST_MATH, error_model="numpy")
    def moments(x: Any, width: int) -> Any:
        total = np.float32(0)
        for i in range(width):
            total += read(x[i])
        mean, squares = total / np.float32(width), np.float32(0)
        for i in range(width):
            squares += (read(x[i]) - mean) * (read(x[i]) - mean)
        return mean, squares / np.float32(width)

    @numba.njit(error_model="numpy")
    def norm(op: Any, row: int, source: int, target: int) -> int:
        width = op[OP.k_steps] * ku
        x, out = carray(elements(source), width), carray(elements(target), width)
        weight, bias = carray(floats(op[OP.norm_weight]), width), carray(floats(op[OP.norm_bias]), width)
        mean, variance = moments(x, width)
        scale = np.float32(1) / np.float32(np.sqrt(variance + np.float32(real(op[OP.epsilon_bits]))))
        for i in range(width):
            out[i] = store((read(x[i]) - mean) * scale * weight[i] + bias[i])
        if op[OP.normed_out] != 0:
            copy = carray(elements(op[OP.normed_out] + row * width * itemsize), width)
            for i in range(width):
                copy[i] = out[i]
        return target

    return norm
