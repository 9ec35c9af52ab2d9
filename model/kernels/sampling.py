"""Drawing tokens, and the sum under the softmax, on a CPU: with the same bits on every CPU, and without sorting.

torch's softmax and sums give other bits on CPUs with other vector widths, and take five to twenty times as long. Here
each row is computed by one thread, in float64, in one written order: weights are summed in blocks, each in LANES
partial sums that are then added in pairs, and the sums of the blocks one after the other.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels import object_cache
from headrace.model.kernels.float64_math import exponential64, logarithm64
from headrace.model.kernels.intrinsics import cast, entry_point
from headrace.model.kernels.isa import architecture
from headrace.model.kernels.object_cache import Kernel
from headrace.model.kernels.openmp import team, thread_functions
from headrace.model.kernels.sampling_filters import BLOCK, BUCKETS, block_sums, filters


class SamplingArguments(NamedTuple):
    """The int64 words of a call, see `ops.py`. `rows` to `log_sums`: addresses of arrays, one element a drawn row."""

    logits: int  # address
    row_bytes: int  # bytes from one row to the next
    width: int
    drawn: int  # number of drawn rows
    rows: int  # int64: their indices among the logits
    largest: int  # float64: the largest logit of each, in units of the temperature
    temperatures: int  # float32
    top_ks: int  # int64: 0 keeps all
    top_ps: int  # float64: 1 keeps all
    min_ps: int  # float64
    uniforms: int  # float64
    chosen: int  # int64: the tokens are written here
    log_sums: int  # float64: the logarithms of the sums are written here; 0 to draw tokens
    scratch: int  # address of the threads' memory
    scratch_bytes: int  # of each thread
    partitions: int  # into how many parts the rows are split: the number of threads


ARG_WORDS = len(SamplingArguments._fields)
#: The position of each word.
ARG = SamplingArguments(*range(ARG_WORDS))


class DrawnRows(NamedTuple):
    """The rows for which a token is drawn, and how: lists with one element for each."""

    rows: list[int]
    temperatures: list[float]
    top_ks: list[int]
    top_ps: list[float]
    min_ps: list[float]
    uniforms: list[float]


def draw(logits: Tensor, largest: Tensor, drawn: DrawnRows) -> Tensor | None:
    """Draw a token for some rows of [R, V]. `largest` [R] are the rows' largest logits. Returns LongTensor [rows].

    The order of the filters is Hugging Face's: temperature, top-k, top-p, min-p. A row whose largest logit is not
    finite gets any token. Returns None where torch must be used.
    """
    kernel = _kernel_for(logits)
    if kernel is None:
        return None
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "rows": np.array(drawn.rows, dtype=np.int64),
        "temperatures": np.array(drawn.temperatures, dtype=np.float32),
        "top_ks": np.array(drawn.top_ks, dtype=np.int64),
        "top_ps": np.array(drawn.top_ps, dtype=np.float64),
        "min_ps": np.array(drawn.min_ps, dtype=np.float64),
        "uniforms": np.array(drawn.uniforms, dtype=np.float64),
        "chosen": np.zeros(len(drawn.rows), dtype=np.int64),
    }
    arrays["largest"] = (largest.float().numpy()[arrays["rows"]] / arrays["temperatures"]).astype(np.float64)
    _run(kernel, logits, arrays)
    return torch.from_numpy(arrays["chosen"])


def log_sums(logits: Tensor, largest: Tensor) -> Tensor | None:
    """The logarithm of the sum of e**logit of each row: [R, V], [R] -> float64 [R]. None where torch must be used.

    A row whose largest logit is not finite gets any number.
    """
    kernel = _kernel_for(logits)
    if kernel is None:
        return None
    count = len(logits)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "rows": np.arange(count),
        "temperatures": np.ones(count, dtype=np.float32),
        "largest": largest.double().numpy(),
        "log_sums": np.zeros(count, dtype=np.float64),
    }
    _run(kernel, logits, arrays)
    return torch.from_numpy(arrays["log_sums"])


def sampling_works(device: str, dtype: torch.dtype) -> bool:
    """Whether tokens are drawn by this kernel. Compiles it."""
    return device == "cpu" and _kernel(dtype) is not None


def _kernel_for(logits: Tensor) -> Kernel | None:
    if logits.device.type != "cpu" or logits.stride(1) != 1:
        return None
    return _kernel(logits.dtype)


def _run(kernel: Kernel, logits: Tensor, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    threads, width = torch.get_num_threads(), logits.shape[1]
    scratch_bytes = (-(-width // BLOCK) * BLOCK + BUCKETS + width + 8) // 8 * 64
    scratch = torch.empty(threads * scratch_bytes + 64, dtype=torch.uint8)
    arguments = SamplingArguments(
        logits=logits.data_ptr(),
        row_bytes=logits.stride(0) * logits.itemsize,
        width=width,
        drawn=len(arrays["rows"]),
        scratch=(scratch.data_ptr() + 63) // 64 * 64,
        scratch_bytes=scratch_bytes,
        partitions=threads,
        **{name: arrays[name].ctypes.data if name in arrays else 0 for name in _ARRAYS},
    )
    team().run(kernel.address, np.array(arguments, dtype=np.int64), threads)


_ARRAYS = ("rows", "largest", "temperatures", "top_ks", "top_ps", "min_ps", "uniforms", "chosen", "log_sums")


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel, compiled and self-tested; None where torch must be used."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    bf16 = dtype == torch.bfloat16
    return object_cache.load_tested(
        f"sampling {'bf16' if bf16 else 'fp32'}",
        lambda: compile_sampling(bf16),
        lambda kernel: _self_test(kernel, dtype),
        "sampling uses torch's operators",
    )


def _self_test(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether the logarithms of sums are those of torch in float64."""
    logits = (torch.randn(3, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    logits[1, 7] = -math.inf
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "rows": np.arange(3),
        "temperatures": np.ones(3, dtype=np.float32),
        "largest": logits.amax(1).double().numpy(),
        "log_sums": np.zeros(3),
    }
    _run(kernel, logits, arrays)
    return bool(np.allclose(arrays["log_sums"], logits.double().logsumexp(1).numpy(), rtol=1e-13, atol=0))


def _weights(bf16: bool) -> Any:
    """Build fill_weights(x, width, temperature, top, weights) and key(x), where x are the bits of logits."""
    import numba
    from numba import types

    number, exp = cast(types.uint32, types.float32), exponential64()

    @numba.njit(inline="always")
    def read(x: Any) -> Any:
        """The bits of a logit as a float32."""
        return np.uint32(x) << np.uint32(16) if bf16 else x

    @numba.njit(inline="always")
    def key(x: Any) -> Any:
        """The bits of a logit as an unsigned integer in the order of the numbers; -0 counts as 0."""
        bits = read(x)
        if bits == np.uint32(0x80000000):
            bits = np.uint32(0)
        negative = (bits >> np.uint32(31)) == np.uint32(1)
        return np.uint32(~bits) if negative else np.uint32(bits | np.uint32(0x80000000))

    @numba.njit(error_model="numpy")
    def fill_weights(x: Any, width: int, temperature: Any, top: Any, weights: Any) -> None:
        """weights[i] = e**(logit / temperature - top); zeros up to the end of the last block."""
        for i in range(width):
            weights[i] = exp(np.float64(number(read(x[i])) / temperature) - top)
        for i in range(width, (width + BLOCK - 1) // BLOCK * BLOCK):
            weights[i] = 0.0

    return fill_weights, key


def _choice(block_sum: Any, sum_all: Any) -> Any:
    """Build choose(weights, width, uniform); see its docstring."""
    import numba

    @numba.njit(error_model="numpy")
    def choose(weights: Any, width: int, uniform: Any) -> Any:
        """The token at which the cumulative weight exceeds `uniform` of all; the last with a weight if none does."""
        target = uniform * sum_all(weights, width)
        before, at = 0.0, 0
        for start in range(0, width, BLOCK):
            following = before + block_sum(weights, start)
            at = start
            if following > target:
                break
            if start + BLOCK < width:
                before = following
        for i in range(at, min(at + BLOCK, width)):
            before += weights[i]
            if before > target and weights[i] > 0:
                return i
        last = min(at + BLOCK, width) - 1
        while last > 0 and weights[last] == 0:
            last -= 1
        return last

    return choose


def compile_sampling(bf16: bool) -> Any:
    """Compile a C function of one pointer to `SamplingArguments`; returns a `numba.cfunc`."""
    import numba
    from numba import carray, types

    thread, threads = thread_functions()
    raw_bits = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.uint32))
    int64s, singles = (cast(types.int64, types.CPointer(kind)) for kind in (types.int64, types.float32))
    doubles, words = (cast(types.int64, types.CPointer(kind)) for kind in (types.float64, types.uint32))
    (fill_weights, key), natural_log = _weights(bf16), logarithm64()
    block_sum, sum_all = block_sums()
    (keep_top_k, keep_top_p), choose = filters(sum_all), _choice(block_sum, sum_all)

    @numba.njit(error_model="numpy")
    def draw_row(args: Any, n: int, x: Any, weights: Any, buckets_at: int) -> Any:
        """The token of a row. Behind the buckets is memory for two uint32 for each token."""
        width, count, buckets = args[ARG.width], args[ARG.drawn], carray(doubles(buckets_at), BUCKETS)
        k, p = carray(int64s(args[ARG.top_ks]), count)[n], carray(doubles(args[ARG.top_ps]), count)[n]
        floor = carray(doubles(args[ARG.min_ps]), count)[n]
        if 0 < k < width or p < 1.0:
            after = buckets_at + BUCKETS * 8
            keys, ids = carray(words(after), width), carray(words(after + width * 4), width)
            for i in range(width):
                keys[i] = key(x[i])
            if 0 < k < width:
                keep_top_k(keys, ids, width, weights, buckets, k)
            if p < 1.0:
                keep_top_p(keys, ids, width, weights, buckets, p)
        if floor > 0.0:
            for i in range(width):
                if weights[i] < floor:  # the largest weight is 1
                    weights[i] = 0.0
        return choose(weights, width, carray(doubles(args[ARG.uniforms]), count)[n])

    @numba.njit(error_model="numpy")
    def work(args: Any) -> None:
        """What one thread of the team does: one partition of the rows, or several if the team is small."""
        width, count, partitions = args[ARG.width], args[ARG.drawn], args[ARG.partitions]
        padded = (width + BLOCK - 1) // BLOCK * BLOCK
        scratch = args[ARG.scratch] + thread() * args[ARG.scratch_bytes]
        weights, buckets_at = carray(doubles(scratch), padded), scratch + padded * 8
        rows, tops = carray(int64s(args[ARG.rows]), count), carray(doubles(args[ARG.largest]), count)
        temperatures = carray(singles(args[ARG.temperatures]), count)
        for partition in range(thread(), partitions, threads()):
            for n in range(count * partition // partitions, count * (partition + 1) // partitions):
                x = carray(raw_bits(args[ARG.logits] + rows[n] * args[ARG.row_bytes]), width)
                fill_weights(x, width, temperatures[n], tops[n], weights)
                if args[ARG.log_sums] != 0:
                    carray(doubles(args[ARG.log_sums]), count)[n] = tops[n] + natural_log(sum_all(weights, width))
                else:
                    carray(int64s(args[ARG.chosen]), count)[n] = draw_row(args, n, x, weights, buckets_at)

    return entry_point(work, ARG_WORDS, architecture())
