"""The zoo's table: what a GPT-2 can be, and how its weights can be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.zoo import vocabularies, weights
from tests.zoo.entry import Entry, Made


def variant(folder: Path, **config: Any) -> None:
    """A GPT-2 with English byte-level BPE and other fields in its config.json."""
    size = vocabularies.save_json(vocabularies.byte_level(), folder)
    weights.gpt2(folder, size, **config)


def _activation(name: str, quick: bool = False) -> Entry:
    return Entry(
        f"activation-{name.replace('_', '-')}",
        lambda folder: variant(folder, activation_function=name),
        f"activation_function {name}",
        quick=quick,
    )


def head_size(folder: Path, size: int) -> None:
    heads = 8 if size == 1 else 2
    variant(folder, n_head=heads, n_embd=heads * size)


def upcast(folder: Path) -> Made:
    """A flag that says how to compute in half precision; transformers refuses it in float64."""
    twin = _twin(folder)
    weights.edit_config(folder, reorder_and_upcast_attn=True)
    return Made(folder, twin)


def defaults_left_out(folder: Path) -> None:
    """12 layers, 12 heads, 1,024 positions and four times the width, none of which the file says."""
    variant(folder, n_layer=12, n_head=12, n_embd=24, n_positions=1024)
    keys = (
        *("n_layer", "n_head", "n_positions", "n_inner", "layer_norm_epsilon", "activation_function", "n_ctx"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "architectures"),
        "tie_word_embeddings",
    )
    weights.edit_config(folder, **dict.fromkeys(keys))


def aliases(folder: Path) -> None:
    """The names that transformers maps, in place of GPT-2's own."""
    variant(folder, n_layer=3, n_head=4, n_embd=64, n_positions=48)
    weights.edit_config(
        folder,
        **dict.fromkeys(("n_layer", "n_head", "n_embd", "n_positions", "n_ctx")),
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_size=64,
        max_position_embeddings=48,
    )


def head_alone(folder: Path) -> Made:
    """A tied head whose weight is stored only as lm_head.weight."""
    twin = _twin(folder)
    weights.rename(
        folder, lambda t: {"lm_head.weight" if name.endswith("wte.weight") else name: w for name, w in t.items()}
    )
    return Made(folder, twin)


def prefixed(folder: Path, prefix: str, **extra: torch.Tensor) -> Made:
    """All names behind a prefix; `extra` tensors beside them."""
    twin = _twin(folder)
    weights.rename(folder, lambda t: {**{f"{prefix}{name}": w for name, w in t.items()}, **extra})
    return Made(folder, twin)


def body_alone(folder: Path) -> Made:
    """What GPT2Model, the decoder without a head, saves: names without `transformer.`."""
    twin = _twin(folder)
    weights.rename(folder, lambda t: {name.removeprefix("transformer."): w for name, w in t.items()})
    return Made(folder, twin)


def _twin(folder: Path) -> Path:
    """The same model as transformers saves it, beside the folder. -> the twin."""
    import shutil

    variant(folder)
    twin = folder.with_name(f"{folder.name}.twin")
    shutil.copytree(folder, twin)
    return twin


def buffers(folder: Path) -> Made:
    """The masks that old checkpoints store beside the weights."""
    twin = _twin(folder)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    weights.rename(
        folder,
        lambda t: {
            **t,
            **{f"transformer.h.{layer}.attn.bias": mask for layer in range(2)},
            **{f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)},
        },
    )
    return Made(folder, twin)


VALUE_HEAD = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}

VARIANTS = (
    _activation("gelu", quick=True),
    _activation("gelu_new"),
    _activation("gelu_fast"),
    _activation("gelu_pytorch_tanh"),
    _activation("gelu_python"),
    _activation("relu"),
    _activation("silu"),
    _activation("tanh"),
    Entry("unscaled-scores", lambda f: variant(f, scale_attn_weights=False), "scale_attn_weights false", quick=True),
    Entry(
        "scaled-by-layer",
        lambda f: variant(f, scale_attn_by_inverse_layer_idx=True, n_layer=3),
        "scale_attn_by_inverse_layer_idx true",
    ),
    Entry("upcast-attention", upcast, "reorder_and_upcast_attn true"),
    Entry("untied-head", lambda f: variant(f, tie_word_embeddings=False), "a head of its own", quick=True),
    Entry("head-alone", head_alone, "a tied head stored only as lm_head.weight"),
    Entry("aliases", aliases, "hidden_size, num_hidden_layers and the other aliases"),
    Entry("defaults-left-out", defaults_left_out, "sizes that config.json leaves to transformers' defaults"),
    Entry(
        "smallest",
        lambda f: variant(f, n_positions=8, n_embd=2, n_head=1, n_layer=1),
        "n_positions 8, n_embd 2",
        quick=True,
        prompts=("a", "b c", "hi", "on", "the", "x"),
    ),
    Entry("head-size-1", lambda f: head_size(f, 1), "eight heads of 1 number"),
    Entry("head-size-25", lambda f: head_size(f, 25), "two heads of 25 numbers"),
    Entry("head-size-256", lambda f: head_size(f, 256), "two heads of 256 numbers"),
    Entry("inner-width", lambda f: variant(f, n_inner=40), "n_inner 40"),
    Entry("epsilon", lambda f: variant(f, layer_norm_epsilon=1e-3), "layer_norm_epsilon 1e-3"),
    Entry("body-alone", body_alone, "saved by GPT2Model: names without transformer., no head"),
    Entry("old-buffers", buffers, "attn.bias and attn.masked_bias beside the weights"),
    Entry("prefix-module", lambda f: prefixed(f, "module."), "names behind module.", said=(r"module\.",)),
    Entry("prefix-compiled", lambda f: prefixed(f, "_orig_mod."), "names behind _orig_mod.", said=(r"_orig_mod\.",)),
    Entry(
        "value-head",
        lambda f: prefixed(f, "pretrained_model.", **VALUE_HEAD),
        "trl's value head, names behind pretrained_model.",
        said=(r"pretrained_model\.", "v_head"),
        quick=True,
    ),
    Entry("float16", lambda f: variant(f, dtype=torch.float16), "weights in float16", quick=True),
    Entry("bfloat16", lambda f: variant(f, dtype=torch.bfloat16), "weights in bfloat16"),
    Entry("sharded", lambda f: variant(f, shard="40KB"), "weights in several files", quick=True),
)
