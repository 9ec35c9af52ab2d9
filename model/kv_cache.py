"""The key/value cache.

The longest length of a sequence is known when it arrives, so it gets a slot in the arena of its length class:

    arena 128   k[layer]  [capacity, KV, 128, D]    slot 0 | slot 1 | slot 2 | ...
    arena 256   k[layer]  [capacity, KV, 256, D]    slot 0 | ...

KV is the number of heads of keys and values: as many as query heads in GPT-2, one in a model with multi-query
attention. A layer with a window keeps all positions too.

The scheduler decides which sequence has which slot (worker/engine/scheduler.py); this module only stores the tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from headrace.model.config import ModelConfig
from headrace.model.kernels.attention import DecodeKernel, LayerRules, decode_kernel
from headrace.model.kernels.memory import zeros


class Arena:
    """The slots of one length class: for each layer keys and values [capacity, KV, length, D], zero if unwritten."""

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = length
        self.capacity = 0
        #: The windows that its layers have; None: all positions.
        self.windows = {config.window(layer) for layer in range(config.n_layer)}
        empty = torch.zeros(0, config.kv_heads, length, config.head_dim, dtype=dtype, device=device)
        self.k = [empty] * config.n_layer
        self.v = [empty] * config.n_layer

    def resize(self, capacity: int) -> None:
        """Change the number of slots and keep the contents of the first ones.

        Layers are copied one at a time, so that little memory is in use twice. If memory runs out in between, the
        capacity is the smaller of the old and the new one, which all layers have.
        """
        self.capacity, held = min(capacity, self.capacity), self.capacity
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                new, kept = zeros(capacity, old), min(capacity, held)
                new[:kept] = old[:kept]
                tensors[layer] = new
        self.capacity = capacity

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in (*self.k, *self.v):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int, length: int | None = None, *, start: int = 0) -> None:
        """Zero the positions of a slot from `start` to `length`, by default all of them.

        A NaN would reach the next sequence, as 0 * NaN is NaN.
        """
        for tensor in (*self.k, *self.v):
            tensor[slot, :, start:length] = 0


class KVCache:
    """The arenas, by length class in ascending order."""

    def __init__(
        self, config: ModelConfig, *, lengths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.arenas = {length: Arena(config, length, dtype, device) for length in sorted(lengths)}
        self._kernel_key = (config.head_dim, dtype, device.type)

    @functools.cached_property
    def rules(self) -> LayerRules:
        """How the layers attend, for the compiled kernel."""
        layers = range(self.config.n_layer)
        return LayerRules.of(
            [self.config.layer_scale(layer) for layer in layers], [self.config.window(layer) for layer in layers]
        )

    def decode_kernel(self) -> DecodeKernel | None:
        """The compiled attention for this cache, None where torch must be used. The first call in a process compiles.

        It reads only up to a row's own position, so the contents of later positions do not matter.
        """
        return decode_kernel(*self._kernel_key)
