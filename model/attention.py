"""Attention over the key/value cache, for decoding rows and chunks of prompts.

On a CPU the compiled kernel (kernels/attention.py) computes everything, where it can be compiled. Elsewhere torch's
operator does.

Shapes: M packed rows, H query heads, KV heads of keys and values, D head size. Query head h reads the head
h // (H / KV) of keys and values. In a layer with a window a row attends to its latest positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.config import ModelConfig
from headrace.model.kernels.attention import DecodeKernel, DecodeRows, LayerCalls
from headrace.model.kernels.intrinsics import Int64Array
from headrace.model.kv_cache import Arena, KVCache

#: torch's operator reads keys up to a multiple of this: padding within it does not change a row's bits, more might.
KEY_STEP = 16


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
    """The decoding rows of one arena, in the packed rows from `row` on. The slots may be in any order.

    Slot i of the group has `counts[i]` rows, one token each, from `positions[i]` on.
    """

    length_class: int
    slots: list[int]
    positions: list[int]
    counts: list[int]
    row: int


class CachedAttention:
    """Attention of one step: writes the new keys and values, then attends over the positions that each row may see."""

    def __init__(self, config: ModelConfig, parts: Sequence[_Compiled | Decode | _Prefill]) -> None:
        self._config, self._parts = config, parts

    @classmethod
    def of(cls, cache: KVCache, *, groups: Sequence[DecodeGroup], chunks: Sequence[Chunk]) -> CachedAttention:
        """Attention for decoding rows and chunks of prompts, by the compiled kernel if there is one."""
        kernel, config = cache.decode_kernel(), cache.config
        if kernel is None:
            parts: list[_Compiled | Decode | _Prefill] = [Decode.of(cache.arenas[g.length_class], g) for g in groups]
            return cls(config, [*parts, *(_Prefill(cache.arenas[c.length_class], c) for c in chunks)])
        return cls(config, [_Compiled(kernel, cache, groups, chunks)] if groups or chunks else [])

    def layer_calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> LayerCalls | None:
        """The compiled calls of all layers, which read the same q, k, v and write the same `out`.

        Returns None unless the compiled kernel computes all rows.
        """
        part = self._parts[0] if len(self._parts) == 1 else None
        if not isinstance(part, _Compiled) or part.count != len(q):
            return None
        return part.layer_calls(q, k, v, out)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [M, H, D]; k, v: [M, KV, D] -> [M, H, D]; padding rows give zeros."""
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        scale, window = self._config.layer_scale(layer), self._config.window(layer)
        for part in self._parts:
            rows = part.rows
            part.attend(layer, q[rows], k[rows], v[rows], out[rows], scale, window)
        return out


