"""GPT-2: embeddings, blocks, final norm, tied head.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Shapes are in the comments: M packed
rows (tokens of any number of sequences, end to end), E n_embd, H heads, D head size, V vocabulary, B sequences of T
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.activations import Trace, probabilities
from headrace.model.fused_decoder import Passes
from headrace.model.kv_cache import CachedAttention, Chunk, KVCache
from headrace.model.linear import Linear


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


class Attention(Protocol):
    """Attention of one layer over packed rows; knows which rows belong together and what they may look at."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [M, H, D] -> [M, H, D]."""
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
    """One transformer block: attention, then feed-forward, each on a normed copy and added back.

    Called where torch computes products; with those of ours all blocks are run together (model/fused_decoder.py).
    """

    ln_1: Norm
    c_attn: Linear  # E -> 3E: q, k, v side by side
    c_proj: Linear  # E -> E
    ln_2: Norm
    c_fc: Linear  # E -> 4E, with GELU
    mlp_proj: Linear  # 4E -> E
    n_head: int

    def __call__(self, layer: int, x: Tensor, attend: Attention, traces: Sequence[Trace]) -> Tensor:
        normed = self.ln_1(x)  # [M, E]
        q, k, v = self.c_attn(normed).view(len(x), 3, self.n_head, -1).unbind(1)  # [M, H, D] each
        attn = self.c_proj(attend(layer, q, k, v).reshape(x.shape))  # [M, E]
        x = x + attn
        mlp = self.mlp_proj(self.c_fc(self.ln_2(x)))  # [M, E]
        x = x + mlp
        for trace in traces:
            if layer == 0:
                trace.record(ln_1=normed, q=q, k=k, v=v, attn=attn, mlp=mlp, block_0=x)
            trace.record_hidden(layer + 1, x)
        return x


