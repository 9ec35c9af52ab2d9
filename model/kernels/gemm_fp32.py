"""GEMM in float32 on a CPU's vector unit, close to the speed of memory or of the unit, whichever limits.

One description for AVX-512, AVX2 and NEON, with the same bits on each. The micro-kernel sums MR rows by NR columns at
once, in most of the registers. Each sum is a chain of FMAs from the first row of a part of the weight to the last; the
sums of the parts are added in order. The weight is stored once, in the order in which it is read:

    block n   NR columns, all rows of the weight; a thread computes whole blocks
        step k   KU = 4 rows of the weight

The loop order is that of BLIS: KC steps of a block stay in the L2 cache while all MC rows are multiplied by them, then
come the next KC steps. Meanwhile the weight that is needed next is prefetched, as four streams. Ops are run by
program.py; README.md explains the names.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.epilogue import epilogue_target, vector_epilogue
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.isa import NONE, Isa, chosen
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, pad_columns, self_test
from headrace.model.kernels.program import GemmBackend, MicroKernel

log = logging.getLogger("headrace.model")

#: Rows of the weight in a step.
KU = 4
#: At most this many steps of a block are multiplied by all MC rows before the next ones, and no more than half of all
#: steps: each part is summed separately, and two short sums have a smaller rounding error than one long sum. In AVX-512
#: they take 72 KiB. Results depend on it.
KC = 96
#: Lanes of a vector.
LANES = 16


def most_rows(mr: int) -> int:
    """MC: the rows whose sums are held in a thread's scratch memory, a multiple of MR; a spare row follows them."""
    return 128 // mr * mr