class _Compiled:
    """All decoding rows of a step and all rows of prompts in one call, each over exactly its own positions."""

    def __init__(
        self, kernel: DecodeKernel, cache: KVCache, groups: Sequence[DecodeGroup], chunks: Sequence[Chunk]
    ) -> None:
        self._kernel, self._rules = kernel, cache.rules
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
            heads=cache.config.n_head,
        )

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self._where.counts.sum())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *_: object) -> None:
        self._kernel(layer, q, k, v, out, self._where, self._rules)

    def layer_calls(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> LayerCalls:
        return self._kernel.layer_calls(q, k, v, out, self._where, self._rules)


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
        #: Whether the rows are those of all slots that are read, in their order.
        self.dense = front == len(slots)
        last = torch.zeros(front, dtype=torch.long, device=device).index_copy_(0, slots, positions)
        self._masks = {window: self._mask(last[:, None], window) for window in arena.windows}

    @classmethod
    def of(cls, arena: Arena, group: DecodeGroup) -> Decode:
        """For one group of rows. Raises ValueError if a slot has several rows."""
        if max(group.counts) > 1:
            raise ValueError("several rows of one slot need the compiled kernel")
        slots, positions = (torch.tensor(x, device=arena.k[0].device) for x in (group.slots, group.positions))
        keys = min(arena.length, -(-(max(group.positions) + 1) // KEY_STEP) * KEY_STEP)
        front = max(group.slots) + 1
        part = cls(arena, slots, positions, row=group.row, front=front, keys=keys)
        part.dense = group.slots == list(range(front))
        return part

    def _mask(self, last: Tensor, window: int | None) -> Tensor:
        """What is added to the scores of rows whose own positions are `last`, [front, 1] -> [front, 1, 1, keys]."""
        at = torch.arange(self.keys, device=last.device)
        unseen = at > last if window is None else (at > last) | (at <= last - window)  # [front, keys]
        mask = torch.zeros(self.front, 1, 1, self.keys, dtype=self.arena.k[0].dtype, device=last.device)
        return mask.masked_fill_(unseen[:, None, None], float("-inf"))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, window: int | None
    ) -> None:
        keys, values = self.arena.k[layer], self.arena.v[layer]  # [capacity, KV, length, D]
        at = self.slots, slice(None), self.positions
        keys[at] = k if self.active is None else torch.where(self.active, k, keys[at])
        values[at] = v if self.active is None else torch.where(self.active, v, values[at])
        if not self.dense:
            q = q.new_zeros(self.front, *q.shape[1:]).index_copy_(0, self.slots, q)
        seen_k, seen_v = keys[: self.front, :, : self.keys], values[: self.front, :, : self.keys]
        mask, grouped = self._masks[window], q.shape[1] != k.shape[1]
        all_ = F.scaled_dot_product_attention(
            q.unsqueeze(2), seen_k, seen_v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
        out.copy_(all_.squeeze(2) if self.dense else all_.squeeze(2)[self.slots])


class _Prefill:
    """One chunk of a prompt by torch's operator: its bits depend only on the prompt and on the size of chunks."""

    def __init__(self, arena: Arena, chunk: Chunk) -> None:
        self.arena, self.slot = arena, chunk.slot
        self.rows = slice(chunk.row, chunk.row + chunk.count)
        self.span = slice(chunk.start, chunk.start + chunk.count)
        self._seen = {window: self._of_window(window) for window in arena.windows}

    def _of_window(self, window: int | None) -> tuple[slice, Tensor | None]:
        """The positions that are read, and which of them each row sees; None: each sees those up to its own."""
        start, stop = self.span.start, self.span.stop
        if window is None or window >= stop:
            window, first = stop, 0
        else:
            first = max(0, start + 1 - window)
        if start == 0 and window == stop:
            return slice(0, stop), None
        ones = torch.ones(stop - start, stop - first, dtype=torch.bool, device=self.arena.k[0].device)
        own = start - first  # row i is at own + i of those that are read
        return slice(first, stop), ones.tril(own).triu(own + 1 - window)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, window: int | None
    ) -> None:
        keys, values = self.arena.k[layer][self.slot], self.arena.v[layer][self.slot]  # [KV, length, D]
        keys[:, self.span] = k.transpose(0, 1)
        values[:, self.span] = v.transpose(0, 1)
        seen, mask = self._seen[window]
        whole = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None, :, seen],
            values[None, :, seen],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out.copy_(whole[0].transpose(0, 1))


class PlainAttention:
    """Attention of B whole sequences of T tokens, packed one after another, without a cache."""

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device) -> None:
        self._config, self._batch, self._length = config, batch, length
        ones = torch.ones(length, length, dtype=torch.bool, device=device)
        windows = {window for window in config.windows if window is not None and window < length}
        self._masks = {window: ones.tril().triu(1 - window) for window in windows}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B * T, H, D]; k, v: [B * T, KV, D] -> [B * T, H, D]."""
        grouped, mask = q.shape[1] != k.shape[1], self._masks.get(self._config.window(layer) or 0)
        q, k, v = (x.view(self._batch, self._length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._config.layer_scale(layer),
            enable_gqa=grouped,
        )
        return out.transpose(1, 2).flatten(0, 1)
