"""The loops of attention around the functions of attention_rows.py: which thread computes which rows of which head."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from headrace.model.kernels.intrinsics import cast, entry_point, prefetch
from headrace.model.kernels.isa import Isa
from headrace.model.kernels.openmp import thread_functions

#: float32 elements in a cache line, and lanes of a vector.
LINE = 16
#: The most rows of a tile on any instruction set.
MOST_TILE_ROWS = 4


class AttentionArguments(NamedTuple):
    """The arguments of the compiled function for one layer: int64 words; see `ops.py` for how they are used.

    `k_slots` and what follows it are addresses of int64 arrays with one element for each slot, unless stated otherwise.
    """

    partitions: int  # into how many parts the heads are split: the number of threads
    heads: int  # of queries
    group: int  # query heads that read one head of keys and values
    window: int  # the most positions that a row of this layer may read
    longest: int  # the most positions that a row has
    scale_bits: int  # the bits of a float64
    q: int  # address of the queries; of the next three likewise
    q_row: int  # elements from one row to the next; of the next three likewise
    new_k: int
    new_k_row: int
    new_v: int
    new_v_row: int
    out: int
    out_row: int
    k_slots: int  # addresses of the slots' keys in this layer
    v_slots: int
    head_strides: int
    lengths: int
    counts: int
    first_rows: int
    head_partitions: int  # [partitions + 1]
    scratch: int  # address of float32 memory, shared among the threads
    scratch_bytes: int  # of each thread


ARG_WORDS = len(AttentionArguments._fields)
#: The position of each word.
ARG = AttentionArguments(*range(ARG_WORDS))


def scratch_floats(head_dim: int, longest: int) -> int:
    """float32 elements of each thread's scratch memory, in whole cache lines.

    For each row of a tile its query, its sums, and the sum of its weights in a line of its own; then its scores.
    """
    return LINE * MOST_TILE_ROWS * (2 * -(-head_dim // LINE) + 1 + -(-longest // LINE) + 1)


def compile_attention(head_dim: int, bf16: bool, rung: Isa) -> Any:
    """Compile a C function of one pointer to `AttentionArguments`; returns a `numba.cfunc`."""
    import numba
    from numba import carray, types

    thread, threads = thread_functions()
    int64s = cast(types.int64, types.CPointer(types.int64))
    locate, keep = cache_access(head_dim, bf16)
    compute, tile = compute_rows(head_dim, bf16, rung)

    @numba.njit(inline="always")
    def compute_slot(args: Any, here: Any, row: int, head: int, count: int, following: Any, scratch: int) -> None:
        """One head of all rows of a slot, in the order of their positions."""
        k, v, least = here
        nothing, number = (k, v, 0), 0
        while number < count:
            length = least + number
            whole = count - number >= tile and length >= LINE and args[ARG.window] >= length + tile - 1
            rows = tile if whole else 1
            for i in range(number, number + rows):
                keep(args, here, row + i, head, i)
            after = following if number + rows == count else nothing
            compute(args, here, row + number, head, number, rows, 1, after, scratch)
            number += rows

    @numba.njit(inline="always")
    def compute_heads(args: Any, here: Any, row: int, head: int, count: int, following: Any, scratch: int) -> None:
        """Some heads of one row that share a head of keys and values."""
        k, v, length = here
        nothing, last = (k, v, 0), head + count
        keep(args, here, row, head, 0)
        while head < last:
            whole = last - head >= tile and length >= LINE and args[ARG.window] >= length
            heads = tile if whole else 1
            after = following if head + heads == last else nothing
            compute(args, here, row, head, 0, heads, 0, after, scratch)
            head += heads

    @numba.njit(error_model="numpy")
    def work(args: Any) -> None:
        """What one thread of the team does: one partition of the heads, or several if the team is small."""
        heads, parts = args[ARG.heads], carray(int64s(args[ARG.head_partitions]), args[ARG.partitions] + 1)
        scratch = (args[ARG.scratch] + 63) // 64 * 64 + thread() * args[ARG.scratch_bytes]
        for part in range(thread(), args[ARG.partitions], threads()):
            unit, end = parts[part], parts[part + 1]
            while unit < end:
                slot, head = unit // heads, unit % heads
                here = locate(args, slot, head)
                row = carray(int64s(args[ARG.first_rows]), slot + 1)[slot]
                count = carray(int64s(args[ARG.counts]), slot + 1)[slot]
                taken = min(args[ARG.group] - head % args[ARG.group], end - unit) if count == 1 else 1
                unit += taken
                following = (here[0], here[1], 0)
                if unit < end:
                    following = locate(args, unit // heads, unit % heads)
                if count == 1:
                    compute_heads(args, here, row, head, taken, following, scratch)
                else:
                    compute_slot(args, here, row, head, count, following, scratch)

    return entry_point(work, ARG_WORDS, rung.architecture)


def cache_access(head_dim: int, bf16: bool) -> tuple[Any, Any]:
    """Build locate and keep: where a head of a slot is in the cache, and writing its new keys and values."""
    import numba
    from numba import carray, types

    itemsize = 2 if bf16 else 4
    elements = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.float32))
    int64s, row_bytes = cast(types.int64, types.CPointer(types.int64)), head_dim * itemsize

    @numba.njit(inline="always")
    def locate(args: Any, slot: int, head: int) -> Any:
        """Where the keys and values of a head of a slot begin, and how many positions its first row reads."""
        inside = carray(int64s(args[ARG.head_strides]), slot + 1)[slot] * itemsize * (head // args[ARG.group])
        k, v = (
            carray(int64s(args[ARG.k_slots]), slot + 1)[slot] + inside,
            carray(int64s(args[ARG.v_slots]), slot + 1)[slot] + inside,
        )
        return k, v, carray(int64s(args[ARG.lengths]), slot + 1)[slot]

    @numba.njit(error_model="numpy")
    def keep(args: Any, here: Any, row: int, head: int, number: int) -> None:
        """Write the new key and value of a row, the `number`-th of its slot, to the cache."""
        k_at, v_at, least = here
        inside, last = head // args[ARG.group] * row_bytes, (least + number - 1) * row_bytes
        k, v = carray(elements(k_at + last), head_dim), carray(elements(v_at + last), head_dim)
        new_k = carray(elements(args[ARG.new_k] + row * args[ARG.new_k_row] * itemsize + inside), head_dim)
        new_v = carray(elements(args[ARG.new_v] + row * args[ARG.new_v_row] * itemsize + inside), head_dim)
        for d in range(head_dim):
            k[d] = new_k[d]
            v[d] = new_v[d]

    return locate, keep


def compute_rows(head_dim: int, bf16: bool, rung: Isa) -> tuple[Any, int]:
    """Build compute: one head of a row or of a tile of rows. Returns it with the number of rows of a tile."""
    import numba
    from numba import types

    real, itemsize = cast(types.int64, types.float64), 2 if bf16 else 4
    attend, attend_tile, tile = attention_of_rows(head_dim, bf16, rung)
    row_bytes = head_dim * itemsize

    @numba.njit(inline="always")
    def compute(
        args: Any, here: Any, row: int, head: int, number: int, rows: int, more: int, following: Any, scratch: int
    ) -> None:
        """One head of a row, the `number`-th of its slot, or a tile.

        `more` is 1 for a tile of consecutive rows of the slot, and 0 for consecutive heads of one row.
        """
        k, v, least = here
        length, scale = least + number, np.float32(real(args[ARG.scale_bits]))
        q_row, out_row = args[ARG.q_row] * itemsize, args[ARG.out_row] * itemsize
        q, out = (
            args[ARG.q] + row * q_row + head * row_bytes,
            args[ARG.out] + row * out_row + head * row_bytes,
        )
        if rows > 1:
            q_step, out_step = (q_row, out_row) if more > 0 else (row_bytes, row_bytes)
            attend_tile(q, q_step, k, v, out, out_step, length, more, following, scratch, args[ARG.longest], scale)
        else:
            window, (next_k, next_v, positions) = args[ARG.window], following
            begin, later = max(0, length - window) * row_bytes, max(0, positions - window) * row_bytes
            following = (next_k + later, next_v + later, min(positions, window))
            attend(q, k + begin, v + begin, out, min(length, window), following, scratch, scale)

    return compute, tile


def attention_of_rows(head_dim: int, bf16: bool, rung: Isa) -> tuple[Any, Any, int]:
    """Build attend and attend_tile, and the number of rows of a tile.

    attend(q, k, v, out, length, following, scratch, scale): one query over `length` positions.
    attend_tile(q, q_step, k, v, out, out_step, length, more, following, scratch, longest, scale): a tile of queries,
    `q_step` bytes apart, the first over `length` positions, at least 16, and each next one over `more` of them.

    `following` is (k, v, positions): the keys and values that are needed next. They are prefetched, because all memory
    is read once, and the hardware prefetcher neither looks far enough ahead nor saturates memory.
    """
    import numba
    from numba import carray, types

    from headrace.model.kernels.attention_rows import Head, functions, tile_rows

    head, rows = Head(head_dim, bf16), tile_rows(rung)
    made = functions(head, rung)
    query, score, scores, scores_of_tile = (made[name] for name in ("query", "score", "scores", "scores_of_tile"))
    softmax, weighted_sums, finish = (made[name] for name in ("softmax", "weighted_sums", "finish"))
    weighted_sums_of_tile, row_bytes, query_bytes = made["weighted_sums_of_tile"], head.row_bytes, 64 * head.vectors
    floats, prefetch_line = cast(types.int64, types.CPointer(types.float32)), prefetch()

    @numba.njit(inline="always")
    def places(scratch: int) -> Any:
        """Where the sums, the sums of the weights, and the scores of a tile are; its queries are first."""
        sums = scratch + rows * query_bytes
        totals = sums + rows * query_bytes
        return sums, totals, totals + rows * 64

    @numba.njit(inline="always")
    def clear(sums: int, count: int) -> None:
        """Set the sums of some rows to zero."""
        numbers = carray(floats(sums), count * query_bytes // 4)
        for i in range(count * query_bytes // 4):
            numbers[i] = np.float32(0)

    @numba.njit(error_model="numpy")
    def prefetch_rest(length: int, following: Any) -> None:
        """Prefetch those of the following positions that were not prefetched while `length` were computed."""
        k, v, positions = following
        for t in range(length // LINE * LINE, positions):
            for line in range(0, row_bytes, 64):
                prefetch_line(k + t * row_bytes + line)
        for t in range(length, positions):
            for line in range(0, row_bytes, 64):
                prefetch_line(v + t * row_bytes + line)

    @numba.njit(error_model="numpy")
    def attend(q: int, k: int, v: int, out: int, length: int, following: Any, scratch: int, scale: Any) -> None:
        next_k, next_v, positions = following
        sums, total, found = places(scratch)
        query(q, scratch, scale)
        if length >= LINE:  # each score depends only on its key, so those of the last 16 may be computed twice
            scores(scratch, k, length // LINE, found, 0, next_k if positions > 0 else k)
            if length % LINE:
                rest = length - LINE
                scores(scratch, k + rest * row_bytes, 1, found + rest * 4, 0, k)
        else:
            for t in range(length):
                score(scratch, k + t * row_bytes, found + t * 4)
        softmax(found, length, total)
        clear(sums, 1)
        weighted_sums(found, 0, v, length, sums, next_v if positions > 0 else v)
        finish(sums, total, out)
        prefetch_rest(length, following)

    @numba.njit(error_model="numpy")
    def attend_tile(
        q: int,
        q_step: int,
        k: int,
        v: int,
        out: int,
        out_step: int,
        length: int,
        more: int,
        following: Any,
        scratch: int,
        longest: int,
        scale: Any,
    ) -> None:
        next_k, next_v, positions = following
        sums, total, found = places(scratch)
        found_step, last = ((longest + LINE - 1) // LINE + 1) * 64, length + (rows - 1) * more
        for row in range(rows):
            query(q + row * q_step, scratch + row * query_bytes, scale)
        # Each row gets the scores of the last row's positions, and uses those of its own.
        scores_of_tile(scratch, k, last // LINE, found, found_step, next_k if positions > 0 else k)
        if last % LINE:
            rest = last - LINE
            scores_of_tile(scratch, k + rest * row_bytes, 1, found + rest * 4, found_step, k)
        for row in range(rows):
            softmax(found + row * found_step, length + row * more, total + row * 64)
        clear(sums, rows)
        weighted_sums_of_tile(found, found_step, v, length, sums, next_v if positions > 0 else v)
        for row in range(rows):
            place, rest = sums + row * query_bytes, row * more
            if rest > 0:
                weighted_sums(found + row * found_step + length * 4, 0, v + length * row_bytes, rest, place, v)
            finish(place, total + row * 64, out + row * out_step)
        prefetch_rest(length, following)

    return attend, attend_tile, rows
