"""Named tensors at the checkpoints of a forward pass. A pass without a `Trace` pays one comparison a layer."""

from __future__ import annotations

import torch
from torch import Tensor

#: Checkpoint 11 is taken at this temperature.
PROBS_TEMPERATURE = 0.8


class Trace:
    """Collects the tensors of one sequence, over as many chunks as its prompt takes.

    Args:
        scale: what attention multiplies its scores by; fused kernels never show them, so they are made from q and k.
        rows: which packed rows belong to the sequence; all of them by default.
    """

    def __init__(self, scale: float, rows: slice = slice(None)) -> None:
        self.scale = scale
        self.rows = rows
        self._pieces: dict[str, list[Tensor]] = {}

    def record(self, **tensors: Tensor) -> None:
        """Keep copies of this sequence's rows of packed tensors [M, ...]."""
        for name, tensor in tensors.items():
            self._pieces.setdefault(name, []).append(tensor[self.rows].clone())

    def finish(self, *, logits: Tensor, cache_k: Tensor, cache_v: Tensor) -> dict[str, Tensor]:
        """All checkpoint tensors by name. logits: float32 [T, V]; cache_k, cache_v: [T, H, D] of block 0."""
        tensors = {name: torch.cat(pieces) for name, pieces in self._pieces.items()}
        q, k = tensors["q"].transpose(0, 1), tensors["k"].transpose(0, 1)  # [H, T, D]
        last = logits[-1]
        # In float64: torch's float32 softmax of 50,257 numbers is off by up to 3e-5, the checkpoint allows 1e-6.
        probs = torch.softmax(last.double() / PROBS_TEMPERATURE, dim=-1).float()
        return tensors | {
            "scores": q @ k.transpose(1, 2) * self.scale,
            "cache_k": cache_k.clone(),
            "cache_v": cache_v.clone(),
            "logits": logits,
            "last_logits": last,
            "next_token": last.argmax(),
            "probs": probs,
        }
