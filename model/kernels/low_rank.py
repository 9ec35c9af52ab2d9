"""What adapters of low rank (LoRA) add to a GEMM, for rows of several adapters at once: x @ A @ B.

It runs as a call before the op of a GEMM and writes a bias for each row, which the epilogue adds:

    down   thread t: panels of MR rows of an adapter, normed as the op says | x @ A, float32 [MR, rank]
    barrier
    up     thread t: blocks of NR columns | bias + (x @ A) @ B for the rows of adapters, the bias for all others

Everything is float32. Each sum is a chain of FMAs in the order of `gemm_fp32.py`, so a row's bits depend neither on the
other rows nor on the number of threads nor on the instruction set.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels import object_cache
from headrace.model.kernels.gemm_blocks import KC, LANES, WORDS, kernel_by_rows
from headrace.model.kernels.gemm_fp32 import micro_kernel
from headrace.model.kernels.intrinsics import cast, entry_point
from headrace.model.kernels.isa import Isa
from headrace.model.kernels.layer_norm import layer_norm
from headrace.model.kernels.object_cache import Kernel
from headrace.model.kernels.openmp import thread_functions
from headrace.model.kernels.ops import OP, OP_WORDS
from headrace.model.kernels.program import GemmBackend


class Segment(NamedTuple):
    """Neighbouring rows of one adapter; int64 words. Without an adapter's matrices for this GEMM, `a` is 0."""

    first: int = 0  # the first row
    rows: int = 0
    a: int = 0  # address of A, float32 [rank/16, in/4, 4, 16], the last ones filled up with zeros
    ranks: int = 0  # rank/16
    b: int = 0  # address of B, float32 [blocks, rank/4, 4, NR]
    bias: int = 0  # address of float32 [blocks, NR]: the bias of the base, or that of the adapter


class LowRankArguments(NamedTuple):
    """The arguments of a call, as int64 words."""

    op: int = 0  # address of the op after it, whose source and norm are read
    segments: int = 0  # address of all rows as `Segment`s, in order
    segment_count: int = 0
    rows: int = 0  # of the result, MR more than there are: a micro-kernel may write rows after the last one
    biases: int = 0  # address of the result, float32 [blocks, rows, NR]
    down: int = 0  # address of memory for the panels of x @ A, float32 [panels, rank, MR]
    down_bytes: int = 0  # of a panel
    scratch: int = 0  # address of memory for each thread
    scratch_bytes: int = 0


SEGMENT, SEGMENT_WORDS = Segment(*range(len(Segment._fields))), len(Segment._fields)
LOW_RANK, LOW_RANK_WORDS = LowRankArguments(*range(len(LowRankArguments._fields))), len(LowRankArguments._fields)


