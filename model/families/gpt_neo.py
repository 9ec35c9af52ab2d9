"""GPT-Neo (`model_type: gpt_neo`).

Its blocks are GPT-2's, with three differences: scores are not scaled, some layers ("local") attend to the latest
`window_size` positions only, and q, k and v are three matrices without biases. Linear weights are stored [out, in].
"""

from __future__ import annotations

from typing import Any

from headrace.model.config import ModelConfig
from headrace.model.families.base import Family, Stored, layer_shapes, transposed
from headrace.model.families.fields import ConfigFields

ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
#: What transformers takes where config.json has no attention_types.
_DEFAULT_TYPES = [[["global", "local"], 12]]
_HOW = "it must be a list of [names, count] that gives global or local for each of the {} layers"


def read_config(fields: ConfigFields) -> ModelConfig:
    """The shape of a GPT-Neo."""
    layers = fields.size("num_layers", 24)
    config = ModelConfig(
        family="gpt_neo",
        n_layer=layers,
        n_head=fields.size("num_heads", 16),
        n_embd=fields.size("hidden_size", 2048),
        n_positions=fields.size("max_position_embeddings", 2048),
        vocab_size=fields.size("vocab_size", 50257),
        n_inner=fields.optional_size("intermediate_size"),
        layer_norm_epsilon=fields.epsilon("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        scaled_attention=False,
        windows=_windows(fields, layers),
        tied_head=fields.flag("tie_word_embeddings", True),
    )
    fields.check_heads(config.n_embd, "hidden_size", config.n_head, "num_heads")
    return config


def _windows(fields: ConfigFields, layers: int) -> tuple[int | None, ...]:
    window, types = fields.size("window_size", 256), fields.get("attention_types", None)
    kinds = _expanded(_DEFAULT_TYPES if types is None else types, layers)
    if kinds is None:
        fields.refuse("attention_types", _HOW.format(layers))
    written = fields.get("attention_layers", None)  # transformers writes both
    if written is not None and written != kinds:
        fields.refuse("attention_layers", f"attention_types gives {', '.join(kinds)}; remove the wrong one")
    return tuple(window if kind == "local" else None for kind in kinds)


def _expanded(types: Any, layers: int) -> list[str] | None:
    """The kind of each layer, as transformers repeats the names; None if that does not give one for each layer."""
    kinds: list[str] = []
    for pair in types if isinstance(types, list) else ():
        names, count = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(names, list) or type(count) is not int or not 0 <= count * len(names) <= layers - len(kinds):
            return None
        kinds += names * count if names else []
    return kinds if len(kinds) == layers and all(kind in ("global", "local") for kind in kinds) else None


def _layer(config: ModelConfig) -> dict[str, Stored]:
    e, shapes = config.n_embd, layer_shapes(config)
    tensors = {
        f"attn.attention.{name}_proj.weight": Stored((e, e), "attn.c_attn.weight", transposed, column=i * e)
        for i, name in enumerate("qkv")
    }
    tensors["attn.attention.out_proj.weight"] = Stored((e, e), "attn.c_proj.weight", transposed)
    tensors["attn.attention.out_proj.bias"] = Stored((e,), "attn.c_proj.bias")
    for name, shape in shapes.items():
        if not name.startswith("attn."):
            tensors[name] = Stored(shape[::-1], name, transposed) if len(shape) == 2 else Stored(shape, name)
    return tensors


GPT_NEO = Family(
    model_type="gpt_neo",
    title="GPT-Neo",
    aliases=ALIASES,
    read_config=read_config,
    layer=_layer,
    buffers=frozenset({"attn.attention.bias", "attn.attention.masked_bias"}),
)
