"""GEMM in float32 on a CPU's vector unit (AVX-512), close to the speed of memory or of the unit, whichever limits.

The micro-kernel sums 8 rows by 48 columns at once, in 24 of the 32 registers. Each sum is taken from the first row of
the weight to the last. The weight is stored once, in the order in which it is read:

    block n   NR = 48 columns, all rows of the weight; a thread computes whole blocks
        step k   KU = 4 rows of the weight, 768 bytes

The loop order is that of BLIS: KC steps of a block stay in the L2 cache while all MC rows are multiplied by them, then
come the next KC steps. Meanwhile the weight that is needed next is prefetched, as four streams. Ops are run by
program.py; README.md explains the names.
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

from headrace.model.kernels.epilogue import GELU_CONSTANTS, epilogue, epilogue_target
from headrace.model.kernels.intrinsics import assembly, cast
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, pad_columns, self_test
from headrace.model.kernels.program import GemmBackend, MicroKernel

log = logging.getLogger("headrace.model")

#: Rows of x that are summed together, columns of a block, rows of the weight in a step.
MR = 8
NR = 48
KU = 4
ROW_BYTES = NR * 4
STEP_BYTES = KU * ROW_BYTES
#: At most this many steps of a block, 72 KiB, are multiplied by all MC rows before the next ones, and no more than half
#: of all steps: each part is summed separately, and two short sums have a smaller rounding error than one long sum.
KC = 96
#: Rows whose sums are held in a thread's scratch memory; a spare row for the epilogue follows them.
MC = 128
SPARE = MC * ROW_BYTES


class Fp32Weight(PackedWeight):
    """A weight [in, out] in blocks of columns, float32 [blocks, in/KU, KU, NR]: block, step, row, column."""

    #: `in` must be a multiple of it.
    ku: ClassVar = KU

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Fp32Weight:
        """Pack a weight [in, out], `in` a multiple of 4, and a bias [out]."""
        width, out = weight.shape
        blocks = -(-out // NR)
        packed = use_huge_pages(torch.empty(blocks, width // KU, KU, NR))
        padded = F.pad(weight, (0, blocks * NR - out)) if out % NR else weight
        packed.copy_(padded.view(width // KU, KU, blocks, NR).permute(2, 0, 1, 3))
        return cls(FP32_AVX512, packed, torch.ones(0), pad_columns(bias, blocks * NR), bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy."""
        return self.packed.permute(1, 2, 0, 3).reshape(self.width, -1)[:, : self.out]


@functools.cache
def fp32_avx512_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this backend can be used on this machine and passes its self-test. Compiles it.

    Where it cannot, torch's operators are used.
    """
    if device != "cpu" or dtype != torch.float32 or os.uname().machine != "x86_64":
        return False
    try:
        from llvmlite import binding

        has_avx512 = bool(binding.get_host_cpu_features().get("avx512f"))
        return has_avx512 and self_test(Fp32Weight.of, dtype, rtol=1e-5, atol=1e-4)
    except Exception as error:  # an optimization must never keep a model from running
        log.warning("matrix products use torch's operators, which are slower: %r", error)
        return False


def _pack() -> Any:
    """Build pack: a row of x into its panel, where the first elements of MR rows are followed by their second ones."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        width = op[OP.k_steps] * KU
        panel = program[ARG.packed_rows] + row // MR * width * MR * 4
        target = carray(floats(panel + row % MR * 4), width * MR)
        if source == 0:
            for i in range(width):
                target[i * MR] = np.float32(0)
            return
        x = carray(floats(source), width)
        for i in range(width):
            target[i * MR] = x[i]

    return pack


