"""Directories as people have them: other names, other layouts, and what is refused with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.model import Decoder, ModelConfig, ModelError, load_model
from headrace.model.weight_names import CONTAINERS, WRAPPERS, plain_name
from headrace.model.weights import expected_shapes, read_config
from headrace.worker.engine.self_test import is_batch_invariant
from tests.unit.model.references import random_reference, saved

IDS = torch.tensor([[1, 2, 3, 90]])


@pytest.fixture(scope="module")
def expected(original: Path) -> Tensor:
    return read(original).logits(IDS)


def read(folder: Path) -> Decoder:
    return load_model(folder, device="cpu", dtype="float32")


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    write(folder, {change(name): tensor for name, tensor in tensors(folder).items()})


def configure(folder: Path, *removed: str, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in removed}
    (folder / "config.json").write_text(json.dumps(config | fields))


def error(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read(folder)
    return str(caught.value)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("pretrained_model.", "pretrained_model."),
        ("module._orig_mod.pretrained_model.", "module._orig_mod.pretrained_model."),
        ("_orig_mod.module.", "_orig_mod.module."),
    ],
)
def test_prefixes_of_training_code_are_stripped_and_said(
    folder: Path, expected: Tensor, prefix: str, said: str
) -> None:
    rename(folder, lambda name: prefix + name)
    model = read(folder)
    assert torch.equal(model.logits(IDS), expected)
    assert model.notes == (f"the prefix {said} of the tensor names was stripped",)


def test_wrappers_inside_a_name_are_stripped_too(folder: Path, expected: Tensor) -> None:
    rename(folder, lambda name: name.replace("h.0.", "h.0._orig_mod.").replace("transformer.", "transformer.module."))
    model = read(folder)
    assert torch.equal(model.logits(IDS), expected)
    assert len(model.notes) == 2


def test_a_usual_directory_needs_no_notes(original: Path) -> None:
    assert read(original).notes == ()


def test_a_tensor_under_two_prefixes_is_refused(folder: Path) -> None:
    weights = tensors(folder)
    write(folder, weights | {"module.transformer.ln_f.bias": weights["transformer.ln_f.bias"]})
    assert "ln_f.bias occurs twice" in error(folder)


def test_a_value_head_is_ignored_and_said(folder: Path, expected: Tensor) -> None:
    rename(folder, lambda name: "pretrained_model." + name)
    head = {"v_head.summary.weight": torch.ones(1, 36), "v_head.summary.bias": torch.ones(1)}
    write(folder, tensors(folder) | head)
    model = read(folder)
    assert torch.equal(model.logits(IDS), expected)
    assert set(model.notes) == {
        "the prefix pretrained_model. of the tensor names was stripped",
        "v_head.* was ignored: a value head is not part of the language model",
    }


def test_an_adapter_beside_the_weights_is_ignored_and_said(folder: Path, expected: Tensor) -> None:
    (folder / "adapter_config.json").write_text("{}")
    model = read(folder)
    assert torch.equal(model.logits(IDS), expected)
    assert model.notes == (
        "the adapter in adapter_config.json was ignored: only the weights in model.safetensors are computed",
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("score.weight", "a sequence classifier or reward model; use the language model that it was trained from"),
        ("qa_outputs.weight", "answers questions by marking text"),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight", "merge_and_unload()"),
        ("transformer.h.0.attn.c_attn.base_layer.weight", "merge_and_unload()"),
        ("transformer.h.0.crossattention.c_attn.weight", "attends to an encoder"),
        ("transformer.h.0.attn.rotary.inv_freq", "does not belong to a GPT-2 with 2 layers"),
    ],
)
def test_tensors_of_other_models_are_refused_with_the_way_out(folder: Path, name: str, said: str) -> None:
    write(folder, tensors(folder) | {name: torch.ones(3, 36)})
    message = error(folder)
    assert name in message
    assert "model.safetensors" in message
    assert said in message


# --- the head -------------------------------------------------------------------------------------------------------


def test_a_tied_head_stored_only_as_the_head_is_the_token_embedding(folder: Path, expected: Tensor) -> None:
    rename(folder, lambda name: name.replace("transformer.wte.weight", "lm_head.weight"))
    model = read(folder)
    assert torch.equal(model.logits(IDS), expected)
    assert model.config.tied_head


def test_an_untied_head_has_its_own_weight_and_changes_the_digest(original: Path, folder: Path) -> None:
    weights = tensors(folder)
    head = torch.randn(91, 36, generator=torch.Generator().manual_seed(1))
    write(folder, weights | {"lm_head.weight": head})
    configure(folder, tie_word_embeddings=False)
    model = read(folder)
    assert torch.equal(model.lm_head.weight, head.t())
    assert torch.equal(model.wte, weights["transformer.wte.weight"])
    assert model.digest != read(original).digest
    assert repr(model.config) != repr(read_config(original / "config.json"))  # it is in the fingerprint
    configure(folder, tie_word_embeddings=True)
    message = error(folder)
    assert "lm_head.weight differs from wte.weight" in message
    assert "write false in config.json" in message


# --- config.json ----------------------------------------------------------------------------------------------------


def test_sizes_are_read_under_every_name_that_transformers_reads(folder: Path, expected: Tensor) -> None:
    configure(
        folder, "n_embd", "n_layer", "n_head", "n_positions",
        hidden_size=36, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=40,
    )  # fmt: skip
    assert torch.equal(read(folder).logits(IDS), expected)
    configure(folder, n_layer=2)
    assert torch.equal(read(folder).logits(IDS), expected)
    configure(folder, n_layer=3)
    message = error(folder)
    assert "num_hidden_layers is 2; n_layer, another name for it, is 3" in message
    configure(folder, "n_layer", num_attention_heads=0)
    assert "num_attention_heads is 0; it must be a whole number" in error(folder)


def test_sizes_that_are_left_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2"}')
    config = read_config(path)
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (12, 12, 768, 1024)
    assert (config.vocab_size, config.inner, config.layer_norm_epsilon) == (50257, 3072, 1e-5)
    assert (config.activation, config.tied_head, config.family) == ("gelu_tanh", True, "gpt2")
    path.write_text('{"model_type": "gpt2", "n_embd": 100}')
    with pytest.raises(ModelError, match="n_embd 100 is not a multiple of n_head 12"):
        read_config(path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("quantization_config is {'quant", "float16")),
        ({"add_cross_attention": True}, ("add_cross_attention is True", "use a model without it")),
        ({"pruned_heads": {"0": [1]}}, ("pruned_heads is {'0': [1]}", "before pruning")),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, ("auto_map is", "never run", "gpt2")),
        ({"model_type": "llama"}, ("model_type is 'llama'", "gpt2")),
        ({"model_type": ["gpt2"]}, ("model_type is ['gpt2']", "gpt2")),
        ({"activation_function": ["relu"]}, ("activation_function is ['relu']", "gelu_new")),
        ({"activation_function": "gelu_10"}, ("activation_function is 'gelu_10'", "gelu_fast")),
        ({"vocab_size": 90}, ("shape [91, 36]", "write vocab_size 91", "resize_token_embeddings")),
        ({"n_positions": 39}, ("shape [40, 36]", "write n_positions 40")),
    ],
)
def test_what_cannot_be_computed_is_refused_by_field_value_file_and_way_out(
    folder: Path, fields: dict[str, Any], said: tuple[str, ...]
) -> None:
    configure(folder, **fields)
    message = error(folder)
    assert str(folder) in message
    assert all(part in message for part in said), message


def test_weights_stored_the_other_way_round_are_named(folder: Path) -> None:
    weights = tensors(folder)
    write(folder, {name: w.t() if name.endswith("c_attn.weight") else w for name, w in weights.items()})
    message = error(folder)
    assert "c_attn.weight has shape [108, 36]" in message
    assert "headrace convert" in message


def test_a_code_map_that_names_only_a_tokenizer_is_accepted(folder: Path, expected: Tensor) -> None:
    configure(folder, auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    assert torch.equal(read(folder).logits(IDS), expected)


# --- directories that are not models --------------------------------------------------------------------------------


def test_a_checkpoint_below_is_named(folder: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000", "runs"):
        (folder / name).mkdir()
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copy(folder / "config.json", folder / name)
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert f"HEADRACE_MODEL={folder / 'checkpoint-1000'}" in error(folder)


def test_an_adapter_is_named_with_its_base_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "openai-community/gpt2"})
    )
    message = error(folder)
    assert "adapter" in message
    assert "openai-community/gpt2" in message
    assert "merge_and_unload()" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "model.ckpt.index"])
def test_a_checkpoint_of_another_format_is_named_with_the_command(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = error(folder)
    assert name in message
    assert "headrace convert" in message


def test_a_safetensors_file_of_another_name_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gpt2.safetensors")
    message = error(folder)
    assert "gpt2.safetensors" in message
    assert "rename" in message


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"n_positions": 8, "n_embd": 2, "n_head": 1, "n_layer": 1},
        {"n_positions": 1, "n_embd": 1, "n_head": 1, "vocab_size": 1},
        {"activation_function": "gelu", "n_embd": 64, "n_head": 2},
        {"activation_function": "tanh"},
    ],
)
def test_very_small_models_and_other_activation_functions_are_batch_invariant(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    assert is_batch_invariant(read(saved(random_reference(**shape), tmp_path)))


# --- properties -----------------------------------------------------------------------------------------------------

PLAIN_NAMES = st.sampled_from([*sorted(expected_shapes(ModelConfig(1, 1, 4))), "lm_head.weight"])


@given(
    st.lists(st.sampled_from([*WRAPPERS, *CONTAINERS]), max_size=4),
    PLAIN_NAMES,
    st.lists(st.tuples(st.sampled_from(WRAPPERS), st.integers(1, 5)), max_size=2),
)
def test_any_combination_of_prefixes_is_stripped_and_said(
    prefix: list[str], name: str, inside: list[tuple[str, int]]
) -> None:
    parts = name.split(".")
    for wrapper, at in inside:
        parts.insert(at, wrapper)
    plain, removed = plain_name(".".join([*prefix, *parts]))
    assert plain == name
    assert set(removed.split(".")) - {""} == {*prefix, *(wrapper for wrapper, _ in inside)} - {"transformer"}
