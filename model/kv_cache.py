"""The key/value cache and attention over it.

A sequence knows its longest length when it arrives, so it gets a slot in the arena of its length class and keeps it:

    arena 128   k[layer]  [capacity, H, 128, D]     slot 0 | slot 1 | slot 2 | ...
    arena 256   k[layer]  [capacity, H, 256, D]     slot 0 | ...

Which sequence has which slot is decided elsewhere (worker/engine/scheduler.py); here are only the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.attention import Calls, DecodeKernel, Rows, decode_kernel
from headrace.model.kernels.intrinsics import use_huge_pages

if TYPE_CHECKING:
    from headrace.model.gpt2 import GPT2Config

#: Keys are read up to a multiple of this: the padding within it does not change a row's bits, other lengths may.
KEY_STEP = 16
#: Prompts of up to so many tokens are computed as decoding rows are: torch takes longer for them.
SHORT = 128


class Arena:
    """The slots of one length class: for each layer keys and values [capacity, H, length, D], zero if unwritten."""

    def __init__(self, config: GPT2Config, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = length
        self.capacity = 0
        empty = torch.zeros(0, config.n_head, length, config.head_dim, dtype=dtype, device=device)
        self.k = [empty] * config.n_layer
        self.v = [empty] * config.n_layer

    def resize(self, capacity: int) -> None:
        """Hold `capacity` slots and keep what the first ones contain; one layer at a time, so little is held twice.

        If memory runs out in between, the arena holds as many slots as all of its layers do: the fewer of the two.
        """
        self.capacity, held = min(capacity, self.capacity), self.capacity
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                new = use_huge_pages(old.new_empty(capacity, *old.shape[1:])).zero_()
                kept = min(capacity, held)
                new[:kept] = old[:kept]
                tensors[layer] = new
        self.capacity = capacity

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in (*self.k, *self.v):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int, length: int | None = None) -> None:
        """Zero a slot: a NaN left behind would reach its next owner, since zero weight times NaN is NaN."""
        for tensor in (*self.k, *self.v):
            tensor[slot, :, :length] = 0


class KVCache:
    """The arenas, by length class in ascending order."""

    def __init__(self, config: GPT2Config, *, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.arenas = {length: Arena(config, length, dtype, device) for length in sorted(lengths)}
        self._kernel_key = (config.head_dim, dtype, device.type)

    def decode_kernel(self) -> DecodeKernel | None:
        """The compiled attention for this cache, if it can be had; compiled at the first call in a process.

        It reads no further than a row's own position, so what stands beyond a sequence's last one there is nobody's.
        """
        return decode_kernel(*self._kernel_key)


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt to be computed: `count` tokens from position `start`, at packed rows `row` and on."""

    length_class: int
    slot: int
    start: int
    count: int
    row: int


@dataclass(frozen=True)
class DecodeGroup:
    """The decoding rows of one arena, at packed rows `row` and on, in the order of their slots.

    A slot has `counts` rows, one token each, at the position given and those that follow it.
    """

    length_class: int
    slots: list[int]
    positions: list[int]
    counts: list[int]
    row: int


class CachedAttention:
    """Attention of one step: writes the new keys and values, then attends over what each row may see."""

    def __init__(self, scale: float, parts: Sequence[_Compiled | Decode | _Prefill]) -> None:
        self.scale, self._parts = scale, parts

    @classmethod
    def of(
        cls, cache: KVCache, scale: float, *, groups: Sequence[DecodeGroup], chunks: Sequence[Chunk]
    ) -> CachedAttention:
        """That of decoding rows and chunks of prompts, by the compiled kernel if there is one."""
        kernel = cache.decode_kernel()
        if kernel is None:
            parts: list[_Compiled | Decode | _Prefill] = [Decode.of(cache.arenas[g.length_class], g) for g in groups]
            return cls(scale, [*parts, *(_Prefill(cache.arenas[c.length_class], c) for c in chunks)])
        short = [chunk for chunk in chunks if chunk.start + chunk.count <= SHORT]
        prefills = [_Prefill(cache.arenas[c.length_class], c) for c in chunks if c.start + c.count > SHORT]
        return cls(scale, [_Compiled(kernel, cache, groups, short), *prefills] if groups or short else prefills)

    def calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Calls | None:
        """For the same q, k, v and `out` in every layer: what computes it, if the compiled kernel is all there is."""
        part = self._parts[0] if len(self._parts) == 1 else None
        if not isinstance(part, _Compiled) or part.count != len(q):
            return None
        return part.calls(q, k, v, out, self.scale)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [M, H, D] -> [M, H, D]; rows of no sequence give zeros."""
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for part in self._parts:
            rows = part.rows
            part.attend(layer, q[rows], k[rows], v[rows], out[rows], self.scale)
        return out


class _Compiled:
    """All decoding rows of a step, and the rows of short prompts, at once: each over exactly the positions it has."""

    def __init__(
        self, kernel: DecodeKernel, cache: KVCache, groups: Sequence[DecodeGroup], chunks: Sequence[Chunk]
    ) -> None:
        self._kernel = kernel
        self.rows = slice(None)
        joined = _joined(chunks)
        groups = [*groups, *(DecodeGroup(c.length_class, [c.slot], [c.start], [c.count], c.row) for c in joined)]
        arenas = [cache.arenas[group.length_class] for group in groups]
        self._read = [(*arena.k, *arena.v) for arena in arenas]  # by address, so they must not go meanwhile
        self._where = Rows.of(
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
        """How many rows there are."""
        return int(self._where.counts.sum())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        self._kernel(layer, q, k, v, out, self._where, scale)

    def calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> Calls:
        return self._kernel.calls(q, k, v, out, self._where, scale)


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks, those of one slot that follow each other in a step as one.

    The kernel computes a slot's rows in order in one thread. As two entries, two chunks of one prompt would go to two
    threads, and the second could read keys that the first has not written yet.
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


def _addresses(tensors: Sequence[Tensor], slots: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where slots begin in memory: [layers, slots]."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    return starts[:, None] + np.array(slots, dtype=np.int64) * (tensors[0].stride(0) * tensors[0].itemsize)


class Decode:
    """The same by torch's operators, where there is no compiled kernel: one call for all decoding rows of an arena,
    over a plain slice of its front, padded to the longest row there.

    Slots in between that are not decoding (their prompt is still being computed) are carried along with a zero query.
    A slot has one row here: `slots` and `positions` are [rows], the packed rows begin at `row`, `front` slots are read
    over `keys` positions. Rows that are not `active` ([rows], all if None) write nothing. No value of a tensor is
    looked at, so that the work can be recorded (model/cuda_graphs.py).
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
        """Raises ValueError where a slot has several rows."""
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
    """One call for one chunk: its shape depends on the prompt alone, and so do its bits."""

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
