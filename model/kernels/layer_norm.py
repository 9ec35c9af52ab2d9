"""Layer norm of one row, for compiled code: the same bits on every instruction set.

Mean and variance are sums of 16 lanes, folded in a fixed order (vectors.py). The variance is that of the differences to
the mean, biased, and epsilon is inside the root.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.ops import OP


def layer_norm(*, bf16: bool) -> Any:
    """Build norm(op, row, source, target) -> target.

    `source` and `target` are addresses of a row. The result has the type of the row; a second copy is written to the
    op's `normed_out` if that is set.
    """
    import numba
    from numba import carray, types

    elements = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.float32))
    real, itemsize = cast(types.int64, types.float64), 2 if bf16 else 4
    norm_row = layer_norm_row(bf16=bf16).intrinsic()

    @numba.njit(error_model="numpy")
    def norm(op: Any, row: int, source: int, target: int) -> int:
        width = op[OP.width]
        epsilon = np.float32(real(op[OP.epsilon_bits]))
        bias = op[OP.norm_bias] + row * op[OP.norm_bias_row_bytes]
        norm_row(source, target, width, op[OP.norm_weight], bias, epsilon)
        if op[OP.normed_out] != 0:
            out = carray(elements(target), width)
            copy = carray(elements(op[OP.normed_out] + row * width * itemsize), width)
            for i in range(width):
                copy[i] = out[i]
        return target

    return norm


def layer_norm_row(*, bf16: bool) -> Any:
    """norm_row(source, target, width, weight, bias, epsilon), a `VectorFunction`.

    `weight` and `bias` are addresses of float32, `epsilon` is a float32, everything else int64.
    """
    from llvmlite import ir

    from headrace.model.kernels.vector_function import VectorFunction
    from headrace.model.kernels.vectors import FLOAT, HALVES, INT64, Value, VectorBuilder

    def body(
        v: VectorBuilder, source: Value, target: Value, width: Value, weight: Value, bias: Value, epsilon: Value
    ) -> None:
        def at(address: Value, index: Value, itemsize: int = 4) -> Value:
            return v.builder.add(address, v.builder.mul(index, INT64(itemsize)))

        def read(index: Value, count: Value | None) -> Value:
            return v.widen(v.read(at(source, index, 2), count, HALVES)) if bf16 else v.read(at(source, index), count)

        def add(index: Value, count: Value | None, total: Value) -> list[Value]:
            return [v.add(total, read(index, count))]

        def add_square(index: Value, count: Value | None, total: Value) -> list[Value]:
            difference = v.subtract(read(index, count), mean)
            if count is not None:
                difference = v.keep(v.first(count), difference)
            return [v.fma(difference, difference, total)]

        def write(index: Value, count: Value | None) -> list[Value]:
            x = v.multiply(v.multiply(v.subtract(read(index, count), mean), scale), v.read(at(weight, index), count))
            x = v.add(x, v.read(at(bias, index), count))
            v.write(v.narrow(x) if bf16 else x, at(target, index, 2 if bf16 else 4), count)
            return []

        elements, zeros = v.builder.sitofp(width, FLOAT), v.constant(0.0)
        mean = v.broadcast(v.divide(v.sum(v.over(width, [zeros], add)[0]), elements))
        variance = v.divide(v.sum(v.over(width, [zeros], add_square)[0]), elements)
        scale = v.broadcast(v.divide(ir.Constant(FLOAT, 1.0), v.square_root(v.add(variance, epsilon))))
        v.over(width, [], write)

    parameters = ("source", "target", "width", "weight", "bias", "epsilon")
    return VectorFunction("layer_norm_bf16" if bf16 else "layer_norm_fp32", parameters, body, floats=("epsilon",))
