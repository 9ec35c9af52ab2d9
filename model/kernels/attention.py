"""Attention of decoding rows and short prompts on a CPU, over exactly the keys and values that each row has.

torch has no operator for one query each over caches of different lengths: what there is reads all rows to the length of
the longest, and takes a microsecond for every head besides. This one is compiled by numba when it is first asked for,
its loops written out where the CPU has AVX-512 (attention_avx512.py), and runs in the threads that torch's
own operators run in: threads of another pool would fight with those, which wait for their next operator by spinning.

A row's bits depend on nothing but the row: a head of a row is computed by one thread, in the order of its positions.
A slot may have several rows, at positions that follow each other. One thread computes a head for all of them, in that
order, so each finds the keys and values that those before it have written.
Where numba, or torch's OpenMP runtime, cannot be had, `decode_kernel` gives None and the caller uses torch.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels import attention_avx512 as vectors
from headrace.model.kernels import object_cache as machine_code
from headrace.model.kernels.intrinsics import (
    LIBERTIES,
    cast,
    exponential,
    prefetch,
    round_to_bfloat16,
    team,
    team_functions,
)
from headrace.model.kernels.object_cache import Kernel

log = logging.getLogger("headrace.model")

#: Numbers in a line of the caches: what a thread writes for itself begins with one, and shares none with others.
LINE = 16
#: Where among the arguments the addresses of keys and values lie, one for each slot.
KEYS, VALUES = 12, 13

Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rows:
    """Where the keys and values of the rows of S slots lie; made once for all layers of a step.

    Args:
        k, v: int64 [layers, S], end to end, addresses of the first position of the first head.
        head_stride: int64 [S], numbers between one head and the next; positions lie end to end.
        lengths: int64 [S], positions that a slot's first row reads, the new one included; the next reads one more.
        counts: int64 [S], rows of each slot.
    """

    k: Array
    v: Array
    head_stride: Array
    lengths: Array
    counts: Array
    #: int64 [S]: the first row of each slot among those of `DecodeKernel`; the others follow it.
    first: Array
    #: int64 [threads + 1]: the heads of each thread, counted through all slots; about equally many positions for each.
    shares: Array

    @classmethod
    def of(
        cls,
        k: Array,
        v: Array,
        head_stride: Array,
        lengths: Array,
        counts: Array,
        heads: int,
        first: Array | None = None,
    ) -> Rows:
        """Shared out among as many threads as torch computes with. Without `first` the rows lie end to end."""
        reads = counts * (2 * lengths + counts - 1) // 2  # each row one more than the one before
        read, threads = np.cumsum(np.repeat(reads, heads)), torch.get_num_threads()
        shares = np.searchsorted(read, read[-1] * np.arange(1, threads) / threads)
        at = np.cumsum(counts) - counts if first is None else first
        return cls(k, v, head_stride, lengths, counts, at, np.array([0, *shares, len(read)], dtype=np.int64))

    @property
    def longest(self) -> int:
        """The most positions that a row reads."""
        return int((self.lengths + self.counts).max()) - 1


class Calls(NamedTuple):
    """A C function of one pointer, and for each layer what that points to."""

    address: int
    arguments: Array  # int64 [layers, ...]
    scratch: np.ndarray[Any, Any]  # what they name besides; to be kept as long


class DecodeKernel:
    """Writes the new key and value of each row into its cache, then attends over all it has there."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Rows, scale: float) -> None:
        """q, k, v, out: [R, H, D], heads end to end, any distance between rows; `out` is written."""
        packed, _scratch = self._arguments([layer], q, k, v, out, rows, scale)
        team().run(self._kernel.address, packed[0], len(rows.shares) - 1)

    def calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Rows, scale: float) -> Calls:
        """The same for all layers, to be called by the threads of a team."""
        return Calls(self._kernel.address, *self._arguments(range(len(rows.k)), q, k, v, out, rows, scale))

    def _arguments(
        self, layers: Sequence[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Rows, scale: float
    ) -> tuple[Array, np.ndarray[Any, Any]]:
        """What the C function is given for each layer, [layers, 20], and the memory in it that nobody else holds."""
        _, heads, width = q.shape
        for tensor in (q, k, v, out):
            if tensor.stride()[1:] != (width, 1):
                raise ValueError(f"heads must lie end to end; strides are {tensor.stride()} of {tuple(tensor.shape)}")
        longest, threads = rows.longest, len(rows.shares) - 1
        scratch = np.empty(threads * (longest + 2 * width + 2 * LINE) + LINE, dtype=np.float32)
        where: list[np.ndarray[Any, Any]] = [rows.k, rows.v, rows.head_stride, rows.lengths, rows.counts, rows.first]
        where += [rows.shares, scratch]
        arguments = [threads, heads, longest, np.float64(scale).view(np.int64)]
        arguments += [number for tensor in (q, k, v, out) for number in (tensor.data_ptr(), tensor.stride(0))]
        arguments += [array.ctypes.data for array in where]
        packed = np.array([arguments] * len(layers), dtype=np.int64)
        packed[:, KEYS] += np.array(layers) * rows.k.strides[0]
        packed[:, VALUES] += np.array(layers) * rows.v.strides[0]
        return packed, scratch


@functools.cache
def decode_kernel(head_dim: int, dtype: torch.dtype, device: str) -> DecodeKernel | None:
    """The kernel for heads of D numbers of a type, compiled and tried out; None where that cannot be done."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or head_dim % 2:
        return None
    try:
        half = dtype == torch.bfloat16
        kernel = DecodeKernel(machine_code.kernel(f"attention {head_dim} {half}", lambda: _compiled(head_dim, half)))
        if not _right(kernel, head_dim, dtype):
            raise RuntimeError("it gives other numbers than the formula")
    except Exception as error:  # a speed-up must never be what keeps a model from running
        log.warning("attention is computed by torch's operators, more slowly: %r", error)
        return None
    return kernel


def _right(kernel: DecodeKernel, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether four rows of three slots, of different lengths, come out as the formula has it."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 3, 2, 32, head_dim, generator=generator).to(dtype)  # [k/v, S, H, positions, D]
    qkv = torch.randn(4, 3, 2, head_dim, generator=generator).to(dtype)  # [R, q/k/v, H, D]
    base = cache.data_ptr() + np.arange(6).reshape(2, 3) * (cache.stride(1) * dtype.itemsize)
    out = torch.empty(4, 2, head_dim, dtype=dtype)
    rows = Rows.of(
        base[:1],
        base[1:],
        np.full(3, cache.stride(2)),
        lengths=np.array([1, 16, 32]),
        counts=np.array([1, 2, 1]),
        heads=2,
    )
    kernel(0, qkv[:, 0], qkv[:, 1], qkv[:, 2], out, rows, 1 / math.sqrt(head_dim))
    k, v = cache.double()
    for row, (slot, length) in enumerate([(0, 1), (1, 16), (1, 17), (2, 32)]):
        k[slot, :, length - 1], v[slot, :, length - 1] = qkv[row, 1].double(), qkv[row, 2].double()
        scores = k[slot, :, :length] @ qkv[row, 0].double()[:, :, None] / math.sqrt(head_dim)  # [H, length, 1]
        expected = (scores.softmax(1) * v[slot, :, :length]).sum(1)
        if not torch.allclose(out[row].double(), expected, atol=1e-5 if dtype == torch.float32 else 0.02):
            return False
    return torch.equal(cache.double(), torch.stack([k, v]))  # the new ones written, all others left alone


def _compiled(head_dim: int, half: bool) -> Any:
    """The kernel as a C function of one pointer, to the int64 numbers that `DecodeKernel` packs."""
    import numba
    from numba import carray, types

    thread, threads = team_functions()
    words = cast(types.int64, types.CPointer(types.uint32 if half else types.float32))
    whole, real = cast(types.int64, types.CPointer(types.int64)), cast(types.int64, types.float64)
    attend = vectors.attention(head_dim, half) if vectors.can_attend(head_dim, half) else _attention(head_dim, half)
    size, width = (2, head_dim // 2) if half else (4, head_dim)

    @numba.njit(inline="always")
    def place(a: Any, slot: int, head: int) -> Any:
        """Where the keys and values of a head of a slot begin, and how many there are for its first row."""
        inside = carray(whole(a[14]), slot + 1)[slot] * size * head
        k, v = carray(whole(a[12]), slot + 1)[slot] + inside, carray(whole(a[13]), slot + 1)[slot] + inside
        return k, v, carray(whole(a[15]), slot + 1)[slot]

    @numba.njit(error_model="numpy")
    def compute(a: Any, here: Any, row: int, inside: int, number: int, after: Any, own: int) -> None:
        """One head of a slot's row of this number, while what comes after it is asked for."""
        k_at, v_at, least = here
        length = least + number
        k, v = carray(words(k_at), length * width), carray(words(v_at), length * width)
        new_k = carray(words(a[6] + row * a[7] * size + inside), width)
        new_v = carray(words(a[8] + row * a[9] * size + inside), width)
        for d in range(width):
            k[(length - 1) * width + d] = new_k[d]
            v[(length - 1) * width + d] = new_v[d]
        q, out = a[4] + row * a[5] * size + inside, a[10] + row * a[11] * size + inside
        attend(q, k_at, v_at, out, length, after, own, np.float32(real(a[3])))

    @numba.njit(error_model="numpy")
    def work(a: Any) -> None:
        """What one thread of the team does: a share of the heads, or more than one if the team is small."""
        heads, shares = a[1], carray(whole(a[18]), a[0] + 1)
        own = (a[19] // 64 + thread() * ((a[2] + 2 * head_dim) // LINE + 2) + 1) * 64
        for number in range(thread(), a[0], threads()):
            slot, head = shares[number] // heads, shares[number] % heads
            for unit in range(shares[number], shares[number + 1]):
                here, inside = place(a, slot, head), head * head_dim * size
                first, count = carray(whole(a[17]), slot + 1)[slot], carray(whole(a[16]), slot + 1)[slot]
                if unit + 1 < shares[number + 1]:
                    slot, head = (slot, head + 1) if head + 1 < heads else (slot + 1, 0)
                k, v, length = place(a, slot, head)
                for i in range(count):
                    compute(a, here, first + i, inside, i, (k, v, length if i + 1 == count else 0), own)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, 20))

    return kernel


