"""Captured activations: named tensors at the checkpoints of a forward pass.

A pass without captures costs one iteration over an empty list for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headrace.model.adapters.packed import AdapterRows, PackedAdapter
from headrace.model.attention import CachedAttention, Chunk
from headrace.model.config import ModelConfig
from headrace.model.kv_cache import KVCache

#: Checkpoint 11 is taken at this temperature.
PROBS_TEMPERATURE = 0.8


class ActivationCapture:
    """Captures the activations of one sequence, over all passes that compute its prompt and its new tokens.

    The names are those of the checkpoints. Rows of tokens after the prompt are kept separately, because the checkpoints
    are about the prompt.

    Args:
        scale: the factor of the attention scores of block 0, which are computed from q and k: fused kernels do not
            expose them.
        prompt_length: T, the number of rows of the prompt.
    """

    def __init__(self, scale: float, prompt_length: int) -> None:
        self.scale = scale
        self.prompt_length = prompt_length
        self.rows = slice(None)
        self._pieces: dict[str, list[Tensor]] = {}
        self._hidden: dict[int, list[Tensor]] = {}
        self._pending: list[tuple[list[Tensor], Tensor]] = []
        self._whole: dict[str, Tensor] = {}

    def at(self, rows: slice) -> ActivationCapture:
        """Set the packed rows of this sequence in the next pass. What a failed pass has recorded is dropped."""
        self.rows = rows
        self._pending.clear()
        return self

    def commit(self) -> None:
        """Keep what the pass has recorded; called when the pass has succeeded."""
        for pieces, tensor in self._pending:
            pieces.append(tensor)
        self._pending.clear()

    def record(self, **tensors: Tensor) -> None:
        """Record copies of this sequence's rows of packed tensors [M, ...]."""
        self.append(**{name: tensor[self.rows] for name, tensor in tensors.items()})

    def append(self, **tensors: Tensor) -> None:
        """Record copies of tensors whose rows all belong to this sequence."""
        for name, tensor in tensors.items():
            self._pending.append((self._pieces.setdefault(name, []), tensor.clone()))

    def record_hidden(self, depth: int, hidden: Tensor) -> None:
        """Record the residual stream [M, E]: depth 0 after the embeddings, i after block i - 1."""
        self._pending.append((self._hidden.setdefault(depth, []), hidden[self.rows].clone()))

    def keep(self, **tensors: Tensor) -> None:
        """Record copies of tensors whose rows are not joined over passes."""
        self._whole.update({name: tensor.clone() for name, tensor in tensors.items()})

    def finish(self, *, scores: bool = True) -> dict[str, Tensor]:
        """All tensors by name, joined along their rows; the scores, T * T numbers for each head, if asked for.

        `ln_1` [T, E], `q` [T, H, D], `k`, `v` [T, KV, D], `hidden` [layers + 1, T, E].
        `k_new` and `v_new` are the rows of tokens after the prompt, [new, KV, D].
        """
        count = self.prompt_length
        tensors = {name: torch.cat(pieces) for name, pieces in self._pieces.items()}
        new = {f"{name}_new": tensors[name][count:] for name in ("k", "v")}
        for name in ("embeddings", "ln_1", "q", "k", "v", "attn", "mlp", "block_0"):
            tensors[name] = tensors[name][:count]
        if scores:
            new["scores"] = self._scores(tensors["q"].transpose(0, 1), tensors["k"].transpose(0, 1))
        hidden = torch.stack([torch.cat(pieces)[:count] for _, pieces in sorted(self._hidden.items())])
        return {**tensors, **new, **self._whole, "hidden": hidden}

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[H, T, D], [KV, T, D] -> [H, T, T]."""
        if len(k) < len(q):
            k = k.repeat_interleave(len(q) // len(k), 0)
        return q @ k.transpose(1, 2) * self.scale


class CapturableModel(Protocol):
    """The parts of a model that `capture_activations` uses; `Decoder` has them."""

    config: ModelConfig

    @property
    def dtype(self) -> torch.dtype:
        """The type of the cache."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: CachedAttention,
        captures: Sequence[ActivationCapture] = (),
        adapters: Sequence[AdapterRows] = (),
        /,
    ) -> Tensor:
        """token_ids, positions: [M] -> [M, E]."""
        ...

    def head(self, hidden: Tensor, adapters: Sequence[PackedAdapter | None] = (), /) -> Tensor:
        """[R, E] -> logits [R, V]."""
        ...


def capture_activations(
    model: CapturableModel, token_ids: Tensor, adapter: PackedAdapter | None = None
) -> dict[str, Tensor]:
    """The tensors of checkpoints 1 to 11 for one sequence, LongTensor [T]; the names are those of `Decoder.trace`."""
    length = len(token_ids)
    rows = [] if adapter is None else [AdapterRows(adapter, 0, length)]
    cache = KVCache(model.config, lengths=(length,), dtype=model.dtype, device=model.device)
    cache.arenas[length].resize(1)
    attend = CachedAttention.of(cache, groups=[], chunks=[Chunk(length, 0, 0, length, 0)])
    capture = ActivationCapture(model.config.layer_scale(0), length)
    hidden = model.forward(token_ids, torch.arange(length, device=model.device), attend, [capture], rows)
    logits = model.head(hidden, [adapter] * length).float()
    arena = cache.arenas[length]
    capture.keep(cache_k=arena.k[0][0].transpose(0, 1), cache_v=arena.v[0][0].transpose(0, 1), logits=logits)
    capture.commit()
    tensors = {name: tensor for name, tensor in capture.finish().items() if not name.endswith("_new")}
    return tensors | {
        "last_logits": logits[-1],
        "next_token": logits[-1].argmax(),
        "probs": probabilities(logits[-1]),
    }


def probabilities(last_logits: Tensor) -> Tensor:
    """Checkpoint 11: [V] -> [V] at `PROBS_TEMPERATURE`.

    Computed in float64: torch's float32 softmax of 50,257 numbers has errors of up to 3e-5; the checkpoint allows 1e-6.
    """
    return torch.softmax(last_logits.double() / PROBS_TEMPERATURE, dim=-1).float()
