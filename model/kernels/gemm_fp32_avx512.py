"""Products in float32 by a CPU's vector unit (AVX-512), as near as may be to the speed of memory or of the unit.

Eight rows by 48 columns are summed at once, in 24 of the 32 registers; every sum is taken from the first row of the
weight to the last. The weight is stored once in the order in which it is read:

    block n   48 columns, all of the weight's rows; a thread computes whole blocks
        step k   4 of the weight's rows, 768 bytes

So much of a block as stays in the L2 cache beside the rows is multiplied by all of a panel's rows before the rest of
it; what comes next is asked for meanwhile, from four places at a time. Products are run by model/kernels/program.py.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.intrinsics import assembly, cast, use_huge_pages
from headrace.model.kernels.program import (
    BLOCKS,
    GELU_NUMBERS,
    PACKED,
    ROWS,
    SHARES,
    STEPS,
    WEIGHT,
    Kind,
    Parts,
    Streamed,
    aimer,
    finisher,
    padded,
    right,
)

log = logging.getLogger("headrace.model")

#: Rows of x that are summed together, columns of a block, rows of the weight in a step.
GROUP = 8
BLOCK = 48
STEP = 4
LINE_BYTES = BLOCK * 4
STEP_BYTES = STEP * LINE_BYTES
#: Steps of a block that are multiplied by all rows of a panel before the next ones: at most so many, 72 KiB, and no
#: more than half of all. Each part is summed by itself: the error of two short sums is less than that of a long one.
PART = 96
#: Rows of a panel; their sums lie in a thread's own memory, with a row of a result after them.
PANEL = 128
STAGED = PANEL * LINE_BYTES


class Floats(Streamed):
    """A weight [in, out] in blocks of columns, float32 [blocks, in/4, 4, 48]: block, step, row, column."""

    #: `in` is a multiple of it.
    step: ClassVar = STEP

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Floats:
        """Take in a weight [in, out], `in` a multiple of 4, and a bias [out]."""
        width, out = weight.shape
        blocks = -(-out // BLOCK)
        stream = use_huge_pages(torch.empty(blocks, width // STEP, STEP, BLOCK))
        whole = F.pad(weight, (0, blocks * BLOCK - out)) if out % BLOCK else weight
        stream.copy_(whole.view(width // STEP, STEP, blocks, BLOCK).permute(2, 0, 1, 3))
        return cls(FLOATS, stream, torch.ones(0), padded(bias, blocks * BLOCK), bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """As it came, [in, out]; a copy."""
        return self.stream.permute(1, 2, 0, 3).reshape(self.width, -1)[:, : self.out]


@functools.cache
def floats_work(device: str, dtype: torch.dtype) -> bool:
    """Whether this machine has the unit, and what it gives is right. Compiles the code.

    Where it cannot be had, products are computed by torch.
    """
    if device != "cpu" or dtype != torch.float32 or os.uname().machine != "x86_64":
        return False
    try:
        from llvmlite import binding

        return bool(binding.get_host_cpu_features().get("avx512f")) and right(Floats.of, dtype, rtol=1e-5, atol=1e-4)
    except Exception as error:  # a speed-up must never be what keeps a model from running
        log.warning("products are computed by torch's operators, more slowly: %r", error)
        return False


def _pack() -> Any:
    """A row of x into its group: the first numbers of eight rows, then their second ones, and so on."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))

    @numba.njit(error_model="numpy")
    def pack(h: Any, d: Any, row: int, source: int) -> None:
        width = d[STEPS] * STEP
        target = carray(floats(h[PACKED] + row // GROUP * width * GROUP * 4 + row % GROUP * 4), width * GROUP)
        if source == 0:
            for i in range(width):
                target[i * GROUP] = np.float32(0)
            return
        x = carray(floats(source), width)
        for i in range(width):
            target[i * GROUP] = x[i]

    return pack


def _multiplier() -> Any:
    """All rows by a share of the blocks."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))
    aim, finish, multiply = aimer(BLOCK, half=False), finisher(BLOCK, half=False, whole=False), _multiply()

    @numba.njit(inline="always")
    def parts_of(steps: int) -> int:
        return min(max(2, (steps + PART - 1) // PART), steps)

    @numba.njit(error_model="numpy")
    def begin(h: Any, after: Any, share: int) -> Any:
        """Where a share of the next product begins, and how many steps its first part has."""
        first = after[BLOCKS] * share // h[SHARES] * after[STEPS] * STEP_BYTES
        return after[WEIGHT] + first, after[STEPS] // parts_of(after[STEPS])

    @numba.njit(error_model="numpy")
    def multiply_share(h: Any, d: Any, after: Any, share: int, own: int) -> None:
        steps, rows, parts = d[STEPS], h[ROWS], parts_of(d[STEPS])
        first, last = d[BLOCKS] * share // h[SHARES], d[BLOCKS] * (share + 1) // h[SHARES]
        for start in range(0, rows, PANEL):
            stop = min(start + PANEL, rows)
            for block in range(first, last):
                sums = carray(floats(own), (stop - start + GROUP) * BLOCK)
                for i in range((stop - start + GROUP - 1) // GROUP * GROUP * BLOCK):
                    sums[i] = np.float32(0)
                for part in range(parts):
                    at, end = steps * part // parts, steps * (part + 1) // parts
                    w = d[WEIGHT] + (block * steps + at) * STEP_BYTES
                    soon, quarter = w + (end - at) * STEP_BYTES, (end - at) * STEP_BYTES // 4
                    if part + 1 == parts and block + 1 == last:
                        soon, length = (w, end - at) if stop < rows or after[WEIGHT] == 0 else begin(h, after, share)
                        quarter = length * STEP_BYTES // 4
                    for row in range(start, stop, GROUP):
                        x = h[PACKED] + (row * steps + at * GROUP) * STEP * 4
                        # A third of what comes next by each of the first three groups, or all by the first if there
                        # are fewer; those after them ask for what is there.
                        group, fast = (row - start) // GROUP, stop - start <= 2 * GROUP
                        next_ = soon + group * (end - at) * 64 if group < (1 if fast else 3) else w
                        to = own + (row - start) * LINE_BYTES
                        multiply(min(GROUP, stop - row), fast and group == 0, x, w, end - at, to, next_, quarter)
                finish(h, aim(h, d, own, start, stop - start, block), 0, stop - start, own + STAGED)

    return multiply_share


def _multiply() -> Any:
    """Up to 8 rows by a part of a block, onto their sums [rows, 48], while lines of what comes next are asked for."""
    import numba

    registers = [*(f"xmm{i}" for i in range(32)), "rax", "rcx", "rdx", "rsi", "rdi", "flags"]
    changes = ",".join(f"~{{{register}}}" for register in registers)
    slow, fast = (_by_rows(lines, changes) for lines in (1, 3))

    @numba.njit(error_model="numpy")
    def multiply(rows: int, all_lines: bool, x: int, w: int, steps: int, sums: int, soon: int, quarter: int) -> None:
        if all_lines:
            fast(rows, x, w, steps, sums, soon, quarter)
        else:
            slow(rows, x, w, steps, sums, soon, quarter)

    return multiply


def _by_rows(lines: int, changes: str) -> Any:
    """The instructions for at least so many rows as there are: 1, 2, 4 or 8."""
    import numba

    one, two, four, eight = (assembly(_instructions(rows, lines), 6, changes) for rows in (1, 2, 4, 8))

    @numba.njit(error_model="numpy")
    def multiply(rows: int, x: int, w: int, steps: int, sums: int, soon: int, quarter: int) -> None:
        if rows == 1:
            one(x, w, steps, sums, soon, quarter)
        elif rows == 2:
            two(x, w, steps, sums, soon, quarter)
        elif rows <= 4:
            four(x, w, steps, sums, soon, quarter)
        else:
            eight(x, w, steps, sums, soon, quarter)

    return multiply


def _instructions(rows: int, lines: int) -> str:
    """For rows at $0, a part of a block at $1 with $2 steps, sums at $3; asks for so many lines a step of each quarter
    of what lies at $4, whose quarters have $5 bytes.
    """
    sums = [(row, third, f"%zmm{3 * row + third}") for row in range(rows) for third in range(3)]
    text = ["movq $0, %rax", "movq $1, %rcx", "movq $2, %rdx", "movq $4, %rsi", "leaq (%rsi,$5,2), %rdi"]
    text += [f"vpxord {register}, {register}, {register}" for *_, register in sums]
    text += ["1:"]
    for step in range(STEP):
        text += [f"vmovups {LINE_BYTES * step + 64 * third}(%rcx), %zmm{24 + third}" for third in range(3)]
        place = ["(%rsi)", "(%rsi,$5)", "(%rdi)", "(%rdi,$5)"][step]
        text += [f"prefetcht1 {64 * line}{place}" for line in range(lines)]
        for row in range(rows):
            number = f"%zmm{27 + row % 4}"
            text += [f"vbroadcastss {4 * (GROUP * step + row)}(%rax), {number}"]
            text += [f"vfmadd231ps {number}, %zmm{24 + third}, %zmm{3 * row + third}" for third in range(3)]
    text += [f"addq $${4 * GROUP * STEP}, %rax", f"addq $${STEP_BYTES}, %rcx"]
    text += [f"addq $${64 * lines}, %rsi", f"addq $${64 * lines}, %rdi", "decq %rdx", "jnz 1b"]
    text += [f"vaddps {LINE_BYTES * row + 64 * third}($3), {register}, {register}" for row, third, register in sums]
    text += [f"vmovups {register}, {LINE_BYTES * row + 64 * third}($3)" for row, third, register in sums]
    return "\n".join(text)


def _parts() -> Parts:
    import numba

    @numba.njit
    def nothing(h: Any, own: int) -> None:
        pass

    return Parts(nothing, nothing, _pack(), _multiplier())


FLOATS = Kind("float32", torch.float32, 4, STEP, BLOCK, GROUP, STAGED + LINE_BYTES, False, GELU_NUMBERS, _parts)