class GPT2:
    """A GPT-2 with its weights. Build it with `model.load_model`; `weights` has the names of the files, unprefixed.

    With `int8` the matrices are rounded to 8 bits, from whatever type they come in; the rest is bfloat16 then.
    """

    def __init__(
        self, config: GPT2Config, weights: Mapping[str, Tensor], *, digest: str = "", int8: bool = False
    ) -> None:
        dtype = torch.bfloat16 if int8 else weights["wte.weight"].dtype
        self.config = config
        #: SHA-256 of the files the weights came from; empty for weights made in memory.
        self.digest = digest
        self.wte = weights["wte.weight"].to(dtype)  # [V, E]: embeds tokens, and is the head's weight
        self.wpe = weights["wpe.weight"].to(dtype)  # [n_positions, E]
        self.blocks = [_block(config, weights, f"h.{i}.", dtype, int8) for i in range(config.n_layer)]
        self.ln_f = _norm(config, weights, "ln_f", dtype)
        self._passes_of, self._passes = list(self.blocks), Passes.of(self.blocks)
        self.lm_head = Linear.of(weights["wte.weight"].t(), int8=int8)

    def padded_rows(self, count: int) -> int:
        """How many packed rows to run a step of `count` rows with, so that no product has to pad them by itself."""
        return count if self.device.type != "cpu" else self.blocks[0].c_attn.padded_rows(count)

    @property
    def products(self) -> str:
        """How matrix products are computed here: `int8`, `tiled`, `floats`, `packed` or `plain` (model/linear.py)."""
        return type(self.blocks[0].c_attn.product).__name__.lower()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of what goes from layer to layer, and of the cache; matrices are held in it unless in int8."""
        return self.wte.dtype

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attention, traces: Sequence[Trace] = ()) -> Tensor:
        """Packed rows through all blocks and the final norm. token_ids, positions: [M] -> [M, E]."""
        x = F.embedding(token_ids, self.wte) + F.embedding(positions, self.wpe)  # [M, E]
        for trace in traces:
            trace.record(embeddings=x)
            trace.record_hidden(0, x)
        if (passes := self._current_passes()) is not None:
            return self.ln_f(passes(x, attend, traces))
        for layer, block in enumerate(self.blocks):
            x = block(layer, x, attend, traces)
        return self.ln_f(x)

    def _current_passes(self) -> Passes | None:
        """The blocks as chains of products, if they can be; made anew where one has been replaced."""
        known, now = self._passes_of, self.blocks
        if len(known) != len(now) or any(a is not b for a, b in zip(known, now, strict=True)):
            self._passes_of, self._passes = list(now), Passes.of(now)
        return self._passes

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of rows that went through `forward`. [R, E] -> [R, V], in the type of the weights."""
        return self.lm_head(hidden)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """The plain forward pass, without a cache. LongTensor [B, T] -> float32 [B, T, V].

        Raises:
            ValueError: not two dimensions, more than n_positions tokens, or a token id outside the vocabulary.
        """
        batch, length = self._check(token_ids)
        positions = torch.arange(length, device=self.device).repeat(batch)
        hidden = self.forward(token_ids.to(self.device).flatten(), positions, self._plain_attention(batch, length))
        return self.head(hidden).float().view(batch, length, -1)

    @torch.inference_mode()
    def trace(self, token_ids: Tensor) -> dict[str, Tensor]:
        """The tensors of checkpoints 1 to 11, read from the cached path that serves jobs, one sequence at a time.

        LongTensor [B, T] -> `embeddings`, `ln_1`, `attn`, `mlp`, `block_0` [B, T, E]; `q`, `k`, `v`, `cache_k`,
        `cache_v` [B, T, H, D]; `scores` [B, H, T, T]; `hidden` [B, n_layer + 1, T, E]; `logits` [B, T, V];
        `last_logits`, `probs` [B, V]; `next_token` [B]. Raises ValueError like `logits`.
        """
        self._check(token_ids)
        rows = [self._trace_one(row) for row in token_ids.to(self.device)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _trace_one(self, token_ids: Tensor) -> dict[str, Tensor]:
        length = len(token_ids)
        cache = KVCache(self.config, lengths=(length,), dtype=self.dtype, device=self.device)
        cache.arenas[length].resize(1)
        attend = CachedAttention.of(cache, self.config.scale, groups=[], chunks=[Chunk(length, 0, 0, length, 0)])
        trace = Trace(self.config.scale, length)
        hidden = self.forward(token_ids, torch.arange(length, device=self.device), attend, [trace])
        logits = self.head(hidden).float()
        arena = cache.arenas[length]
        trace.keep(cache_k=arena.k[0][0].transpose(0, 1), cache_v=arena.v[0][0].transpose(0, 1), logits=logits)
        trace.commit()
        tensors = {name: tensor for name, tensor in trace.finish().items() if not name.endswith("_new")}
        return tensors | {
            "last_logits": logits[-1],
            "next_token": logits[-1].argmax(),
            "probs": probabilities(logits[-1]),
        }

    def _plain_attention(self, batch: int, length: int) -> Attention:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
            q, k, v = (x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.config.scale)
            return out.transpose(1, 2).flatten(0, 1)

        return attend

    def _check(self, token_ids: Tensor) -> tuple[int, int]:
        if token_ids.dim() != 2 or token_ids.numel() == 0:
            raise ValueError(f"token_ids has shape {list(token_ids.shape)}; it must be [B, T], neither of them 0")
        batch, length = token_ids.shape
        if length > self.config.n_positions:
            raise ValueError(f"{length} tokens are more than the model's {self.config.n_positions} positions")
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")
        return batch, length


def _norm(config: GPT2Config, weights: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Norm:
    weight, bias = (weights[f"{name}.{part}"].to(dtype) for part in ("weight", "bias"))
    return Norm(weight, bias, config.layer_norm_epsilon)


def _block(config: GPT2Config, weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype, int8: bool) -> Block:
    def linear(name: str, *, gelu: bool = False) -> Linear:
        weight, bias = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"].to(dtype)
        return Linear.of(weight, bias, gelu=gelu, int8=int8)

    return Block(
        ln_1=_norm(config, weights, prefix + "ln_1", dtype),
        c_attn=linear("attn.c_attn"),
        c_proj=linear("attn.c_proj"),
        ln_2=_norm(config, weights, prefix + "ln_2", dtype),
        c_fc=linear("mlp.c_fc", gelu=True),
        mlp_proj=linear("mlp.c_proj"),
        n_head=config.n_head,
    )
