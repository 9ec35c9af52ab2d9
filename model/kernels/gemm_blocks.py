"""The loops around the micro-kernels of vector units, for every type: blocks, parts along K, and rows.

A step is WORDS = 4 words of 32 bits of each row, and what they are multiplied by: a word is a float32, two bfloat16,
two int16 or four int8. KC steps of a block stay in the L2 cache while all MC rows are multiplied by them. Meanwhile the
weight that is needed next is prefetched, as four streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.model.kernels.epilogue import epilogue_target, vector_epilogue
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.isa import Isa
from headrace.model.kernels.ops import ARG, OP

#: Lanes of a vector.
LANES = 16
#: Words of a row in one step.
WORDS = 4
#: At most this many steps of a block are multiplied by all MC rows before the next ones, and no more than half of all
#: steps: each part is summed separately, and two short sums have a smaller rounding error than one long sum. In AVX-512
#: they take 72 KiB. Results depend on it.
KC = 96


def most_rows(mr: int) -> int:
    """MC: the rows whose sums are held in a thread's scratch memory, a multiple of MR; a spare row follows them."""
    return 128 // mr * mr


def multiply_blocks(
    isa: Isa, kernel: Callable[[int, int], Any], *, bf16: bool = False, int8: bool = False, weight_bytes: int = 64
) -> Any:
    """Build multiply: all rows by one partition of the blocks.

    Args:
        kernel: `kernel(rows, lines)` is a micro-kernel for this number of rows, a `VectorFunction` (x, w, steps, sums,
            soon, quarter) that prefetches `lines` cache lines of each quarter in each step.
        bf16: results are bfloat16, else float32.
        int8: sums are int32, else float32. They begin at the int32 numbers that follow the column scales.
        weight_bytes: of the elements of 16 columns that one word of each row is multiplied by.
    """
    import numba
    from numba import carray, types

    words, (mr, nr) = cast(types.int64, types.CPointer(types.uint32)), (isa.mr, isa.nr)
    locate, finish = epilogue_target(nr, bf16=bf16), vector_epilogue(nr, bf16=bf16, int8=int8)
    mc, row_bytes, step_bytes = most_rows(mr), nr * 4, WORDS * nr // LANES * weight_bytes
    spare, streams = mc * row_bytes, -(-nr * weight_bytes // (LANES * 64))
    micro_kernel = _with_prefetch(mr, streams, kernel)

    @numba.njit(inline="always")
    def parts_of(steps: int) -> int:
        return min(max(2, (steps + KC - 1) // KC), steps)

    @numba.njit(error_model="numpy")
    def begin(program: Any, next_op: Any, partition: int) -> Any:
        """Where a partition of the next op's weight begins, and how many steps its first part has."""
        first = next_op[OP.n_blocks] * partition // program[ARG.partitions] * next_op[OP.k_steps] * step_bytes
        return next_op[OP.weight] + first, next_op[OP.k_steps] // parts_of(next_op[OP.k_steps])

    @numba.njit(error_model="numpy")
    def multiply(program: Any, op: Any, next_op: Any, partition: int, scratch: int) -> None:
        steps, rows, parts = op[OP.k_steps], program[ARG.rows], parts_of(op[OP.k_steps])
        first, last = (
            op[OP.n_blocks] * partition // program[ARG.partitions],
            op[OP.n_blocks] * (partition + 1) // program[ARG.partitions],
        )
        for start in range(0, rows, mc):
            stop = min(start + mc, rows)
            for block in range(first, last):
                sums = carray(words(scratch), (stop - start + mr) * nr)
                for i in range((stop - start + mr - 1) // mr * mr * nr):
                    sums[i] = np.uint32(0)
                if int8:
                    firsts = carray(words(op[OP.column_scales] + (op[OP.n_blocks] + block) * row_bytes), nr)
                    for row in range(stop - start):
                        for i in range(nr):
                            sums[row * nr + i] = firsts[i]
                for part in range(parts):
                    at, end = steps * part // parts, steps * (part + 1) // parts
                    w = op[OP.weight] + (block * steps + at) * step_bytes
                    soon, quarter = w + (end - at) * step_bytes, (end - at) * step_bytes // 4
                    if part + 1 == parts and block + 1 == last:
                        soon, length = (
                            (w, end - at)
                            if stop < rows or next_op[OP.weight] == 0
                            else begin(program, next_op, partition)
                        )
                        quarter = length * step_bytes // 4
                    for row in range(start, stop, mr):
                        x = program[ARG.packed_rows] + (row * steps + at * mr) * WORDS * 4
                        # Each of the first panels prefetches a share of what comes next; with one or two panels the
                        # first prefetches all of it. The panels after them prefetch the current part, at no cost.
                        panel, few = (row - start) // mr, stop - start <= 2 * mr
                        target = soon + panel * (end - at) * 64 if panel < (1 if few else streams) else w
                        to = scratch + (row - start) * row_bytes
                        micro_kernel(min(mr, stop - row), few and panel == 0, x, w, end - at, to, target, quarter)
                finish(locate(program, op, scratch, start, stop - start, block), scratch + spare)

    return multiply


def _with_prefetch(mr: int, streams: int, kernel: Callable[[int, int], Any]) -> Any:
    """Choose the micro-kernel that prefetches one line of each quarter in each step, or all lines of a step."""
    import numba

    one_line, all_lines = (kernel_by_rows(mr, lines, kernel) for lines in (1, streams))

    @numba.njit(error_model="numpy")
    def micro_kernel(rows: int, whole: bool, x: int, w: int, steps: int, sums: int, soon: int, quarter: int) -> None:
        if whole:
            all_lines(rows, x, w, steps, sums, soon, quarter)
        else:
            one_line(rows, x, w, steps, sums, soon, quarter)

    return micro_kernel


def kernel_by_rows(mr: int, lines: int, kernel: Callable[[int, int], Any]) -> Any:
    """Choose the micro-kernel for 1, 2, 4 or MR rows, the smallest number that is enough."""
    import numba

    one, two, four, most = (kernel(rows, lines).intrinsic() for rows in (1, 2, 4, mr))

    @numba.njit(error_model="numpy")
    def by_rows(rows: int, x: int, w: int, steps: int, sums: int, soon: int, quarter: int) -> None:
        if rows == 1:
            one(x, w, steps, sums, soon, quarter)
        elif rows == 2:
            two(x, w, steps, sums, soon, quarter)
        elif rows <= 4:
            four(x, w, steps, sums, soon, quarter)
        else:
            most(x, w, steps, sums, soon, quarter)

    return by_rows