class LowRank(NamedTuple):
    """An adapter's matrices for one linear weight, packed for a backend."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, backend: GemmBackend) -> LowRank:
        """Pack A [in, rank] and B [rank, out], which has the scale."""
        (width, rank), out, nr = a.shape, b.shape[1], backend.nr
        ranks, steps, blocks = -(-rank // LANES), -(-width // WORDS), -(-out // nr)
        down = F.pad(a, (0, ranks * LANES - rank, 0, steps * WORDS - width)).view(steps, WORDS, ranks, LANES)
        up = F.pad(b, (0, blocks * nr - out, 0, ranks * LANES - rank)).view(-1, WORDS, blocks, nr)
        return cls(down.permute(2, 0, 1, 3).contiguous(), up.permute(2, 0, 1, 3).contiguous())

    @property
    def ranks(self) -> int:
        """The rank in units of 16, rounded up."""
        return len(self.a)


def scratch_bytes(backend: GemmBackend, width: int) -> int:
    """The memory that a thread needs for rows of `width` elements: the sums of a panel, the panel, and a normed row."""
    padded = -(-width // LANES) * LANES
    return 4 * (padded + backend.isa.mr * (padded + LANES))


@functools.cache
def low_rank_kernel(isa: Isa, nr: int, dtype: torch.dtype) -> Kernel:
    """The function for GEMMs with blocks of `nr` columns and rows of this type, compiled or loaded.

    It is called by all threads of a program.
    """
    bf16 = dtype == torch.bfloat16
    return object_cache.load_or_compile(
        f"low rank {nr} {'bf16' if bf16 else 'fp32'}", lambda: _compile(isa, nr, bf16=bf16), isa
    )


def _compile(isa: Isa, nr: int, *, bf16: bool) -> Any:
    import numba
    from numba import carray, types

    thread, threads = thread_functions()
    barrier = types.ExternalFunction("GOMP_barrier", types.void())
    words = cast(types.int64, types.CPointer(types.int64))
    down, up = _down(isa.mr, bf16=bf16), _up(isa.mr, nr)

    @numba.njit(error_model="numpy")
    def work(arguments: Any) -> None:
        op = carray(words(arguments[LOW_RANK.op]), OP_WORDS)
        scratch = arguments[LOW_RANK.scratch] + thread() * arguments[LOW_RANK.scratch_bytes]
        segments = carray(words(arguments[LOW_RANK.segments]), arguments[LOW_RANK.segment_count] * SEGMENT_WORDS)
        down(arguments, op, segments, thread(), threads(), scratch)
        barrier()
        for block in range(op[OP.n_blocks] * thread() // threads(), op[OP.n_blocks] * (thread() + 1) // threads()):
            up(arguments, segments, block)

    return entry_point(work, LOW_RANK_WORDS, isa.architecture)


def _down(mr: int, *, bf16: bool) -> Any:
    """Build down(arguments, op, segments, thread, threads, scratch): x @ A for the panels of one thread."""
    import numba
    from numba import carray, types

    floats, bits = (cast(types.int64, types.CPointer(kind)) for kind in (types.float32, types.uint32))
    given = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.uint32))
    shift, norm = np.uint32(16 if bf16 else 0), layer_norm(bf16=bf16)
    multiply = kernel_by_rows(mr, 0, lambda rows, lines: micro_kernel(rows, mr, LANES, lines))

    @numba.njit(error_model="numpy")
    def pack(op: Any, row: int, column: int, panel: int, normed: int) -> None:
        """Write a row, normed if requested, to a column of a panel [in, MR]."""
        width, source = op[OP.width], op[OP.source] + row * op[OP.source_row_bytes]
        if op[OP.norm_weight] != 0:
            source = norm(op, row, source, normed)
        steps = (width + WORDS - 1) // WORDS
        x, target = carray(given(source), width), carray(bits(panel + column * 4), steps * WORDS * mr)
        for i in range(width):
            target[i * mr] = np.uint32(x[i]) << shift
        for i in range(width, steps * WORDS):
            target[i * mr] = np.uint32(0)

    @numba.njit(error_model="numpy")
    def multiply_panel(op: Any, a: int, ranks: int, rows: int, panel: int, sums: int, target: int) -> None:
        """x @ A of a packed panel, written as a packed panel [rank, MR]."""
        steps = (op[OP.width] + WORDS - 1) // WORDS
        found, out = carray(floats(sums), mr * LANES), carray(floats(target), ranks * LANES * mr)
        for block in range(ranks):
            for i in range(mr * LANES):
                found[i] = np.float32(0)
            for at in range(0, steps, KC):
                w = a + (block * steps + at) * WORDS * LANES * 4
                multiply(rows, panel + at * WORDS * mr * 4, w, min(KC, steps - at), sums, 0, 0)
            for row in range(mr):
                for i in range(LANES):
                    out[(block * LANES + i) * mr + row] = found[row * LANES + i]

    @numba.njit(error_model="numpy")
    def down(arguments: Any, op: Any, segments: Any, thread: int, threads: int, scratch: int) -> None:
        panel, number = scratch + mr * LANES * 4, 0
        normed = panel + (op[OP.width] + WORDS - 1) // WORDS * WORDS * mr * 4
        for segment in range(arguments[LOW_RANK.segment_count]):
            part = segments[segment * SEGMENT_WORDS : (segment + 1) * SEGMENT_WORDS]
            for start in range(0, part[SEGMENT.rows] if part[SEGMENT.a] != 0 else 0, mr):
                if number % threads == thread:
                    rows = min(mr, part[SEGMENT.rows] - start)
                    for i in range(rows):
                        pack(op, part[SEGMENT.first] + start + i, i, panel, normed)
                    target = arguments[LOW_RANK.down] + number * arguments[LOW_RANK.down_bytes]
                    multiply_panel(op, part[SEGMENT.a], part[SEGMENT.ranks], rows, panel, scratch, target)
                number += 1

    return down


def _up(mr: int, nr: int) -> Any:
    """Build up(arguments, segments, block): the biases of all rows for one block of columns."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))
    multiply = kernel_by_rows(mr, 0, lambda rows, lines: micro_kernel(rows, mr, nr, lines))

    @numba.njit(error_model="numpy")
    def up(arguments: Any, segments: Any, block: int) -> None:
        number = 0
        for segment in range(arguments[LOW_RANK.segment_count]):
            part = segments[segment * SEGMENT_WORDS : (segment + 1) * SEGMENT_WORDS]
            place = arguments[LOW_RANK.biases] + (block * arguments[LOW_RANK.rows] + part[SEGMENT.first]) * nr * 4
            bias = carray(floats(part[SEGMENT.bias] + block * nr * 4), nr)
            out = carray(floats(place), part[SEGMENT.rows] * nr)
            for row in range(part[SEGMENT.rows]):
                for i in range(nr):
                    out[row * nr + i] = bias[i]
            steps = part[SEGMENT.ranks] * LANES // WORDS
            w = part[SEGMENT.b] + block * steps * WORDS * nr * 4
            for start in range(0, part[SEGMENT.rows] if part[SEGMENT.a] != 0 else 0, mr):
                x = arguments[LOW_RANK.down] + number * arguments[LOW_RANK.down_bytes]
                multiply(min(mr, part[SEGMENT.rows] - start), x, w, steps, place + start * nr * 4, 0, 0)
                number += 1

    return up
