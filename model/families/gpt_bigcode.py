"""GPT-BigCode (`model_type: gpt_bigcode`): SantaCoder, StarCoderBase.

Its blocks are GPT-2's. With `multi_query` all query heads read one head of keys and values. Linear weights are stored
[out, in]. With `multi_query` the rows of c_attn are those of q, then k, then v, as in the decoder; without it they are
those of q, k and v of the first head, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.model.config import ModelConfig
from headrace.model.families.base import Family, Stored, layer_shapes, transposed
from headrace.model.families.fields import ConfigFields
from headrace.model.families.gpt2 import ALIASES

if TYPE_CHECKING:
    from torch import Tensor

_FUSED = ("attn.c_attn.weight", "attn.c_attn.bias")


def read_config(fields: ConfigFields) -> ModelConfig:
    """The shape of a GPT-BigCode.

    `attention_softmax_in_fp32` and `scale_attention_softmax_in_fp32` are about lower precisions only: this decoder
    always computes the softmax in float32, so they are not read.
    """
    config = ModelConfig(
        family="gpt_bigcode",
        n_layer=fields.size("n_layer", 12),
        n_head=fields.size("n_head", 12),
        n_embd=fields.size("n_embd", 768),
        n_positions=fields.size("n_positions", 1024),
        vocab_size=fields.size("vocab_size", 50257),
        n_inner=fields.optional_size("n_inner"),
        n_kv_head=1 if fields.flag("multi_query", True) else None,
        layer_norm_epsilon=fields.epsilon("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        scaled_attention=fields.flag("scale_attn_weights", True),
        tied_head=fields.flag("tie_word_embeddings", True),
    )
    fields.check_heads(config.n_embd, "n_embd", config.n_head, "n_head")
    return config


def _layer(config: ModelConfig) -> dict[str, Stored]:
    return {name: _stored(name, shape, config) for name, shape in layer_shapes(config).items()}


def _stored(name: str, shape: tuple[int, ...], config: ModelConfig) -> Stored:
    if name in _FUSED and config.kv_heads == config.n_head:
        return Stored(shape[::-1], name, _heads_apart(config.n_head))
    return Stored(shape[::-1], name, transposed) if len(shape) == 2 else Stored(shape, name)


def _heads_apart(heads: int) -> Callable[[Tensor], Tensor]:
    """For c_attn without `multi_query`: rows of q, k, v head by head -> columns of all q, then all k, then all v."""

    def convert(tensor: Tensor) -> Tensor:
        rows = tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        return rows.t().contiguous()  # of a bias: itself

    return convert


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    title="GPT-BigCode",
    aliases=ALIASES,
    read_config=read_config,
    layer=_layer,
    buffers=frozenset({"attn.bias", "attn.masked_bias"}),
)
