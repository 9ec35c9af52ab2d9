"""The zoo's table: other families, other containers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.zoo import containers, weights
from tests.zoo.entry import Entry
from tests.zoo.vocabularies import byte_level, save_json

LONG = "The river ran past the old house on the hill, and she said that it was hers. " * 2


def bigcode(folder: Path, **config: Any) -> None:
    weights.gpt_bigcode(folder, save_json(byte_level(), folder), **config)


def neo(folder: Path, **config: Any) -> None:
    weights.gpt_neo(folder, save_json(byte_level(), folder), **config)


def _gguf(kind: str, quick: bool = False) -> Entry:
    name = f"gguf-{kind.lower().replace('_', '-')}"
    return Entry(name, lambda folder: containers.gguf_file(folder, kind), f"GGUF, {kind}", quick=quick)


def _refused(name: str, what: str, sentence: str, quick: bool = False, **change: Any) -> Entry:
    return Entry(name, lambda f: containers.other_config(f, **change), what, refused=sentence, quick=quick)


FAMILIES = (
    Entry("bigcode-multi-query", bigcode, "GPT-BigCode, multi_query true", prompts=(LONG,), quick=True),
    Entry(
        "bigcode-multi-head", lambda f: bigcode(f, multi_query=False), "GPT-BigCode, multi_query false", prompts=(LONG,)
    ),
    Entry(
        "bigcode-gelu",
        lambda f: bigcode(f, activation_function="gelu", n_inner=96, n_head=2, n_embd=50),
        "GPT-BigCode, gelu, n_inner, heads of 25",
    ),
    Entry(
        "bigcode-unscaled",
        lambda f: bigcode(f, scale_attn_weights=False, n_positions=8192),
        "GPT-BigCode, scale_attn_weights false, 8,192 positions",
    ),
    Entry("neo-window-8", neo, "GPT-Neo, window 8", prompts=(LONG,), quick=True),
    Entry(
        "neo-window-256",
        lambda f: neo(f, window_size=256, max_position_embeddings=512),
        "GPT-Neo, window 256",
        prompts=(LONG * 3,),
    ),
    Entry(
        "neo-global",
        lambda f: neo(f, attention_types=[[["global"], 4]]),
        "GPT-Neo, global layers alone",
        prompts=(LONG,),
    ),
    Entry(
        "neo-window-1",
        lambda f: neo(f, window_size=1, activation_function="relu", intermediate_size=40),
        "GPT-Neo, window 1, relu, intermediate_size",
    ),
)

CONTAINERS = (
    _gguf("F32"),
    _gguf("F16"),
    _gguf("BF16"),
    _gguf("Q4_0"),
    _gguf("Q8_0", quick=True),
    _gguf("Q2_K"),
    _gguf("Q3_K"),
    _gguf("Q4_K", quick=True),
    _gguf("Q5_K"),
    _gguf("Q6_K"),
    Entry("pickled", containers.pickled, "pytorch_model.bin, converted"),
    Entry("nano-gpt", containers.nano_gpt, "nanoGPT's ckpt.pt, converted", text_refused=r"tokenizer", quick=True),
)

REFUSALS = (
    Entry(
        "pickle-alone",
        containers.pickle_alone,
        "pytorch_model.bin, not converted",
        refused=r"headrace convert",
        quick=True,
    ),
    Entry("adapter", containers.adapter, "a LoRA's directory", refused=r"(?i)adapter", quick=True),
    Entry("unmerged", containers.unmerged, "a LoRA that was not merged", refused=r"merge_and_unload", quick=True),
    Entry(
        "checkpoints-below",
        containers.checkpoints_below,
        "only checkpoint-500 below",
        refused=r"checkpoint-500",
        quick=True,
    ),
    Entry(
        "not-resized", containers.not_resized, "more tokens than rows", refused=r"resize_token_embeddings", quick=True
    ),
    _refused("t5", "model_type t5", r"model_type.*t5", model_type="t5", quick=True),
    _refused("llama", "model_type llama", r"model_type.*llama", model_type="llama"),
    _refused(
        "quantized",
        "quantization_config",
        r"quantization_config",
        quick=True,
        quantization_config={"quant_method": "gptq", "bits": 4},
    ),
    _refused("cross-attention", "add_cross_attention true", r"add_cross_attention", add_cross_attention=True),
    _refused(
        "unknown-activation", "activation_function mish", r"activation_function.*mish", activation_function="mish"
    ),
    _refused(
        "uneven-heads", "n_embd that n_head does not divide", r"n_embd 32 is not a multiple of n_head 5", n_head=5
    ),
    Entry("classifier", containers.classifier, "a head of another task", refused=r"score\.weight"),
    Entry("missing-tensor", containers.missing_tensor, "a tensor less", refused=r"h\.1\.mlp\.c_fc\.weight"),
    Entry(
        "other-head", containers.other_head, "a head of its own that is said to be tied", refused=r"tie_word_embeddings"
    ),
    Entry("gguf-llama", containers.gguf_of_llama, "GGUF of another architecture", refused=r"architecture.*llama"),
    _refused("other-width", "n_embd that the tensors do not have", r"wte|embedding|shape", n_embd=48),
)
