"""CUDA graphs: hundreds of small kernels are launched by one call instead of one by one.

Only steps in which all sequences decode are recorded, once for each shape. The shape is, for each arena with rows, the
number of slots, rounded up to a power of two, and of positions, rounded up to a quarter of its length. A replay reads
tokens and positions from tensors at fixed addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.model.attention import CachedAttention, Decode, DecodeGroup
from headrace.model.decoder import Decoder
from headrace.model.kv_cache import KVCache

#: Runs a function once and returns one that runs the same operations on the same memory again.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

#: How many graphs are kept; the least recently used one is dropped.
MAX_SHAPES = 128
#: Runs before a recording: work that kernels do only in their first call must not be recorded.
WARM_UPS = 2


class Front(NamedTuple):
    """What a graph reads of one arena: its first `slots` slots, over `keys` positions."""

    length_class: int
    slots: int
    keys: int


Shape = tuple[Front, ...]


class DecodeGraphs:
    """The graphs of a model on a cache. Without a recorder nothing is recorded."""

    def __init__(self, model: Decoder, cache: KVCache, recorder: Recorder | None) -> None:
        self._model, self._cache, self._recorder = model, cache, recorder
        self._known: OrderedDict[Shape, _Graph | None] = OrderedDict()  # None: seen once

    def forget(self) -> None:
        """Drop all graphs, which contain addresses of the cache, and release their memory."""
        self._known.clear()

    def forward(self, token_ids: Sequence[int], groups: Sequence[DecodeGroup]) -> Tensor | None:
        """The rows [M, E], before the final norm, of a step that only decodes, with one row for each slot of `groups`.

        None if the step has to be computed without a graph: nothing is recorded on this device, a slot in between does
        not decode, or the shape is seen for the first time.
        """
        if self._recorder is None or not all(group.slots == list(range(len(group.slots))) for group in groups):
            return None
        shape = tuple(self._front(group) for group in groups)
        graph = self._known.get(shape)
        if graph is None and shape in self._known:
            graph = _Graph(self._model, self._cache, shape, self._recorder)
        self._known[shape] = graph
        self._known.move_to_end(shape)
        if len(self._known) > MAX_SHAPES:
            self._known.popitem(last=False)
        return None if graph is None else graph.run(token_ids, groups)

    def _front(self, group: DecodeGroup) -> Front:
        capacity = self._cache.arenas[group.length_class].capacity
        slots = min(capacity, 1 << (len(group.slots) - 1).bit_length())
        step = -(-group.length_class // 4)
        keys = min(group.length_class, -(-(max(group.positions) + 1) // step) * step)
        return Front(group.length_class, slots, keys)


class _Graph:
    """One graph. Rows that a step does not need get token 0 at position -1, and write nothing."""

    def __init__(self, model: Decoder, cache: KVCache, shape: Shape, recorder: Recorder) -> None:
        self._model, self._cache, self._shape, self._recorder = model, cache, shape, recorder
        rows = sum(front.slots for front in shape)
        self._inputs = torch.zeros(2, rows, dtype=torch.long, device=model.device)  # tokens, positions
        self._slots = torch.arange(max(front.slots for front in shape), device=model.device)
        self._replay: Callable[[], Tensor] | None = None

    def run(self, token_ids: Sequence[int], groups: Sequence[DecodeGroup]) -> Tensor:
        """The rows of this step. The first call records, because recording writes to the cache as well."""
        tokens: list[int] = []
        positions: list[int] = []
        rows = []
        for front, group in zip(self._shape, groups, strict=True):
            count = len(group.slots)
            rows.append(slice(len(tokens), len(tokens) + count))
            tokens += [*token_ids[group.row : group.row + count], *[0] * (front.slots - count)]
            positions += [*group.positions, *[-1] * (front.slots - count)]
        self._inputs.copy_(torch.tensor([tokens, positions]))
        if self._replay is None:
            self._replay = self._recorder(self._forward)
        hidden = self._replay()
        return torch.cat([hidden[span] for span in rows])

    def _forward(self) -> Tensor:
        tokens, given = self._inputs
        active, positions = given >= 0, given.clamp(min=0)
        parts, row = [], 0
        for front in self._shape:
            rows = slice(row, row + front.slots)
            arena, slots = self._cache.arenas[front.length_class], self._slots[: front.slots]
            size = {"row": row, "front": front.slots, "keys": front.keys}
            parts.append(Decode(arena, slots, positions[rows], active=active[rows], **size))
            row = rows.stop
        return self._model.forward(tokens, positions, CachedAttention(self._model.config, parts))


def decode_graphs(model: Decoder, cache: KVCache) -> DecodeGraphs:
    """The graphs for a model; only a model on CUDA has a recorder."""
    return DecodeGraphs(model, cache, _cuda_recorder() if model.device.type == "cuda" else None)


def _cuda_recorder() -> Recorder:  # pragma: no cover - needs a GPU
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                function()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a worker may use the device at the same time.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record
