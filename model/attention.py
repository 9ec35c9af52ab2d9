"""Attention over the key/value cache, for decoding rows and chunks of prompts.

On a CPU decoding rows and short prompts use the compiled kernel (kernels/attention.py), and longer prompts use torch's
operator. Elsewhere torch's operator computes everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.attention import DecodeKernel, DecodeRows, LayerCalls
from headrace.model.kernels.intrinsics import Int64Array
from headrace.model.kv_cache import Arena, KVCache

#: torch's operator reads keys up to a multiple of this: padding within it does not change a row's bits, more might.
KEY_STEP = 16
#: Prompts of at most this many tokens are computed like decoding rows, because torch's operator is slower for them.
MAX_COMPILED_PROMPT = 128


@dataclass(frozen=True)
class Chunk:
    """A chunk of a prompt: `count` tokens from position `start`, in the packed rows from `row` on."""

    length_class: int
    slot: int
    start: int
    count: int
    row: int


@dataclass(frozen=True)
class DecodeGroup:
    """The decoding rows of one arena, in the packed rows from `row` on, in the order of their slots.

    Slot i of the group has `counts[i]` rows, one token each, from `positions[i]` on.
    """

    length_class: int
    slots: list[int]
    positions: list[int]
    counts: list[int]
    row: int


class CachedAttention:
    """Attention of one step: writes the new keys and values, then attends over the positions that each row may see."""

    def __init__(self, scale: float, parts: Sequence[_Compiled | Decode | _Prefill]) -> None:
        self.scale, self._parts = scale, parts

    @classmethod
    def of(
        cls, cache: KVCache, scale: float, *, groups: Sequence[DecodeGroup], chunks: Sequence[Chunk]
    ) -> CachedAttention:
        """Attention for decoding rows and chunks of prompts, by the compiled kernel if there is one."""
        kernel = cache.decode_kernel()
        if kernel is None:
            parts: list[_Compiled | Decode | _Prefill] = [Decode.of(cache.arenas[g.length_class], g) for g in groups]
            return cls(scale, [*parts, *(_Prefill(cache.arenas[c.length_class], c) for c in chunks)])
        short = [chunk for chunk in chunks if chunk.start + chunk.count <= MAX_COMPILED_PROMPT]
        prefills = [
            _Prefill(cache.arenas[c.length_class], c) for c in chunks if c.start + c.count > MAX_COMPILED_PROMPT
        ]
        return cls(scale, [_Compiled(kernel, cache, groups, short), *prefills] if groups or short else prefills)

    def layer_calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> LayerCalls | None:
        """The compiled calls of all layers, which read the same q, k, v and write the same `out`.

        Returns None unless the compiled kernel computes all rows.
        """
        part = self._parts[0] if len(self._parts) == 1 else None
        if not isinstance(part, _Compiled) or part.count != len(q):
            return None
        return part.layer_calls(q, k, v, out, self.scale)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [M, H, D] -> [M, H, D]; padding rows give zeros."""
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for part in self._parts:
            rows = part.rows
            part.attend(layer, q[rows], k[rows], v[rows], out[rows], self.scale)
        return out


class _Compiled:
    """All decoding rows of a step and the rows of short prompts in one call, each over exactly its own positions."""

    def __init__(
        self, kernel: DecodeKernel, cache: KVCache, groups: Sequence[DecodeGroup], chunks: Sequence[Chunk]
    ) -> None:
        self._kernel = kernel
        self.rows = slice(None)
        joined = _joined(chunks)
        groups = [*groups, *(DecodeGroup(c.length_class, [c.slot], [c.start], [c.count], c.row) for c in joined)]
        arenas = [cache.arenas[group.length_class] for group in groups]
        self._read = [(*arena.k, *arena.v) for arena in arenas]  # the kernel reads them by address: keep them alive
        self._where = DecodeRows.of(
            k=np.concatenate([_addresses(a.k, g.slots) for a, g in zip(arenas, groups, strict=True)], axis=1),
            v=np.concatenate([_addresses(a.v, g.slots) for a, g in zip(arenas, groups, strict=True)], axis=1),
            head_stride=np.repeat([a.k[0].stride(1) for a in arenas], [len(g.slots) for g in groups]),
            lengths=np.concatenate([g.positions for g in groups]) + 1,
            counts=np.concatenate([g.counts for g in groups]),
            first=np.concatenate([g.row + np.cumsum([0, *g.counts[:-1]]) for g in groups]),
            heads=arenas[0].k[0].shape[1],
        )

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self._where.counts.sum())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        self._kernel(layer, q, k, v, out, self._where, scale)

    def layer_calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> LayerCalls:
        return self._kernel.layer_calls(q, k, v, out, self._where, scale)


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks of a step; those of one slot that follow each other are merged into one.

    The kernel computes the rows of a slot in order, in one thread. Two separate chunks of one prompt would be computed
    by two threads, and the second could read keys that the first has not written yet.
    """
    joined: list[Chunk] = []
    for chunk in chunks:
        last = joined[-1] if joined else None
        if last and (last.length_class, last.slot, last.start + last.count, last.row + last.count) == (
            chunk.length_class,
            chunk.slot,
            chunk.start,
            chunk.row,
        ):
            joined[-1] = replace(last, count=last.count + chunk.count)
        else:
            joined.append(chunk)
    return joined


def _addresses(tensors: Sequence[Tensor], slots: Sequence[int]) -> Int64Array:
    """The addresses of slots, [layers, slots]."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    return starts[:, None] + np.array(slots, dtype=np.int64) * (tensors[0].stride(0) * tensors[0].itemsize)


