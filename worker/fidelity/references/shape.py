"""What config.json says of a model of any family, as the references read it; shares no code with `model`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.worker.fidelity.references.base import ReferenceUnavailable

_GPT2 = {
    "n_layer": (("n_layer", "num_hidden_layers"), 12),
    "n_head": (("n_head", "num_attention_heads"), 12),
    "n_embd": (("n_embd", "hidden_size"), 768),
    "n_positions": (("n_positions", "max_position_embeddings"), 1024),
    "vocab_size": (("vocab_size",), 50257),
}
_NEO = {
    "n_layer": (("num_layers", "num_hidden_layers"), 24),
    "n_head": (("num_heads", "num_attention_heads"), 16),
    "n_embd": (("hidden_size",), 2048),
    "n_positions": (("max_position_embeddings",), 2048),
    "vocab_size": (("vocab_size",), 50257),
}
#: Family -> where its config.json has each size, with other names for it, and what transformers takes without it.
_SIZES = {"gpt2": _GPT2, "gpt_bigcode": _GPT2, "gpt_neo": _NEO}
#: Names of transformers -> the function.
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
    "tanh": "tanh",
}


@dataclass(frozen=True)
class Shape:
    """The shape of a model, from config.json."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    epsilon: float
    family: str = "gpt2"
    activation: str = "gelu_tanh"
    #: Heads of keys and values; query head h reads the head h // (n_head / kv_heads) of them.
    kv_heads: int = 0
    #: What the scores of each layer are multiplied by.
    scales: tuple[float, ...] = ()
    #: How many of the latest positions a row of each layer attends to, its own included; None: all of them.
    windows: tuple[int | None, ...] = ()
    #: Whether the head is the token embedding.
    tied: bool = True

    @property
    def head_size(self) -> int:
        """D."""
        return self.n_embd // self.n_head

    @property
    def is_plain(self) -> bool:
        """Whether it computes what the released GPT-2 models compute."""
        scale = 1 / math.sqrt(self.head_size)
        plain = (self.family, self.activation, self.tied) == ("gpt2", "gelu_tanh", True)
        return plain and all(math.isclose(each, scale) for each in self.scales)


def read_shape(folder: Path) -> Shape:
    """Read the shape of the model from config.json.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is of another family, or selects a variant that the references do not support.
    """
    path = folder / "config.json"
    raw: dict[str, Any] = json.loads(path.read_text())
    family = raw.get("model_type", "gpt2")
    if family not in _SIZES:
        raise ValueError(f"{path}: model_type is {family!r}; the references compute {', '.join(_SIZES)}")
    if raw.get("add_cross_attention"):
        raise ValueError(f"{path}: add_cross_attention is true; the references compute models without it")
    default = "gelu_pytorch_tanh" if family == "gpt_bigcode" else "gelu_new"
    function = raw.get("activation_function", default)
    if function not in ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function is {function!r}; the references compute {', '.join(ACTIVATIONS)}"
        )
    sizes: dict[str, Any] = {}
    for name, (written, fallback) in _SIZES[family].items():
        sizes[name] = next((raw[each] for each in written if each in raw), fallback)
    layers, heads = sizes["n_layer"], sizes["n_head"]
    multi_query = family == "gpt_bigcode" and raw.get("multi_query", True)
    return Shape(
        **sizes,
        epsilon=raw.get("layer_norm_epsilon", 1e-5),
        family=family,
        activation=ACTIVATIONS[function],
        kv_heads=1 if multi_query else heads,
        scales=_scales(raw, family, layers, sizes["n_embd"] // heads),
        windows=_windows(path, raw, layers) if family == "gpt_neo" else (None,) * layers,
        tied=raw.get("tie_word_embeddings", True),
    )


def plain_shape(folder: Path, reference: str) -> Shape:
    """The shape of a plain GPT-2, for references that compute nothing else.

    Raises:
        FileNotFoundError, ValueError: as `read_shape`.
        ReferenceUnavailable: the model is another one.
    """
    shape = read_shape(folder)
    if not shape.is_plain:
        raise ReferenceUnavailable(
            f"the reference {reference!r} computes plain GPT-2 only; {folder / 'config.json'} describes another model "
            f"(model_type {shape.family}, activation {shape.activation}): use the reference 'transformers'"
        )
    return shape


def _scales(raw: dict[str, Any], family: str, layers: int, size: int) -> tuple[float, ...]:
    scaled = family != "gpt_neo" and raw.get("scale_attn_weights", True)
    scale = 1 / math.sqrt(size) if scaled else 1.0
    by_layer = family == "gpt2" and raw.get("scale_attn_by_inverse_layer_idx", False)
    return tuple(scale / (layer + 1) if by_layer else scale for layer in range(layers))


def _windows(path: Path, raw: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    kinds = raw.get("attention_layers")
    if kinds is None:
        pairs = raw.get("attention_types") or [[["global", "local"], 12]]
        kinds = [kind for names, count in pairs for _ in range(count) for kind in names]
    if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
        raise ValueError(f"{path}: attention_types gives {kinds}; it must give global or local for {layers} layers")
    window = raw.get("window_size", 256)
    return tuple(window if kind == "local" else None for kind in kinds)
