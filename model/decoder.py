"""The decoder of all families: embeddings, blocks, final norm, head.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Shapes are in the comments: M packed
rows (tokens of any number of sequences, concatenated), E n_embd, H heads, D head size, V vocabulary, B sequences of T
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.activations import ActivationCapture, capture_activations
from headrace.model.adapters.lora import Adapter
from headrace.model.adapters.packed import AdapterRows, PackedAdapter
from headrace.model.attention import PlainAttention
from headrace.model.block import Attention, Block, Norm
from headrace.model.config import ModelConfig
from headrace.model.families import FAMILIES
from headrace.model.families.base import HEAD_NAME
from headrace.model.fused_decoder import FusedDecoder
from headrace.model.kernels.packed_weight import PackedWeight, RowNorm
from headrace.model.linear import Linear
from headrace.model.trusted_files import ModelError


class Decoder:
    """A model with its weights. Use `load_model` to build one from files.

    Args:
        weights: tensors by the names of `families.base.decoder_shapes`. Each is looked up once.
        digest: SHA-256 of the files that the weights were read from; empty for weights created in memory.
        int8: quantize the matrices to int8, whatever their type is; everything else is bfloat16 then.
        notes: what was understood of the files, in sentences for people.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        digest: str = "",
        int8: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        wte = weights["wte.weight"]
        dtype = torch.bfloat16 if int8 else wte.dtype
        self.config = config
        #: SHA-256 of the files that the weights were read from; empty for weights created in memory.
        self.digest = digest
        #: What was understood of the files: prefixes of names that were stripped, tensors that were ignored.
        self.notes = tuple(notes)
        self.wte = wte.to(dtype)  # [V, E]: embeds tokens, and is the weight of a tied head
        self.wpe = weights["wpe.weight"].to(dtype)  # [n_positions, E]
        self.blocks = [_block(config, weights, f"h.{i}.", dtype, int8) for i in range(config.n_layer)]
        self.ln_f = _norm(config, weights, "ln_f", dtype)
        #: `ln_f` for the compiled kernels, which compute norms in float32.
        self._final_norm = RowNorm(self.ln_f.weight.float(), self.ln_f.bias.float(), self.ln_f.epsilon)
        #: Runs all blocks together; None if torch computes the GEMMs. Built from `blocks`.
        self.fused_decoder = FusedDecoder.of(self.blocks)
        head = wte if config.tied_head else weights[HEAD_NAME]  # [V, E]
        self.lm_head = Linear.of(head.t(), int8=int8)

    @property
    def parameters(self) -> int:
        """The number of weights, as the files have them; a tied head is counted once."""
        return FAMILIES[self.config.family].parameters(self.config)

    def padded_rows(self, count: int) -> int:
        """The number of packed rows to pad a step of `count` rows to, so that no GEMM has to pad them itself."""
        return count if self.device.type != "cpu" else self.blocks[0].c_attn.padded_rows(count)

    @property
    def gemm_backend(self) -> str:
        """How GEMMs are computed, as the fingerprint names it (linear.Linear.fingerprint)."""
        return self.blocks[0].c_attn.fingerprint

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream, of the cache, and of the matrices unless they are int8."""
        return self.wte.dtype

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attention,
        captures: Sequence[ActivationCapture] = (),
        adapters: Sequence[AdapterRows] = (),
    ) -> Tensor:
        """Run packed rows through all blocks; the final norm belongs to `head`. token_ids, positions: [M] -> [M, E].

        Args:
            captures: record activations.
            adapters: the rows that are of adapters, in order. Those of `pack_adapter`.
        """
        x = F.embedding(token_ids, self.wte) + F.embedding(positions, self.wpe)  # [M, E]
        for capture in captures:
            capture.record(embeddings=x)
            capture.record_hidden(0, x)
        if self.fused_decoder is not None:
            return self.fused_decoder(x, attend, captures, adapters)
        for layer, block in enumerate(self.blocks):
            x = block(layer, x, attend, captures)
        return x

    def pack_adapter(self, adapter: Adapter) -> PackedAdapter:
        """Pack an adapter for `forward`.

        Raises:
            ModelError: torch computes the linear layers of this model on this machine.
        """
        if self.fused_decoder is None or not isinstance(self.lm_head.gemm, PackedWeight):
            raise ModelError(
                f"adapters are not computed for this model in {self.dtype} on this machine, because torch computes its "
                "linear layers; choose another HEADRACE_DTYPE, or merge the adapter with peft's merge_and_unload()"
            )
        return self.fused_decoder.pack(adapter)

    def head(self, hidden: Tensor, adapters: Sequence[PackedAdapter | None] = ()) -> Tensor:
        """The final norm and the logits of rows of `forward`. [R, E] -> [R, V], in the type of the weights.

        Args:
            adapters: that of each row; may be empty if there are none.
        """
        if isinstance(self.lm_head.gemm, PackedWeight):
            norm, biases = self._final_norm, [getattr(each, "final_norm_bias", None) for each in adapters]
            if any(bias is not None for bias in biases):
                norm = norm._replace(bias=torch.stack([norm.bias if bias is None else bias for bias in biases]))
            return self.lm_head.gemm(hidden, norm)
        return self.lm_head(self.ln_f(hidden))

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """The logits of whole sequences, without a cache. LongTensor [B, T] -> float32 [B, T, V].

        Raises:
            ValueError: not two dimensions, more than n_positions tokens, or a token id outside the vocabulary.
        """
        batch, length = self._check(token_ids)
        positions = torch.arange(length, device=self.device).repeat(batch)
        hidden = self.forward(
            token_ids.to(self.device).flatten(), positions, PlainAttention(self.config, batch, length, self.device)
        )
        return self.head(hidden).float().view(batch, length, -1)

    @torch.inference_mode()
    def trace(self, token_ids: Tensor, adapter: PackedAdapter | None = None) -> dict[str, Tensor]:
        """The activations of checkpoints 1 to 11, captured on the cached path that serves jobs, one sequence at a time.

        LongTensor [B, T] -> `embeddings`, `ln_1`, `attn`, `mlp`, `block_0` [B, T, E]; `q`, `k`, `v`, `cache_k`,
        `cache_v` [B, T, H, D]; `scores` [B, H, T, T]; `hidden` [B, n_layer + 1, T, E]; `logits` [B, T, V];
        `last_logits`, `probs` [B, V]; `next_token` [B]. Raises ValueError like `logits`.
        """
        self._check(token_ids)
        rows = [capture_activations(self, row, adapter) for row in token_ids.to(self.device)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

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


def _norm(config: ModelConfig, weights: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Norm:
    weight, bias = (weights[f"{name}.{part}"].to(dtype) for part in ("weight", "bias"))
    return Norm(weight, bias, config.layer_norm_epsilon)


def _block(config: ModelConfig, weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype, int8: bool) -> Block:
    def linear(name: str, activation: str | None = None) -> Linear:
        weight, bias = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"].to(dtype)
        return Linear.of(weight, bias, activation=activation, int8=int8)

    return Block(
        ln_1=_norm(config, weights, prefix + "ln_1", dtype),
        c_attn=linear("attn.c_attn"),
        c_proj=linear("attn.c_proj"),
        ln_2=_norm(config, weights, prefix + "ln_2", dtype),
        c_fc=linear("mlp.c_fc", config.activation),
        mlp_proj=linear("mlp.c_proj"),
        n_head=config.n_head,
        n_kv_head=config.kv_heads,
    )
