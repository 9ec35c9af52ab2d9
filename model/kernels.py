"""Attention of decoding rows on a CPU, as one pass over exactly the keys and values that each row has.

torch has no operator for one query each over caches of different lengths: what there is reads all rows to the length of
the longest, and takes a microsecond for every head besides. This one is compiled by numba when it is first asked for,
and runs in the threads that torch's own operators run in: threads of another pool would fight with those, which wait
for their next operator by spinning.

A row's bits depend on nothing but the row: a head of a row is computed by one thread, in the order of its positions.
Where numba, or torch's OpenMP runtime, cannot be had, `decode_kernel` gives None and the caller uses torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("millrace.model")

#: Positions by which memory is asked for ahead: all of it is read once, and past the end of a page no hardware looks.
AHEAD = 32

Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rows:
    """Where the keys and values of R decoding rows lie; made once for all layers of a step.

    Args:
        k, v: int64 [layers, R], addresses of the first position of the first head.
        head_stride: int64 [R], numbers between one head and the next; positions lie end to end.
        lengths: int64 [R], positions to be read, the new one included.
    """

    k: Array
    v: Array
    head_stride: Array
    lengths: Array
    #: int64 [threads + 1]: the heads of each thread, counted through all rows; about equally many positions for each.
    shares: Array

    @classmethod
    def of(cls, k: Array, v: Array, head_stride: Array, lengths: Array, heads: int) -> Rows:
        """Shared out among as many threads as torch computes with."""
        read, threads = np.cumsum(np.repeat(lengths, heads)), torch.get_num_threads()
        shares = np.searchsorted(read, read[-1] * np.arange(1, threads) / threads)
        return cls(k, v, head_stride, lengths, np.array([0, *shares, len(read)], dtype=np.int64))


class DecodeKernel:
    """Writes the new key and value of each row into its cache, then attends over all it has there."""

    def __init__(self, function: Any, parallel: Callable[..., None]) -> None:
        self._function = function  # numba's, which owns the code
        self._parallel = parallel

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Rows, scale: float) -> None:
        """q, k, v, out: [R, H, D], heads end to end, any distance between rows; `out` is written."""
        _, heads, width = q.shape
        for tensor in (q, k, v, out):
            if tensor.stride()[1:] != (width, 1):
                raise ValueError(f"heads must lie end to end; strides are {tensor.stride()} of {tuple(tensor.shape)}")
        where = [rows.k[layer], rows.v[layer], rows.head_stride, rows.lengths, rows.shares]
        arguments = [len(rows.shares) - 1, heads, int(rows.lengths.max()), np.float64(scale).view(np.int64)]
        arguments += [number for tensor in (q, k, v, out) for number in (tensor.data_ptr(), tensor.stride(0))]
        arguments += [array.ctypes.data for array in where]
        packed = np.array(arguments, dtype=np.int64)
        self._parallel(self._function.address, packed.ctypes.data, len(rows.shares) - 1, 0)


@functools.cache
def decode_kernel(head_dim: int, dtype: torch.dtype, device: str) -> DecodeKernel | None:
    """The kernel for heads of D numbers of a type, compiled and tried out; None where that cannot be done."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or head_dim % 2:
        return None
    try:
        runtime = _openmp()
        kernel = DecodeKernel(_compiled(head_dim, dtype == torch.bfloat16, runtime), _parallel(runtime))
        if not _right(kernel, head_dim, dtype):
            raise RuntimeError("it gives other numbers than the formula")
    except Exception as error:  # a speed-up must never be what keeps a model from running
        log.warning("attention is computed by torch's operators, more slowly: %r", error)
        return None
    return kernel


