"""The shape of a model: one description for all families (model/families/ reads it from config.json)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. The first seven fields have the names of GPT-2's config.json."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    #: The `model_type` of config.json: `gpt2`, `gpt_bigcode`, `gpt_neo`.
    family: str = "gpt2"
    #: One of ACTIVATIONS: the function between the two feed-forward matrices.
    activation: str = "gelu_tanh"
    #: Heads of keys and values; each is read by n_head / kv_heads query heads. None: as many as n_head.
    n_kv_head: int | None = None
    #: Whether the scores are divided by the square root of the head size.
    scaled_attention: bool = True
    #: Whether the scores of layer i (counted from 0) are divided by i + 1 as well.
    scaled_by_layer: bool = False
    #: For each layer the number of latest positions that a row attends to, its own included; None: all of them. Empty:
    #: all positions in every layer.
    windows: tuple[int | None, ...] = ()
    #: Whether the head's weight is the token embedding.
    tied_head: bool = True

    @property
    def head_dim(self) -> int:
        """D: 64 in every released GPT-2."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """KV: the heads of keys and values, of which the cache holds one each."""
        return self.n_kv_head or self.n_head

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by, in layers that have no scale of their own: 1/sqrt(D)."""
        return 1.0 / math.sqrt(self.head_dim) if self.scaled_attention else 1.0

    def layer_scale(self, layer: int) -> float:
        """What the attention scores of a layer are multiplied by."""
        return self.scale / (layer + 1) if self.scaled_by_layer else self.scale

    def window(self, layer: int) -> int | None:
        """How many of the latest positions a row of this layer attends to, its own included; None: all of them."""
        return self.windows[layer] if self.windows else None

    @property
    def inner(self) -> int:
        """Width of the feed-forward layer: four times E unless the file says otherwise."""
        return self.n_inner or 4 * self.n_embd


#: The functions between the two feed-forward matrices.
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "tanh")
