"""The epilogue of a GEMM: scales, bias, activation function or residual, and rounding, applied to sums when they are
written.

An epilogue has two parts. `epilogue_target` computes once for a block of sums where they are written and what is
applied to them; `epilogue` then processes any of their rows. A micro-kernel can therefore finish the previous sums
while it computes the next ones.

`vector_epilogue`, and `epilogue` in int8, have the same bits on every instruction set. In bfloat16 `epilogue` is
assembly for AVX-512: its GELU divides by an approximate instruction.
"""

from __future__ import annotations

from typing import Any

from headrace.model.kernels.intrinsics import assembly, cast
from headrace.model.kernels.ops import ARG, OP

#: What is applied after the bias: the code of an activation function, which is its position in this list, or
#: ADD_RESIDUAL.
ACTIVATION_CODES = ("", "gelu_tanh", "gelu", "relu", "silu", "tanh")
NOTHING, GELU_TANH, GELU, RELU, SILU, TANH = range(6)
ADD_RESIDUAL = -1


def epilogue_target(nr: int, *, bf16: bool, mr: int = 0) -> Any:
    """Build locate(program, op, sums, first_row, rows, block), which returns the `target` of `epilogue`.

    `sums` is the address of sums [rows, nr], `first_row` the row of the result that they begin at, `block` the number
    of their block of columns. With `mr` the result can be written packed in panels of `mr` rows, where the op says so;
    `first_row` is then a multiple of `mr`.
    """
    import numba

    itemsize = 2 if bf16 else 4

    @numba.njit(error_model="numpy", forceinline=True)
    def locate(program: Any, op: Any, sums: int, first_row: int, rows: int, block: int) -> Any:
        column = block * nr
        offset, row_bytes, residual = first_row * op[OP.out_row_bytes] + column * itemsize, op[OP.out_row_bytes], 0
        panel_bytes = row_bytes * mr
        if mr and op[OP.packs_output] != 0:
            row_bytes, panel_bytes = nr * itemsize, op[OP.n_blocks] * mr * nr * itemsize
            offset = first_row // mr * panel_bytes + block * mr * row_bytes
        if op[OP.residual] != 0:
            residual = op[OP.residual] - op[OP.out]
        then = ADD_RESIDUAL if op[OP.residual] != 0 else op[OP.activation]
        columns = min(nr, op[OP.columns] - column)
        bias_row_bytes, column_scales = op[OP.bias_row_bytes], op[OP.column_scales] + column * 4
        bias = op[OP.bias] + block * op[OP.bias_block_bytes] + first_row * bias_row_bytes
        row_scales, out = program[ARG.row_scales] + first_row * 4, op[OP.out] + offset
        bias = bias, bias_row_bytes
        return sums, rows, columns, out, row_bytes, panel_bytes, residual, bias, column_scales, row_scales, then

    return locate


def vector_epilogue(nr: int, *, bf16: bool, int8: bool) -> Any:
    """Build finish(target, spare), which processes all rows of a target of `epilogue_target` without `mr`.

    `spare` is the address of memory for one row, see `epilogue`.
    """
    import numba
    from numba import carray, types

    elements = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.float32))
    finish_some = _finish_some(nr, bf16=bf16, int8=int8)

    @numba.njit(error_model="numpy")
    def finish(target: Any, spare: int) -> None:
        sums, rows, columns, out, row_bytes, _, residual, (bias, bias_bytes), column_scales, row_scales, then = target
        if columns == nr:
            finish_some(then, sums, rows, out, row_bytes, bias, bias_bytes, out + residual, column_scales, row_scales)
            return
        for row in range(rows):  # a last block of fewer columns: computed in the spare row, and copied
            place, computed = out + row * row_bytes, carray(elements(spare), nr)
            if then == ADD_RESIDUAL:
                given = carray(elements(place + residual), columns)
                for i in range(columns):
                    computed[i] = given[i]
            line, scale, own = sums + row * nr * 4, row_scales + row * 4, bias + row * bias_bytes
            finish_some(then, line, 1, spare, 0, own, 0, spare, column_scales, scale)
            wanted = carray(elements(place), columns)
            for i in range(columns):
                wanted[i] = computed[i]

    return finish