def _openmp() -> str:
    """The path of the OpenMP runtime that torch has loaded."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    found = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    ours = [path for path in found if "torch" in path]
    if not found:
        raise RuntimeError("torch has loaded no OpenMP runtime")
    return (ours or found)[0]


def _parallel(runtime: str) -> Callable[..., None]:
    """OpenMP's own entry: runs a function in a team of threads, the one that torch's operators use."""
    parallel = ctypes.CDLL(runtime).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _right(kernel: DecodeKernel, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether three rows of different lengths come out as the formula has it."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 3, 2, 32, head_dim, generator=generator).to(dtype)  # [k/v, R, H, positions, D]
    qkv = torch.randn(3, 3, 2, head_dim, generator=generator).to(dtype)  # [R, q/k/v, H, D]
    lengths = np.array([1, 17, 32])
    base = cache.data_ptr() + np.arange(6).reshape(2, 3) * (cache.stride(1) * dtype.itemsize)
    out = torch.empty(3, 2, head_dim, dtype=dtype)
    rows = Rows.of(base[:1], base[1:], np.full(3, cache.stride(2)), lengths, 2)
    kernel(0, qkv[:, 0], qkv[:, 1], qkv[:, 2], out, rows, 1 / math.sqrt(head_dim))
    k, v = cache.double()
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length - 1], v[row, :, length - 1] = qkv[row, 1].double(), qkv[row, 2].double()
        scores = k[row, :, :length] @ qkv[row, 0].double()[:, :, None] / math.sqrt(head_dim)  # [H, length, 1]
        expected = (scores.softmax(1) * v[row, :, :length]).sum(1)
        if not torch.allclose(out[row].double(), expected, atol=1e-5 if dtype == torch.float32 else 0.02):
            return False
    return torch.equal(cache.double(), torch.stack([k, v]))  # the new ones written, all others left alone


def _compiled(head_dim: int, half: bool, runtime: str) -> Any:
    """The kernel as a C function of one pointer, to the int64 numbers that `DecodeKernel` packs."""
    import numba
    from llvmlite import binding
    from numba import carray, types

    binding.load_library_permanently(runtime)
    thread = types.ExternalFunction("omp_get_thread_num", types.int32())
    threads = types.ExternalFunction("omp_get_num_threads", types.int32())
    numbers = _cast(types.int64, types.CPointer(types.uint16 if half else types.float32))
    words = _cast(types.int64, types.CPointer(types.uint32 if half else types.float32))
    whole, real = _cast(types.int64, types.CPointer(types.int64)), _cast(types.int64, types.float64)
    lower, upper, store, attend = *_numbers(half), _attention(head_dim, half)
    size, width, parts = (2, head_dim // 2, 2) if half else (4, head_dim, 1)

    @numba.njit
    def compute(a: Any, row: int, head: int, scores: Any, sums: Any, query: Any) -> None:
        """One head of a row."""
        scale, inside = np.float32(real(a[3])), head * head_dim * size
        stride, length = carray(whole(a[14]), row + 1)[row] * size, carray(whole(a[15]), row + 1)[row]
        k_at = carray(whole(a[12]), row + 1)[row] + head * stride
        v_at = carray(whole(a[13]), row + 1)[row] + head * stride
        k, v = carray(words(k_at), length * width), carray(words(v_at), length * width)
        q = carray(words(a[4] + row * a[5] * size + inside), width)
        new_k = carray(words(a[6] + row * a[7] * size + inside), width)
        new_v = carray(words(a[8] + row * a[9] * size + inside), width)
        out = carray(numbers(a[10] + row * a[11] * size + inside), head_dim)
        for d in range(width):
            k[(length - 1) * width + d] = new_k[d]
            v[(length - 1) * width + d] = new_v[d]
            query[d] = lower(q[d]) * scale
            if half:
                query[width + d] = upper(q[d]) * scale
        total = attend(query, k, k_at, v, v_at, length, scores, sums)
        for d in range(width):
            for part in range(parts):
                out[parts * d + part] = store(sums[part * width + d] / total)

    @numba.njit
    def work(a: Any) -> None:
        """What one thread of the team does: a share of the heads, or more than one if the team is small."""
        shares = carray(whole(a[16]), a[0] + 1)
        scores, sums = np.empty(a[2], np.float32), np.empty(head_dim, np.float32)
        query = np.empty(head_dim, np.float32)
        for number in range(thread(), a[0], threads()):
            for unit in range(shares[number], shares[number + 1]):
                compute(a, unit // a[1], unit % a[1], scores, sums, query)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, 17))

    return kernel


#: Sums of a head are taken in vectors, in an order that is fixed when they are compiled. NaN must stay NaN: it is how a
#: broken row is known, so that "nnan" and "ninf" are not among the liberties.
LIBERTIES = {"reassoc", "contract", "nsz", "arcp"}


def _attention(head_dim: int, half: bool) -> Any:
    """One query over the keys and values of one head: sums the weighted values, gives the sum of the weights.

    `k_at` and `v_at` are the addresses of k and v. A query and the sums of bfloat16 have the even places first.
    """
    import numba

    lower, upper, _ = _numbers(half)
    exp, fetch = _exponential(), _prefetch()
    width, row_bytes = (head_dim // 2, head_dim * 2) if half else (head_dim, head_dim * 4)

    @numba.njit(fastmath=LIBERTIES)
    def attend(query: Any, k: Any, k_at: Any, v: Any, v_at: Any, length: int, scores: Any, sums: Any) -> Any:
        top = np.float32(-np.inf)
        for t in range(length):
            fetch(k_at + (t + AHEAD) * row_bytes)
            fetch(k_at + (t + AHEAD) * row_bytes + 64)
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
            fetch(v_at + (t + AHEAD) * row_bytes)
            fetch(v_at + (t + AHEAD) * row_bytes + 64)
            weight = scores[t]
            for d in range(width):
                word = v[t * width + d]
                sums[d] += weight * lower(word)
                if half:
                    sums[width + d] += weight * upper(word)
        return total

    return attend


def _numbers(half: bool) -> tuple[Any, Any, Any]:
    """How compiled code reads and writes numbers: the one at an even place of a word, that at the odd one, and back.

    A float32 is a word. bfloat16 is the upper half of a float32, and two of them lie in a word, the even place below.
    """
    import numba
    from numba import types

    value, bits = _cast(types.uint32, types.float32), _cast(types.float32, types.uint32)

    @numba.njit(inline="always")
    def lower(word: Any) -> Any:
        return value(word << np.uint32(16)) if half else word

    @numba.njit(inline="always")
    def upper(word: Any) -> Any:
        return value(word & np.uint32(0xFFFF0000))

    @numba.njit(inline="always")
    def store(x: Any) -> Any:
        """Rounded to the nearest, of two equally near to the even one."""
        if not half:
            return x
        raw = bits(x)
        rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(rounded) if x == x else np.uint16(0x7FC0)

    return lower, upper, store


def _exponential() -> Any:
    """e**x for x up to 0, after Cephes (Moshier 1989), in a form that a compiler turns into vectors."""
    import numba
    from numba import types

    value = _cast(types.uint32, types.float32)

    @numba.njit(inline="always", fastmath=LIBERTIES)
    def exp(x: Any) -> Any:
        x = max(x, np.float32(-87.0)) if x == x else x
        n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        return (p * r * r + r + np.float32(1)) * value(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))

    return exp


def _cast(source: Any, target: Any) -> Any:
    """A function for compiled code that reads bits as those of another type, or a number as an address."""
    from numba import types
    from numba.extending import intrinsic

    how = "inttoptr" if isinstance(target, types.CPointer) else "bitcast"

    @intrinsic
    def function(_: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return getattr(builder, how)(values[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return function


def _prefetch() -> Any:
    """A function for compiled code that asks for a cache line before it is needed; any address may be named."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def fetch(_: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [builder.inttoptr(values[0], byte), word(0), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return fetch