def _attention(head_dim: int, half: bool) -> Any:
    """One query over the keys and values of one head.

    attend(q, k, v, out, length, after, own, scale): addresses, but for the number of positions and what scores are
    multiplied by. `own` is a thread's memory: D numbers for a query, D for the sums, then scores, with a line to spare.

    `after` says where the keys and values lie that are needed next, and how many. All memory is read once, so it is
    asked for long before: within a head no hardware looks far enough ahead, and one stream of requests is too slow.
    A query and the sums of bfloat16 have the even places first.
    """
    import numba
    from numba import carray, types

    numbers = cast(types.int64, types.CPointer(types.uint16 if half else types.float32))
    words = cast(types.int64, types.CPointer(types.uint32 if half else types.float32))
    floats = cast(types.int64, types.CPointer(types.float32))
    (lower, upper, store), parts = _numbers(half), 2 if half else 1
    exp, fetch = exponential(), prefetch()
    width, row_bytes = (head_dim // 2, head_dim * 2) if half else (head_dim, head_dim * 4)

    @numba.njit(fastmath=LIBERTIES)
    def attend(q: int, k_at: int, v_at: int, out_at: int, length: int, after: Any, own: int, scale: Any) -> None:
        next_k, next_v, positions = after
        given, k, v = carray(words(q), width), carray(words(k_at), length * width), carray(words(v_at), length * width)
        query, sums = carray(floats(own), head_dim), carray(floats(own + head_dim * 4), head_dim)
        scores = carray(floats(own + head_dim * 8), length)
        for d in range(width):
            query[d] = lower(given[d]) * scale
            if half:
                query[width + d] = upper(given[d]) * scale
        top = np.float32(-np.inf)
        for t in range(length):
            if t < positions:
                for line in range(0, row_bytes, 64):
                    fetch(next_k + t * row_bytes + line)
                    fetch(next_v + t * row_bytes + line)
            score = np.float32(0)
            for d in range(width):
                word = k[t * width + d]
                score += query[d] * lower(word)
                if half:
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
                    fetch(next_k + (length + t) * row_bytes + line)
                    fetch(next_v + (length + t) * row_bytes + line)
            weight = scores[t]
            for d in range(width):
                word = v[t * width + d]
                sums[d] += weight * lower(word)
                if half:
                    sums[width + d] += weight * upper(word)
        out = carray(numbers(out_at), head_dim)
        for d in range(width):
            for part in range(parts):
                out[parts * d + part] = store(sums[part * width + d] / total)

    return attend


def _numbers(half: bool) -> tuple[Any, Any, Any]:
    """How compiled code reads and writes numbers: the one at an even place of a word, that at the odd one, and back.

    A float32 is a word. bfloat16 is the upper half of a float32, and two of them lie in a word, the even place below.
    """
    import numba
    from numba import types

    value, rounded = cast(types.uint32, types.float32), round_to_bfloat16()

    @numba.njit(inline="always")
    def lower(word: Any) -> Any:
        return value(word << np.uint32(16)) if half else word

    @numba.njit(inline="always")
    def upper(word: Any) -> Any:
        return value(word & np.uint32(0xFFFF0000))

    @numba.njit(inline="always")
    def store(x: Any) -> Any:
        return rounded(x) if half else x

    return lower, upper, store
