"""What adapters of low rank (LoRA) add to a GEMM, for rows of several adapters at once: x @ A @ B.

It runs as a call before the op of a GEMM and writes a bias for each row, which the epilogue adds:

    down   thread t: groups of MR rows of an adapter, normed as the op says | x @ A, float32 [MR, rank]
    barrier
    up     thread t: blocks of NR columns | bias + (x @ A) @ B for the rows of adapters, the bias for all others

Rows, sums and results are float32; the matrices are, too, or bfloat16 where the model is not float32. Each sum is a
chain of FMAs from the first to the last product, in parts of KC steps, so a row's bits depend neither on the other rows
nor on the number of threads nor on the instruction set.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels import object_cache
from headrace.model.kernels.gemm_blocks import KC, LANES, WORDS
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
    a: int = 0  # address of A [rank/16, in, 16]; rank and `in` are filled up with zeros to multiples of 16 and 4
    ranks: int = 0  # rank/16
    b: int = 0  # address of B [blocks, rank, NR]
    bias: int = 0  # address of float32 [blocks, NR]: the bias of the base, or that of the adapter


class LowRankArguments(NamedTuple):
    """The arguments of a call, as int64 words."""

    op: int = 0  # address of the op after it, whose source and norm are read
    segments: int = 0  # address of all rows as `Segment`s, in order
    segment_count: int = 0
    rows: int = 0  # of the result, MR more than there are: a micro-kernel may write rows after the last one
    biases: int = 0  # address of the result, float32 [blocks, rows, NR]
    down: int = 0  # address of memory for x @ A, float32 [groups, MR, rank]
    down_bytes: int = 0  # of a row
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
        ranks, blocks = -(-rank // LANES), -(-out // nr)
        down = F.pad(a, (0, ranks * LANES - rank, 0, -width % WORDS)).view(-1, ranks, LANES)
        up = F.pad(b, (0, blocks * nr - out, 0, ranks * LANES - rank)).view(-1, blocks, nr)
        packed = (each.to(backend.dtype).transpose(0, 1).contiguous() for each in (down, up))
        return cls(*packed)

    @property
    def ranks(self) -> int:
        """The rank in units of 16, rounded up."""
        return len(self.a)


def scratch_bytes(isa: Isa, width: int) -> int:
    """The memory that a thread needs: MR rows of `width` elements in float32, and one as the norm writes it."""
    return 4 * (isa.mr + 1) * -(-width // LANES) * LANES


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
    down, up = _down(isa.mr, bf16=bf16), _up(isa.mr, nr, bf16=bf16)

    @numba.njit(error_model="numpy")
    def work(arguments: Any) -> None:
        op = carray(words(arguments[LOW_RANK.op]), OP_WORDS)
        scratch = arguments[LOW_RANK.scratch] + thread() * arguments[LOW_RANK.scratch_bytes]
        segments = carray(words(arguments[LOW_RANK.segments]), (arguments[LOW_RANK.segment_count], SEGMENT_WORDS))
        down(arguments, op, segments, thread(), threads(), scratch)
        barrier()
        for block in range(op[OP.n_blocks] * thread() // threads(), op[OP.n_blocks] * (thread() + 1) // threads()):
            up(arguments, segments, block)

    return entry_point(work, LOW_RANK_WORDS, isa.architecture)


def _down(mr: int, *, bf16: bool) -> Any:
    """Build down(arguments, op, segments, thread, threads, scratch): x @ A for one thread's share of the groups."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))
    norm, copy_row = layer_norm(bf16=bf16), row_in_floats(bf16=bf16).intrinsic()
    multiply, row_of_a = _by_rows(mr, LANES, bf16=bf16), LANES * (2 if bf16 else 4)

    @numba.njit(error_model="numpy")
    def read(op: Any, row: int, target: int, normed: int) -> None:
        """Write a row, normed if requested, as float32, and zeros up to whole steps."""
        width, source = op[OP.width], op[OP.source] + row * op[OP.source_row_bytes]
        if op[OP.norm_weight] != 0:
            source = norm(op, row, source, normed)
        copy_row(source, target, width)
        rest = carray(floats(target + width * 4), WORDS)
        for i in range((WORDS - width % WORDS) % WORDS):
            rest[i] = np.float32(0)

    @numba.njit(error_model="numpy")
    def multiply_group(
        part: Any, soon: int, steps: int, rows: int, x: int, row_bytes: int, out: int, out_bytes: int
    ) -> None:
        """x @ A of some rows; meanwhile `soon`, another A, is prefetched."""
        for block in range(part[SEGMENT.ranks]):
            sums = out + block * LANES * 4
            for row in range(rows):
                first = carray(floats(sums + row * out_bytes), LANES)
                for i in range(LANES):
                    first[i] = np.float32(0)
            for at in range(0, steps, KC):
                offset = (block * steps + at) * WORDS * row_of_a
                w, near, count = part[SEGMENT.a] + offset, soon + offset, min(KC, steps - at)
                multiply(rows, x + at * WORDS * 4, row_bytes, w, count, sums, out_bytes, sums, out_bytes, near)

    @numba.njit(error_model="numpy")
    def down(arguments: Any, op: Any, segments: Any, thread: int, threads: int, scratch: int) -> None:
        steps, count = (op[OP.width] + WORDS - 1) // WORDS, 0
        row_bytes, out_bytes = steps * WORDS * 4, arguments[LOW_RANK.down_bytes]
        for i in range(len(segments)):
            count += (segments[i, SEGMENT.rows] + mr - 1) // mr if segments[i, SEGMENT.a] != 0 else 0
        first, last, group = count * thread // threads, count * (thread + 1) // threads, 0
        for i in range(len(segments)):
            part = segments[i]
            soon = segments[min(i + 1, len(segments) - 1), SEGMENT.a]
            for start in range(0, part[SEGMENT.rows] if part[SEGMENT.a] != 0 else 0, mr):
                if first <= group < last:
                    rows = min(mr, part[SEGMENT.rows] - start)
                    for row in range(rows):
                        at = part[SEGMENT.first] + start + row
                        read(op, at, scratch + row * row_bytes, scratch + mr * row_bytes)
                    out = arguments[LOW_RANK.down] + group * mr * out_bytes
                    multiply_group(part, soon, steps, rows, scratch, row_bytes, out, out_bytes)
                group += 1

    return down