def epilogue(nr: int, *, int8: bool, mr: int = 0) -> Any:
    """Build finish(program, target, first, count, spare): process `count` rows of the sums of a target from `first` on.

    Results are bfloat16. `target` comes from `epilogue_target`. `spare` is the address of memory for one row: a last
    block with fewer than `nr` columns is computed there and copied. With `int8` the sums are int32 and are scaled by
    row and by column.
    """
    import numba
    from numba import carray, types

    elements = cast(types.int64, types.CPointer(types.uint16))
    finish_row = _finish_int8_row(nr) if int8 else _finish_bf16_row(nr)

    @numba.njit(error_model="numpy", forceinline=True)
    def finish(program: Any, target: Any, first: int, count: int, spare: int) -> None:
        sums, rows, columns, out, row_bytes, panel_bytes, residual, biases, column_scales, row_scales, then = target
        for row in range(first, min(first + count, rows)):
            bias = biases[0] + row * biases[1]
            place = out + (row // mr * panel_bytes + row % mr * row_bytes if mr else row * row_bytes)
            to, onto, line, row_scale = place, place + residual, sums + row * nr * 4, row_scales + row * 4
            if columns < nr:
                to = spare
                if then == ADD_RESIDUAL:
                    given, copy = carray(elements(onto), columns), carray(elements(spare), columns)
                    for i in range(columns):
                        copy[i] = given[i]
                    onto = spare
            finish_row(then, line, to, bias, column_scales, row_scale, onto, program[ARG.constants])
            if columns < nr:
                wanted, computed = carray(elements(place), columns), carray(elements(spare), columns)
                for i in range(columns):
                    wanted[i] = computed[i]

    return finish


def _finish_some(nr: int, *, bf16: bool, int8: bool) -> Any:
    """Build finish_some(then, sums, rows, out, row_bytes, bias, bias_bytes, residual, column_scales, row_scales).

    The functions are those of epilogue_rows.py.
    """
    import numba

    from headrace.model.kernels.epilogue_rows import finish_rows

    plain, gelu_tanh, gelu, relu, silu, tanh = (
        finish_rows(nr, bf16=bf16, int8=int8, activation=name).intrinsic() for name in ACTIVATION_CODES
    )
    add_residual = finish_rows(nr, bf16=bf16, int8=int8, residual=True).intrinsic()

    @numba.njit(error_model="numpy")
    def finish_some(
        then: int,
        sums: int,
        rows: int,
        out: int,
        row_bytes: int,
        bias: int,
        bias_bytes: int,
        onto: int,
        column_scales: int,
        row_scales: int,
    ) -> None:
        if then == ADD_RESIDUAL:
            add_residual(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)
        elif then == GELU_TANH:
            gelu_tanh(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)
        elif then == NOTHING:
            plain(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)
        elif then == GELU:
            gelu(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)
        elif then == RELU:
            relu(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)
        elif then == SILU:
            silu(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)
        else:
            tanh(sums, rows, out, row_bytes, bias, bias_bytes, onto, column_scales, row_scales)

    return finish_some


def _finish_int8_row(nr: int) -> Any:
    """Build finish_row(then, sums, out, bias, column_scales, row_scale, residual, constants) by epilogue_rows.py."""
    import numba

    finish_some = _finish_some(nr, bf16=True, int8=True)

    @numba.njit(error_model="numpy", forceinline=True)
    def finish_row(
        then: int, sums: int, out: int, bias: int, column_scales: int, row_scale: int, residual: int, _: int
    ) -> None:
        finish_some(then, sums, 1, out, 0, bias, 0, residual, column_scales, row_scale)

    return finish_row


def _finish_bf16_row(nr: int) -> Any:
    """Build finish_row, see `_finish_int8_row`, in assembly, which applies GELU_TANH only."""
    import numba

    clobbers = ",".join(f"~{{xmm{i}}}" for i in range(12))
    text = ["\n".join(_row_instructions(nr // 16, then)) for then in (NOTHING, GELU_TANH, ADD_RESIDUAL)]
    plain, gelu_tanh, add_residual = (assembly(each, 6, clobbers) for each in text)

    @numba.njit(error_model="numpy", forceinline=True)
    def finish_row(
        then: int, sums: int, out: int, bias: int, column_scales: int, row_scale: int, residual: int, constants: int
    ) -> None:
        if then == ADD_RESIDUAL:
            add_residual(sums, out, bias, column_scales, row_scale, residual)
        elif then == GELU_TANH:
            gelu_tanh(sums, out, bias, column_scales, row_scale, constants)
        else:
            plain(sums, out, bias, column_scales, row_scale, 0)

    return finish_row


def _row_instructions(vectors: int, then: int) -> list[str]:
    """Instructions that turn the float32 sums at $0 into a row of the result at $1.

    $2 is the address of the bias, $5 that of the constants of GELU or of the residual row.
    """
    lines = []
    for i in range(vectors):
        x, at, spare = f"%zmm{i}", 64 * i, [f"%zmm{3 + 3 * i + j}" for j in range(3)]
        lines += [f"vmovups {at}($0), {x}", f"vaddps {at}($2), {x}, {x}"]
        if then == GELU_TANH:
            lines += _gelu_instructions(x, *spare)
        elif then == ADD_RESIDUAL:
            lines += [f"vpmovzxwd {at // 2}($5), {spare[0]}", f"vpslld $$16, {spare[0]}, {spare[0]}"]
            lines += [f"vaddps {spare[0]}, {x}, {x}"]
    return [*lines, "vcvtne2ps2bf16 %zmm0, %zmm1, %zmm0", "vmovups %zmm0, ($1)"]


def _gelu_instructions(x: str, t: str, n: str, power: str) -> list[str]:
    """Instructions that replace register x by its GELU, to the precision of bfloat16.

    GELU_CONSTANTS are at $5; t, n and power are spare registers. Written as assembly because compiled code takes
    several times as long: in int8 as long as the GEMM itself.
    """
    first, last = 12, 28
    lines = [f"vmulps {x}, {x}, {t}", f"vbroadcastss 4($5), {n}", f"vfmadd213ps ($5){{1to16}}, {n}, {t}"]
    # vmaxps of a number and NaN gives its first operand in this syntax, which is t: NaN is kept.
    lines += [f"vmulps {x}, {t}, {t}", f"vbroadcastss 8($5), {n}", f"vmaxps {t}, {n}, {t}"]
    lines += [f"vrndscaleps $$0, {t}, {n}", f"vsubps {n}, {t}, {t}"]  # t = n + r; from here on t holds r
    lines += [f"vbroadcastss {first}($5), {power}"]
    lines += [f"vfmadd213ps {at}($5){{1to16}}, {t}, {power}" for at in range(first + 4, last + 4, 4)]
    lines += [f"vscalefps {n}, {power}, {power}", f"vaddps {last}($5){{1to16}}, {power}, {power}"]
    return [*lines, f"vrcp14ps {power}, {power}", f"vmulps {power}, {x}, {x}"]
