"""The epilogue of rows of sums in portable vectors: the same bits on every instruction set.

x = sum                        float32, or int32 * column scale * row scale
x = x + bias
x = activation(x)  or  x + residual  if requested
out = x                        float32, or rounded to bfloat16
"""

from __future__ import annotations

from headrace.model.kernels.vector_function import VectorFunction
from headrace.model.kernels.vector_math import ACTIVATIONS
from headrace.model.kernels.vectors import FLOAT, HALVES, INTEGERS, LANES, Value, VectorBuilder


def finish_rows(nr: int, *, bf16: bool, int8: bool, residual: bool = False, activation: str = "") -> VectorFunction:
    """finish_rows(sums, rows, out, row_bytes, bias, bias_bytes, residual, column_scales, row_scales), all int64.

    `sums` is the address of [rows, nr]; `residual` that of the first row to add, whose rows have the same distance as
    those of `out`; `bias` that of the first row's bias, from which the next one is `bias_bytes` away. `rows` is at
    least 1.
    """

    def body(
        v: VectorBuilder,
        sums: Value,
        rows: Value,
        out: Value,
        row_bytes: Value,
        bias: Value,
        bias_bytes: Value,
        onto: Value,
        column_scales: Value,
        row_scales: Value,
    ) -> None:
        def row(sums: Value, out: Value, onto: Value, row_scale: Value, bias: Value) -> list[Value]:
            scale = v.broadcast(v.load(row_scale, kind=FLOAT)) if int8 else None
            for i in range(nr // LANES):
                if int8:
                    x = v.multiply(v.from_integers(v.load(sums, 64 * i, INTEGERS)), v.load(column_scales, 64 * i))
                    x = v.multiply(x, scale)
                else:
                    x = v.load(sums, 64 * i)
                x = v.add(x, v.load(bias, 64 * i))
                if activation:
                    x = ACTIVATIONS[activation](v, x)
                if residual:
                    x = v.add(x, v.widen(v.load(onto, 32 * i, HALVES, 2)) if bf16 else v.load(onto, 64 * i))
                if bf16:
                    v.store(v.narrow(x), out, 32 * i, 2)
                else:
                    v.store(x, out, 64 * i)
            further = [v.builder.add(address, row_bytes) for address in (out, onto)]
            return [v.plus(sums, nr * 4), *further, v.plus(row_scale, 4), v.builder.add(bias, bias_bytes)]

        v.repeat(rows, [sums, out, onto, row_scales, bias], row)

    kinds = [name for name, on in (("bf16", bf16), ("int8", int8), ("residual", residual)) if on]
    return VectorFunction(
        "_".join(("finish_rows", str(nr), activation, *kinds)),
        ("sums", "rows", "out", "row_bytes", "bias", "bias_bytes", "residual", "column_scales", "row_scales"),
        body,
    )
