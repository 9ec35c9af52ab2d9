"""The forward pass compared with Hugging Face transformers, on the bundled model and on tiny ones of odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from headrace.model import Decoder, ModelConfig, load_model
from headrace.model.families.fields import ACTIVATION_FUNCTIONS
from tests.unit.model.references import demo_reference, inner_tensors, random_reference, saved

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_head": 1, "n_embd": 20, "n_inner": 50},
    {"n_head": 4, "n_embd": 64, "n_layer": 3, "vocab_size": 300},
    {"n_head": 3, "n_embd": 33, "n_inner": 17, "n_layer": 3, "layer_norm_epsilon": 1e-3},
    {"n_head": 2, "n_embd": 32, "activation_function": "gelu_pytorch_tanh", "n_positions": 64},
    {"n_head": 2, "n_embd": 128, "n_inner": 64, "activation_function": "relu"},
    *({"activation_function": name} for name in ACTIVATION_FUNCTIONS),
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True, "n_layer": 4},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "reorder_and_upcast_attn": True},
    {"tie_word_embeddings": False},
    {"n_positions": 8, "n_embd": 2, "n_head": 1, "n_layer": 1},
    {"n_positions": 8, "n_embd": 2, "n_head": 2, "n_inner": 1, "vocab_size": 2},
    {"n_head": 1, "n_embd": 256},
    {"n_head": 36, "vocab_size": 128},
]
#: Largest difference that float32 may make, by checkpoint.
TOLERANCES = {
    "embeddings": 1e-6,
    "ln_1": 1e-5,
    "q": 1e-4,
    "k": 1e-4,
    "v": 1e-4,
    "scores": 1e-4,
    "attn": 1e-4,
    "mlp": 1e-4,
    "block_0": 1e-4,
    "logits": 1e-3,
}


def tokens(batch: int, length: int, vocabulary: int = 50257) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch + length))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (3, 7), (2, 129), (1, 1024), (5, 16)])
def test_logits_of_the_bundled_model_are_those_of_transformers(demo: Decoder, batch: int, length: int) -> None:
    ids = tokens(batch, length)
    with torch.inference_mode():
        expected = demo_reference()(ids).logits
    logits = demo.logits(ids)
    assert logits.shape == (batch, length, 50257)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ",".join(f"{k}={v}" for k, v in shape.items()) or "plain")
def test_logits_of_odd_shapes_are_those_of_transformers(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = random_reference(**shape)
    gpt2 = load_model(saved(reference, tmp_path), device="cpu", dtype="float32")
    assert gpt2.parameters == sum(p.numel() for p in reference.parameters())
    cases = [tokens(*size, gpt2.config.vocab_size) for size in ((1, 1), (4, 9), (2, gpt2.config.n_positions))]
    cases = [ids[:, : gpt2.config.n_positions] for ids in cases]
    with torch.inference_mode():
        single = [reference(ids).logits for ids in cases]
        for block in reference.transformer.h:
            block.attn.reorder_and_upcast_attn = False  # it exists in float32 only
        exact = [reference.double()(ids).logits for ids in cases]
    assert exact[-1].std() > 0.5 or gpt2.config.n_embd == 2, "nothing to compare"
    for ids, theirs, expected in zip(cases, single, exact, strict=True):
        # Where scores are not scaled the softmax multiplies the errors of float32, those of transformers too.
        allowed = max(1e-4, 2 * float((theirs - expected).abs().max()))
        assert (gpt2.logits(ids) - expected).abs().max() < allowed


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (2, 17), (1, 300)])
def test_trace_holds_the_checkpoints_of_transformers_modules(demo: Decoder, batch: int, length: int) -> None:
    ids = torch.tensor([[15496, 13]]) if length == 2 else tokens(batch, length)
    expected, trace = inner_tensors(demo_reference(), ids), demo.trace(ids)
    for name, tolerance in TOLERANCES.items():
        assert trace[name].shape == expected[name].shape, name
        assert (trace[name] - expected[name]).abs().max() < tolerance, name
    assert torch.equal(trace["cache_k"], trace["k"])
    assert torch.equal(trace["cache_v"], trace["v"])
    assert torch.equal(trace["last_logits"], trace["logits"][:, -1])
    assert torch.equal(trace["next_token"], expected["logits"][:, -1].argmax(-1))
    # In float64, because the error of torch's float32 softmax, which transformers uses, exceeds the tolerance.
    probs = (trace["logits"][:, -1].double() / 0.8).softmax(-1)
    assert (trace["probs"] - probs).abs().max() < 1e-6
    assert (trace["probs"] - (expected["logits"][:, -1].double() / 0.8).softmax(-1)).abs().max() < 1e-6
    assert (trace["probs"].double().sum(-1) - 1).abs().max() < 1e-6


def test_trace_has_the_promised_names_and_shapes(demo: Decoder) -> None:
    b, t, e, h, d, v = 2, 5, 128, 2, 64, 50257
    trace = demo.trace(tokens(b, t))
    per_token = dict.fromkeys(["embeddings", "ln_1", "attn", "mlp", "block_0"], (b, t, e))
    per_head = dict.fromkeys(["q", "k", "v", "cache_k", "cache_v"], (b, t, h, d))
    rest = {"scores": (b, h, t, t), "logits": (b, t, v), "last_logits": (b, v), "probs": (b, v), "next_token": (b,)}
    rest |= {"hidden": (b, 5, t, e)}
    assert {name: tuple(tensor.shape) for name, tensor in trace.items()} == per_token | per_head | rest


def test_a_sequence_traces_the_same_beside_another(demo: Decoder) -> None:
    ids = tokens(3, 11)
    together, alone = demo.trace(ids), demo.trace(ids[1:2])
    assert all(torch.equal(together[name][1], alone[name][0]) for name in alone)


def test_the_head_is_the_token_embedding_itself(demo: Decoder) -> None:
    hidden = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    norm = demo.ln_f
    normed = F.layer_norm(hidden.double(), (128,), norm.weight.double(), norm.bias.double(), norm.epsilon)
    exact = normed @ demo.wte.T.double()
    sizes = normed.abs() @ demo.wte.T.double().abs()
    # Any order of summing: Higham 2002, section 3.1. The norm itself takes as many roundings.
    assert ((demo.head(hidden).double() - exact).abs() <= 2 * demo.config.n_embd * 2.0**-24 * sizes).all()
    assert torch.equal(demo.lm_head.weight, demo.wte.T)


def test_the_original_sizes_have_heads_of_64_and_a_scale_of_an_eighth() -> None:
    for layers, heads, width in ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)):
        config = ModelConfig(n_layer=layers, n_head=heads, n_embd=width)
        assert (config.head_dim, config.scale, config.inner) == (64, 0.125, 4 * width)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([1, 2, 3]), r"shape \[3\]; it must be \[B, T\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"shape \[1, 0\]"),
        (torch.zeros(0, 4, dtype=torch.long), r"shape \[0, 4\]"),
        (torch.zeros(1, 1025, dtype=torch.long), "1025 tokens are more than the model's 1024 positions"),
        (torch.tensor([[5, 50257]]), "token id 50257 is outside the vocabulary, 0 to 50256"),
        (torch.tensor([[-1, 5]]), "token id -1 is outside"),
    ],
)
def test_invalid_token_ids_are_refused(demo: Decoder, ids: torch.Tensor, said: str) -> None:
    for method in (demo.logits, demo.trace):
        with pytest.raises(ValueError, match=said):
            method(ids)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.5), ("float16", 0.05)])
def test_half_precision_is_close_and_its_logits_are_float32(demo: Decoder, dtype: str, tolerance: float) -> None:
    half = load_model("demo", device="cpu", dtype=dtype)
    ids = tokens(2, 30)
    logits = half.logits(ids)
    assert half.dtype == getattr(torch, dtype)
    assert logits.dtype == torch.float32
    assert (logits - demo.logits(ids)).abs().max() < tolerance
