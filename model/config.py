"""The shape of a GPT-2."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, with the names of Hugging Face's config.json."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        """D: 64 in every released size."""
        return self.n_embd // self.n_head

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by: 1/sqrt(D)."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def inner(self) -> int:
        """Width of the feed-forward layer: four times E unless the file says otherwise."""
        return self.n_inner or 4 * self.n_embd
