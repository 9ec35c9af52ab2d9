"""Attention of decoding rows and prompts on a CPU, over exactly the positions that each row has.

torch has no operator for single queries over caches of different lengths: its operator reads all rows up to the
length of the longest one, and has an overhead of a microsecond for each head. This kernel is compiled by numba when it
is first needed. Its inner loops are written in virtual vectors (attention_rows.py). It runs in torch's OpenMP threads
(openmp.py).

The kernel is batch-invariant: one thread computes a head of a row, in the order of the positions, and a row's bits
depend on nothing but its query and the keys and values of its positions. A slot may have several rows at consecutive
positions, as the tokens of a prompt are. One thread computes a head for all of them in this order, so each row finds
the keys and values that the rows before it have written. Where several query heads read one head of keys and values,
each of them writes the new ones: threads may write the same bytes twice, and none has to wait for another.

Rows that read the same keys and values form tiles: consecutive rows of one slot, or the heads of one row that share a
head of keys and values. With a window a row reads only its latest positions: the kernel begins at a later address.

Without numba or torch's OpenMP runtime `decode_kernel` returns None, and the caller uses torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels import isa, object_cache
from headrace.model.kernels.attention_tiles import (
    ARG,
    LINE,
    AttentionArguments,
    compile_attention,
    scratch_floats,
)
from headrace.model.kernels.intrinsics import Int64Array
from headrace.model.kernels.object_cache import Kernel
from headrace.model.kernels.openmp import team

#: A window that is longer than any sequence.
NO_WINDOW = 2**40


@dataclass(frozen=True)
class LayerRules:
    """How each layer attends: int64 [layers] each; created once for a cache."""

    #: The bits of a float64: what the scores are multiplied by.
    scale_bits: Int64Array
    #: The most positions that a row reads, the latest ones; NO_WINDOW: all of them.
    windows: Int64Array

    @classmethod
    def of(cls, scales: Sequence[float], windows: Sequence[int | None]) -> LayerRules:
        """From a scale and a window for each layer; a window of None is all positions."""
        return cls(
            np.array(scales, dtype=np.float64).view(np.int64),
            np.array([NO_WINDOW if window is None else window for window in windows], dtype=np.int64),
        )


@dataclass(frozen=True)
class DecodeRows:
    """Where the keys and values of the rows of S slots are; created once for all layers of a step.

    Args:
        k, v: int64 [layers, S], contiguous: addresses of the first position of the first head.
        head_stride: int64 [S], elements from one head to the next; the positions of a head are contiguous.
        lengths: int64 [S], positions that a slot's first row has, the new one included; each next row has one more.
        counts: int64 [S], rows of each slot.
    """

    k: Int64Array
    v: Int64Array
    head_stride: Int64Array
    lengths: Int64Array
    counts: Int64Array
    #: int64 [S]: the first row of each slot among the rows of q; its other rows follow.
    first: Int64Array
    #: int64 [threads + 1]: the heads of each thread, counted through all slots, with about equally many positions each.
    partitions: Int64Array

    @classmethod
    def of(
        cls,
        k: Int64Array,
        v: Int64Array,
        head_stride: Int64Array,
        lengths: Int64Array,
        counts: Int64Array,
        heads: int,
        first: Int64Array | None = None,
    ) -> DecodeRows:
        """Partition the query heads among as many threads as torch uses. Without `first`, rows are consecutive."""
        reads = counts * (2 * lengths + counts - 1) // 2  # each row has one position more than the one before
        read, threads = np.cumsum(np.repeat(reads, heads)), torch.get_num_threads()
        inner = np.searchsorted(read, read[-1] * np.arange(1, threads) / threads)
        at = np.cumsum(counts) - counts if first is None else first
        return cls(k, v, head_stride, lengths, counts, at, np.array([0, *inner, len(read)], dtype=np.int64))

    @property
    def longest(self) -> int:
        """The most positions that a row has."""
        return int((self.lengths + self.counts).max()) - 1


class LayerCalls(NamedTuple):
    """The compiled function and its arguments for each layer, for `call` ops of a program."""

    address: int
    arguments: Int64Array  # [layers, ARG_WORDS]
    scratch: np.ndarray[Any, Any]  # memory that the arguments refer to; keep it as long as them


class DecodeKernel:
    """Writes the new key and value of each row to its cache, then attends over all positions of the row."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: DecodeRows, rules: LayerRules
    ) -> None:
        """Compute one layer. q, out: [R, H, D]; k, v: [R, KV, D]; heads contiguous, any row stride; writes `out`.

        Raises:
            ValueError: the heads are not contiguous.
        """
        packed, _scratch = self._arguments([layer], q, k, v, out, rows, rules)
        team().run(self._kernel.address, packed[0], len(rows.partitions) - 1)

    def layer_calls(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: DecodeRows, rules: LayerRules
    ) -> LayerCalls:
        """The same for all layers, to be called by the threads of a program."""
        return LayerCalls(self._kernel.address, *self._arguments(range(len(rows.k)), q, k, v, out, rows, rules))

    def _arguments(
        self, layers: Sequence[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: DecodeRows, rules: LayerRules
    ) -> tuple[Int64Array, np.ndarray[Any, Any]]:
        """The arguments for each layer, [layers, ARG_WORDS], and the scratch memory that they refer to."""
        _, heads, width = q.shape
        for tensor in (q, k, v, out):
            if tensor.stride()[1:] != (width, 1):
                raise ValueError(f"heads must be contiguous; strides are {tensor.stride()} of {tuple(tensor.shape)}")
        longest, threads = rows.longest, len(rows.partitions) - 1
        thread_floats = scratch_floats(width, longest)
        scratch = np.empty(threads * thread_floats + LINE, dtype=np.float32)
        arguments = AttentionArguments(
            partitions=threads,
            heads=heads,
            group=heads // k.shape[1],
            window=0,  # this and the scale are of a layer
            longest=longest,
            scale_bits=0,
            q=q.data_ptr(),
            q_row=q.stride(0),
            new_k=k.data_ptr(),
            new_k_row=k.stride(0),
            new_v=v.data_ptr(),
            new_v_row=v.stride(0),
            out=out.data_ptr(),
            out_row=out.stride(0),
            k_slots=rows.k.ctypes.data,
            v_slots=rows.v.ctypes.data,
            head_strides=rows.head_stride.ctypes.data,
            lengths=rows.lengths.ctypes.data,
            counts=rows.counts.ctypes.data,
            first_rows=rows.first.ctypes.data,
            head_partitions=rows.partitions.ctypes.data,
            scratch=scratch.ctypes.data,
            scratch_bytes=4 * thread_floats,
        )
        packed = np.array([arguments] * len(layers), dtype=np.int64)
        at = np.array(layers)
        packed[:, ARG.k_slots] += at * rows.k.strides[0]
        packed[:, ARG.v_slots] += at * rows.v.strides[0]
        packed[:, ARG.window], packed[:, ARG.scale_bits] = rules.windows[at], rules.scale_bits[at]
        return packed, scratch


def decode_kernel(head_dim: int, dtype: torch.dtype, device: str) -> DecodeKernel | None:
    """The kernel for heads of `head_dim` elements, compiled and self-tested; None where torch must be used."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    return kernel_for(head_dim, dtype, isa.chosen())


@functools.cache
def kernel_for(head_dim: int, dtype: torch.dtype, rung: isa.Isa) -> DecodeKernel | None:
    """The kernel for an instruction set, which is that of this process."""
    bf16 = dtype == torch.bfloat16
    kernel = object_cache.load_tested(
        f"attention {head_dim} {'bf16' if bf16 else 'fp32'}",
        lambda: compile_attention(head_dim, bf16, rung),
        lambda kernel: _self_test(DecodeKernel(kernel), head_dim, dtype),
        "attention uses torch's operators",
    )
    return None if kernel is None else DecodeKernel(kernel)


def _self_test(kernel: DecodeKernel, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether it agrees with the formula: with a head of keys for each query or for four, and with a window."""
    return all(_agrees(kernel, head_dim, dtype, heads, window) for heads, window in ((2, None), (8, None), (4, 7)))


def _agrees(kernel: DecodeKernel, head_dim: int, dtype: torch.dtype, heads: int, window: int | None) -> bool:
    """Whether seven rows of three slots, of different lengths, agree with the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 3, 2, 32, head_dim, generator=generator).to(dtype)  # [k/v, S, KV, positions, D]
    new = torch.randn(7, 2, 2, head_dim, generator=generator).to(dtype)  # [R, k/v, KV, D]
    q = torch.randn(7, heads, head_dim, generator=generator).to(dtype)
    base = cache.data_ptr() + np.arange(6).reshape(2, 3) * (cache.stride(1) * dtype.itemsize)
    out = torch.empty(7, heads, head_dim, dtype=dtype)
    rows = DecodeRows.of(
        base[:1],
        base[1:],
        np.full(3, cache.stride(2)),
        lengths=np.array([1, 16, 32]),
        counts=np.array([1, 5, 1]),
        heads=heads,
    )
    kernel(0, q, new[:, 0], new[:, 1], out, rows, LayerRules.of([1 / math.sqrt(head_dim)], [window]))
    k, v = cache.double()
    for row, (slot, length) in enumerate([(0, 1), *((1, length) for length in range(16, 21)), (2, 32)]):
        k[slot, :, length - 1], v[slot, :, length - 1] = new[row].double()
        seen = slice(max(0, length - (window or length)), length)
        keys, values = (x[slot, :, seen].repeat_interleave(heads // 2, 0) for x in (k, v))  # [H, seen, D]
        scores = keys @ q[row].double()[:, :, None] / math.sqrt(head_dim)  # [H, seen, 1]
        expected = (scores.softmax(1) * values).sum(1)
        if not torch.allclose(out[row].double(), expected, atol=1e-5 if dtype == torch.float32 else 0.02):
            return False
    return torch.equal(cache.double(), torch.stack([k, v]))  # the new positions are written, all others unchanged
