"""One transformer block, and the attention that it calls.

Shapes: M packed rows (tokens of any number of sequences, concatenated), E n_embd, H query heads, KV heads of keys
and values, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.activations import ActivationCapture
from headrace.model.linear import Linear


class Attention(Protocol):
    """Attention of one layer over packed rows; it knows which rows form a sequence and what they may attend to."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [M, H, D]; k, v: [M, KV, D] -> [M, H, D]."""
        ...


@dataclass(frozen=True)
class Norm:
    """Layer norm: biased variance, epsilon inside the root."""

    weight: Tensor  # [E]
    bias: Tensor  # [E]
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Block:
    """One transformer block: attention, then feed-forward, each on a normed copy and added to the residual stream.

    It is called only if torch computes the GEMMs; compiled kernels run all blocks together (fused_decoder.py).
    """

    ln_1: Norm
    c_attn: Linear  # E -> (H + 2 KV) D: q, k, v side by side
    c_proj: Linear  # E -> E
    ln_2: Norm
    c_fc: Linear  # E -> 4E, with the activation function
    mlp_proj: Linear  # 4E -> E
    n_head: int
    n_kv_head: int

    def __call__(self, layer: int, x: Tensor, attend: Attention, captures: Sequence[ActivationCapture]) -> Tensor:
        normed = self.ln_1(x)  # [M, E]
        q, k, v = self.heads(self.c_attn(normed))
        attn = self.c_proj(attend(layer, q, k, v).reshape(x.shape))  # [M, E]
        x = x + attn
        mlp = self.mlp_proj(self.c_fc(self.ln_2(x)))  # [M, E]
        x = x + mlp
        for capture in captures:
            if layer == 0:
                capture.record(ln_1=normed, q=q, k=k, v=v, attn=attn, mlp=mlp, block_0=x)
            capture.record_hidden(layer + 1, x)
        return x

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split rows of `c_attn`: [M, (H + 2 KV) D] -> q [M, H, D], k and v [M, KV, D], views of them."""
        parts = qkv.view(len(qkv), self.n_head + 2 * self.n_kv_head, -1)
        values = self.n_head + self.n_kv_head
        return parts[:, : self.n_head], parts[:, self.n_head : values], parts[:, values:]
