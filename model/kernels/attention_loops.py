"""Attention of one query over one head, as loops that numba compiles: for CPUs without AVX-512."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.model.kernels.intrinsics import FAST_MATH, cast, exponential, prefetch, round_to_bfloat16


def attention(head_dim: int, bf16: bool) -> Any:
    """Build attend(q, k, v, out, length, following, scratch, scale): one query over the keys and values of one head.

    The first four are addresses, `length` is the number of positions, `scale` multiplies the scores. `scratch` is the
    address of the thread's memory: float32 [D] for the query, [D] for the sums, then the scores and a spare cache line.

    `following` is (k, v, positions): the keys and values that are needed next. They are prefetched early, because all
    memory is read once, and the hardware prefetcher neither looks far enough ahead nor saturates memory.
    The query and the sums of bfloat16 in pairs are stored with the elements of even index first.
    """
    import numba
    from numba import carray, types

    elements = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.float32))
    words_at = cast(types.int64, types.CPointer(word_type(head_dim, bf16)))
    floats = cast(types.int64, types.CPointer(types.float32))
    (lower, upper, store), width = _conversions(bf16), words(head_dim, bf16)
    paired = width < head_dim
    exp, prefetch_line = exponential(), prefetch()
    parts, row_bytes = head_dim // width, head_dim * (2 if bf16 else 4)

    @numba.njit(fastmath=FAST_MATH)
    def attend(
        q: int, k_at: int, v_at: int, out_at: int, length: int, following: Any, scratch: int, scale: Any
    ) -> None:
        next_k, next_v, positions = following
        given = carray(words_at(q), width)
        k, v = carray(words_at(k_at), length * width), carray(words_at(v_at), length * width)
        query, sums = carray(floats(scratch), head_dim), carray(floats(scratch + head_dim * 4), head_dim)
        scores = carray(floats(scratch + head_dim * 8), length)
        for d in range(width):
            query[d] = lower(given[d]) * scale
            if paired:
                query[width + d] = upper(given[d]) * scale
        top = np.float32(-np.inf)
        for t in range(length):
            if t < positions:
                for line in range(0, row_bytes, 64):
                    prefetch_line(next_k + t * row_bytes + line)
                    prefetch_line(next_v + t * row_bytes + line)
            score = np.float32(0)
            for d in range(width):
                word = k[t * width + d]
                score += query[d] * lower(word)
                if paired:
                    score += query[width + d] * upper(word)
            scores[t] = score
            top = max(top, score)
        total = np.float32(0)
        for t in range(length):
            scores[t] = exp(scores[t] - top)
            total += scores[t]
        for d in range(head_dim):
            sums[d] = np.float32(0)
        for t in range(length):
            if length + t < positions:
                for line in range(0, row_bytes, 64):
                    prefetch_line(next_k + (length + t) * row_bytes + line)
                    prefetch_line(next_v + (length + t) * row_bytes + line)
            weight = scores[t]
            for d in range(width):
                word = v[t * width + d]
                sums[d] += weight * lower(word)
                if paired:
                    sums[width + d] += weight * upper(word)
        out = carray(elements(out_at), head_dim)
        for d in range(width):
            for part in range(parts):
                out[parts * d + part] = store(sums[part * width + d] / total)

    return attend


def words(head_dim: int, bf16: bool) -> int:
    """How many words a head of a row has: pairs of bfloat16 where their number is even, else single elements."""
    return head_dim // 2 if bf16 and head_dim % 2 == 0 else head_dim


def word_type(head_dim: int, bf16: bool) -> Any:
    """The numba type of a word: uint32 for a pair of bfloat16, uint16 for a single one, float32."""
    from numba import types

    pairs = types.uint32 if words(head_dim, bf16) < head_dim else types.uint16
    return pairs if bf16 else types.float32


def _conversions(bf16: bool) -> tuple[Any, Any, Any]:
    """Build lower and upper, which read an element of a word as float32, and store, which rounds an element.

    A float32 is a word. A bfloat16 is the upper half of a float32; a word holds one, or two with the even index in its
    lower half.
    """
    import numba
    from numba import types

    value, rounded = cast(types.uint32, types.float32), round_to_bfloat16()

    @numba.njit(inline="always")
    def lower(word: Any) -> Any:
        return value(np.uint32(word) << np.uint32(16)) if bf16 else word

    @numba.njit(inline="always")
    def upper(word: Any) -> Any:
        return value(word & np.uint32(0xFFFF0000))

    @numba.njit(inline="always")
    def store(x: Any) -> Any:
        return rounded(x) if bf16 else x

    return lower, upper, store