class Decode:
    """Decoding rows by torch's operators, where there is no compiled kernel.

    One call computes all decoding rows of an arena, over a slice of its first slots, padded to the longest row. Slots
    in between that are not decoding (their prompt is still being computed) are included with a zero query.

    Args:
        slots, positions: [rows], one row for each slot.
        row: the first packed row.
        front: the number of slots that are read.
        keys: the number of positions that are read.
        active: [rows], rows that write their keys and values; None for all rows.

    No value of a tensor is read in Python, so that the work can be recorded as a CUDA graph (model/cuda_graphs.py).
    """

    def __init__(
        self,
        arena: Arena,
        slots: Tensor,
        positions: Tensor,
        *,
        row: int,
        front: int,
        keys: int,
        active: Tensor | None = None,
    ) -> None:
        device = arena.k[0].device
        self.arena, self.slots, self.positions, self.front, self.keys = arena, slots, positions, front, keys
        self.active = None if active is None else active[:, None, None]
        self.rows = slice(row, row + len(slots))
        self.dense = front == len(slots)
        last = torch.zeros(front, dtype=torch.long, device=device).index_copy_(0, slots, positions)
        unseen = torch.arange(keys, device=device) > last[:, None]  # [front, keys]
        self.mask = torch.zeros(front, 1, 1, keys, dtype=arena.k[0].dtype, device=device)
        self.mask.masked_fill_(unseen[:, None, None], float("-inf"))

    @classmethod
    def of(cls, arena: Arena, group: DecodeGroup) -> Decode:
        """For one group of rows. Raises ValueError if a slot has several rows."""
        if max(group.counts) > 1:
            raise ValueError("several rows of one slot need the compiled kernel")
        slots, positions = (torch.tensor(x, device=arena.k[0].device) for x in (group.slots, group.positions))
        keys = min(arena.length, -(-(max(group.positions) + 1) // KEY_STEP) * KEY_STEP)
        return cls(arena, slots, positions, row=group.row, front=group.slots[-1] + 1, keys=keys)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        keys, values = self.arena.k[layer], self.arena.v[layer]  # [capacity, H, length, D]
        at = self.slots, slice(None), self.positions
        keys[at] = k if self.active is None else torch.where(self.active, k, keys[at])
        values[at] = v if self.active is None else torch.where(self.active, v, values[at])
        if not self.dense:
            q = q.new_zeros(self.front, *q.shape[1:]).index_copy_(0, self.slots, q)
        seen_k, seen_v = keys[: self.front, :, : self.keys], values[: self.front, :, : self.keys]
        all_ = F.scaled_dot_product_attention(q.unsqueeze(2), seen_k, seen_v, attn_mask=self.mask, scale=scale)
        out.copy_(all_.squeeze(2) if self.dense else all_.squeeze(2)[self.slots])


class _Prefill:
    """One chunk of a prompt by torch's operator: its shape, and so its bits, depend only on the prompt."""

    def __init__(self, arena: Arena, chunk: Chunk) -> None:
        self.arena, self.slot = arena, chunk.slot
        self.rows = slice(chunk.row, chunk.row + chunk.count)
        self.span = slice(chunk.start, chunk.start + chunk.count)
        self.mask = None
        if chunk.start > 0:
            ones = torch.ones(chunk.count, self.span.stop, dtype=torch.bool, device=arena.k[0].device)
            self.mask = ones.tril(chunk.start)  # row i sees positions 0 .. start + i

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        keys, values = self.arena.k[layer][self.slot], self.arena.v[layer][self.slot]  # [H, length, D]
        keys[:, self.span] = k.transpose(0, 1)
        values[:, self.span] = v.transpose(0, 1)
        whole = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None, :, : self.span.stop],
            values[None, :, : self.span.stop],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
        )
        out.copy_(whole[0].transpose(0, 1))