class Fp32Weight(PackedWeight):
    """A weight [in, out] in blocks of columns, float32 [blocks, in/KU, KU, NR]: block, step, row, column."""

    #: `in` must be a multiple of it.
    ku: ClassVar = KU

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool, isa: Isa | None = None) -> Fp32Weight:
        """Pack a weight [in, out], `in` a multiple of 4, and a bias [out], for an instruction set."""
        backend = fp32_backend(isa or chosen())
        (width, out), nr = weight.shape, backend.nr
        blocks = -(-out // nr)
        packed = use_huge_pages(torch.empty(blocks, width // KU, KU, nr))
        padded = F.pad(weight, (0, blocks * nr - out)) if out % nr else weight
        packed.copy_(padded.view(width // KU, KU, blocks, nr).permute(2, 0, 1, 3))
        return cls(backend, packed, torch.ones(0), pad_columns(bias, blocks * nr), bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy."""
        return self.packed.permute(1, 2, 0, 3).reshape(self.width, -1)[:, : self.out]


def fp32_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this backend can be used on this machine and passes its self-test. Compiles it.

    Where it cannot, torch's operators are used.
    """
    return device == "cpu" and dtype == torch.float32 and fp32_isa_works(chosen())


@functools.cache
def fp32_isa_works(isa: Isa) -> bool:
    """Whether the backend for an instruction set passes its self-test."""
    if isa.name == NONE:
        return False
    try:
        return self_test(functools.partial(Fp32Weight.of, isa=isa), torch.float32, rtol=1e-5, atol=1e-4)
    except Exception as error:  # an optimization must never keep a model from running
        log.warning("matrix products use torch's operators, which are slower: %r", error)
        return False


def _pack(mr: int) -> Any:
    """Build pack: a row of x into its panel, where the first elements of MR rows are followed by their second ones."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        width = op[OP.k_steps] * KU
        panel = program[ARG.packed_rows] + row // mr * width * mr * 4
        target = carray(floats(panel + row % mr * 4), width * mr)
        if source == 0:
            for i in range(width):
                target[i * mr] = np.float32(0)
            return
        x = carray(floats(source), width)
        for i in range(width):
            target[i * mr] = x[i]

    return pack


def _multiply(mr: int, nr: int) -> Any:
    """Build multiply: all rows by one partition of the blocks."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))
    locate, finish = epilogue_target(nr, bf16=False), vector_epilogue(nr, bf16=False, int8=False)
    micro_kernel, mc, row_bytes, step_bytes = _micro_kernel(mr, nr), most_rows(mr), nr * 4, KU * nr * 4
    spare, streams = mc * row_bytes, nr // LANES

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
                sums = carray(floats(scratch), (stop - start + mr) * nr)
                for i in range((stop - start + mr - 1) // mr * mr * nr):
                    sums[i] = np.float32(0)
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
                        x = program[ARG.packed_rows] + (row * steps + at * mr) * KU * 4
                        # Each of the first panels prefetches a share of what comes next; with one or two panels the
                        # first prefetches all of it. The panels after them prefetch the current part, at no cost.
                        panel, few = (row - start) // mr, stop - start <= 2 * mr
                        target = soon + panel * (end - at) * 64 if panel < (1 if few else streams) else w
                        to = scratch + (row - start) * row_bytes
                        micro_kernel(min(mr, stop - row), few and panel == 0, x, w, end - at, to, target, quarter)
                finish(locate(program, op, scratch, start, stop - start, block), scratch + spare)

    return multiply


def _micro_kernel(mr: int, nr: int) -> Any:
    """Build micro_kernel: up to MR rows by some steps of a block, added to their sums [rows, NR], while prefetching."""
    import numba

    one_line, all_lines = (_by_rows(mr, nr, lines) for lines in (1, nr // LANES))

    @numba.njit(error_model="numpy")
    def micro_kernel(rows: int, whole: bool, x: int, w: int, steps: int, sums: int, soon: int, quarter: int) -> None:
        if whole:
            all_lines(rows, x, w, steps, sums, soon, quarter)
        else:
            one_line(rows, x, w, steps, sums, soon, quarter)

    return micro_kernel


def _by_rows(mr: int, nr: int, lines: int) -> Any:
    """Choose the micro-kernel for 1, 2, 4 or MR rows, the smallest number that is enough."""
    import numba

    one, two, four, most = (micro_kernel(rows, mr, nr, lines).intrinsic() for rows in (1, 2, 4, mr))

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


def micro_kernel(rows: int, mr: int, nr: int, lines: int) -> Any:
    """micro_kernel(x, w, steps, sums, soon, quarter): `rows` rows of a panel of `mr` by `steps` steps of a block.

    A `VectorFunction`. Adds to the sums [rows, nr]: each sum of this call is one chain of FMAs, from 0 on. In each step
    it prefetches `lines` cache lines of each quarter of the memory at `soon`, whose quarters have `quarter` bytes.
    """
    from headrace.model.kernels.vectors import FLOAT, INT64, Value, VectorBuilder, VectorFunction

    vectors = nr // LANES

    def body(v: VectorBuilder, x: Value, w: Value, steps: Value, sums: Value, soon: Value, quarter: Value) -> None:
        def step(x: Value, w: Value, near: Value, far: Value, *found: Value) -> list[Value]:
            chains = list(found)
            for k in range(KU):
                weights = [v.load(w, (k * vectors + j) * 64) for j in range(vectors)]
                place = (near, v.builder.add(near, quarter), far, v.builder.add(far, quarter))[k]
                for line in range(lines):
                    v.prefetch(place, 64 * line)
                for row in range(rows):
                    factor = v.broadcast(v.load(x, 4 * (mr * k + row), FLOAT))
                    for j in range(vectors):
                        chains[row * vectors + j] = v.fma(factor, weights[j], chains[row * vectors + j])
            moved = [v.plus(address, 64 * lines) for address in (near, far)]
            return [v.plus(x, 4 * mr * KU), v.plus(w, 4 * nr * KU), *moved, *chains]

        far = v.builder.add(soon, v.builder.shl(quarter, INT64(1)))
        chains = v.repeat(steps, [x, w, soon, far, *[v.constant(0.0)] * (rows * vectors)], step)[4:]
        for i, chain in enumerate(chains):
            v.store(v.add(v.load(sums, 64 * i), chain), sums, 64 * i)

    name = f"gemm_fp32_{rows}_of_{mr}x{nr}_{lines}"
    return VectorFunction(name, ("x", "w", "steps", "sums", "soon", "quarter"), body)


@functools.cache
def fp32_backend(isa: Isa) -> GemmBackend:
    """The backend for an instruction set."""
    mr, nr = isa.mr, isa.nr

    def build() -> MicroKernel:
        import numba

        @numba.njit
        def nothing(program: Any, scratch: int) -> None:
            pass

        return MicroKernel(nothing, nothing, _pack(mr), _multiply(mr, nr))

    return GemmBackend(
        fingerprint="floats",
        isa=isa,
        dtype=torch.float32,
        itemsize=4,
        ku=KU,
        nr=nr,
        mr=mr,
        scratch_bytes=(most_rows(mr) + 1) * nr * 4,
        packs_output=False,
        constants=np.zeros(0, np.float32),
        micro_kernel=build,
    )