def _multiply() -> Any:
    """Build multiply: all rows by one partition of the blocks."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))
    locate, finish = epilogue_target(NR, bf16=False), epilogue(NR, bf16=False, int8=False)
    micro_kernel = _micro_kernel()

    @numba.njit(inline="always")
    def parts_of(steps: int) -> int:
        return min(max(2, (steps + KC - 1) // KC), steps)

    @numba.njit(error_model="numpy")
    def begin(program: Any, next_op: Any, partition: int) -> Any:
        """Where a partition of the next op's weight begins, and how many steps its first part has."""
        first = next_op[OP.n_blocks] * partition // program[ARG.partitions] * next_op[OP.k_steps] * STEP_BYTES
        return next_op[OP.weight] + first, next_op[OP.k_steps] // parts_of(next_op[OP.k_steps])

    @numba.njit(error_model="numpy")
    def multiply(program: Any, op: Any, next_op: Any, partition: int, scratch: int) -> None:
        steps, rows, parts = op[OP.k_steps], program[ARG.rows], parts_of(op[OP.k_steps])
        first, last = (
            op[OP.n_blocks] * partition // program[ARG.partitions],
            op[OP.n_blocks] * (partition + 1) // program[ARG.partitions],
        )
        for start in range(0, rows, MC):
            stop = min(start + MC, rows)
            for block in range(first, last):
                sums = carray(floats(scratch), (stop - start + MR) * NR)
                for i in range((stop - start + MR - 1) // MR * MR * NR):
                    sums[i] = np.float32(0)
                for part in range(parts):
                    at, end = steps * part // parts, steps * (part + 1) // parts
                    w = op[OP.weight] + (block * steps + at) * STEP_BYTES
                    soon, quarter = w + (end - at) * STEP_BYTES, (end - at) * STEP_BYTES // 4
                    if part + 1 == parts and block + 1 == last:
                        soon, length = (
                            (w, end - at)
                            if stop < rows or next_op[OP.weight] == 0
                            else begin(program, next_op, partition)
                        )
                        quarter = length * STEP_BYTES // 4
                    for row in range(start, stop, MR):
                        x = program[ARG.packed_rows] + (row * steps + at * MR) * KU * 4
                        # The first three panels prefetch a third each of what comes next; with one or two panels the
                        # first prefetches all of it. The panels after them prefetch the current part, at no cost.
                        panel, few = (row - start) // MR, stop - start <= 2 * MR
                        target = soon + panel * (end - at) * 64 if panel < (1 if few else 3) else w
                        to = scratch + (row - start) * ROW_BYTES
                        micro_kernel(min(MR, stop - row), few and panel == 0, x, w, end - at, to, target, quarter)
                finish(
                    program, locate(program, op, scratch, start, stop - start, block), 0, stop - start, scratch + SPARE
                )

    return multiply


def _micro_kernel() -> Any:
    """Build micro_kernel: up to MR rows by some steps of a block, added to their sums [rows, NR], while prefetching."""
    import numba

    registers = [*(f"xmm{i}" for i in range(32)), "rax", "rcx", "rdx", "rsi", "rdi", "flags"]
    clobbers = ",".join(f"~{{{register}}}" for register in registers)
    one_line, three_lines = (_by_rows(lines, clobbers) for lines in (1, 3))

    @numba.njit(error_model="numpy")
    def micro_kernel(
        rows: int, all_lines: bool, x: int, w: int, steps: int, sums: int, soon: int, quarter: int
    ) -> None:
        if all_lines:
            three_lines(rows, x, w, steps, sums, soon, quarter)
        else:
            one_line(rows, x, w, steps, sums, soon, quarter)

    return micro_kernel


def _by_rows(lines: int, clobbers: str) -> Any:
    """Choose the instructions for 1, 2, 4 or 8 rows, the smallest number that is enough."""
    import numba

    one, two, four, eight = (assembly(_instructions(rows, lines), 6, clobbers) for rows in (1, 2, 4, 8))

    @numba.njit(error_model="numpy")
    def micro_kernel(rows: int, x: int, w: int, steps: int, sums: int, soon: int, quarter: int) -> None:
        if rows == 1:
            one(x, w, steps, sums, soon, quarter)
        elif rows == 2:
            two(x, w, steps, sums, soon, quarter)
        elif rows <= 4:
            four(x, w, steps, sums, soon, quarter)
        else:
            eight(x, w, steps, sums, soon, quarter)

    return micro_kernel


def _instructions(rows: int, lines: int) -> str:
    """The instructions for a number of rows: $0 are the packed rows, $1 the steps of a block, $2 their number, $3 sums.

    In each step they prefetch `lines` cache lines of each quarter of the memory at $4, whose quarters have $5 bytes.
    """
    sums = [(row, third, f"%zmm{3 * row + third}") for row in range(rows) for third in range(3)]
    text = ["movq $0, %rax", "movq $1, %rcx", "movq $2, %rdx", "movq $4, %rsi", "leaq (%rsi,$5,2), %rdi"]
    text += [f"vpxord {register}, {register}, {register}" for *_, register in sums]
    text += ["1:"]
    for k in range(KU):
        text += [f"vmovups {ROW_BYTES * k + 64 * third}(%rcx), %zmm{24 + third}" for third in range(3)]
        place = ["(%rsi)", "(%rsi,$5)", "(%rdi)", "(%rdi,$5)"][k]
        text += [f"prefetcht1 {64 * line}{place}" for line in range(lines)]
        for row in range(rows):
            x = f"%zmm{27 + row % 4}"
            text += [f"vbroadcastss {4 * (MR * k + row)}(%rax), {x}"]
            text += [f"vfmadd231ps {x}, %zmm{24 + third}, %zmm{3 * row + third}" for third in range(3)]
    text += [f"addq $${4 * MR * KU}, %rax", f"addq $${STEP_BYTES}, %rcx"]
    text += [f"addq $${64 * lines}, %rsi", f"addq $${64 * lines}, %rdi", "decq %rdx", "jnz 1b"]
    text += [f"vaddps {ROW_BYTES * row + 64 * third}($3), {register}, {register}" for row, third, register in sums]
    text += [f"vmovups {register}, {ROW_BYTES * row + 64 * third}($3)" for row, third, register in sums]
    return "\n".join(text)


def _build() -> MicroKernel:
    import numba

    @numba.njit
    def nothing(program: Any, scratch: int) -> None:
        pass

    return MicroKernel(nothing, nothing, _pack(), _multiply())


FP32_AVX512 = GemmBackend(
    fingerprint="floats",
    dtype=torch.float32,
    itemsize=4,
    ku=KU,
    nr=NR,
    mr=MR,
    scratch_bytes=SPARE + ROW_BYTES,
    packs_output=False,
    constants=GELU_CONSTANTS,
    micro_kernel=_build,
)
