"""Steps on CUDA, replayed from recordings: hundreds of small kernels begin by one call instead of one by one.

Recorded is the pass of a step in which sequences only decode, once for each shape: for every arena with rows the number
of its slots, rounded up to a power of two, and of the positions read, rounded up to a quarter of its length. Tokens
and positions lie in tensors that stay where they are; a replay reads what stands there then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.model.gpt2 import GPT2
from headrace.model.kv_cache import CachedAttention, Decode, DecodeGroup, KVCache

#: Runs a function once and returns one that runs the same operations on the same memory again.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

#: So many shapes are kept, those used last.
MAX_SHAPES = 128
#: Before a recording its kernels run so often: what is set up at a first call must not be recorded.
WARM_UPS = 2


class Front(NamedTuple):
    """What a recording reads of one arena: its first `slots` slots, over `keys` positions."""

    length_class: int
    slots: int
    keys: int


Shape = tuple[Front, ...]


class DecodeGraphs:
    """The recordings of a model on a cache; without a recorder there are none."""

    def __init__(self, model: GPT2, cache: KVCache, recorder: Recorder | None) -> None:
        self._model, self._cache, self._recorder = model, cache, recorder
        self._known: OrderedDict[Shape, _Graph | None] = OrderedDict()  # None: seen once

    def forget(self) -> None:
        """Drop all recordings: they hold addresses, and memory."""
        self._known.clear()

    def forward(self, token_ids: Sequence[int], groups: Sequence[DecodeGroup]) -> Tensor | None:
        """The final norm's rows [M, E] of decoding rows that lie as `groups` say, one for each slot.

        None where the step has to be computed the plain way: nothing is recorded here, a slot in between does not
        decode, or its shape has not been seen before.
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
    """One recording. Rows that a step has not are those of token 0 at position -1, and write nothing."""

    def __init__(self, model: GPT2, cache: KVCache, shape: Shape, recorder: Recorder) -> None:
        self._model, self._cache, self._shape, self._recorder = model, cache, shape, recorder
        rows = sum(front.slots for front in shape)
        self._inputs = torch.zeros(2, rows, dtype=torch.long, device=model.device)  # tokens, positions
        self._slots = torch.arange(max(front.slots for front in shape), device=model.device)
        self._replay: Callable[[], Tensor] | None = None

    def run(self, token_ids: Sequence[int], groups: Sequence[DecodeGroup]) -> Tensor:
        """The rows of this step; recorded at the first, for a recording writes to the cache as well."""
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
        return self._model.forward(tokens, positions, CachedAttention(self._model.config.scale, parts))


def decode_graphs(model: GPT2, cache: KVCache) -> DecodeGraphs:
    """CUDA's, where the model lies there."""
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
        # Other threads of a worker may ask the device something meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record
