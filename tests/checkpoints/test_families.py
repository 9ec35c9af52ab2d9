"""GPT-BigCode, GPT-Neo and the variants of GPT-2: random tiny models that transformers makes and computes.

Three ways compute each of them: transformers in float64, our float64 evaluation, and our decoder in float32.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.client.wire.activations import CHECKPOINTS
from headrace.model import Decoder, load_model
from headrace.worker.fidelity.references import ReferenceUnavailable, load_reference
from headrace.worker.fidelity.references.float64 import Float64

transformers = pytest.importorskip("transformers")

TOKENS = [3, 90, 0, 7, 7, 41, 12, 88, 5, 6, 23, 50]
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 40, "vocab_size": 91},
    "gpt_bigcode": {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 40, "vocab_size": 91},
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "hidden_size": 32,
        "max_position_embeddings": 40,
        "vocab_size": 91,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode without multi_query": ("gpt_bigcode", {"multi_query": False}),
    "gpt_bigcode of one head": ("gpt_bigcode", {"n_head": 1, "multi_query": False}),
    "gpt_bigcode, gelu, unscaled": (
        "gpt_bigcode",
        {"activation_function": "gelu", "scale_attn_weights": False, "n_inner": 40},
    ),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neo, local first": ("gpt_neo", {"attention_types": [[["local"], 1], [["global"], 2], [["local"], 1]]}),
    "gpt_neo, window 1": ("gpt_neo", {"window_size": 1}),
    "gpt_neo, window of the context": ("gpt_neo", {"window_size": 40, "intermediate_size": 24}),
    "unscaled": ("gpt2", {"scale_attn_weights": False}),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "reordered": ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "heads of 1": ("gpt2", {"n_head": 12, "n_embd": 12}),
    "heads of 5": ("gpt2", {"n_head": 3, "n_embd": 15}),
    "heads of 256": ("gpt2", {"n_head": 1, "n_embd": 256}),
    "untied": ("gpt2", {"tie_word_embeddings": False}),
    **{
        name: ("gpt2", {"activation_function": name})
        for name in ("gelu", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "relu", "silu", "tanh")
    },
}


@functools.cache
def made(case: str, folder: Path) -> Path:
    """The directory of a model with random weights, biases and norms included."""
    family, more = CASES[case]
    config = transformers.AutoConfig.for_model(family, **{**SIZES[family], **more}, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 1.2 / config.hidden_size**0.5)
    model.save_pretrained(folder / case)
    return folder / case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def ours(path: Path) -> Decoder:
    return load_model(path, device="cpu", dtype="float32")


@pytest.mark.parametrize("case", CASES)
def test_float64_and_our_decoder_compute_what_transformers_computes(case: str, folder: Path) -> None:
    path = made(case, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    for block in theirs.transformer.h:  # the other order cannot be computed in float64
        block.attn.reorder_and_upcast_attn = False
    with torch.inference_mode():
        logits = theirs.eval()(torch.tensor([TOKENS])).logits[0].numpy()
    exact = Float64(path).trace(TOKENS)
    # Of GPT-BigCode and GPT-Neo transformers always computes the softmax in float32.
    assert np.abs(exact["logits"] - logits).max() < (1e-10 if CASES[case][0] == "gpt2" else 1e-5)
    model = ours(path)
    traced = {name: tensor[0].numpy() for name, tensor in model.trace(torch.tensor([TOKENS])).items()}
    for number, (_, names, tolerance) in CHECKPOINTS.items():
        for name in set(names) - {"tokens", "next_token"}:
            assert traced[name].shape == exact[name].shape
            assert np.abs(traced[name] - exact[name]).max() <= tolerance, (number, name)
    assert np.abs(traced["hidden"] - exact["hidden"]).max() < 1e-4
    assert np.abs(model.logits(torch.tensor([TOKENS, TOKENS])).numpy() - exact["logits"]).max() < 1e-3


@pytest.mark.parametrize("case", ["gpt_bigcode", "gpt_bigcode without multi_query", "gpt_neo", "reordered"])
def test_the_right_tensors_are_read_from_transformers(case: str, folder: Path) -> None:
    theirs, exact = (
        load_reference("transformers", made(case, folder)).trace(TOKENS),
        Float64(folder / case).trace(TOKENS),
    )
    assert theirs.keys() == exact.keys()
    wrong = {name: float(np.abs(theirs[name] - exact[name]).max()) for name in exact}
    assert {name: worst for name, worst in wrong.items() if worst > 1e-3} == {}
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: t.shape for n, t in exact.items()}


@pytest.mark.parametrize("case", ["gpt_bigcode", "gelu", "unscaled", "untied"])
@pytest.mark.parametrize("name", ["candle", "tinygrad"])
def test_references_of_plain_gpt2_say_so(name: str, case: str, folder: Path) -> None:
    pytest.importorskip(name)
    with pytest.raises(ReferenceUnavailable, match="plain GPT-2 only"):
        load_reference(name, made(case, folder))


def test_keys_of_fewer_heads_have_a_smaller_shape(folder: Path) -> None:
    trace = ours(made("gpt_bigcode", folder)).trace(torch.tensor([TOKENS]))
    assert {name: list(trace[name][0].shape) for name in ("q", "k", "v", "cache_k", "cache_v", "scores")} == {
        "q": [12, 4, 16],
        **{name: [12, 1, 16] for name in ("k", "v", "cache_k", "cache_v")},
        "scores": [4, 12, 12],
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_types": [[["global"], 3]]}, "attention_types is"),
        ({"attention_types": [[["global", "wide"], 2]]}, "global or local"),
        ({"attention_types": [[["global"], 10**12]]}, "for each of the 4 layers"),
        ({"attention_types": "global"}, "for each of the 4 layers"),
        ({"attention_layers": ["local"] * 4}, "attention_types gives global, local"),
        ({"window_size": 0}, "window_size is 0"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_by_field(
    fields: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    from headrace.model.trusted_files import ModelError
    from headrace.model.weights import read_config

    raw = json.loads((made("gpt_neo", folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | fields))
    with pytest.raises(ModelError, match=words):
        read_config(tmp_path / "config.json")
