"""GPT-2 (`model_type: gpt2`): the decoder's own names and layouts."""

from __future__ import annotations

from headrace.model.config import ModelConfig
from headrace.model.families.base import Family, Stored, layer_shapes
from headrace.model.families.fields import ConfigFields

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(fields: ConfigFields) -> ModelConfig:
    """The shape of a GPT-2. `reorder_and_upcast_attn` changes only the order of operations, so it is not read."""
    config = ModelConfig(
        n_layer=fields.size("n_layer", 12),
        n_head=fields.size("n_head", 12),
        n_embd=fields.size("n_embd", 768),
        n_positions=fields.size("n_positions", 1024),
        vocab_size=fields.size("vocab_size", 50257),
        n_inner=fields.optional_size("n_inner"),
        layer_norm_epsilon=fields.epsilon("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        scaled_attention=fields.flag("scale_attn_weights", True),
        scaled_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
        tied_head=fields.flag("tie_word_embeddings", True),
    )
    fields.check_heads(config.n_embd, "n_embd", config.n_head, "n_head")
    return config


def _layer(config: ModelConfig) -> dict[str, Stored]:
    return {name: Stored(shape, name) for name, shape in layer_shapes(config).items()}


GPT2 = Family(
    model_type="gpt2",
    title="GPT-2",
    aliases=ALIASES,
    read_config=read_config,
    layer=_layer,
    buffers=frozenset({"attn.bias", "attn.masked_bias"}),
)