def _up(mr: int, nr: int, *, bf16: bool) -> Any:
    """Build up(arguments, segments, block): the biases of all rows for one block of columns."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))
    multiply, row_of_b = _by_rows(mr, nr, bf16=bf16), nr * (2 if bf16 else 4)

    @numba.njit(error_model="numpy")
    def up(arguments: Any, segments: Any, block: int) -> None:
        group, x_bytes = 0, arguments[LOW_RANK.down_bytes]
        for i in range(len(segments)):
            part = segments[i]
            place = arguments[LOW_RANK.biases] + (block * arguments[LOW_RANK.rows] + part[SEGMENT.first]) * nr * 4
            bias, steps = part[SEGMENT.bias] + block * nr * 4, part[SEGMENT.ranks] * LANES // WORDS
            if part[SEGMENT.a] == 0:
                given, out = carray(floats(bias), nr), carray(floats(place), part[SEGMENT.rows] * nr)
                for row in range(part[SEGMENT.rows]):
                    for column in range(nr):
                        out[row * nr + column] = given[column]
                continue
            w, soon = part[SEGMENT.b] + block * steps * WORDS * row_of_b, part[SEGMENT.b]
            if i + 1 < len(segments):
                soon = segments[i + 1, SEGMENT.b] + block * segments[i + 1, SEGMENT.ranks] * LANES * row_of_b
            for start in range(0, part[SEGMENT.rows], mr):
                x, rows = arguments[LOW_RANK.down] + group * mr * x_bytes, min(mr, part[SEGMENT.rows] - start)
                multiply(rows, x, x_bytes, w, steps, bias, 0, place + start * nr * 4, nr * 4, soon)
                group += 1

    return up


def _by_rows(mr: int, nr: int, *, bf16: bool) -> Any:
    """Build by_rows(rows, ...): the micro-kernel for 1, 2, 4 or MR rows, the smallest number that is enough."""
    import numba

    one, two, four, most = (multiply_rows(rows, nr, bf16=bf16).intrinsic() for rows in (1, 2, 4, mr))

    @numba.njit(error_model="numpy")
    def by_rows(
        rows: int,
        x: int,
        x_bytes: int,
        w: int,
        steps: int,
        start: int,
        start_bytes: int,
        out: int,
        out_bytes: int,
        soon: int,
    ) -> None:
        if rows == 1:
            one(x, x_bytes, w, steps, start, start_bytes, out, out_bytes, soon)
        elif rows == 2:
            two(x, x_bytes, w, steps, start, start_bytes, out, out_bytes, soon)
        elif rows <= 4:
            four(x, x_bytes, w, steps, start, start_bytes, out, out_bytes, soon)
        else:
            most(x, x_bytes, w, steps, start, start_bytes, out, out_bytes, soon)

    return by_rows


def multiply_rows(rows: int, nr: int, *, bf16: bool) -> Any:
    """multiply_rows(x, x_bytes, w, steps, start, start_bytes, out, out_bytes, soon), a `VectorFunction`.

    out = start + x @ w for rows of float32 that are `*_bytes` apart: [rows, 4 * steps] by [4 * steps, nr]. Each sum is
    one chain of FMAs from 0 on, to which `start` is added. It prefetches as many bytes at `soon` as it reads at `w`.
    """
    from headrace.model.kernels.vector_function import VectorFunction
    from headrace.model.kernels.vectors import FLOAT, HALVES, INT64, Value, VectorBuilder

    vectors, vector_bytes = nr // LANES, 2 * LANES if bf16 else 4 * LANES
    step_bytes = WORDS * vectors * vector_bytes

    def body(
        v: VectorBuilder,
        x: Value,
        x_bytes: Value,
        w: Value,
        steps: Value,
        start: Value,
        start_bytes: Value,
        out: Value,
        out_bytes: Value,
        soon: Value,
    ) -> None:
        def of_row(address: Value, row: int, bytes_: Value) -> Value:
            return v.builder.add(address, v.builder.mul(bytes_, INT64(row)))

        lines = [of_row(x, row, x_bytes) for row in range(rows)]

        def step(offset: Value, w: Value, soon: Value, *found: Value) -> list[Value]:
            chains = list(found)
            for line in range(0, step_bytes, 64):
                v.prefetch(soon, line)
            for k in range(WORDS):
                at = [(k * vectors + j) * vector_bytes for j in range(vectors)]
                weights = [v.widen(v.load(w, i, HALVES, 2)) if bf16 else v.load(w, i) for i in at]
                for row in range(rows):
                    factor = v.broadcast(v.load(v.builder.add(lines[row], offset), 4 * k, FLOAT))
                    for j in range(vectors):
                        chains[row * vectors + j] = v.fma(factor, weights[j], chains[row * vectors + j])
            return [v.plus(offset, 4 * WORDS), v.plus(w, step_bytes), v.plus(soon, step_bytes), *chains]

        chains = v.repeat(steps, [INT64(0), w, soon, *[v.constant(0.0)] * (rows * vectors)], step)[3:]
        for row in range(rows):
            given, place = of_row(start, row, start_bytes), of_row(out, row, out_bytes)
            for j in range(vectors):
                v.store(v.add(v.load(given, 64 * j), chains[row * vectors + j]), place, 64 * j)

    parameters = ("x", "x_bytes", "w", "steps", "start", "start_bytes", "out", "out_bytes", "soon")
    return VectorFunction(f"low_rank_{rows}x{nr}_{'bf16' if bf16 else 'fp32'}", parameters, body)


def row_in_floats(*, bf16: bool) -> Any:
    """row_in_floats(source, target, width), a `VectorFunction`: a row of bfloat16 or float32 as float32."""
    from headrace.model.kernels.vector_function import VectorFunction
    from headrace.model.kernels.vectors import HALVES, INT64, Value, VectorBuilder

    def body(v: VectorBuilder, source: Value, target: Value, width: Value) -> None:
        def at(address: Value, index: Value, itemsize: int) -> Value:
            return v.builder.add(address, v.builder.mul(index, INT64(itemsize)))

        def write(index: Value, count: Value | None) -> list[Value]:
            x = v.widen(v.read(at(source, index, 2), count, HALVES)) if bf16 else v.read(at(source, index, 4), count)
            v.write(x, at(target, index, 4), count)
            return []

        v.over(width, [], write)

    return VectorFunction(f"row_in_floats_{'bf16' if bf16 else 'fp32'}", ("source", "target", "width"), body)
